"""Agents that move atoms, in the same worlds: success at a time limit, time to the goal, its cost, and regret.

python benchmarks/fabrication.py                  # 64 worlds each, 400 for pairs; stores results/fabrication.json
python benchmarks/fabrication.py --show           # prints the table of the stored figures
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import torch
from gymnasium.vector import AutoresetMode
from rich.console import Console

import agents
from stem_gym.core.errors import PolicyError
from stem_gym.core.streams import row_seeds
from stem_gym.jobs import outcome, times
from stem_gym.jobs.bench import hash_of
from stem_gym.jobs.outcome import Outcome
from stem_gym.jobs.progress import Progress

RESULTS = Path(__file__).parent / "results"
FILE = "fabrication.json"
IDS = tuple(
    f"stem_gym/BeamFabrication{name}-v0" for name in ("-lorentzian", "-lorentzian-slow", "", "-feedback", "-dimer")
)
AGENTS = ("uniform", "greedy", "greedy_feedback", "planner", "ppo")
BEST = "planner"
# Two agents whose difference is small against the spread between worlds: compared world by world, in more of them.
PAIRS = (("stem_gym/BeamFabrication-feedback-v0", "greedy_feedback", "greedy"),)
PAIR_EPISODES = 400
LIMITS_S = (60.0, 120.0, 300.0, 600.0)
CURVE_S = tuple(float(seconds) for seconds in range(10, 601, 10))
COLUMNS = {
    "censored_s": "censored mean time / s",
    "regret_s": "regret / s",
    "jumps": "jumps",
    "lost_atoms": "vacancies made",
    "electrons": "electrons",
}


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ids", nargs="*", default=list(IDS), help="environments to measure anew (default: all)")
    parser.add_argument("--episodes", type=int, default=64, help="worlds, played side by side")
    parser.add_argument("--seed", type=int, default=2026, help="seed of the worlds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--show", action="store_true", help="print the stored table, measure nothing")
    arguments = parser.parse_args()
    if not arguments.show:
        measure(arguments.ids, arguments.episodes, arguments.seed, arguments.out)
    print(markdown(json.loads((arguments.out / FILE).read_text())))


def measure(ids: Sequence[str], episodes: int, seed: int, folder: Path) -> None:
    """Run every agent that can act on each environment; the file is renewed after each, the others' rows are kept."""
    torch.set_num_threads(1)
    path = outcome.make_folder(folder) / FILE
    with Progress(Console(stderr=True)) as progress:
        for id in ids:
            fresh = _measure_one(id, episodes, seed, progress)
            fresh["pairs"] = [_measure_pair(pair, seed, progress) for pair in PAIRS if pair[0] == id]
            stored = json.loads(path.read_text()) if path.exists() else {}
            for part in ("summary", "curves", "pairs"):
                kept = [row for row in stored.get(part, []) if row["id"] != id]
                fresh[part] = kept + fresh[part]
            outcome.write_whole(path, json.dumps({"versions": outcome.versions()} | fresh, indent=1) + "\n")


def _measure_one(id: str, episodes: int, seed: int, progress: Progress) -> dict[str, Any]:
    """Summary rows and curves of all agents on one environment."""
    env = gymnasium.make_vec(id, num_envs=episodes, autoreset_mode=AutoresetMode.DISABLED)
    outcomes, expected = {}, {}
    task: Any = env.unwrapped
    stops = task.task_config["stop"] is not None  # the planner knows no such rule, and is no optimum there
    try:
        for name in AGENTS:
            try:
                policy = agents.make(name, env)
            except PolicyError:  # made for other variants, or not trained for this one
                continue
            if name == BEST:
                expected = _expected(policy, env, row_seeds(seed, episodes))
            found = agents.evaluate(policy, id, episodes, seed, env, _report(progress, id, name))
            outcomes[name] = Outcome(id, name, hash_of(env), found, policy.settings.model_dump(mode="json"))
    finally:
        env.close()
    rows = []
    for name, one in outcomes.items():
        best = None if stops else outcomes[BEST]
        row = times.summarise_times(one, LIMITS_S, best) | (expected if name == BEST else {})
        rows.append(row | {"seed": seed, "config_hash": one.config_hash, "settings": dict(one.settings)})
    curves = [{"id": id, "agent": name, "points": times.curve(one.episodes, CURVE_S)} for name, one in outcomes.items()]
    return {"summary": rows, "curves": curves}


