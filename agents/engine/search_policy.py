"""What all agents that search a field do in the same way: first places at random, then a belief, a score, a choice.

A subclass says what it believes (`predict`). It is asked anew at every step and reads values from the observation's
maps alone, so that what is wanted may change in mid-episode. A person may forbid and pin cells, change the acquisition
function and let the last belief be decided on again (`decide`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from agents.engine.acquisition import Acquisition, Belief, choose, suited_to
from agents.engine.decision import Decision
from agents.engine.search_field import Scene, search_field_of
from agents.policy import Array, Face, Observation, Policy
from agents.uniform import own_seed
from stem_gym.core.config import Config
from stem_gym.core.errors import PolicyError
from stem_gym.core.streams import Streams, row_seeds


class SearchSettings(Config):
    """What can be chosen of every searching agent."""

    seed: int = Field(0, ge=0)
    """the agent's own draws; the same seed in the same worlds gives the same actions"""
    first_places: int = Field(10, ge=2)
    """places drawn at random before anything is believed"""
    acquisition: Acquisition | None = None
    """how a belief becomes a choice; the one that suits the task's mode if absent"""
    exposure_share: float = Field(0.5, ge=0, le=1)
    """where on the logarithmic way from the shortest to the longest exposure; the nearest offered one is taken"""


class SearchPolicy(Policy):
    """First places, belief, choice."""

    Settings = SearchSettings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        self.field = search_field_of(face, self.name)
        self.streams = Streams(row_seeds(settings.seed, face.rows))
        self.acquisition: Acquisition = settings.acquisition or suited_to(self.field.mode, self.field.level_share)
        self.forbidden = torch.zeros(face.rows, self.field.cells, dtype=torch.bool)  # never to be measured
        self.pinned = torch.zeros_like(self.forbidden)  # to be measured before all others
        self._scene: Scene | None = None
        self._belief: Belief | None = None
        self._decision: Decision | None = None

    def reset(self, rows: Sequence[int] | Array, seeds: Sequence[int] | None = None) -> None:
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        if seeds is not None:
            self.streams.seed(index, [own_seed(self.settings.seed, world) for world in seeds])
        self.streams.next_episode(index)
        self.forbidden[index] = False
        self.pinned[index] = False
        self._scene = self._belief = self._decision = None
        self.forget(index)

    def act(self, observation: Observation) -> Array:
        self._scene = self.field.scene(observation)
        self.notice(self._scene)
        believing = (~self.seeding(self._scene)).nonzero()[:, 0]
        self._belief = self.predict(self._scene.of(believing), believing) if len(believing) else None
        return self.decide()

    def decide(self) -> Array:
        """Actions (B, …) from the last belief, the acquisition function and the masks as they are now."""
        if self._scene is None:
            raise PolicyError("There is nothing to decide yet: call act() with an observation first.")
        seeding = self.seeding(self._scene)
        score = self._scores(seeding)
        cells = choose(score, ~self._scene.measured, self.forbidden, self.pinned)
        self._decision = self._explained(score, cells, seeding)
        return self.field.action(cells, self.settings.exposure_share)

    def explain(self) -> Decision | None:
        """The last decision; None before the first one of an episode."""
        return self._decision

    @abstractmethod
    def predict(self, scene: Scene, rows: Tensor) -> Belief:
        """What is believed of the fields `rows` (n,), whose observations `scene` holds."""

    def seeding(self, scene: Scene) -> Tensor:
        """Which rows (B,) still take places at random."""
        return scene.measured.sum(dim=1) < self.settings.first_places

    def notice(self, scene: Scene) -> None:
        """Take in what all rows show, also those that believe nothing yet."""

    def forget(self, rows: Tensor) -> None:
        """Forget the episodes of `rows` (n,)."""

    def _scores(self, seeding: Tensor) -> Tensor:
        """(B, C); random numbers where a row still takes its first places."""
        score = torch.zeros(seeding.shape[0], self.field.cells, dtype=torch.float64)
        draws = (seeding | self.acquisition.draws).nonzero()[:, 0]
        if len(draws):
            score[draws] = self.streams.normal(draws, (self.field.cells,)).double()
        if self._belief is not None:
            normal = score[~seeding] if self.acquisition.draws else None
            score[~seeding] = self.acquisition.score(self._belief, normal).double()
        return score

    def _explained(self, score: Tensor, cells: Tensor, seeding: Tensor) -> Decision:
        belief, shape = self._belief, (len(cells), self.field.height, self.field.width)

        def told(part: Tensor | None) -> Array:
            """A part of the belief for all rows."""
            whole = torch.full((len(cells), *(part.shape[1:] if part is not None else score.shape[1:])), torch.nan)
            if part is not None:
                whole[~seeding] = part.float()
            return np.asarray(whole.numpy())

        return Decision(
            mean=told(None if belief is None else belief.mean).reshape(shape),
            deviation=told(None if belief is None else belief.measured_deviation()).reshape(shape),
            acquisition=score.float().numpy().reshape(shape),
            embedding=None if belief is None or belief.embedding is None else told(belief.embedding),
            chosen=cells.numpy(),
            seeding=seeding.numpy(),
        )
