"""What becomes of a sheet after a recoil: one trajectory, the minimum below it, its label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stem_gym.datasets.recoil_dynamics import Flight, System, fly, quench
from stem_gym.datasets.recoil_shards import OUTCOMES
from stem_gym.datasets.recoil_sheets import Sheet, sheet_of

__all__ = ["Recoil", "Result", "label", "run_recoil", "tilted"]

NOTHING, EXCHANGE, EJECTED, OTHER = range(len(OUTCOMES))
FLIGHT_FS, STEP_FS = 500.0, 0.2
_HOME_ANG = 0.75  # in the plane; half a bond
_ON_TOP_ANG = 1.5  # above the mean: a carbon atom is no longer part of the sheet
_QUENCHED_EV_ANG = 0.1


@dataclass(frozen=True)
class Recoil:
    """What an electron does to the struck atom of a site."""

    site: str
    transfer_ev: float
    direction: np.ndarray  # (3,) towards the partner, across, along the beam; a unit vector


@dataclass(frozen=True)
class Result:
    """How it ended."""

    outcome: int  # index into OUTCOMES
    silicon_side: int  # +1 where the silicon ended on the exit side of the sheet, −1 on the other, 0 without silicon
    time_fs: float


def tilted(tilt_rad: float, azimuth_rad: float) -> np.ndarray:
    """Unit vector (3,) at an angle from the beam, at an azimuth from the direction to the partner."""
    sine = np.sin(tilt_rad)
    return np.array([sine * np.cos(azimuth_rad), sine * np.sin(azimuth_rad), np.cos(tilt_rad)])


def run_recoil(recoil: Recoil, start: tuple[System, np.ndarray] | None = None) -> Result:
    """Fly, cool, label. `start` is a sheet in thermal motion (system, velocities); by default all atoms are at rest."""
    sheet = sheet_of(recoil.site)
    system, velocity = start or (sheet.system, np.zeros_like(sheet.system.positions_ang))
    velocity = velocity.copy()
    velocity[sheet.struck] = sheet.velocity(recoil.transfer_ev, recoil.direction)
    flight = fly(system, velocity, sheet.struck, FLIGHT_FS, STEP_FS)
    outcome, side = label(sheet, flight)
    return Result(outcome, side, flight.time_fs)


def label(sheet: Sheet, flight: Flight) -> tuple[int, int]:
    """Outcome and the side on which the silicon ended, told from the minimum below the flight's end.

    The sheet's own drift is taken off. Atoms are given to the nearest site of the sheet at rest.
    """
    final = flight.system if flight.escaped else quench(flight.system, _QUENCHED_EV_ANG)[0]
    others = np.arange(len(final.mass_u)) != sheet.struck
    moved = final.positions_ang - sheet.system.positions_ang
    moved -= np.median(moved[others], axis=0)
    height = sheet.system.positions_ang[:, 2] + moved[:, 2]
    side = int(np.sign(height[sheet.partner])) if sheet.partner >= 0 else 0
    if flight.escaped:
        return EJECTED, side
    in_sheet = (np.abs(height) < _ON_TOP_ANG) | (sheet.system.atomic_number != 6)
    home = (np.linalg.norm(moved[:, :2], axis=1) < _HOME_ANG) & in_sheet
    if home.all():
        return NOTHING, side
    if sheet.partner >= 0 and _swapped(sheet, moved) and np.delete(home, [sheet.struck, sheet.partner]).all():
        return EXCHANGE, side
    return OTHER, side


def _swapped(sheet: Sheet, moved: np.ndarray) -> bool:
    """Whether struck atom and partner stand nearer to one another's sites than to any other."""
    sites, cell = sheet.system.positions_ang[:, :2], sheet.system.cell_ang
    for atom, wanted in ((sheet.struck, sheet.partner), (sheet.partner, sheet.struck)):
        step = sites - (sites[atom] + moved[atom, :2])
        step -= cell * np.round(step / cell)
        if int(np.argmin((step**2).sum(axis=1))) != wanted:
            return False
    return True
