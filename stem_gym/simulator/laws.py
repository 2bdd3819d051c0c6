"""Laws by name: what a measurement should give, as a function of a law's parameters and of what was chosen.

A law is a plain function of a mapping of axes to tensors and of its parameters by name, units in the names; all
broadcast, and it is differentiable. Modules of this folder that list theirs under `LAWS` are found by themselves; other
distributions add modules under the entry-point group `stem_gym.laws`, and programs single laws with `register`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import torch
from torch import Tensor

from stem_gym.core.errors import ConfigError, UnknownNameError, unknown_name
from stem_gym.core.hypotheses import Axis, LawSet, LawSpec, check_priors

Law = Callable[..., Tensor]

_LISTS_LAWS = re.compile(r"^LAWS\b.*=", re.MULTILINE)  # found in the text, so that no other module is imported
_SAMPLES = 2048  # of a prior, on which a law is tried
_registered: dict[str, Law] = {}


def register(name: str, law: Law) -> None:
    """Make a law known under a name, for programs that bring their own. Raises ConfigError for one that is taken."""
    if known_laws().get(name, law) is not law:
        raise ConfigError(f"There is a law {name!r} already; choose another name.")
    parameters_of(law)
    _registered[name] = law


def known_laws() -> dict[str, Law]:
    """Name → law."""
    return {**_shipped(), **_registered}


@functools.cache
def _shipped() -> dict[str, Law]:
    files = sorted(Path(__file__).parent.glob("*.py"))
    modules = [f"stem_gym.simulator.{file.stem}" for file in files if _LISTS_LAWS.search(file.read_text("utf-8"))]
    modules += [point.value for point in entry_points(group="stem_gym.laws")]
    return {name: law for module in modules for name, law in importlib.import_module(module).LAWS.items()}


def law(name: str) -> Law:
    """The law of a name. Raises UnknownNameError."""
    if name not in known_laws():
        raise unknown_name("law", name, known_laws())
    return known_laws()[name]


def parameters_of(law: Law) -> tuple[str, ...]:
    """The names of a law's parameters: its keyword-only arguments. Raises ConfigError for a function without any."""
    signature = inspect.signature(law).parameters.values()
    names = tuple(one.name for one in signature if one.kind is inspect.Parameter.KEYWORD_ONLY)
    if not names or len(signature) != len(names) + 1:
        raise ConfigError(
            f"A law takes the axes, and its parameters by name after a *; given {inspect.signature(law)}."
        )
    return names


@dataclass(frozen=True)
class BoundLaw:
    """A law with its priors, as a function of standard normal numbers."""

    name: str
    law: Law
    spec: LawSpec
    parameters: tuple[str, ...]
    axes: tuple[str, ...]

    def values(self, z: Tensor) -> dict[str, Tensor]:
        """The parameters, each (…), that belong to standard normal numbers z (…, P)."""
        return {name: self.spec.priors[name].value(z[..., i]) for i, name in enumerate(self.parameters)}

    def mean(self, z: Tensor, design: Tensor) -> Tensor:
        """What should be measured, (…), for z (…, P) in experiments (…, D); both broadcast."""
        return self.of(self.values(z), design)

    def over_grid(self, z: Tensor, grids: Sequence[Tensor]) -> Tensor:
        """The same in all combinations of the axes' values, (…, E, N), the last axis fastest, for z (…, N, P).

        Each axis is given along a dimension of its own, so that what depends on one alone is worked out once for each
        of its values.
        """
        lengths = [len(grid) for grid in grids]
        said = self._apart(z, grids)
        return said.expand(*said.shape[: -len(grids) - 1], *lengths, -1).flatten(-len(grids) - 1, -2)

    def same_over_grid(self, grids: Sequence[Tensor]) -> Tensor:
        """For each combination (E,) of the axes' values, the first of which the law says the same by its formula."""
        lengths = [len(grid) for grid in grids]
        said = self._apart(torch.zeros(1, len(self.parameters)), grids)
        first = torch.arange(math.prod(lengths)).reshape(lengths)
        for axis, length in enumerate(said.shape[:-1]):
            first = first.narrow(axis, 0, length)
        return first.expand(lengths).flatten()

    def _apart(self, z: Tensor, grids: Sequence[Tensor]) -> Tensor:
        """What is expected, (…, E1, E2, …, N), for z (…, N, P); an axis that does not matter has a length of 1."""
        axes = {
            name: grid.reshape([-1 if j == i else 1 for j in range(len(grids) + 1)])
            for i, (name, grid) in enumerate(zip(self.axes, grids, strict=True))
        }
        return self.law(axes, **self.values(z[(..., *(None for _ in grids), slice(None), slice(None))]))

    def of(self, values: Mapping[str, Tensor], design: Tensor) -> Tensor:
        """The same for parameters (…) by name."""
        return self.law({name: design[..., i] for i, name in enumerate(self.axes)}, **values)


