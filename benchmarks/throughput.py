"""Steps per second and core of the environments, beside environments that people know.

    python benchmarks/throughput.py                    # minutes; stores results/throughput.json
    python benchmarks/throughput.py --quick --out /tmp # seconds

Times are CPU seconds of this process (one thread), and each rate is that of the fastest of fifteen parts of its time,
so that other programs on the machine count less; on a GPU they are wall seconds between synchronisations. Random
actions; of the first id half scan a 64×64 frame, half dwell.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import stem_gym
from stem_gym.instruments import column, law, sheet, sheet_compiled, simulated, spectral
from stem_gym.simulator import imaging, kinetics
from stem_gym.tasks import spectrum_search

ENV_ID = "stem_gym/AtomTargeting-v0"
SEARCH_ID = "stem_gym/SpectrumSearch-v0"
FABRICATION_ID = "stem_gym/BeamFabrication-v0"
BESIDE = {
    FABRICATION_ID: [1, 256, 4096],
    "stem_gym/BeamFabrication-image-v0": [256],
    SEARCH_ID: [1, 256],
    "stem_gym/HypothesisDiscrimination-v0": [1, 4096, 16384],
    "stem_gym/HypothesisDiscrimination-image-v0": [256],
}
IN_MACHINE_CODE = {FABRICATION_ID: [1, 256, 4096], "stem_gym/BeamFabrication-image-v0": [1, 256]}
SPECIMENS = 64
POINTS = 1000  # of one long search, over which memory is watched
ATARI_ROWS = 64
WARM_UP = 5
PARTS = 15  # of the time of a figure


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 256, 1024], help="batch sizes")
    parser.add_argument("--seconds", type=float, default=15.0, help="time for each figure")
    parser.add_argument(
        "--memory-steps", type=int, default=100_000, help="environment steps over which memory is watched"
    )
    parser.add_argument("--quick", action="store_true", help="small batches, two seconds a figure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    parser.add_argument("--only", help="measure this section of the stored file anew, and keep the others")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.seconds, arguments.memory_steps = [1, 64], 2.0, 2_000
    torch.set_num_threads(1)
    seconds, quick = arguments.seconds, arguments.quick
    sections: dict[str, Callable[[], Any]] = {
        "ours": lambda: [ours(ENV_ID, rows, seconds, "cpu") for rows in arguments.rows],
        "beside": lambda: [
            ours(id, rows, seconds, "cpu") for id, sizes in BESIDE.items() for rows in ([64] if quick else sizes)
        ],
        "compiled": lambda: [
            ours(id, rows, seconds, "cpu", {"compiled": True})
            for id, sizes in IN_MACHINE_CODE.items()
            for rows in ([64] if quick else sizes)
        ],
        "others": lambda: others(seconds),
        "memory": lambda: memory(arguments.memory_steps),
        "search": search,
    }
    if torch.cuda.is_available():
        sections["gpu"] = lambda: [ours(ENV_ID, rows, seconds, "cuda") for rows in (256, 4096)]
    path = arguments.out / ("throughput-quick.json" if quick else "throughput.json")
    results: dict[str, Any] = {
        "id": ENV_ID,
        "versions": {"stem_gym": stem_gym.__version__, "torch": torch.__version__, "gymnasium": gymnasium.__version__},
        "machine": machine(),
    }
    if arguments.only not in (None, *sections):
        parser.error(f"--only takes one of {', '.join(sections)} here; given {arguments.only}")
    if arguments.only:
        results = json.loads(path.read_text()) | results
    results |= {name: measure() for name, measure in sections.items() if arguments.only in (None, name)}
    report(results)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    Console().print(f"\nStored {path}")


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"cpu": cpu, "cores": str(os.cpu_count()), "gpu": gpu, "python": platform.python_version()}


def ours(id: str, rows: int, seconds: float, device: str, instrument: dict[str, Any] | None = None) -> dict[str, Any]:
    """Steps per second of our environment, and what the time went into."""
    clock = _clock(device)
    if rows == 1:
        env: Any = gymnasium.make(id, device=device, instrument=instrument or {})
        actions: Any = [env.action_space.sample() for _ in range(64)]
        env.reset(seed=0)

        def step(action: Any) -> None:
            if env.step(action)[2]:
                env.reset()
    else:
        env = gymnasium.make_vec(id, num_envs=rows, device=device, instrument=instrument or {})
        env.action_space.seed(0)
        actions = [env.action_space.sample() for _ in range(16)]
        env.reset(seed=0)
        step = env.step
    for action in actions[:WARM_UP]:  # compiles the noise
        step(action)
    shares: dict[str, float] = {}
    rate = rows * _rate(step, actions, seconds, clock)
    with _timed(shares, clock):
        started = clock()
        count = _repeat(step, actions, min(seconds, 5.0), clock)
        total = clock() - started
    env.close()
    parts = {name: spent / total for name, spent in shares.items()}
    parts["bookkeeping"] = 1.0 - sum(parts.values())
    return {"id": id, "rows": rows, "device": device, "steps_per_s": rate, "share_of_time": parts, "timed_calls": count}


@contextlib.contextmanager
def _timed(shares: dict[str, float], clock: Callable[[], float]) -> Iterator[None]:
    """Add up the time in noise, rendering of expected images, and resets."""
    places = [
        ("resets", simulated.SimulatedMicroscope, "reset"),
        ("resets", sheet.SheetMicroscope, "reset"),
        ("kinetics", kinetics.Kinetics, "next_event"),
        ("kinetics", kinetics.Kinetics, "next_in_frame"),
        ("machine code", sheet_compiled.CompiledSheet, "dwell"),
        ("machine code", sheet_compiled.CompiledSheet, "scan"),
        ("resets", spectral.SpectralInstrument, "reset"),
        ("resets", spectrum_search.SpectrumSearch, "true_maps"),
        ("resets", law.LawInstrument, "reset"),
        ("noise", spectral, "detect_spectrum"),
        ("drift", spectral, "advance"),
        ("noise", sheet, "detect"),
        ("noise", simulated, "detect"),
        ("rendering", imaging, "scan_image"),
        ("rendering", imaging, "probe_signal"),
        ("drift", column, "advance"),
    ]
    originals = [(owner, name, getattr(owner, name)) for _, owner, name in places]

    def watch(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                shares[label] = shares.get(label, 0.0) + clock() - start

        return timed

    try:
        for label, owner, name in places:
            setattr(owner, name, watch(label, getattr(owner, name)))
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def others(seconds: float) -> list[dict[str, Any]]:
    """Image environments that people know, where they are installed."""
    found = []
    if importlib.util.find_spec("ale_py"):
        found.append(
            {
                "name": f"ale-py AtariVectorEnv Pong, 84×84×4, {ATARI_ROWS} envs, 1 thread",
                "steps_per_s": _atari(seconds),
            }
        )
    if importlib.util.find_spec("minigrid"):
        found.append({"name": "MiniGrid Empty-8x8, RGB partial view", "steps_per_s": _minigrid(seconds)})
    return found


def _atari(seconds: float) -> float:
    from ale_py.vector_env import AtariVectorEnv

    env = AtariVectorEnv("pong", num_envs=ATARI_ROWS, num_threads=1, img_height=84, img_width=84, stack_num=4)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    actions = [rng.integers(0, 6, ATARI_ROWS) for _ in range(16)]
    rate = ATARI_ROWS * _rate(env.step, actions, seconds, time.process_time)
    env.close()
    return rate


def _minigrid(seconds: float) -> float:
    import minigrid  # noqa: F401 – registers its ids
    from minigrid.wrappers import RGBImgPartialObsWrapper

    env = RGBImgPartialObsWrapper(gymnasium.make("MiniGrid-Empty-8x8-v0"))
    env.reset(seed=0)

    def step(action: int) -> None:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()

    rate = _rate(step, [0, 1, 2, 2], seconds, time.process_time)
    env.close()
    return rate


def memory(steps: int) -> dict[str, float]:
    """Largest resident memory after a tenth of the steps and after all of them, in MiB."""
    rows = 64
    env = gymnasium.make_vec(ENV_ID, num_envs=rows)
    rng = np.random.default_rng(1)
    actions = [rng.uniform(-1.0, 1.0, (rows, 5)).astype(np.float32) for _ in range(16)]
    env.reset(seed=0)
    early = 0.0
    calls = max(10, steps // rows)
    for call in range(calls):
        env.step(actions[call % len(actions)])
        if call == calls // 10:
            early = _peak_mib()
    env.close()
    return {"steps": float(calls * rows), "after_a_tenth_mib": early, "at_the_end_mib": _peak_mib()}


def search() -> dict[str, float]:
    """Milliseconds for a new specimen with its maps, and memory over one long search, in MiB."""
    env: Any = gymnasium.make_vec(SEARCH_ID, num_envs=SPECIMENS)
    env.reset(seed=0)
    start = time.process_time()
    env.reset(seed=1)
    specimen_ms = 1e3 * (time.process_time() - start) / SPECIMENS
    env.close()
    rich = {"steps": POINTS, "seconds": 1e9, "electrons": 1e18}
    long: Any = gymnasium.make(SEARCH_ID, task={"measurements": POINTS}, budget=rich)
    long.reset(seed=0)
    early = 0.0
    for point in range(POINTS):
        long.step(point)
        if point == POINTS // 10:
            early = _resident_mib()
    late = _resident_mib()
    long.close()
    return {"specimen_ms": specimen_ms, "points": POINTS, "after_a_tenth_mib": early, "at_the_end_mib": late}


def _resident_mib() -> float:
    """Memory now, not at its peak."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0


