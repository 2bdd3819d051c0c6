"""Run recoils of carbon atoms in graphene: python -m stem_gym.datasets.recoil_trajectories --out DIR

A carbon atom gets the momentum that an electron may hand it: next to a silicon atom that stands out of the sheet on
the exit side (ahead of the recoil) or on the entrance side (behind it), in pristine graphene, or next to a vacancy.
After 0.5 ps of molecular dynamics with EDIP the sheet is cooled to the minimum below and its outcome told: nothing,
silicon and carbon have exchanged their sites, the carbon atom was ejected, or something other.

Energies near the thresholds and directions near the beam are drawn more often; the weight of a trajectory is the
density, uniform in energy and solid angle, over the density it was drawn from. In every second shard for training the
energies of a direction are not drawn but close in on its thresholds, and more of the directions are nearly along the
beam, where the potential's thresholds jump within half a degree; such trajectories have the weight zero.

Files are written atomically and never rewritten: a run that was killed goes on where it stopped, and several
processes may share a folder (`--part 0/4` … `--part 3/4`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stem_gym.core.errors import ConfigError, RecordError
from stem_gym.datasets.recoil_dynamics import System, fly
from stem_gym.datasets.recoil_outcomes import FLIGHT_FS, STEP_FS, Recoil, Result, run_recoil, tilted
from stem_gym.datasets.recoil_shards import OUTCOMES, SITES, Trajectories, load_shard, save_shard, shard_path, split_of
from stem_gym.datasets.recoil_sheets import MASS_U, Sheet, lattice_constant_ang, sheet_of
from stem_gym.datasets.recoil_thresholds import EVENTS

__all__ = ["ENERGY_SPAN_EV", "LARGEST_TILT_DEG", "draw", "make_shard", "run", "thermal_start"]

ENERGY_SPAN_EV = (5.0, 30.0)
LARGEST_TILT_DEG = 60.0
_SITE_SHARES = (0.46, 0.22, 0.16, 0.16)  # most where most can happen
_WINDOWS_EV = ((12.0, 23.0), (17.0, 25.0), (18.0, 27.0), (14.0, 24.0))  # around the thresholds of each site
_WINDOW_SHARE = 0.85
_SMALL_TILT_DEG, _SMALL_TILT_SHARE = 22.0, 0.55
_NARROW_TILT_DEG, _NARROW_SHARE = 3.0, 0.3  # of directions whose thresholds are closed in on
_TRIES = 8
_DRAWING = 2  # counts up whenever the same seed draws other recoils, so that one folder never holds two drawings
ANG_FS_PER_M_S = 1e-5


def draw(
    rng: np.random.Generator, count: int, narrow_share: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sites (n,), transfers (n,) in eV, directions (n, 3) and weights (n,), which hold where no share is narrow."""
    site = rng.choice(len(SITES), count, p=_SITE_SHARES)
    low, high = np.array(_WINDOWS_EV)[site].T
    near, anywhere = rng.uniform(low, high), rng.uniform(*ENERGY_SPAN_EV, count)
    transfer = np.where(rng.uniform(size=count) < _WINDOW_SHARE, near, anywhere)
    widest = np.where(rng.uniform(size=count) < _SMALL_TILT_SHARE, _SMALL_TILT_DEG, LARGEST_TILT_DEG)
    if narrow_share > 0.0:
        widest = np.where(rng.uniform(size=count) < narrow_share, _NARROW_TILT_DEG, widest)
    tilt_deg = rng.uniform(0.0, widest)
    azimuth = rng.uniform(0.0, 2 * np.pi, count)
    direction = np.stack([tilted(t, a) for t, a in zip(np.radians(tilt_deg), azimuth, strict=True)])
    return site, transfer, direction, _weight(transfer, tilt_deg, low, high)


