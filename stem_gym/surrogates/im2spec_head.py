"""What is fitted anew in every episode: Gaussian processes from the features of cells to the modes of their spectra.

A coefficient is a smooth function of the features and the place, plus what neither tells (it belongs to the specimen),
plus counting noise (it does not), whose size is known from the spectra. All is in closed form: one eigendecomposition
of each kernel matrix gives the evidence of every noise level (Rasmussen & Williams, "Gaussian Processes for Machine
Learning", 2006, eq. 2.30), and their predictions are averaged by it. Where a spectrum is missing its weight is zero,
and it drops out of every sum; so B episodes of different lengths are one batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stem_gym.surrogates.im2spec_modes import Modes

__all__ = [
    "KERNELS",
    "LEARNED",
    "NOISES",
    "Coefficients",
    "Evidence",
    "Kernel",
    "Sites",
    "evidence",
    "predict",
    "root_weight",
]

# Each kernel: length in the space of features, share of the variance that depends on the place alone, whether there is
# a linear part besides (what rises with a feature is expected to rise on beyond what was measured), and whether the
# learned features count or the brightness alone (where an image is unlike those of the training).
KERNELS = (
    (0.6, 0.1, 0.0, 1.0),
    (1.5, 0.1, 1.0, 1.0),
    (1.0, 0.5, 1.0, 1.0),
    (1.0, 0.9, 0.0, 1.0),
    (0.7, 0.1, 1.0, 0.0),
    (1.0, 0.5, 1.0, 0.0),
)
LEARNED = sum(kernel[3] > 0 for kernel in KERNELS)  # the first of them
NOISES = (1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 30.0)  # variance that features do not tell over that which they do
_PRIOR_SPECTRA = 2.0  # how many spectra the guess of the variance is worth


@dataclass(frozen=True)
class Sites:
    """Where cells are: in the space of features and in the image."""

    features: Tensor  # (B, N, d)
    place: Tensor  # (B, N, 2) fractions of the longer side

    def at(self, cell: Tensor) -> Sites:
        """Those of the cells (B, n)."""
        return Sites(*(part.gather(1, cell[..., None].expand(-1, -1, part.shape[-1])) for part in vars(self).values()))


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of the modes at N cells of B episodes, without noise."""

    mean: Tensor  # (B, N, K)
    variance: Tensor  # (B, N, K)


class Kernel(nn.Module):
    """Smooth in the features, smooth in the place, linear in the features."""

    def __init__(self) -> None:
        super().__init__()
        self.log_length = nn.Parameter(torch.tensor(math.log(0.15)))  # of the place
        self.log_slope = nn.Parameter(torch.tensor(math.log(0.1)))  # variance of the slope along a feature

    def forward(self, a: Sites, b: Sites, number: Tensor) -> Tensor:
        """Covariance (B, n, m) of the sites a and b with the kernel `number` (B,) of `KERNELS`.

        The part of the features is a rational quadratic with α = 1: a sum of Gaussians of many lengths.
        """
        length, share, linear, learned = torch.tensor(KERNELS, device=number.device)[number, :, None, None].unbind(1)
        left, right = _counted(a.features, learned), _counted(b.features, learned)
        product = left @ right.mT
        alike = 1.0 / (1.0 + 0.5 * _square_distance(left, right, product) / length**2)
        far = _square_distance(a.place, b.place, a.place @ b.place.mT)
        near = torch.exp(-0.5 * far * torch.exp(-2.0 * self.log_length))
        return (1.0 - share) * alike + share * near + linear * self.log_slope.exp() * product

    def own(self, sites: Sites, number: Tensor) -> Tensor:
        """Variance (B, N) of each site."""
        linear, learned = torch.tensor(KERNELS, device=number.device)[number, 2:, None, None].unbind(1)
        size = _counted(sites.features, learned).square().sum(-1)
        return 1.0 + linear[..., 0] * self.log_slope.exp() * size


def _counted(features: Tensor, learned: Tensor) -> Tensor:
    """Features (B, N, d) of which all but the first, the brightness, are multiplied with `learned` (B, 1, 1)."""
    return torch.cat((features[..., :1], learned * features[..., 1:]), dim=-1)


def _square_distance(a: Tensor, b: Tensor, product: Tensor) -> Tensor:
    return (a.square().sum(-1)[..., None] + b.square().sum(-1)[:, None] - 2.0 * product).clamp(min=0.0)


