"""Compiled energy, forces and motion under the EDIP potential; `edip` holds the formulas and the parameters.

All in one file: numba's cache does not see that a function of another file has changed.

Arrays are of one system of N atoms, periodic along x and y, open along z. `tables` is (pairs, triples, angle), as
`edip.TABLES`; `scratch` is (bond (N, M, BOND_COLUMNS), partner (N, M), found (N,), coordination (N,), pull (M, 3)) with
M the largest number of neighbours. `work` is (near, listed, reach, skin, tables, scratch). Lengths in Å, times in fs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy import ndarray

from stem_gym.core.compiled import compiled

__all__ = ["BOND_COLUMNS", "TOO_DENSE", "energy_forces", "integrate", "list_neighbours", "minimise"]

TOO_DENSE = -1
_ESCAPE_HEIGHT_ANG = 6.0
_CONTACT_HEIGHT_ANG = 2.5  # above the sheet's mean and beyond the cutoff of C–C: nearly without force

BOND_COLUMNS = 11
_X, _Y, _Z, _INVERSE, _DECAY, _DECAY_SLOPE, _ANGULAR, _ANGULAR_SLOPE = range(8)
_REPULSION, _COUNT, _COUNT_SLOPE = range(8, BOND_COLUMNS)
_A, _B, _CUTOFF, _INNER, _ALPHA, _BETA, _RHO, _SIGMA, _GAMMA = range(9)
_LAMBDA, _ETA, _MU, _Q0 = range(4)


@compiled
def list_neighbours(
    positions: ndarray, kinds: ndarray, cell: ndarray, reach: ndarray, near: Any, listed: ndarray
) -> bool:
    """Fill `near` with the pairs of neighbours, and `listed` with the positions of this list.

    `near` is (neighbours (N, M), counts (N,), degrees (N,)): neighbours[i, :counts[i]] are those with a lower number
    than i. Two atoms are neighbours when they are nearer than the reach (2, 2) of their kinds. False where an atom
    has more than M of them.
    """
    neighbours, counts, degrees = near
    atoms, width = neighbours.shape
    for i in range(atoms):
        counts[i] = degrees[i] = 0
        listed[i, 0], listed[i, 1], listed[i, 2] = positions[i, 0], positions[i, 1], positions[i, 2]
        for j in range(i):
            dx = positions[j, 0] - positions[i, 0]
            dy = positions[j, 1] - positions[i, 1]
            dz = positions[j, 2] - positions[i, 2]
            dx -= cell[0] * math.floor(dx / cell[0] + 0.5)
            dy -= cell[1] * math.floor(dy / cell[1] + 0.5)
            if dx * dx + dy * dy + dz * dz < reach[kinds[i], kinds[j]] ** 2:
                if degrees[i] == width or degrees[j] == width:
                    return False
                neighbours[i, counts[i]] = j
                counts[i] += 1
                degrees[i] += 1
                degrees[j] += 1
    return True


@compiled
def _list_is_stale(positions: ndarray, listed: ndarray, skin: float) -> bool:
    """Whether two atoms may together have moved by more than the skin since the list was made."""
    for i in range(len(positions)):
        moved2 = 0.0
        for axis in range(3):
            moved2 += (positions[i, axis] - listed[i, axis]) ** 2
        if moved2 > 0.25 * skin * skin:
            return True
    return False


@compiled
def _bonds(positions: ndarray, kinds: ndarray, cell: ndarray, near: Any, pairs: ndarray, scratch: Any) -> None:
    """Everything about a pair that does not depend on its surroundings, written down for both of its atoms.

    Fills bond, partner, found and coordination.
    """
    neighbours, counts, _ = near
    bond, partner, found, coordination, _ = scratch
    for i in range(len(positions)):
        found[i], coordination[i] = 0, 0.0
        for n in range(counts[i]):
            j = neighbours[i, n]
            dx = positions[j, 0] - positions[i, 0]
            dy = positions[j, 1] - positions[i, 1]
            dz = positions[j, 2] - positions[i, 2]
            dx -= cell[0] * math.floor(dx / cell[0] + 0.5)
            dy -= cell[1] * math.floor(dy / cell[1] + 0.5)
            p = pairs[kinds[i], kinds[j]]
            square = dx * dx + dy * dy + dz * dz
            if square >= p[_CUTOFF] * p[_CUTOFF]:
                continue
            r = math.sqrt(square)
            b, c = bond[i, found[i]], bond[j, found[j]]
            b[_X], b[_Y], b[_Z] = dx / r, dy / r, dz / r
            _radial(r, p, b)
            for column in range(BOND_COLUMNS):
                c[column] = b[column]
            c[_X], c[_Y], c[_Z] = -b[_X], -b[_Y], -b[_Z]
            partner[i, found[i]], partner[j, found[j]] = j, i
            found[i] += 1
            found[j] += 1
            coordination[i] += b[_COUNT]
            coordination[j] += b[_COUNT]


@compiled
def _radial(r: float, p: ndarray, b: ndarray) -> None:
    """The functions of a bond's length alone, and their slopes."""
    # Just below the cutoff the exponents run to minus infinity and everything with them to zero.
    gap = 1.0 / min(r - p[_CUTOFF], -1e-3)
    b[_INVERSE] = 1.0 / r
    b[_DECAY] = math.exp(p[_SIGMA] * gap)
    b[_DECAY_SLOPE] = -p[_SIGMA] * gap * gap * b[_DECAY]
    b[_ANGULAR] = math.exp(p[_GAMMA] * gap)
    b[_ANGULAR_SLOPE] = -p[_GAMMA] * gap * gap * b[_ANGULAR]
    b[_REPULSION] = math.exp(p[_RHO] * math.log(p[_B] / r))
    b[_COUNT], b[_COUNT_SLOPE] = 1.0, 0.0
    if r > p[_INNER]:
        width = p[_CUTOFF] - p[_INNER]
        x = (r - p[_INNER]) / width
        below = min(x * x * x - 1.0, -1e-3)
        b[_COUNT] = math.exp(p[_ALPHA] * x * x * x / below)
        b[_COUNT_SLOPE] = -3.0 * p[_ALPHA] * x * x / (below * below) * b[_COUNT] / width


