"""An exact Gaussian process over the cells of a field with a learned kernel, for many fields side by side.

The kernel is a sum: Matérn over what a small network makes of a cell's patch (deep kernel learning: A. G. Wilson et
al., "Deep kernel learning", AISTATS 2016), Matérn over the place, a constant, and linear terms whose coefficients are
integrated out (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, sections 2.7 and 4.3). Weights
and hyperparameters are the maximum of the exact marginal likelihood times priors, found by Adam.

A field is fitted by a few members; each learns from all points but its own fold, so that the closed-form leave-one-out
residuals of the fold (ibid., 5.4.2) are of points that its network has never seen. They calibrate the deviations and
find the measurements that do not belong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from agents.engine.leave_one_out import calibration, extra_noise, residuals

_JITTER = 1e-6
_CHUNK = 1024  # candidates that are predicted at once: what the processor's cache holds
_BETAS, _EPSILON = (0.9, 0.99), 1e-8
_WEIGHTS = 0.15  # scale of the prior variance of weights
_SPREAD = 0.35  # mean square of a patch's features, as agents.engine.patch_features makes them
_START = (1.0, 0.8, 1.2, 1.0, 0.15, 0.15)  # of the prior's deviation, for each part of the parameters
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

    @property
    def sizes(self) -> list[int]:
        """Lengths of the parts of a member's parameters, in the order of `_Parts`."""
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
        each = torch.tensor([*weights, 0.5, 0.5], dtype=torch.float64)
        return each.repeat_interleave(torch.tensor(self.sizes))


