"""A small vector env to try the agents' machinery on: rows end at different times, some terminated, some truncated."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

TERMINATED_AT, TRUNCATED_AT = 3, 5  # the step that ends an episode of an even and of an odd world


class ToyVectorEnv(VectorEnv):
    """Reward is the first number of the action; worlds with even seeds terminate, odd ones are truncated."""

    def __init__(self, num_envs: int = 4, autoreset_mode: Any = AutoresetMode.SAME_STEP, size: int = 8) -> None:
        self.num_envs = num_envs
        self.render_mode = None
        self.metadata = {"autoreset_mode": AutoresetMode(autoreset_mode)}
        self.single_observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (2, size, size), np.uint8),
                "region": spaces.Box(0.0, 1.0, (4,), np.float32),
                "count": spaces.Box(0.0, 1.0, (1,), np.float32),
            }
        )
        self.single_action_space = spaces.Box(-1.0, 1.0, (5,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.world = np.arange(num_envs)
        self.step_count = np.zeros(num_envs, dtype=np.int64)

    task_config = {"kind": "toy"}  # noqa: RUF012

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        if isinstance(seed, list):
            self.world[mask] = np.asarray(seed)[mask]
        self.step_count[mask] = 0
        return self._observe(), {}

    def step(self, actions: Any) -> Any:
        self.step_count += 1
        end = np.where(self.world % 2 == 0, TERMINATED_AT, TRUNCATED_AT)
        over = self.step_count >= end
        terminated, truncated = over & (self.world % 2 == 0), over & (self.world % 2 == 1)
        reward = np.asarray(actions)[:, 0].astype(np.float64)
        info: dict[str, Any] = {"seconds": self.step_count.astype(float), "success": terminated.astype(float)}
        if self.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP and over.any():
            info["final_obs"], info["final_info"] = self._observe(), dict(info)
            self.step_count[over] = 0
        return self._observe(), reward, terminated, truncated, info

    def close(self, **kwargs: Any) -> None:
        """Nothing to let go of."""

    def _observe(self) -> dict[str, np.ndarray]:
        image = np.zeros((self.num_envs, *self.single_observation_space["image"].shape), np.uint8)
        image[:, 0] = (self.world % 256)[:, None, None]
        region = np.tile(np.array([0.0, 0.0, 1.0, 1.0], np.float32), (self.num_envs, 1))
        count = (self.step_count[:, None] / 10.0).astype(np.float32)
        return {"image": image, "region": region, "count": count}


TOY_ID = "stem_gym_toys/Toy-v0"
if TOY_ID not in gymnasium.registry:
    gymnasium.register(id=TOY_ID, entry_point="tests.agents.toys:ToyVectorEnv", vector_entry_point=ToyVectorEnv)
