"""Fit rates: from recordings of a doped sheet to the jump-rate map of a simulator, with its uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from stem_gym.core.config import parse, read_yaml
from stem_gym.core.errors import ConfigError, DataError, RecordError
from stem_gym.instruments.transitions import read_transitions
from stem_gym.simulator.jump_chain import PARAMETERS, join
from stem_gym.simulator.jump_fit import JumpFit, fit
from stem_gym.simulator.jumps import JumpMap

Watch = Callable[[str, float, float | None], None]  # what, how far, of how much


@dataclass(frozen=True)
class FitJob:
    """What to fit, and how wide the ranges are that are written."""

    recordings: Sequence[Path]  # files, or folders of episode_*.h5
    sds: float = 0.0
    reference_pa: float = 100.0
    level: float = 0.9
    fixed: Mapping[str, Any] = field(default_factory=dict)
    energy_kev: float | None = None  # of the recordings' beam: what the map holds for; null: it does not say


@dataclass(frozen=True)
class Rates:
    """A fitted map and what it was made of."""

    fit: JumpFit
    files: tuple[Path, ...]
    transitions: int
    jumps: int
    level: float
    intervals: Mapping[str, tuple[float, float]]
    section: Mapping[str, Any]

    def as_data(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "recordings": [str(path) for path in self.files],
            "transitions": self.transitions,
            "jumps": self.jumps,
            "log_likelihood": self.fit.log_likelihood,
            "level": self.level,
            "estimate": dict(self.fit.estimate),
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "fixed": list(self.fit.fixed),
            "config": overrides(self.section),
        }

    def table(self) -> Table:
        """The parameters with their intervals."""
        table = Table(title=f"{self.jumps} jumps in {self.transitions} transitions of {len(self.files)} recordings")
        for head in ("parameter", "estimate", f"{self.level:.0%} interval"):
            table.add_column(head)
        for name in PARAMETERS:
            low, high = self.intervals[name]
            note = "given" if name in self.fit.fixed else f"{low:.3g} to {high:.3g}"
            table.add_row(name, f"{self.fit.estimate[name]:.3g}", note)
        return table


def fit_rates(job: FitJob, watch: Watch | None = None) -> Rates:
    """The map of some recordings; `watch` is told after each file and each parameter.

    Raises RecordError for files that are missing, foreign or without transitions, DataError where the data tell too
    little; UnknownNameError for a fixed parameter that does not exist.
    """
    if not 0.0 < job.level < 1.0 or not 0.0 <= job.sds <= 10.0:
        raise DataError(f"The level lies between 0 and 1, sds between 0 and 10; given {job.level} and {job.sds}.")
    if job.energy_kev is not None and not 20.0 <= job.energy_kev <= 300.0:
        raise DataError(f"The beam energy lies between 20 and 300 keV; given {job.energy_kev:g}.")
    files, parts = _files(job.recordings), []
    for number, path in enumerate(files):
        parts.append(read_transitions(path))
        _tell(watch, "recordings", number + 1, len(files))
    transitions = join(parts)
    found = fit(transitions, job.reference_pa, job.fixed)
    intervals = {}
    for number, name in enumerate(PARAMETERS):
        intervals[name] = found.interval(name, job.level)
        _tell(watch, "intervals", number + 1, len(PARAMETERS))
    section = found.as_config(job.sds)
    if job.energy_kev is not None:
        section["valid_kev"] = {"low": job.energy_kev, "high": job.energy_kev}
    return Rates(found, tuple(files), len(transitions), transitions.jumps, job.level, intervals, section)


def overrides(section: Mapping[str, Any]) -> dict[str, Any]:
    """A rate section in its place: what `gymnasium.make(id, **…)` takes, and a variant's YAML holds."""
    return {"instrument": {"kinetics": {"jumps": dict(section)}}}


def write_rates(rates: Rates, path: Path) -> None:
    """The YAML of the rates. Raises RecordError where it can not be written."""
    lines = [f"# Jump rates from {rates.jumps} jumps in {rates.transitions} transitions."]
    for name in PARAMETERS:
        low, high = rates.intervals[name]
        how = "given" if name in rates.fit.fixed else f"{rates.level:.0%} interval {low:.4g} to {high:.4g}"
        lines.append(f"# {name}: {rates.fit.estimate[name]:.4g}, {how}")
    lines += [f"# from {path_.name}" for path_ in rates.files]
    text = "\n".join(lines) + "\n" + yaml.safe_dump(overrides(rates.section), sort_keys=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecordError(f"The rates can not be written to {path}: {error.strerror or error}.") from error


def read_rates(path: Path) -> JumpMap:
    """The map in a file that `write_rates` wrote. Raises ConfigError for one of another form."""
    place: Any = read_yaml(path)
    for key in ("instrument", "kinetics", "jumps"):
        if not isinstance(place, dict) or key not in place:
            raise ConfigError(f"{path} is no file of rates: instrument.kinetics.jumps is missing (at {key!r}).")
        place = place[key]
    if not isinstance(place, dict):
        raise ConfigError(f"{path}: instrument.kinetics.jumps must hold a mapping; given {place!r}.")
    return parse(JumpMap, place, str(path))


def _files(given: Sequence[Path]) -> list[Path]:
    if not given:
        raise RecordError("Give at least one recording: an HDF5 file of an episode, or a folder of them.")
    files: list[Path] = []
    for path in given:
        inside = sorted(path.glob("episode_*.h5")) if path.is_dir() else [path]
        if not inside:
            raise RecordError(f"The folder {path} holds no recordings (episode_*.h5).")
        files += inside
    return files


def _tell(watch: Watch | None, what: str, done: float, total: float) -> None:
    if watch is not None:
        watch(what, done, total)
