"""The only loop: one task, one instrument of B rows, one budget. The faces convert; everything happens here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from stem_gym.core.batch import add, changed, clone_rows, every_row, names_every, number, put_rows, take, take_rows
from stem_gym.core.config import Budget
from stem_gym.core.errors import ActionError, CapabilityError, ConfigError, InstructionError
from stem_gym.core.instructions import Instruction, Reading
from stem_gym.core.instrument import Instrument
from stem_gym.core.streams import Streams
from stem_gym.core.task import Marks, Observation, Score, Task

_ROUNDING = 1e-4  # an action may be outside its box by this much


@dataclass(frozen=True)
class Ledger:
    """What the rows have spent, as the instrument measured it, and what they have earned."""

    steps: Tensor  # (B,) int64
    seconds: Tensor  # (B,) float64
    electrons: Tensor  # (B,) float64
    episode_return: Tensor  # (B,) float32

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Ledger:
        """Nothing spent."""
        zero = torch.zeros(rows, device=device)
        return cls(zero.long(), zero.double(), zero.double(), zero)


@dataclass(frozen=True)
class Step:
    """What one step of the batch gave; rows that were not stepped have reward 0 and unchanged observations."""

    observation: Observation  # each (B, …)
    reward: Tensor  # (B,) float32
    terminated: Tensor  # (B,) bool
    metrics: Mapping[str, Tensor]  # each (B,)


@dataclass(frozen=True)
class Snapshot:
    """Everything that a BatchEnv needs to go on from where it was."""

    state: Any
    ledger: Ledger
    observation: Observation
    metrics: Mapping[str, Tensor]
    ended: Tensor  # (B,) bool
    streams: Tensor  # (B, 4)
    instrument: Any


class BatchEnv:
    """B episodes of a task on an instrument, side by side, each with its own clock, ledger and random stream.

    Raises CapabilityError where the instrument lacks a verb or detector that the task needs.
    """

    def __init__(self, task: Task[Any], instrument: Instrument, budget: Budget, fused: bool = False) -> None:
        check_capabilities(task, instrument)
        self.task, self.instrument, self.budget = task, instrument, budget
        self.rows, self.device = instrument.rows, instrument.device
        self._every_row = every_row(self.rows, self.device)
        self.action_space = task.action_space
        self.action_dtype = torch.from_numpy(np.zeros(0, task.action_space.dtype)).dtype
        self._low, self._high = (torch.as_tensor(end, device=self.device) for end in _bounds(task.action_space))
        self.observation_space = spaces.Dict(
            {**task.observation_space.spaces, "budget": spaces.Box(0.0, 1.0, (3,), np.float32)}
        )
        self.streams = Streams([0] * self.rows, self.device, fused)
        self.ledger = Ledger.empty(self.rows, self.device)
        each = (budget.steps, budget.seconds, budget.electrons)
        self._budget = torch.tensor(each, dtype=torch.float64, device=self.device)
        self._whole = torch.ones_like(self._budget)
        self.ended = torch.zeros(self.rows, dtype=torch.bool, device=self.device)  # rows that wait for a reset
        self.closed = False
        self._observation: Observation = {}
        self._metrics: Mapping[str, Tensor] = {}
        self._state: Any = None

    @property
    def started(self) -> bool:
        """Whether there was a first reset."""
        return self._state is not None

    @torch.inference_mode()
    def reset(
        self, rows: Tensor, seeds: Sequence[int] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Mapping[str, Tensor]]:
        """New episodes on `rows` (n,) int64, from `seeds` where given, else the next of each row's own stream.

        Gives the observation and metrics of all rows; those not named are as they were.
        """
        self._check_open()
        if seeds is not None:
            self.streams.seed(rows, seeds)
        self.streams.next_episode(rows)
        self.instrument.reset(self.streams, rows, options)
        fresh = self.task.start(len(rows), self.device)
        if self.task.chances:
            fresh = self.task.take_chance(fresh, self.streams.uniform(rows, (self.task.chances,)))
        if self._state is None:
            if len(rows) != self.rows:
                raise InstructionError(f"The first reset must start all {self.rows} rows; given {len(rows)}.")
            self._state = fresh
        else:
            self._state = put_rows(self._state, rows, fresh)
        self.ledger = put_rows(self.ledger, rows, Ledger.empty(len(rows), self.device))
        self.ended = self.ended.index_fill(0, rows, False)
        step = self._execute(self.task.opening(self._state, rows), rows, count=0)
        return step.observation, step.metrics

    @torch.inference_mode()
    def step(self, action: Tensor, rows: Tensor | None = None) -> Step:
        """One action for each of `rows` (default: all); action (B, …).

        Raises ActionError for an unusable action and for rows that have ended and were not reset.
        """
        self._check_open()
        if self._state is None:
            raise InstructionError("step() was called before reset().")
        stepped = self._every_row if rows is None else rows
        if bool(take(self.ended, stepped).any()):
            over = self.ended.nonzero().flatten().tolist()[:8]
            raise ActionError(
                f"Rows {over} have ended; call reset() before the next step of a single environment, and "
                'reset(options={"reset_mask": …}) on these rows of a batch.'
            )
        self._check_action(action, stepped)
        self._state = self.task.decided(self._state, action, stepped)
        step = self._execute(self.task.plan(self._state, action, stepped), stepped, count=1)
        self.ended = self.ended | step.terminated
        return step

    @torch.inference_mode()
    def tell(self, wishes: Mapping[str, Any]) -> Observation:
        """Let a person ask for something else in mid-episode; gives what the rows then look like.

        Raises ConfigError for a wish that the task does not know, and InstructionError before the first reset.
        """
        self._check_open()
        if self._state is None:
            raise InstructionError("tell() was called before reset().")
        self._state, self._observation = self.task.observe(self.task.tell(self._state, wishes), [])
        return {**self._observation, "budget": self._left()}

    def marks(self) -> Marks:
        """What a picture of each row shows."""
        return self.task.marks(self._state, self.instrument.truth())

    def snapshot(self) -> Snapshot:
        """The whole state, for `restore`. Raises CapabilityError where the instrument is no simulator."""
        instrument = self.instrument.snapshot()
        state, ledger = clone_rows(self._state), clone_rows(self.ledger)
        last = {name: value.clone() for name, value in self._observation.items()}
        metrics = {name: value.clone() for name, value in self._metrics.items()}
        return Snapshot(state, ledger, last, metrics, self.ended, self.streams.snapshot(), instrument)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot; the same actions then give the same episode."""
        self.streams.restore(snapshot.streams)
        self.instrument.restore(snapshot.instrument, self.streams)
        self._state, self.ledger = clone_rows(snapshot.state), clone_rows(snapshot.ledger)
        self._observation, self._metrics = dict(snapshot.observation), dict(snapshot.metrics)
        self.ended = snapshot.ended

    def close(self) -> None:
        """Let go of the instrument. Calling it twice does no harm."""
        self.closed = True
        self.instrument.close()

    def _check_open(self) -> None:
        if self.closed:
            raise InstructionError("The environment was closed; make another one.")

    def _execute(self, instructions: Sequence[Instruction], rows: Tensor, count: int) -> Step:
        readings = [self.instrument.execute(instruction) for instruction in instructions]
        self._observation, score = self._take_in(readings, rows)
        reward = score.reward if count else torch.zeros_like(score.reward)
        self.ledger = self._book(readings, rows, reward, count)
        left = self._left()
        self._metrics = score.metrics
        metrics = {
            **score.metrics,
            "measurements": self.ledger.steps,
            "seconds": self.ledger.seconds,
            "electrons": self.ledger.electrons,
            "episode_return": self.ledger.episode_return,
        }
        ended = score.terminated | (left <= number(0.0)).any(1)
        if not names_every(rows, self.rows):
            ended = ended & torch.zeros_like(ended).index_fill_(0, rows, True)
        return Step({**self._observation, "budget": left}, reward, ended, metrics)

    def _take_in(self, readings: Sequence[Reading], rows: Tensor) -> tuple[Observation, Score]:
        """What the task makes of the readings. Rows not in `rows` cost nothing: they look as before and earn 0."""
        task, truth = self.task, self.instrument.truth()
        if len(rows) == self.rows:
            state, observation = task.observe(self._state, readings)
            self._state, score = task.score(state, readings, truth)
            return observation, score
        every = every_row(len(rows), self.device)
        place = torch.zeros(self.rows, dtype=torch.int64, device=self.device).index_copy_(0, rows, every)
        some = [changed(reading, rows=every if reading.rows is rows else place[reading.rows]) for reading in readings]
        state, observation = task.observe(take_rows(self._state, rows), some)
        state, score = task.score(state, some, {name: value[rows] for name, value in truth.items()})
        self._state = put_rows(self._state, rows, state)
        zero = torch.zeros(self.rows, device=self.device)
        whole = Score(
            reward=zero.index_copy(0, rows, score.reward),
            terminated=zero.bool().index_copy(0, rows, score.terminated),
            metrics={name: self._metrics[name].index_copy(0, rows, value) for name, value in score.metrics.items()},
        )
        return {name: self._observation[name].index_copy(0, rows, value) for name, value in observation.items()}, whole

    def _book(self, readings: Sequence[Reading], rows: Tensor, reward: Tensor, count: int) -> Ledger:
        steps, seconds, electrons = self.ledger.steps, self.ledger.seconds, self.ledger.electrons
        for reading in readings:
            seconds = add(seconds, reading.rows, reading.seconds)
            electrons = add(electrons, reading.rows, reading.electrons)
        if count:
            steps = add(steps, rows, number(count, torch.int64).expand(rows.shape[0]))
        return Ledger(steps, seconds, electrons, self.ledger.episode_return + reward)

    def _left(self) -> Tensor:
        """What is left of steps, seconds and electrons, (B, 3) from 1 to 0."""
        ledger = self.ledger
        spent = torch.stack((ledger.steps.double(), ledger.seconds, ledger.electrons), dim=1)
        return torch.addcdiv(self._whole, spent, self._budget, value=-1.0).clamp_(min=0.0).float()

    def _check_action(self, action: Tensor, rows: Tensor) -> None:
        expected = (self.rows, *(self.action_space.shape or ()))
        if tuple(action.shape) != expected:
            raise ActionError(f"Actions must have shape {expected}; given {tuple(action.shape)}.")
        given = take(action, rows)
        if not torch.equal(given.clamp(self._low, self._high), given):  # unequal where it is NaN
            inside = (given >= self._low) & (given <= self._high)
            first = (~inside).nonzero()[0].tolist()
            place = tuple(first[1:]) if self._low.dim() else ()
            low, high = self._low[place].item(), self._high[place].item()
            right = f"whole numbers from {low} to {high}" if isinstance(low, int) else f"within [{low:.3g}, {high:.3g}]"
            entry = f", entry {first[1]}" if len(first) > 1 else ""
            raise ActionError(
                f"Actions must be finite and {right}; "
                f"given {given[tuple(first)].item():g} in row {int(rows[first[0]])}{entry}."
            )