@dataclass(frozen=True)
class Evidence:
    """How well each kernel and noise level explains what was measured."""

    kernel: Tensor  # (B,) int64, the best of KERNELS
    noise: Tensor  # (B, K, L) probability of each noise level under that kernel
    value: Tensor  # (B, H, n) eigenvalues
    vector: Tensor  # (B, H, n, n)
    amplitude: Tensor  # (B, K, L) variance of the smooth function under that kernel

    def untold(self, noise: Tensor) -> Tensor:
        """(B, K, L) variance that neither features nor counting noise (B, K) explain."""
        levels = torch.tensor(NOISES, device=noise.device, dtype=self.amplitude.dtype)
        return (self.amplitude * levels - noise[..., None]).clamp(min=0.0)


def evidence(kernel: Kernel, sites: Sites, coefficients: Tensor, weight: Tensor, many: int = len(KERNELS)) -> Evidence:
    """Which of the first `many` kernels and which noise; sites and coefficients (B, n, K) measured, weight (B, n).

    The weight is the inverse of the noise variance, up to a factor that the noise level takes in.
    """
    rows = len(weight)
    root = root_weight(weight)
    number = torch.arange(many, device=weight.device).repeat(rows)
    repeated = Sites(*(part.repeat_interleave(many, 0) for part in vars(sites).values()))
    matrix = kernel(repeated, repeated, number).unflatten(0, (rows, many))
    matrix = root[:, None, :, None] * matrix * root[:, None, None]
    value, vector = torch.linalg.eigh(matrix)
    value, vector = value.double().clamp(min=0.0), vector.double()
    noise = torch.tensor(NOISES, device=weight.device, dtype=torch.float64)
    turned = vector.mT @ (root[..., None] * coefficients)[:, None].double()  # (B, H, n, K)
    total = value[..., None] + noise  # (B, H, n, L)
    fit = torch.einsum("bhnk,bhnl->bhkl", turned.square(), 1.0 / total)
    there = weight > 0
    spectra = there.sum(1).double()[:, None, None, None]
    size = (root[..., None] * coefficients).square().sum(1)[:, None, :, None] / spectra.clamp(min=1.0)
    amplitude = (fit + _PRIOR_SPECTRA * size) / (spectra + _PRIOR_SPECTRA)
    missing = (~there).sum(1).double()[:, None, None]
    volume = total.log().sum(2) - missing * noise.log()  # (B, H, L)
    likelihood = -0.5 * (spectra + _PRIOR_SPECTRA) * amplitude.clamp(min=1e-30).log() - 0.5 * volume[:, :, None]
    best = likelihood.logsumexp(-1).sum(-1).argmax(-1)  # (B,)
    rowed = torch.arange(rows, device=weight.device)
    return Evidence(
        best,
        torch.softmax(likelihood[rowed, best], -1).to(coefficients.dtype),
        value[rowed, best].to(coefficients.dtype),
        vector[rowed, best].to(coefficients.dtype),
        amplitude[rowed, best].to(coefficients.dtype),
    )


def predict(
    kernel: Kernel, measured: Sites, everywhere: Sites, modes: Modes, weight: Tensor, found: Evidence
) -> Coefficients:
    """Noise-free coefficients at the cells `everywhere` (B, N, …) from those measured; the law of total variance."""
    root = root_weight(weight)
    cross = kernel(everywhere, measured, found.kernel) * root[:, None]  # (B, N, n)
    noise = torch.tensor(NOISES, device=weight.device, dtype=cross.dtype)
    turned = found.vector.mT @ (root[..., None] * modes.coefficients)  # (B, n, K)
    inverse = 1.0 / (found.value[..., None] + noise)  # (B, n, L)
    along = cross @ found.vector  # (B, N, n)
    count = turned.shape[-1]
    weights = (turned[..., None] * inverse[:, :, None]).flatten(2)  # (B, n, K·L)
    mean = (along @ weights).unflatten(2, (count, len(NOISES)))  # (B, N, K, L)
    own = kernel.own(everywhere, found.kernel)
    left = (own[..., None] - along.square() @ inverse).clamp(min=0.0)  # (B, N, L)
    middle = (mean * found.noise[:, None]).sum(-1)
    within = torch.einsum("bnl,bkl->bnk", left, found.amplitude * found.noise)
    between = (mean.square() * found.noise[:, None]).sum(-1) - middle.square()
    untold = ((found.untold(modes.own_noise) * found.noise).sum(-1) + modes.hidden)[:, None]
    return Coefficients(middle, within + untold + between.clamp(min=0.0))


def root_weight(weight: Tensor) -> Tensor:
    """(B, n) roots of the weights over their mean, 0 where no spectrum."""
    there = weight > 0
    mean = weight.sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    return torch.where(there, weight / mean.clamp(min=1e-30), 0.0).sqrt()
