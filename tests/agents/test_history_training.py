"""Training on campaigns: what is believed gets better, and runs are kept, loaded and resumed."""

from __future__ import annotations

import csv
import json
from typing import Any

import gymnasium
import numpy as np
import pytest

import agents
import stem_gym  # noqa: F401 – registers the ids
from stem_gym.core.errors import PolicyError

ID = "stem_gym/HypothesisDiscrimination-easy-v0"
SMALL = {"rows": 64, "rollout": 8, "minibatch": 256, "epochs": 2, "gamma": 1.0, "learning_rate": 3e-3, "lessons": 0.9}
NETWORK = {"history": {"features": 32, "hidden": 32}}


def curve_of(folder: Any) -> list[dict[str, float]]:
    with (folder / "curve.csv").open() as stream:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]


def test_the_posterior_is_learned_kept_loaded_and_gone_on_with(tmp_path):
    agents.train("ppo", ID, out=tmp_path, settings=NETWORK, quiet=True, steps=60_000, **SMALL)
    points = curve_of(tmp_path)
    first, last = points[0], points[-1]
    assert last["log_score"] > first["log_score"] + 0.15, "what is declared becomes a posterior"
    env = gymnasium.make_vec(ID, num_envs=4, autoreset_mode="Disabled")
    policy = agents.load(tmp_path, env)
    observation, _ = env.reset(seed=1)
    action = policy.act(observation)
    assert action.shape == env.action_space.shape and bool((np.abs(action) <= 1.0).all())
    before = json.loads((tmp_path / "policy.json").read_text())["training"]["steps"]
    agents.train("ppo", ID, out=tmp_path, settings=NETWORK, quiet=True, steps=before + 512, **SMALL)
    assert json.loads((tmp_path / "policy.json").read_text())["training"]["steps"] == before + 512
    other = gymnasium.make_vec("stem_gym/HypothesisDiscrimination-hard-v0", num_envs=1)
    with pytest.raises(PolicyError, match="HypothesisDiscrimination-easy-v0"):
        agents.load(tmp_path, other)
    other.close()
    env.close()