def _bounds(space: spaces.Space[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest actions; finite, so that no infinity and no NaN is between them."""
    if isinstance(space, spaces.Box):
        return np.nan_to_num(space.low) - _ROUNDING, np.nan_to_num(space.high) + _ROUNDING
    if isinstance(space, spaces.Discrete):
        return np.asarray(space.start), np.asarray(space.start + space.n - 1)
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    raise ConfigError(f"An action space must be Box, Discrete or MultiDiscrete; given {space}.")


def check_capabilities(task: Task[Any], instrument: Instrument) -> None:
    """Refuse an instrument that lacks what the task needs. Raises CapabilityError that names it."""
    name, has = type(instrument).__name__, instrument.capabilities
    if verbs := sorted(task.needs.verbs - has.verbs):
        raise CapabilityError(
            f"{type(task).__name__} needs the verb(s) {', '.join(verbs)}, which {name} lacks; "
            f"it has {sorted(has.verbs)}."
        )
    if detectors := sorted(task.needs.detectors - has.detectors):
        raise CapabilityError(
            f"{type(task).__name__} needs the detector(s) {', '.join(detectors)}, which {name} lacks; "
            f"it has {sorted(has.detectors)}."
        )
    if controls := sorted(task.needs.controls - has.settable.keys()):
        raise CapabilityError(
            f"{type(task).__name__} needs to set {', '.join(controls)}, which {name} does not let it; "
            f"settable: {', '.join(sorted(has.settable)) or 'nothing'}."
        )
    if has.dopants is not None and has.dopants < task.needs.dopants:
        raise CapabilityError(
            f"{type(task).__name__} needs {task.needs.dopants} dopants in each specimen; those of {name} may have "
            f"only {has.dopants}. Ask for fewer, or raise count_min in instrument.specimen.dopants."
        )
