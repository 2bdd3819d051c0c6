"""Competing laws as plain data: priors of their parameters, the ranges of an experiment, and the sets that ship.

A law set is a YAML file in `stem_gym/law_sets`: what is measured, what can be chosen, and the laws that may be behind
it, each as the name of a function of `stem_gym/simulator` with a prior for every parameter. Every prior is a monotonic
function of a standard normal number, so that particles of any law live in one space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from stem_gym.core.config import Config, parse, read_yaml
from stem_gym.core.errors import ConfigError, unknown_name

NONE = "none"  # the answer that no law of the set is the true one
_ROOT2 = math.sqrt(2.0)


class Normal(Config):
    """A Gaussian prior."""

    kind: Literal["normal"] = "normal"
    mean: float
    """its mean"""
    sd: float = Field(gt=0)
    """its standard deviation"""

    def value(self, z: Tensor) -> Tensor:
        """The parameter (…) that belongs to standard normal numbers z (…)."""
        return self.mean + self.sd * z

    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation."""
        return self.mean, self.sd


class LogNormal(Config):
    """A prior whose logarithm is Gaussian."""

    kind: Literal["lognormal"] = "lognormal"
    median: float = Field(gt=0)
    """its median"""
    sigma: float = Field(gt=0, le=5)
    """standard deviation of the natural logarithm"""

    def value(self, z: Tensor) -> Tensor:
        """The parameter (…) that belongs to standard normal numbers z (…)."""
        return self.median * torch.exp(self.sigma * z)

    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation."""
        square = self.sigma**2
        mean = self.median * math.exp(0.5 * square)
        return mean, mean * math.sqrt(math.expm1(square))


class Uniform(Config):
    """An even prior between two ends."""

    kind: Literal["uniform"] = "uniform"
    low: float
    """lower end"""
    high: float
    """upper end"""

    def value(self, z: Tensor) -> Tensor:
        """The parameter (…) that belongs to standard normal numbers z (…)."""
        return self.low + (self.high - self.low) * _part_below(z)

    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation."""
        return 0.5 * (self.low + self.high), (self.high - self.low) / math.sqrt(12.0)


class LogUniform(Config):
    """A prior whose logarithm is even between two ends."""

    kind: Literal["loguniform"] = "loguniform"
    low: float = Field(gt=0)
    """lower end"""
    high: float = Field(gt=0)
    """upper end"""

    def value(self, z: Tensor) -> Tensor:
        """The parameter (…) that belongs to standard normal numbers z (…)."""
        return self.low * torch.exp(math.log(self.high / self.low) * _part_below(z))

    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation."""
        span = math.log(self.high / self.low)
        mean = (self.high - self.low) / span
        return mean, math.sqrt((self.high**2 - self.low**2) / (2.0 * span) - mean**2)


Prior = Annotated[Normal | LogNormal | Uniform | LogUniform, Field(discriminator="kind")]


class LawSpec(Config):
    """One law of a set."""

    law: str
    """name of the function, of those that `stem_gym.simulator.laws` knows"""
    priors: dict[str, Prior]
    """of every parameter; units are in the names"""
    summary: str = ""
    """one sentence for people"""


class Axis(Config):
    """One thing that an experiment chooses: any value between two ends, or one of some values."""

    name: str
    """with its unit, such as bias_v"""
    does: Literal["Pulse.bias_v", "Pulse.time_s", "Wait.time_s", "Set"]
    """the instruction that takes the value; Set sets the control of that name"""
    low: float | None = None
    """lower end of a range"""
    high: float | None = None
    """upper end of a range"""
    log: bool = False
    """whether equal steps of an action are equal factors"""
    values: tuple[float, ...] = ()
    """instead of a range"""
    levels: int = Field(1, ge=1)
    """steps of a range in which agents look for the best experiment"""

    def value(self, coordinate: Tensor) -> Tensor:
        """The value at a coordinate from −1 to 1; of some values, each has an equal share of the coordinates."""
        part = (0.5 * (coordinate + 1.0)).clamp(0.0, 1.0)
        if self.values:
            table = torch.tensor(self.values, dtype=part.dtype, device=part.device)
            return table[(part * len(self.values)).long().clamp(max=len(self.values) - 1)]
        low, high = self.ends()
        return low * (high / low) ** part if self.log else low + (high - low) * part

    def coordinate(self, value: Tensor) -> Tensor:
        """The coordinate of a value, as `value` takes it. Raises ConfigError for a value that can not be chosen."""
        low, high = self.ends()
        slack = 1e-5 * max(abs(low), abs(high))
        if not bool(((value >= low - slack) & (value <= high + slack)).all()):
            raise ConfigError(
                f"{self.name} must be within [{low:g}, {high:g}]; given {float(value.min()):g} to "
                f"{float(value.max()):g}."
            )
        if self.values:
            table = torch.tensor(self.values, dtype=value.dtype, device=value.device)
            away = (value.unsqueeze(-1) - table).abs()
            if bool((away.amin(-1) > slack).any()):
                raise ConfigError(
                    f"{self.name} must be one of {list(self.values)}; given {value.flatten()[:4].tolist()}."
                )
            return 2.0 * (away.argmin(-1) + 0.5) / len(self.values) - 1.0
        part = (value / low).log() / math.log(high / low) if self.log else (value - low) / (high - low)
        return 2.0 * part.clamp(0.0, 1.0) - 1.0

    def ends(self) -> tuple[float, float]:
        """Least and largest value."""
        if self.values:
            return min(self.values), max(self.values)
        return float(self.low or 0.0), float(self.high or 0.0)

    def grid(self) -> Tensor:
        """The values among which agents look: all of some values, `levels` of a range with its ends. (levels,)"""
        if self.values:
            return torch.tensor(self.values)
        return self.value(torch.linspace(-1.0, 1.0, self.levels))


class LawSet(Config):
    """What is measured, what can be chosen, and which laws may be behind it."""

    name: str
    """the same as the file's"""
    summary: str
    """one sentence for lists"""
    quantity: str
    """what is measured, with its unit"""
    full_scale: float = Field(gt=0)
    """value of the quantity that an observation shows as 1"""
    logarithmic: bool = False
    """whether the quantity is a logarithm already: then it may be negative, and factors are added to it"""
    axes: tuple[Axis, ...] = Field(min_length=1)
    """what an experiment chooses"""
    laws: dict[str, LawSpec]
    """by the names that are declared"""

    @property
    def answers(self) -> tuple[str, ...]:
        """What can be declared: the laws in their order, and that it is none of them."""
        return (*self.laws, NONE)


