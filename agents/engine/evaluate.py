"""Episodes of a policy in numbered worlds: one dict per episode, the same worlds for every policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode

from agents.policy import Array, Policy, Transition, as_array
from stem_gym.core.errors import CapabilityError, PolicyError

Progress = Callable[[int, int], None]


def evaluate(
    policy: Policy,
    id: str,
    episodes: int,
    seed: int,
    env: gymnasium.vector.VectorEnv | None = None,
    progress: Progress | None = None,
    finished: dict[int, dict[str, Any]] | None = None,
    **overrides: Any,
) -> list[dict[str, Any]]:
    """One dict per episode: success, return, seconds, electrons, measurements, thinking_s and the task's metrics.

    Episode k is the world `row_seeds(seed, episodes)[k]`, whatever the policy and the number of rows; a row
    that has finished starts the next episode at once. `env` is a vector env of `policy.face.rows` rows with autoreset
    DISABLED (made from `id` and `overrides` where absent). `progress(done, episodes)` is called when episodes end.
    `finished` is filled as they end, by the number of the episode: what is left to whoever catches a KeyboardInterrupt.
    """
    from stem_gym.core.streams import row_seeds

    if policy.face.id != id:
        raise PolicyError(f"The policy {policy.name!r} was made for {policy.face.id}; it was asked to run on {id}.")
    own = env is None
    venv = make_env(id, policy.face.rows, **overrides) if env is None else env
    check_mode(venv)
    try:
        return _Run(policy, venv, row_seeds(seed, episodes), progress, {} if finished is None else finished).finish()
    finally:
        if own:
            venv.close()


def make_env(id: str, rows: int, **overrides: Any) -> gymnasium.vector.VectorEnv:
    """A vector env that leaves resets to the caller."""
    return gymnasium.make_vec(id, num_envs=rows, autoreset_mode=AutoresetMode.DISABLED, **overrides)


def check_mode(venv: gymnasium.vector.VectorEnv) -> None:
    """Raises CapabilityError for a vector env that starts episodes by itself."""
    mode = venv.metadata.get("autoreset_mode")
    if mode not in (AutoresetMode.DISABLED, "Disabled"):
        raise CapabilityError(
            f"Evaluation starts every episode with its own seed, so the vector env must have autoreset DISABLED; "
            f"it has {mode}."
        )


class _Run:
    """Rows that work off a queue of episodes."""

    def __init__(
        self,
        policy: Policy,
        venv: gymnasium.vector.VectorEnv,
        seeds: list[int],
        progress: Progress | None,
        finished: dict[int, dict[str, Any]],
    ) -> None:
        self._policy, self._venv, self._seeds, self._progress = policy, venv, seeds, progress
        rows = venv.num_envs
        self._episode = np.full(rows, -1)  # which episode a row plays; −1: none
        self._next = 0
        self._return = np.zeros(rows)
        self._steps = np.zeros(rows, dtype=np.int64)
        self._thinking_s = np.zeros(rows)
        self._finished = finished

    def finish(self) -> list[dict[str, Any]]:
        observation = self._start(np.ones(self._venv.num_envs, dtype=bool))
        while (self._episode >= 0).any():
            action = self._think(observation)
            before = observation
            observation, reward, terminated, truncated, info = self._venv.step(action)
            reward, terminated, truncated = as_array(reward), as_array(terminated), as_array(truncated)
            self._policy.update(Transition(before, action, reward, terminated, truncated, info))
            playing = self._episode >= 0
            self._return += reward
            self._steps += 1
            over = terminated | truncated  # rows that play on uncounted end as well, and must be reset
            if over.any():
                self._note(np.flatnonzero(over & playing), info)
                observation = self._start(over, observation)
        return [self._finished[episode] for episode in sorted(self._finished)]

    def _think(self, observation: Any) -> Array:
        started = time.perf_counter()
        action = self._policy.act(observation)
        spent = time.perf_counter() - started
        playing = self._episode >= 0
        self._thinking_s += np.where(playing, spent / max(1, int(playing.sum())), 0.0)
        return action

    def _start(self, over: Array, observation: Any = None) -> Any:
        """The next episodes for the rows that are over; a row without one plays on, uncounted, while others play."""
        free = np.flatnonzero(over)
        begin = free[: len(self._seeds) - self._next]
        self._episode[free] = -1
        self._episode[begin] = np.arange(self._next, self._next + len(begin))
        self._next += len(begin)
        if not (self._episode >= 0).any():
            return observation
        for counter in (self._return, self._steps, self._thinking_s):
            counter[over] = 0
        seeds = [self._seeds[max(0, episode)] for episode in self._episode]
        venv: Any = self._venv  # Gymnasium's own signature knows no seeds row by row
        fresh, _ = venv.reset(seed=seeds, options=None if observation is None else {"reset_mask": over})
        self._policy.reset(free, [seeds[row] for row in free])
        return fresh

    def _note(self, rows: Array, info: Mapping[str, Any]) -> None:
        metrics = numbers_of(info)
        for row in rows:
            result = {name: values[row].item() for name, values in metrics.items()}
            result["return"] = float(self._return[row])
            result["thinking_s"] = float(self._thinking_s[row])
            result.setdefault("measurements", int(self._steps[row]))
            self._finished[int(self._episode[row])] = result
        if self._progress is not None and len(rows):
            self._progress(len(self._finished), len(self._seeds))


def numbers_of(info: Mapping[str, Any]) -> dict[str, Array]:
    """The entries of a vector info that are one number per row."""
    arrays = {
        key: as_array(value) for key, value in info.items() if not key.startswith("_") and hasattr(value, "shape")
    }
    return {key: value for key, value in arrays.items() if value.ndim == 1 and value.dtype.kind in "biuf"}
