"""Agents that tell laws apart: on every level, the same in any batch, and better than chance."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import agents
import stem_gym  # noqa: F401 – registers the ids
from agents.engine.campaign import CampaignPolicy
from stem_gym.core.errors import PolicyError
from stem_gym.core.experiments import protocol_of

LEVELS = sorted(
    name
    for name in gymnasium.registry
    if name.startswith("stem_gym/HypothesisDiscrimination") and "-image-" not in name
)
ID = "stem_gym/HypothesisDiscrimination-v0"
FEW = {"particles": 256, "draws": 64}
NAMES = sorted(name for name in agents.names() if issubclass(agents.engine.roster.policy_class(name), CampaignPolicy))


def vector(id: str, rows: int, **overrides: Any) -> gymnasium.vector.VectorEnv:
    return gymnasium.make_vec(id, num_envs=rows, autoreset_mode="Disabled", **overrides)


def played(
    name: str, id: str, episodes: int, rows: int, instrument: dict[str, Any] | None = None, **settings: Any
) -> list[dict[str, Any]]:
    env = vector(id, rows, **({"instrument": instrument} if instrument else {}))
    results = agents.evaluate(agents.make(name, env, **{**FEW, **settings}), id, episodes, seed=3, env=env)
    env.close()
    return results


def test_all_that_are_asked_for_exist():
    asked = {"sobol", "hypothesis_learning", "bma_variance", "eig", "eig_per_cost", "lookahead", "box_hill", "open_set"}
    assert asked | {"random_designs", "tuning_rules"} <= set(NAMES)


@pytest.mark.parametrize(
    ("name", "level", "given", "draws"),
    [
        ("eig", "-v0", {}, 64),
        ("eig", "-site-v0", {}, 256),
        ("eig", "-site-v0", {"draws": 96}, 96),
        ("lookahead", "-v0", {}, 256),
        ("lookahead", "-drift-v0", {"draws": None}, 64),
    ],
)
def test_where_sites_have_factors_more_values_are_looked_at(name, level, given, draws):
    env = vector(f"stem_gym/HypothesisDiscrimination{level}", 2)
    policy = agents.make(name, env, particles=2048, **given)
    policy.reset(range(2), [1, 2])
    observation, _ = env.reset(seed=1)
    (forecast, *_) = policy.look(observation).forecasts
    assert forecast.value.shape[2] == draws
    assert env.single_action_space.contains(policy.act(observation)[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("id", LEVELS)
def test_every_agent_does_what_every_level_takes(name, id):
    env = vector(id, 3)
    policy = agents.make(name, env, **FEW)
    observation, _ = env.reset(seed=5)
    policy.reset(range(3), [1, 2, 3])
    protocol = protocol_of(env.unwrapped.task_config)
    for _ in range(3):
        action = policy.act(observation)
        assert env.single_action_space.contains(action[0]) and action.shape == env.action_space.shape
        wish = protocol.wish(torch.as_tensor(action))
        assert bool(((wish.probability.sum(1) - 1.0).abs() < 1e-5).all())
        observation, _, terminated, _, _ = env.step(action)
        if terminated.any():
            break
    env.close()


@pytest.mark.parametrize("name", ["eig", "sobol", "random_designs", "hypothesis_learning"])
def test_the_same_worlds_see_the_same_actions_in_any_batch(name):
    alone, together = (played(name, ID, 3, rows) for rows in (1, 3))
    for one, other in zip(alone, together, strict=True):
        for key in ("experiments", "seconds", "claim_right", "true_answer"):
            assert one[key] == pytest.approx(other[key], rel=1e-5), key


def test_every_episode_ends_with_a_declaration_in_time():
    for id in (ID, "stem_gym/HypothesisDiscrimination-site-v0"):
        results = played("random_designs", id, 12, 12, claim=0.9999)
        assert all(result["declared"] == 1.0 for result in results)


def test_choosing_by_information_needs_fewer_experiments_than_chance():
    chance, chosen = (played(name, ID, 40, 40, particles=1024) for name in ("random_designs", "eig"))

    def soonest(results: list[dict[str, Any]]) -> float:
        return float(np.median([r["experiments"] if r["confident"] and r["claim_right"] else 99 for r in results]))

    assert soonest(chosen) <= 0.6 * soonest(chance)
    assert np.mean([r["score_with_costs"] for r in chosen]) > np.mean([r["score_with_costs"] for r in chance])


def test_tuning_rules_win_where_the_noise_drifts():
    id = "stem_gym/HypothesisDiscrimination-drift-v0"
    plain, ruled = (played(name, id, 24, 24, particles=1024) for name in ("eig_per_cost", "tuning_rules"))
    assert all(result["enabling"] >= 1.0 for result in ruled) and not any(result["enabling"] for result in plain)
    assert np.mean([r["score_with_costs"] for r in ruled]) > 0.1 + np.mean([r["score_with_costs"] for r in plain])


def test_an_open_set_is_seldom_sure_of_a_law_that_is_not_there():
    id = "stem_gym/HypothesisDiscrimination-open-v0"
    closed, aware = (played(name, id, 40, 40, particles=1024) for name in ("eig", "open_set"))
    wrong = [np.mean([result["confident_wrong"] for result in results]) for results in (closed, aware)]
    assert wrong[0] > 0.3 and wrong[1] <= 0.5 * wrong[0]


def test_an_alarm_finds_laws_that_are_not_there_and_seldom_rings_where_they_are():
    """By chance's experiments, which are many enough for a wrong law to fit badly."""
    id = "stem_gym/HypothesisDiscrimination-open-v0"
    outside = {"outside": {"share": 1.0}}
    deaf, heard = (
        played("random_designs", id, 40, 40, alarm=alarm, particles=1024, instrument=outside) for alarm in (None, 2.5)
    )
    assert not any(episode["claim_right"] for episode in deaf), "none of these was ruled out"
    assert sum(episode["claim_right"] for episode in heard) >= 10
    id = "stem_gym/HypothesisDiscrimination-v0"
    deaf, heard = (played("random_designs", id, 40, 40, alarm=alarm, particles=1024) for alarm in (None, 2.5))
    right = [sum(episode["claim_right"] for episode in found) for found in (deaf, heard)]
    assert right[1] >= right[0] - 2


