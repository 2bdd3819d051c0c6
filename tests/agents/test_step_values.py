"""The worth of steps: by hand, and adding up to the whole episode."""

from __future__ import annotations

import json
import math

import gymnasium
import pytest
import torch

import agents
import stem_gym  # noqa: F401 – registers the ids
from agents.engine.step_values import entropy, expected_score, live, step_values, write_values

ID = "stem_gym/HypothesisDiscrimination-v0"


def test_expected_score_by_hand():
    even, sure = torch.full((5,), 0.2), torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    assert expected_score(even, 0.1) == pytest.approx(0.2 - 0.1 * math.log(5.0), rel=1e-6)
    assert expected_score(sure, 0.1) == pytest.approx(1.0, rel=1e-6)


def test_what_steps_bring_adds_up(tmp_path):
    env = gymnasium.make_vec(ID, num_envs=1, autoreset_mode="Disabled")
    policy = agents.make("sobol", env, particles=256, draws=64)
    lived = live(policy, env, 5)
    values = step_values(policy.face, lived, particles=256, none=0.2)
    env.close()
    first = torch.full((5,), 0.2, dtype=torch.float64)  # four laws with 0.8 among them, and none of them
    last = torch.tensor(list(values[-1].probability.values()), dtype=torch.float64)
    assert len(values) == len(lived.actions) > 2 and values[-1].action == "declare"
    assert sum(one.information_nats for one in values) == pytest.approx(float(entropy(first) - entropy(last)), abs=1e-5)
    assert sum(one.value for one in values) == pytest.approx(
        expected_score(last, 0.1) - expected_score(first, 0.1), abs=1e-5
    )
    assert values[-1].information_nats == 0.0 and values[0].information_nats != 0.0 and values[0].cost > 0.0
    lines = write_values(values, tmp_path / "values.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(len(values)))
