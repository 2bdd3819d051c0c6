"""Greedy with feedback: as greedy, but with long dwells that end on the live dark-field signal, as operators end them.

It needs a task whose dwells stop by a rule. Where the task lets frames out it looks only when there is something to
see: the signal rises several times over when the atom jumps under the beam. Then the shortest dwell, beside everything,
brings the frame; a dwell that told nothing is followed by the next one, until the last frame is too old to be trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from agents.engine.fabrication import workplace_of
from agents.greedy import check_offset, towards
from agents.policy import Array, Face, Observation, Policy, as_array
from stem_gym.core.config import Config
from stem_gym.core.errors import PolicyError

_AGE_S = 10.0  # the observation's unit of a frame's age


class Settings(Config):
    """What can be chosen."""

    offset_ang: float = Field(1.42, gt=0, le=10)
    """distance of the beam from the followed atom, towards the chosen neighbour"""
    dwell_s: float = Field(4.0, gt=0)
    """longest dwell; the nearest one that the task allows is taken"""
    rise: float = Field(0.5, gt=0)
    """relative rise of the signal within a dwell that means: the atom jumped, look where it is"""
    trust_s: float = Field(7.0, ge=0)
    """a frame is taken at the latest when the last one is so old"""


class GreedyFeedback(Policy):
    """One jump ahead; nothing is remembered between steps."""

    name = "greedy_feedback"
    Settings = Settings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        self.place = workplace_of(face, self.name)
        if not self.place.stops:
            raise PolicyError(
                f"The agent {self.name!r} needs a task whose dwells stop on the signal; {face.id} has stop: null. "
                "Use 'greedy' there."
            )
        check_offset(self.name, settings.offset_ang, self.place.reach_ang)
        self._dwell_s = self.place.clipped_s(settings.dwell_s)

    def reset(self, rows: Sequence[int] | Array, seeds: Sequence[int] | None = None) -> None:
        """Nothing is remembered."""

    def act(self, observation: Observation) -> Array:
        scene = self.place.scene(observation)
        beam = self.settings.offset_ang * towards(scene, self.place.radius_ang)
        off, short_s = self.place.look_again(scene)
        age_s = _AGE_S * as_array(observation["frame"])[:, 0]
        jumped = (as_array(observation["trace"])[:, 0] > self.settings.rise) & (age_s > 0.0)
        works = scene.known & ~jumped
        dwell = np.where(works, self._dwell_s, short_s)
        frame = ~works | (age_s + dwell >= self.settings.trust_s)
        return self.place.action(scene, np.where(works[:, None], beam, off), dwell, frame)


POLICY = GreedyFeedback
