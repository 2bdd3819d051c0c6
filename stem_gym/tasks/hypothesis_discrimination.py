"""Hypothesis discrimination: choose the experiments that tell competing laws apart, and declare what you believe.

This file is longer than 400 lines because a task is one file: its settings, its state, its manual and its rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from gymnasium import spaces
from pydantic import Field
from torch import Tensor

from stem_gym.core.batch import add, changed, every_row, put, rows_where, take
from stem_gym.core.config import Config, first_difference
from stem_gym.core.errors import ConfigError
from stem_gym.core.experiments import (
    NOISE_LIMIT,
    PICTURE_FOV_NM,
    PICTURE_PIXELS,
    VALUE_LIMIT,
    Experiment,
    History,
    Present,
    Protocol,
    greys,
)
from stem_gym.core.hypotheses import Prior
from stem_gym.core.instructions import (
    Acquire,
    Instruction,
    Park,
    Pulse,
    Read,
    Reading,
    Scan,
    Set,
    Wait,
    full_frames,
)
from stem_gym.core.instrument import Capabilities
from stem_gym.core.task import Marks, Needs, Observation, Score, Task
from stem_gym.core.units import ANG_PER_NM

NOISE_FACTOR = "noise_factor"
BELIEF = "belief"  # detector that tells what a referee believes
_CONFIDENT = 0.95  # of a claim that is counted as confident
_COLUMNS = 64  # pixels of the picture of an episode
_SHORTEST_PULSE_S = 1e-3
PHASE = "phase"  # detector that pictures a domain


class HypothesisDiscriminationConfig(Config):
    """Settings of the task; what they mean to the agent is in the docstring of HypothesisDiscrimination."""

    kind: Literal["hypothesis_discrimination"] = "hypothesis_discrimination"
    """this task"""
    experiment: Experiment
    """laws, noise, sites and costs, as the agent may know them; the same section as the instrument's"""
    experiments: int = Field(ge=1, le=512)
    """most experiments of an episode"""
    horizon_s: float = Field(gt=0)
    """microscope time in which `cost_weight` is lost"""
    cost_weight: float = Field(0.5, ge=0)
    """reward lost over the horizon"""
    log_weight: float = Field(0.1, ge=0)
    """weight of the logarithmic score beside the quadratic one; it hits confident wrong claims harder"""


@dataclass(frozen=True)
class State:
    """One episode a row: what was decided, what was seen, then the judge's book."""

    kind: Tensor  # (B,) int64 of the last action
    asked: Tensor  # (B, D) values of the axes that it asked for
    at: Tensor  # (B,) int64 site that it asked for
    probability: Tensor  # (B, A) that it declared
    measurements: Tensor  # (B, T, F) as observed
    count: Tensor  # (B,) int64 measurements
    design: Tensor  # (B, D) values of the axes in the last experiment
    site: Tensor  # (B,) int64
    fresh: Tensor  # (B, K) bool
    calibrated: Tensor  # (B, K) bool
    untuned_s: Tensor  # (B,)
    seconds: Tensor  # (B,)
    enabled: Tensor  # (B,) int64 enabling actions
    declared: Tensor  # (B,) bool
    image: Tensor  # (B, 1, H, W) uint8 last picture; (B, 0) where there are none
    belief: Tensor  # (B, A) of a referee, where the instrument has one