@compiled
def _pair_terms(i: int, kinds: ndarray, pairs: ndarray, scratch: Any) -> tuple[float, float]:
    """Sum of atom i's two-body terms and its derivative by the coordination; the rest of the gradient goes to pull."""
    bonds, partners, found, coordinations, pull = scratch
    energy, by_coordination = 0.0, 0.0
    coordination, order, last = coordinations[i], 0.0, -1
    for n in range(found[i]):
        b, other = bonds[i, n], kinds[partners[i, n]]
        p = pairs[kinds[i], other]
        if other != last:
            order, last = math.exp(-p[_BETA] * coordination * coordination), other
        value = p[_A] * (b[_REPULSION] - order)
        energy += value * b[_DECAY]
        by_coordination += 2.0 * p[_A] * p[_BETA] * coordination * order * b[_DECAY]
        slope = value * b[_DECAY_SLOPE] - p[_A] * p[_RHO] * b[_INVERSE] * b[_REPULSION] * b[_DECAY]
        pull[n, 0], pull[n, 1], pull[n, 2] = slope * b[_X], slope * b[_Y], slope * b[_Z]
    return energy, by_coordination


@compiled
def _angle_terms(i: int, kinds: ndarray, tables: Any, scratch: Any) -> tuple[float, float]:
    """Sum of atom i's three-body terms and its derivative by the coordination; the rest is added to pull."""
    bonds, partners, found, coordinations, pull = scratch
    _, triples, angle = tables
    coordination = coordinations[i]
    soft = math.exp(-angle[3] * coordination)
    tau = angle[0] + angle[1] * (angle[2] - soft) * soft
    tau_slope = angle[1] * angle[3] * (2.0 * soft - angle[2]) * soft
    energy, by_coordination = 0.0, 0.0
    stiffness, last = 0.0, -1
    for n in range(1, found[i]):
        b = bonds[i, n]
        for m in range(n):
            c = bonds[i, m]
            others = kinds[partners[i, n]] + kinds[partners[i, m]]  # the tables are the same for both orders
            t = triples[kinds[i], kinds[partners[i, n]], kinds[partners[i, m]]]
            if others != last:
                stiffness, last = t[_Q0] * math.exp(-t[_MU] * coordination), others
            cosine = b[_X] * c[_X] + b[_Y] * c[_Y] + b[_Z] * c[_Z]
            bent = cosine + tau
            u = stiffness * bent * bent
            well = math.exp(-u)
            h = t[_LAMBDA] * (1.0 - well + t[_ETA] * u)
            both = b[_ANGULAR] * c[_ANGULAR]
            by_bent = both * t[_LAMBDA] * (well + t[_ETA]) * stiffness * bent
            energy += both * h
            by_coordination += by_bent * (2.0 * tau_slope - t[_MU] * bent)
            on_b, on_c = 2.0 * by_bent * b[_INVERSE], 2.0 * by_bent * c[_INVERSE]
            along_b = b[_ANGULAR_SLOPE] * c[_ANGULAR] * h - on_b * cosine
            along_c = b[_ANGULAR] * c[_ANGULAR_SLOPE] * h - on_c * cosine
            for axis in range(3):
                pull[n, axis] += along_b * b[axis] + on_b * c[axis]
                pull[m, axis] += along_c * c[axis] + on_c * b[axis]
    return energy, by_coordination