@dataclass(frozen=True)
class Cells:
    """What the kernel sees of n fields of C cells; `take` picks cells."""

    places: Tensor  # (n, C, 2) in lengths of the longer side
    patches: Tensor | None = None  # (n, C, P)
    basis: Tensor | None = None  # (n, C, K)

    def take(self, index: Tensor) -> Cells:
        """The cells `index` (n, N)."""

        def picked(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.gather(1, index[..., None].expand(*index.shape, x.shape[2]))

        return Cells(picked(self.places), picked(self.patches), picked(self.basis))  # type: ignore[arg-type]

    def each(self, change: object) -> Cells:
        """Every part after `change`."""
        parts = (self.places, self.patches, self.basis)
        return Cells(*(None if x is None else change(x) for x in parts))  # type: ignore[operator,arg-type]


@dataclass(frozen=True)
class Points:
    """Measured cells of n fields, padded to the same number."""

    index: Tensor  # (n, N) cell
    valid: Tensor  # (n, N) bool; the rest is padding
    value: Tensor  # (n, N) float64, standardised; 0 in padding
    fold: Tensor  # (n, N) which member does not learn from it


@dataclass(frozen=True)
class Learned:
    """Parameters of n fields × E members and the state of Adam."""

    theta: Tensor  # (n, E, P) float64
    first: Tensor  # (n, E, P)
    second: Tensor  # (n, E, P)
    steps: Tensor  # (n,)


@dataclass(frozen=True)
class Predicted:
    """The posterior over all cells of n fields, in standardised values."""

    mean: Tensor  # (n, C)
    deviation: Tensor  # (n, C) of the value without measurement noise, calibrated
    noise: Tensor  # (n,) deviation of a measurement from the value
    embedding: Tensor | None  # (n, C, d) of the first member


def start(plan: KernelPlan, normal: Tensor) -> Learned:
    """Fresh parameters, drawn from their priors by standard normal numbers (n, E, P)."""
    narrow = torch.tensor(_START).repeat_interleave(torch.tensor(plan.sizes))
    theta = normal.double() * plan.prior_variance().sqrt() * narrow
    return Learned(theta, torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros(len(theta)))


class _Parts:
    """The parameters of M members, (M, P), taken apart."""

    def __init__(self, plan: KernelPlan, theta: Tensor) -> None:
        first, bias, second, skip, scalars, basis = theta.split(plan.sizes, dim=1)
        m, p, h = len(theta), plan.patch_features, plan.hidden
        if p:
            self.first, self.second = first.view(m, p, h), second.view(m, h, plan.embedding)
            self.bias, self.skip = bias[:, None], skip.view(m, p, plan.embedding)
        # Priors of the logarithms: amplitudes about 1 and 0.7, lengths about 0.3 of the field, noise about 0.1.
        self.patch_log, place_log, length_log, noise_log = scalars.unbind(1)
        self.patch = (2.0 * self.patch_log).exp()[:, None, None]
        self.place = (2.0 * (place_log - 0.4)).exp()[:, None, None]
        self.length = (length_log - 1.2).exp()[:, None, None]
        self.noise = (2.0 * (noise_log - 2.3)).exp()[:, None] + 1e-4
        self.basis = (basis - 0.7).exp()[:, None]

    def embed(self, patches: Tensor) -> Tensor:
        """(M, C, d)."""
        hidden = torch.tanh(torch.baddbmm(self.bias, patches, self.first))
        return hidden @ self.second + patches @ self.skip

    def to(self, kind: torch.dtype) -> _Parts:
        """A copy in another precision."""
        copy = object.__new__(_Parts)
        copy.__dict__ = {name: value.to(kind) for name, value in self.__dict__.items()}
        return copy

    def kernel(self, a: _Inputs, b: _Inputs) -> Tensor:
        """(M, A, B)."""
        found = self.place * _matern(a.places, b.places, self.length)
        if a.embedding is not None and b.embedding is not None:
            found = found + self.patch * _matern(a.embedding, b.embedding)
        if a.basis is not None and b.basis is not None:
            found = found + (a.basis * self.basis) @ (b.basis * self.basis).mT
        return found + 1.0  # the unknown constant

    def prior_variance(self, a: _Inputs) -> Tensor:
        """The kernel's diagonal, (M, A)."""
        found = self.place[:, 0] + 1.0
        if a.embedding is not None:
            found = found + self.patch[:, 0]
        if a.basis is not None:
            found = found + (a.basis * self.basis).square().sum(dim=2)
        return found.expand(a.places.shape[:2])


@dataclass(frozen=True)
class _Inputs:
    """What the kernel compares."""

    places: Tensor  # (M, C, 2)
    embedding: Tensor | None  # (M, C, d)
    basis: Tensor | None  # (M, C, K)


def _inputs(parts: _Parts, cells: Cells) -> _Inputs:
    embedding = None if cells.patches is None else parts.embed(cells.patches)
    return _Inputs(cells.places, embedding, cells.basis)


def _matern(a: Tensor, b: Tensor, length: Tensor | float = 1.0) -> Tensor:
    """Matérn 5/2 between (M, A, d) and (M, B, d)."""
    a, b = a * (_ROOT5 / length), b * (_ROOT5 / length)
    ends = a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None]
    away = torch.baddbmm(ends, a, b.mT, alpha=-2.0).clamp(min=1e-9).sqrt()
    return _Decay.apply(away)


class _Decay(torch.autograd.Function):
    """(1 + s + s²/3) exp(−s) in few passes over memory, with its derivative −s (1 + s) exp(−s) / 3."""

    @staticmethod
    def forward(context: Any, away: Tensor) -> Tensor:
        fall = away.neg().exp_()
        context.save_for_backward(away, fall)
        return (away * (1.0 / 3.0)).add_(1.0).mul_(away).add_(1.0).mul_(fall)

    @staticmethod
    def backward(context: Any, *given: Tensor) -> Tensor:
        away, fall = context.saved_tensors
        return (away + 1.0).mul_(away).mul_(fall).mul_(given[0]).mul_(-1.0 / 3.0)


