"""Agents that search for spectra, in the same worlds: how many measurements they need, and what they make of the map.

python benchmarks/spectrum_search.py                  # all fields; stores results/spectrum_search.json
python benchmarks/spectrum_search.py --fields v0      # one of them anew
python benchmarks/spectrum_search.py --show           # prints the tables of the stored figures

The measured fields are files beside the project (STEM_GYM_DATA, or ../shared/data); without them they are left out.
What was measured is judged on the noise-free map, a prediction on a noisy measurement of every cell: the recorded one,
or in simulation one that is drawn anew.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from rich.console import Console

import agents
from agents.policy import Array, Policy
from stem_gym.core.errors import PolicyError
from stem_gym.instruments.replayed import ReplayedCube
from stem_gym.jobs import outcome
from stem_gym.jobs.progress import Progress

REPO = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
FILE = "spectrum_search.json"
DATA = Path(os.environ.get("STEM_GYM_DATA", REPO.parent / "shared" / "data"))
AGENTS = ("uniform", "raster", "gp_bo", "structured_gp", "dkl", "novelty", "im2spec", "ppo")
SHARES = (90, 95, 99)
LOOKS = (20, 40, 60)  # measurements after which the predicted map is judged
_NO_MAP = {"novelty"}  # what it predicts is how unlike a spectrum is, and not what is wanted
_Z90 = 1.6449
_RESAMPLES = 2000


@dataclass(frozen=True)
class Field:
    """Where is searched, for what."""

    id: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    taken_from: str | None = None  # whose shipped PPO policy is taken over

    @property
    def path(self) -> Path | None:
        """The measured file, where it is one."""
        return self.overrides.get("path")


def _measured(file: str, name: str, measure: Mapping[str, Any], known: Mapping[str, Any]) -> Field:
    """A recorded map at its own exposure; `known` is what its file does not tell."""
    known = {"current_pa": 100.0, "exposure_s": 0.1, "thin": 0.5} | dict(known)  # thinned: every episode has its noise
    task = {"detector": known["spectrometer"], "scalarizers": [{"name": name, "measure": measure}]}
    task["exposures_s"] = [known["exposure_s"]]
    own = {"path": DATA / file, "task": task, "instrument": known}
    return Field("stem_gym/SpectrumSearch-measured-v0", own, "stem_gym/SpectrumSearch-v0")


_CUZN, _FEPT = "cuzn_eels_50x40x162.npz", "fept_core_shell_eds_64x64x992.npz"
# The variance of its counts is 4.2 times their mean (stem_gym.datasets.cube_factors): a camera with a gain.
_CAMERA = {"spectrometer": "eels", "counts_per_electron": 4.2}
_BEFORE_CU = {"low_ev": 800.0, "high_ev": 920.0}
FIELDS = {
    "v0": Field("stem_gym/SpectrumSearch-v0"),
    "cuzn_cu": _measured(
        _CUZN,
        "cu_l",
        {"kind": "edge_integral", "background": _BEFORE_CU, "signal": {"low_ev": 935.0, "high_ev": 1015.0}},
        _CAMERA,
    ),
    "cuzn_zn": _measured(
        _CUZN,
        "zn_l",
        {"kind": "edge_integral", "background": _BEFORE_CU, "signal": {"low_ev": 1025.0, "high_ev": 1105.0}},
        _CAMERA,
    ),
    "fept_pt": _measured(
        _FEPT,
        "pt_l",
        {"kind": "band_integral", "window": {"low_ev": 9300.0, "high_ev": 9600.0}},
        {"spectrometer": "eds"},
    ),
}


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--fields", nargs="*", default=list(FIELDS), choices=list(FIELDS), help="default: all")
    parser.add_argument("--agents", nargs="*", default=list(AGENTS), choices=list(AGENTS), help="default: all")
    parser.add_argument("--episodes", type=int, default=16, help="worlds or seeds, played side by side")
    parser.add_argument("--measurements", type=int, default=80, help="of a recorded map")
    parser.add_argument("--seed", type=int, default=2026, help="seed of the worlds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--show", action="store_true", help="print the stored tables, measure nothing")
    arguments = parser.parse_args()
    if not arguments.show:
        measure(arguments)
    print(markdown(json.loads((arguments.out / FILE).read_text())))


def measure(arguments: argparse.Namespace) -> None:
    """Run the agents on each field; the file is renewed after each agent, the others' rows are kept."""
    torch.set_num_threads(1)
    path = outcome.make_folder(arguments.out) / FILE
    with Progress(Console(stderr=True)) as progress:
        for name in arguments.fields:
            if (file := FIELDS[name].path) is not None and not file.exists():
                Console(stderr=True).print(f"{name}: no file {file}, left out")
                continue
            for agent in arguments.agents:
                row = _measure_one(name, agent, arguments, progress)
                if row is None:
                    continue
                stored = json.loads(path.read_text())["rows"] if path.exists() else []
                rows = [old for old in stored if (old["field"], old["agent"]) != (name, agent)] + [row]
                rows.sort(key=lambda row: (list(FIELDS).index(row["field"]), AGENTS.index(row["agent"])))
                outcome.write_whole(path, json.dumps({"versions": outcome.versions(), "rows": rows}, indent=1) + "\n")