def bind(name: str, spec: LawSpec, axes: Sequence[Axis]) -> BoundLaw:
    """A law with its priors. Raises UnknownNameError, and ConfigError for priors of other parameters."""
    try:
        function = law(spec.law)
    except UnknownNameError as error:
        raise UnknownNameError(
            f"{name}: {error} A program makes its own known with stem_gym.simulator.laws.register."
        ) from error
    parameters = parameters_of(function)
    if wrong := sorted(spec.priors.keys() ^ set(parameters)):
        raise ConfigError(
            f"{name}: the law {spec.law!r} has the parameters {', '.join(parameters)}, each of which needs a prior; "
            f"not so: {', '.join(wrong)}."
        )
    return BoundLaw(name, function, spec, parameters, tuple(axis.name for axis in axes))


def bind_set(laws: LawSet) -> dict[str, BoundLaw]:
    """Every law of a set by its name, tried out. Raises ConfigError as `check_law` does."""
    bound = {name: bind(name, spec, laws.axes) for name, spec in laws.laws.items()}
    for one in bound.values():
        check_law(one, laws)
    return bound


def check_law(bound: BoundLaw, laws: LawSet) -> None:
    """Try a law over its priors and the corners and grids of the axes.

    Raises ConfigError where it gives NaN or infinity, or a negative value of what is no logarithm.
    """
    check_priors(bound.spec, bound.name)
    grids = [axis.grid().double() for axis in laws.axes]
    design = torch.cartesian_prod(*grids).reshape(-1, len(grids))
    engine = torch.quasirandom.SobolEngine(len(bound.parameters), scramble=True, seed=0)
    part = engine.draw(_SAMPLES, dtype=torch.float64).clamp(1e-6, 1.0 - 1e-6)
    z = torch.special.ndtri(part)
    try:
        mean = bound.mean(z.unsqueeze(1), design)
    except KeyError as error:
        raise ConfigError(
            f"{bound.name}: the law {bound.spec.law!r} asks for the axis {error}; the axes of {laws.name} are "
            f"{', '.join(bound.axes)}."
        ) from error
    if mean.shape != (_SAMPLES, len(design)):
        raise ConfigError(f"{bound.name}: a law must broadcast its arguments; it gave the shape {tuple(mean.shape)}.")
    try:
        alike = torch.allclose(bound.over_grid(z, grids).mT, mean, equal_nan=True)
    except RuntimeError as error:
        raise ConfigError(
            f"{bound.name}: a law must broadcast its arguments; {bound.spec.law!r} fails where each axis has a "
            f"dimension of its own: {error}"
        ) from error
    if not alike:
        raise ConfigError(
            f"{bound.name}: a law must say the same of each experiment however its axes are laid out; the law "
            f"{bound.spec.law!r} says something else where every axis has a dimension of its own."
        )
    bad = ~torch.isfinite(mean) if laws.logarithmic else ~(torch.isfinite(mean) & (mean >= 0.0))
    if bool(bad.any()):
        sample, place = bad.nonzero()[0].tolist()
        at = {name: round(float(value[sample]), 6) for name, value in bound.values(z).items()}
        where = {axis.name: round(float(design[place, i]), 6) for i, axis in enumerate(laws.axes)}
        right = "finite" if laws.logarithmic else "finite and not negative"
        raise ConfigError(
            f"{bound.name}: {laws.quantity} must be {right} over the whole prior; it is {float(mean[sample, place]):g} "
            f"for {at} at {where}."
        )