def _covariance(parts: _Parts, inputs: _Inputs, valid: Tensor, extra: Tensor) -> Tensor:
    """Of the measurements, (M, N, N); padding is unrelated to everything and has variance 1."""
    known = valid.to(extra.dtype)
    diagonal = (parts.noise + (extra + _JITTER)) * known + (1.0 - known)
    return parts.kernel(inputs, inputs) * (known[:, :, None] * known[:, None]) + torch.diag_embed(diagonal)


def fit(plan: KernelPlan, learned: Learned, cells: Cells, points: Points, steps: int) -> Learned:
    """`steps` of Adam for every member, with the noise that `condition` gives to what does not belong.

    Fresh parameters do not know yet what belongs: they are asked again half-way.
    """
    begins = not bool((learned.steps > 0).any())
    for part in (steps // 2, steps - steps // 2) if begins and plan.robust else (steps,):
        extra = condition(plan, learned, cells, points).extra if plan.robust else torch.zeros_like(points.value)
        learned = _descend(plan, learned, cells, _without_fold(plan, points, extra), part)
    return learned


@dataclass(frozen=True)
class _Lesson:
    """What each member learns from, (M, N'): all points but its fold."""

    index: Tensor
    valid: Tensor
    value: Tensor
    extra: Tensor


def _without_fold(plan: KernelPlan, points: Points, extra: Tensor) -> _Lesson:
    """The points of every member, packed to the left."""
    members = torch.arange(plan.members, device=points.fold.device)
    keep = points.valid[:, None] & ((points.fold[:, None] != members[:, None]) | (plan.members == 1))  # (n, E, N)
    keep = keep.flatten(0, 1)
    count = int(keep.sum(dim=1).max())
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    valid = keep.gather(1, order)

    def packed(x: Tensor) -> Tensor:
        return x.repeat_interleave(plan.members, dim=0).gather(1, order)

    zero = torch.zeros((), dtype=points.value.dtype)
    return _Lesson(
        packed(points.index),
        valid,
        torch.where(valid, packed(points.value), zero),
        torch.where(valid, packed(extra), zero),
    )


def _descend(plan: KernelPlan, learned: Learned, cells: Cells, lesson: _Lesson, steps: int) -> Learned:
    """Adam on the negative logarithm of marginal likelihood and priors; every member by itself."""
    inputs = _doubled(cells, plan.members, lesson.index)
    theta, first, second = (x.flatten(0, 1) for x in (learned.theta, learned.first, learned.second))
    taken = learned.steps.repeat_interleave(plan.members)[:, None].double()
    value, variance = lesson.value[..., None], plan.prior_variance()
    for _ in range(steps):
        theta = theta.detach().requires_grad_(True)
        parts = _Parts(plan, theta)
        covariance = _covariance(parts, _inputs(parts, inputs), lesson.valid, lesson.extra)
        with torch.no_grad():  # the gradient in closed form is several times cheaper than through the factorisation
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
            weight = inverse @ value
            slope = torch.baddbmm(inverse, weight, weight.mT, beta=0.5, alpha=-0.5)
        (gradient,) = torch.autograd.grad(covariance, theta, slope)
        with torch.no_grad():
            gradient = gradient + theta / variance
            gradient = gradient * (10.0 / gradient.norm(dim=1, keepdim=True).clamp(min=10.0))
            taken = taken + 1.0
            first = torch.lerp(gradient, first, _BETAS[0])
            second = torch.lerp(gradient.square(), second, _BETAS[1])
            step = (first / (1.0 - _BETAS[0] ** taken)) / ((second / (1.0 - _BETAS[1] ** taken)).sqrt() + _EPSILON)
            theta = theta - plan.learning_rate * step
    shape = learned.theta.shape
    done = [x.detach().view(shape) for x in (theta, first, second)]
    return Learned(done[0], done[1], done[2], learned.steps + steps)


def _doubled(cells: Cells, members: int, index: Tensor) -> Cells:
    """The cells `index` (M, N) of every member in double precision."""
    per_member = index.view(-1, members * index.shape[1])
    return cells.take(per_member).each(lambda x: x.reshape(len(index), index.shape[1], x.shape[2]).double())


@dataclass(frozen=True)
class Conditioned:
    """Members that know their measurements."""

    lower: Tensor  # (M, N, N) Cholesky factor
    weight: Tensor  # (M, N, 1) inverse covariance times values
    extra: Tensor  # (n, N) noise variance beyond the common one
    scale: Tensor  # (n,) factor that calibrates deviations
    parts: _Parts
    inputs: _Inputs
    valid: Tensor  # (M, N)


@torch.no_grad()
def condition(plan: KernelPlan, learned: Learned, cells: Cells, points: Points, rounds: int = 2) -> Conditioned:
    """The members with all points; `rounds` times the noise of what does not belong is found anew."""
    parts = _Parts(plan, learned.theta.flatten(0, 1))
    index, valid, value = (x.repeat_interleave(plan.members, dim=0) for x in (points.index, points.valid, points.value))
    inputs = _inputs(parts, _doubled(cells, plan.members, index))
    bare = _covariance(parts, inputs, valid, torch.zeros_like(value))
    extra = torch.zeros_like(points.value)
    for turn in range(rounds + 1 if plan.robust else 1):
        spread = torch.where(valid, extra.repeat_interleave(plan.members, dim=0), 0.0)
        lower = torch.linalg.cholesky(bare + torch.diag_embed(spread))
        inverse = torch.cholesky_inverse(lower)
        weight = inverse @ value[..., None]
        residual, variance = residuals(inverse, weight[..., 0], points.fold, plan.members)
        if plan.robust and turn < rounds:
            extra = extra_noise(residual, variance - extra, points.valid)
    scale = calibration(residual / variance.sqrt(), points.valid)
    return Conditioned(lower, weight, extra, scale, parts, inputs, valid)


@torch.no_grad()
def predict(plan: KernelPlan, learned: Learned, cells: Cells, points: Points) -> Predicted:
    """The members' common posterior over all cells: mean of means, calibrated variance plus their disagreement."""
    known = condition(plan, learned, cells, points)
    eye = torch.eye(known.lower.shape[1], dtype=torch.float64).expand_as(known.lower)
    half = torch.linalg.solve_triangular(known.lower, eye, upper=False).float()
    weight, parts = known.weight.float(), known.parts.to(torch.float32)
    seen = _Inputs(*(None if x is None else x.float() for x in vars(known.inputs).values()))  # type: ignore[arg-type]
    every = cells.each(lambda x: x.repeat_interleave(plan.members, dim=0))
    asked = _inputs(parts, every)
    means, variances = [], []
    for begin in range(0, asked.places.shape[1], _CHUNK):
        some = _Inputs(*(None if x is None else x[:, begin : begin + _CHUNK] for x in vars(asked).values()))  # type: ignore[arg-type]
        cross = parts.kernel(seen, some) * known.valid[..., None]
        means.append((weight.mT @ cross)[:, 0])
        variances.append((parts.prior_variance(some) - (half @ cross).square_().sum(dim=1)).clamp(min=1e-8))
    shape = (len(points.index), plan.members, -1)
    mean, variance = torch.cat(means, dim=1).view(shape), torch.cat(variances, dim=1).view(shape)
    scale = known.scale.float()[:, None]
    total = scale.square() * variance.mean(dim=1) + mean.var(dim=1, correction=0)
    noise = known.parts.noise.view(len(scale), -1).mean(dim=1).sqrt()
    embedding = None if asked.embedding is None else asked.embedding.view(*shape[:2], *asked.embedding.shape[1:])[:, 0]
    return Predicted(mean.mean(dim=1), total.sqrt(), noise.float(), embedding)


def pick(learned: Learned, rows: Tensor) -> Learned:
    """The fields `rows` (n,)."""
    return replace(learned, **{name: value[rows] for name, value in vars(learned).items()})
