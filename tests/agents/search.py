"""A spectrum search to try agents on without an environment: fields of blobs, and values that follow from the image."""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium
import numpy as np
from gymnasium import spaces

from agents.policy import Face, Policy

CHANNELS = 16


def search_face(grid=(32, 32), rows=1, actions="cell", exposures_s=(0.1,), mode="optimise", measurements=60):
    """The face of a made-up spectrum-search id, as the contract of the task says."""
    height, width = grid
    cells = height * width
    if actions == "place":
        action = spaces.Box(-1.0, 1.0, (3,), np.float32)
    else:
        action = spaces.Discrete(cells) if len(exposures_s) == 1 else spaces.MultiDiscrete([cells, len(exposures_s)])
    big = np.float32(1e30)
    observation = spaces.Dict(
        {
            "image": spaces.Box(0, 255, grid, np.uint8),
            "value": spaces.Box(-big, big, grid, np.float32),
            "measured": spaces.Box(0, 1, grid, np.uint8),
            "probe": spaces.Box(0.0, 1.0, (2,), np.float32),
            "last_value": spaces.Box(-big, big, (1,), np.float32),
            "spectrum": spaces.Box(-big, big, (CHANNELS,), np.float32),
            "axis": spaces.Box(-big, big, (2,), np.float32),
            "scalarizer": spaces.Box(0.0, 1.0, (2,), np.float32),
            "budget": spaces.Box(0.0, 1.0, (3,), np.float32),
        }
    )
    task = {
        "kind": "spectrum_search",
        "grid": list(grid),
        "actions": actions,
        "exposures_s": list(exposures_s),
        "mode": mode,
        "level_share": 0.5,
        "measurements": measurements,
        "remeasure": True,
    }
    return Face("stem_gym_toys/Search-v0", rows, observation, action, task)


@dataclass
class Fields:
    """B fields (H, W) that answer like the environment; `value` (B, C) is what a measurement gives."""

    image: np.ndarray  # (B, H, W) uint8
    value: np.ndarray  # (B, C) float
    spectra: np.ndarray  # (B, C, S) float

    def __post_init__(self) -> None:
        self.rows, self.height, self.width = self.image.shape
        self.wanted = np.zeros(self.rows, dtype=np.int64)
        self.restart(np.arange(self.rows))

    def restart(self, rows) -> None:
        """Nothing measured in `rows`."""
        if not hasattr(self, "measured"):
            self.measured = np.zeros(self.value.shape, dtype=bool)
            self.last = np.zeros(self.rows, dtype=np.int64)
        self.measured[rows], self.last[rows] = False, 0

    def observe(self) -> dict[str, np.ndarray]:
        shape = (self.rows, self.height, self.width)
        at = np.arange(self.rows)
        begun = self.measured.any(axis=1)
        probe = np.stack(((self.last % self.width + 0.5) / self.width, (self.last // self.width + 0.5) / self.height))
        return {
            "image": self.image.copy(),
            "value": np.where(self.measured, self.value, 0.0).reshape(shape).astype(np.float32),
            "measured": self.measured.reshape(shape).astype(np.uint8),
            "probe": probe.T.astype(np.float32),
            "last_value": (self.value[at, self.last] * begun)[:, None].astype(np.float32),
            "spectrum": (self.spectra[at, self.last] * begun[:, None]).astype(np.float32),
            "axis": np.tile(np.array([0.0, 1.0], np.float32), (self.rows, 1)),
            "scalarizer": np.eye(2, dtype=np.float32)[self.wanted],
            "budget": np.ones((self.rows, 3), np.float32),
        }

    def measure(self, action: np.ndarray) -> np.ndarray:
        """The cells (B,) that the actions name are measured."""
        if action.ndim == 2 and action.shape[1] == 3:
            x, y = (np.clip((action[:, i] + 1) / 2, 0, 1 - 1e-6) for i in (0, 1))
            cells = np.floor(y * self.height).astype(int) * self.width + np.floor(x * self.width).astype(int)
        else:
            cells = action[:, 0] if action.ndim == 2 else action
        self.measured[np.arange(self.rows), cells] = True
        self.last = np.array(cells, dtype=np.int64)
        return self.last

    def best_share(self) -> np.ndarray:
        """Best value so far (B,), from 0 (the field's least) to 1 (its most)."""
        low, high = self.value.min(axis=1), self.value.max(axis=1)
        return (np.where(self.measured, self.value, low[:, None]).max(axis=1) - low) / (high - low)


def blobs(rows=1, grid=(32, 32), seed=0) -> Fields:
    """Fields of Gaussian blobs; the value is a bent function of height and slope, which the image shows, and of x."""
    rng = np.random.default_rng(seed)
    height, width = grid
    y, x = np.mgrid[:height, :width]
    middle = rng.uniform(0, 1, (2, rows, 10, 1, 1)) * np.array([width, height]).reshape(2, 1, 1, 1, 1)
    size, tall = rng.uniform(1.5, 4.0, (rows, 10, 1, 1)), rng.uniform(0.4, 1.0, (rows, 10, 1, 1))
    shape = (tall * np.exp(-((x - middle[0]) ** 2 + (y - middle[1]) ** 2) / (2 * size**2))).sum(axis=1)
    slope = np.hypot(*np.gradient(shape, axis=(1, 2)))
    value = 3.0 * slope * np.exp(-shape) + 0.3 * np.sin(3.0 * shape) + 0.15 * x / width
    value = (value + 0.01 * rng.standard_normal(value.shape)).reshape(rows, -1)
    image = shape + 0.02 * rng.standard_normal(shape.shape)
    low, high = (f(image, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    line = np.exp(-0.5 * ((np.arange(CHANNELS) - 5.0 - 4.0 * shape.reshape(rows, -1, 1)) / 1.5) ** 2)
    return Fields(np.round(255 * (image - low) / (high - low)).astype(np.uint8), value, 100.0 * line)


def play(policy: Policy, fields: Fields, steps: int, seeds=None) -> np.ndarray:
    """Best share after every one of `steps` measurements, (steps, B)."""
    policy.reset(np.arange(fields.rows), list(range(fields.rows)) if seeds is None else seeds)
    track = []
    for _ in range(steps):
        fields.measure(policy.act(fields.observe()))
        track.append(fields.best_share())
    return np.array(track)


class SearchEnv(gymnasium.vector.VectorEnv):
    """The fields as a vector env with autoreset DISABLED, for the rules that every policy must keep."""

    def __init__(self, face: Face, fields: Fields) -> None:
        self.num_envs, self.fields, self.task_config = face.rows, fields, dict(face.task)
        self.single_observation_space, self.single_action_space = face.observation_space, face.action_space

    @property
    def spec(self):
        return type("Spec", (), {"id": "stem_gym_toys/Search-v0"})()

    def reset(self, *, seed=None, options=None):
        self.fields.restart(np.arange(self.num_envs))
        return self.fields.observe(), {}

    def step(self, actions):
        self.fields.measure(actions)
        none = np.zeros(self.num_envs, dtype=bool)
        return self.fields.observe(), self.fields.best_share(), none, none, {}

    def close(self, **kwargs) -> None:
        """Nothing to let go of."""
