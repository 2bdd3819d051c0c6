"""A search under the eyes of a person or a script: every decision can be approved, vetoed or changed before it is done.

A hook is asked before every measurement and answers with a verdict; it is asked again until it approves. With a log,
every decision and everything that was said about it is written down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium
import numpy as np

from agents.engine.acquisition import Acquisition
from agents.engine.decision import Decision
from agents.engine.decision_log import DecisionWriter, End, Entry, decision_of_row
from agents.engine.evaluate import check_mode, numbers_of
from agents.engine.search_policy import SearchPolicy
from agents.engine.verdicts import Approve, Pin, Prefer, Verdict, Veto, Want, apply, is_acquisition
from agents.policy import Array, Observation, Policy, Transition, as_array
from stem_gym.core.errors import ActionError, CapabilityError, PolicyError, did_you_mean


@dataclass(frozen=True)
class Moment:
    """What a hook is shown: a decision that is not yet done."""

    step: int  # actions of the episode before it
    observation: Mapping[str, Array]  # of one row, (…)
    decision: Decision  # of one row, B = 1
    acquisition: Acquisition  # in force
    scalarizers: tuple[str, ...]  # what can be wanted
    wanted: str
    forbidden: Array  # (H·W,) bool
    cause: Verdict | None = None  # what was said last; None: nothing yet

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the field."""
        height, width = self.decision.mean.shape[1:]
        return height, width

    @property
    def chosen(self) -> int:
        """The cell y·W + x that would be measured."""
        return int(self.decision.chosen[0])

    @property
    def free(self) -> Array:
        """Cells (H·W,) bool that were not measured and are not forbidden."""
        return (self.observation["measured"].ravel() == 0) & ~self.forbidden


Hook: TypeAlias = Callable[[Moment], Verdict]
Watch: TypeAlias = Callable[[int, Mapping[str, Any]], None]  # steps done, info of the last one


def run_supervised(
    policy: Policy,
    env: Any,
    hook: Hook | None = None,
    log: str | Path | None = None,
    seed: int = 0,
    watch: Watch | None = None,
) -> list[dict[str, Any]]:
    """One episode of every row of `env` in the worlds of `seed`; the figures of each row.

    `env` is a `gymnasium.Env`, or a vector env with autoreset DISABLED; a hook supervises one row. `log` is the folder
    for the record. What the hook changed of the acquisition function is put back at the end. Raises PolicyError for an
    agent that explains nothing, and what `check_verdict` raises for a verdict that can not be.
    """
    if not isinstance(policy, SearchPolicy):
        raise PolicyError(
            f"The agent {policy.name!r} can not be supervised: it explains no decisions. Take one that searches a "
            "field with a belief, such as 'dkl'."
        )
    if hook is not None and policy.face.rows != 1:
        raise PolicyError(f"A hook supervises one row; the policy has {policy.face.rows}. Make it for one env.")
    before = policy.acquisition
    try:
        return _Run(policy, env, hook, log, seed, watch).finish()
    finally:
        policy.acquisition = before


def check_verdict(verdict: Any, moment: Moment) -> None:
    """Raises ActionError for a cell that can not be, CapabilityError or PolicyError for the rest; says what can be."""
    match verdict:
        case Approve():
            return
        case Veto(cells):
            free = moment.free.copy()
            if not cells:
                raise ActionError("A veto needs at least one cell.")
            for cell in cells:
                _check_cell(cell, moment)
                free[cell] = False
            if not free.any():
                raise ActionError("A veto must leave a cell that can be measured; this one would forbid the last.")
        case Pin(cell):
            _check_cell(cell, moment)
        case Prefer(acquisition):
            if not is_acquisition(acquisition):
                raise PolicyError(f"Prefer takes an acquisition function, such as Thompson(); given {acquisition!r}.")
        case Want(name):
            if name not in moment.scalarizers:
                raise ActionError(f"Unknown scalarizer {name!r}. {did_you_mean(str(name), moment.scalarizers)}")
        case _:
            raise PolicyError(f"A hook answers Approve, Veto, Pin, Prefer or Want; given {verdict!r:.80}.")


def _check_cell(cell: Any, moment: Moment) -> None:
    height, width = moment.shape
    whole = isinstance(cell, int | np.integer) and not isinstance(cell, bool)
    if not whole or not 0 <= cell < height * width:
        raise ActionError(
            f"The field has x from 0 to {width - 1} and y from 0 to {height - 1}, cells 0 to {height * width - 1}; "
            f"given cell {cell!r}."
        )
    measured = moment.observation["measured"]
    if measured.ravel()[cell]:
        y, x = divmod(int(cell), width)
        near = np.argwhere(measured == 0)
        hint = "none is left"
        if len(near):
            ny, nx = near[((near - (y, x)) ** 2).sum(axis=1).argmin()]
            hint = f"the nearest that was not is x {nx}, y {ny}"
        raise ActionError(f"The cell x {x}, y {y} was measured already; {hint}.")


