"""Agents that search for spectra, in the same worlds: how many measurements they need, and what they make of the map.

python benchmarks/spectrum_search.py                  # all fields; stores results/spectrum_search.json
python benchmarks/spectrum_search.py --fields v0      # one of them anew
python benchmarks/spectrum_search.py --show           # prints the tables of the stored figures

The measured fields are files beside the project (STEM_GYM_DATA, or ../shared/data); without them they are left out.
What was measured is judged on the noise-free map, a prediction on measurements of other cells in the same world.
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
from agents.engine.search_field import SearchField, search_field_of
from agents.policy import Array, Policy, Transition
from stem_gym.core.errors import PolicyError
from stem_gym.jobs import outcome
from stem_gym.jobs.progress import Progress

REPO = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
FILE = "spectrum_search.json"
DATA = Path(os.environ.get("STEM_GYM_DATA", REPO.parent / "shared" / "data"))
AGENTS = ("uniform", "raster", "gp_bo", "structured_gp", "dkl", "novelty", "im2spec", "ppo")
SHARES = (90, 95, 99)
CHECKED = 500  # cells whose predictions are judged
_MORE = {"uniform": 8}  # times as many episodes: chance differs most from one to the next, and thinks least
LOOKS = (20, 40, 60)  # measurements after which the predicted map is judged
_SHARES_FOUND = ("best_share", "area_under_best", "found_top1_share", "found_top5_share", "found_level_share")
_MEANS = (*_SHARES_FOUND, "rmse", "seconds", "electrons")  # where a mode tells them
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
    "flakes": Field("stem_gym/SpectrumSearch-flakes-v0"),
    "xrays": Field("stem_gym/SpectrumSearch-xrays-v0"),
    "edges": Field("stem_gym/SpectrumSearch-edges-v0"),
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
    parser.add_argument(
        "--episodes", type=int, default=16, help="worlds or seeds, played side by side; of `uniform` 8 times as many"
    )
    parser.add_argument("--measurements", type=int, default=80, help="of a recorded map")
    parser.add_argument("--seed", type=int, default=2026, help="seed of the worlds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--show", action="store_true", help="print the stored tables, measure nothing")
    arguments = parser.parse_args()
    if not arguments.show:
        measure(arguments)
    stored = json.loads((arguments.out / FILE).read_text())
    print(f"{markdown(stored)}\n\n{markdown_of_maps(stored)}")


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
    where, episodes = FIELDS[name], arguments.episodes * _MORE.get(agent, 1)
    overrides = dict(where.overrides)
    if where.path is not None:  # an id of ours is played as it is: its trained policy is for that task alone
        overrides["task"] = dict(overrides["task"]) | {"measurements": arguments.measurements}
        overrides["budget"] = {"steps": arguments.measurements, "seconds": 1e6, "electrons": 1e18}
    env, twin = (_make(where.id, episodes, some) for some in (overrides, _plenty(overrides)))
    most = env.unwrapped.task_config["measurements"]
    settings: dict[str, Any] = {"weights": where.taken_from} if agent == "ppo" and where.taken_from else {}
    try:
        policy = agents.make(agent, env, **settings)
        watched = _Watched(policy, env, twin)
        found = agents.evaluate(watched, where.id, episodes, arguments.seed, env, _report(progress, name, agent))
    except PolicyError as error:
        Console(stderr=True).print(f"{name}, {agent}: {error}")
        return None
    finally:
        env.close()
        twin.close()
    figures = {"field": name, "agent": agent, "id": where.id, "episodes": episodes, "seed": arguments.seed}
    mode = env.unwrapped.task_config["mode"]
    figures |= {"mode": mode, "measurements": most, "settings": policy.settings.model_dump(mode="json")}
    for share in SHARES:
        figures[f"to_{share}"] = _needed([row.get(f"measurements_to_{share}") for row in found], most)
    for key in _MEANS:
        if key in found[0]:
            figures[key] = _mean_and_error([row[key] for row in found])
    thinking = sum(row["thinking_s"] for row in found) / sum(row["measurements"] for row in found)
    return figures | {"thinking_s_per_measurement": thinking, "map": {} if agent in _NO_MAP else watched.judged}


def _make(id: str, episodes: int, overrides: Mapping[str, Any]) -> Any:
    return gymnasium.make_vec(id, num_envs=episodes, autoreset_mode=AutoresetMode.DISABLED, fused=False, **overrides)


def _plenty(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The same worlds, where all cells that predictions are judged by can be measured."""
    task = dict(overrides.get("task", {})) | {"measurements": CHECKED}
    budget = {"steps": CHECKED + 1, "seconds": 1e9, "electrons": 1e18}
    return dict(overrides) | {"task": task, "budget": budget}


