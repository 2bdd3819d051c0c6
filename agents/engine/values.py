"""Expected seconds to the goal for one atom on the honeycomb, and the beam places and dwells that reach it soonest.

A stochastic shortest path (Bertsekas and Tsitsiklis, Math. Oper. Res. 16, 580, 1991) over displacements, solved by
policy iteration (Howard, Dynamic Programming and Markov Processes, 1960). A step costs its dwell and a frame. Where the
atom is after a dwell follows from the continuous-time chain of its jumps under a beam that stands still, any number of
them, by uniformisation (Jensen, Skand. Aktuarietidskr. 36, 87, 1953) to one part in 1e10.

Neglected: walks of more than PATCH_ANG within one dwell (the rim sends them back), drift, errors of perception, damage,
and what a frame does; displacements beyond the table are drawn in to its rim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix, identity
from scipy.sparse.linalg import spsolve

from agents.engine.honeycomb import BONDS_ANG, Honeycomb, honeycomb, hops_from_atom
from agents.engine.jump_laws import JumpLaw
from agents.policy import Array
from stem_gym.core.errors import ConfigError

PATCH_ANG = 8.0
_TAIL = 1e-10
_ROUNDS = 100  # policy iteration ends after about five
_HOP_COST_S = 1e4  # makes the first policy one that only wants to get nearer, so that it ends


@dataclass(frozen=True)
class Menu:
    """What can be done in a step: every beam place with every dwell. Hashable, so that solutions can be kept."""

    places_ang: tuple[tuple[float, float], ...]  # of the beam, in the atom's own frame
    dwells_s: tuple[float, ...]
    step_s: float  # cost beside the dwell: a frame and its overhead
    stop_late: float | None = None  # where the first jump ends a dwell: how late, as part of the dwell; None: no end


@dataclass(frozen=True, eq=False)
class Plan:
    """The solution over the sites (S,) of `honeycomb(radius_ang)`, as displacements to the goal."""

    lattice: Honeycomb
    seconds: Array  # (S,) expected, 0 at the goal
    beam_ang: Array  # (S, 2) best place
    dwell_s: Array  # (S,) best dwell


@functools.lru_cache(maxsize=64)
def solve(law: JumpLaw, menu: Menu, radius_ang: float) -> Plan:
    """The optimum for one atom; computed once for equal arguments.

    Raises ConfigError for a law under which the goal is hardly ever reached.
    """
    lattice = honeycomb(radius_ang)
    landing, dwelt_s = landings(law, menu)
    cost_s = dwelt_s + menu.step_s  # (A,)
    next_site = _next_sites(lattice)
    seconds, action = _HOP_COST_S * hops_from_atom(radius_ang), np.full(len(next_site), -1)
    for _ in range(_ROUNDS):
        better = (cost_s + seconds[next_site] @ landing.T).argmin(axis=1)
        if np.array_equal(better, action):
            break
        action, before = better, seconds
        seconds = _evaluate(landing[action], cost_s[action], next_site)
        if np.abs(seconds - before).max() < 1e-9:
            break
    if not (np.isfinite(seconds).all() and seconds.max() < 1e7):
        raise ConfigError(f"Under the jump law {law!r} the goal is hardly ever reached. Give larger rates.")
    place, dwell = np.divmod(action, len(menu.dwells_s))
    return Plan(lattice, seconds, np.array(menu.places_ang)[place], np.array(menu.dwells_s)[dwell])


def landings(law: JumpLaw, menu: Menu) -> tuple[Array, Array]:
    """Where the atom is after each action, (A, P) over the sites of `honeycomb(PATCH_ANG)`, and expected dwells (A,).

    Actions are places × dwells, the dwell changing fastest.
    """
    patch = honeycomb(PATCH_ANG)
    places, dwells = np.array(menu.places_ang), np.array(menu.dwells_s)
    beam = places[:, None] - patch.sites_ang  # (n, P, 2) from each site
    rates = law.rates(beam, patch.sign[:, None, None] * BONDS_ANG) * (patch.neighbours >= 0)  # (n, P, 3)
    if menu.stop_late is not None:
        rates[:, 1:] = 0.0
    leaving = rates.sum(axis=2)
    fastest = max(float(leaving.max()), 1e-12)
    into = np.take_along_axis(  # (n, P, 3) rate at which neighbour j comes here: back along the same bond
        rates.reshape(len(rates), -1), (3 * patch.neighbours + np.arange(3)).reshape(1, -1), axis=1
    ).reshape(rates.shape)
    into = np.where(patch.neighbours >= 0, into, 0.0)
    share = np.zeros(leaving.shape)
    share[:, 0] = 1.0
    found = np.zeros((len(places), len(dwells), leaving.shape[1]))
    for weight in _poisson(fastest * dwells):
        found += weight[:, None] * share[:, None]
        share = share + ((into * share[:, patch.neighbours]).sum(axis=2) - leaving * share) / fastest
    return found.reshape(-1, leaving.shape[1]), _expected_dwell(leaving[:, :1], dwells, menu.stop_late).reshape(-1)


def _expected_dwell(leaving: Array, dwells_s: Array, stop_late: float | None) -> Array:
    """(n, T) for the rates (n, 1) at which the atom leaves."""
    if stop_late is None:
        return np.broadcast_to(dwells_s, (len(leaving), len(dwells_s)))
    jumped = -np.expm1(-leaving * dwells_s)
    return np.minimum(jumped / leaving.clip(min=1e-12) + stop_late * dwells_s * jumped, dwells_s)


def _poisson(means: Array) -> list[Array]:
    """The Poisson weights of 0, 1, … events for `means` (T,), until all but `_TAIL` of each is told."""
    weight = np.exp(-means)
    weights, told = [weight], weight.copy()
    while (told < 1.0 - _TAIL).any() and len(weights) < 10 * (10 + means.max()):
        weight = weight * means / len(weights)
        weights.append(weight)
        told += weight
    return weights


def _next_sites(lattice: Honeycomb) -> Array:
    """(S, P): the displacement that is left, in the atom's new frame, after it landed on each site of the patch."""
    patch = honeycomb(PATCH_ANG)
    left = patch.sign[:, None] * (lattice.sites_ang[:, None] - patch.sites_ang)
    return lattice.index(left)