def _weight(transfer_ev: np.ndarray, tilt_deg: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Density uniform in transfer and solid angle over the density of `draw`; the azimuth is uniform in both."""
    span = ENERGY_SPAN_EV[1] - ENERGY_SPAN_EV[0]
    inside = (transfer_ev >= low) & (transfer_ev < high)
    drawn_energy = _WINDOW_SHARE * inside / (high - low) + (1 - _WINDOW_SHARE) / span
    small, largest = np.radians(_SMALL_TILT_DEG), np.radians(LARGEST_TILT_DEG)
    drawn_tilt = _SMALL_TILT_SHARE * (tilt_deg < _SMALL_TILT_DEG) / small + (1 - _SMALL_TILT_SHARE) / largest
    wanted_tilt = np.sin(np.radians(tilt_deg)) / (1 - np.cos(largest))
    return np.asarray(wanted_tilt / drawn_tilt / (span * drawn_energy))


def thermal_start(sheet: Sheet, velocity_variance_m2_s2: float, rng: np.random.Generator) -> tuple[System, np.ndarray]:
    """The sheet in thermal motion: positions and velocities (N, 3) in Å/fs.

    The variance is of one component for 12C; other masses get it in inverse proportion. It is given, not taken from
    a temperature, because the potential's flexural phonons are too soft and its motion has no zero point. All atoms
    start at rest positions with twice that variance, half of which is potential energy some 100 fs later.
    """
    mass = sheet.system.mass_u
    sigma = np.sqrt(2 * velocity_variance_m2_s2 * MASS_U[6] / mass) * ANG_FS_PER_M_S
    velocity = rng.normal(size=(len(mass), 3)) * sigma[:, None]
    velocity -= (mass[:, None] * velocity).sum(axis=0) / mass.sum()
    flight = fly(sheet.system, velocity, sheet.struck, float(rng.uniform(80.0, 180.0)), STEP_FS)
    return flight.system, flight.velocity_ang_fs


def closes_in(number: int) -> bool:
    """Whether the energies of a shard are bisected: every second one of training, none of those that judge."""
    return split_of(number) == "train" and number % 2 == 1


def make_shard(seed: int, number: int, count: int, velocity_variance_m2_s2: float = 0.0) -> Trajectories:
    """Draw and run the recoils of one shard."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
    site, transfer, direction, weight = draw(rng, count, _NARROW_SHARE if closes_in(number) else 0.0)

    def outcome_of(row: int, transfer_ev: float) -> Result:
        sheet = sheet_of(SITES[site[row]])
        start = thermal_start(sheet, velocity_variance_m2_s2, rng) if velocity_variance_m2_s2 > 0 else None
        return run_recoil(Recoil(sheet.site, transfer_ev, direction[row]), start)

    if closes_in(number):
        row = np.repeat(np.arange(count), _TRIES)[:count]
        site, direction, weight = site[row], direction[row], np.zeros(count)
        firsts = range(0, count, _TRIES)
        pairs = [pair for first in firsts for pair in _close_in(first, _WINDOWS_EV[site[first]], outcome_of, rng)]
        pairs = pairs[:count]
        transfer, results = np.array([energy for energy, _ in pairs]), [result for _, result in pairs]
    else:
        results = [outcome_of(row, float(energy)) for row, energy in enumerate(transfer)]
    outcome = np.array([r.outcome for r in results], dtype=np.int8)
    side = np.array([r.silicon_side for r in results], dtype=np.int8)
    time_fs = np.array([r.time_fs for r in results])
    return Trajectories(site.astype(np.int8), transfer, direction, weight, outcome, side, time_fs)


def _close_in(
    row: int, window_ev: tuple[float, float], outcome_of: Callable[[int, float], Result], rng: np.random.Generator
) -> list[tuple[float, Result]]:
    """Energies and results of one direction: half of the tries close in on displacement, half on ejection.

    The next energy is a random one near the middle of the bracket, which is the window at first.
    """
    found: list[tuple[float, Result]] = []
    for events in (EVENTS["displaced"], EVENTS["ejected"]):
        for _ in range(_TRIES // 2):
            hits = [energy for energy, r in found if OUTCOMES[r.outcome] in events]
            above = min([window_ev[1], *hits])
            below = max([window_ev[0], *(e for e, r in found if OUTCOMES[r.outcome] not in events and e < above)])
            energy = float(below + (above - below) * rng.uniform(0.3, 0.7))
            found.append((energy, outcome_of(row, energy)))
    return found


def run(out: Path, settings: dict[str, Any], shards: list[int]) -> int:
    """Make whatever of `shards` is missing in `out`; returns the number of files made."""
    out.mkdir(parents=True, exist_ok=True)
    _check_settings(out, settings)
    missing = [number for number in shards if not shard_path(out, number).exists()]
    print(f"{len(shards)} shards planned, {len(missing)} of them to make in {out}", flush=True)
    sheet_of(SITES[0])  # compiles
    start, start_cpu = time.monotonic(), time.process_time()
    made = 0
    for done, number in enumerate(missing, 1):
        if not shard_path(out, number).exists():  # another process may have been here
            found = make_shard(settings["seed"], number, settings["trajectories"], settings["velocity_variance_m2_s2"])
            made += save_shard(shard_path(out, number), found, settings)
            told = ", ".join(f"{name} {int((found.outcome == k).sum())}" for k, name in enumerate(OUTCOMES))
            rate = 60 * made * settings["trajectories"] / (time.process_time() - start_cpu)
            left_min = (time.monotonic() - start) / done * (len(missing) - done) / 60
            print(
                f"{done}/{len(missing)} shard {number}: {told}  {rate:.0f} trajectories a core-minute, "
                f"{left_min:.1f} min left",
                flush=True,
            )
    return made


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raises RecordError where the folder holds trajectories of other settings."""
    for path in sorted(out.glob("recoil-*.npz"))[:1]:
        found = load_shard(path)[1]
        if found != settings:
            raise RecordError(f"{path} was made with {found}; given {settings}. Use another folder.")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run, or go on running, recoil trajectories.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the set")
    parser.add_argument("--shards", type=int, default=1200, help="files of the whole set (default 1200)")
    parser.add_argument("--trajectories", type=int, default=64, help="trajectories in a file (default 64)")
    parser.add_argument("--part", default="0/1", help="share of the work for this process, e.g. 0/4 (default 0/1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole set (default 0)")
    parser.add_argument(
        "--velocity-variance-m2-s2",
        type=float,
        default=0.0,
        help="of a carbon atom's velocity component before the impact (default 0: a sheet at rest)",
    )
    given = parser.parse_args(arguments)
    if given.shards < 1 or given.trajectories < 1 or given.velocity_variance_m2_s2 < 0:
        raise ConfigError("Shards and trajectories are at least 1 and the velocity variance is at least 0.")
    index, parts = (int(number) for number in given.part.split("/"))
    settings = {
        "seed": given.seed,
        "drawing": _DRAWING,
        "trajectories": given.trajectories,
        "velocity_variance_m2_s2": given.velocity_variance_m2_s2,
        "flight_fs": FLIGHT_FS,
        "step_fs": STEP_FS,
        "lattice_constant_ang": round(lattice_constant_ang(), 5),
    }
    run(given.out, settings, list(range(given.shards))[index::parts])


if __name__ == "__main__":
    main()
