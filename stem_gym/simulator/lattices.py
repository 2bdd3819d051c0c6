"""Rotated commensurate supercells of flat lattices, found once with numpy.

A supercell is spanned by two lattice vectors that are nearly perpendicular and nearly of the wanted lengths; a small
strain makes it exactly rectangular. The set of such supercells samples the orientations of the lattice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stem_gym.core.errors import ConfigError

LARGEST_STRAIN = 0.005  # well below what an image of 64 pixels shows: 0.15 Å over 30 Å
_LENGTH_TOLERANCES = (0.06, 0.1, 0.15, 0.2)  # of the wanted side; the first that gives enough orientations
_ENOUGH = 6
_LARGEST_COUNT = 48  # templates kept, spread over the orientations


@dataclass(frozen=True)
class FlatLattice:
    """A lattice in projection: two vectors, and the atoms of one cell with element and bonded partners' distance."""

    vectors_ang: tuple[tuple[float, float], tuple[float, float]]
    atoms_ang: tuple[tuple[float, float], ...]  # places (x, y) of the atoms of one cell
    atomic_numbers: tuple[int, ...]
    bond_ang: float  # projected length of a bond
    period_rad: float  # turning by this angle gives the same lattice, or its mirror image


@dataclass(frozen=True)
class Templates:
    """T supercells padded to the same number K of atoms."""

    cell_ang: np.ndarray  # (T, 2)
    xy_ang: np.ndarray  # (T, K, 2)
    atomic_number: np.ndarray  # (T, K), zero where padded
    neighbours: np.ndarray  # (T, K, 3) index of bonded atoms; an atom's own index where it has fewer
    angle_rad: np.ndarray  # (T,) orientation of the first lattice vector

    @property
    def largest_cell_ang(self) -> tuple[float, float]:
        """The longest sides (x, y) among the supercells."""
        x, y = self.cell_ang.max(axis=0)
        return float(x), float(y)


def graphene_lattice(lattice_constant_ang: float = 2.46) -> FlatLattice:
    """Graphene: a = 2.46 Å, bond 1.42 Å (Castro Neto et al., Rev. Mod. Phys. 81, 109, 2009)."""
    return _honeycomb(lattice_constant_ang, (6,), (6,))


def mos2_lattice(lattice_constant_ang: float = 3.16) -> FlatLattice:
    """2H MoS2 seen along c: a = 3.16 Å (Dickinson and Pauling, J. Am. Chem. Soc. 45, 1466, 1923); two S a column."""
    return _honeycomb(lattice_constant_ang, (42,), (16, 16))


