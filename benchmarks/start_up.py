"""What a newcomer waits for first: the import, the list of ids, the first environment, each in a process of its own.

python benchmarks/start_up.py        # seconds; stores results/start_up.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.throughput import machine

RESULTS = Path(__file__).parent / "results"
FILE = "start_up.json"
SCRIPTS = {
    "python alone": "",
    "import stem_gym": "import stem_gym",
    "stem-gym list": "from stem_gym.cli import main; main(['list', '--json'])",
    "first step of an environment": (
        "import gymnasium, stem_gym; env = gymnasium.make('stem_gym/AtomTargeting-v0'); env.reset(seed=0); "
        "env.step(env.action_space.sample())"
    ),
}


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=7, help="processes of each; the median is told")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args()
    seconds = {name: measure(script, arguments.runs) for name, script in SCRIPTS.items()}
    for name, spent in seconds.items():
        print(f"{name:<30} {spent['wall_s']:.2f} s, {spent['cpu_s']:.2f} s of CPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / FILE).write_text(json.dumps({"machine": machine(), "seconds": seconds}, indent=1) + "\n")


def measure(script: str, runs: int) -> dict[str, float]:
    """Median wall and CPU seconds of a fresh interpreter that runs `script`, after one run that fills the caches."""
    wall, cpu = [], []
    for _ in range(runs + 1):
        began, spent = time.perf_counter(), _children_s()
        subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
        wall.append(time.perf_counter() - began)
        cpu.append(_children_s() - spent)
    return {"wall_s": statistics.median(wall[1:]), "cpu_s": statistics.median(cpu[1:])}


def _children_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    main()
