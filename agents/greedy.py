"""Greedy: beam beside the neighbour that is fewest jumps from the goal, one fixed dwell, a frame after each.

The plainest thing that works at a microscope. It looks one jump ahead, dwells as long as it was told, and does not
watch the signal meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from agents.engine.fabrication import Scene, workplace_of
from agents.engine.honeycomb import BONDS_ANG, honeycomb, hops_from_atom
from agents.policy import Array, Face, Observation, Policy
from stem_gym.core.config import Config
from stem_gym.core.errors import PolicyError

_BLOCKED_HOPS = 1e3  # a neighbour that can not be changed places with counts as so far away


class Settings(Config):
    """What can be chosen."""

    offset_ang: float = Field(1.42, gt=0, le=10)
    """distance of the beam from the followed atom, towards the chosen neighbour"""
    dwell_s: float = Field(4.0, gt=0)
    """dwell; the nearest one that the task allows is taken"""


class Greedy(Policy):
    """One jump ahead; nothing is remembered between steps."""

    name = "greedy"
    Settings = Settings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        self.place = workplace_of(face, self.name)
        check_offset(self.name, settings.offset_ang, self.place.reach_ang)
        self._dwell_s = self.place.clipped_s(settings.dwell_s)

    def reset(self, rows: Sequence[int] | Array, seeds: Sequence[int] | None = None) -> None:
        """Nothing is remembered."""

    def act(self, observation: Observation) -> Array:
        scene = self.place.scene(observation)
        beam = self.settings.offset_ang * towards(scene, self.place.radius_ang)
        off, short_s = self.place.look_again(scene)
        dwell = np.where(scene.known, self._dwell_s, short_s)
        return self.place.action(scene, np.where(scene.known[:, None], beam, off), dwell)


def towards(scene: Scene, radius_ang: float) -> Array:
    """Unit vectors (B, 2), in the atom's own frame, to the free neighbour with the fewest jumps left to the goal.

    Equal numbers of jumps are told apart by the distance that is left.
    """
    left = scene.goal_ang[:, None] - BONDS_ANG  # (B, 3, 2) from each neighbour, whose own frame is turned by 180°
    hops = hops_from_atom(radius_ang)[honeycomb(radius_ang).index(-left)]
    rank = hops + 1e-3 * np.linalg.norm(left, axis=-1) + _BLOCKED_HOPS * scene.occupied
    bond = BONDS_ANG[rank.argmin(axis=1)]
    return bond / np.linalg.norm(bond, axis=1, keepdims=True)


def check_offset(agent: str, offset_ang: float, reach_ang: float) -> None:
    """Raises PolicyError for a beam place that the task does not reach in every direction."""
    if offset_ang > reach_ang:
        raise PolicyError(
            f"The agent {agent!r} was told to put the beam {offset_ang:g} Å from the atom; the task reaches "
            f"{reach_ang:g} Å. Give an offset_ang of at most that."
        )


POLICY = Greedy
