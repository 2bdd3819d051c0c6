"""How true the images are: physics model and surrogate against abTEM, by energy and specimen, and how much faster.

    python benchmarks/fidelity.py                    # all held-out pictures and the speed; stores results/fidelity.json
    python benchmarks/fidelity.py --quick --out /tmp # four pictures, no abTEM
    python benchmarks/fidelity.py --data DIR         # a freshly made reference set instead of the shipped pictures

Both are compared with and without the usual source of 0.7 Å. The speed of abTEM is that of its own multislice scan of
one picture, measured on some of its probe places and phonon configurations; times are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import stem_gym
from stem_gym.datasets.pictures import HAADF, Picture, load_bundle
from stem_gym.simulator import imaging as physics
from stem_gym.simulator.optics import Optics, transfer_function
from stem_gym.simulator.specimens import Specimen
from stem_gym.surrogates.imaging import ImagingSurrogate, grid_shape
from stem_gym.surrogates.imaging_card import held_out_scores, pooled, table_rows
from stem_gym.surrogates.imaging_reference import load_set, optics_of, score, specimen_of
from stem_gym.surrogates.surrogate import UncertaintyWarning

HERE = Path(__file__).parent
SHIPPED = HERE / "held_out_haadf.npz"
QUICK = 4
TIMED_PLACES = (6, 6)
SPEED_PICTURES = ("held_out-graphene_silicon-0-60kev", "held_out-mos2-0-60kev")


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of a reference set; by default the shipped held-out pictures")
    parser.add_argument("--quick", action="store_true", help="a few pictures, and the speed without abTEM")
    parser.add_argument(
        "--configurations", type=int, default=4, help="phonon configurations abTEM is timed with (default 4)"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    pictures = load_set(given.data, "held_out") if given.data else load_bundle(SHIPPED)
    if given.quick:
        pictures = dict(list(pictures.items())[:: max(1, len(pictures) // QUICK)])
    surrogate = ImagingSurrogate.load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncertaintyWarning)  # gold is heavier than anything it was trained on
        rows = compare(surrogate, pictures)
    speed = measure_speed(surrogate, pictures, 0 if given.quick else given.configurations)
    results = {
        "machine": {"processor": processor(), "python": platform.python_version(), "threads": 1},
        "versions": {"stem_gym": stem_gym.__version__, "torch": str(torch.__version__), "abtem": abtem_version()},
        "summary": summarise(rows),
        "speed": speed,
        "pictures": rows,
    }
    report(rows, speed)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "fidelity.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"Stored in {path}")


def compare(surrogate: ImagingSurrogate, pictures: Mapping[str, Picture]) -> list[dict[str, Any]]:
    """One entry for each picture and source size: the scores of the surrogate and of the physics model."""
    rows = held_out_scores(surrogate, pictures)
    for row in rows:
        picture = pictures[row["name"]]
        specimen, optics = specimen_of(picture), optics_of(picture, row["source_fwhm_ang"])
        image = physics_map(specimen, optics, grid_shape(specimen.cell_ang))
        row["physics"] = asdict(score(picture, image, None, row["source_fwhm_ang"]))
    return rows


def physics_map(specimen: Specimen, optics: Optics, shape: tuple[int, int]) -> torch.Tensor:
    """The simulator's own expected image on a pixel grid: (B, ny, nx)."""
    harmonics = physics.Harmonics(nx=shape[1] // 2, ny=2 * (shape[0] // 2) - 1)
    weight = physics.atom_weights_ang2(specimen, optics.energy_kev, HAADF.inner_mrad, HAADF.outer_mrad)
    structure = physics.structure_coefficients(specimen, weight, harmonics)
    transfer = transfer_function(optics, *harmonics.frequencies(specimen.cell_ang))
    return physics.image_grid(physics.image_coefficients(structure, transfer), *shape)


def measure_speed(
    surrogate: ImagingSurrogate, pictures: Mapping[str, Picture], configurations: int
) -> list[dict[str, Any]]:
    """Seconds a picture: surrogate and physics model in batches, and abTEM's own scan of the same picture.

    abTEM is run for some of the probe places and phonon configurations, and its time scaled to all of them: every place
    and every configuration is the same work again.
    """
    entries = []
    for name in [n for n in SPEED_PICTURES if n in pictures] or list(pictures)[:1]:
        picture = pictures[name]
        specimen, optics = specimen_of(picture), optics_of(picture, 0.7)
        shape = grid_shape(specimen.cell_ang)
        entry: dict[str, Any] = {
            "picture": name,
            "grid": list(shape),
            "batch": len(picture.optics),
            "surrogate_s": cpu_seconds(lambda s=specimen, o=optics, g=shape: surrogate.estimate(s, o, g))
            / len(picture.optics),
            "physics_s": cpu_seconds(lambda s=specimen, o=optics, g=shape: physics_map(s, o, g)) / len(picture.optics),
        }
        if configurations:
            entry |= time_abtem(picture, configurations)
            entry["ratio"] = entry["abtem_s"] / entry["surrogate_s"]
        entries.append(entry)
    return entries


def cpu_seconds(call: Any, least_s: float = 2.0) -> float:
    """CPU seconds of one call, the mean over at least two seconds after a first one."""
    call()
    start, count = time.process_time(), 0
    while time.process_time() - start < least_s:
        call()
        count += 1
    return (time.process_time() - start) / count


def time_abtem(picture: Picture, configurations: int, setting: int = 0) -> dict[str, Any]:
    """CPU seconds of `abtem.Probe.scan` for one picture, and its R² with the contraction that made the reference."""
    from stem_gym.datasets.direct_scan import abtem_scan, contracted_scan, scan_shape
    from stem_gym.datasets.phonon_potentials import phonon_potentials

    places = int(np.prod(scan_shape(picture, setting)))
    build_s = cpu_seconds(
        lambda: phonon_potentials(picture.specimen, picture.settings.energy_kev, configurations, picture.settings.seed)
    )
    start = time.process_time()
    direct = abtem_scan(picture, setting, configurations, TIMED_PLACES)
    scan_s = time.process_time() - start - build_s
    one_configuration_s = (build_s + scan_s * places / direct.size) / configurations
    ours = contracted_scan(picture, setting, configurations, direct.shape)
    agreement = 1 - float(np.sum((direct - ours) ** 2) / np.sum((direct - direct.mean()) ** 2))
    return {
        "abtem_measured_s": build_s + scan_s,
        "abtem_measured_configurations": configurations,
        "abtem_measured_places": int(direct.size),
        "configurations": picture.settings.configurations,
        "places": places,
        "abtem_s": one_configuration_s * picture.settings.configurations,
        "r2_contraction_against_abtem": agreement,
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """R² of each model and coverage, pooled over the held-out specimens of seen and of unseen kinds."""
    found: dict[str, Any] = {}
    for fwhm in sorted({row["source_fwhm_ang"] for row in rows}):
        for unseen in (False, True):
            chosen = [r for r in rows if r["source_fwhm_ang"] == fwhm and r["unseen_kind"] == unseen]
            if chosen:
                scores = {model: pooled(chosen, model) for model in ("physics", "sum_over_atoms", "surrogate")}
                found[f"source {fwhm} Å, {'unseen' if unseen else 'seen'} kinds"] = {
                    **{f"r2_{model}": value.r2 for model, value in scores.items()},
                    "coverage_90": scores["surrogate"].coverage,
                    "reference_noise": scores["surrogate"].noise_share,
                }
    return found


def report(rows: list[dict[str, Any]], speed: list[dict[str, Any]]) -> None:
    """Print the tables."""
    console = Console()
    console.width = max(console.width, 118)  # names of specimens are to be read whole
    columns = ("specimen", "keV", "R² physics", "R² sum over atoms", "R² surrogate", "worst", "noise", "in 90 %")
    for fwhm in (0.7, 0.0):
        table = Table(*columns, title=f"Held-out specimens against abTEM, source {fwhm} Å")
        for line in table_rows(rows, fwhm, ("physics", "sum_over_atoms", "surrogate")):
            table.add_row(*line)
        console.print(table)
    for entry in speed:
        console.print(
            f"{entry['picture']}: surrogate {entry['surrogate_s'] * 1e3:.2f} ms, "
            f"physics {entry['physics_s'] * 1e3:.2f} ms"
            + (f", abTEM {entry['abtem_s']:.0f} s, ratio {entry['ratio']:,.0f}" if "ratio" in entry else "")
        )


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def abtem_version() -> str | None:
    """abTEM's version, or None where it is not installed."""
    try:
        import abtem
    except ImportError:
        return None
    return str(abtem.__version__)


if __name__ == "__main__":
    main()
