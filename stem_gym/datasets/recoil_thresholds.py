"""Thresholds of molecular dynamics itself: python -m stem_gym.datasets.recoil_thresholds --out DIR

For every site and a handful of directions the lowest transferred energy from which a recoil displaces an atom,
exchanges silicon and carbon, or ejects the carbon atom: a scan in steps of 0.5 eV, then bisection. Close to a threshold
single energies may answer differently from their neighbours, so two steps of the scan have to agree. Writes
DIR/thresholds.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np

from stem_gym.core.errors import ConfigError, RecordError
from stem_gym.datasets.recoil_outcomes import Recoil, run_recoil, tilted
from stem_gym.datasets.recoil_shards import OUTCOMES, SITES

__all__ = ["DIRECTIONS_DEG", "EVENTS", "Threshold", "find_thresholds", "first_lasting", "load_thresholds"]

DIRECTIONS_DEG = ((0.0, 0.0), (10.0, 0.0), (10.0, 90.0), (10.0, 180.0), (20.0, 0.0), (20.0, 90.0), (20.0, 180.0))
EVENTS: dict[str, tuple[str, ...]] = {
    "displaced": ("exchange", "ejected", "other"),
    "exchange": ("exchange",),
    "ejected": ("ejected",),
}
SPAN_EV = (10.0, 29.0)
STEP_EV = 0.5
WITHIN_EV = 0.05


@dataclass(frozen=True)
class Threshold:
    """Of one event, at one site, in one direction."""

    site: str
    tilt_deg: float
    azimuth_deg: float  # from the direction to the partner
    event: str  # key of EVENTS
    transfer_ev: float | None  # None where the event does not happen within the span


def first_lasting(
    happens: Callable[[float], bool], span_ev: tuple[float, float], step_ev: float, within_ev: float
) -> float | None:
    """Lowest energy, to `within_ev`, from which `happens` holds for two steps of a scan; None where it never does.

    Raises ConfigError for a span that does not run upwards.
    """
    low, high = span_ev
    if not 0 < low < high:
        raise ConfigError(f"A span of energies runs from a positive low to a higher one; given {span_ev}.")
    energies = [float(e) for e in np.arange(low, high + 1e-9, step_ev)]
    for below, here, after in zip([low, *energies], energies, energies[1:], strict=False):
        if happens(here) and happens(after):
            above = here
            while above - below > within_ev:
                middle = 0.5 * (below + above)
                below, above = (below, middle) if happens(middle) else (middle, above)
            return 0.5 * (below + above)
    return None


def find_thresholds(site: str, tilt_deg: float, azimuth_deg: float) -> list[Threshold]:
    """The thresholds of all events at one site in one direction, by molecular dynamics of a sheet at rest."""
    direction = tilted(math.radians(tilt_deg), math.radians(azimuth_deg))

    @cache
    def outcome(transfer_ev: float) -> str:
        return OUTCOMES[run_recoil(Recoil(site, transfer_ev, direction)).outcome]

    found = []
    for event, outcomes in EVENTS.items():
        if event != "exchange" or site.startswith("silicon"):
            energy = first_lasting(lambda e, wanted=outcomes: outcome(e) in wanted, SPAN_EV, STEP_EV, WITHIN_EV)  # type: ignore[misc]
            found.append(Threshold(site, tilt_deg, azimuth_deg, event, energy))
    return found


def load_thresholds(folder: Path) -> list[Threshold]:
    """What the command wrote. Raises RecordError where that can not be read."""
    path = folder / "thresholds.json"
    try:
        return [Threshold(**entry) for entry in json.loads(path.read_text())["thresholds"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"No thresholds can be read from {path}: {error}. Make them: "
            f"python -m stem_gym.datasets.recoil_thresholds --out {folder}"
        ) from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Bisect the displacement thresholds of molecular dynamics.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the recoil trajectories")
    parser.add_argument("--sites", nargs="+", choices=SITES, default=SITES, help="only these sites (default all)")
    given = parser.parse_args(arguments)
    found: list[Threshold] = []
    for site in given.sites:
        for tilt_deg, azimuth_deg in DIRECTIONS_DEG:
            here = find_thresholds(site, tilt_deg, azimuth_deg)
            found += here
            told = ", ".join(f"{t.event} {'never' if t.transfer_ev is None else f'{t.transfer_ev:.2f}'}" for t in here)
            print(f"{site}, tilt {tilt_deg:.0f}°, azimuth {azimuth_deg:.0f}°: {told}", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {"span_ev": SPAN_EV, "step_ev": STEP_EV, "within_ev": WITHIN_EV}
    temporary = given.out / f"thresholds.{os.getpid()}.tmp"
    temporary.write_text(json.dumps({**settings, "thresholds": [asdict(t) for t in found]}, indent=1) + "\n")
    temporary.replace(given.out / "thresholds.json")


if __name__ == "__main__":
    main()
