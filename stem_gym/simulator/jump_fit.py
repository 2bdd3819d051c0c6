"""The jump-rate map from data: the map that makes recorded transitions likeliest, and how sure it is.

The likelihood is that of `jump_chain`. Intervals are those of a normal law about the best fit (Laplace), in logarithms
where a parameter is positive; that of the floor, which may be zero, and any other on demand, come from the likelihood
ratio (Wilks, Ann. Math. Stat. 9, 60, 1938).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from stem_gym.core.batch import take_rows
from stem_gym.core.errors import DataError, unknown_name
from stem_gym.simulator.jump_chain import (
    BEYOND,
    PARAMETERS,
    STAYED,
    Transitions,
    check_transitions,
    double,
    join,
    log_likelihood,
)
from stem_gym.simulator.jumps import JumpMap

__all__ = ["BEYOND", "PARAMETERS", "STAYED", "JumpFit", "Transitions", "fit", "join", "log_likelihood"]

FEWEST_JUMPS = 10  # fewer do not tell five numbers
_LOW = (1e-5, 0.0, 0.05, 0.1, 1e-8)
_HIGH = (1e2, 3.0, 3.0, 10.0, 10.0)
_ROWS = 512  # transitions that are worked on at a time: of about as many parts each
_FLOOR = PARAMETERS.index("floor_per_s")
_CENTRE = PARAMETERS.index("centre_bonds")


def fit(transitions: Transitions, reference_pa: float = 100.0, fixed: Mapping[str, float] | None = None) -> JumpFit:
    """The map that makes the transitions likeliest. `fixed` gives parameters that are not to be fitted.

    Raises DataError for transitions that make no sense, for fewer than ten jumps, and where the data do not tell a
    parameter; says which.
    """
    fixed = dict(fixed or {})
    check_transitions(transitions)
    _check_fixed(fixed, reference_pa)
    if transitions.jumps < FEWEST_JUMPS:
        raise DataError(
            f"{transitions.jumps} jumps in {len(transitions)} transitions are too few for a rate map; at least "
            f"{FEWEST_JUMPS} are needed. Dwell longer, nearer to the neighbours, or give more recordings."
        )
    problem = _Problem(double(transitions), reference_pa)
    best = problem.descend(min(_starts(transitions, reference_pa, fixed), key=problem.value), fixed)
    if "floor_per_s" not in fixed and best.values[_FLOOR] * problem.floor_seconds < 0.05:
        fixed_floor = fixed | {"floor_per_s": 0.0}
        best = problem.descend(best.values, fixed_floor)
        at_zero = True
    else:
        fixed_floor, at_zero = fixed, False
    free = tuple(name for name in PARAMETERS if name not in fixed_floor)
    _check_inside(best.values, free)
    covariance = _inverse(problem.curvature(best.values, free), free)
    estimate = {name: float(value) for name, value in zip(PARAMETERS, best.values, strict=True)}
    return JumpFit(estimate, free, covariance, -best.height, reference_pa, problem, tuple(fixed), at_zero)


@dataclass(frozen=True, eq=False)
class JumpFit:
    """A fitted map. `covariance` is that of the free parameters, logarithms of all but the centre."""

    estimate: Mapping[str, float]  # by name
    free: tuple[str, ...]
    covariance: Tensor  # (F, F)
    log_likelihood: float
    reference_pa: float
    problem: _Problem = field(repr=False)
    fixed: tuple[str, ...] = ()  # parameters that were given
    floor_is_zero: bool = False  # whether the best floor is none at all

    def sd(self, name: str) -> float:
        """Standard deviation of a free parameter (of its logarithm, for all but the centre); 0 of a given one."""
        _check_name(name)
        return float(self.covariance.diagonal()[self.free.index(name)].sqrt()) if name in self.free else 0.0

    def interval(self, name: str, level: float = 0.9) -> tuple[float, float]:
        """Where the parameter lies with probability `level`; by likelihood ratio for the floor, else by Laplace."""
        _check_level(level)
        if name == "floor_per_s":
            return self.profile(name, level)
        value, reach = self.estimate[name], _sigmas(level) * self.sd(name)
        if name == "centre_bonds":
            return value - reach, value + reach
        return value * math.exp(-reach), value * math.exp(reach)

    def intervals(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """The intervals of all parameters."""
        return {name: self.interval(name, level) for name in PARAMETERS}

    def profile(self, name: str, level: float = 0.9) -> tuple[float, float]:
        """The interval by likelihood ratio: the others are fitted anew for every value that is tried."""
        _check_name(name)
        _check_level(level)
        value = self.estimate[name]
        if name in self.fixed:
            return value, value
        sides = [self._side(name, _sigmas(level), direction) for direction in (-1.0, 1.0)]
        return sides[0], sides[1]

    def likelihood_ratio(self, parameters: Mapping[str, float]) -> float:
        """Twice the logarithm by which the best fit is likelier than this map: chi-squared where that map is true."""
        values = torch.tensor([parameters[name] for name in PARAMETERS], dtype=torch.float64)
        return 2.0 * (self.log_likelihood + self.problem.value(values))

    def as_config(self, sds: float = 0.0) -> dict[str, Any]:
        """The `kinetics.jumps` section: the estimates, or ranges of ± `sds` standard deviations to draw from."""
        if not (0.0 <= sds <= 10.0):
            raise DataError(f"Ranges reach 0 to 10 standard deviations; given {sds}.")
        section: dict[str, Any] = {"kind": "map"}
        for name in PARAMETERS:
            low, high = self._range(name, sds)
            section[name] = {"low": low, "high": high, "logarithmic": name != "centre_bonds" and 0.0 < low < high}
        section["reference_pa"] = self.reference_pa
        JumpMap.model_validate(section)
        return section

    def _range(self, name: str, sds: float) -> tuple[float, float]:
        value = self.estimate[name]
        if sds == 0.0 or name in self.fixed:
            return value, value
        level = 2.0 * NormalDist().cdf(sds) - 1.0
        low, high = self.interval(name, level)
        return max(low, 0.0), high

    def _side(self, name: str, sigmas: float, direction: float) -> float:
        """Where the root of the likelihood ratio reaches `sigmas`, found by secants: it is nearly a straight line."""
        index, logarithmic = PARAMETERS.index(name), name != "centre_bonds"
        values = torch.tensor([self.estimate[key] for key in PARAMETERS], dtype=torch.float64)
        given = {key: self.estimate[key] for key in self.fixed}

        def excess(value: float) -> float:
            nonlocal values
            start = values.clone()
            start[index] = value
            found = self.problem.descend(start, given | {name: value}, steps=12)
            values = found.values
            return math.sqrt(max(0.0, 2.0 * (self.log_likelihood + found.height))) - sigmas

        if name == "floor_per_s" and self.floor_is_zero:
            if direction < 0.0:
                return 0.0
            step = 1.0 / self.problem.floor_seconds
            return _root(excess, (0.0, -sigmas), step, _HIGH[index])
        if name == "floor_per_s" and direction < 0.0 and excess(0.0) < 0.0:
            return 0.0
        values = torch.tensor([self.estimate[key] for key in PARAMETERS], dtype=torch.float64)
        best, reach = self.estimate[name], sigmas * self.sd(name) * direction
        if not logarithmic:
            return _root(excess, (best, -sigmas), reach, _HIGH[index])
        top = math.log(_HIGH[index])
        return math.exp(_root(lambda x: excess(math.exp(x)), (math.log(best), -sigmas), reach, top))


@dataclass(frozen=True)
class _Point:
    values: Tensor  # (5,) float64
    height: float  # negative log likelihood


class _Problem:
    """The negative log likelihood of some transitions, its slope, and the way down."""

    def __init__(self, transitions: Transitions, reference_pa: float) -> None:
        self.reference_pa = reference_pa
        self._parts = _alike(transitions)
        seconds = transitions.part_s.sum(1) + transitions.frame_s
        self.floor_seconds = float((3.0 * seconds * transitions.current_pa).sum()) / reference_pa

    def value(self, values: Tensor) -> float:
        """Negative log likelihood of parameters (5,)."""
        with torch.no_grad():
            return -sum(float(log_likelihood(values, part, self.reference_pa)) for part in self._parts)

    def slope(self, values: Tensor) -> tuple[float, Tensor]:
        """Negative log likelihood and its gradient (5,)."""
        total, gradient = 0.0, torch.zeros_like(values)
        for part in self._parts:
            leaf = values.detach().requires_grad_(True)
            height = -log_likelihood(leaf, part, self.reference_pa)
            total += float(height.detach())
            gradient = gradient + torch.autograd.grad(height, leaf)[0]
        return total, gradient

    def descend(self, start: Tensor, fixed: Mapping[str, float], steps: int = 80) -> _Point:
        """The lowest point downhill of `start` (5,), the fixed parameters at their values."""
        values = start.clone()
        for name, value in fixed.items():
            values[PARAMETERS.index(name)] = value
        free = [index for index, name in enumerate(PARAMETERS) if name not in fixed]
        if not free:
            return _Point(values, self.value(values))
        low, high = (_inner(torch.tensor(bound, dtype=torch.float64), free) for bound in (_LOW, _HIGH))
        inner = _inner(values, free).clamp(low, high).requires_grad_(True)
        search = torch.optim.LBFGS(
            [inner], max_iter=steps, tolerance_grad=3e-3, tolerance_change=1e-6, line_search_fn="strong_wolfe"
        )

        def height() -> Tensor:
            place = inner.detach()
            outside = place - place.clamp(low, high)
            here = _outer(place.clamp(low - 0.5, high + 0.5), free, values)
            total, gradient = self.slope(here)
            inner.grad = gradient[free] * _stretch(here, free) + 2e3 * outside
            return torch.tensor(total + 1e3 * float(outside.square().sum()), dtype=torch.float64)

        search.step(height)
        values = _outer(inner.detach().clamp(low, high), free, values)
        return _Point(values, self.value(values))

    def curvature(self, values: Tensor, names: Sequence[str]) -> Tensor:
        """Second derivatives (F, F) of the negative log likelihood in the free parameters' own coordinates."""
        free = [PARAMETERS.index(name) for name in names]
        place, rows = _inner(values, free), []
        for index in range(len(free)):
            step = torch.zeros_like(place)
            step[index] = 1e-4
            slopes = []
            for there in (_outer(place + step, free, values), _outer(place - step, free, values)):
                slopes.append(self.slope(there)[1][free] * _stretch(there, free))
            rows.append((slopes[0] - slopes[1]) / 2e-4)
        matrix = torch.stack(rows) if rows else torch.zeros(0, 0, dtype=torch.float64)
        return 0.5 * (matrix + matrix.T)