class _Watched(Policy):
    """A policy whose predicted maps are looked at on the way, beside measurements of other cells in the same worlds."""

    name = "watched"

    def __init__(self, policy: Policy, env: Any, twin: Any) -> None:
        super().__init__(policy.face, policy.settings)
        self._policy, self._batch, self._twin, self._taken = policy, env.unwrapped.batch, twin, 0
        self._field: SearchField = search_field_of(policy.face, policy.name)
        self._seeds: Any = None
        self._noisy: Array | None = None
        self.judged: dict[str, dict[str, list[float]]] = {}

    def reset(self, rows: Any, seeds: Any = None) -> None:
        self._seeds = seeds
        self._policy.reset(rows, seeds)

    def act(self, observation: Any) -> Array:
        return self._policy.act(observation)

    def update(self, transition: Transition) -> None:
        """Look at the decision before this step, when nobody's time is taken any more."""
        decision = getattr(self._policy, "explain", lambda: None)()
        if self._taken in LOOKS and decision is not None:
            measured = np.asarray(transition.observation["measured"]).astype(bool)
            self.judged[str(self._taken)] = self._judge(decision, measured)
        self._taken += 1
        self._policy.update(transition)

    def _judge(self, decision: Any, measured: Array) -> dict[str, list[float]]:
        """RMSE by the range, negative log predictive density, and how many of the 90 % intervals hold, by episode.

        Also of the tenth of the cells that are thought the brightest: where most of a field is empty, as around
        particles, an interval that holds nothing but zero holds nearly all of the others. Episodes that believe nothing
        yet are left out.
        """
        noisy, span = self._once_more()
        away = np.where(measured, np.nan, noisy - decision.mean)
        deviation = decision.deviation
        known = np.isfinite(away) & np.isfinite(deviation)
        away, deviation = np.where(known, away, np.nan), np.where(known, deviation, np.nan)
        density = 0.5 * np.log(2.0 * np.pi * deviation**2) + 0.5 * (away / deviation) ** 2
        inside = np.where(known, np.abs(away) <= _Z90 * deviation, np.nan)
        bright = decision.mean > np.quantile(decision.mean, 0.9, axis=(1, 2), keepdims=True)
        rows = known.any(axis=(1, 2))
        found = {
            "rmse": np.sqrt(_mean_of_maps((away / span[:, None, None]) ** 2, rows)),
            "nlpd": _mean_of_maps(density, rows) - np.log(span[rows]),
            "covered": _mean_of_maps(inside, rows),
            "covered_bright": _mean_of_maps(np.where(bright, inside, np.nan), rows & (known & bright).any(axis=(1, 2))),
        }
        return {name: _mean_and_error(values) for name, values in found.items()}

    def _once_more(self) -> tuple[Array, Array]:
        """Measurements (B, H, W) of some cells, NaN of the others, and the range of the noise-free map (B,)."""
        if self._noisy is None:
            self._noisy = self._measured_by_the_twin()
        truth, rows = self._batch.instrument.truth(), torch.arange(self._batch.rows)
        true = self._batch.task.true_maps(truth, rows)[:, 0]
        return self._noisy, (true.amax(1) - true.amin(1)).numpy()

    def _measured_by_the_twin(self) -> Array:
        """One spectrum of so many cells of each world from the instrument, with the exposure that agents take."""
        self._twin.reset(seed=[int(seed) for seed in self._seeds])
        generator = torch.Generator().manual_seed(1)
        cells = torch.randperm(self._field.cells, generator=generator)[:CHECKED]
        for cell in cells:
            action = self._field.action(cell.expand(self._batch.rows), 0.5)
            observation = self._twin.step(action)[0]
        value, measured = (np.asarray(observation[name]) for name in ("value", "measured"))
        return np.where(measured > 0, value.astype(float), np.nan)