class _Run:
    """One episode of every row; a row that ends before others plays on, unrecorded."""

    def __init__(
        self,
        policy: SearchPolicy,
        env: Any,
        hook: Hook | None,
        log: str | Path | None,
        seed: int,
        watch: Watch | None,
    ) -> None:
        from stem_gym.core.streams import row_seeds

        self._policy, self._env, self._hook, self._watch = policy, env, hook, watch
        self._one = not isinstance(env.unwrapped, gymnasium.vector.VectorEnv)
        if not self._one:
            check_mode(env)
        self._rows = policy.face.rows
        self._seeds = row_seeds(seed, self._rows)
        self._names = tuple(str(part["name"]) for part in policy.face.task.get("scalarizers", ()))
        self._log = None if log is None else DecisionWriter(Path(log), policy, self._seeds, hook is not None)
        self._step = 0
        self._playing = np.ones(self._rows, dtype=bool)
        self._return = np.zeros(self._rows)
        self._thinking_s = 0.0
        self._figures: list[dict[str, Any]] = [{} for _ in range(self._rows)]

    def finish(self) -> list[dict[str, Any]]:
        observation = self._reset(np.ones(self._rows, dtype=bool))
        while self._playing.any():
            action = self._think(partial(self._policy.act, observation))
            self._note(observation, action, None)
            if self._hook is not None:
                observation, action = self._ask(self._hook, observation, action)
            after, reward, over, info = self._act(observation, action)
            self._return += reward
            self._step += 1
            if self._watch is not None:
                self._watch(self._step, info)
            self._close(over & self._playing, after, info)
            self._playing &= ~over
            observation = self._reset(over) if over.any() and self._playing.any() else after
        return self._figures

    def _ask(self, hook: Hook, observation: Observation, action: Array) -> tuple[Observation, Array]:
        """Ask until the answer is yes; gives what was seen and what is to be done then."""
        cause: Verdict | None = None
        while True:
            moment = self._moment(observation, cause)
            verdict = hook(moment)
            check_verdict(verdict, moment)
            if isinstance(verdict, Approve):
                return observation, action
            if isinstance(verdict, Want):
                observation = self._tell(verdict.scalarizer)
                action = self._think(partial(self._policy.act, observation))
            else:
                apply(verdict, self._policy, row=0)
                action = self._think(self._policy.decide)
            cause = verdict
            self._note(observation, action, cause)

    def _moment(self, observation: Observation, cause: Verdict | None) -> Moment:
        seen = _of_row(observation, 0)
        wanted = self._names[int(seen["scalarizer"].argmax())] if self._names else ""
        forbidden = self._policy.forbidden[0].numpy().copy()
        decision = decision_of_row(self._explained(), 0)
        return Moment(self._step, seen, decision, self._policy.acquisition, self._names, wanted, forbidden, cause)

    def _explained(self) -> Decision:
        decision = self._policy.explain()
        if decision is None:
            raise PolicyError(f"The agent {self._policy.name!r} did not explain its last decision.")
        return decision

    def _note(self, observation: Observation, action: Array, cause: Verdict | None) -> None:
        if self._log is None:
            return
        decision, acquisition = self._explained(), self._policy.acquisition
        for row in np.flatnonzero(self._playing).tolist():
            one = decision_of_row(decision, row)
            self._log.add(row, Entry(self._step, cause, _of_row(observation, row), one, action[row], acquisition))

    def _close(self, over: Array, observation: Observation, info: Mapping[str, Any]) -> None:
        for row in np.flatnonzero(over).tolist():
            if self._one:
                told = {key: value for key, value in info.items() if isinstance(value, bool | int | float)}
            else:
                told = {key: values[row].item() for key, values in numbers_of(info).items()}
            beside = {"return": float(self._return[row]), "thinking_s": self._thinking_s / self._rows}
            self._figures[row] = {"measurements": self._step} | told | beside
            if self._log is not None:
                self._log.end(row, End(_of_row(observation, row), self._figures[row]))

    def _think(self, decide: Callable[[], Array]) -> Array:
        started = time.perf_counter()
        action = decide()
        self._thinking_s += time.perf_counter() - started
        return action

    def _reset(self, rows: Array) -> Observation:
        """New episodes; at the start of all rows, later of those that have ended."""
        if self._one:
            observation, _ = self._env.reset(seed=self._seeds[0])
        else:
            options = None if rows.all() else {"reset_mask": rows}
            observation, _ = self._env.reset(seed=self._seeds, options=options)
        index = np.flatnonzero(rows)
        self._policy.reset(index, [self._seeds[row] for row in index])
        return self._batched(observation)

    def _act(self, before: Observation, action: Array) -> tuple[Observation, Array, Array, Mapping[str, Any]]:
        observation, reward, terminated, truncated, info = self._env.step(action[0] if self._one else action)
        rewards, ends, cuts = (np.atleast_1d(as_array(part)) for part in (reward, terminated, truncated))
        after = self._batched(observation)
        self._policy.update(Transition(before, action, rewards, ends, cuts, info))
        return after, rewards, ends | cuts, info

    def _tell(self, scalarizer: str) -> Observation:
        tell = getattr(self._env.unwrapped, "tell", None)
        if tell is None:
            raise CapabilityError(f"{self._policy.face.id} can not be told to want another scalarizer in mid-episode.")
        return self._batched(tell(scalarizer=scalarizer))

    def _batched(self, observation: Observation) -> Observation:
        return {key: as_array(value)[None] for key, value in observation.items()} if self._one else observation


def _of_row(observation: Observation, row: int) -> dict[str, Array]:
    """One row of an observation, as arrays of its own."""
    return {key: as_array(value)[row].copy() for key, value in observation.items()}
