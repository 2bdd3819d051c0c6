"""Compiled energy, forces and neighbour lists of the EDIP potential; `edip` holds the formulas and the parameters.

Arrays are of one system of N atoms, periodic along x and y, open along z. `tables` is (pairs, triples, angle), as
`edip.TABLES`; `scratch` is (bond (M, BOND_COLUMNS), partner (M,), pull (M, 3)) with M the width of the list.
"""

from __future__ import annotations

import math
from typing import Any

from numpy import ndarray

from stem_gym.datasets.compiled import compiled

__all__ = ["BOND_COLUMNS", "energy_forces", "list_is_stale", "list_neighbours"]

BOND_COLUMNS = 9
_X, _Y, _Z, _LENGTH, _DECAY, _DECAY_SLOPE, _ANGULAR, _ANGULAR_SLOPE, _COUNT_SLOPE = range(BOND_COLUMNS)
_A, _B, _CUTOFF, _INNER, _ALPHA, _BETA, _RHO, _SIGMA, _GAMMA = range(9)
_LAMBDA, _ETA, _MU, _Q0 = range(4)


@compiled
def list_neighbours(
    positions: ndarray, kinds: ndarray, cell: ndarray, reach: ndarray, near: Any, listed: ndarray
) -> bool:
    """Fill `near`, which is (neighbours (N, M), counts (N,)), and `listed` with the positions of this list.

    Two atoms are neighbours when they are nearer than the reach (2, 2) of their kinds. False where an atom has more
    than M of them.
    """
    neighbours, counts = near
    atoms, width = neighbours.shape
    counts[:] = 0
    listed[:] = positions
    for i in range(atoms):
        for j in range(i):
            dx = positions[j, 0] - positions[i, 0]
            dy = positions[j, 1] - positions[i, 1]
            dz = positions[j, 2] - positions[i, 2]
            dx -= cell[0] * math.floor(dx / cell[0] + 0.5)
            dy -= cell[1] * math.floor(dy / cell[1] + 0.5)
            if dx * dx + dy * dy + dz * dz < reach[kinds[i], kinds[j]] ** 2:
                if counts[i] == width or counts[j] == width:
                    return False
                neighbours[i, counts[i]] = j
                neighbours[j, counts[j]] = i
                counts[i] += 1
                counts[j] += 1
    return True


@compiled
def list_is_stale(positions: ndarray, listed: ndarray, skin: float) -> bool:
    """Whether two atoms may together have moved by more than the skin since the list was made."""
    for i in range(len(positions)):
        moved2 = 0.0
        for axis in range(3):
            moved2 += (positions[i, axis] - listed[i, axis]) ** 2
        if moved2 > 0.25 * skin * skin:
            return True
    return False


@compiled
def _bonds(
    i: int, positions: ndarray, kinds: ndarray, cell: ndarray, near: ndarray, pairs: ndarray, scratch: Any
) -> tuple[int, float]:
    """Number of bonds and coordination of atom i; fills bond and partner."""
    bond, partner, _ = scratch
    found, coordination = 0, 0.0
    for j in near:
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
        b = bond[found]
        b[_X], b[_Y], b[_Z], b[_LENGTH] = dx / r, dy / r, dz / r, r
        # Just below the cutoff the exponents run to minus infinity and everything with them to zero.
        gap = 1.0 / min(r - p[_CUTOFF], -1e-3)
        b[_DECAY] = math.exp(p[_SIGMA] * gap)
        b[_DECAY_SLOPE] = -p[_SIGMA] * gap * gap * b[_DECAY]
        b[_ANGULAR] = math.exp(p[_GAMMA] * gap)
        b[_ANGULAR_SLOPE] = -p[_GAMMA] * gap * gap * b[_ANGULAR]
        b[_COUNT_SLOPE] = 0.0
        if r <= p[_INNER]:
            coordination += 1.0
        else:
            width = p[_CUTOFF] - p[_INNER]
            x = (r - p[_INNER]) / width
            below = min(x * x * x - 1.0, -1e-3)
            share = math.exp(p[_ALPHA] * x * x * x / below)
            coordination += share
            b[_COUNT_SLOPE] = -3.0 * p[_ALPHA] * x * x / (below * below) * share / width
        partner[found] = j
        found += 1
    return found, coordination


