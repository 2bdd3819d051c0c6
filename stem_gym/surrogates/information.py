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
from torch.nn.functional import embedding_bag

from stem_gym.core.experiments import Noise

_CELLS = 192  # of values
_NODES = 72  # of measurements
_REACH = 6.0  # deviations of noise that the nodes of measurements go beyond the values
_TINY = 1e-30
_IN_CACHE = 2**18  # values


@dataclass(frozen=True)
class Forecast:
    """Values that laws say experiments may have, and the noise of a measurement."""

    value: Tensor  # (B, L, S, E)
    noise: Noise
    noise_factor: Tensor  # (B,)
    weight: Tensor | None = None  # (B, L, S) of the values, adding up to 1; None: all alike
    same: Tensor | None = None  # (L, E) the first of these experiments of which each law says the same; None: itself

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (B, L, E) of a measurement."""
        mean, spread = self.value_moments()
        square = self.noise.absolute**2 + self.noise.relative**2 * (mean.square() + spread)
        return mean, spread + self.noise_factor.square()[:, None, None] * square

    def even_moments(self) -> tuple[Tensor, Tensor]:
        """The same in units of the noise, in which predictions are closer to Gaussians."""
        mean, spread = self.value_moments(even=True)
        return mean, spread + self.noise_factor.square()[:, None, None]

    def value_moments(self, even: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and variance (B, L, E) of the values, without noise; `even`: in units of it."""
        value, weight, place = self.columns()
        value = evened(value, self.noise) if even else value
        mean = value.mean(2) if weight is None else (weight * value).sum(2)
        square = (value - mean.unsqueeze(2)).square()
        spread = square.mean(2) if weight is None else (weight * square).sum(2)
        shape = (-1, self.value.shape[1], self.value.shape[3])
        return mean[:, place].reshape(shape), spread[:, place].reshape(shape)

    def columns(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """The values (B, C, S) and weights of all laws and experiments that differ, and each one's place (L E,) in C.

        What laws say the same of is worked out once.
        """
        _, laws, _, experiments = self.value.shape
        value = self.value.mT.flatten(1, 2)  # (B, L E, S)
        weight = None if self.weight is None else self.weight.repeat_interleave(experiments, 1)
        if self.same is None:
            return value, weight, torch.arange(laws * experiments, device=value.device)
        first = self.same + experiments * torch.arange(laws, device=value.device).unsqueeze(1)
        apart, place = first.unique(return_inverse=True)
        weight = None if weight is None else weight.index_select(1, apart)
        return value.index_select(1, apart), weight, place.flatten()


Figure = Callable[[Tensor, Forecast], Tensor]


def _in_blocks(figure: Figure) -> Figure:
    """The same figure, worked out for so many rows at once as the cache holds: of many values, several times sooner."""

    @functools.wraps(figure)
    def blocked(probability: Tensor, forecast: Forecast) -> Tensor:
        rows = max(1, _IN_CACHE // forecast.value[0].numel())
        if len(probability) <= rows:
            return figure(probability, forecast)
        weights = repeat(None) if forecast.weight is None else forecast.weight.split(rows)
        values, factors = forecast.value.split(rows), forecast.noise_factor.split(rows)
        told = [
            figure(part, Forecast(value, forecast.noise, factor, weight, forecast.same))
            for part, value, factor, weight in zip(probability.split(rows), values, factors, weights, strict=False)
        ]
        return torch.cat(told)

    return blocked


def evened(value: Tensor, noise: Noise) -> Tensor:
    """Values in units of the noise's deviation there."""
    if noise.relative == 0.0:
        return value / noise.absolute
    part = value * (noise.relative / noise.absolute)
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
    dimension, even in units of the noise: each value is taken for the middle of its cell of a grid, with the density of
    measurements at some nodes. A sum over nodes that are closer than 1.5 deviations of the noise is the integral; where
    values spread over more than some 200 deviations it is far too small, within its bounds. It has no gradient in the
    values.
    """
    value, weight, place = forecast.columns()
    even = evened(value, forecast.noise)  # (B, C, S)
    rows, columns, draws = even.shape
    # Cells lie around multiples of a step, zero among them: below a threshold many values are exactly that.
    low, high = even.flatten(1).amin(1), even.flatten(1).amax(1)
    step = ((high - low) / (_CELLS - 2)).clamp(min=1e-4)
    first = torch.floor(low / step)
    middle = (first.unsqueeze(1) + torch.arange(_CELLS, device=even.device)) * step.unsqueeze(1)
    cell = even * step.reciprocal()[:, None, None] - (first - 0.5)[:, None, None]
    cell = cell.int().clamp_(0, _CELLS - 1)
    cell += _CELLS * torch.arange(rows, dtype=torch.int32, device=even.device)[:, None, None]
    density = _measured(middle, forecast).flatten(0, 1)  # (B G, G')
    density, weight = (density / draws, None) if weight is None else (density, weight.flatten(0, 1).to(density))
    probability = probability.to(density)
    # Sums of lines that are picked from a table, in one pass.
    measured = embedding_bag(cell.flatten(0, 1), density, mode="sum", per_sample_weights=weight)
    measured = measured.reshape(rows, columns, _NODES)
    known = _surprise(measured)[:, place].unflatten(1, (probability.shape[1], -1))  # (B, L, E)
    measured = measured.index_select(1, place).reshape(rows, probability.shape[1], -1)
    mixture = torch.bmm(probability.unsqueeze(1), measured).reshape(rows, -1, _NODES)
    return (_surprise(mixture) - torch.bmm(probability.unsqueeze(1), known).squeeze(1)).clamp(min=0.0)


def _surprise(probability: Tensor) -> Tensor:
    """Entropy (…,), in nats, of probabilities (…, G)."""
    return -(probability * probability.clamp(min=_TINY).log()).sum(-1)


def _measured(middle: Tensor, forecast: Forecast) -> Tensor:
    """Probabilities (B, G, G') of measurements at nodes, for values in the middle of cells (B, G)."""
    noise = forecast.noise
    value = unevened(middle, noise)
    spread = (noise.absolute**2 + (noise.relative * value).square()) * forecast.noise_factor.square().unsqueeze(1)
    beyond = _REACH * spread.sqrt()
    first, last = (evened(end, noise) for end in ((value - beyond).amin(1), (value + beyond).amax(1)))
    part = torch.linspace(0.0, 1.0, _NODES, device=middle.device)
    node = unevened(first.unsqueeze(1) * (1.0 - part) + last.unsqueeze(1) * part, noise)  # (B, G')
    width = torch.sqrt(noise.absolute**2 + (noise.relative * node).square())  # of a node, all alike in even units
    square = (node.unsqueeze(1) - value.unsqueeze(2)).square() * (-0.5 / spread).unsqueeze(2)
    return torch.softmax(square + width.log().unsqueeze(1), dim=2)


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
    mean, spread = forecast.value_moments()
    weight = probability.unsqueeze(2)
    return (weight * (spread + mean.square())).sum(1) - (weight * mean).sum(1).square()
