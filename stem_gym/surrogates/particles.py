"""Weighted particles of several laws in many rows: a cloud of them, its spread, and fair samples of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

_BLOCK = 32  # particles among which one is searched for at once


@dataclass
class Cloud:
    """Particles of all laws in some rows, and what the history says of each."""

    z: Tensor  # (B, L, Q, N) parameters of the law, then factors of the sites
    weight: Tensor  # (B, L, N), adding up to 1
    log_likelihood: Tensor  # (B, L, N) of the whole history
    misfit: Tensor  # (B, L, N) χ²
    site_value: Tensor  # (B, L, K, N) largest so far, where sites remember; else (B, L, 0, N)

    def of(self, rows: Tensor) -> Cloud:
        """The particles of some rows (n,), in their order."""
        if len(rows) == len(self.z):
            return self
        return Cloud(*(part[rows] for part in self._parts()))

    def put(self, rows: Tensor, fresh: Cloud) -> None:
        """Others in some rows (n,), in their order."""
        for one in fields(Cloud):
            if len(rows) == len(self.z):
                setattr(self, one.name, getattr(fresh, one.name))
            else:
                getattr(self, one.name)[rows] = getattr(fresh, one.name)

    def picked(self, index: Tensor) -> Cloud:
        """The particles of an index (B, L, N)."""
        return Cloud(*(gather(part, index) for part in self._parts()))

    def replaced(self, taken: Tensor, fresh: Cloud) -> Cloud:
        """With the particles of another cloud where they are `taken` (B, L, N)."""
        pairs = zip(fresh._parts(), self._parts(), strict=True)
        return Cloud(*(torch.where(taken.unsqueeze(2) if new.dim() == 4 else taken, new, old) for new, old in pairs))

    def _parts(self) -> list[Tensor]:
        return [getattr(self, one.name) for one in fields(self)]


def systematic(weight: Tensor, draws: int, offset: Tensor) -> Tensor:
    """Indices (B, L, draws) of particles with weights (B, L, N), by even steps from an offset (B, L, 1) in (0, 1)."""
    if draws <= weight.shape[2] // 16:
        return _few(weight, draws, offset)
    below = weight.cumsum(2)
    total = below[..., -1:]
    # Of many steps, how many lie below the end of each particle: to search for each takes ten times as long.
    before = torch.ceil(below * (draws / total) - offset).long().clamp_(0, draws)
    before.masked_fill_(below >= total, draws)
    index = torch.zeros(*before.shape[:2], draws + 1, dtype=torch.int64, device=before.device)
    return index.scatter_add_(2, before, torch.ones_like(before))[..., :draws].cumsum(2)


def _few(weight: Tensor, draws: int, offset: Tensor) -> Tensor:
    """The same of few steps: first in which block of particles each lies, then at which of them."""
    width = math.gcd(weight.shape[2], _BLOCK)
    blocks = weight.unflatten(2, (-1, width))
    share = blocks.sum(3)
    end = share.cumsum(2)
    wanted = (torch.arange(draws, device=weight.device) + offset) / draws * end[..., -1:]
    block = torch.searchsorted(end, wanted)
    rest = wanted - (end - share).gather(2, block)
    first = torch.arange(math.prod(end.shape[:2]), device=weight.device).reshape(*end.shape[:2], 1) * end.shape[2]
    whole = blocks.flatten(0, 2).index_select(0, (first + block).flatten())  # ten times as fast as `gather`
    below = whole.unflatten(0, block.shape).cumsum(3)  # (B, L, draws, width)
    rest = rest.clamp(min=torch.finfo(weight.dtype).tiny).unsqueeze(3).minimum(below[..., -1:])
    return block * width + torch.searchsorted(below, rest).squeeze(3)


def gaussian_of(z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, L, Q, 1) and Cholesky factor (B, L, Q, Q) of the weighted particles' covariance, kept off singular.

    In double precision, in which the floor is far above the rounding.
    """
    mean = z @ weight.unsqueeze(3)
    half = ((z - mean) * weight.sqrt().unsqueeze(2)).double()
    floor = 1e-6 * torch.eye(z.shape[2], dtype=torch.float64)
    return mean, torch.linalg.cholesky(half @ half.mT + floor).to(z.dtype)


def gather(whole: Tensor, index: Tensor) -> Tensor:
    """The particles of an index (B, L, S), of (B, L, N) or (B, L, Q, N)."""
    if whole.dim() == 3:
        return whole.gather(2, index)
    return whole.gather(3, index.unsqueeze(2).expand(-1, -1, whole.shape[2], -1))