@compiled
def energy_forces(
    positions: ndarray, kinds: ndarray, cell: ndarray, near: Any, tables: Any, scratch: Any, forces: ndarray
) -> float:
    """Potential energy in eV; fills forces (N, 3) in eV/Å. `near` is as `list_neighbours` left it."""
    bonds, partners, found, _, pull = scratch
    _bonds(positions, kinds, cell, near, tables[0], scratch)
    energy = 0.0
    for i in range(len(positions)):
        forces[i, 0] = forces[i, 1] = forces[i, 2] = 0.0
    for i in range(len(positions)):
        pair, pair_slope = _pair_terms(i, kinds, tables[0], scratch)
        bend, bend_slope = _angle_terms(i, kinds, tables, scratch)
        energy += pair + bend
        for n in range(found[i]):
            radial = (pair_slope + bend_slope) * bonds[i, n, _COUNT_SLOPE]
            for axis in range(3):
                step = pull[n, axis] + radial * bonds[i, n, axis]
                forces[partners[i, n], axis] -= step
                forces[i, axis] += step
    return energy


@compiled
def _height(positions: ndarray, struck: int) -> float:
    """Of the struck atom above the mean of the others: the sheet itself drifts."""
    total = 0.0
    for i in range(len(positions)):
        if i != struck:
            total += positions[i, 2]
    return positions[struck, 2] - total / (len(positions) - 1)


@compiled
def _refresh(positions: ndarray, kinds: ndarray, cell: ndarray, work: Any) -> bool:
    """Make the neighbour list anew when it is stale. False where the atoms stand too close for it."""
    near, listed, reach, skin, _, _ = work
    if listed[0, 0] == np.inf or _list_is_stale(positions, listed, skin):
        return list_neighbours(positions, kinds, cell, reach, near, listed)
    return True


