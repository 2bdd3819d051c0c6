"""Agents that tell laws apart, in the same worlds: how soon, how surely, how rightly, and at what cost.

python benchmarks/hypotheses.py                             # 200 worlds each; stores results/hypotheses.json
python benchmarks/hypotheses.py --ids std --agents eig,ppo  # some of it; the rest of the file is kept
python benchmarks/hypotheses.py --show                      # prints the table of the stored figures

The referee of every agent has 4,096 particles a law, to make hours of minutes; the agents' own default is 16,384. A
claim is a declaration with 0.95 or more. Regret is what the best simple rule of the same worlds (experiments by chance
or in an even sequence, or the hand-made rules of when to tune) earns more.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from rich.console import Console

import agents
from stem_gym.core.errors import PolicyError
from stem_gym.jobs import outcome
from stem_gym.jobs.bench import hash_of
from stem_gym.jobs.progress import Progress

RESULTS = Path(__file__).parent / "results"
FILE = "hypotheses.json"
LEVELS = {
    "std": "stem_gym/HypothesisDiscrimination-v0",
    **{
        name: f"stem_gym/HypothesisDiscrimination-{name}-v0"
        for name in ("easy", "hard", "drift", "site", "open", "damage", "coarsening", "image")
    },
    **{name: f"stem_gym/HypothesisDiscrimination-{name}-v0" for name in ("belief", "drift-belief", "site-belief")},
}
AGENTS = (
    "uniform",
    "random_designs",
    "sobol",
    "hypothesis_learning",
    "bma_variance",
    "box_hill",
    "eig",
    "eig_per_cost",
    "lookahead",
    "open_set",
    "tuning_rules",
    "ppo",
)
SIMPLE_RULES = ("random_designs", "sobol", "tuning_rules")
SETTINGS = {"particles": 4096}
ROWS = 50
MEANS = {
    "right": "claim_right",
    "log_score": "log_score",
    "brier": "brier",
    "score": "score_with_costs",
    "return": "return",
    "experiments": "experiments",
    "enabling": "enabling",
    "seconds": "seconds",
    "confident": "confident",
    "confident_wrong": "confident_wrong",
}
NEVER = 10_000  # stands for "no right claim" where medians are taken


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ids", default=",".join(LEVELS), help="levels to measure anew (default: all)")
    parser.add_argument("--agents", default=",".join(AGENTS), help="agents to measure anew (default: all)")
    parser.add_argument("--episodes", type=int, default=200, help="worlds")
    parser.add_argument("--seed", type=int, default=2026, help="seed of the worlds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--show", action="store_true", help="print the stored table, measure nothing")
    given = parser.parse_args()
    if not given.show:
        measure(given.ids.split(","), given.agents.split(","), given.episodes, given.seed, given.out)
    print(markdown(json.loads((given.out / FILE).read_text())))


def measure(levels: Sequence[str], names: Sequence[str], episodes: int, seed: int, folder: Path) -> None:
    """Run agents on levels; the file is renewed after each, the others' rows are kept."""
    torch.set_num_threads(1)
    path = outcome.make_folder(folder) / FILE
    with Progress(Console(stderr=True)) as progress:
        for level in levels:
            id = LEVELS[level]
            env = gymnasium.make_vec(id, num_envs=min(ROWS, episodes), autoreset_mode=AutoresetMode.DISABLED)
            for name in names:
                try:
                    policy = agents.make(name, env, **(SETTINGS if name not in ("uniform", "ppo") else {}))
                except PolicyError:  # not trained for this one
                    continue
                started = time.perf_counter()
                found = agents.evaluate(policy, id, episodes, seed, env, _report(progress, id, name))
                row = {"level": level, "id": id, "agent": name, "episodes": episodes, "seed": seed}
                row |= summary(found) | {"config_hash": hash_of(env), "wall_s": time.perf_counter() - started}
                stored = json.loads(path.read_text()) if path.exists() else {"summary": []}
                kept = [one for one in stored["summary"] if (one["level"], one["agent"]) != (level, name)]
                order = [(one, other) for one in LEVELS for other in AGENTS]
                rows = sorted([*kept, row], key=lambda one: order.index((one["level"], one["agent"])))
                outcome.write_whole(
                    path, json.dumps({"versions": outcome.versions(), "summary": rows}, indent=1) + "\n"
                )
            env.close()


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of one agent on one level, with intervals."""
    row: dict[str, Any] = {}
    for name, key in MEANS.items():
        row[name], row[f"{name}_error"] = outcome.mean_and_error([float(episode[key]) for episode in found])
    claims = [episode for episode in found if episode["confident"]]
    right = sum(1 for episode in claims if not episode["confident_wrong"])
    row["claims"], row["claims_right"] = len(claims), right
    soonest = [int(e["experiments"]) if e["confident"] and not e["confident_wrong"] else NEVER for e in found]
    row["median"], row["median_low"], row["median_high"] = median_of(soonest)
    row["thinking_s"] = sum(e["thinking_s"] for e in found) / max(1.0, sum(e["measurements"] for e in found))
    return row


def median_of(values: Sequence[int]) -> tuple[float, float, float]:
    """Median, and the 95 % interval that order statistics give it."""
    ordered = sorted(values)
    count = len(ordered)
    reach = 1.96 * math.sqrt(count) / 2.0
    low, high = max(0, math.floor(count / 2 - reach)), min(count - 1, math.ceil(count / 2 + reach))
    return float(np.median(ordered)), float(ordered[low]), float(ordered[high])


def markdown(stored: Mapping[str, Any]) -> str:
    """The table of stored figures: mean ± standard error; a median counts episodes without a right claim as longest."""
    header = [
        "level",
        "agent",
        "episodes",
        "experiments to a right claim",
        "claims",
        "of these right",
        "right at the end",
    ]
    header += ["log score", "Brier", "score with costs", "regret", "confident and wrong", "enabling", "seconds"]
    header += ["thinking / s"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    rows = stored["summary"]
    best = {level: max(scores) for level in LEVELS if (scores := _simple_scores(rows, level))}
    return "\n".join(lines + [_line(row, best.get(same_worlds(row["level"]))) for row in rows])


def same_worlds(level: str) -> str:
    """The level with the same worlds, without a referee beside the agent."""
    return level.removesuffix("belief").removesuffix("-") or "std"


def _simple_scores(rows: Sequence[Mapping[str, Any]], level: str) -> list[float]:
    return [row["score"] for row in rows if row["level"] == level and row["agent"] in SIMPLE_RULES]


def _line(row: Mapping[str, Any], best: float | None) -> str:
    def count(value: float) -> str:
        return "never" if value >= NEVER / 2 else f"{value:g}"

    median = f"{count(row['median'])} ({count(row['median_low'])}–{count(row['median_high'])})"
    claims = row["claims"]
    cells = [row["level"], row["agent"], f"{row['episodes']:,}", median, f"{claims / row['episodes']:.0%}"]
    cells.append(f"{row['claims_right'] / claims:.1%}" if claims else "–")
    cells += [outcome.shown(row[name], row[f"{name}_error"]) for name in ("right", "log_score", "brier", "score")]
    cells.append("–" if best is None else f"{round(best - row['score'], 3) + 0.0:.3f}")
    cells.append(f"{row['confident_wrong']:.1%}")
    cells += [outcome.shown(row[name], row[f"{name}_error"]) for name in ("enabling", "seconds")]
    cells.append(f"{row['thinking_s']:.2g}")
    return f"| {' | '.join(cells)} |"


def _report(progress: Progress, id: str, agent: str) -> Callable[[int, int], None]:
    return lambda done, of: progress.episodes(id, agent, done, of)


if __name__ == "__main__":
    main()