class HypothesisDiscrimination(Task[State]):
    """Find out which of some laws a sample obeys, or that it obeys none of them, and say how sure you are.

    ## Action: `Box(-1, 1, (n,))`

    | numbers | meaning |
    |---|---|
    | one for each kind | the largest is done: an experiment, an enabling action in their order, a declaration |
    | one for each axis | the experiment, from the least to the largest value; of some values, each has an equal share |
    | one, where there are several sites | the site of the experiment |
    | one for each answer | its logit in units of 12: what is declared are their softmax; the last is "none of these" |

    `stem_gym.core.experiments.Protocol` makes actions of experiments and of probabilities, and refuses what is none.

    ## Observation: `Dict`

    | key | meaning |
    |---|---|
    | `measurements` (T, F) | a row for each measurement, oldest first, zeros where there is none yet; see below |
    | `present` (P,) | how things stand; see below |
    | `budget` (3,) | what is left of steps, seconds and electrons |
    | `image` (1, 64, 64) | uint8, on instruments that picture domains: the last one, 64 outside and 192 inside |
    | `belief` (A,) | where the instrument has a referee: how probable it holds each answer, after all measurements |

    Where domains are pictured, the values of `measurements` are 0: the agent measures the pictures, 2 µm wide.
    A measurement: 1; the coordinates of its axes, −1 to 1; site / (sites − 1); value / `full_scale` of the law set;
    ln(noise factor) / 6; whether its site was fresh; whether it was calibrated. How things stand: ln(noise factor) / 6
    now; site / (sites − 1); which sites are fresh; which are calibrated; the coordinates of the axes.

    A site is fresh when nothing was done there. Without sites every experiment has a fresh one, at no cost. What the
    laws are, with priors, noise and costs, is the public description of the task (`stem-gym show ID`).

    ## Reward

    At a declaration p: 2 p(true) − Σ p² + `log_weight` · ln p(true), less what equal probabilities would earn: a sum of
    two proper scores (Brier, Mon. Weather Rev. 78, 1, 1950; Good, J. R. Stat. Soc. B 14, 107, 1952), so that it pays to
    declare what is believed. An episode that ends without a declaration earns 0 for it. Every step loses
    `cost_weight` · seconds / `horizon_s`. Each term is in `info`. Without truth, a declaration earns what its own
    probabilities let expect.

    `info` has `success` (the true answer has the largest share and more than one half), `claim` (the largest share),
    `confident` (it is 0.95 or more), `confident_wrong`, `log_score`, `brier`, and `score_with_costs`: whether the claim
    was right, less 0.5 · seconds / `horizon_s`. `true_answer` is the lesson for learners, in simulation alone.

    ## Start and end

    Nothing was measured. The episode ends with a declaration, with the budget, and undeclared with an experiment for
    which `measurements` has no place left.

    Version 0: first release.
    """

    Config = HypothesisDiscriminationConfig

    def __init__(self, config: HypothesisDiscriminationConfig) -> None:
        self.config: HypothesisDiscriminationConfig = config
        config.experiment.check()
        self.protocol = protocol = Protocol(config.experiment)
        self._answers = len(protocol.answers)
        self._growth_s = config.experiment.noise.growth_s
        self._quantity = protocol.laws.quantity
        self._believes = False  # whether a referee is asked
        self._set_axes = [i for i, axis in enumerate(protocol.axes) if axis.does == "Set"]
        self._column = {axis.does: i for i, axis in enumerate(protocol.axes) if axis.does != "Set"}
        self._controls = [float(axis.grid()[0]) for axis in protocol.axes]
        verbs = {"Park", "Acquire", "Read"} | {axis.does.partition(".")[0] for axis in protocol.axes}
        controls = {axis.name for axis in protocol.axes if axis.does == "Set"} | config.experiment.enabling.keys()
        self.needs = Needs(
            frozenset(verbs | ({"Set"} if controls else set())),
            frozenset({self._quantity}),
            controls=frozenset(controls),
        )
        self._pictures = False  # whether sizes are shown instead of told
        limit = max(VALUE_LIMIT, 1.0)
        self.action_space = spaces.Box(-1.0, 1.0, (protocol.action_size,), np.float32)
        self.observation_space = spaces.Dict(
            {
                "measurements": spaces.Box(-limit, limit, (config.experiments, protocol.measurement_size), np.float32),
                "present": spaces.Box(-1.0, 1.0, (protocol.present_size,), np.float32),
            }
        )

    def fitted(self, capabilities: Capabilities) -> HypothesisDiscrimination:
        """The task as the instrument shows it: with pictures instead of sizes, or with the belief of a referee.

        Raises ConfigError where the instrument does other experiments than the task describes.
        """
        own, other = self.config.experiment.model_dump(mode="json"), capabilities.told.get("experiment")
        if other is not None and (where := first_difference(own, other)):
            key, here, there = where
            raise ConfigError(
                f"experiment.{key} is {here!r} for the task and {there!r} for the instrument. Change both, "
                f"task.experiment.{key} and instrument.experiment.{key}; to see what a wrong description costs, set "
                "instrument.misdescribed."
            )
        fitted, has = HypothesisDiscrimination(self.config), capabilities.detectors
        spare: dict[str, spaces.Box] = {}
        fitted._pictures, fitted._believes = PHASE in has, BELIEF in has
        if fitted._pictures:
            verbs = (self.needs.verbs - {"Acquire"}) | {"Scan"}
            fitted.needs = Needs(verbs, frozenset({PHASE}), controls=self.needs.controls)
            spare["image"] = spaces.Box(0, 255, (1, PICTURE_PIXELS, PICTURE_PIXELS), np.uint8)
        if fitted._believes:
            fitted.needs = replace(fitted.needs, detectors=fitted.needs.detectors | {BELIEF})
            spare["belief"] = spaces.Box(0.0, 1.0, (self._answers,), np.float32)
        fitted.observation_space = spaces.Dict({**self.observation_space.spaces, **spare})
        return fitted

    def particulars(self) -> Mapping[str, str]:
        """The numbers of an action in their order, the quantity, and the laws with their priors."""
        protocol, laws = self.protocol, self.protocol.laws
        names = [f"kind {kind}" for kind in protocol.kinds] + [f"axis {axis.name}" for axis in protocol.axes]
        names += [f"site, of {protocol.sites}"] * (protocol.sites > 1) + [f"logit {name}" for name in protocol.answers]
        found = {"action": ", ".join(f"{number}: {name}" for number, name in enumerate(names))}
        for axis in protocol.axes:
            low, high = axis.ends()
            some = ", ".join(f"{value:g}" for value in axis.values)
            found[f"axis {axis.name}"] = f"one of {some}" if some else f"{low:g} to {high:g}" + ", log" * axis.log
        found["quantity"] = f"{laws.quantity}, shown in units of {laws.full_scale:g}"
        for name, spec in laws.laws.items():
            priors = [f"{parameter} {_prior_text(prior)}" for parameter, prior in spec.priors.items()]
            found[f"law {name}"] = "; ".join([*([spec.summary] if spec.summary else []), *priors])
        return found

    def start(self, rows: int, device: torch.device) -> State:
        """Nothing measured, nothing declared."""
        config, protocol = self.config, self.protocol
        whole, number = torch.zeros(rows, dtype=torch.int64, device=device), torch.zeros(rows, device=device)
        controls = torch.tensor(self._controls, device=device).expand(rows, -1)
        sites = torch.ones(rows, protocol.sites, dtype=torch.bool, device=device)
        shape = (rows, 1, PICTURE_PIXELS, PICTURE_PIXELS) if self._pictures else (rows, 0)
        even = torch.full((rows, self._answers), 1.0 / self._answers, device=device)
        return State(
            kind=whole,
            asked=controls,
            at=whole,
            probability=even,
            measurements=torch.zeros(rows, config.experiments, protocol.measurement_size, device=device),
            count=whole,
            design=controls,
            site=whole,
            fresh=sites,
            calibrated=~sites,
            untuned_s=number,
            seconds=number,
            enabled=whole,
            declared=torch.zeros(rows, dtype=torch.bool, device=device),
            image=torch.zeros(shape, dtype=torch.uint8, device=device),
            belief=even,
        )

    def opening(self, state: State, rows: Tensor) -> Sequence[Instruction]:
        """How much the noise has grown since the last tuning, and what is believed before any measurement."""
        return [Read(rows, NOISE_FACTOR), *self._advice(rows)]

    def closes(self, action: Tensor) -> Tensor:
        """Declarations do."""
        return action[:, : len(self.protocol.kinds)].argmax(1) == len(self.protocol.kinds) - 1

    def decided(self, state: State, action: Tensor, rows: Tensor) -> State:
        """Keep what was asked for and what was declared."""
        wish = self.protocol.wish(take(action, rows))
        declared = wish.kind == len(self.protocol.kinds) - 1
        nothing = torch.full_like(wish.probability, 1.0 / self._answers)
        probability = torch.where(declared.unsqueeze(1), wish.probability, nothing)
        return changed(
            state,
            kind=put(state.kind, rows, wish.kind),
            asked=put(state.asked, rows, wish.design),
            at=put(state.at, rows, wish.site),
            probability=put(state.probability, rows, probability),
            declared=put(state.declared, rows, declared),
        )

    def plan(self, state: State, action: Tensor, rows: Tensor) -> Sequence[Instruction]:
        """Experiments for some rows, routines for others, nothing for those that declare."""
        kind = take(state.kind, rows)
        instructions: list[Instruction] = []
        some = rows_where(kind == 0)
        if len(some):
            instructions += self._experiment(state, take(rows, some))
        for number, name in enumerate(self.config.experiment.enabling, start=1):
            some = rows_where(kind == number)
            if len(some):
                instructions.append(Set(take(rows, some), name, torch.ones(len(some), device=rows.device)))
        return instructions

    def observe(self, state: State, readings: Sequence[Reading]) -> tuple[State, Observation]:
        """What was measured, and how things stand."""
        seconds, untuned_s = state.seconds, state.untuned_s
        changes: dict[str, Tensor] = {}
        for reading in readings:
            if BELIEF in reading.data:
                changes["belief"] = put(state.belief, reading.rows, reading.data[BELIEF])
            elif reading.verb in ("Acquire", "Scan"):
                changes |= self._see(state, reading)
            elif reading.verb == "Read" and self._growth_s is not None:
                untuned_s = put(
                    untuned_s, reading.rows, (self._growth_s * reading.data["value"].double().log()).float()
                )
            seconds = add(seconds, reading.rows, reading.seconds)
            untuned_s = add(untuned_s, reading.rows, reading.seconds)
        state = changed(state, seconds=seconds, untuned_s=untuned_s, **changes)
        if self.config.experiment.enabling:
            state = self._after_routines(state, readings)
        present = Present(
            self._noise_factor(state.untuned_s), state.site, state.fresh, state.calibrated, state.design, state.seconds
        )
        seen = {"measurements": state.measurements, "present": self.protocol.present_numbers(present)}
        if self._pictures:
            seen["image"] = state.image
        if self._believes:
            seen["belief"] = state.belief
        return state, seen

    def score(self, state: State, readings: Sequence[Reading], truth: Mapping[str, Tensor]) -> tuple[State, Score]:
        """Reward, end and metrics, from truth where there is some and from the declaration's own odds where not."""
        config, probability = self.config, state.probability
        declares = state.declared.float()
        probability = probability.double()  # logarithms in single precision differ with the number of rows
        claim, claimed = probability.max(1)
        if truth:
            answer = truth["answer"]
            true = probability.gather(1, answer.unsqueeze(1)).squeeze(1)
            earned, right = self._earned(true, probability), claimed == answer
        else:
            true = claim
            earned = (probability * self._earned(probability, probability.unsqueeze(1))).sum(1)
            right = torch.ones_like(state.declared)
        spent = torch.zeros_like(state.seconds)
        for reading in readings:
            spent = add(spent, reading.rows, reading.seconds)
        reward_claim, reward_time = (declares * earned).float(), -config.cost_weight * spent / config.horizon_s
        confident = state.declared & (claim >= _CONFIDENT)
        claim_right = (state.declared & right).float()
        metrics = {
            "reward_claim": reward_claim,
            "reward_time": reward_time,
            "success": claim_right * (claim > 0.5),
            "declared": declares,
            "claim": declares * claim.float(),
            "claim_right": claim_right,
            "confident": confident.float(),
            "confident_wrong": (confident & ~right).float(),
            "probability_of_truth": true.float(),
            "log_score": true.clamp(min=1e-38).log().float(),
            "brier": (probability.square().sum(1) - 2.0 * true + 1.0).float(),
            "score_with_costs": claim_right - 0.5 * state.seconds / config.horizon_s,
            "experiments": state.count.float(),
            "enabling": state.enabled.float(),
        }
        if truth:
            metrics["true_answer"] = truth["answer"].float()
        full = (state.kind == 0) & (state.count > config.experiments)
        return state, Score(reward_claim + reward_time, state.declared | full, metrics)

    def marks(self, state: State, truth: Mapping[str, Tensor]) -> Marks:
        """Measured values over the first axis, as a plot of dots; brighter ones are newer."""
        rows, device = len(state.count), state.count.device
        if self._pictures:
            return self._pictured(state)
        picture = torch.zeros(rows, _COLUMNS, _COLUMNS, device=device)
        places = state.measurements.shape[1]
        there = state.measurements[..., 0] > 0.0
        x = ((0.5 + 0.5 * state.measurements[..., 1]) * (_COLUMNS - 1)).round().long().clamp(0, _COLUMNS - 1)
        value = state.measurements[..., 2 + len(self.protocol.axes)]
        least = torch.where(there, value, torch.inf).amin(1, keepdim=True)
        span = (torch.where(there, value, -torch.inf).amax(1, keepdim=True) - least).clamp(min=1e-6)
        height = ((value - least) / span).nan_to_num(0.0, 0.0, 0.0).clamp(0.0, 1.0)
        y = ((1.0 - height) * (_COLUMNS - 1)).round().long()
        newness = 0.4 + 0.6 * (torch.arange(places, device=device) + 1.0) / state.count.clamp(min=1).unsqueeze(1)
        index = every_row(rows, torch.device("cpu")).to(device).unsqueeze(1).expand(-1, places)
        picture[index[there], y[there], x[there]] = newness.clamp(max=1.0)[there]
        nothing = torch.full((rows, 1, 2), torch.nan, device=device)
        whole = torch.tensor([0.0, 0.0, 1.0, 1.0], device=device).expand(rows, -1)
        return Marks(torch.full((rows, 2), 0.5, device=device), nothing, nothing, picture, whole)

    def _pictured(self, state: State) -> Marks:
        rows, device = len(state.count), state.count.device
        middle, nothing = torch.full((rows, 2), 0.5, device=device), torch.full((rows, 1, 2), torch.nan, device=device)
        return Marks(middle, nothing, nothing, state.image[:, 0].float() / 255.0, full_frames(rows, device))

    def _experiment(self, state: State, rows: Tensor) -> list[Instruction]:
        """Go to the site, set what has to be set, pulse or wait, and measure."""
        design, before = take(state.asked, rows), take(state.design, rows)
        half = torch.full((len(rows),), 0.5, device=rows.device)
        sites = self.protocol.sites
        where = (take(state.at, rows) + 0.5) / sites if sites > 1 else half
        instructions: list[Instruction] = [Park(rows, where, half)]
        for i in self._set_axes:
            axis = self.protocol.axes[i]
            some = rows_where(self.protocol.changed(axis, design[:, i], before[:, i]) > 0.0)
            if len(some):
                instructions.append(Set(take(rows, some), axis.name, take(design[:, i].contiguous(), some)))
        if (bias := self._column.get("Pulse.bias_v")) is not None:
            length = self._column.get("Pulse.time_s")
            time_s = torch.full_like(half, _SHORTEST_PULSE_S) if length is None else design[:, length]
            instructions.append(Pulse(rows, design[:, bias], time_s))
        if (wait := self._column.get("Wait.time_s")) is not None:
            instructions.append(Wait(rows, design[:, wait]))
        exposure_s = torch.full_like(half, self.config.experiment.measure_s)
        if not self._pictures:
            return [*instructions, Acquire(rows, self._quantity, exposure_s), *self._advice(rows)]
        shape, region = (PICTURE_PIXELS, PICTURE_PIXELS), full_frames(len(rows), rows.device)
        fov_ang = torch.full_like(half, ANG_PER_NM * PICTURE_FOV_NM)
        return [*instructions, Scan(rows, fov_ang, shape, exposure_s / PICTURE_PIXELS**2, region, (PHASE,))]

    def _advice(self, rows: Tensor) -> list[Instruction]:
        """Ask the referee, if there is one; it takes no time of the microscope."""
        return [Acquire(rows, BELIEF, torch.zeros(len(rows), device=rows.device))] if self._believes else []

    def _see(self, state: State, reading: Reading) -> dict[str, Tensor]:
        """What a measurement changes in the state."""
        rows, protocol = reading.rows, self.protocol
        design, site, count = (take(part, rows) for part in (state.asked, state.at, state.count))
        fresh, calibrated = take(state.fresh, rows), take(state.calibrated, rows)
        here = site.unsqueeze(1)
        was_fresh = fresh.gather(1, here).squeeze(1)
        single = History(
            done=torch.ones_like(was_fresh).unsqueeze(1),
            design=design.unsqueeze(1),
            site=site.unsqueeze(1),
            value=self._told(reading).unsqueeze(1),
            noise_factor=reading.calibration[NOISE_FACTOR].clamp(1.0, math.exp(NOISE_LIMIT)).unsqueeze(1),
            fresh=was_fresh.unsqueeze(1),
            calibrated=calibrated.gather(1, here),
        )
        numbers = protocol.measurement(single)  # (n, 1, F)
        known = take(state.measurements, rows)
        slot = count.clamp(max=known.shape[1] - 1)
        room = (count < known.shape[1])[:, None, None]
        index = slot[:, None, None].expand(-1, 1, known.shape[2])
        known = known.scatter(1, index, torch.where(room, numbers, known.gather(1, index)))
        remembers = self.config.experiment.sites is not None
        changes = {
            "measurements": put(state.measurements, rows, known),
            "count": put(state.count, rows, count + 1),
            "design": put(state.design, rows, design),
            "site": put(state.site, rows, site),
        }
        if self._pictures:
            changes["image"] = put(state.image, rows, greys(reading.data["images"]))
        if remembers:
            changes["fresh"] = put(state.fresh, rows, fresh.scatter(1, here, torch.zeros_like(calibrated[:, :1])))
        return changes

    def _told(self, reading: Reading) -> Tensor:
        """The measured value (n,); 0 where a picture shows it."""
        return torch.zeros_like(reading.seconds) if self._pictures else reading.data[self._quantity]

    def _after_routines(self, state: State, readings: Sequence[Reading]) -> State:
        """Sites and tuning after the enabling actions that readings tell of."""
        for reading in readings:
            name = next((name for name in self.config.experiment.enabling if name in reading.data), None)
            if reading.verb != "Set" or name is None:
                continue
            rows, does = reading.rows, self.config.experiment.enabling[name].does
            changes = {"enabled": add(state.enabled, rows, torch.ones_like(rows))}
            here = torch.nn.functional.one_hot(take(state.site, rows), self.protocol.sites).bool()
            if does == "tune":
                changes["untuned_s"] = put(state.untuned_s, rows, torch.zeros_like(reading.seconds))
            elif does == "erase":
                changes["fresh"] = put(state.fresh, rows, take(state.fresh, rows) | here)
            else:
                changes["calibrated"] = put(state.calibrated, rows, take(state.calibrated, rows) | here)
            state = changed(state, **changes)
        return state

    def _noise_factor(self, untuned_s: Tensor) -> Tensor:
        if self._growth_s is None:
            return torch.ones_like(untuned_s)
        return torch.exp(untuned_s.double() / self._growth_s).clamp(1.0, math.exp(NOISE_LIMIT)).float()

    def _earned(self, true: Tensor, probability: Tensor) -> Tensor:
        """What a declaration earns; `true` (…) is its share of the true answer, of probabilities (…, A)."""
        even = 1.0 / self._answers
        weight = self.config.log_weight
        quadratic = 2.0 * true - probability.square().sum(-1)
        return quadratic - even + weight * (true.clamp(min=1e-38).log() - math.log(even))


def _prior_text(prior: Prior) -> str:
    """A prior in words."""
    values = [f"{name} {value:g}" for name, value in prior.model_dump(exclude={"kind"}).items()]
    return " ".join([prior.kind, *values])
