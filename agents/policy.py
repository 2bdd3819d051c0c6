"""The contract of every agent: observations of B rows in, actions of B rows out.

A policy sees Gymnasium observations and the public description of its task, nothing else. What it remembers of an
episode belongs to a row; `reset(rows, seeds)` forgets it. It draws random numbers from streams of its own, one per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import gymnasium
import numpy as np
from numpy.typing import NDArray

from stem_gym.core.config import Config, config_hash

Array: TypeAlias = NDArray[Any]
Observation: TypeAlias = Mapping[str, Any]  # arrays or tensors (B, …)


@dataclass(frozen=True)
class Face:
    """What a policy may know of its environment: id, spaces of one row, rows, and the task's public description."""

    id: str
    rows: int
    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]
    task: Mapping[str, Any] = field(default_factory=dict)

    @property
    def task_hash(self) -> str:
        """Twelve digits that change with any value of the task; the same on every instrument behind the id."""
        return config_hash(dict(self.task))


@dataclass(frozen=True)
class Transition:
    """One step of B rows, for policies that learn while they run."""

    observation: Observation
    action: Array  # (B, …)
    reward: Array  # (B,)
    terminated: Array  # (B,) bool
    truncated: Array  # (B,) bool
    info: Mapping[str, Any]


def face_of(env: Any) -> Face:
    """The face of a `gymnasium.Env` (one row) or a `gymnasium.vector.VectorEnv`."""
    if isinstance(env, Face):
        return env
    base = env.unwrapped
    spec = getattr(env, "spec", None) or getattr(base, "spec", None)
    vector = isinstance(base, gymnasium.vector.VectorEnv)
    return Face(
        id=spec.id if spec is not None else type(base).__name__,
        rows=env.num_envs if vector else 1,
        observation_space=env.single_observation_space if vector else env.observation_space,
        action_space=env.single_action_space if vector else env.action_space,
        task=dict(getattr(base, "task_config", None) or {}),
    )


class Policy(ABC):
    """An agent for one environment. Build it with `agents.make`, so that settings are checked.

    `act` answers float32 actions (B, *action shape) inside the action space, without a Python loop over rows.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[Config]] = Config

    def __init__(self, face: Face, settings: Any) -> None:
        self.face = face
        self.settings = settings

    @abstractmethod
    def reset(self, rows: Sequence[int] | Array, seeds: Sequence[int] | None = None) -> None:
        """Forget the episodes of `rows` (n,). With the worlds' `seeds` (n,), own draws depend on the world alone."""

    @abstractmethod
    def act(self, observation: Observation) -> Array:
        """Actions (B, …) for observations (B, …)."""

    def update(self, transition: Transition) -> None:  # noqa: B027 – most policies do not learn while they run
        """Take in what an action led to."""

    def arrays(self) -> dict[str, Array]:
        """What was learned, by name."""
        return {}

    def set_arrays(self, arrays: Mapping[str, Array]) -> None:
        """Put back what `arrays` gave. Raises PolicyError for other names or shapes."""
        from agents.engine.storage import check_arrays

        check_arrays(arrays, self.arrays())

    def save(self, path: str | Path, training: Mapping[str, Any] | None = None) -> Path:
        """Write the folder `path`: arrays as safetensors, and the JSON contract. `training` tells how it came about."""
        from agents.engine.storage import save_policy

        return save_policy(self, Path(path), training or {})

    @classmethod
    def load(cls, path: str | Path, env: Any) -> Policy:
        """The policy saved in the folder `path`, for `env`. Raises PolicyError where it was made for another one."""
        from agents.engine.roster import load

        policy = load(path, env)
        return policy


def as_array(value: Any) -> Array:
    """A NumPy array of an array or a tensor on any device."""
    return np.asarray(value.detach().cpu()) if hasattr(value, "detach") else np.asarray(value)