def _clock(device: str) -> Callable[[], float]:
    if device == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def _repeat(step: Callable[[Any], Any], actions: list[Any], seconds: float, clock: Callable[[], float]) -> int:
    end, count = clock() + seconds, 0
    while clock() < end:
        step(actions[count % len(actions)])
        count += 1
    return count


def _rate(step: Callable[[Any], Any], actions: list[Any], seconds: float, clock: Callable[[], float]) -> float:
    """Calls per second, in the fastest of the parts of the time."""
    rates = []
    for _ in range(PARTS):
        start = clock()
        count = _repeat(step, actions, seconds / PARTS, clock)
        rates.append(count / (clock() - start))
    return max(rates)


def report(results: dict[str, Any]) -> None:
    """The figures as tables."""
    console = Console()
    best = max(entry["steps_per_s"] for entry in results["ours"])
    table = Table("id", "rows", "device", "steps/s", "share of time", title=f"one core of {results['machine']['cpu']}")
    for entry in results["ours"] + results["beside"] + results["compiled"] + results.get("gpu", []):
        parts = ", ".join(f"{name} {share:.0%}" for name, share in entry["share_of_time"].items())
        table.add_row(
            entry["id"].removeprefix("stem_gym/"),
            str(entry["rows"]),
            entry["device"],
            f"{entry['steps_per_s']:,.0f}",
            parts,
        )
    console.print(table)
    table = Table("beside it", "steps/s", "ours, best batch / this")
    for entry in results["others"]:
        table.add_row(entry["name"], f"{entry['steps_per_s']:,.0f}", f"{best / entry['steps_per_s']:.1f}")
    console.print(table)
    kept = results["memory"]
    console.print(
        f"Peak memory after {kept['steps'] / 10:,.0f} steps {kept['after_a_tenth_mib']:,.0f} MiB, "
        f"after {kept['steps']:,.0f} steps {kept['at_the_end_mib']:,.0f} MiB"
    )


if __name__ == "__main__":
    main()
