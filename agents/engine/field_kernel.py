"""The kernel over the cells of a field, for many fields and members side by side.

A sum: Gaussian over what a small network makes of a cell's patch, Matérn 5/2 over the place, a constant, and linear
terms whose coefficients are integrated out (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006,
sections 2.7 and 4.2). Single precision: covariances are known far better than the noise that is added to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_WEIGHTS = 0.15  # scale of the prior variance of weights
_SPREAD = 0.35  # mean square of a patch's features, as agents.engine.patch_features makes them
_LEAST_NOISE, _ROUNDING = 1e-4, 1e-6  # variance of values of spread 1; part of the largest variance
_ROOT5 = math.sqrt(5.0)


@dataclass(frozen=True)
class KernelPlan:
    """The form of the kernel and how it is learned."""

    patch_features: int = 0  # numbers that describe a patch; 0: no network
    hidden: int = 16
    embedding: int = 2
    basis: int = 0  # linear terms
    members: int = 3
    learning_rate: float = 0.03
    robust: bool = True
    grid: tuple[int, int] | None = None  # (H, W) where the places are those of all cells of a grid, row by row

    @property
    def sizes(self) -> list[int]:
        """Lengths of the parts of a member's parameters, in the order of `Kernels`."""
        p, h, d = self.patch_features, self.hidden, self.embedding
        network = [p * h, h, h * d, p * d] if p else [0, 0, 0, 0]
        return [*network, 4, self.basis]

    @property
    def parameters(self) -> int:
        """Numbers that a member learns."""
        return sum(self.sizes)

    def prior_variance(self) -> Tensor:
        """Of each parameter (P,): small weights, so that few points do not make a rich network; logarithms about 0."""
        p = _SPREAD * max(1, self.patch_features)
        weights = [_WEIGHTS / p, 0.5 * _WEIGHTS, _WEIGHTS / self.hidden, 0.5 * _WEIGHTS / p]
        each = torch.tensor([*weights, 0.5, 0.5])
        return each.repeat_interleave(torch.tensor(self.sizes))


@dataclass(frozen=True)
class Cells:
    """What the kernel sees of n fields of C cells; `take` picks cells."""

    places: Tensor  # (n, C, 2) in lengths of the longer side
    patches: Tensor | None = None  # (n, C, P)
    basis: Tensor | None = None  # (n, C, K)

    def of(self, fields: Tensor | slice) -> Cells:
        """The cells of some fields."""
        return self.each(lambda x: x[fields])

    def take(self, index: Tensor) -> Cells:
        """The cells `index` (n, N)."""

        return self.each(lambda x: x.gather(1, index[..., None].expand(*index.shape, x.shape[2])))

    def each(self, change: Callable[[Tensor], Tensor]) -> Cells:
        """Every part after `change`."""
        return Cells(
            change(self.places),
            None if self.patches is None else change(self.patches),
            None if self.basis is None else change(self.basis),
        )


@dataclass(frozen=True)
class Seen:
    """Cells as the kernels compare them; `some` takes a slice of the cells."""

    places: Tensor  # (M, C, 2) in units of the kernel's length over √5
    embedding: Tensor | None  # (M, C, d)
    basis: Tensor | None  # (M, C, K) times the deviation of each coefficient

    def some(self, begin: int, end: int) -> Seen:
        """The cells from `begin` to `end`."""
        parts = (self.embedding, self.basis)
        embedding, basis = (None if x is None else x[:, begin:end] for x in parts)
        return Seen(self.places[:, begin:end], embedding, basis)