def _evaluate(landing: Array, cost_s: Array, next_site: Array) -> Array:
    """Expected seconds (S,) where site s always does what lands it by `landing[s]` (S, P) at `cost_s[s]`."""
    sites, patch = next_site.shape
    rows = np.repeat(np.arange(sites), patch)
    moves = csr_matrix((landing.ravel(), (rows, next_site.ravel())), shape=(sites, sites)).tolil()
    moves[0] = 0.0  # the goal ends it
    cost = np.where(np.arange(sites) == 0, 0.0, cost_s)
    found: Array = spsolve((identity(sites) - moves).tocsc(), cost)
    return found


def places_around(step_ang: float, reach_ang: float, angles: int) -> tuple[tuple[float, float], ...]:
    """Beam places on circles `step_ang` apart out to `reach_ang`, `angles` on each, three of them along the bonds."""
    radii = np.arange(1, round(reach_ang / step_ang) + 1) * step_ang
    turns = 2.0 * np.pi * np.arange(angles) / angles
    grid = radii[:, None, None] * np.stack((np.cos(turns), np.sin(turns)), axis=-1)
    return tuple((float(x), float(y)) for x, y in grid.reshape(-1, 2) if np.hypot(x, y) <= reach_ang + 1e-9)


def places_on_bonds(bonds: float) -> tuple[tuple[float, float], ...]:
    """The three beam places `bonds` bond lengths towards the neighbours."""
    return tuple((float(x), float(y)) for x, y in bonds * BONDS_ANG)
