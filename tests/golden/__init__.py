"""Golden traces: what each id does with fixed actions, in a few numbers a step, so that a change of behaviour is seen.

`python -m tests.golden --write [ID…]` writes `tests/golden/<id>.json`; see `advice` for when to.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

import stem_gym  # noqa: F401 – registers the ids

FOLDER = Path(__file__).resolve().parent
SEED = 20240607
STEPS = 12
RELATIVE = 1e-4  # another processor rounds otherwise, and a count may fall on the other side
ABSOLUTE = 1e-5


def golden_file(id: str) -> Path:
    """Where the trace of an id is kept."""
    return FOLDER / f"{id.replace('/', '_')}.json"


def trace(id: str, actions: np.ndarray | None = None) -> dict[str, Any]:
    """Play `actions` (default: uniform ones) on the world of SEED and sum up each step."""
    env = gymnasium.make(id, disable_env_checker=True)
    space = env.action_space
    if actions is None:
        actions = _lasting_actions(env)
    observation, info = env.reset(seed=SEED)
    steps = [_summary(observation, info, None)]
    for action in np.asarray(actions, dtype=space.dtype):
        observation, reward, terminated, _, info = env.step(action)
        steps.append(_summary(observation, info, float(reward)))
        if terminated:
            break
    env.close()
    return {"id": id, "seed": SEED, "actions": np.asarray(actions).round(3).tolist(), "steps": steps}


def _lasting_actions(env: gymnasium.Env[Any, Any]) -> np.ndarray:
    """STEPS uniform actions; of those that end an episode by themselves one comes last, so that there is an episode."""
    task, generator = env.unwrapped.batch.task, np.random.Generator(np.random.PCG64(SEED))  # type: ignore[attr-defined]
    drawn = _uniform_actions(env.action_space, generator)
    closes = task.closes(torch.as_tensor(drawn)).numpy()
    if not closes.any():
        return drawn
    last = drawn[closes][:1]
    while np.count_nonzero(~closes) < STEPS - 1:
        drawn = np.concatenate((drawn, _uniform_actions(env.action_space, generator)))
        closes = task.closes(torch.as_tensor(drawn)).numpy()
    return np.concatenate((drawn[~closes][: STEPS - 1], last))


def _uniform_actions(space: gymnasium.Space[Any], generator: np.random.Generator) -> np.ndarray:
    """STEPS actions, drawn evenly from the space."""
    if isinstance(space, gymnasium.spaces.Discrete):
        return generator.integers(space.start, space.start + space.n, STEPS)
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        return generator.integers(space.start, space.start + space.nvec, (STEPS, len(space.nvec)))
    assert isinstance(space, gymnasium.spaces.Box)
    return generator.uniform(space.low, space.high, (STEPS, *space.shape)).astype(space.dtype).round(3)


def differences(given: dict[str, Any], kept: dict[str, Any]) -> list[str]:
    """Where two traces disagree beyond the tolerance, in words."""
    if len(given["steps"]) != len(kept["steps"]):
        return [f"{len(given['steps']) - 1} steps, golden {len(kept['steps']) - 1}"]
    found = []
    for number, (new, old) in enumerate(zip(given["steps"], kept["steps"], strict=True)):
        for key in sorted(new.keys() | old.keys()):
            a, b = new.get(key, "absent"), old.get(key, "absent")
            if not _close(a, b):
                found.append(f"step {number}, {key}: {a}, golden {b}")
    return found


def advice(id: str, found: list[str]) -> str:
    """What to do about differences."""
    bumped = id[: id.rindex("-v") + 2] + str(int(id.rsplit("-v", 1)[1]) + 1)
    return (
        f"{id} no longer does what its golden trace says:\n  " + "\n  ".join(found[:12]) + "\n"
        f"If the change was not wanted, find it. If it was, results under this id can not be compared: name it "
        f"{bumped} in its YAML, say why in CHANGELOG.md and in the task's version history, delete "
        f"{golden_file(id).name} and run `python -m tests.golden --write {bumped}`."
    )


def _summary(observation: dict[str, np.ndarray], info: dict[str, Any], reward: float | None) -> dict[str, Any]:
    """Mean of every entry, a mean weighted by place (which a flip or transpose would change), and every metric."""
    numbers: dict[str, Any] = {} if reward is None else {"reward": reward}
    for key, value in observation.items():
        flat = value.astype(np.float64).ravel()
        numbers[f"{key} mean"] = flat.mean()
        weight = np.cos(np.arange(flat.size) * (math.pi / flat.size)) + np.arange(flat.size) / flat.size
        numbers[f"{key} moment"] = float((flat * weight).mean())
    numbers |= {f"info {key}": float(value) for key, value in info.items()}
    return {key: None if math.isnan(value) else float(f"{value:.7g}") for key, value in numbers.items()}


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    return bool(a == b)


def write(id: str) -> Path:
    """Keep the trace of an id."""
    path = golden_file(id)
    path.write_text(json.dumps(trace(id), indent=1) + "\n")
    return path