def _alike(transitions: Transitions) -> list[Transitions]:
    """Transitions of about as many parts together, so that short exposures do not cost what long ones do."""
    order = torch.arange(1, transitions.part_s.shape[1] + 1)
    used = ((transitions.part_s > 0.0) * order).amax(1).clamp(min=1)
    groups = []
    for rows in used.argsort(stable=True).split(_ROWS):
        most = int(used[rows].max())
        group = take_rows(transitions, rows)
        groups.append(replace(group, to_beam_ang=group.to_beam_ang[:, :most], part_s=group.part_s[:, :most]))
    return groups


def _inner(values: Tensor, free: Sequence[int]) -> Tensor:
    """Free parameters in the coordinates of the search: logarithms of all but the centre."""
    return torch.stack([values[i] if i == _CENTRE else values[i].clamp(min=_LOW[i]).log() for i in free])


def _outer(inner: Tensor, free: Sequence[int], rest: Tensor) -> Tensor:
    values = rest.clone()
    for place, index in zip(inner, free, strict=True):
        values[index] = place if index == _CENTRE else place.exp()
    return values


def _stretch(values: Tensor, free: Sequence[int]) -> Tensor:
    """Derivative of each free parameter by its coordinate."""
    return torch.stack([torch.ones_like(values[i]) if i == _CENTRE else values[i] for i in free])