class Kernels:
    """The kernels of M members with parameters (M, P)."""

    def __init__(self, plan: KernelPlan, theta: Tensor) -> None:
        first, bias, second, skip, scalars, basis = theta.split(plan.sizes, dim=1)
        self._grid = plan.grid
        m, p, h = len(theta), plan.patch_features, plan.hidden
        if p:
            self._first, self._second = first.view(m, p, h), second.view(m, h, plan.embedding)
            self._bias, self._skip = bias[:, None], skip.view(m, p, plan.embedding)
        # Their prior is about 0. So deviations are about 1 for the patch, 0.7 for the place, 0.5 for a coefficient and
        # 0.1 for the noise; a length is about 0.3 of the field.
        patch, place, length, noise = scalars.unbind(1)
        self.patch = (2.0 * patch).exp()[:, None, None]  # variances
        self.place = (2.0 * (place - 0.4)).exp()[:, None, None]
        self.noise = (2.0 * (noise - 2.3)).exp()[:, None] + _LEAST_NOISE
        self._per_length = _ROOT5 * (1.2 - length).exp()[:, None, None]
        self._coefficient = (basis - 0.7).exp()[:, None]

    def see(self, cells: Cells) -> Seen:
        """The cells (M, C) as each member sees them."""
        embedding = None if cells.patches is None else self.embed(cells.patches)
        basis = None if cells.basis is None else cells.basis * self._coefficient
        return Seen(cells.places * self._per_length, embedding, basis)

    def embed(self, patches: Tensor) -> Tensor:
        """What the networks make of patches (M, C, P): (M, C, d)."""
        hidden = torch.tanh(torch.baddbmm(self._bias, patches, self._first))
        return hidden @ self._second + patches @ self._skip

    def covariance(self, a: Seen, valid: Tensor, extra: Tensor) -> Tensor:
        """Of measurements (M, N, N) in double precision, with noise and `extra` (M, N) noise variance.

        Where not `valid` (M, N), a measurement is unrelated to everything and has variance 1.
        """
        known = valid.to(a.places.dtype)
        kernel = self.place * _self_matern(a.places)
        if a.embedding is not None:
            kernel = kernel + self.patch * _self_gaussian(a.embedding)
        if a.basis is not None:
            kernel = kernel + a.basis @ a.basis.mT
        kernel = ((kernel + 1.0) * (known[:, :, None] * known[:, None])).double()
        rounding = _ROUNDING * kernel.detach().diagonal(dim1=1, dim2=2).amax(dim=1, keepdim=True)
        return kernel + torch.diag_embed(torch.where(valid, self.noise + extra + rounding, 1.0))

    def over_places(self, a: Seen, every: Seen, index: Tensor) -> Tensor:
        """The Matérn kernel alone, between the cells `index` (M, N), which are `a`, and all cells: (M, N, C).

        Over a grid it hangs on the offset of two cells alone: it is computed once for each and looked up.
        """
        if self._grid is None:
            return _matern(a.places, every.places)[0]
        height, width = self._grid
        y, x = torch.arange(1.0 - height, height), torch.arange(1.0 - width, width)
        away = torch.hypot(y[:, None], x) * (self._per_length / max(height, width))
        table = _decayed(away, away.neg().exp_())  # (M, 2 H − 1, 2 W − 1)
        windows = table.unfold(1, height, 1).unfold(2, width, 1)  # at (H − 1 − y, W − 1 − x): that around (x, y)
        whose = torch.arange(len(index))[:, None]
        return windows[whose, height - 1 - index // width, width - 1 - index % width].flatten(2)

    def between(self, a: Seen, b: Seen, over_places: Tensor) -> Tensor:
        """Between cells (M, A) and (M, B): (M, A, B), from that over their places; no gradient."""
        kernel = over_places * self.place
        if a.embedding is not None and b.embedding is not None:
            kernel.addcmul_(_half_squares(a.embedding, b.embedding).exp_(), self.patch)
        if a.basis is not None and b.basis is not None:
            kernel.baddbmm_(a.basis, b.basis.mT)
        return kernel.add_(1.0)  # the unknown constant

    def variance(self, a: Seen) -> Tensor:
        """Of the cells (M, A) before any measurement."""
        found = self.place[:, 0] + 1.0
        if a.embedding is not None:
            found = found + self.patch[:, 0]
        if a.basis is not None:
            found = found + a.basis.square().sum(dim=2)
        return found.expand(a.places.shape[:2])


def _matern(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1 + s + s²/3) exp(−s) of the distances s between (M, A, d) and (M, B, d); also s and exp(−s)."""
    away = _half_squares(a, b).mul_(-2.0).clamp_(min=1e-12).sqrt_()
    fall = away.neg().exp_()
    return _decayed(away, fall), away, fall


def _decayed(away: Tensor, fall: Tensor) -> Tensor:
    """(1 + s + s²/3) exp(−s) of s and exp(−s)."""
    return torch.addcmul(away + 1.0, away, away, value=1.0 / 3.0).mul_(fall)


def _half_squares(a: Tensor, b: Tensor) -> Tensor:
    """−½ |a − b|² between (M, A, d) and (M, B, d)."""
    ends = a.square().sum(dim=2)[:, :, None] + b.square().sum(dim=2)[:, None]
    return ends.baddbmm_(a, b.mT, beta=-0.5)


class _SelfMatern(torch.autograd.Function):
    """`_matern` of points with themselves; its gradient needs no distance in a denominator.

    With k = (1 + s + s²/3) exp(−s), dk/da = −(1 + s) exp(−s) (a − b) / 3.
    """

    @staticmethod
    def forward(context: Any, points: Tensor) -> Tensor:
        kernel, away, fall = _matern(points, points)
        context.save_for_backward(points, away, fall)
        return kernel

    @staticmethod
    def backward(context: Any, *given: Tensor) -> Tensor:
        points, away, fall = context.saved_tensors
        return _pulled(points, torch.addcmul(fall, away, fall).mul_(given[0]).mul_(1.0 / 3.0))


class _SelfGaussian(torch.autograd.Function):
    """exp(−½ |a − b|²) of points with themselves; dk/da = −k (a − b)."""

    @staticmethod
    def forward(context: Any, points: Tensor) -> Tensor:
        kernel = _half_squares(points, points).exp_()
        context.save_for_backward(points, kernel)
        return kernel

    @staticmethod
    def backward(context: Any, *given: Tensor) -> Tensor:
        points, kernel = context.saved_tensors
        return _pulled(points, kernel * given[0])


def _pulled(points: Tensor, pull: Tensor) -> Tensor:
    """Sum over b of −(pull + pullᵀ) (a − b), for points (M, N, d) and pull (M, N, N)."""
    pull = pull + pull.mT
    return pull @ points - pull.sum(dim=2, keepdim=True) * points


def _self_matern(points: Tensor) -> Tensor:
    """(M, N, N) of points (M, N, d)."""
    found: Tensor = _SelfMatern.apply(points)
    return found


def _self_gaussian(points: Tensor) -> Tensor:
    """(M, N, N) of points (M, N, d)."""
    found: Tensor = _SelfGaussian.apply(points)
    return found
