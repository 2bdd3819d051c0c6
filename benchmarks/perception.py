"""What the atom finders find, by dose and condition, how well the lattice and the drift are told, and how fast.

    python benchmarks/perception.py                    # minutes; stores results/perception.json
    python benchmarks/perception.py --quick --out /tmp # a minute

Frames are simulated, of other seeds than training and model card used. Times are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table

import stem_gym
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.surrogates.atom_finder import ClassicalFinder, Finder, Found, Kind, NetworkFinder, find_atoms
from stem_gym.surrogates.atom_finder_card import USUAL, held_out_conditions, held_out_scores
from stem_gym.surrogates.atom_finder_frames import Frames, simulate_frames
from stem_gym.surrogates.atom_finder_scores import SAME_ANG
from stem_gym.surrogates.frame_drift import estimate_drift
from stem_gym.surrogates.lattice_fit import Lattice, fit_lattice
from stem_gym.surrogates.spots import distances

SEED = 31_337
SPEED_ROWS = (1, 64)


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--frames", type=int, default=256, help="frames of each condition, four times at the usual one")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each figure of speed")
    parser.add_argument("--quick", action="store_true", help="16 frames, one second")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    given = parser.parse_args()
    if given.quick:
        given.frames, given.seconds = 16, 1.0
    torch.set_num_threads(1)
    finders: dict[str, Finder] = {"network": NetworkFinder.load(), "classical": ClassicalFinder()}
    results = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": 1},
        "versions": {"stem_gym": stem_gym.__version__, "torch": str(torch.__version__)},
        "found": held_out_scores(finders, given.frames, SEED),
        "lattice": lattice_figures(finders, given.frames),
        "frames_per_s": speed(finders, given.seconds),
    }
    report(results)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / ("perception-quick.json" if given.quick else "perception.json")
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    print(f"Stored in {path}")


def frames_of(name: str, rows: int, seed: int = SEED) -> Frames:
    """Fresh frames of one of the held-out conditions."""
    streams = Streams(row_seeds(seed, rows))
    streams.next_episode(torch.arange(rows))
    return simulate_frames(held_out_conditions(rows)[name], streams)


def lattice_figures(finders: dict[str, Finder], frames: int) -> list[dict[str, Any]]:
    """How often the lattice is found, how true its angle is, and how many found silicon atoms get their own site."""
    entries = []
    for name in held_out_conditions(1):
        batch = frames_of(name, min(frames, 64), SEED + 1)
        scale = batch.pixel_ang[:, None, None]
        true = fit_lattice(batch.xy * scale, batch.present)
        for label, finder in finders.items():
            found = find_atoms(batch.fraction, batch.pixel_ang, batch.electrons_per_pixel, finder)
            atoms = found.are(Kind.CARBON, Kind.SILICON, Kind.HEAVY)
            lattice = fit_lattice(found.xy * scale, atoms)
            turn = lattice.orientation_rad - true.orientation_rad + math.pi / 6.0
            off = (torch.remainder(turn, math.pi / 3.0) - math.pi / 6.0)[lattice.found]
            entries.append(
                {
                    "conditions": name,
                    "finder": label,
                    "frames": len(batch.pixel_ang),
                    "found_share": float(lattice.found.float().mean()),
                    "angle_rms_mrad": 1e3 * float(off.square().mean().sqrt()) if len(off) else None,
                    "silicon_on_its_site": on_its_site(batch, found, lattice),
                }
            )
    return entries


def on_its_site(batch: Frames, found: Found, lattice: Lattice) -> float | None:
    """Share of the found silicon atoms whose site is the one nearest to the true place of the atom."""
    scale = batch.pixel_ang[:, None, None]
    silicon = batch.present & (batch.kind == int(Kind.SILICON))
    away = distances(batch.xy, found.xy) * scale
    away = torch.where(found.are(Kind.SILICON)[:, None], away, torch.inf)
    nearest, partner = away.min(2)
    true_site, place = lattice.sites(batch.xy * scale)
    told_site, _ = lattice.sites(found.xy * scale)
    told_site = told_site.gather(1, partner[..., None].expand(-1, -1, 3))
    near = (place - batch.xy * scale).norm(dim=-1) < 0.5 * SAME_ANG  # a site is meant by a site's place, not by luck
    right = (told_site == true_site).all(-1) & near
    counted = silicon & (nearest < SAME_ANG) & lattice.found[:, None]
    return float(right[counted].float().mean()) if bool(counted.any()) else None


def speed(finders: dict[str, Finder], seconds: float) -> list[dict[str, Any]]:
    """Frames of 64 x 64 pixels a second for finders, lattice fit and drift estimate, in small and large batches."""
    entries = []
    for rows in SPEED_ROWS:
        for label, call in calls_on(frames_of(USUAL, rows), finders).items():
            entries.append({"what": label, "batch": rows, "frames_per_s": rows * _rate(call, seconds)})
    return entries


def calls_on(batch: Frames, finders: dict[str, Finder]) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    atoms, later = batch.xy * batch.pixel_ang[:, None, None], batch.fraction.roll(3, 2)

    def finding(finder: Finder) -> Callable[[], Any]:
        return lambda: find_atoms(batch.fraction, batch.pixel_ang, batch.electrons_per_pixel, finder)

    return {
        **{label: finding(finder) for label, finder in finders.items()},
        "lattice fit": lambda: fit_lattice(atoms, batch.present),
        "drift": lambda: estimate_drift(batch.fraction, later, batch.pixel_ang),
    }


def _rate(call: Callable[[], Any], seconds: float) -> float:
    """Calls per CPU second."""
    call()
    count, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        call()
        count += 1
    return count / (time.process_time() - start)


def report(results: dict[str, Any]) -> None:
    """Print what was measured."""
    console = Console()
    table = Table("frames", "finder", "Si", "found", "false", "rms / Å", title="silicon")
    for entry in results["found"]:
        silicon = entry["silicon"]
        shown = (_percent(silicon["found_share"]), _percent(silicon["false_share"]), _number(silicon["rms_ang"]))
        table.add_row(entry["conditions"], entry["finder"], str(silicon["atoms"]), *shown)
    console.print(table)
    table = Table("frames", "finder", "lattice found", "angle rms / mrad", "Si on its site", title="lattice")
    for entry in results["lattice"]:
        angle, sites = _number(entry["angle_rms_mrad"]), _percent(entry["silicon_on_its_site"])
        table.add_row(entry["conditions"], entry["finder"], _percent(entry["found_share"]), angle, sites)
    console.print(table)
    table = Table("what", "batch", "frames/s", title="speed, one thread")
    for entry in results["frames_per_s"]:
        table.add_row(entry["what"], str(entry["batch"]), f"{entry['frames_per_s']:.0f}")
    console.print(table)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100.0 * value:.2f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
