"""The task: what a declaration earns, what an episode costs, and how it ends."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import stem_gym  # noqa: F401 – registers the ids
from stem_gym.core.errors import ActionError, ConfigError
from stem_gym.core.experiments import Protocol, protocol_of
from stem_gym.surrogates.referee import Referee
from stem_gym.tasks.hypothesis_discrimination import HypothesisDiscrimination

ID = "stem_gym/HypothesisDiscrimination-v0"


def made(id: str = ID, **overrides: Any) -> tuple[Any, Protocol]:
    env = gymnasium.make(id, disable_env_checker=True, **overrides)
    return env, protocol_of(env.unwrapped.task_config)


def one(action: torch.Tensor) -> np.ndarray:
    return action[0].numpy()


def declared(protocol: Protocol, *probability: float) -> np.ndarray:
    return one(protocol.declarations(torch.tensor([probability])))


def experiment(protocol: Protocol, bias_v: float, time_s: float, site: int = 0) -> np.ndarray:
    return one(protocol.experiments(torch.tensor([[bias_v, time_s]]), torch.tensor([site])))


@pytest.mark.parametrize("probability", [(0.7, 0.1, 0.1, 0.05, 0.05), (0.2,) * 5, (0.01, 0.01, 0.01, 0.01, 0.96)])
def test_a_declaration_earns_what_it_should_by_hand(probability):
    env, protocol = made()
    _, info = env.reset(seed=3)
    true = probability[int(info["true_answer"])]
    _, reward, terminated, truncated, info = env.step(declared(protocol, *probability))
    quadratic = 2.0 * true - sum(part**2 for part in probability)
    expected = quadratic - 0.2 + 0.1 * (math.log(true) - math.log(0.2))
    assert (terminated, truncated) == (True, False)
    assert reward == pytest.approx(expected, abs=1e-5)
    assert info["brier"] == pytest.approx(sum(part**2 for part in probability) - 2.0 * true + 1.0, abs=1e-5)
    assert info["log_score"] == pytest.approx(math.log(true), abs=1e-5)


def test_it_pays_to_declare_what_is_believed():
    """Proper: of all declarations the believed probabilities have the highest expected reward."""
    env, _ = made()
    task: HypothesisDiscrimination = env.unwrapped.batch.task
    generator = torch.Generator().manual_seed(4)
    believed = torch.distributions.Dirichlet(torch.ones(5)).sample((40,))
    other = torch.softmax(believed.log() + 0.3 * torch.randn(40, 5, generator=generator), dim=1)

    def expected(probability: torch.Tensor) -> torch.Tensor:
        return (believed * task._earned(probability, probability.unsqueeze(1))).sum(1)

    assert bool((expected(believed) > expected(other)).all())


def test_success_needs_the_largest_share_and_more_than_half():
    env, protocol = made()
    for share, success in ((0.51, 1.0), (0.49, 0.0)):
        _, info = env.reset(seed=3)
        probability = [(1.0 - share) / 4.0] * 5
        probability[int(info["true_answer"])] = share
        info = env.step(declared(protocol, *probability))[4]
        assert info["success"] == success and info["claim_right"] == 1.0 and info["confident"] == 0.0


def test_a_confident_wrong_claim_loses_most():
    env, protocol = made()
    rewards = []
    for share in (0.4, 0.9, 0.999):
        _, info = env.reset(seed=3)
        wrong = (int(info["true_answer"]) + 1) % 5
        probability = [(1.0 - share) / 4.0] * 5
        probability[wrong] = share
        _, reward, _, _, info = env.step(declared(protocol, *probability))
        rewards.append(float(reward))
    assert info["confident_wrong"] == 1.0
    assert rewards == sorted(rewards, reverse=True) and rewards[-1] < -1.0


def test_costs_add_up_by_hand():
    env, protocol = made()
    env.reset(seed=3)
    rewards = [env.step(experiment(protocol, 5.0, time_s))[1] for time_s in (0.001, 10.0, 100.0)]
    expected = [-0.5 * seconds / 2400.0 for seconds in (16.001, 26.0, 116.0)]
    assert rewards == pytest.approx(expected, abs=1e-6)
    _, reward, _, _, info = env.step(one(protocol.enabling("recondition", 1)))
    assert reward == pytest.approx(-0.5 * 60.0 / 2400.0) and info["enabling"] == 1.0
    assert info["seconds"] == pytest.approx(16.001 + 26.0 + 116.0 + 60.0) and info["experiments"] == 3.0
    info = env.step(declared(protocol, 0.2, 0.2, 0.2, 0.2, 0.2))[4]
    right = info["claim_right"]
    assert info["score_with_costs"] == pytest.approx(right - 0.5 * 218.001 / 2400.0, abs=1e-5)
    assert info["episode_return"] == pytest.approx(sum(expected) - 0.5 * 60.0 / 2400.0, abs=1e-5)


def test_a_second_declaration_is_refused():
    env, protocol = made()
    env.reset(seed=3)
    env.step(declared(protocol, 0.2, 0.2, 0.2, 0.2, 0.2))
    with pytest.raises(ActionError, match="have ended"):
        env.unwrapped.step(declared(protocol, 0.6, 0.1, 0.1, 0.1, 0.1))


def test_an_experiment_without_a_place_ends_the_episode_undeclared():
    env, protocol = made(task={"experiments": 3}, budget={"steps": 9})
    env.reset(seed=3)
    for number in range(4):
        observation, reward, terminated, _, info = env.step(experiment(protocol, 5.0, 1.0))
        assert terminated == (number == 3)
    assert info["declared"] == 0.0 and info["reward_claim"] == 0.0 and reward < 0.0
    assert observation["measurements"][:, 0].tolist() == [1.0] * 3


def test_what_is_seen_is_what_was_done():
    env, protocol = made("stem_gym/HypothesisDiscrimination-site-v0")
    env.reset(seed=5)
    for bias_v, site in ((5.0, 0), (2.0, 3), (8.0, 3)):
        observation, *_ = env.step(experiment(protocol, bias_v, 1.0, site))
    seen = protocol.history(torch.as_tensor(observation["measurements"]).unsqueeze(0))
    assert seen.done[0].sum() == 3
    assert seen.design[0, :3, 0].tolist() == pytest.approx([5.0, 2.0, 8.0], rel=1e-4)
    assert seen.site[0, :3].tolist() == [0, 3, 3] and seen.fresh[0, :3].tolist() == [True, True, False]
    present = protocol.present(torch.as_tensor(observation["present"]).unsqueeze(0), torch.ones(1, 3))
    assert present.site.tolist() == [3] and present.fresh.tolist() == [[False, True, True, False, True]]
    observation, *_, info = env.step(one(protocol.enabling("erase", 1)))
    present = protocol.present(torch.as_tensor(observation["present"]).unsqueeze(0), torch.ones(1, 3))
    assert present.fresh.tolist() == [[False, True, True, True, True]]
    assert info["seconds"] == pytest.approx(3 * 31.0 + 180.0 + 120.0)


def test_tuning_is_seen_and_the_noise_told_is_that_of_the_instrument():
    env, protocol = made("stem_gym/HypothesisDiscrimination-drift-v0")
    observation, _ = env.reset(seed=5)
    instrument = env.unwrapped.batch.instrument

    def told() -> float:
        numbers = torch.as_tensor(observation["present"]).unsqueeze(0)
        return float(protocol.present(numbers, torch.ones(1, 3)).noise_factor)

    for _ in range(3):
        assert told() == pytest.approx(float(torch.exp(instrument._now.untuned_s[0] / 900.0)), rel=1e-4)
        observation, *_ = env.step(experiment(protocol, 5.0, 10.0))
    assert told() > 2.7
    observation, *_ = env.step(one(protocol.enabling("tune", 1)))
    assert told() == 1.0


def test_without_truth_it_earns_what_its_own_odds_let_expect():
    env, protocol = made()
    batch = env.unwrapped.batch
    env.reset(seed=3)
    probability = torch.tensor([[0.7, 0.1, 0.1, 0.05, 0.05]])
    state = batch.task.decided(batch._state, protocol.declarations(probability), torch.arange(1))
    _, score = batch.task.score(state, [], {})
    square = float(probability.square().sum())
    log = float((probability * probability.log()).sum())
    assert float(score.reward) == pytest.approx(square - 0.2 + 0.1 * (log - math.log(0.2)), abs=1e-5)
    assert "true_answer" not in score.metrics


def test_a_belief_changes_nothing_but_what_is_seen():
    """The same world, costs and rewards as without a referee, whose belief is seen before the first experiment too."""
    plain, protocol = made()
    advised, _ = made("stem_gym/HypothesisDiscrimination-belief-v0", instrument={"referee": {"particles": 1024}})
    assert "belief" not in plain.observation_space.spaces
    one, other = plain.reset(seed=11)[0], advised.reset(seed=11)[0]
    assert other["belief"].tolist() == [0.25] * 4 + [0.0]
    actions = [experiment(protocol, bias_v, time_s) for bias_v in (2.0, 6.0, 18.0) for time_s in (0.001, 1.0, 100.0)]
    for action in [*actions, one_of_routines(protocol), declared(protocol, 0.6, 0.1, 0.1, 0.1, 0.1)]:
        assert all(np.array_equal(one[key], other[key]) for key in one) and set(other) == {*one, "belief"}
        before = other["belief"]
        (one, *rest, info), (other, *same, told) = plain.step(action), advised.step(action)
        assert rest == same and info == told
        measured = info["experiments"] > 0 and info["enabling"] == 0
        assert (other["belief"] != before).any() == measured, "only measurements tell anything"
        assert other["belief"].sum() == pytest.approx(1.0, abs=3e-4)
    assert advised.observation_space.contains(other)


def one_of_routines(protocol: Protocol) -> np.ndarray:
    return one(protocol.enabling("recondition", 1))


def test_the_belief_that_is_seen_is_a_referees_of_what_is_seen():
    """Another referee, fed with the observation alone, holds the same."""
    env, protocol = made("stem_gym/HypothesisDiscrimination-belief-v0")
    env.reset(seed=12)
    for bias_v, time_s in ((2.0, 0.001), (18.0, 1.0), (6.0, 100.0), (1.5, 10.0), (12.0, 0.1)):
        observation, *_ = env.step(experiment(protocol, bias_v, time_s))
    judge = Referee(protocol.experiment, 1, seed=5)
    judge.update(protocol.history(torch.as_tensor(observation["measurements"]).unsqueeze(0)))
    assert observation["belief"].tolist() == pytest.approx(judge.probability[0].tolist(), abs=0.04)


@pytest.mark.parametrize(
    ("where", "change", "key"),
    [
        ("instrument", {"noise": {"absolute": 40.0}}, "noise.absolute is 8.0 for the task and 40.0 for the instrument"),
        ("task", {"sites": {"count": 3}}, "sites is {'count': 3.* for the task and None for the instrument"),
        ("task", {"laws": "coarsening"}, "laws is 'coarsening' for the task and 'domain_growth' for the instrument"),
    ],
)
def test_a_task_and_an_instrument_that_say_otherwise_are_refused(where, change, key):
    with pytest.raises(ConfigError, match=f"experiment.{key}. Change both, task.experiment.*misdescribed"):
        made(**{where: {"experiment": change}})


def test_both_may_be_changed_and_a_wrong_description_may_be_asked_for():
    change = {"experiment": {"noise": {"absolute": 40.0}}}
    made(task=change, instrument=change)
    env, protocol = made(instrument=change | {"misdescribed": True})
    assert protocol.experiment.noise.absolute == 8.0 and env.unwrapped.batch.instrument.config.misdescribed


def test_truths_outside_the_set_may_be_ones_own_alone():
    own = {"law": "wall_pinning", "priors": {
        "a_nm": {"kind": "lognormal", "median": 9.0, "sigma": 0.2},
        "alpha": {"kind": "normal", "mean": 3.0, "sd": 0.1},
        "tau0_s": {"kind": "loguniform", "low": 1e-5, "high": 1e-4},
    }}  # fmt: skip
    laws = {"creep": None, "hybrid": None, "saturating": None, "mine": own}
    env, _ = made("stem_gym/HypothesisDiscrimination-open-v0", instrument={"outside": {"laws": laws, "share": 1.0}})
    instrument = env.unwrapped.batch.instrument
    assert [one.name for one in instrument._outside] == ["mine"]
    for seed in range(8):
        env.reset(seed=seed)
        assert instrument.truth()["answer"].tolist() == [4], "none of the set's four"
    with pytest.raises(ConfigError, match="none left to draw from"):
        made("stem_gym/HypothesisDiscrimination-open-v0", instrument={"outside": {"laws": laws | {"mine": None}}})


def test_the_particulars_name_every_number_of_an_action_and_every_prior():
    env, protocol = made("stem_gym/HypothesisDiscrimination-site-v0")
    told = env.unwrapped.batch.task.particulars()
    assert told["action"].startswith("0: kind experiment, 1: kind erase, 2: kind declare, 3: axis bias_v")
    assert told["action"].count(": ") == protocol.action_size and "site, of 5" in told["action"]
    assert told["axis time_s"].startswith("one of 0.001, ") and told["axis bias_v"] == "0.5 to 20, log"
    assert "tau0_s loguniform low 1e-05 high 0.000316228" in told["law wall_pinning"]