@lru_cache(maxsize=16)
def cubic_points(radius: float) -> np.ndarray:
    """Face-centred cubic points (n, 3), in lattice constants, that a sphere of this radius may hold wherever it is."""
    reach = int(radius + 2.0)
    corners = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    basis = np.array([[0.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
    points = (corners + basis).reshape(-1, 3)
    # The particle's centre is drawn anywhere in one cell, [0, 1) on each axis.
    nearest = np.clip(-points, 0.0, 1.0)
    return points[np.linalg.norm(points + nearest, axis=1) <= radius]


def _honeycomb(a: float, first: tuple[int, ...], second: tuple[int, ...]) -> FlatLattice:
    """Two interpenetrating triangular lattices; several elements on a site are atoms of one column."""
    bond = a / np.sqrt(3.0)
    places = ((0.0, 0.0),) * len(first) + ((0.0, float(bond)),) * len(second)
    vectors = ((a, 0.0), (0.5 * a, float(0.5 * np.sqrt(3.0) * a)))
    return FlatLattice(vectors, places, first + second, float(bond), float(np.pi / 3.0))


@lru_cache(maxsize=16)
def supercells(lattice: FlatLattice, side_ang: float) -> Templates:
    """All orientations of a lattice that fit a near-square cell of about `side_ang` with a strain below LARGEST_STRAIN.

    Raises ConfigError when no supercell fits.
    """
    pairs: list[np.ndarray] = []
    for tolerance in _LENGTH_TOLERANCES:
        if len(pairs) < _ENOUGH:
            found = _perpendicular_pairs(np.array(lattice.vectors_ang), side_ang, tolerance, lattice.period_rad)
            pairs = _one_per_orientation(found, side_ang)
    if not pairs:
        raise ConfigError(
            f"No rectangular supercell near {side_ang} Å has a strain below {LARGEST_STRAIN}; try a larger cell."
        )
    cells = [_fill(lattice, pair) for pair in _spread(pairs)]
    return _pad(cells, lattice.bond_ang)


def _perpendicular_pairs(vectors: np.ndarray, side: float, tolerance: float, period: float) -> list[np.ndarray]:
    """Pairs (2, 2) of lattice vectors, one a row, that a small strain makes perpendicular, right-handed."""
    reach = int(side * (1.0 + tolerance) / np.linalg.norm(vectors[0]) * 1.2) + 1
    orders = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    points = orders @ vectors
    length = np.linalg.norm(points, axis=1)
    points = points[np.abs(length - side) <= tolerance * side]
    angle = np.arctan2(points[:, 1], points[:, 0])
    firsts = points[(angle >= -1e-9) & (angle < period - 1e-9)]
    found = []
    for first in firsts:
        along = points @ first / np.linalg.norm(first) / np.linalg.norm(points, axis=1)
        across = first[0] * points[:, 1] - first[1] * points[:, 0]
        # The strain of removing a shear by an angle e is e / 2 along the diagonals.
        found += [np.stack((first, second)) for second in points[(np.abs(along) < 2.0 * LARGEST_STRAIN) & (across > 0)]]
    return found


def _one_per_orientation(pairs: list[np.ndarray], side: float) -> list[np.ndarray]:
    """Of pairs with the same orientation the one nearest to the wanted sides, in the order of the orientation."""
    best: dict[float, np.ndarray] = {}
    for pair in sorted(pairs, key=lambda p: -float(np.abs(np.linalg.norm(p, axis=1) - side).max())):
        best[round(float(np.arctan2(pair[0, 1], pair[0, 0])), 4)] = pair
    return [best[angle] for angle in sorted(best)]


def _spread(pairs: list[np.ndarray]) -> list[np.ndarray]:
    """At most _LARGEST_COUNT of pairs in order, evenly over the orientations."""
    keep = np.unique(np.linspace(0, len(pairs) - 1, min(_LARGEST_COUNT, len(pairs))).round().astype(int))
    return [pairs[i] for i in keep]


def _fill(lattice: FlatLattice, pair: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Cell (2,), atoms (n, 2), elements (n,) and orientation of one strained supercell."""
    vectors = np.array(lattice.vectors_ang)
    cell = np.linalg.norm(pair, axis=1)
    reach = int(np.abs(pair @ np.linalg.inv(vectors)).sum(axis=0).max()) + 2
    orders = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    # Sites on a border would be counted twice or not at all, as rounding has it: a small shift, along no lattice line.
    fractions = (orders @ vectors) @ np.linalg.inv(pair) + np.array([1.37e-3, 0.71e-3])
    inside = np.all((fractions >= 0.0) & (fractions < 1.0), axis=1)
    sites = fractions[inside] * cell
    strained = np.array(lattice.atoms_ang) @ np.linalg.inv(pair) * cell
    xy = (sites[:, None, :] + strained[None, :, :]).reshape(-1, 2) % cell
    elements = np.tile(np.array(lattice.atomic_numbers), len(sites))
    return cell, xy, elements, float(np.arctan2(pair[0, 1], pair[0, 0]))


def _pad(cells: list[tuple[np.ndarray, np.ndarray, np.ndarray, float]], bond: float) -> Templates:
    """The supercells with equal numbers of atoms, and their neighbours."""
    atoms = max(len(xy) for _, xy, _, _ in cells)
    xy_ang = np.zeros((len(cells), atoms, 2))
    number = np.zeros((len(cells), atoms), dtype=np.int64)
    neighbours = np.tile(np.arange(atoms)[None, :, None], (len(cells), 1, 3))
    for i, (cell, xy, elements, _) in enumerate(cells):
        xy_ang[i, : len(xy)], number[i, : len(xy)] = xy, elements
        neighbours[i, : len(xy)] = _bonded(cell, xy, bond)
    return Templates(np.stack([c[0] for c in cells]), xy_ang, number, neighbours, np.array([c[3] for c in cells]))


def _bonded(cell: np.ndarray, xy: np.ndarray, bond: float) -> np.ndarray:
    """(n, 3) indices of up to three atoms one bond away on the periodic cell."""
    step = xy[:, None, :] - xy[None, :, :]
    distance = np.linalg.norm(step - cell * np.round(step / cell), axis=-1)
    distance[(distance < 0.5 * bond) | (distance > 1.2 * bond)] = np.inf
    order = np.argsort(distance, axis=1)[:, :3]
    return np.where(np.isfinite(np.take_along_axis(distance, order, axis=1)), order, np.arange(len(xy))[:, None])
