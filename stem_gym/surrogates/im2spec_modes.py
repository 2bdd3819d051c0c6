"""Few numbers for a spectrum: principal components of the spectra measured so far, weighted for counting noise.

Channels are divided by the root of their mean, so that Poisson noise is alike in all of them (Keenan & Kotula, Surf.
Interface Anal. 36, 203, 2004); nothing else is assumed, so that any axis and any number of channels will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Modes", "find_modes", "without_spikes"]

_MEDIAN_SHARE, _MEAN_SHARE = 0.1, 1e-3  # of the mean spectrum, added to it, so that empty channels weigh little
_SPIKE_NOISE = 8.0  # standard deviations above the mean spectrum
_SPIKE_NEIGHBOUR = 0.2  # of its height; the neighbours of a real line, two channels wide, have half of it
_NOISELESS = 1e9  # times the noise: from there on all of a mode is the specimen's, and squares would overflow
_EDGE_MARGIN = 1.1  # how far a mode must be beyond what noise makes; the noise is known to some percent
_NORMAL_MAD = 1.4826  # standard deviation over median absolute deviation of normal noise


@dataclass(frozen=True)
class Modes:
    """spectrum = centre + coefficients @ vectors, for B episodes of n spectra each."""

    centre: Tensor  # (B, S) mean spectrum
    scale: Tensor  # (B, S) factor that makes counting noise alike in all channels
    white: Tensor  # (B, K, S) orthogonal, of unit length or zero, the strongest first
    coefficients: Tensor  # (B, n, K) of the measured spectra
    rest: Tensor  # (B, S) standard deviation that the modes leave out, counting noise not among it
    noise: Tensor  # (B,) variance that counting noise gives every coefficient of another spectrum, of mean weight
    own_noise: Tensor  # (B, K) the same of the measured spectra themselves: the modes lean towards their noise
    hidden: (
        Tensor  # (B, K) variance of the specimen that would not have been seen along a mode that noise may have made
    )

    @property
    def vectors(self) -> Tensor:
        """The modes in the spectra's own unit, (B, K, S)."""
        return self.white / self.scale[:, None]

    def coefficients_of(self, spectra: Tensor) -> Tensor:
        """Those (B, N, K) that come nearest to spectra (B, N, S), in units of counting noise."""
        return ((spectra - self.centre[:, None]) * self.scale[:, None]) @ self.white.mT


def without_spikes(spectra: Tensor, weight: Tensor) -> Tensor:
    """Spectra (B, n, S) where single channels far above the mean spectrum take the mean of their two neighbours.

    An X-ray or a cosmic ray strikes one channel; a line of the specimen is wider. `weight` (B, n), 0 where no spectrum.
    """
    centre, scale = _centre_and_scale(spectra, weight)
    white = torch.where(weight[..., None] > 0, (spectra - centre[:, None]) * scale[:, None], 0.0)
    left, right = _beside(white)
    sharp = torch.where(weight[..., None] > 0, white - 0.5 * (left + right), torch.nan).flatten(1)
    noise = _NORMAL_MAD * sharp.abs().nanmedian(1).values[:, None, None]
    high = white > _SPIKE_NOISE * noise
    alone = torch.maximum(left.abs(), right.abs()) < _SPIKE_NEIGHBOUR * white
    before, after = _beside(spectra)
    return torch.where(high & alone, 0.5 * (before + after), spectra)


def _beside(spectra: Tensor) -> tuple[Tensor, Tensor]:
    """For every channel the one before and the one after it; the only neighbour twice at the ends."""
    if spectra.shape[-1] < 2:
        return spectra, spectra
    return functional.pad(spectra, (1, 0), mode="reflect")[..., :-1], functional.pad(spectra, (0, 1), mode="reflect")[
        ..., 1:
    ]


