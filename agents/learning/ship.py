"""Put a trained policy among those that ship, with its curve and a page of measured figures.

python -m agents.learning.ship RUN [--episodes 100] [--seed 7] [--against uniform,greedy]
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import torch
from gymnasium.vector import AutoresetMode

from agents.engine.evaluate import evaluate
from agents.engine.roster import load, make
from agents.engine.storage import ARRAYS, CONTRACT, read_contract, write_whole
from agents.learning.curve import FILE as CURVE
from agents.learning.history_network import HistorySettings
from agents.learning.imitation import Imitation
from agents.learning.map_network import MapSettings
from agents.learning.network import NetworkSettings
from agents.learning.run import Training
from stem_gym.core.errors import StemGymError

_WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
_FIGURES = {
    "return": "return",
    "success": "success",
    "targets_served": "targets served",
    "useful_share": "useful share of electrons",
    "pointing_error_pm": "pointing error / pm",
    "goal_s": "time to the goal where it was reached / s",
    "jumps": "jumps",
    "lost_atoms": "vacancies made",
    "best_share": "best found, part of the range",
    "area_under_best": "area under the best so far",
    "found_top1_share": "share of the best 1 % found",
    "measurements_to_90": "measurements to 90 % where it was reached",
    "claim_right": "claims that were right",
    "log_score": "log score",
    "brier": "Brier score",
    "score_with_costs": "score with costs",
    "experiments": "experiments",
    "enabling": "enabling actions",
    "seconds": "microscope time / s",
    "measurements": "actions",
}
_ROWS = 32


def ship(run: Path, episodes: int, seed: int, against: Sequence[str]) -> Path:
    """Copy the policy of the folder `run` to where shipped ones are, evaluate it beside others, write README.md."""
    contract = read_contract(run)
    id = contract["id"]
    env = gymnasium.make_vec(id, num_envs=min(_ROWS, episodes), autoreset_mode=AutoresetMode.DISABLED)
    results = {contract["agent"]: evaluate(load(run, env), id, episodes, seed, env=env)}
    for name in against:
        results[name] = evaluate(make(name, env), id, episodes, seed, env=env)
    env.close()
    folder = _WEIGHTS / contract["agent"] / id.rpartition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    for name in (ARRAYS, CONTRACT, CURVE, "curve.png"):
        if (run / name).exists():
            shutil.copyfile(run / name, folder / name)
    known = [key for key in _FIGURES if all(any(key in row for row in rows) for rows in results.values())]
    evaluation = {name: {key: _mean(rows, key) for key in known} for name, rows in results.items()}
    facts = {"episodes": episodes, "seed": seed, "mean_and_standard_error": evaluation}
    write_whole(folder / "evaluation.json", (json.dumps(facts, indent=1) + "\n").encode())
    write_whole(folder / "README.md", page(contract, evaluation, episodes, seed).encode())
    return folder


def page(contract: Mapping[str, Any], evaluation: Mapping[str, Any], episodes: int, seed: int) -> str:
    """The README of a shipped policy."""
    training = contract["training"]
    names = list(evaluation)
    table = ["| mean ± standard error | " + " | ".join(f"`{name}`" for name in names) + " |"]
    table.append("|---|" + "---|" * len(names))
    for key in evaluation[names[0]]:
        cells = (f"{mean:.3g} ± {error:.2g}" for mean, error in (evaluation[name][key] for name in names))
        table.append(f"| {_FIGURES[key]} | " + " | ".join(cells) + " |")
    warm = training.get("warm_start")
    draws = bool(contract["settings"].get("history", {}).get("draws"))
    acts = "are drawn from it as well" if draws else "are the most likely ones"
    start = f"Warm start: {warm['from']}; the rest is reinforcement learning.\n\n" if warm else ""
    return f"""# {contract["agent"]} for {contract["id"]}

{training["algorithm"]}, {training["steps"]:,} steps in {training["seconds"] / 60:.0f} minutes. {start}Made by

    {command(contract)}

(the last digits depend on the machine), then evaluated and put here by

    python -m agents.learning.ship RUN --episodes {episodes} --seed {seed} --against {",".join(names[1:])}

{episodes} episodes each, the same worlds for all:

{chr(10).join(table)}

`curve.csv` and `curve.png` show the learning. Actions of the curve are drawn from what was learned, those of the
table {acts}. Arrays: `{ARRAYS}`; what they were made for: `{CONTRACT}`.
"""


def command(contract: Mapping[str, Any]) -> str:
    """The command that trains such a policy: what differs from the defaults."""
    training = contract["training"]
    words = [f"stem-gym train {contract['agent']} {contract['id']} --out RUN"]
    for path, value in _paths(training.get("overrides", {})):
        plain = json.dumps(value, separators=(",", ":"))
        words.append(f"--set {shlex.quote(f'{path}={plain}')}")
    words += _differences(training["settings"], Training)
    if network := _changed(contract["settings"].get("network", {}), NetworkSettings):
        words.append(f"--with 'network={json.dumps(network, separators=(',', ':'))}'")
    if maps := _changed(contract["settings"].get("maps", {}), MapSettings):
        words.append(f"--with 'maps={json.dumps(maps, separators=(',', ':'))}'")
    if history := _changed(contract["settings"].get("history", {}), HistorySettings):
        words.append(f"--with 'history={json.dumps(history, separators=(',', ':'))}'")
    if warm := training.get("warm_start"):
        inner = json.dumps(_changed(warm, Imitation), separators=(",", ":"))
        words.append(f"--with 'imitation={inner}'")
    return " ".join(words)


def _paths(overrides: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Nested overrides as key paths and values."""
    found = []
    for key, value in overrides.items():
        found += _paths(value, f"{before}{key}.") if isinstance(value, Mapping) else [(f"{before}{key}", value)]
    return found


def _differences(settings: Mapping[str, Any], model: type[Any]) -> list[str]:
    return [f"--with {key}={json.dumps(value)}" for key, value in _changed(settings, model).items()]


def _changed(settings: Mapping[str, Any], model: type[Any]) -> dict[str, Any]:
    defaults = model().model_dump(mode="json")
    return {key: settings[key] for key, default in defaults.items() if settings.get(key, default) != default}


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float]:
    """Mean and standard error of the finite values."""
    values = [float(row[key]) for row in rows if math.isfinite(float(row.get(key, math.nan)))]
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m agents.learning.ship", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the training run")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--against", default="uniform", help="agents to compare with (default: uniform)")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)  # two on a busy machine wait for one another
    try:
        folder = ship(given.run, given.episodes, given.seed, given.against.split(","))
    except StemGymError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((folder / "README.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
