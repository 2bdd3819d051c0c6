"""Greedy with feedback: as greedy, but with long dwells that end on the live dark-field signal, as operators end them.

It needs a task whose dwells stop by a rule. Where the task lets frames out it spares most of them: the signal rises
several times over when the atom jumps under the beam, so after a rise the atom is taken to be at the neighbour that was
aimed at, and the next dwell goes on from there without a look, as far as the beam reaches. A frame is taken when the
next place is out of reach, when the atom is thought to be at its goal, and when the last frame is too old to be
trusted; then the shortest dwell, beside everything, brings it. What the frame shows replaces what was thought.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from agents.engine.fabrication import Scene, workplace_of
from agents.engine.honeycomb import BOND_ANG, turned
from agents.greedy import check_offset, towards
from agents.policy import Array, Face, Observation, Policy, as_array
from stem_gym.core.config import Config
from stem_gym.core.errors import PolicyError

_AGE_S = 10.0  # the observation's unit of a frame's age
_HERE_ANG = 0.5 * BOND_ANG  # nearer than this is the same site


class Settings(Config):
    """What can be chosen."""

    offset_ang: float = Field(1.42, gt=0, le=10)
    """distance of the beam from the followed atom, towards the chosen neighbour"""
    dwell_s: float = Field(4.0, gt=0)
    """longest dwell; the nearest one that the task allows is taken"""
    rise: float = Field(0.5, gt=0)
    """relative rise of the signal within a dwell that means: the atom jumped to where the beam is"""
    trust_s: float = Field(7.0, ge=0)
    """a frame is taken at the latest when the last one is so old"""
    short_ang: float = Field(0.3, ge=0)
    """how far the reach may keep the beam from its place after a jump that no frame has shown; beyond, a frame"""
    blind_jumps: int = Field(1, ge=0)
    """jumps that are taken for granted before a frame; 0: look after each"""


class GreedyFeedback(Policy):
    """One jump ahead; it remembers where the atom has gone since the last frame."""

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
        self._most_blind = 0 if self.place.dwells_s else settings.blind_jumps  # named neighbours are those last seen
        self._moved_ang = np.zeros((face.rows, 2))  # since the last frame, in the frame's directions
        self._aimed_ang = np.zeros((face.rows, 2))  # bond that the last dwell was for; 0, 0 for none
        self._jumps = np.zeros(face.rows, dtype=np.int64)  # since the last frame

    def reset(self, rows: Sequence[int] | Array, seeds: Sequence[int] | None = None) -> None:
        index = np.asarray(rows, dtype=np.int64)
        for memory in (self._moved_ang, self._aimed_ang, self._jumps):
            memory[index] = 0

    def act(self, observation: Observation) -> Array:
        settings, place = self.settings, self.place
        seen = place.scene(observation)
        age_s = _AGE_S * as_array(observation["frame"])[:, 0]
        self._take_trace(as_array(observation["trace"])[:, 0] > settings.rise, age_s > 0.0)
        scene, moved_ang = self._thought(seen)
        step_ang = towards(scene, place.radius_ang)
        beam = moved_ang + settings.offset_ang * step_ang
        blind = self._jumps > 0
        there = np.linalg.norm(scene.goal_ang, axis=1) < _HERE_ANG
        beyond = (self._jumps > self._most_blind) | (place.short_ang(scene, beam) > settings.short_ang)
        works = scene.known & ~(blind & (there | beyond))
        off, short_s = place.look_again(seen)
        dwell = np.where(works, self._dwell_s, short_s)
        frame = ~works | (age_s + dwell >= settings.trust_s)
        self._aimed_ang = np.where(works[:, None], turned(BOND_ANG * step_ang, scene.angle), 0.0)
        away = turned(off, seen.angle - scene.angle)
        return place.action(scene, np.where(works[:, None], beam, away), dwell, frame)

    def _take_trace(self, rose: Array, unseen: Array) -> None:
        """Book the jump that a rise tells of, or forget what was thought where a frame has shown the atom."""
        jumped = rose & unseen & self._aimed_ang.any(axis=1)
        self._jumps = np.where(unseen, self._jumps + jumped, 0)
        self._moved_ang = np.where(unseen[:, None], self._moved_ang + jumped[:, None] * self._aimed_ang, 0.0)

    def _thought(self, seen: Scene) -> tuple[Scene, Array]:
        """The scene about the place where the atom is thought to be, and that place (B, 2) from where it was seen.

        After an odd number of jumps its bonds point the other way, so its own frame is turned by half a turn.
        """
        odd = (self._jumps % 2).astype(np.float64)
        angle = seen.angle + np.pi * odd
        sign, moved_ang = (1.0 - 2.0 * odd)[:, None], turned(self._moved_ang, -angle)
        other = np.linalg.norm(seen.atoms_ang, axis=2, keepdims=True) > _HERE_ANG
        atoms, goals = (sign[:, None] * places - moved_ang[:, None] for places in (seen.atoms_ang, seen.goals_ang))
        scene = replace(
            seen,
            angle=angle,
            goal_ang=sign * seen.goal_ang - moved_ang,
            atoms_ang=np.where(other, atoms, 0.0),
            goals_ang=goals,
        )
        return scene, moved_ang


POLICY = GreedyFeedback