def law_set_files() -> dict[str, Path]:
    """Name → file of every set that ships."""
    return {path.stem: path for path in sorted((Path(__file__).resolve().parents[1] / "law_sets").glob("*.yaml"))}


def read_law_set(name: str) -> LawSet:
    """The set that ships under a name, or the one in a YAML file.

    Raises UnknownNameError for a name that nothing ships under, and ConfigError for what makes no set: fewer than two
    laws, a prior that is empty, a range that does not rise.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else law_set_files().get(name)
    if path is None:
        raise unknown_name("law set", name, law_set_files())
    return check_law_set(parse(LawSet, read_yaml(path), path.name), path.name)


def as_law_set(given: LawSet | Mapping[str, Any]) -> LawSet:
    """A set made in Python, checked as one from a file."""
    made = given if isinstance(given, LawSet) else parse(LawSet, given, "law set")
    return check_law_set(made, made.name)


def check_law_set(laws: LawSet, source: str) -> LawSet:
    """The set itself. Raises ConfigError for what makes no set."""
    if len(laws.laws) < 2:
        raise ConfigError(f"{source}: there is nothing to discriminate in {len(laws.laws)} law(s); give at least two.")
    if NONE in laws.laws:
        raise ConfigError(f"{source}: no law may be called {NONE!r}; that is the answer that it is none of them.")
    for axis in laws.axes:
        _check_axis(axis, source)
    for what in ("name", "does"):
        given = [getattr(axis, what) for axis in laws.axes]
        if twice := sorted({one for one in given if given.count(one) > 1} - {"Set"}):
            raise ConfigError(f"{source}: two axes have the {what} {', '.join(twice)}; each may be there once.")
    for name, spec in laws.laws.items():
        check_priors(spec, f"{source}, {name}")
    return laws


def check_priors(spec: LawSpec, source: str) -> None:
    """Raises ConfigError for a prior between two ends that do not rise."""
    for parameter, prior in spec.priors.items():
        if isinstance(prior, Uniform | LogUniform) and not prior.low < prior.high:
            raise ConfigError(f"{source}, {parameter}: low must be below high; given {prior.low:g} and {prior.high:g}.")


def _check_axis(axis: Axis, source: str) -> None:
    if bool(axis.values) == (axis.low is not None or axis.high is not None):
        raise ConfigError(f"{source}, {axis.name}: give either values, or low and high.")
    low, high = axis.ends()
    if not axis.values and not low < high:
        raise ConfigError(f"{source}, {axis.name}: low must be below high; given {low:g} and {high:g}.")
    if axis.log and not low > 0.0:
        raise ConfigError(f"{source}, {axis.name}: a logarithmic range must be positive; given {low:g} to {high:g}.")


def _part_below(z: Tensor) -> Tensor:
    """The standard normal distribution function."""
    return 0.5 * (1.0 + torch.erf(z / _ROOT2))