def find_modes(spectra: Tensor, weight: Tensor, count: int) -> Modes:
    """The `count` strongest modes of spectra (B, n, S); weight (B, n): information of each, 0 where no spectrum.

    Modes that noise alone may have made keep their direction, but the measured spectra are taken to have nothing along
    them. Where there are fewer spectra or channels than modes, the last ones are zero. No derivative is taken.
    """
    with torch.no_grad():
        share = weight / weight.sum(1, keepdim=True).clamp(min=1e-30)
        centre, scale = _centre_and_scale(spectra, weight)
        white = torch.where(share[..., None] > 0, (spectra - centre[:, None]) * scale[:, None], 0.0)
        rooted = share.sqrt()[..., None] * white
        # Few spectra leave many eigenvalues at zero, where single precision may not converge.
        value, vector = (part.to(rooted) for part in torch.linalg.eigh((rooted.mT @ rooted).double()))  # ascending
        keep = min(count, value.shape[-1])
        vector = vector[..., -keep:].flip(-1)  # (B, S, keep)
        rest, noise = _left_out(white - (white @ vector) @ vector.mT, share, count)
        strength = functional.pad(value[..., -keep:].flip(-1), (0, count - keep))
        gamma = white.shape[-1] / (share > 0).sum(1, keepdim=True)
        signal = _signal(strength, noise[:, None], gamma)
        there = strength > 1e-6 * value[..., -1:]
        vector = functional.pad(vector, (0, count - keep)) * there[:, None]
        coefficients = (white @ vector) * (signal > 0)[:, None]
        hidden = torch.where(there & (signal == 0), gamma.sqrt() * noise[:, None], 0.0)
        rest = rest[:, None] / scale
        return Modes(centre, scale, vector.mT, coefficients, rest, noise, strength - signal, hidden)


def _centre_and_scale(spectra: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean spectrum (B, S), and the factor (B, S) that makes counting noise alike in all channels."""
    share = weight / weight.sum(1, keepdim=True).clamp(min=1e-30)
    centre = torch.einsum("bn,bns->bs", share, torch.where(share[..., None] > 0, spectra, 0.0))
    positive = centre.clamp(min=0.0)
    floor = _MEDIAN_SHARE * positive.median(1, keepdim=True).values + _MEAN_SHARE * positive.mean(1, keepdim=True)
    variance = positive + floor
    return centre, torch.where(variance > 0, variance.clamp(min=1e-30).rsqrt(), 1.0)


def _signal(strength: Tensor, noise: Tensor, gamma: Tensor) -> Tensor:
    """Variance (B, K) of the specimen along modes that appear with variance `strength`, under noise of variance (B, 1).

    In n spectra of S channels noise alone makes modes up to noise · (1 + √γ)², γ = S / n (B, 1), and a mode of true
    variance ℓ appears as (ℓ + noise) (1 + γ noise / ℓ) where ℓ is more than √γ noise, and is not seen where it is less
    (Baik & Silverstein, J. Multivar. Anal. 97, 1382, 2006).
    """
    ratio = (strength / noise.clamp(min=1e-30)).clamp(max=_NOISELESS)
    half = 0.5 * (ratio - 1.0 - gamma)
    signal = (half + (half.square() - gamma).clamp(min=0.0).sqrt()) * noise
    made_by_noise = ratio < _EDGE_MARGIN * (1.0 + gamma.sqrt()).square()
    signal = torch.where(ratio < _NOISELESS, torch.minimum(signal, strength), strength)
    return torch.where(made_by_noise, 0.0, signal)


def _left_out(rest: Tensor, share: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What is left (B, n, S) of the whitened spectra: standard deviation beyond noise, variance of noise; (B,) each.

    Noise differs from channel to channel, what the modes left out does not: half the mean square of the steps from one
    channel to the next is noise. The modes have taken some of both, as they were fitted to the same spectra.
    """
    channels, spectra = rest.shape[-1], (share > 0).sum(1)
    if channels < 2:
        return torch.zeros_like(share[:, 0]), torch.zeros_like(share[:, 0])
    freedom = spectra / (spectra - 1 - count).clamp(min=1) * channels / max(1, channels - count)
    whole = torch.einsum("bn,bns->b", share, rest.square()) / channels
    noise = 0.5 * torch.einsum("bn,bns->b", share, rest.diff(dim=-1).square()) / (channels - 1)
    return ((whole - noise).clamp(min=0.0) * freedom).sqrt(), noise * freedom
