"""Small searches that are quick to run: an agent of few steps on a film of few cells."""

from __future__ import annotations

from typing import Any

import gymnasium

import agents
from agents.engine.verdicts import Approve

ID = "stem_gym/SpectrumSearch-edges-v0"
QUICK = {
    "first_places": 3,
    "patch": 3,
    "patch_features": 3,
    "hidden": 4,
    "members": 1,
    "training": {"fresh_steps": 4, "warm_steps": 1, "fresh_every": 4, "learning_rate": 0.03},
}
EDGE = {
    "kind": "edge_integral",
    "background": {"low_ev": 596.0, "high_ev": 632.0},
    "signal": {"low_ev": 638.0, "high_ev": 664.0},
}
BAND = {"kind": "band_integral", "window": {"low_ev": 450.0, "high_ev": 500.0}}
TASK = {
    "mode": "optimise",
    "measurements": 9,
    "scalarizers": [
        {"name": "edge", "measure": EDGE},
        {"name": "band", "measure": BAND},
        {"name": "odd", "measure": {"kind": "anomaly"}},
    ],
}
SMALL: dict[str, Any] = {"task": TASK, "instrument": {"shape": [10, 12]}}
PLACES: dict[str, Any] = {
    "task": TASK | {"actions": "place", "exposures_s": [0.05, 0.5]},
    "instrument": SMALL["instrument"],
}


def search_env(rows: int | None = None, **changes: Any) -> Any:
    """One env, or a vector env of `rows`."""
    given = SMALL | changes
    if rows is None:
        return gymnasium.make(ID, **given)
    return gymnasium.make_vec(ID, num_envs=rows, autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED, **given)


def quick_agent(env: Any, **changes: Any) -> Any:
    return agents.make("dkl", env, **(QUICK | changes))


class Script:
    """A hook that says one thing after the other at given steps, then approves; keeps the moments it was shown."""

    def __init__(self, lines: dict[int, list[Any]]) -> None:
        self.lines = {step: list(said) for step, said in lines.items()}
        self.moments: list[Any] = []

    def __call__(self, moment: Any) -> Any:
        self.moments.append(moment)
        left = self.lines.get(moment.step, [])
        said = left.pop(0) if left else Approve()
        return said(moment) if callable(said) else said
