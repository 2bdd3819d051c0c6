"""Molecular dynamics with EDIP: velocity Verlet for a recoil, FIRE for the minimum below it.

Lengths in Å, times in fs, energies in eV, masses in u. A system is periodic along x and y and open along z, where
atoms may leave.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy import ndarray

from stem_gym.core.errors import ConfigError
from stem_gym.datasets import edip
from stem_gym.datasets.edip_kernels import TOO_DENSE, integrate, minimise

__all__ = ["EV_PER_U_ANG2_FS2", "Flight", "System", "energy_ev", "fly", "quench"]

EV_PER_U_ANG2_FS2 = 103.64269652680505  # 1 u Å²/fs² in eV (CODATA 2018)
SKIN_ANG = 0.3


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
    motion = (system.mass_u * EV_PER_U_ANG2_FS2, struck, step_fs)
    done, escaped, energy = integrate(positions, velocity, kinds, system.cell_ang, motion, (steps, 4 * steps), work)
    if done == TOO_DENSE:
        raise _too_dense()
    return Flight(system.moved(positions), velocity, done * step_fs, bool(escaped), float(energy))


def quench(system: System, tolerance_ev_ang: float = 0.02, most_steps: int = 2000) -> tuple[System, float]:
    """The minimum downhill of a system and the largest force left, in eV/Å.

    FIRE: Bitzek, Koskinen, Gähler, Moseler and Gumbsch, Phys. Rev. Lett. 97, 170201 (2006), all masses alike.
    """
    positions = system.positions_ang.copy()
    kinds, work = _prepare(system)
    left = minimise(positions, kinds, system.cell_ang, (tolerance_ev_ang, 12.0 * EV_PER_U_ANG2_FS2), most_steps, work)
    if left == TOO_DENSE:
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
