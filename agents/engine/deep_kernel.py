"""An exact Gaussian process over the cells of a field with a learned kernel, for many fields side by side.

Deep kernel learning (A. G. Wilson et al., AISTATS 2016): the weights of the network inside the kernel and the kernel's
hyperparameters are the maximum of the exact marginal likelihood times priors, found by Adam.

A field is fitted by a few members; each learns from all points but its own fold, so that the closed-form leave-one-out
residuals of the fold (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, section 5.4.2) are of
points that its network has never seen. They calibrate the deviations and find the measurements that do not belong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from agents.engine.field_kernel import Cells, KernelPlan, Kernels, Seen
from agents.engine.leave_one_out import calibration, calibration_by_value, extra_noise, of_the_mean, residuals

__all__ = ["Cells", "KernelPlan", "Learned", "Points", "Predicted", "condition", "fit", "pick", "predict", "start"]

_T = TypeVar("_T")
_BETAS, _EPSILON = (0.9, 0.99), 1e-8
_START = (1.0, 0.8, 1.2, 1.0, 0.15, 0.15)  # of the prior's deviation, for each part of the parameters
_STEEPEST = 10.0  # longest gradient that is followed as it is
_CHUNK = 512  # candidates that are predicted at once, and …
_IN_CACHE = 120_000  # … numbers of a matrix: beyond, memory is slower than what batching saves


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

    theta: Tensor  # (n, E, P)
    first: Tensor  # (n, E, P)
    second: Tensor  # (n, E, P)
    steps: Tensor  # (n,)


@dataclass(frozen=True)
class Predicted:
    """The posterior over all cells of n fields, in standardised values."""

    mean: Tensor  # (n, C)
    deviation: Tensor  # (n, C) of the value without measurement noise, calibrated
    noise: Tensor  # (n,) deviation of a measurement from the value
    spread: Tensor  # (n, C) deviation of a measurement from the mean, calibrated for like places
    embedding: Tensor | None  # (n, C, d) of the first member


def start(plan: KernelPlan, normal: Tensor) -> Learned:
    """Fresh parameters, drawn from their priors by standard normal numbers (n, E, P)."""
    narrow = torch.tensor(_START).repeat_interleave(torch.tensor(plan.sizes))
    theta = normal.float() * plan.prior_variance().sqrt() * narrow
    return Learned(theta, torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros(len(theta)))


def fit(plan: KernelPlan, learned: Learned, cells: Cells, points: Points, steps: int) -> Learned:
    """`steps` of Adam for every member, with the noise that `condition` gives to what does not belong.

    Fresh parameters do not know yet what belongs: they are asked again half-way.
    """
    begins = not bool((learned.steps > 0).any())
    for part in (steps // 2, steps - steps // 2) if begins and plan.robust else (steps,):
        extra = (
            condition(plan, learned, cells, points, rounds=1).extra if plan.robust else torch.zeros_like(points.value)
        )
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


@dataclass(frozen=True)
class _Descent:
    """Where M members are on their way down."""

    theta: Tensor  # (M, P)
    first: Tensor  # (M, P)
    second: Tensor  # (M, P)
    taken: Tensor  # (M, 1)


def _descend(plan: KernelPlan, learned: Learned, cells: Cells, lesson: _Lesson, steps: int) -> Learned:
    """Adam on the negative logarithm of marginal likelihood and priors; every member by itself."""
    inputs = _of_members(cells, plan.members, lesson.index)
    taken = learned.steps.repeat_interleave(plan.members)[:, None]
    here = _Descent(learned.theta.flatten(0, 1), learned.first.flatten(0, 1), learned.second.flatten(0, 1), taken)
    size = max(1, _IN_CACHE // max(1, lesson.index.shape[1] ** 2))
    parts = []
    for begin in range(0, len(taken), size):
        some = slice(begin, begin + size)
        own_inputs, own_lesson, own = inputs.of(some), _cut(lesson, some), _cut(here, some)
        for _ in range(steps):
            own = _step(plan, own, _gradient(plan, own.theta, own_inputs, own_lesson))
        parts.append(own)
    shape = learned.theta.shape
    theta, first, second = (torch.cat([getattr(p, k) for p in parts]).view(shape) for k in ("theta", "first", "second"))
    return Learned(theta, first, second, learned.steps + steps)


def _gradient(plan: KernelPlan, theta: Tensor, inputs: Cells, lesson: _Lesson) -> Tensor:
    """(M, P), of the objective of each member."""
    theta = theta.detach().requires_grad_(True)
    kernels = Kernels(plan, theta)
    covariance = kernels.covariance(kernels.see(inputs), lesson.valid, lesson.extra)
    with torch.no_grad():  # the gradient in closed form is several times cheaper than through the factorisation
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        weight = inverse @ lesson.value[..., None]
        slope = torch.baddbmm(inverse, weight, weight.mT, beta=0.5, alpha=-0.5)
    (gradient,) = torch.autograd.grad(covariance, theta, slope)
    return gradient + theta.detach() / plan.prior_variance()


@torch.no_grad()
def _step(plan: KernelPlan, here: _Descent, gradient: Tensor) -> _Descent:
    """One step of Adam (Kingma and Ba, ICLR 2015); a gradient that is very steep is made shorter."""
    gradient = gradient * (_STEEPEST / gradient.norm(dim=1, keepdim=True).clamp(min=_STEEPEST))
    taken = here.taken + 1.0
    first = torch.lerp(gradient, here.first, _BETAS[0])
    second = torch.lerp(gradient.square(), here.second, _BETAS[1])
    step = (first / (1.0 - _BETAS[0] ** taken)) / ((second / (1.0 - _BETAS[1] ** taken)).sqrt() + _EPSILON)
    return _Descent(here.theta - plan.learning_rate * step, first, second, taken)


def _of_members(cells: Cells, members: int, index: Tensor) -> Cells:
    """The cells `index` (M, N) of every member."""
    per_field = index.view(-1, members * index.shape[1])
    return cells.take(per_field).each(lambda x: x.reshape(len(index), index.shape[1], x.shape[2]))


@dataclass(frozen=True)
class Conditioned:
    """Members that know their measurements."""

    lower: Tensor  # (M, N, N) Cholesky factor
    weight: Tensor  # (M, N, 1) inverse covariance times values
    seen: Seen  # (M, N)
    valid: Tensor  # (M, N)
    extra: Tensor  # (n, N) noise variance beyond the common one
    scale: Tensor  # (n,) factor that calibrates deviations
    away: Tensor  # (n, N) of a measurement from what is predicted without it, in so calibrated deviations with noise
    without: Tensor  # (n, N) what the members' mean predicts without it


@torch.no_grad()
def condition(plan: KernelPlan, learned: Learned, cells: Cells, points: Points, rounds: int = 2) -> Conditioned:
    """The members with all points; up to `rounds` times the noise of what does not belong is found anew."""
    kernels = Kernels(plan, learned.theta.flatten(0, 1))
    index, valid, value = (x.repeat_interleave(plan.members, dim=0) for x in (points.index, points.valid, points.value))
    seen = kernels.see(_of_members(cells, plan.members, index))
    bare = kernels.covariance(seen, valid, torch.zeros_like(value))
    extra = torch.zeros_like(points.value)
    for turn in range(rounds + 1 if plan.robust else 1):
        spread = extra.repeat_interleave(plan.members, dim=0)
        lower = torch.linalg.cholesky(bare + torch.diag_embed(spread))
        inverse = torch.cholesky_inverse(lower)
        weight = inverse @ value[..., None]
        residual, variance, apart, of_mean = residuals(inverse, weight[..., 0], points.fold, plan.members)
        if turn == rounds or not plan.robust:
            break
        own = (variance - extra).clamp(min=1e-6)
        before, extra = extra, extra_noise(residual, own, points.valid)
        if not (extra.any() or before.any()):
            break
    scale = calibration(residual / variance.sqrt(), points.valid[:, None].double())[:, 0]
    noise = extra + kernels.noise.view(len(extra), plan.members).gather(1, points.fold % plan.members)
    latent = (variance - noise).clamp(min=0.0)
    error = of_the_mean(residual, apart, points.valid & (extra <= 0.0))
    away = error / (scale[:, None].square() * latent + apart + noise).sqrt()
    return Conditioned(lower, weight, seen, valid, extra, scale, away, points.value - of_mean)


@torch.no_grad()
def predict(plan: KernelPlan, learned: Learned, cells: Cells, points: Points) -> Predicted:
    """The members' common posterior over all cells: mean of means, calibrated variance plus their disagreement.

    The spread of measurements is calibrated for like places (`calibration_by_value`).
    """
    known = condition(plan, learned, cells, points)
    eye = torch.eye(known.lower.shape[1], dtype=known.lower.dtype).expand_as(known.lower)
    half = torch.linalg.solve_triangular(known.lower, eye, upper=False).float() * known.valid[:, None]
    weight = known.weight.float() * known.valid[..., None]
    theta, places = learned.theta.flatten(0, 1), points.index.repeat_interleave(plan.members, dim=0)
    shape = (len(points.index), plan.members, cells.places.shape[1])
    mean, variance = torch.empty(shape).flatten(0, 1), torch.empty(shape).flatten(0, 1)
    embedding = torch.empty(*mean.shape, plan.embedding) if plan.patch_features else None
    size = max(1, _IN_CACHE // (max(1, half.shape[1]) * min(_CHUNK, shape[2])))
    for begin in range(0, len(mean), size):
        some = slice(begin, begin + size)
        kernels, near = Kernels(plan, theta[some]), _cut(known.seen, some)
        far = kernels.see(cells.of(torch.arange(len(mean))[some] // plan.members))
        over_places = kernels.over_places(near, far, places[some])
        if embedding is not None and far.embedding is not None:
            embedding[some] = far.embedding
        for c in range(0, shape[2], _CHUNK):
            these = far.some(c, c + _CHUNK)
            cross = kernels.between(near, these, over_places[..., c : c + _CHUNK])
            mean[some, c : c + _CHUNK] = (weight[some].mT @ cross)[:, 0]
            explained = (half[some] @ cross).square_().sum(dim=1)
            variance[some, c : c + _CHUNK] = (kernels.variance(these) - explained).clamp(min=1e-8)
    mean, variance = mean.view(shape), variance.view(shape)
    middle = mean.mean(dim=1)
    apart = (mean - middle[:, None]).square_().mean(dim=1)
    total = known.scale.float()[:, None].square() * variance.mean(dim=1) + apart
    noise = Kernels(plan, theta).noise.view(shape[:2]).mean(dim=1).sqrt()
    first = None if embedding is None else embedding.view(*shape, plan.embedding)[:, 0]
    here = calibration_by_value(known.away.float(), points.valid, known.without.float(), middle)
    spread = here * (total + noise[:, None].square()).sqrt()
    return Predicted(middle, total.sqrt(), noise, spread, first)


def pick(learned: Learned, rows: Tensor) -> Learned:
    """The fields `rows` (n,)."""
    return _cut(learned, rows)


def _cut(whole: _T, rows: slice | Tensor) -> _T:
    """Some rows of a dataclass of tensors."""
    return replace(whole, **{k: None if v is None else v[rows] for k, v in vars(whole).items()})  # type: ignore[type-var]
