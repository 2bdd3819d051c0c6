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


SEARCHES = sorted(name for name in gymnasium.registry if name.startswith("stem_gym/SpectrumSearch"))


def score(agent: str, name: str, env: gymnasium.vector.VectorEnv) -> float:
    results = agents.evaluate(agents.make(agent, env), name, episodes=env.num_envs, seed=5, env=env)
    return float(np.mean([result["score_truth"] for result in results]))


@pytest.mark.parametrize("name", SEARCHES)
def test_a_model_of_the_field_finds_more_than_chance_in_every_search(name: str) -> None:
    short = {"task": {"measurements": 40, "switches": []}, "budget": {"steps": 40}}
    env = gymnasium.make_vec(name, num_envs=4 * EPISODES, autoreset_mode="Disabled", fused=False, **short)
    chance, model = (score(agent, name, env) for agent in ("uniform", "structured_gp"))
    # A map that is learned is judged by a plain interpolation, which even places already suit.
    margin = -0.03 if env.unwrapped.task_config["mode"] == "learn" else 0.02
    env.close()
    assert model > chance + margin, f"structured_gp earns {model:.3f} on {name}, chance {chance:.3f}"


def test_the_shipped_search_beats_chance_and_the_raster() -> None:
    name = "stem_gym/SpectrumSearch-v0"
    env = gymnasium.make_vec(name, num_envs=2 * EPISODES, autoreset_mode="Disabled", fused=False)
    chance, raster, learned = (score(agent, name, env) for agent in ("uniform", "raster", "ppo"))
    env.close()
    assert learned > max(chance, raster) + 0.05


def test_the_shipped_search_is_taken_over_to_a_map_of_another_size() -> None:
    name = "stem_gym/SpectrumSearch-measured-v0"
    env = gymnasium.make_vec(name, num_envs=EPISODES, autoreset_mode="Disabled", task={"measurements": 20})
    policy = agents.make("ppo", env, weights="stem_gym/SpectrumSearch-v0")
    results = agents.evaluate(policy, name, episodes=EPISODES, seed=5, env=env)
    env.close()
    assert all(result["measurements"] == 20 for result in results)
