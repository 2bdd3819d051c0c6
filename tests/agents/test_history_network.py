"""The network over the measurements of a campaign: order, choices, and what its actions say."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import agents
import stem_gym  # noqa: F401 – registers the ids
from agents.learning.history_network import (
    HistoryNetwork,
    HistorySettings,
    Picked,
    entropy,
    log_probability,
    most_likely,
    reads_history,
    sampled,
)
from stem_gym.core.config import parse
from stem_gym.core.errors import PolicyError
from stem_gym.core.experiments import Experiment, Protocol

PLACES = 6
SECTION = {
    "laws": "domain_growth",
    "noise": {"absolute": 8.0, "relative": 0.08, "growth_s": 900.0},
    "measure_s": 16.0,
    "sites": {"count": 3, "factor": 0.5, "remembers": True, "move_s": 180.0},
    "enabling": {"tune": {"does": "tune", "seconds": 300.0}, "erase": {"does": "erase", "seconds": 60.0}},
}


@pytest.fixture(scope="module")
def protocol() -> Protocol:
    return Protocol(parse(Experiment, SECTION, "test"))


def space_of(protocol: Protocol, **more: spaces.Space) -> spaces.Dict:
    def box(*shape: int) -> spaces.Box:
        return spaces.Box(-20.0, 20.0, shape, np.float32)

    known = {"measurements": box(PLACES, protocol.measurement_size), "present": box(protocol.present_size)}
    return spaces.Dict({**known, "budget": box(3), **more})


def seen(protocol: Protocol, rows: int, measured: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    measurements = torch.rand(rows, PLACES, protocol.measurement_size, generator=generator)
    measurements[:, :measured, 0] = 1.0
    measurements[:, measured:] = 0.0
    present = torch.rand(rows, protocol.present_size, generator=generator)
    return {"measurements": measurements, "present": present, "budget": torch.rand(rows, 3, generator=generator)}


def fresh(protocol: Protocol, **more: spaces.Space) -> HistoryNetwork:
    torch.manual_seed(0)
    network = HistoryNetwork(space_of(protocol, **more), protocol, HistorySettings(features=16, hidden=32))
    with torch.no_grad():
        for layer in (network.kind, network.design, network.site, network.answer):
            layer.weight.mul_(100.0)
    return network


def test_the_order_of_measurements_and_empty_places_do_not_matter(protocol):
    network, observation = fresh(protocol), seen(protocol, 5, measured=4)
    order = torch.tensor([2, 5, 0, 3, 4, 1])
    other = observation | {"measurements": observation["measurements"][:, order]}
    for one, same in zip(vars(network(observation)).values(), vars(network(other)).values(), strict=True):
        torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-5)
    changed = observation["measurements"].clone()
    changed[:, 0, 4] += 1.0
    assert not torch.allclose(network(observation).answer, network(observation | {"measurements": changed}).answer)


def test_what_was_picked_is_what_the_action_asks_for(protocol):
    network = fresh(protocol)
    picked = Picked(torch.tensor([0, 0, 1, 2, 3]), torch.tensor([0, 119, 5, 7, 9]), torch.tensor([2, 0, 1, 1, 0]))
    answer = torch.tensor([[3.0, 0.0, -1.0, 0.0, 1.0]]).expand(5, -1)
    wish = protocol.wish(network.action(picked, answer))
    assert [protocol.kinds[kind] for kind in wish.kind] == ["experiment", "experiment", "tune", "erase", "declare"]
    torch.testing.assert_close(wish.design[:2], protocol.designs()[[0, 119]])
    assert wish.site[:2].tolist() == [2, 0]
    torch.testing.assert_close(wish.probability[4], torch.softmax(answer[4], 0), rtol=1e-5, atol=1e-6)


def test_draws_are_as_frequent_as_their_probabilities_say(protocol):
    network, draws = fresh(protocol), 20_000
    observation = {key: value.expand(draws, *value.shape[1:]) for key, value in seen(protocol, 1, 2).items()}
    with torch.no_grad():
        choice = network(observation)
    picked = sampled(choice, torch.rand(draws, 3, generator=torch.Generator().manual_seed(5)))
    for index, logits in ((picked.kind, choice.kind), (picked.site, choice.site), (picked.design, choice.design)):
        share = torch.bincount(index, minlength=logits.shape[1]) / draws
        expected = torch.softmax(logits[0], 0)
        assert bool(((share - expected).abs() < 5.0 * (expected * (1.0 - expected) / draws).sqrt() + 1e-4).all())


def test_probabilities_of_all_that_can_be_picked_add_up_to_one_and_give_the_entropy(protocol):
    network = fresh(protocol)
    experiments = len(protocol.designs()) * protocol.sites
    count = experiments + len(protocol.kinds) - 1
    picked = Picked(
        torch.cat((torch.zeros(experiments, dtype=torch.int64), torch.arange(1, len(protocol.kinds)))),
        torch.cat((torch.arange(experiments) // protocol.sites, torch.zeros(count - experiments, dtype=torch.int64))),
        torch.cat((torch.arange(experiments) % protocol.sites, torch.zeros(count - experiments, dtype=torch.int64))),
    )
    observation = {key: value.expand(count, *value.shape[1:]) for key, value in seen(protocol, 1, 2).items()}
    with torch.no_grad():
        choice = network(observation)
    log = log_probability(choice, picked)
    assert float(log.exp().sum()) == pytest.approx(1.0, abs=1e-4)
    assert float(-(log.exp() * log).sum()) == pytest.approx(float(entropy(choice)[0]), rel=1e-4)


def test_a_belief_is_where_its_own_starts(protocol):
    answers = len(protocol.answers)
    network = HistoryNetwork(
        space_of(protocol, belief=spaces.Box(0.0, 1.0, (answers,), np.float32)), protocol, HistorySettings()
    )
    belief = torch.tensor([[0.7, 0.1, 0.1, 0.05, 0.05]])
    told = torch.softmax(network(seen(protocol, 1, 2) | {"belief": belief}).answer, 1)
    torch.testing.assert_close(told, belief, atol=0.03, rtol=0.1)


def test_the_most_likely_is_done(protocol):
    network, observation = fresh(protocol), seen(protocol, 7, 3)
    choice = network(observation)
    assert most_likely(choice).design.tolist() == choice.design.argmax(1).tolist()
    wish = protocol.wish(network.decide(observation))
    assert wish.kind.tolist() == choice.kind.argmax(1).tolist()


def test_other_observations_are_refused(protocol):
    image = spaces.Dict({"image": spaces.Box(0, 255, (1, 8, 8), np.uint8)})
    assert not reads_history(image)
    with pytest.raises(PolicyError, match="measurements, present, budget"):
        HistoryNetwork(image, protocol, HistorySettings())


def test_a_policy_that_draws_does_so_by_the_seed_of_its_world_alone():
    env = gymnasium.make_vec("stem_gym/HypothesisDiscrimination-easy-v0", num_envs=3, autoreset_mode="Disabled")
    observation, _ = env.reset(seed=[5, 6, 7])

    def acted(rows, seeds, draws):
        some = gymnasium.make_vec("stem_gym/HypothesisDiscrimination-easy-v0", num_envs=rows, autoreset_mode="Disabled")
        policy = agents.make("ppo", some, weights="fresh", history={"features": 16, "hidden": 32, "draws": draws})
        with torch.no_grad():
            policy.network.kind.bias[0] = 20.0  # experiments alone
        policy.reset(range(rows), seeds)
        given = {key: value[3 - rows :] for key, value in observation.items()}
        found = np.stack([policy.act(given) for _ in range(6)], axis=1)
        some.close()
        return found

    three, two = acted(3, [5, 6, 7], True), acted(2, [6, 7], True)
    np.testing.assert_array_equal(three[1:], two)
    assert len(np.unique(three[0], axis=0)) > 1 and len(np.unique(acted(3, [5, 6, 7], False)[0], axis=0)) == 1
    env.close()