def _starts(transitions: Transitions, reference_pa: float, fixed: Mapping[str, float]) -> list[Tensor]:
    """Where to begin: the public prior's shape with its centre nearer or farther, and a peak that suits the count."""
    seconds = float((transitions.part_s.sum(1) * transitions.current_pa).sum()) / reference_pa
    rate = max(transitions.jumps / max(seconds, 1e-9), 1e-5)
    centres = (fixed["centre_bonds"],) if "centre_bonds" in fixed else (0.7, 0.9, 1.1, 1.3, 1.5)
    return [torch.tensor([4.0 * rate, at, 0.45, 1.0, 0.02 * rate], dtype=torch.float64) for at in centres]


def _root(excess: Callable[[float], float], begin: tuple[float, float], step: float, top: float) -> float:
    """Where a rising function is zero, by secants from a known point; `top` where it does not get there."""
    (x, y), new = begin, begin[0] + step
    for _ in range(12):
        new = min(new, top)
        here = excess(new)
        if abs(here) < 0.02 or (new == top and here < 0.0):
            return new
        slope = (here - y) / (new - x)
        ahead = new - here / slope if slope * step > 0.0 else new + step
        x, y, new = new, here, min(max(ahead, new - 2.0 * abs(step)), new + 2.0 * abs(step))
    return new


