"""Planner: the optimum for one atom by exact dynamic programming; assignment and free paths for several.

It knows the law of jumps, as far as its settings tell it. For one atom it does in every step what leaves the least
expected time to the goal (agents/engine/values.py): the agent to report regret against, where dwells have a fixed
length and a frame follows each; it makes no use of a rule that stops a dwell, nor of drift. For several it gives every
atom a goal so that the expected times add up to least, and leads the followed one round the others, site by site.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from agents.engine.fabrication import Scene, Workplace, workplace_of
from agents.engine.honeycomb import BONDS_ANG
from agents.engine.jump_laws import TOY, JumpLaw, SpotLaw
from agents.engine.values import Menu, Plan, places_around, places_on_bonds, solve
from agents.policy import Array, Face, Observation, Policy
from stem_gym.core.config import Config

# Flux of a 60 keV, 34 mrad, 40 pA probe with a source of 0.7 Å at a carbon atom, times the exchange cross section of
# 0.124 barn, smeared by an aim that is 0.15 Å off on each axis.
AT_60_KEV = SpotLaw(peak_per_s=0.214, width_ang=0.968, power=3.13)
# Ids whose rates are published as another law.
LAWS: dict[str, JumpLaw] = {
    "stem_gym/BeamFabrication-lorentzian-v0": TOY,
    "stem_gym/BeamFabrication-lorentzian-slow-v0": TOY,
}
_NEVER_S = 1e6  # cost of what is not to be chosen
_TAKEN_S = 1e5


class Settings(Config):
    """What can be chosen."""

    law: JumpLaw | None = None
    """law of the jumps; null: the one published for the id, else that of silicon at 60 keV and 40 pA"""
    overhead_s: float = Field(0.05, ge=0, le=60)
    """what a frame costs beside its exposure"""
    place_step_ang: float = Field(0.071, gt=0.02, le=1)
    """distance between the circles of beam places that are weighed"""
    place_angles: int = Field(36, ge=6, le=360, multiple_of=3)
    """beam places on each circle"""
    dwells: int = Field(8, ge=1, le=32)
    """dwells that are weighed, evenly in their logarithm, where the task leaves a choice"""


class Planner(Policy):
    """Looks up, in the own frame of the followed atom, where to put the beam and for how long."""

    name = "planner"
    Settings = Settings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        self.place = workplace_of(face, self.name)
        law = settings.law or LAWS.get(face.id, AT_60_KEV)
        self.plan: Plan = solve(law, menu_of(self.place, settings), self.place.radius_ang)

    def reset(self, rows: Sequence[int] | Array, seeds: Sequence[int] | None = None) -> None:
        """Nothing is remembered."""

    def act(self, observation: Observation) -> Array:
        scene, plan = self.place.scene(observation), self.plan
        next_place = scene.goal_ang if self.place.dopants == 1 else self._waypoint(scene)
        site = plan.lattice.index(next_place)
        works = scene.known & (site > 0)
        off, short_s = self.place.look_again(scene)
        beam = np.where(works[:, None], plan.beam_ang[site], off)
        return self.place.action(scene, beam, np.where(works, plan.dwell_s[site], short_s))

    def expected_s(self, observation: Observation) -> Array:
        """Expected seconds (B,) from here to the goal for one atom, as long as the law and the perception hold."""
        return self.plan.seconds[self.plan.lattice.index(self.place.scene(observation).goal_ang)]

    def _waypoint(self, scene: Scene) -> Array:
        """Where the followed atom goes next, (B, 2) Å: the first site of a shortest free path to its goal."""
        lattice, rows = self.plan.lattice, np.arange(len(scene.angle))
        followed = np.linalg.norm(scene.atoms_ang, axis=2).argmin(axis=1)
        goal = assignment(self._costs(scene))[rows, followed]
        site = lattice.index(scene.goals_ang[rows, goal])
        blocked = np.zeros((len(rows), len(lattice.sites_ang)), dtype=bool)
        others = np.arange(scene.atoms_ang.shape[1]) != followed[:, None]
        blocked[np.nonzero(others)[0], lattice.index(scene.atoms_ang)[others]] = True
        beside = lattice.neighbours[0]  # (3,)
        hops = lattice.hops(site, blocked)[:, beside] + np.where(blocked[:, beside], np.inf, 0.0)
        left = np.linalg.norm(scene.goals_ang[rows, goal][:, None] - BONDS_ANG, axis=-1)
        best = (np.where(np.isfinite(hops), hops, _NEVER_S) + 1e-3 * left).argmin(axis=1)
        return np.where((site > 0)[:, None], BONDS_ANG[best], 0.0)

    def _costs(self, scene: Scene) -> Array:
        """Expected seconds (B, D, D) of bringing atom i to goal j, alone; goals that are taken stay with their atom."""
        plan = self.plan
        sign = plan.lattice.sign[plan.lattice.index(scene.atoms_ang)]  # (B, D) sublattice as the followed one sees it
        away = sign[:, :, None, None] * (scene.goals_ang[:, None] - scene.atoms_ang[:, :, None])
        cost = plan.seconds[plan.lattice.index(away)]
        taken = scene.taken
        bound = taken.any(axis=2, keepdims=True) | taken.any(axis=1, keepdims=True)
        return np.where(taken, 0.0, np.where(bound, cost + _TAKEN_S, cost))


def assignment(cost: Array) -> Array:
    """The goal (B, D) of each atom that makes the sum of costs (B, D atoms, D goals) least, by trying every order."""
    orders = _orders(cost.shape[1])  # (P, D)
    total = cost[:, np.arange(cost.shape[1]), orders].sum(axis=2)  # (B, P)
    found: Array = orders[total.argmin(axis=1)]
    return found


@functools.lru_cache(maxsize=8)
def _orders(count: int) -> Array:
    return np.array(list(itertools.permutations(range(count))))


def menu_of(place: Workplace, settings: Settings) -> Menu:
    """What the task lets an agent do in a step."""
    late = 1.5 / place.trace if place.stops else None  # half a sample until the jump's own ends, and the next one
    step_s = place.frame_s + settings.overhead_s
    if place.dwells_s:
        return Menu(places_on_bonds(place.aim_bonds), place.dwells_s, step_s, late)
    places = places_around(settings.place_step_ang, place.reach_ang, settings.place_angles)
    count = settings.dwells if place.dwell_min_s < place.dwell_max_s else 1
    dwells = np.geomspace(place.dwell_min_s, place.dwell_max_s, count) if count > 1 else [place.dwell_max_s]
    return Menu(places, tuple(float(dwell) for dwell in dwells), step_s, late)


POLICY = Planner
