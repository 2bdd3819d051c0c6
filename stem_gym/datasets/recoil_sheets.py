"""Relaxed graphene sheets with one struck carbon atom, and the frame in which its recoil is told.

The beam travels along +z. A recoil's direction is (towards the partner, across, along the beam): the partner is the
silicon atom, the vacancy, or for pristine graphene one of the three neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stem_gym.core.errors import ConfigError, unknown_name
from stem_gym.datasets.recoil_dynamics import EV_PER_U_ANG2_FS2, System, energy_ev, quench
from stem_gym.datasets.recoil_shards import SITES

__all__ = ["MASS_U", "Sheet", "lattice_constant_ang", "sheet_of"]

MASS_U = {6: 12.0, 14: 27.97692653}  # 12C and 28Si (AME2020)
_REPEATS = (6, 4)  # 96 atoms
_TOLERANCE_EV_ANG = 1e-4


@dataclass(frozen=True)
class Sheet:
    """A relaxed sheet at rest, and the atom that the electron hits."""

    site: str
    system: System
    struck: int
    partner: int  # the silicon atom; −1 where there is none
    towards: np.ndarray  # (2,) unit vector in the plane from the struck atom to its partner

    def velocity(self, transfer_ev: float, direction: np.ndarray) -> np.ndarray:
        """Velocity (3,) in Å/fs along x, y, z of the struck atom for a recoil direction (3,) in the site's frame."""
        speed = np.sqrt(2 * transfer_ev / (self.system.mass_u[self.struck] * EV_PER_U_ANG2_FS2))
        across = np.array([-self.towards[1], self.towards[0]])
        along = np.asarray(direction, dtype=float) / np.linalg.norm(direction)
        return speed * np.append(along[0] * self.towards + along[1] * across, along[2])


def _graphene(constant_ang: float) -> System:
    """The pristine sheet at z = 0, 6 by 4 rectangular cells of four atoms, zigzag lines along x."""
    height = constant_ang * np.sqrt(3.0)
    basis = np.array([[0.0, 0.0], [0.5, 1 / 6], [0.5, 0.5], [0.0, 2 / 3]])
    steps = np.stack(np.meshgrid(*map(np.arange, _REPEATS), indexing="ij"), axis=-1).reshape(-1, 1, 2)
    xy = ((steps + basis) * [constant_ang, height]).reshape(-1, 2)
    numbers = np.full(len(xy), 6)
    cell = np.array([_REPEATS[0] * constant_ang, _REPEATS[1] * height])
    return System(cell, np.column_stack([xy, np.zeros(len(xy))]), numbers, np.full(len(xy), MASS_U[6]))


@lru_cache(maxsize=1)
def lattice_constant_ang() -> float:
    """Lattice constant of graphene with the least energy in EDIP, by golden section."""
    low, high = 2.3, 2.7
    ratio = (np.sqrt(5.0) - 1) / 2
    while high - low > 1e-6:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if energy_ev(_graphene(left)) < energy_ev(_graphene(right)):
            high = right
        else:
            low = left
    return float(0.5 * (low + high))


@lru_cache(maxsize=8)
def sheet_of(site: str) -> Sheet:
    """The relaxed sheet of one of `SITES`. Raises UnknownNameError for another name."""
    if site not in SITES:
        raise unknown_name("site", site, SITES)
    system = _graphene(lattice_constant_ang())
    middle = int(np.argmin(np.linalg.norm(system.positions_ang[:, :2] - system.cell_ang / 2, axis=1)))
    struck = _neighbours(system, middle)[0]
    step = _shortest(system, struck, middle)
    towards = step[:2] / np.linalg.norm(step[:2])
    if site == "pristine":
        return Sheet(site, _settle(system), struck, -1, towards)
    if site == "vacancy":
        kept = np.arange(len(system.mass_u)) != middle
        holed = System(system.cell_ang, system.positions_ang[kept], system.atomic_number[kept], system.mass_u[kept])
        return Sheet(site, _settle(holed), struck - int(struck > middle), -1, towards)
    positions, numbers, masses = (a.copy() for a in (system.positions_ang, system.atomic_number, system.mass_u))
    numbers[middle], masses[middle] = 14, MASS_U[14]
    positions[middle, 2] = 1.5 if site == "silicon_ahead" else -1.5
    return Sheet(site, _settle(System(system.cell_ang, positions, numbers, masses)), struck, middle, towards)


def _settle(system: System) -> System:
    settled, left = quench(system, _TOLERANCE_EV_ANG, 20000)
    if left > _TOLERANCE_EV_ANG:
        raise ConfigError(f"A sheet did not relax: {left:.2g} eV/Å is left, wanted {_TOLERANCE_EV_ANG} eV/Å.")
    return settled


def _shortest(system: System, start: int, end: int | slice) -> np.ndarray:
    """Nearest image of the step from one atom to another, or to several."""
    step = system.positions_ang[end] - system.positions_ang[start]
    step[..., :2] -= system.cell_ang * np.round(step[..., :2] / system.cell_ang)
    return step


def _neighbours(system: System, atom: int) -> list[int]:
    """The three nearest atoms."""
    distance = np.linalg.norm(_shortest(system, atom, slice(None)), axis=1)
    return [int(i) for i in np.argsort(distance, kind="stable")[1:4]]