def _mean_of_maps(values: Array, rows: Array) -> Array:
    """Means (n,) over maps (B, H, W) of the rows (B,) that have something, NaN left out."""
    return np.asarray(np.nanmean(values[rows], axis=(1, 2)))


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
    """How soon the best is found, where that is what is wanted."""
    header = ["field", "agent", *(f"to {share} %" for share in SHARES), "not to 90 %", "best found", "best 1 % found"]
    header += [*_OF_MAP, *_SPENT]
    return _table(header, [_line(row) for row in stored["rows"] if row["mode"] == "optimise"])


def markdown_of_maps(stored: Mapping[str, Any]) -> str:
    """What is found or learned of the whole map, where that is what is wanted."""
    header = ["field", "wanted", "agent", "episodes", "found", "map as measured, RMSE", *_OF_MAP, *_SPENT]
    return _table(header, [_line_of_maps(row) for row in stored["rows"] if row["mode"] != "optimise"])


_OF_MAP = ("map RMSE", "NLPD", "90 % intervals hold (bright tenth)")
_SPENT = ("time / s", "electrons", "thinking / s")


def _table(header: Sequence[str], lines: Sequence[str]) -> str:
    return "\n".join([f"| {' | '.join(header)} |", "|---" * len(header) + "|", *lines])


def _line(row: Mapping[str, Any]) -> str:
    limit = row["measurements"]
    cells = [row["field"], row["agent"]]
    for share in SHARES:
        needed = row[f"to_{share}"]
        told = [f"> {limit}" if needed[key] > limit else f"{needed[key]:.0f}" for key in ("median", "low", "high")]
        cells.append(f"{told[0]} ({told[1]}–{told[2]})")
    cells.append(f"{row['to_90']['failures']} of {row['episodes']}")
    cells += [_percent(row[key]) for key in ("best_share", "found_top1_share")]
    return f"| {' | '.join(cells + _common(row))} |"


def _line_of_maps(row: Mapping[str, Any]) -> str:
    found = _percent(row["found_level_share"]) if row["mode"] == "discover" else "–"
    filled = _with_error(row["rmse"], 3) if row["mode"] == "learn" else "–"
    wanted = {"discover": "all above a level", "learn": "the map"}[row["mode"]]
    return f"| {' | '.join([row['field'], wanted, row['agent'], str(row['episodes']), found, filled, *_common(row)])} |"


def _common(row: Mapping[str, Any]) -> list[str]:
    """The cells of `_OF_MAP` and `_SPENT`."""
    looks, cells = list(row["map"].values()), ["–"] * 3
    if looks:
        held = [look["covered"][0] for look in looks]
        last = looks[-1]
        covered = f"{min(held):.0%}–{max(held):.0%} ({last['covered_bright'][0]:.0%})"
        cells = [_with_error(last["rmse"], 3), _with_error(last["nlpd"], 2), covered]
    return [
        *cells,
        f"{row['seconds'][0]:.0f}",
        f"{row['electrons'][0]:.1e}",
        f"{row['thinking_s_per_measurement']:.3g}",
    ]


def _with_error(figure: Sequence[float], digits: int) -> str:
    return f"{figure[0]:.{digits}f} ± {figure[1]:.{digits}f}"


def _percent(figure: Sequence[float]) -> str:
    return f"{100 * figure[0]:.1f} ± {100 * figure[1]:.1f} %"


if __name__ == "__main__":
    main()