@pytest.mark.parametrize("name", ["random_designs", "hypothesis_learning", "open_set"])
def test_an_alarm_that_always_rings_makes_every_agent_declare_none_at_once(name):
    """As soon as three measurements are there; before, a law may be claimed."""
    found = played(name, "stem_gym/HypothesisDiscrimination-hard-v0", 12, 12, alarm=1e-12, claim=0.9499)
    doubted = [episode for episode in found if episode["experiments"] >= 3.0]
    assert max(episode["experiments"] for episode in found) == 3.0 and len(doubted) >= 6
    assert all(episode["claim"] >= 0.949 and not episode["claim_right"] for episode in doubted), "none is never true"


def test_information_is_told_of_pictures_too():
    """Sizes are perceived, and the claims are as right."""
    found = played("eig", "stem_gym/HypothesisDiscrimination-image-v0", 24, 24, particles=512, draws=64)
    claims = [episode for episode in found if episode["confident"]]
    assert len(claims) >= 16 and sum(episode["claim_right"] for episode in claims) >= 0.85 * len(claims)


def test_rewards_of_hypothesis_learning_by_hand():
    env = vector(ID, 2)
    policy: Any = agents.make("hypothesis_learning", env, epsilon=0.0, **FEW)
    policy.reset(range(2), [1, 2])
    active = torch.tensor([[True, False, False, True], [False, True, False, False]])
    policy.judge(torch.tensor([[4.0, 9.0, 9.0, 4.0], [1.0, 2.0, 1.0, 1.0]]), active)
    assert not policy.reward.any(), "the first look compares with nothing"
    policy.judge(torch.tensor([[3.0, 1.0, 1.0, 5.0], [9.0, 2.5, 9.0, 9.0]]), active)
    assert policy.reward.tolist() == [[1.0, 0.0, 0.0, -1.0], [0.0, -1.0, 0.0, 0.0]]
    assert policy.chosen(torch.tensor([[0.5, 0.0], [0.5, 0.0]])).tolist() == [0, 0]
    env.close()


def test_another_task_is_refused():
    env = gymnasium.make_vec("stem_gym/AtomTargeting-v0", num_envs=1)
    with pytest.raises(PolicyError, match="no such task"):
        agents.make("eig", env)
    env.close()
