"""The agents that ship on every environment, in the same worlds; prints the README's table and stores the figures.

python benchmarks/leaderboard.py                  # 100 episodes each; stores results/leaderboard.json
python benchmarks/leaderboard.py --show           # prints the table of the stored figures
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from stem_gym.envs.registration import variant_files
from stem_gym.jobs import bench, outcome
from stem_gym.jobs.demo import usable_agents
from stem_gym.jobs.progress import Progress

RESULTS = Path(__file__).parent / "results"
FILE = "leaderboard.json"
COLUMNS = {
    "success": "success (95 % interval)",
    "targets_served": "targets served",
    "useful_share": "useful electrons",
    "pointing_error_pm": "pointing error / pm",
    "seconds": "seconds",
    "return": "return",
}


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ids", nargs="*", help="environments to measure anew (default: all)")
    parser.add_argument("--episodes", type=int, default=100, help="episodes of each agent on each environment")
    parser.add_argument("--seed", type=int, default=2026, help="seed of the worlds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--show", action="store_true", help="print the stored table, measure nothing")
    arguments = parser.parse_args()
    if not arguments.show:
        measure(arguments.ids or list(variant_files()), arguments.episodes, arguments.seed, arguments.out)
    print(markdown(json.loads((arguments.out / FILE).read_text())))


def measure(ids: Sequence[str], episodes: int, seed: int, folder: Path) -> None:
    """Run every agent that can act on each environment; the file is renewed after each, the others' rows are kept."""
    torch.set_num_threads(1)
    path = outcome.make_folder(folder) / FILE
    with Progress(Console(stderr=True)) as progress:
        for id in ids:
            outcomes = bench.bench(bench.Plan([id], usable_agents(id), episodes, seed), None, progress.episodes)
            fresh = outcome.document(outcomes, seed)
            fresh.pop("runs")  # thousands of episodes; the summary is what is shown
            kept = json.loads(path.read_text())["summary"] if path.exists() else []
            fresh["summary"] = [row for row in kept if row["id"] != id] + fresh["summary"]
            outcome.write_whole(path, json.dumps(fresh, indent=1) + "\n")


def markdown(stored: Mapping[str, Any]) -> str:
    """The README's table of stored figures: mean ± standard error."""
    lines = ["| environment | agent | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    lines += [_line(row) for row in _sorted(stored["summary"])]
    return "\n".join(lines)


def _sorted(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The default variant first, then by name."""
    return sorted(rows, key=lambda row: (row["id"].count("-"), row["id"]))


def _line(row: Mapping[str, Any]) -> str:
    cells = [row["id"].rpartition("/")[2], row["agent"]]
    for name in COLUMNS:
        value, error = row.get(name), row.get(f"{name}_error")
        if value is None:
            cells.append("–")
        elif name == "success":
            cells.append(f"{value:.0%} ({row['success_low']:.0%}–{row['success_high']:.0%})")
        elif name == "useful_share":
            cells.append(f"{100 * value:.3g} %")
        else:
            cells.append(outcome.shown(float(value), float("nan") if error is None else float(error)))
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
