"""Which cell is worth measuring next: scores of all cells from what is believed of them. Batched over rows.

Values may be in any unit; what is wanted is much of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from stem_gym.core.config import Config

_FAR = -1e6  # below so many deviations the leading term is exact in double precision


@dataclass(frozen=True)
class Belief:
    """What is believed of the cells of n fields, in the value's own unit."""

    mean: Tensor  # (n, C)
    deviation: Tensor  # (n, C) of the expected value; more measurements there lower it
    noise: Tensor  # (n,) deviation that a measurement has beside it
    best: Tensor  # (n,) most that is believed of a measured cell
    lowest: Tensor  # (n,) least that is believed of a measured cell
    embedding: Tensor | None = None  # (n, C, d) where the model places the cells
    spread: Tensor | None = None  # (n, C) deviation of a measurement from the mean; None: that of these two

    def measured_deviation(self) -> Tensor:
        """Deviation (n, C) of a measurement from the mean."""
        if self.spread is not None:
            return self.spread
        return (self.deviation.square() + self.noise.square()[:, None]).sqrt()


class ExpectedImprovement(Config):
    """Its logarithm: how much more than the best is to be expected.

    Jones, Schonlau and Welch, J. Global Optim. 13, 455, 1998; as a logarithm after Ament et al., NeurIPS 2023.
    """

    kind: Literal["expected_improvement"] = "expected_improvement"
    """this acquisition function"""
    margin: float = Field(0.0, ge=0)
    """improvement that does not count, as a part of the range believed so far"""
    draws: ClassVar[bool] = False

    def score(self, belief: Belief, normal: Tensor | None = None) -> Tensor:
        """(n, C) natural logarithm of the expected improvement in the value's unit."""
        goal = belief.best + self.margin * (belief.best - belief.lowest)
        sd = belief.deviation.double().clamp(min=1e-300)
        return sd.log() + _log_improvement((belief.mean.double() - goal.double()[:, None]) / sd)


class UpperConfidenceBound(Config):
    """Mean plus some deviations (Srinivas et al., ICML 2010)."""

    kind: Literal["upper_confidence_bound"] = "upper_confidence_bound"
    """this acquisition function"""
    deviations: float = Field(2.0, ge=0)
    """how many; more explores more"""
    draws: ClassVar[bool] = False

    def score(self, belief: Belief, normal: Tensor | None = None) -> Tensor:
        """(n, C) in the value's unit."""
        return belief.mean + self.deviations * belief.deviation


class Thompson(Config):
    """One draw of every cell's value (Thompson, Biometrika 25, 285, 1933), each cell by itself."""

    kind: Literal["thompson"] = "thompson"
    """this acquisition function"""
    draws: ClassVar[bool] = True

    def score(self, belief: Belief, normal: Tensor | None = None) -> Tensor:
        """(n, C) in the value's unit, from standard normal numbers (n, C)."""
        return belief.mean + belief.deviation * _needed(normal)


class MaximumVariance(Config):
    """The deviation: what is known least, for learning the map."""

    kind: Literal["maximum_variance"] = "maximum_variance"
    """this acquisition function"""
    draws: ClassVar[bool] = False

    def score(self, belief: Belief, normal: Tensor | None = None) -> Tensor:
        """(n, C) in the value's unit."""
        return belief.deviation


class LevelSet(Config):
    """Straddle: cells that may well be on the other side of a level (Bryan et al., NeurIPS 2005)."""

    kind: Literal["level_set"] = "level_set"
    """this acquisition function"""
    level_share: float = Field(0.5, ge=0, le=1)
    """the level, as a part of the range believed so far"""
    deviations: float = Field(1.96, ge=0)
    """weight of the deviation against the distance from the level"""
    draws: ClassVar[bool] = False

    def score(self, belief: Belief, normal: Tensor | None = None) -> Tensor:
        """(n, C) in the value's unit."""
        level = torch.lerp(belief.lowest, belief.best, self.level_share)[:, None]
        return self.deviations * belief.deviation - (belief.mean - level).abs()


class AboveLevel(Config):
    """Probability of being above a level: cells to be found one by one."""

    kind: Literal["above_level"] = "above_level"
    """this acquisition function"""
    level_share: float = Field(0.5, ge=0, le=1)
    """the level, as a part of the range believed so far"""
    draws: ClassVar[bool] = False

    def score(self, belief: Belief, normal: Tensor | None = None) -> Tensor:
        """(n, C) natural logarithm of the probability."""
        level = torch.lerp(belief.lowest, belief.best, self.level_share).double()[:, None]
        return torch.special.log_ndtr((belief.mean.double() - level) / belief.deviation.double().clamp(min=1e-300))


class RandomChoice(Config):
    """Every cell alike, whatever is believed."""

    kind: Literal["random_choice"] = "random_choice"
    """this acquisition function"""
    draws: ClassVar[bool] = True

    def score(self, belief: Belief, normal: Tensor | None = None) -> Tensor:
        """(n, C) the standard normal numbers (n, C) themselves."""
        return _needed(normal)


Acquisition: TypeAlias = Annotated[
    ExpectedImprovement | UpperConfidenceBound | Thompson | MaximumVariance | LevelSet | AboveLevel | RandomChoice,
    Field(discriminator="kind"),
]


def suited_to(mode: str, level_share: float) -> Acquisition:
    """The acquisition function for a task's mode: optimise, discover or learn."""
    if mode == "discover":
        return AboveLevel(level_share=level_share)
    return MaximumVariance() if mode == "learn" else ExpectedImprovement()


def choose(score: Tensor, free: Tensor, forbidden: Tensor, pinned: Tensor) -> Tensor:
    """The cell (n,) with the highest score (n, C): a free pinned one first, then a free one, then any not forbidden.

    `free` are cells not measured yet; `forbidden` ones are never chosen where any other is left. Masks (n, C) bool.
    """
    groups = torch.stack((pinned & free, free, torch.ones_like(free))) & ~forbidden
    groups = torch.cat((groups, torch.ones_like(groups[:1])))
    first = groups.any(dim=2).to(torch.uint8).argmax(dim=0)  # (n,) the first group that has a cell
    allowed = groups[first, torch.arange(len(score))]
    return torch.where(allowed, score.nan_to_num(-math.inf, math.inf, -math.inf), -math.inf).argmax(dim=1)


def _log_improvement(u: Tensor) -> Tensor:
    """log(φ(u) + u Φ(u)), also where that is below the smallest number."""
    near = u.clamp(min=-1.0)
    density = (-0.5 * near.square()).exp() / math.sqrt(2.0 * math.pi)
    plain = (density + near * torch.special.ndtr(near)).log()
    far = u.clamp(max=-1.0)
    ratio = math.sqrt(0.5 * math.pi) * torch.special.erfcx(-far.clamp(min=_FAR) / math.sqrt(2.0))
    bracket = torch.log1p(far.clamp(min=_FAR) * ratio)
    tail = torch.where(far < -1e4, -2.0 * (-far).log(), bracket)  # 1 − |u|·Mills ratio is 1/u² to leading order
    tail = tail - 0.5 * far.square() - 0.5 * math.log(2.0 * math.pi)
    return torch.where(u > -1.0, plain, tail)


def _needed(normal: Tensor | None) -> Tensor:
    if normal is None:
        raise ValueError("This acquisition function needs standard normal numbers (n, C).")
    return normal
