"""Smooth random fields on the unit square, by the batch: thickness, terraces, outlines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WAVES = 10  # cosines along each side


def smooth_field(normals: Tensor, shape: tuple[int, int], waves: float) -> Tensor:
    """Gaussian random fields (n, H, W) of mean 0 and rms about 1 over the square, from normals (n, WAVES, WAVES).

    A cosine series whose coefficients fall as exp(−(i² + j²) / (2 waves²)), so features are about 1 / waves of a side
    wide; the same field whatever the shape it is sampled at. `waves` of 1 to 4 are resolved.
    """
    order = torch.arange(WAVES, dtype=torch.float32, device=normals.device)
    falling = torch.exp(-0.5 * (order / waves) ** 2)
    weight = falling[:, None] * falling
    weight[0, 0] = 0.0
    mean_square = torch.where(order == 0.0, 1.0, 0.5)  # of a cosine over the square
    rms = torch.sqrt((weight * weight * mean_square[:, None] * mean_square).sum())
    along_y, along_x = (
        torch.cos(math.pi * order * ((torch.arange(size, device=normals.device) + 0.5) / size)[:, None])
        for size in shape
    )
    return along_y @ (normals * (weight / rms)) @ along_x.T


def level_of(field: Tensor, share: Tensor) -> Tensor:
    """The values (n,) that a share (n,) of each field's cells (n, H, W) lies below."""
    ordered = field.flatten(1).sort(dim=1).values
    place = torch.floor(share * ordered.shape[1]).to(torch.int64).clamp(min=0, max=ordered.shape[1] - 1)
    return ordered.gather(1, place[:, None])[:, 0]


def slope(field: Tensor) -> Tensor:
    """Gradient magnitude (n, H, W) per cell, by central differences; one-sided at the borders."""
    padded = torch.nn.functional.pad(field[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    along_x = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    along_y = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    return 0.5 * torch.sqrt(along_x * along_x + along_y * along_y)


def share_above(field: Tensor, level: Tensor) -> Tensor:
    """How much of each cell (n, H, W) lies above a level (n,): 0 to 1, by the distance to the outline in cells."""
    distance = (field - level[:, None, None]) / slope(field).clamp(min=1e-6)
    return (0.5 + distance).clamp(min=0.0, max=1.0)
