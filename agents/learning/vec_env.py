"""A Gymnasium `VectorEnv` as Stable-Baselines3 wants to see it, with the timeout bootstrap of all rows at once.

Stable-Baselines3 adds γ V(last observation) to the reward of a truncated row one row at a time; here it is one batched
call, and its own loop finds nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from agents.learning.extra import VecEnv
from agents.policy import Array, as_array
from stem_gym.core.errors import CapabilityError

ValueOf = Callable[[Any], Array]


class VectorAdapter(VecEnv):
    """Rows of a VectorEnv with SAME_STEP autoreset. Where rows can be truncated, `value_of` and `gamma` are needed."""

    def __init__(self, env: VectorEnv, value_of: ValueOf | None = None, gamma: float = 1.0) -> None:
        if env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise CapabilityError(
                "Stable-Baselines3 needs a vector env with autoreset SAME_STEP; "
                f"given {env.metadata.get('autoreset_mode')}."
            )
        self.env, self.value_of, self.gamma = env, value_of, gamma
        self._actions: Any = None
        self._return = np.zeros(env.num_envs)
        self._length = np.zeros(env.num_envs, dtype=np.int64)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> Any:
        """All rows, from the seed given by `seed()` where there was one."""
        seed = self._seeds[0]
        self._reset_seeds()
        self._return[:], self._length[:] = 0.0, 0
        observation, _ = self.env.reset(seed=seed)
        return _arrays(observation)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """One seed for the whole batch; the env derives its rows' own from it."""
        self._seeds = [seed] * self.num_envs
        return self._seeds

    def step_async(self, actions: Array) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Any, Array, Array, list[dict[str, Any]]]:
        observation, reward, terminated, truncated, info = self.env.step(self._actions)
        rewards = as_array(reward).astype(np.float32)
        ended, cut = as_array(terminated).astype(bool), as_array(truncated).astype(bool)
        done = ended | cut
        self._return += rewards
        self._length += 1
        infos: list[dict[str, Any]] = [{}] * self.num_envs  # one shared empty dict: nobody writes to it
        if done.any():
            final = _arrays(info["final_obs"])
            rewards = rewards + self._bootstrap(final, cut & ~ended)
            for row in np.flatnonzero(done):
                infos[row] = self._episode(int(row), final, info.get("final_info", {}))
            self._return[done], self._length[done] = 0.0, 0
        return _arrays(observation), rewards, done, infos

    def _bootstrap(self, final: Any, cut: Array) -> Array:
        """γ V of the last observation for rows that were truncated, 0 for the others: one call for all rows."""
        if not cut.any():
            return np.zeros(self.num_envs, dtype=np.float32)
        if self.value_of is None:
            raise CapabilityError("Rows were truncated, but the adapter has no value_of to bootstrap them with.")
        values = np.asarray(self.value_of(final), dtype=np.float32).reshape(self.num_envs)
        return np.where(cut, self.gamma * values, 0.0).astype(np.float32)

    def _episode(self, row: int, final: Any, info: Mapping[str, Any]) -> dict[str, Any]:
        """What Stable-Baselines3 and our callbacks read about an ended episode."""
        metrics = {
            key: as_array(value)[row].item()
            for key, value in info.items()
            if not key.startswith("_") and getattr(value, "ndim", 0) == 1
        }
        last = {key: value[row] for key, value in final.items()} if isinstance(final, dict) else final[row]
        episode = {"r": float(self._return[row]), "l": int(self._length[row]), "t": 0.0}
        return {"episode": episode, "metrics": metrics, "terminal_observation": last} | (
            {"is_success": bool(metrics["success"])} if "success" in metrics else {}
        )

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env, attr_name)] * len(self._rows(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise CapabilityError(
            "The rows of a batch are not objects of their own: attributes can not be set on some of them."
        )

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise CapabilityError(
            "The rows of a batch are not objects of their own: methods can not be called on some of them."
        )

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        return [False] * len(self._rows(indices))

    def _rows(self, indices: Any) -> list[int]:
        if indices is None:
            return list(range(self.num_envs))
        return [indices] if isinstance(indices, int) else list(indices)


def _arrays(observation: Any) -> Any:
    if isinstance(observation, Mapping):
        return {key: as_array(value) for key, value in observation.items()}
    return as_array(observation)
