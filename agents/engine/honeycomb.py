"""The honeycomb as an agent counts on it: sites, their neighbours, hops, and how a lattice lies in the frame.

An atom's own frame has its three bonds at 0°, 120° and 240°. In it a displacement "to the goal" is a site of the
honeycomb through the atom; after a jump the atom sits on the other sublattice, whose bonds point the other way, so that
its own frame is turned by 180°. One table of displacements therefore serves both sublattices.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from agents.policy import Array

BOND_ANG = 1.42  # of graphene, the unit of bonds in observations
_TURNS = 2.0 * np.pi / 3.0 * np.arange(3)
BONDS_ANG = BOND_ANG * np.stack((np.cos(_TURNS), np.sin(_TURNS)), axis=-1)  # (3, 2) of an atom in its own frame


@dataclass(frozen=True, eq=False)
class Honeycomb:
    """Sites within a radius of an atom, nearest first: site 0 is the atom's own."""

    sites_ang: Array  # (S, 2)
    sign: Array  # (S,) 1 on the atom's own sublattice, −1 on the other
    neighbours: Array  # (S, 3), −1 beyond the rim; neighbour j lies at sign · BONDS_ANG[j]
    tree: cKDTree

    def index(self, displacement_ang: Array) -> Array:
        """The nearest site to displacements (…, 2); those beyond the rim come to its edge."""
        return np.asarray(self.tree.query(displacement_ang)[1])

    def hops(self, goal: Array, blocked: Array) -> Array:
        """Fewest jumps (n, S) from every site to `goal` (n,) that pass no `blocked` site (n, S) on their way.

        Infinite where there is no way. A blocked site has the number it would have as a start.
        """
        count, sites = len(goal), len(self.sites_ang)
        far = np.full((count, sites + 1), np.inf)  # the last column stands for what is beyond the rim
        far[np.arange(count), goal] = 0.0
        while True:
            passable = far.copy()
            passable[:, :-1][blocked] = np.inf
            nearer = np.minimum(far[:, :-1], 1.0 + passable[:, self.neighbours].min(axis=2))
            if np.array_equal(nearer, far[:, :-1]):
                return nearer
            far[:, :-1] = nearer


@functools.lru_cache(maxsize=32)
def honeycomb(radius_ang: float) -> Honeycomb:
    """The sites within `radius_ang`."""
    along, across = BONDS_ANG[0] - BONDS_ANG[1], BONDS_ANG[1] - BONDS_ANG[2]
    reach = int(radius_ang / BOND_ANG) + 2
    n, m = (grid.reshape(-1, 1) for grid in np.meshgrid(*[np.arange(-reach, reach + 1)] * 2, indexing="ij"))
    own = n * along + m * across
    sites, sign = np.concatenate((own, own + BONDS_ANG[0])), np.repeat((1.0, -1.0), len(own))
    away = np.linalg.norm(sites, axis=1)
    order = np.argsort(np.round(away, 6), kind="stable")
    order = order[away[order] <= radius_ang + 1e-6]
    sites, sign = sites[order], sign[order]
    tree = cKDTree(sites)
    gap, neighbours = tree.query(sites[:, None] + sign[:, None, None] * BONDS_ANG)
    return Honeycomb(sites, sign, np.where(gap < 0.1, neighbours, -1), tree)


@functools.lru_cache(maxsize=32)
def hops_from_atom(radius_ang: float) -> Array:
    """Fewest jumps (S,) from the atom to every site of `honeycomb(radius_ang)`."""
    lattice = honeycomb(radius_ang)
    found: Array = lattice.hops(np.zeros(1, dtype=np.int64), np.zeros((1, len(lattice.sites_ang)), dtype=bool))[0]
    return found


def lattice_angle(bonds: Array) -> Array:
    """The angle (B,) by which an atom's own frame is turned, from its bonds (B, 3, 2) in any order."""
    unit = bonds[..., 0] + 1j * bonds[..., 1]
    unit = unit / np.abs(unit).clip(min=1e-6)
    angle: Array = np.angle((unit**3).sum(axis=-1)) / 3.0
    return angle


def turned(vectors: Array, angle: Array) -> Array:
    """Vectors (B, …, 2) turned by angles (B,)."""
    shape = (len(angle), *[1] * (vectors.ndim - 2))
    cos, sin = np.cos(angle).reshape(shape), np.sin(angle).reshape(shape)
    return np.stack((cos * vectors[..., 0] - sin * vectors[..., 1], sin * vectors[..., 0] + cos * vectors[..., 1]), -1)