def _measure_one(name: str, agent: str, arguments: argparse.Namespace, progress: Progress) -> dict[str, Any] | None:
    """The figures of one agent on one field; None where it can not act there."""
    where, episodes = FIELDS[name], arguments.episodes
    overrides = dict(where.overrides)
    if where.path is not None:  # an id of ours is played as it is: its trained policy is for that task alone
        overrides["task"] = dict(overrides["task"]) | {"measurements": arguments.measurements}
        overrides["budget"] = {"steps": arguments.measurements, "seconds": 1e6, "electrons": 1e18}
    env: Any = gymnasium.make_vec(
        where.id, num_envs=episodes, autoreset_mode=AutoresetMode.DISABLED, fused=False, **overrides
    )
    most = env.unwrapped.task_config["measurements"]
    settings: dict[str, Any] = {"weights": where.taken_from} if agent == "ppo" and where.taken_from else {}
    try:
        policy = agents.make(agent, env, **settings)
        watched = _Watched(policy, env)
        found = agents.evaluate(watched, where.id, episodes, arguments.seed, env, _report(progress, name, agent))
    except PolicyError as error:
        Console(stderr=True).print(f"{name}, {agent}: {error}")
        return None
    finally:
        env.close()
    figures = {"field": name, "agent": agent, "id": where.id, "episodes": episodes, "seed": arguments.seed}
    figures |= {"measurements": most, "settings": policy.settings.model_dump(mode="json")}
    for share in SHARES:
        figures[f"to_{share}"] = _needed([row.get(f"measurements_to_{share}") for row in found], most)
    for key in ("best_share", "area_under_best", "found_top1_share", "found_top5_share", "seconds", "electrons"):
        figures[key] = _mean_and_error([row[key] for row in found])
    thinking = sum(row["thinking_s"] for row in found) / sum(row["measurements"] for row in found)
    return figures | {"thinking_s_per_measurement": thinking, "map": {} if agent in _NO_MAP else watched.judged}


