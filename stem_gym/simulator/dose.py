"""Where the electrons went: a dose map on the specimen's periodic cell, and the dose at single atoms."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from stem_gym.core.batch import number
from stem_gym.core.periodic import nearest_image


def frame_map(electrons: Tensor, x_ang: Tensor, y_ang: Tensor, cell_ang: Tensor, bins: int) -> Tensor:
    """Electrons (n,) of a raster with columns x (n, W) and rows y (n, H), in bins of the cell: (n, bins, bins) [e/Å²].

    Each place is shared between its two nearest bins on either axis, so that the sum is the ledger's.
    """
    turns = torch.cat((x_ang / cell_ang[:, :1], y_ang / cell_ang[:, 1:]), dim=1)
    left, right, share = _corners(turns, bins)
    first, weight = _two_axes(x_ang.shape[1], y_ang.shape[1], bins, turns.device)
    empty = turns.new_zeros(turns.shape[0], 2 * bins)
    both = empty.scatter_add(1, left + first, (number(1.0, share.dtype) - share) * weight).scatter_add(
        1, right + first, share * weight
    )
    return _per_area(electrons, cell_ang, bins) * both[:, bins:, None] * both[:, None, :bins]


def point_map(electrons: Tensor, xy_ang: Tensor, cell_ang: Tensor, bins: int) -> Tensor:
    """Electrons (n,) shared evenly by the places (n, J, 2): (n, bins, bins) in e/Å², binned as `frame_map` does."""
    left, right, share = (part.unsqueeze(-1) for part in _corners(xy_ang / cell_ang.unsqueeze(1), bins))
    empty = xy_ang.new_zeros(*xy_ang.shape, bins)
    x, y = empty.scatter_add(3, left, 1.0 - share).scatter_add(3, right, share).unbind(2)  # (n, J, bins)
    mean = torch.bmm(y.transpose(1, 2), x) / xy_ang.shape[1]
    return _per_area(electrons, cell_ang, bins) * mean


def map_electrons(dose_map: Tensor, cell_ang: Tensor) -> Tensor:
    """(B,) electrons that a dose map (B, n, n) in e/Å² holds."""
    return dose_map.sum((1, 2)) * (cell_ang[:, 0] * cell_ang[:, 1] / dose_map.shape[1] ** 2)


def dose_in_frame(
    atom_ang: Tensor, electrons: Tensor, corner_ang: Tensor, size_ang: Tensor, cell_ang: Tensor
) -> Tensor:
    """Dose (n, V) in e/Å² at atoms (n, V, 2) of a frame from `corner` (n, 2) of `size` (n, 2), evenly scanned."""
    centre = corner_ang + 0.5 * size_ang
    away = nearest_image(atom_ang - centre.unsqueeze(1), cell_ang.unsqueeze(1)).abs()
    inside = (away <= 0.5 * size_ang.unsqueeze(1)).all(-1)
    return inside * (electrons / (size_ang[:, 0] * size_ang[:, 1])).unsqueeze(1)


def dose_of_probe(atom_ang: Tensor, electrons: Tensor, path_ang: Tensor, cell_ang: Tensor, fwhm_ang: float) -> Tensor:
    """Dose (n, V) in e/Å² at atoms (n, V, 2) of a probe that spends its electrons evenly on a path (n, J, 2).

    The probe is taken as a Gaussian of the given full width, which holds its core and not its far tails.
    """
    away = nearest_image(atom_ang.unsqueeze(2) - path_ang.unsqueeze(1), cell_ang[:, None, None])  # (n, V, J, 2)
    inverse = 8.0 * math.log(2.0) / fwhm_ang**2  # 1 / sigma²
    density = torch.exp(-0.5 * inverse * away.square().sum(-1)) * (inverse / (2.0 * math.pi))
    return density.mean(2) * electrons.unsqueeze(1)


def _per_area(electrons: Tensor, cell_ang: Tensor, bins: int) -> Tensor:
    return (electrons * number(bins**2, electrons.dtype) / (cell_ang[:, 0] * cell_ang[:, 1])).reshape(-1, 1, 1)


def _corners(turns: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Left bin, right bin and the right one's share for places in turns; bins are centred on (i + ½)/bins."""
    one = number(1.0, turns.dtype)
    scaled = torch.remainder(turns, one) * number(bins, turns.dtype) - number(0.5, turns.dtype)
    left = torch.floor(scaled)
    share = scaled - left
    index = left.long()
    return torch.remainder(index, bins), torch.remainder(index + 1, bins), share


@functools.cache
@torch.inference_mode(False)
def _two_axes(columns: int, rows: int, bins: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For columns, then rows, in one histogram of 2 bins: the first bin of their axis, and what a place weighs."""
    first = torch.cat((torch.zeros(columns, dtype=torch.int64), torch.full((rows,), bins)))
    weight = torch.cat((torch.full((columns,), 1.0 / columns), torch.full((rows,), 1.0 / rows)))
    return first.to(device), weight.to(device)
