"""Random places on a batch of lattices: sites apart from each other, edges, contamination. No loop over rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_gym.core.periodic import nearest_image


def choose_sites(
    keys: Tensor, allowed: Tensor, xy_ang: Tensor, cell_ang: Tensor, count: Tensor, slots: int, separation_ang: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Up to `slots` allowed sites in the order of random keys, each at least `separation_ang` from those before.

    `keys` and `allowed` (B, K), `xy_ang` (B, K, 2), `count` (B,) sites wanted. Returns the sites (B, slots), whether
    each was found (B, slots), and what is still allowed (B, K).
    """
    sites, found = [], []
    for slot in range(slots):
        best, site = torch.where(allowed, keys, torch.full_like(keys, -1.0)).max(dim=1)
        ok = (best >= 0.0) & (slot < count)
        here = xy_ang.gather(1, site[:, None, None].expand(-1, 1, 2))
        x, y = nearest_image(xy_ang - here, cell_ang.unsqueeze(1)).unbind(-1)
        allowed = allowed & ~((x.square() + y.square() < separation_ang**2) & ok[:, None])
        allowed = allowed.scatter(1, site[:, None], allowed.gather(1, site[:, None]) & ~ok[:, None])
        sites.append(site)
        found.append(ok)
    if not sites:
        empty = torch.zeros((keys.shape[0], 0), dtype=torch.int64, device=keys.device)
        return empty, empty.bool(), allowed
    return torch.stack(sites, dim=1), torch.stack(found, dim=1), allowed


def count_between(uniform: Tensor, least: int, most: int) -> Tensor:
    """Whole numbers from `least` to `most`, both included, from uniforms (B,) in (0, 1)."""
    return least + torch.floor(uniform * (most - least + 1)).clamp(max=most - least).to(torch.int64)


def bonds_left(present: Tensor, neighbours: Tensor) -> Tensor:
    """How many bonded neighbours of each atom are present: (B, K); neighbours (B, K, 3), own index = no neighbour."""
    batch, atoms = present.shape
    there = present.gather(1, neighbours.reshape(batch, -1)).reshape(batch, atoms, 3)
    own = torch.arange(atoms, device=present.device)[None, :, None]
    return (there & (neighbours != own)).sum(-1)


def trench(xy_ang: Tensor, cell_ang: Tensor, uniform: Tensor, width_fraction: tuple[float, float]) -> Tensor:
    """Which atoms (B, K) lie in a wavy trench along x or y; uniforms (B, 5) for axis, place, width, wave and phase.

    The trench is periodic, so what is left is a ribbon with two rough edges.
    """
    reduced = xy_ang / cell_ang[:, None, :]
    along_x = (uniform[:, :1] < 0.5)[..., None]
    swapped = torch.where(along_x, reduced, reduced.flip(-1))
    least, most = width_fraction
    width = least + (most - least) * uniform[:, 2:3]
    cycles = torch.floor(1.0 + 3.0 * uniform[:, 3:4])
    wave = 0.04 * torch.sin(2.0 * math.pi * (cycles * swapped[..., 0] + uniform[:, 4:5]))
    across = swapped[..., 1] - uniform[:, 1:2] + wave
    return (across - torch.round(across)).abs() < 0.5 * width


def random_rotation(uniform: Tensor) -> Tensor:
    """Rotations (B, 3, 3), uniform over all orientations, from uniforms (B, 3) in (0, 1).

    Shoemake's subgroup algorithm (Graphics Gems III, 1992, p. 124).
    """
    a, b = torch.sqrt(1.0 - uniform[:, 0]), torch.sqrt(uniform[:, 0])
    first, second = 2.0 * math.pi * uniform[:, 1], 2.0 * math.pi * uniform[:, 2]
    x, y, z, w = a * torch.sin(first), a * torch.cos(first), b * torch.sin(second), b * torch.cos(second)
    rows = (
        torch.stack((1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)), dim=-1),
        torch.stack((2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)), dim=-1),
        torch.stack((2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)), dim=-1),
    )
    return torch.stack(rows, dim=-2)
