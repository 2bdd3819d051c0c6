"""Episodes of a vector env row by row, in one form for every autoreset mode, so that they can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import Space
from gymnasium.vector import AutoresetMode, VectorEnv

from stem_gym.core.errors import ConformanceError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Event:
    """What one row lived through: a reset (action −1) or its so-many-th action."""

    action: int
    observation: Any
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False


Tape = list[Event]


class Actions:
    """The actions of each row: its k-th one depends on the row's name alone, not on its neighbours."""

    def __init__(self, space: Space[Any], names: Sequence[int]) -> None:
        self._space, self._names = space, names
        self._made: dict[tuple[int, int], Any] = {}

    def of(self, row: int, number: int) -> Any:
        """Action `number` of row `row`."""
        key = (self._names[row], number)
        if key not in self._made:
            self._space.seed(1000 * key[0] + number)
            self._made[key] = self._space.sample()
        return self._made[key]

    def stack(self, numbers: Sequence[int]) -> Array:
        """The actions (B, …) of all rows."""
        return np.stack([np.asarray(self.of(row, number)) for row, number in enumerate(numbers)])


def mode_of(env: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    """The autoreset mode that an env states in its metadata. Raises ConformanceError where it states none."""
    stated = env.metadata.get("autoreset_mode")
    if not isinstance(stated, AutoresetMode) or getattr(env, "autoreset_mode", stated) is not stated:
        raise ConformanceError(
            "A vector env states its autoreset mode",
            f"metadata['autoreset_mode'] = {stated!r}, .autoreset_mode = {getattr(env, 'autoreset_mode', None)!r}",
            "one AutoresetMode in both",
        )
    return stated


def play(env: VectorEnv[Any, Any, Any], actions: Actions, events: int) -> list[Tape]:
    """At least `events` events of each row, from where the env stands; the first is the reset that was just done."""
    mode = mode_of(env)
    players = {
        AutoresetMode.SAME_STEP: _after_same_step,
        AutoresetMode.NEXT_STEP: _after_next_step,
        AutoresetMode.DISABLED: _after_disabled,
    }
    tapes: list[Tape] = [[] for _ in range(env.num_envs)]
    numbers = [0] * env.num_envs
    over = np.zeros(env.num_envs, dtype=bool)
    while min(len(tape) for tape in tapes) < events:
        observation, reward, terminated, truncated, info = env.step(actions.stack(numbers))
        for row in range(env.num_envs):
            if mode is AutoresetMode.NEXT_STEP and over[row]:
                _check_skipped(row, reward, terminated, truncated)
                tapes[row].append(Event(-1, row_of(observation, row)))
                continue
            ends = bool(terminated[row]), bool(truncated[row])
            tapes[row].append(Event(numbers[row], row_of(observation, row), float(reward[row]), *ends))
            numbers[row] += 1
        was_over = over & (mode is AutoresetMode.NEXT_STEP)
        over = (as_array(terminated) | as_array(truncated)) & ~was_over
        players[mode](env, tapes, over, info)
    return tapes


def row_of(observation: Any, row: int) -> Any:
    """The observation of one row, as NumPy copies."""
    if isinstance(observation, Mapping):
        return {key: row_of(value, row) for key, value in observation.items()}
    if isinstance(observation, tuple):
        return tuple(row_of(value, row) for value in observation)
    return as_array(observation[row]).copy()


def as_array(value: Any) -> Array:
    """A NumPy array of an array or of a tensor on any device."""
    return np.asarray(value.detach().cpu()) if hasattr(value, "detach") else np.asarray(value)


def differs(one: Any, other: Any) -> str:
    """Where two observations differ, in words; empty where they agree to the last bit."""
    if isinstance(one, Mapping):
        if one.keys() != other.keys():
            return f"keys {sorted(one)} and {sorted(other)}"
        return next((f"{key}: {why}" for key in one if (why := differs(one[key], other[key]))), "")
    if isinstance(one, tuple):
        return next((why for a, b in zip(one, other, strict=True) if (why := differs(a, b))), "")
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{one.shape} {one.dtype} and {other.shape} {other.dtype}"
    unequal = ~((one == other) | ((one != one) & (other != other)))
    if not unequal.any():
        return ""
    first = tuple(int(i[0]) for i in np.nonzero(unequal)) if one.ndim else ()
    return f"{one[first]} and {other[first]} at {first}, {int(unequal.sum())} of {one.size} numbers"


def compare(
    given: Sequence[Tape], expected: Sequence[Tape], rule: str, right: str = "the same to the last bit"
) -> None:
    """Raise ConformanceError for the first event in which two lists of tapes differ, as far as both go."""
    for row, (one, other) in enumerate(zip(given, expected, strict=False)):
        for number, (a, b) in enumerate(zip(one, other, strict=False)):
            why = differs(a.observation, b.observation)
            facts = [(event.action, event.reward, event.terminated, event.truncated) for event in (a, b)]
            if not why and facts[0] != facts[1]:
                why = f"(action, reward, terminated, truncated) = {facts[0]} and {facts[1]}"
            if why:
                raise ConformanceError(rule, f"row {row}, event {number}: {why}", right)


def _check_skipped(row: int, reward: Any, terminated: Any, truncated: Any) -> None:
    facts = float(reward[row]), bool(terminated[row]), bool(truncated[row])
    if facts != (0.0, False, False):
        raise ConformanceError(
            "With NEXT_STEP, the step after an end only resets the row",
            f"row {row}: reward, terminated, truncated = {facts}",
            "(0.0, False, False)",
        )


def _after_same_step(env: Any, tapes: list[Tape], over: Array, info: Mapping[str, Any]) -> None:
    """The step gave the first observation of the next episode; the last one of the old is in `final_obs`."""
    for row in np.flatnonzero(over).tolist():
        final = info.get("final_obs")
        mask = info.get("_final_obs")
        if final is None or mask is None or not np.array_equal(as_array(mask), over):
            raise ConformanceError(
                "With SAME_STEP, info holds final_obs and the mask _final_obs for the rows that ended",
                f"final_obs {'absent' if final is None else 'present'}, mask {mask}, ended {over}",
                "both, the mask true where a row ended",
            )
        last = row_of(final, row) if isinstance(final, Mapping) else final[row]
        event = tapes[row][-1]
        tapes[row][-1] = Event(event.action, last, event.reward, event.terminated, event.truncated)
        tapes[row].append(Event(-1, event.observation))


def _after_next_step(env: Any, tapes: list[Tape], over: Array, info: Mapping[str, Any]) -> None:
    """The next step resets; `play` sees to it."""


def _after_disabled(env: Any, tapes: list[Tape], over: Array, info: Mapping[str, Any]) -> None:
    """The caller resets the rows that ended; the others must not notice."""
    if not over.any():
        return
    observation, _ = env.reset(options={"reset_mask": over.copy()})
    for row in range(env.num_envs):
        here = row_of(observation, row)
        if over[row]:
            tapes[row].append(Event(-1, here))
        elif why := differs(here, tapes[row][-1].observation):
            raise ConformanceError(
                "A masked reset leaves the other rows alone", f"row {row}: {why}", "their observations as they were"
            )
