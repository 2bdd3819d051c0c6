"""Results of episodes: their summary, a table on the screen, JSON and CSV in a folder."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from stem_gym.core.errors import RecordError

Episode = Mapping[str, Any]
LEADING = ("success", "return", "seconds", "electrons", "measurements", "thinking_s")
_STEPWISE = ("reward_",)  # terms of the last step: kept in the files, no figure of an episode
_TWICE = ("episode_return",)
_VERSIONED = ("stem-gym", "torch", "gymnasium", "numpy", "stable-baselines3")


@dataclass(frozen=True)
class Outcome:
    """The episodes of one agent on one environment."""

    id: str
    agent: str
    config_hash: str
    episodes: Sequence[Episode]
    settings: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = True  # False where it was stopped before its last episode
    numbers: Sequence[int] | None = None  # which worlds the episodes are; 0, 1, … if not given

    def numbered(self) -> list[tuple[int, Episode]]:
        """The episodes, each with the number of its world."""
        return list(
            zip(range(len(self.episodes)) if self.numbers is None else self.numbers, self.episodes, strict=True)
        )


def versions() -> dict[str, str]:
    """Versions of what the figures depend on, and the machine in words."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def numbers_of(episodes: Sequence[Episode]) -> list[str]:
    """Names of the figures that every episode has, the common ones first."""
    names = [name for name, value in episodes[0].items() if isinstance(value, bool | int | float)] if episodes else []
    return [name for name in LEADING if name in names] + sorted(name for name in names if name not in LEADING)


def told_of(episodes: Sequence[Episode]) -> list[str]:
    """Those figures that say something about an episode as a whole."""
    return [name for name in numbers_of(episodes) if name not in _TWICE and not name.startswith(_STEPWISE)]


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error over the finite values; NaN where there are none, error NaN for a single one."""
    finite = [float(value) for value in values if math.isfinite(value)]
    if not finite:
        return math.nan, math.nan
    mean = sum(finite) / len(finite)
    if len(finite) == 1:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in finite) / (len(finite) - 1)
    return mean, math.sqrt(variance / len(finite))


def share_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (E. B. Wilson, J. Am. Stat. Assoc. 22, 209, 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, z * z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(outcome: Outcome) -> dict[str, Any]:
    """One flat row: mean and standard error of every figure, and the interval of the success rate."""
    row: dict[str, Any] = {"id": outcome.id, "agent": outcome.agent, "episodes": len(outcome.episodes)}
    for name in numbers_of(outcome.episodes):
        row[name], row[f"{name}_error"] = mean_and_error(float(episode[name]) for episode in outcome.episodes)
    wins = sum(bool(episode.get("success")) for episode in outcome.episodes)
    row["success_low"], row["success_high"] = share_interval(wins, len(outcome.episodes))
    return row | {"config_hash": outcome.config_hash, "complete": outcome.complete}


def shown(value: float, error: float = math.nan) -> str:
    """A figure for people: three significant digits, with its standard error where there is one."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1e6:
        large = f"{value:.3g} ± {error:.1g}" if math.isfinite(error) and error > 0 else f"{value:.3g}"
        return large.replace("e+0", "e").replace("e+", "e")
    digits = min(4, 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value)))))
    text = f"{value:,.{digits}f}"
    seen = math.isfinite(error) and error >= 0.5 * 10.0**-digits  # an error that rounds to nothing is not written
    return f"{text} ± {error:,.{digits}f}" if seen else text


def table(outcomes: Sequence[Outcome]) -> Table:
    """The comparison on one environment, a column for each agent: many figures, few agents."""
    rows = [summarise(outcome) for outcome in outcomes]
    episodes = ", ".join(sorted({str(row["episodes"]) for row in rows}))
    title = f"{outcomes[0].id}, {episodes} episodes each, mean ± standard error"
    result = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    result.add_column("", no_wrap=True)
    for row in rows:
        result.add_column(row["agent"] + ("" if row["complete"] else ", stopped"), justify="right")
    result.add_row("success, 95 %", *(_success(row) for row in rows))
    names = list(dict.fromkeys(name for outcome in outcomes for name in told_of(outcome.episodes)))
    for name in names:
        if name != "success":
            cells = (shown(row.get(name, math.nan), row.get(f"{name}_error", math.nan)) for row in rows)
            result.add_row(name, *cells)
    return result


def episode_table(outcome: Outcome) -> Table:
    """Every episode of one agent, a column each."""
    title = f"{outcome.agent} on {outcome.id}"
    result = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    result.add_column("episode", no_wrap=True)
    for number, _ in outcome.numbered():
        result.add_column(str(number), justify="right")
    for name in told_of(outcome.episodes):
        values = [float(episode[name]) for episode in outcome.episodes]
        yes_or_no = name.startswith("success")
        result.add_row(name, *(("yes" if value else "no") if yes_or_no else shown(value) for value in values))
    return result


def _success(row: Mapping[str, Any]) -> str:
    if "success" not in row:
        return "–"
    return f"{row['success']:.0%} ({row['success_low']:.0%}…{row['success_high']:.0%})"


def document(outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """Everything that was measured, as plain data."""
    return {
        "seed": seed,
        "versions": versions(),
        "summary": [plain(summarise(outcome)) for outcome in outcomes],
        "runs": [
            {
                "id": outcome.id,
                "agent": outcome.agent,
                "config_hash": outcome.config_hash,
                "settings": dict(outcome.settings),
                "complete": outcome.complete,
                "worlds": [number for number, _ in outcome.numbered()],
                "episodes": [plain(episode) for episode in outcome.episodes],
            }
            for outcome in outcomes
        ],
    }


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: a figure that does not exist is null."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def store(outcomes: Sequence[Outcome], seed: int, folder: Path) -> list[Path]:
    """Write `bench.json`, `summary.csv` and `episodes.csv`; each appears whole or not at all.

    Raises RecordError where the folder can not be written.
    """
    make_folder(folder)
    episodes = [
        {"id": outcome.id, "agent": outcome.agent, "episode": number} | plain(episode)
        for outcome in outcomes
        for number, episode in outcome.numbered()
    ]
    summary = [plain(summarise(outcome)) for outcome in outcomes]
    texts = {
        "bench.json": json.dumps(document(outcomes, seed), indent=1) + "\n",
        "summary.csv": _csv(summary),
        "episodes.csv": _csv(episodes),
    }
    return [write_whole(folder / name, text) for name, text in texts.items()]


def make_folder(folder: Path) -> Path:
    """The folder, made and shown to be writable before any work is put into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise RecordError(
            f"Can not write to the folder {folder}: {error.strerror or error}. Name a folder that you may write to."
        ) from error
    return folder


def write_whole(path: Path, text: str) -> Path:
    """Write the file under another name first, so that a kill leaves the old one or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
    return path


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