def _measure_pair(pair: tuple[str, str, str], seed: int, progress: Progress) -> dict[str, Any]:
    """By how many seconds one agent reaches the goal before the other, in the same worlds; failures count the limit."""
    id, *names = pair
    env = gymnasium.make_vec(id, num_envs=PAIR_EPISODES, autoreset_mode=AutoresetMode.DISABLED)
    try:
        policies = [agents.make(name, env) for name in names]
        found = [
            agents.evaluate(policy, id, PAIR_EPISODES, seed, env, _report(progress, id, policy.name))
            for policy in policies
        ]
        config_hash = hash_of(env)
    finally:
        env.close()
    row: dict[str, Any] = {"id": id, "agent": names[0], "against": names[1], "episodes": PAIR_EPISODES, "seed": seed}
    row["config_hash"], limit_s = config_hash, LIMITS_S[-1]
    for name, episodes in zip(("agent", "against"), found, strict=True):
        seconds = outcome.mean_and_error(times.censored_s(episodes, limit_s))
        row[f"{name}_s"], row[f"{name}_s_error"] = seconds
    row["sooner_s"], row["sooner_s_error"] = times.regret_s(found[1], found[0], limit_s)
    return row


def _expected(policy: Any, env: Any, seeds: list[int]) -> dict[str, float]:
    """What the planner expects for these worlds, opening frame included; for one atom only."""
    if env.unwrapped.task_config["dopants"] > 1:
        return {}
    opening, info = env.reset(seed=seeds)
    return {"expected_s": float((policy.expected_s(opening) + info["seconds"]).mean())}


def _report(progress: Progress, id: str, agent: str) -> Callable[[int, int], None]:
    return lambda done, of: progress.episodes(id, agent, done, of)


def markdown(stored: Mapping[str, Any]) -> str:
    """The table of stored figures: mean ± standard error; failures count with the limit."""
    limits = [f"{limit_s:g} s" for limit_s in LIMITS_S[1:]]
    header = ["environment", "agent", *(f"success in {limit}" for limit in limits), *COLUMNS.values()]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join(lines + [_line(row) for row in stored["summary"]] + _pair_lines(stored.get("pairs", [])))


def _pair_lines(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each pair; the interval is that of the mean of paired differences."""
    lines = []
    for row in pairs:
        low, high = (row["sooner_s"] + side * 1.96 * row["sooner_s_error"] for side in (-1.0, 1.0))
        lines.append(
            f"\nIn {row['episodes']} equal worlds of {row['id'].rpartition('/')[2]} {row['agent']} takes "
            f"{outcome.shown(row['agent_s'], row['agent_s_error'])} s and {row['against']} "
            f"{outcome.shown(row['against_s'], row['against_s_error'])} s: world by world it is "
            f"{row['sooner_s']:.1f} s sooner (95 % interval {low:.1f} to {high:.1f} s)."
        )
    return lines


def _line(row: Mapping[str, Any]) -> str:
    cells = [row["id"].rpartition("/")[2], row["agent"]]
    for limit_s in LIMITS_S[1:]:
        name = f"success_{limit_s:g}s"
        cells.append(f"{row[name]:.0%} ({row[f'{name}_low']:.0%}–{row[f'{name}_high']:.0%})")
    for name in COLUMNS:
        value, error = row.get(name), row.get(f"{name}_error")
        nan = float("nan")
        cells.append("–" if value is None else outcome.shown(float(value), nan if error is None else float(error)))
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