@compiled
def integrate(
    positions: ndarray, velocity: ndarray, kinds: ndarray, cell: ndarray, motion: Any, limits: Any, work: Any
) -> tuple[int, bool, float]:
    """Velocity Verlet in place: steps done (−1 where atoms come too close), whether the atom escaped, the energy.

    `motion` is (masses (N,) in eV fs²/Å², number of the struck atom, step in fs), `limits` the usual and the largest
    number of steps.
    """
    mass, struck, step = motion
    usual, most = limits
    near, _, _, _, tables, scratch = work
    forces = np.zeros_like(positions)
    if not _refresh(positions, kinds, cell, work):
        return TOO_DENSE, False, 0.0
    energy = energy_forces(positions, kinds, cell, near, tables, scratch, forces)
    for done in range(1, most + 1):
        for i in range(len(positions)):
            kick = 0.5 * step / mass[i]
            for axis in range(3):
                velocity[i, axis] += kick * forces[i, axis]
                positions[i, axis] += step * velocity[i, axis]
        if not _refresh(positions, kinds, cell, work):
            return TOO_DENSE, False, 0.0
        energy = energy_forces(positions, kinds, cell, near, tables, scratch, forces)
        for i in range(len(positions)):
            kick = 0.5 * step / mass[i]
            for axis in range(3):
                velocity[i, axis] += kick * forces[i, axis]
        if done % 10 == 0 or done >= usual:
            height = _height(positions, struck)
            leaving = height * velocity[struck, 2] > 0.0
            if leaving and abs(height) > _ESCAPE_HEIGHT_ANG:
                return done, True, energy
            if done >= usual and not (leaving and abs(height) > _CONTACT_HEIGHT_ANG):
                return done, False, energy
    return most, False, energy


@compiled
def _dot(a: ndarray, b: ndarray) -> float:
    total = 0.0
    for i in range(len(a)):
        total += a[i, 0] * b[i, 0] + a[i, 1] * b[i, 1] + a[i, 2] * b[i, 2]
    return total


@compiled
def _longest(a: ndarray) -> float:
    """The largest length of a row."""
    most = 0.0
    for i in range(len(a)):
        most = max(most, a[i, 0] * a[i, 0] + a[i, 1] * a[i, 1] + a[i, 2] * a[i, 2])
    return math.sqrt(most)


@compiled
def _blend(a: ndarray, keep: float, b: ndarray, share: float) -> None:
    """keep · a + share · b, in a."""
    for i in range(len(a)):
        for axis in range(3):
            a[i, axis] = keep * a[i, axis] + share * b[i, axis]


@compiled
def minimise(positions: ndarray, kinds: ndarray, cell: ndarray, goal: Any, most: int, work: Any) -> float:
    """FIRE in place with the published constants; the largest force left, or −1 where atoms come too close.

    `goal` is (largest force in eV/Å, mass of every atom in eV fs²/Å²).
    """
    tolerance, mass = goal
    near, _, _, _, tables, scratch = work
    forces, velocity = np.zeros_like(positions), np.zeros_like(positions)
    step, mixing, downhill, largest = 1.0, 0.1, 0, math.inf
    for _ in range(most):
        if not _refresh(positions, kinds, cell, work):
            return float(TOO_DENSE)
        energy_forces(positions, kinds, cell, near, tables, scratch, forces)
        largest = _longest(forces)
        if largest < tolerance:
            return largest
        if _dot(forces, velocity) > 0.0:
            aligned = math.sqrt(_dot(velocity, velocity) / _dot(forces, forces))
            _blend(velocity, 1.0 - mixing, forces, mixing * aligned)
            downhill += 1
            if downhill > 5:
                step, mixing = min(1.1 * step, 6.0), 0.99 * mixing
        else:
            _blend(velocity, 0.0, forces, 0.0)
            step, mixing, downhill = 0.5 * step, 0.1, 0
        _blend(velocity, 1.0, forces, step / mass)
        stride = step * min(1.0, 0.1 / max(_longest(velocity) * step, 1e-12))  # at most 0.1 Å at once
        _blend(positions, 1.0, velocity, stride)
    return largest
