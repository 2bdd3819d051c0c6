"""Harmonics of a periodic cell: how many, their cosines and sines, and blocks of rows that fit the cache."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stem_gym.core.batch import number
from stem_gym.core.errors import ConfigError

# A row's working set is about 100 kB; sixteen rows stay in the second-level cache, which halves a large batch's time.
_ROWS_PER_BLOCK = 16


@dataclass(frozen=True)
class Harmonics:
    """How many Fourier coefficients an image keeps: hx = 0 .. nx - 1 and hy = -(ny - 1)/2 .. (ny - 1)/2."""

    nx: int
    ny: int

    @classmethod
    def within(cls, cell_ang: tuple[float, float], cutoff_per_ang: float) -> Harmonics:
        """The harmonics of a cell (Lx, Ly) up to a spatial frequency; use the largest cell and cutoff of a batch."""
        if min(*cell_ang, cutoff_per_ang) <= 0.0:
            raise ConfigError(f"Cell and cutoff must be positive; given {cell_ang} Å and {cutoff_per_ang} /Å.")
        return cls(nx=int(cell_ang[0] * cutoff_per_ang) + 1, ny=2 * int(cell_ang[1] * cutoff_per_ang) + 1)

    def orders(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """hx (nx,) and hy (ny,) with the dtype and device of `like`."""
        half = (self.ny - 1) // 2
        x = torch.arange(self.nx, dtype=like.dtype, device=like.device)
        return x, torch.arange(-half, half + 1, dtype=like.dtype, device=like.device)

    def frequencies(self, cell_ang: Tensor) -> tuple[Tensor, Tensor]:
        """kx (B, nx) and ky (B, ny) in 1/Å for cells (B, 2)."""
        x, y = self.orders(cell_ang)
        return x / cell_ang[:, :1], y / cell_ang[:, 1:]


def padded_orders(count: int) -> int:
    """The number of orders that `harmonic_table` makes to hold `count` of them: a product of two near-equal factors."""
    fine = math.isqrt(count - 1) + 1
    return fine * -(-count // fine)


def harmonic_table(turns: Tensor, count: int) -> Tensor:
    """Cosines, then sines, of 2 pi h t for h = 0 .. N - 1 at t (B, P): (B, 2 N, P), N = `padded_orders(count)`.

    By the addition theorem with h = coarse + fine: 2 sqrt(N) cosines and sines a place instead of N.
    """
    orders, sizes = _fine_and_coarse(count, turns.dtype, turns.device)
    angle = (
        number(2.0 * math.pi, turns.dtype) * (turns - torch.round(turns.detach())).unsqueeze(1) * orders
    )  # (B, fine + coarse, P)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    (fine_cosine, start_cosine), (fine_sine, start_sine) = (part.split_with_sizes(sizes, 1) for part in (cosine, sine))
    first = torch.stack((fine_cosine, fine_sine), dim=1).unsqueeze(2)  # (B, 2, 1, fine, P)
    turned = torch.stack((fine_sine.neg(), fine_cosine), dim=1).unsqueeze(2)
    start_cosine, start_sine = (part[:, None, :, None] for part in (start_cosine, start_sine))
    table = (start_cosine * first).addcmul_(start_sine, turned)  # (B, 2, coarse, fine, P)
    return table.reshape(turns.shape[0], -1, turns.shape[1])


@functools.cache
@torch.inference_mode(False)  # kept tensors serve gradients too
def _fine_and_coarse(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, tuple[int, int]]:
    """The two factors' orders one after the other, (1, fine + coarse, 1), and how many there are of each."""
    fine = math.isqrt(count - 1) + 1
    coarse = padded_orders(count) // fine
    orders = torch.cat((torch.arange(fine), fine * torch.arange(coarse)))
    return orders.to(dtype=dtype, device=device)[None, :, None], (fine, coarse)


def in_blocks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` of batch-first tensors, on a CPU computed block of rows by block of rows; the same to the last bit."""
    batch = tensors[0].shape[0]
    if batch <= _ROWS_PER_BLOCK or tensors[0].device.type != "cpu":
        return function(*tensors)
    parts = zip(*(t.split(_ROWS_PER_BLOCK) for t in tensors), strict=True)
    return torch.cat([function(*part) for part in parts])
