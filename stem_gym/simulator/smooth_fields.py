"""Smooth random fields on a grid: Gaussian processes of a given length, a few random numbers each."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from stem_gym.core.errors import ConfigError

_PERIOD = 1.5  # of the longest wave, in fields; longer than one, so that opposite borders do not resemble one another
_WAVES_PER_LENGTH = 0.67  # shorter waves, of less than exp(-(2 pi 0.67)^2 / 4) = 1 % of the power, are left out


class NormalRows(Protocol):
    """What a field needs of `stem_gym.core.streams.Streams`."""

    def normal(self, rows: Tensor, shape: tuple[int, ...] = ()) -> Tensor: ...


def smooth_fields(
    streams: NormalRows, rows: Tensor, count: int, shape: tuple[int, int], length_fraction: float
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
    along_y, along_x = along_y.to(weight.device), along_x.to(weight.device)
    return torch.einsum("nfab,ay,bx->nfyx", weight, along_y, along_x)


@lru_cache(maxsize=32)
def _waves(cells: int, length_fraction: float) -> Tensor:
    """Waves (M, cells) whose squares sum to 1 at every cell: exp(−(q length)² / 8) at wave number q."""
    highest = math.ceil(_WAVES_PER_LENGTH * _PERIOD / length_fraction)
    order = torch.arange(highest + 1, dtype=torch.float64)
    place = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    phase = 2.0 * math.pi * order[:, None] * place / _PERIOD
    # A Gaussian correlation exp(-x²/l²) has the power exp(-(q l)²/4).
    amplitude = torch.exp(-((2.0 * math.pi * order * length_fraction / _PERIOD) ** 2) / 8.0)
    waves = torch.cat((amplitude[:, None] * torch.cos(phase), amplitude[1:, None] * torch.sin(phase[1:])))
    return (waves / amplitude.square().sum().sqrt()).to(torch.float32)
