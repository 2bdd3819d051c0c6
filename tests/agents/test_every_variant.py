"""A sensible script must win every variant: what an expert can not do, no learner can be blamed for."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

import agents
import stem_gym  # noqa: F401 – registers the ids

TARGETING = sorted(name for name in gymnasium.registry if name.startswith("stem_gym/AtomTargeting"))
EPISODES = 4


@pytest.mark.parametrize("name", TARGETING)
def test_lock_on_serves_most_targets_of_every_variant(name: str) -> None:
    env = gymnasium.make_vec(name, num_envs=EPISODES, autoreset_mode="Disabled", fused=False)
    wanted = env.unwrapped.task_config["targets"]
    results = agents.evaluate(agents.make("lock_on", env), name, episodes=EPISODES, seed=11, env=env)
    env.close()
    served = np.mean([result["targets_served"] for result in results]) / wanted
    assert served >= 0.5, f"lock_on serves {served:.0%} of the targets of {name}"
    # What the operator believes and what is true must be about the same, or the ADF threshold is wrong.
    seen = np.mean([result["targets_served_perceived"] for result in results]) / wanted
    assert abs(seen - served) <= 0.35, f"perceived {seen:.0%}, true {served:.0%}"