@compiled
def _pair_terms(
    kind: int, found: int, coordination: float, kinds: ndarray, pairs: ndarray, scratch: Any
) -> tuple[float, float]:
    """Sum of the two-body terms and its derivative by the coordination; adds the rest of the gradient to pull."""
    bond, partner, pull = scratch
    energy, by_coordination = 0.0, 0.0
    order, last = 0.0, -1
    for n in range(found):
        other = kinds[partner[n]]
        p, b = pairs[kind, other], bond[n]
        if other != last:
            order, last = math.exp(-p[_BETA] * coordination * coordination), other
        repulsion = math.exp(p[_RHO] * math.log(p[_B] / b[_LENGTH]))
        value = p[_A] * (repulsion - order)
        energy += value * b[_DECAY]
        by_coordination += 2.0 * p[_A] * p[_BETA] * coordination * order * b[_DECAY]
        slope = value * b[_DECAY_SLOPE] - p[_A] * p[_RHO] / b[_LENGTH] * repulsion * b[_DECAY]
        pull[n, 0], pull[n, 1], pull[n, 2] = slope * b[_X], slope * b[_Y], slope * b[_Z]
    return energy, by_coordination


@compiled
def _angle_terms(
    kind: int, found: int, coordination: float, kinds: ndarray, tables: Any, scratch: Any
) -> tuple[float, float]:
    """Sum of the three-body terms and its derivative by the coordination; adds the rest of the gradient to pull."""
    bond, partner, pull = scratch
    _, triples, angle = tables
    soft, hard = math.exp(-angle[3] * coordination), math.exp(-2.0 * angle[3] * coordination)
    tau = angle[0] + angle[1] * (angle[2] * soft - hard)
    tau_slope = angle[1] * angle[3] * (2.0 * hard - angle[2] * soft)
    energy, by_coordination = 0.0, 0.0
    stiffness, last = 0.0, -1
    for n in range(1, found):
        b = bond[n]
        for m in range(n):
            c = bond[m]
            others = kinds[partner[n]] + kinds[partner[m]]  # the tables are the same for both orders
            t = triples[kind, kinds[partner[n]], kinds[partner[m]]]
            if others != last:
                stiffness, last = t[_Q0] * math.exp(-t[_MU] * coordination), others
            cosine = b[_X] * c[_X] + b[_Y] * c[_Y] + b[_Z] * c[_Z]
            bent = cosine + tau
            u = stiffness * bent * bent
            well = math.exp(-u)
            h = t[_LAMBDA] * (1.0 - well + t[_ETA] * u)
            by_u = t[_LAMBDA] * (well + t[_ETA])
            both = b[_ANGULAR] * c[_ANGULAR]
            energy += both * h
            by_coordination += both * by_u * stiffness * bent * (2.0 * tau_slope - t[_MU] * bent)
            by_cosine = 2.0 * both * by_u * stiffness * bent
            along_b = b[_ANGULAR_SLOPE] * c[_ANGULAR] * h - by_cosine * cosine / b[_LENGTH]
            along_c = b[_ANGULAR] * c[_ANGULAR_SLOPE] * h - by_cosine * cosine / c[_LENGTH]
            for axis in range(3):
                pull[n, axis] += along_b * b[axis] + by_cosine / b[_LENGTH] * c[axis]
                pull[m, axis] += along_c * c[axis] + by_cosine / c[_LENGTH] * b[axis]
    return energy, by_coordination


@compiled
def energy_forces(
    positions: ndarray, kinds: ndarray, cell: ndarray, near: Any, tables: Any, scratch: Any, forces: ndarray
) -> float:
    """Potential energy in eV; fills forces (N, 3) in eV/Å. `near` is (neighbours, counts)."""
    neighbours, counts = near
    bond, partner, pull = scratch
    forces[:] = 0.0
    energy = 0.0
    for i in range(len(positions)):
        found, coordination = _bonds(i, positions, kinds, cell, neighbours[i, : counts[i]], tables[0], scratch)
        pair, pair_slope = _pair_terms(kinds[i], found, coordination, kinds, tables[0], scratch)
        bend, bend_slope = _angle_terms(kinds[i], found, coordination, kinds, tables, scratch)
        energy += pair + bend
        for n in range(found):
            radial = (pair_slope + bend_slope) * bond[n, _COUNT_SLOPE]
            for axis in range(3):
                step = pull[n, axis] + radial * bond[n, axis]
                forces[partner[n], axis] -= step
                forces[i, axis] += step
    return energy
