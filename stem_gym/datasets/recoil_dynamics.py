"""Compiled molecular dynamics with EDIP: velocity Verlet for a recoil, FIRE for the minimum below it.

Lengths in Å, times in fs, energies in eV, masses in u. A system is periodic along x and y and open along z, where
atoms may leave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy import ndarray

from stem_gym.core.errors import ConfigError
from stem_gym.datasets import edip
from stem_gym.datasets.compiled import compiled
from stem_gym.datasets.edip_kernels import energy_forces, list_is_stale, list_neighbours

__all__ = ["EV_PER_U_ANG2_FS2", "Flight", "System", "energy_ev", "fly", "quench"]

EV_PER_U_ANG2_FS2 = 103.64269652680505  # 1 u Å²/fs² in eV (CODATA 2018)
SKIN_ANG = 0.3
ESCAPE_HEIGHT_ANG = 6.0
CONTACT_HEIGHT_ANG = 2.5  # above the sheet's mean and beyond the cutoff of C–C: nearly without force
_TOO_DENSE = -1


@dataclass(frozen=True)
class System:
    """N atoms on one cell."""

    cell_ang: ndarray  # (2,)
    positions_ang: ndarray  # (N, 3)
    atomic_number: ndarray  # (N,)
    mass_u: ndarray  # (N,)

    def moved(self, positions_ang: ndarray) -> System:
        """The same atoms elsewhere."""
        return replace(self, positions_ang=positions_ang)


@dataclass(frozen=True)
class Flight:
    """What one trajectory came to."""

    system: System
    velocity_ang_fs: ndarray  # (N, 3)
    time_fs: float
    escaped: bool  # the struck atom is beyond 6 Å and leaving
    energy_ev: float  # potential, at the end


def energy_ev(system: System) -> float:
    """Potential energy of a system."""
    return edip.energy_and_forces(system.positions_ang, system.atomic_number, system.cell_ang)[0]


def fly(system: System, velocity_ang_fs: ndarray, struck: int, time_fs: float = 500.0, step_fs: float = 0.2) -> Flight:
    """Newton's equations from velocities (N, 3) for `time_fs`, or until the struck atom has escaped.

    An atom that is out of touch with the sheet after that time is followed up to four times as long, until it has
    escaped or come back.
    """
    positions, velocity = system.positions_ang.copy(), np.ascontiguousarray(velocity_ang_fs, dtype=float).copy()
    kinds, work = _prepare(system)
    steps = max(1, round(time_fs / step_fs))
    result = _integrate(
        positions, velocity, kinds, system.cell_ang, (system.mass_u, struck, step_fs), (steps, 4 * steps), work
    )
    done, escaped, energy = result
    if done == _TOO_DENSE:
        raise _too_dense()
    return Flight(system.moved(positions), velocity, done * step_fs, bool(escaped), float(energy))


def quench(system: System, tolerance_ev_ang: float = 0.02, most_steps: int = 2000) -> tuple[System, float]:
    """The minimum downhill of a system and the largest force left, in eV/Å.

    FIRE: Bitzek, Koskinen, Gähler, Moseler and Gumbsch, Phys. Rev. Lett. 97, 170201 (2006), all masses alike.
    """
    positions = system.positions_ang.copy()
    kinds, work = _prepare(system)
    left = _fire(positions, kinds, system.cell_ang, tolerance_ev_ang, most_steps, work)
    if left == _TOO_DENSE:
        raise _too_dense()
    return system.moved(positions), float(left)


def _too_dense() -> ConfigError:
    return ConfigError(f"An atom has more than {edip.MOST_NEIGHBOURS} neighbours: the atoms stand too close.")


def _prepare(system: System) -> tuple[ndarray, Any]:
    edip.check_system(system.positions_ang, system.cell_ang)
    atoms = len(system.positions_ang)
    listed = np.full((atoms, 3), np.inf)
    work = (edip.new_list(atoms), listed, edip.CUTOFFS_ANG + SKIN_ANG, SKIN_ANG, edip.TABLES, edip.new_scratch(atoms))
    return edip.kinds_of(system.atomic_number), work


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
    if listed[0, 0] == np.inf or list_is_stale(positions, listed, skin):
        return list_neighbours(positions, kinds, cell, reach, near, listed)
    return True


@compiled
def _integrate(
    positions: ndarray, velocity: ndarray, kinds: ndarray, cell: ndarray, motion: Any, limits: Any, work: Any
) -> tuple[int, bool, float]:
    """Velocity Verlet in place: steps done (−1 where atoms come too close), whether the atom escaped, the energy."""
    mass, struck, step = motion
    usual, most = limits
    near, _, _, _, tables, scratch = work
    forces = np.zeros_like(positions)
    if not _refresh(positions, kinds, cell, work):
        return _TOO_DENSE, False, 0.0
    energy = energy_forces(positions, kinds, cell, near, tables, scratch, forces)
    for done in range(1, most + 1):
        for i in range(len(positions)):
            kick = 0.5 * step / (mass[i] * EV_PER_U_ANG2_FS2)
            for axis in range(3):
                velocity[i, axis] += kick * forces[i, axis]
                positions[i, axis] += step * velocity[i, axis]
        if not _refresh(positions, kinds, cell, work):
            return _TOO_DENSE, False, 0.0
        energy = energy_forces(positions, kinds, cell, near, tables, scratch, forces)
        for i in range(len(positions)):
            kick = 0.5 * step / (mass[i] * EV_PER_U_ANG2_FS2)
            for axis in range(3):
                velocity[i, axis] += kick * forces[i, axis]
        if done % 10 == 0 or done >= usual:
            height = _height(positions, struck)
            leaving = height * velocity[struck, 2] > 0.0
            if leaving and abs(height) > ESCAPE_HEIGHT_ANG:
                return done, True, energy
            if done >= usual and not (leaving and abs(height) > CONTACT_HEIGHT_ANG):
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
def _fire(positions: ndarray, kinds: ndarray, cell: ndarray, tolerance: float, most: int, work: Any) -> float:
    """FIRE in place with the published constants; the largest force left, or −1 where atoms come too close."""
    near, _, _, _, tables, scratch = work
    forces, velocity = np.zeros_like(positions), np.zeros_like(positions)
    step, mixing, downhill, largest = 1.0, 0.1, 0, math.inf
    for _ in range(most):
        if not _refresh(positions, kinds, cell, work):
            return float(_TOO_DENSE)
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
        _blend(velocity, 1.0, forces, step / (12.0 * EV_PER_U_ANG2_FS2))
        stride = step * min(1.0, 0.1 / max(_longest(velocity) * step, 1e-12))  # at most 0.1 Å at once
        _blend(positions, 1.0, velocity, stride)
    return largest