class _Watched(Policy):
    """A policy whose predicted maps are looked at on the way."""

    name = "watched"

    def __init__(self, policy: Policy, env: Any) -> None:
        super().__init__(policy.face, policy.settings)
        self._policy, self._batch, self._taken = policy, env.unwrapped.batch, 0
        self._noisy: Array | None = None
        self.judged: dict[str, dict[str, float]] = {}

    def reset(self, rows: Any, seeds: Any = None) -> None:
        self._policy.reset(rows, seeds)

    def act(self, observation: Any) -> Array:
        action = self._policy.act(observation)
        decision = getattr(self._policy, "explain", lambda: None)()
        if self._taken in LOOKS and decision is not None and np.isfinite(decision.deviation).all():
            self.judged[str(self._taken)] = self._judge(decision, np.asarray(observation["measured"]).astype(bool))
        self._taken += 1
        return action

    def _judge(self, decision: Any, measured: Array) -> dict[str, float]:
        """RMSE by the range, negative log predictive density, and how many of the 90 % intervals hold."""
        noisy, span = self._one_more()
        away = (noisy - decision.mean)[~measured]
        deviation = decision.deviation[~measured]
        density = 0.5 * np.log(2.0 * np.pi * deviation**2) + 0.5 * (away / deviation) ** 2
        relative = np.where(measured, np.nan, (noisy - decision.mean) / span[:, None, None])
        return {
            "rmse": float(np.sqrt(np.nanmean(relative**2, axis=(1, 2))).mean()),
            "nlpd": float(density.mean() - np.log(span).mean()),
            "covered": float((np.abs(away) <= _Z90 * deviation).mean()),
        }

    def _one_more(self) -> tuple[Array, Array]:
        """One noisy measurement of every cell (B, H, W), and the range of the noise-free map (B,)."""
        task, instrument = self._batch.task, self._batch.instrument
        truth, rows = instrument.truth(), torch.arange(self._batch.rows)
        if isinstance(instrument, ReplayedCube):
            config, rng = instrument.config, np.random.default_rng(1)
            recorded = np.round(instrument.replay.spectra / config.counts_per_electron).astype(np.int64)
            kept = rng.binomial(recorded, config.thin) / task.config.exposures_s[0]
            electrons = torch.from_numpy(kept.astype(np.float32))
            maps = [task.values(electrons, electrons.mean(0))[..., 0].expand(len(rows), -1)]
        else:
            maps = [self._drawn(task, truth, row) for row in rows.split(1)]
        true = task.true_maps(truth, rows)[:, 0]
        shape = (len(rows), *task.config.grid)
        return torch.cat(maps).reshape(shape).numpy(), (true.amax(1) - true.amin(1)).numpy()

    @staticmethod
    def _drawn(task: Any, truth: Mapping[str, Any], row: torch.Tensor) -> torch.Tensor:
        """One noisy value of every cell of a simulated field, (1, H·W)."""
        rate = truth["loadings"][row] @ truth["components"][row] * truth["electrons_per_s"][row, None, None]
        exposure_s, noise = task.config.exposures_s[0], torch.Generator().manual_seed(int(row))
        counts = torch.poisson((rate * exposure_s).clamp(min=0.0), generator=noise)
        values: torch.Tensor = task.values(counts / exposure_s, rate.mean(1, keepdim=True))[..., 0]
        return values


def _needed(values: Sequence[float | None], limit: int) -> dict[str, float]:
    """Median of how many measurements were needed, with a 95 % interval by resampling; a failure is more than any."""
    reached = np.array([np.inf if value is None or np.isnan(value) else value for value in values])
    resampled = np.random.default_rng(0).choice(reached, (_RESAMPLES, len(reached)))
    # The middle one from above, so that half of the failures make the median a failure.
    medians = np.sort(resampled, axis=1)[:, len(reached) // 2]
    low, high = np.sort(medians)[[int(0.025 * _RESAMPLES), int(0.975 * _RESAMPLES) - 1]]
    median = np.sort(reached)[len(reached) // 2]
    told = {"median": median, "low": low, "high": high}
    return {name: float(min(value, limit + 1)) for name, value in told.items()} | {
        "failures": int(np.isinf(reached).sum())
    }


def _mean_and_error(values: Sequence[float]) -> list[float]:
    array = np.array(values, dtype=float)
    return [float(array.mean()), float(array.std(ddof=1) / np.sqrt(len(array)))]


def _report(progress: Progress, name: str, agent: str) -> Callable[[int, int], None]:
    return lambda done, of: progress.episodes(name, agent, done, of)


def markdown(stored: Mapping[str, Any]) -> str:
    """The tables of the stored figures."""
    header = ["field", "agent", *(f"to {share} %" for share in SHARES), "not to 90 %", "best found", "best 1 % found"]
    header += ["map RMSE", "NLPD", "90 % interval covers", "thinking / s"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join(lines + [_line(row) for row in stored["rows"]])


def _line(row: Mapping[str, Any]) -> str:
    limit = row["measurements"]
    cells = [row["field"], row["agent"]]
    for share in SHARES:
        needed = row[f"to_{share}"]
        told = [f"> {limit}" if needed[key] > limit else f"{needed[key]:.0f}" for key in ("median", "low", "high")]
        cells.append(f"{told[0]} ({told[1]}–{told[2]})")
    cells.append(f"{row['to_90']['failures']} of {row['episodes']}")
    cells += [f"{100 * row[key][0]:.1f} ± {100 * row[key][1]:.1f} %" for key in ("best_share", "found_top1_share")]
    last = row["map"].get("60") or row["map"].get("40") or row["map"].get("20")
    cells += ["–"] * 3 if last is None else [f"{last['rmse']:.3f}", f"{last['nlpd']:.2f}", f"{last['covered']:.0%}"]
    cells.append(f"{row['thinking_s_per_measurement']:.3g}")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