def _inverse(curvature: Tensor, names: Sequence[str]) -> Tensor:
    """The covariance. Raises DataError where the likelihood does not bend along a parameter."""
    if not names:
        return curvature
    values, vectors = torch.linalg.eigh(curvature)
    if float(values[0]) < 1e-2:
        weakest = names[int(vectors[:, 0].abs().argmax())]
        raise DataError(
            f"The data do not tell {weakest}: the likelihood hardly changes along it. Give more transitions, with the "
            f"beam at more places around the dopants, or fix it, such as {weakest}=…"
        )
    return torch.linalg.inv(curvature)


def _check_inside(values: Tensor, names: Sequence[str]) -> None:
    """Refuse a best fit at the edge of what is looked at."""
    for name in names:
        index = PARAMETERS.index(name)
        value, low, high = float(values[index]), _LOW[index], _HIGH[index]
        if name != "floor_per_s" and not low * 1.01 + 1e-3 * (index == _CENTRE) < value < high * 0.99:
            raise DataError(
                f"The data do not tell {name}: the best fit runs to {value:.3g}, the edge of {low:g} to {high:g}. Give "
                f"more transitions, with the beam at more places around the dopants, or fix it, such as {name}=…"
            )


def _check_fixed(fixed: Mapping[str, float], reference_pa: float) -> None:
    for name, value in fixed.items():
        _check_name(name)
        index = PARAMETERS.index(name)
        low = 0.0 if name == "floor_per_s" else _LOW[index]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= _HIGH[index]:
            raise DataError(f"{name} can be fixed at {low:g} to {_HIGH[index]:g}; given {value!r}.")
    if not (math.isfinite(reference_pa) and reference_pa > 0.0):
        raise DataError(f"The reference current must be positive; given {reference_pa} pA.")


def _check_name(name: str) -> None:
    if name not in PARAMETERS:
        raise unknown_name("parameter of the rate map", name, PARAMETERS)


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise DataError(f"The level of an interval lies between 0 and 1; given {level}.")


def _sigmas(level: float) -> float:
    """Standard deviations on each side of a normal interval."""
    return NormalDist().inv_cdf(0.5 + 0.5 * level)
