"""Uniform: every action drawn evenly from the action space; the floor that any other agent must beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from pydantic import Field

from agents.policy import Array, Face, Observation, Policy
from stem_gym.core.config import Config
from stem_gym.core.errors import PolicyError
from stem_gym.core.streams import Streams, row_seeds


class Settings(Config):
    """What can be chosen."""

    seed: int = Field(0, ge=0)
    """the agent's own draws; the same seed in the same worlds gives the same actions"""


class Uniform(Policy):
    """Draws from a bounded Box, or from the numbers of a Discrete or MultiDiscrete space."""

    name = "uniform"
    Settings = Settings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        space = face.action_space
        if isinstance(space, spaces.Discrete):
            self._low = np.asarray(space.start, dtype=space.dtype)
            self._high = self._low + space.n
        elif isinstance(space, spaces.MultiDiscrete):
            self._low = np.asarray(space.start, dtype=space.dtype)
            self._high = self._low + space.nvec
        elif isinstance(space, spaces.Box) and space.is_bounded():
            self._low, self._high = space.low, space.high
        else:
            raise PolicyError(
                f"The agent 'uniform' needs a bounded Box, Discrete or MultiDiscrete actions; {face.id} has {space}."
            )
        self._streams = Streams(row_seeds(settings.seed, face.rows))

    def reset(self, rows: Sequence[int] | Array, seeds: Sequence[int] | None = None) -> None:
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        if seeds is not None:
            self._streams.seed(index, [own_seed(self.settings.seed, world) for world in seeds])
        self._streams.next_episode(index)

    def act(self, observation: Observation) -> Array:
        share = self._streams.uniform(torch.arange(self.face.rows), self._low.shape).numpy()
        drawn = self._low + share * (self._high - self._low)
        if isinstance(self.face.action_space, spaces.Discrete | spaces.MultiDiscrete):
            drawn = np.minimum(np.floor(drawn), self._high - 1)  # a share that rounds to 1 is the last number
        return np.asarray(drawn, dtype=self._low.dtype)


def own_seed(seed: int, world: int) -> int:
    """A seed of the agent's own in the world `world`, unrelated to the world's numbers."""
    words: Any = np.random.SeedSequence([seed, world]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


POLICY = Uniform
