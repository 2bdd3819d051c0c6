"""What an experiment is expected to tell about which law is true, and other figures of merit, for B rows at once.

All take the probabilities of L laws (B, L) and a `Forecast`: what each law says of E experiments, as S weighted values.
Noise is that of the experiment description; it is made even by measuring values in units of it, as
u(v) = asinh(relative · v / absolute) / relative, whose derivative is one over the noise's deviation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from stem_gym.core.experiments import Noise

_CELLS = 96  # of values, and of measurements
_REACH = 6.0  # deviations of noise that the cells of measurements go beyond those of values
_TINY = 1e-30
_IN_CACHE = 2**17  # values


@dataclass(frozen=True)
class Forecast:
    """Values that laws say experiments may have, and the noise of a measurement."""

    value: Tensor  # (B, L, S, E)
    noise: Noise
    noise_factor: Tensor  # (B,)
    weight: Tensor | None = None  # (B, L, S) of the values, adding up to 1; None: all alike

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (B, L, E) of a measurement."""
        mean, spread = self.weighted(self.value)
        square = self.noise.absolute**2 + self.noise.relative**2 * (mean.square() + spread)
        return mean, spread + self.noise_factor.square()[:, None, None] * square

    def even_moments(self) -> tuple[Tensor, Tensor]:
        """The same in units of the noise, in which predictions are closer to Gaussians."""
        mean, spread = self.weighted(evened(self.value, self.noise))
        return mean, spread + self.noise_factor.square()[:, None, None]

    def weighted(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (B, L, E) of values (B, L, S, E), without noise."""
        if self.weight is None:
            mean = value.mean(2)  # not `var`, which takes ten times as long over a middle dimension
            return mean, (value - mean.unsqueeze(2)).square().mean(2)
        weight = self.weight.unsqueeze(3)
        mean = (weight * value).sum(2)
        return mean, (weight * (value - mean.unsqueeze(2)).square()).sum(2)


Figure = Callable[[Tensor, Forecast], Tensor]


def _in_blocks(figure: Figure) -> Figure:
    """The same figure, worked out for so many rows at once as the cache holds: of many rows, 3 to 5 times sooner."""

    @functools.wraps(figure)
    def blocked(probability: Tensor, forecast: Forecast) -> Tensor:
        rows = max(1, _IN_CACHE // forecast.value[0].numel())
        if len(probability) <= rows:
            return figure(probability, forecast)
        weights = repeat(None) if forecast.weight is None else forecast.weight.split(rows)
        values, factors = forecast.value.split(rows), forecast.noise_factor.split(rows)
        told = [
            figure(part, Forecast(value, forecast.noise, factor, weight))
            for part, value, factor, weight in zip(probability.split(rows), values, factors, weights, strict=False)
        ]
        return torch.cat(told)

    return blocked


def evened(value: Tensor, noise: Noise) -> Tensor:
    """Values in units of the noise's deviation there."""
    if noise.relative == 0.0:
        return value / noise.absolute
    part = value * (noise.relative / max(noise.absolute, _TINY))
    size = part.abs()  # asinh by the logarithm, which vectorises
    return torch.copysign((size + torch.sqrt(size.square() + 1.0)).log(), part) / noise.relative


def unevened(even: Tensor, noise: Noise) -> Tensor:
    """The inverse of `evened`."""
    if noise.relative == 0.0:
        return even * noise.absolute
    return torch.sinh(even * noise.relative) * (noise.absolute / noise.relative)


@_in_blocks
def expected_information(probability: Tensor, forecast: Forecast) -> Tensor:
    """Nats (B, E) that a measurement is expected to tell about the law: 0 to the entropy of the probabilities.

    The mutual information of law and measurement (Lindley, Ann. Math. Stat. 27, 986, 1956) by quadrature in one
    dimension: values are counted into cells that are even in units of the noise, each with the exact probabilities of
    measurements from its middle.
    """
    even = evened(forecast.value, forecast.noise)  # (B, L, S, E)
    rows, laws, draws, experiments = even.shape
    low, high = even.amin((1, 2, 3)), even.amax((1, 2, 3))
    step = ((high - low) / (_CELLS - 1)).clamp(min=1e-6)
    place = (even - low[:, None, None, None]) / step[:, None, None, None]
    left = place.long().clamp_(0, _CELLS - 2)
    part = place - left
    base = torch.arange(rows * laws, device=even.device).reshape(rows, laws, 1, 1) * experiments
    first = ((base + torch.arange(experiments, device=even.device)) * _CELLS + left).flatten()
    counts = torch.zeros(rows * laws * experiments * _CELLS, dtype=even.dtype, device=even.device)
    weight = 1.0 / draws if forecast.weight is None else forecast.weight.unsqueeze(3)
    counts.index_add_(0, first, ((1.0 - part) * weight).flatten())
    counts.index_add_(0, first + 1, (part * weight).flatten())
    share = counts.reshape(rows, laws * experiments, _CELLS)
    middle = low.unsqueeze(1) + step.unsqueeze(1) * torch.arange(_CELLS, device=even.device)
    measured = torch.bmm(share, _measured(middle, forecast)).reshape(rows, laws, experiments, -1)
    weighted = probability[:, :, None, None] * measured
    mixture = weighted.sum(1, keepdim=True).clamp(min=_TINY)
    told = weighted * (measured.clamp(min=_TINY) / mixture).log()
    return told.sum((1, 3)).clamp(min=0.0)


def _measured(middle: Tensor, forecast: Forecast) -> Tensor:
    """Probabilities (B, G, G') of measurements in cells, for values in the middle of others (B, G)."""
    noise, factor = forecast.noise, forecast.noise_factor.unsqueeze(1)
    beyond = _REACH * factor
    ends = torch.linspace(0.0, 1.0, _CELLS + 1, device=middle.device)
    edge = (middle[:, :1] - beyond) * (1.0 - ends) + (middle[:, -1:] + beyond) * ends  # (B, G' + 1)
    value = unevened(middle, noise)
    deviation = factor * torch.sqrt(noise.absolute**2 + (noise.relative * value).square())
    z = (unevened(edge, noise).unsqueeze(1) - value.unsqueeze(2)) / deviation.unsqueeze(2)
    below = torch.special.ndtr(z)
    below[:, :, 0], below[:, :, -1] = 0.0, 1.0
    return below.diff(dim=2)


@_in_blocks
def information_bound(probability: Tensor, forecast: Forecast) -> Tensor:
    """An upper bound (B, E) of the information, of predictions taken as Gaussians in units of the noise.

    −Σ P_i ln Σ_j P_j exp(−KL(i ‖ j)) (Kolchinsky and Tracey, Entropy 19, 361, 2017, equation 10).
    """
    mean, variance = forecast.even_moments()
    ratio = variance.unsqueeze(2) / variance.unsqueeze(1)  # (B, i, j, E)
    apart = (mean.unsqueeze(2) - mean.unsqueeze(1)).square() / variance.unsqueeze(1)
    divergence = 0.5 * (ratio + apart - 1.0 - ratio.log())
    alike = (probability[:, None, :, None] * torch.exp(-divergence)).sum(2)
    return -(probability.unsqueeze(2) * alike.clamp(min=_TINY).log()).sum(1)


@_in_blocks
def box_hill(probability: Tensor, forecast: Forecast) -> Tensor:
    """Box and Hill's criterion (B, E), Technometrics 9, 57 (1967), equation 12, of Gaussian predictions.

    Σ_{i<j} P_i P_j / 2 · [(σ_i² − σ_j²)² / (σ_i² σ_j²) + (ŷ_i − ŷ_j)² (1/σ_i² + 1/σ_j²)], each σ² with the noise.
    """
    mean, variance = forecast.moments()
    one, other = variance.unsqueeze(2), variance.unsqueeze(1)
    spread = (one - other).square() / (one * other)
    apart = (mean.unsqueeze(2) - mean.unsqueeze(1)).square() * (1.0 / one + 1.0 / other)
    pair = probability.unsqueeze(2) * probability.unsqueeze(1)
    return 0.25 * (pair.unsqueeze(3) * (spread + apart)).sum((1, 2))  # every pair is there twice


@_in_blocks
def bma_variance(probability: Tensor, forecast: Forecast) -> Tensor:
    """Variance (B, E) of the value that the average over the laws predicts, the noise left out."""
    mean, spread = forecast.weighted(forecast.value)
    weight = probability.unsqueeze(2)
    return (weight * (spread + mean.square())).sum(1) - (weight * mean).sum(1).square()
