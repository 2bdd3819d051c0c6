"""Smooth random fields on a grid: Gaussian processes of a given length, a few random numbers each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from stem_gym.core.errors import ConfigError

LOGISTIC_10_TO_90 = 2.0 * math.log(9.0)  # width from 10 to 90 % of a logistic step of scale 1
_PERIOD = 1.5  # of the longest wave, in fields; longer than one, so that opposite borders do not resemble one another
_WAVES_PER_LENGTH = 0.67  # shorter waves, of less than exp(-(2 pi 0.67)^2 / 4) = 1 % of the power, are left out


class RandomRows(Protocol):
    """What a recipe needs of `stem_gym.core.streams.Streams`."""

    def uniform(self, rows: Tensor, shape: tuple[int, ...] = ()) -> Tensor: ...
    def normal(self, rows: Tensor, shape: tuple[int, ...] = ()) -> Tensor: ...


def smooth_fields(
    streams: RandomRows, rows: Tensor, count: int, shape: tuple[int, int], length_fraction: float
) -> Tensor:
    """`count` independent fields for each of `rows` (n,): (n, count, H, W), mean 0 and variance 1 over the ensemble.

    The correlation is near exp(−r² / length²), `length_fraction` in fractions of the field's width W: each field is a
    sum of products of sines and cosines of x and y with normal weights. Raises ConfigError for a length beyond 0.03 to
    2 widths.
    """
    if not 0.03 <= length_fraction <= 2.0:
        raise ConfigError(f"A smooth field's length must be 0.03 to 2 of its width; given {length_fraction}.")
    along_y, along_x = (_waves(cells, length_fraction * shape[1] / cells) for cells in shape)
    weight = streams.normal(rows, (count, along_y.shape[0], along_x.shape[0]))
    # Sums over the waves, one by one: a matrix product would round differently with the number of rows.
    lines = _sum_of_products(weight.unbind(dim=3), along_x.to(weight.device))  # (n, count, A, W)
    return _sum_of_products(lines.unbind(dim=2), along_y.to(weight.device)[..., None])


def _sum_of_products(weights: tuple[Tensor, ...], waves: Tensor) -> Tensor:
    """Σ_m weights[m][…, None] · waves[m], where waves[m] is (W,), or weights[m][…, None, :] · waves[m] (H, 1)."""
    axis = -1 if waves.ndim == 2 else -2
    total = weights[0].unsqueeze(axis) * waves[0]
    for weight, wave in zip(weights[1:], waves[1:], strict=True):
        total = total + weight.unsqueeze(axis) * wave
    return total


def soft_step(fields: Tensor, level: Tensor, width_cells: Tensor | float, length_cells: float) -> Tensor:
    """1 where fields (n, F, H, W) exceed levels (n, F), 0 below, with soft boundaries of about one width.

    `width_cells`, from 10 to 90 % and at least one cell, is a number or broadcasts against the fields. The width is
    kept by dividing by the field's own slope, but for the flat places of a field of correlation length `length_cells`:
    there the boundary is wider.
    """
    down, across = torch.gradient(fields, dim=(-2, -1))
    # A field of this length has an rms slope of 2 / length: half of that is the floor.
    steepness = torch.sqrt(down * down + across * across + 1.0 / length_cells**2)
    distance_cells = (fields - level[..., None, None]) / steepness
    return logistic(distance_cells * (LOGISTIC_10_TO_90 / torch.as_tensor(width_cells).clamp(min=1.0)))


def uneven(streams: RandomRows, rows: Tensor, shape: tuple[int, int], change: tuple[float, float, float]) -> Tensor:
    """Relative thickness (n, H, W) about 1, at least 0.1: a wedge in a random direction and a smooth roughness.

    `change` is (largest relative change of the wedge across the field, rms roughness, its length in fields).
    """
    wedge, roughness, length_fraction = change
    uniform = streams.uniform(rows, (2,))[..., None, None]
    angle, slope = 2.0 * math.pi * uniform[:, 0], wedge * uniform[:, 1]
    y, x = (torch.linspace(-0.5, 0.5, cells, device=uniform.device) for cells in shape)
    ramp = slope * (torch.cos(angle) * x + torch.sin(angle) * y[:, None])
    rough = roughness * smooth_fields(streams, rows, 1, shape, length_fraction)[:, 0]
    return (1.0 + ramp + rough).clamp(min=0.1)


@lru_cache(maxsize=32)
def _waves(cells: int, length_fraction: float) -> Tensor:
    """Waves (M, cells) whose squares sum to 1 at every cell: exp(−(q length)² / 8) at wave number q."""
    highest = math.ceil(_WAVES_PER_LENGTH * _PERIOD / length_fraction)
    order = torch.arange(highest + 1, dtype=torch.float64)
    place = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    phase = 2.0 * math.pi * order[:, None] * place / _PERIOD
    # A Gaussian correlation exp(-x²/l²) has the power exp(-(q l)²/4), for waves of either direction.
    amplitude = torch.exp(-((2.0 * math.pi * order * length_fraction / _PERIOD) ** 2) / 8.0)
    amplitude[1:] *= math.sqrt(2.0)
    waves = torch.cat((amplitude[:, None] * torch.cos(phase), amplitude[1:, None] * torch.sin(phase[1:])))
    return (waves / amplitude.square().sum().sqrt()).to(torch.float32)


def logistic(x: Tensor) -> Tensor:
    """1 / (1 + e^−x); unlike torch.sigmoid it rounds alike wherever in an array an element is."""
    return 1.0 / (1.0 + torch.exp(-x.clamp(min=-80.0)))


def weighted_sum(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ weight · part, one after the other, so that it rounds alike whatever the number of rows."""
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total + part * weight
    return total
