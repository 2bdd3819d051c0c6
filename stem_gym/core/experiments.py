"""A campaign of experiments between competing laws: what one costs, how it is asked for, and what was seen so far.

`Experiment` is the public description: the same section stands in a variant's task and in its instrument, and agents
read it from the task. `Protocol` turns it into numbers of actions and observations, and back, for whoever needs them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from stem_gym.core.config import Config, parse
from stem_gym.core.errors import ActionError, ConfigError
from stem_gym.core.hypotheses import Axis, LawSet, as_law_set, read_law_set

EXPERIMENT, DECLARE = "experiment", "declare"
LOG_RANGE = 12.0  # a declared logit of ±1 is a factor of e^±12
VALUE_LIMIT = 20.0  # an observation shows at most so many full scales
NOISE_LIMIT = 6.0  # and noise that has grown at most e^6 times
PICTURE_FOV_NM, PICTURE_PIXELS = 2000.0, 64  # of pictures of domains
_OUTSIDE, _INSIDE = 64.0, 192.0  # their greys, of what has not switched and of what has
_SUM_TOLERANCE = 1e-3


class Noise(Config):
    """Standard deviation √(absolute² + (relative · value)²) of one measurement, times what has grown since tuning."""

    absolute: float = Field(ge=0)
    """in the unit of the quantity; a task needs some"""
    relative: float = Field(0.0, ge=0)
    """part of the value"""
    growth_s: float | None = Field(None, gt=0)
    """time in which the deviation grows by e when nothing is tuned; null: it does not grow"""
    untuned_s: tuple[float, float] = (0.0, 0.0)
    """time since the last tuning when an episode begins, drawn evenly between two ends"""


class Sites(Config):
    """Places that remember: what was done at one stays, and a factor is shared by all that is measured there."""

    count: int = Field(ge=1, le=64)
    """how many there are"""
    factor: float = Field(0.0, ge=0, le=3)
    """standard deviation of the natural logarithm of the factor that belongs to a site; 0: there is none"""
    remembers: bool = False
    """whether a value only grows: what a pulse leaves is the largest of what the pulses at the site would leave"""
    move_s: float = Field(0.0, ge=0)
    """time of a move to another site"""


class Enabling(Config):
    """An action that tells nothing by itself."""

    does: Literal["tune", "erase", "calibrate"]
    """tune: the noise is back to its start; erase: the present site is as if nothing had been done there; calibrate:
    from now on, measurements at the present site are free of its factor"""
    seconds: float = Field(gt=0)
    """its time"""


class Experiment(Config):
    """What is public about the experiments of a campaign."""

    laws: str | LawSet
    """name or file of a law set, or the set itself"""
    noise: Noise
    measure_s: float = Field(gt=0)
    """time of one measurement, beside pulses and waits"""
    settle_s: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """axis that is set → time until a change of it has settled"""
    sites: Sites | None = None
    """null: each experiment has a fresh site, which costs nothing"""
    enabling: dict[str, Enabling] = Field(default_factory=dict)
    """by the names of the controls that are set to 1"""

    @functools.cached_property
    def law_set(self) -> LawSet:
        """The set behind the name."""
        return read_law_set(self.laws) if isinstance(self.laws, str) else as_law_set(self.laws)

    def noise_sd(self, value: Tensor, noise_factor: Tensor) -> Tensor:
        """Standard deviation of a measurement of `value`, which broadcasts with what the noise has grown by."""
        noise = self.noise
        return noise_factor * torch.sqrt(noise.absolute**2 + (noise.relative * value).square())

    def check(self) -> None:
        """Raises ConfigError for costs and enabling actions that make no sense together."""
        laws, sites = self.law_set, self.sites
        if stray := sorted(self.settle_s.keys() - {axis.name for axis in laws.axes if axis.does == "Set"}):
            raise ConfigError(f"settle_s: {', '.join(stray)} is no axis of {laws.name} that is set.")
        if not self.noise.absolute > 0.0:
            raise ConfigError(
                "noise: absolute must be positive, or one measurement would decide where a law says zero."
            )
        first_s, last_s = self.noise.untuned_s
        if not 0.0 <= first_s <= last_s or (last_s > 0.0 and self.noise.growth_s is None):
            raise ConfigError(
                f"noise: untuned_s must be two times that rise, and needs growth_s; given {first_s:g} and {last_s:g}."
            )
        if taken := sorted(self.enabling.keys() & {EXPERIMENT, DECLARE, *(axis.name for axis in laws.axes)}):
            raise ConfigError(f"enabling: {', '.join(taken)} is the name of an axis or of another action.")
        for name, action in self.enabling.items():
            useless = {
                "tune": self.noise.growth_s is None and "noise.growth_s is null",
                "erase": not (sites and sites.remembers) and "no site remembers",
                "calibrate": not (sites and sites.factor > 0.0) and "no site has a factor",
            }[action.does]
            if useless:
                raise ConfigError(f"enabling, {name}: {action.does} would do nothing, because {useless}.")


@dataclass(frozen=True)
class Wish:
    """What actions ask for."""

    kind: Tensor  # (B,) int64, index in Protocol.kinds
    design: Tensor  # (B, D) values of the axes
    site: Tensor  # (B,) int64
    probability: Tensor  # (B, A) declared


@dataclass(frozen=True)
class History:
    """What was measured, oldest first; T places, of which `done` says which are filled."""

    done: Tensor  # (B, T) bool
    design: Tensor  # (B, T, D) values of the axes
    site: Tensor  # (B, T) int64
    value: Tensor  # (B, T) of the quantity
    noise_factor: Tensor  # (B, T)
    fresh: Tensor  # (B, T) bool, whether the site was as if nothing had been done there
    calibrated: Tensor  # (B, T) bool, whether it is free of its site's factor


@dataclass(frozen=True)
class Present:
    """How things stand now."""

    noise_factor: Tensor  # (B,) of a measurement that would begin now
    site: Tensor  # (B,) int64
    fresh: Tensor  # (B, K) bool
    calibrated: Tensor  # (B, K) bool
    design: Tensor  # (B, D) values of the axes in the last experiment, or where they stand at the start
    left: Tensor  # (B, 3) of steps, seconds and electrons


class Protocol:
    """Numbers of actions and observations of a campaign.

    An action is a row of numbers from −1 to 1: one for each kind of action, of which the largest is done; one for each
    axis; one for the site, where there are several; one for each answer, its logit in units of `LOG_RANGE`.
    A measurement is a row of numbers: whether it is there; the coordinates of its axes; its site; its value in full
    scales; the logarithm of its noise factor in units of `NOISE_LIMIT`; whether the site was fresh; whether calibrated.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.laws = experiment, experiment.law_set
        self.kinds = (EXPERIMENT, *experiment.enabling, DECLARE)
        self.answers = self.laws.answers
        self.axes = self.laws.axes
        self.sites = experiment.sites.count if experiment.sites else 1
        axes, choose = len(self.axes), int(self.sites > 1)
        self.parts = (len(self.kinds), axes, choose, len(self.answers))
        self.action_size = sum(self.parts)
        self.measurement_size = axes + 6
        self.present_size = 2 + 2 * self.sites + axes

    # Actions

    def wish(self, action: Tensor) -> Wish:
        """What actions (B, n) ask for."""
        # In double precision and rounded: single differs in its last digit with the number of rows.
        kind, axes, site, logit = action.double().split(self.parts, dim=1)
        design = torch.stack([axis.value(axes[:, i]) for i, axis in enumerate(self.axes)], dim=1)
        where = self._site(site[:, 0]) if self.sites > 1 else torch.zeros_like(kind[:, 0]).long()
        return Wish(kind.argmax(1), design.float(), where, torch.softmax(LOG_RANGE * logit, dim=1).float())

    def experiments(self, design: Tensor, site: Tensor | None = None) -> Tensor:
        """Actions (n, …) that do experiments (n, D) at sites (n,), the first if absent.

        Raises ConfigError for what can not be chosen.
        """
        site = torch.zeros(len(design), dtype=torch.int64, device=design.device) if site is None else site
        if not bool(((site >= 0) & (site < self.sites)).all()):
            raise ConfigError(f"Sites go from 0 to {self.sites - 1}; given {site.flatten()[:8].tolist()}.")
        action = self._of_kind(torch.zeros(len(design), dtype=torch.int64, device=design.device))
        first = len(self.kinds)
        for i, axis in enumerate(self.axes):
            action[:, first + i] = axis.coordinate(design[:, i])
        if self.sites > 1:
            action[:, first + len(self.axes)] = self._site_number(site)
        return action

    def enabling(self, name: str, rows: int) -> Tensor:
        """Actions (rows, …) that do the enabling action of a name."""
        if name not in self.experiment.enabling:
            raise ConfigError(f"There is no enabling action {name!r}; there are {list(self.experiment.enabling)}.")
        return self._of_kind(torch.full((rows,), self.kinds.index(name)))

    def declarations(self, probability: Tensor) -> Tensor:
        """Actions (n, …) that declare probabilities (n, A) of the answers.

        Raises ActionError for what is no distribution: nothing is normalised. Parts below e^-24 of the largest are
        declared as that.
        """
        probability = torch.as_tensor(probability)
        if probability.dim() != 2 or probability.shape[1] != len(self.answers):
            raise ActionError(
                f"A declaration must give one probability for each of {', '.join(self.answers)}: shape "
                f"(n, {len(self.answers)}); given {tuple(probability.shape)}."
            )
        total = probability.sum(1)
        if not bool(((probability >= 0.0).all(1) & ((total - 1.0).abs() <= _SUM_TOLERANCE)).all()):
            worst = int(
                torch.where((probability >= 0.0).all(1), (total - 1.0).abs(), torch.inf).nan_to_num(9e9).argmax()
            )
            given = [round(part, 6) for part in probability[worst].tolist()]
            raise ActionError(f"A declaration must be a distribution, not negative and with the sum 1; given {given}.")
        action = self._of_kind(torch.full((len(probability),), len(self.kinds) - 1, device=probability.device))
        ratio = (probability / probability.amax(1, keepdim=True)).clamp(min=math.exp(-2.0 * LOG_RANGE))
        action[:, -len(self.answers) :] = (1.0 + ratio.log() / LOG_RANGE).clamp(-1.0, 1.0).to(action.dtype)
        return action

    def designs(self) -> Tensor:
        """All combinations of the axes' grids, (E, D), the last axis fastest."""
        return torch.cartesian_prod(*(axis.grid() for axis in self.axes)).reshape(-1, len(self.axes))

    def seconds(self, design: Tensor, moved: Tensor, before: Tensor) -> Tensor:
        """Time of experiments (…, D) after others (…, D), at another site where `moved` (…) is 1."""
        experiment = self.experiment
        total = torch.full(design.shape[:-1], experiment.measure_s, device=design.device)
        for i, axis in enumerate(self.axes):
            if axis.does in ("Pulse.time_s", "Wait.time_s"):
                total = total + design[..., i]
            elif settle_s := experiment.settle_s.get(axis.name, 0.0):
                total = total + settle_s * self.changed(axis, design[..., i], before[..., i])
        return total + moved * (experiment.sites.move_s if experiment.sites else 0.0)

    @staticmethod
    def changed(axis: Axis, value: Tensor, before: Tensor) -> Tensor:
        """Whether a control has to be set anew, as a number."""
        return ((value - before).abs() > 1e-5 * value.abs()).to(value.dtype)

    # Observations

    def measurement(self, history: History) -> Tensor:
        """Rows of numbers (B, T, F) of measurements."""
        coordinate = [axis.coordinate(history.design[..., i].double()).float() for i, axis in enumerate(self.axes)]
        numbers = (
            torch.ones_like(history.value),
            *coordinate,
            history.site / max(1, self.sites - 1),
            (history.value / self.laws.full_scale).clamp(-VALUE_LIMIT, VALUE_LIMIT),
            (history.noise_factor.double().log() / NOISE_LIMIT).float(),
            history.fresh.float(),
            history.calibrated.float(),
        )
        return torch.stack(numbers, dim=-1) * history.done.unsqueeze(-1)

    def history(self, measurements: Tensor) -> History:
        """What the numbers (B, T, F) of an observation say."""
        axes = len(self.axes)
        done, coordinate, site, value, noise, fresh, calibrated = measurements.split((1, axes, 1, 1, 1, 1, 1), dim=-1)
        return History(
            done=done[..., 0] > 0.5,
            design=self._design(coordinate),
            site=(site[..., 0] * max(1, self.sites - 1)).round().long(),
            value=value[..., 0] * self.laws.full_scale,
            noise_factor=torch.exp(NOISE_LIMIT * noise[..., 0]),
            fresh=fresh[..., 0] > 0.5,
            calibrated=calibrated[..., 0] > 0.5,
        )

    def present_numbers(self, present: Present) -> Tensor:
        """The numbers (B, P) of how things stand, budget aside."""
        coordinate = [axis.coordinate(present.design[:, i].double()).float() for i, axis in enumerate(self.axes)]
        return torch.cat(
            (
                (present.noise_factor.double().log() / NOISE_LIMIT).clamp(0.0, 1.0).float().unsqueeze(1),
                (present.site / max(1, self.sites - 1)).unsqueeze(1),
                present.fresh.float(),
                present.calibrated.float(),
                torch.stack(coordinate, dim=1),
            ),
            dim=1,
        )

    def present(self, numbers: Tensor, budget: Tensor) -> Present:
        """What the numbers (B, P) and the budget (B, 3) of an observation say."""
        noise, site, fresh, calibrated, coordinate = numbers.split(
            (1, 1, self.sites, self.sites, len(self.axes)), dim=1
        )
        return Present(
            noise_factor=torch.exp(NOISE_LIMIT * noise[:, 0]),
            site=(site[:, 0] * max(1, self.sites - 1)).round().long(),
            fresh=fresh > 0.5,
            calibrated=calibrated > 0.5,
            design=self._design(coordinate),
            left=budget,
        )

    def _design(self, coordinate: Tensor) -> Tensor:
        return torch.stack([axis.value(coordinate[..., i]) for i, axis in enumerate(self.axes)], dim=-1)

    def _of_kind(self, kind: Tensor) -> Tensor:
        action = torch.zeros(len(kind), self.action_size, device=kind.device)
        action[:, : len(self.kinds)] = -1.0
        return action.scatter_(1, kind.unsqueeze(1), 1.0)

    def _site(self, number: Tensor) -> Tensor:
        return (0.5 * (number + 1.0) * self.sites).long().clamp(0, self.sites - 1)

    def _site_number(self, site: Tensor) -> Tensor:
        return 2.0 * (site + 0.5) / self.sites - 1.0


def greys(contrast: Tensor) -> Tensor:
    """A picture in uint8 of one in contrast, 0 outside a domain and 1 inside."""
    return ((_INSIDE - _OUTSIDE) * contrast + _OUTSIDE).round().clamp(0.0, 255.0).to(torch.uint8)


def contrast(image: Tensor) -> Tensor:
    """The contrast of a picture in uint8."""
    return (image.float() - _OUTSIDE) / (_INSIDE - _OUTSIDE)


def protocol_of(task: Mapping[str, Any]) -> Protocol:
    """The protocol of a task that is described as plain data, as agents get it. Raises ConfigError for another task."""
    if "experiment" not in task:
        raise ConfigError("The task has no section 'experiment'; it asks for no choice between laws.")
    return Protocol(parse(Experiment, task["experiment"], "task.experiment"))
