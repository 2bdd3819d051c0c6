"""Numbers of actions and observations of a campaign say what was meant, and refuse what makes no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stem_gym.core.config import parse
from stem_gym.core.errors import ActionError, ConfigError
from stem_gym.core.experiments import Experiment, History, Present, Protocol, protocol_of

SECTION: dict[str, Any] = {
    "laws": "domain_growth",
    "noise": {"absolute": 8.0, "relative": 0.08, "growth_s": 900.0},
    "measure_s": 16.0,
    "sites": {"count": 5, "factor": 0.5, "remembers": True, "move_s": 180.0},
    "enabling": {"tune": {"does": "tune", "seconds": 300.0}, "erase": {"does": "erase", "seconds": 60.0}},
}


def experiment(**changes: Any) -> Experiment:
    return parse(Experiment, {**SECTION, **changes}, "test")


@pytest.fixture(scope="module")
def protocol() -> Protocol:
    return Protocol(experiment())


def test_experiments_come_back_as_they_were_asked_for(protocol):
    design, site = protocol.designs(), torch.arange(120) % 5
    wish = protocol.wish(protocol.experiments(design, site))
    assert wish.kind.tolist() == [0] * 120 and wish.site.tolist() == site.tolist()
    torch.testing.assert_close(wish.design, design)


def test_every_number_of_an_action_is_within_the_box(protocol):
    action = protocol.experiments(protocol.designs(), torch.arange(120) % 5)
    declared = protocol.declarations(torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]]))
    for one in (action, declared, protocol.enabling("tune", 3)):
        assert one.shape[1] == protocol.action_size and bool((one.abs() <= 1.0).all())


def test_declared_probabilities_come_back(protocol):
    probability = torch.softmax(4.0 * torch.randn(50, 5, generator=torch.Generator().manual_seed(1)), dim=1)
    wish = protocol.wish(protocol.declarations(probability))
    assert [protocol.kinds[kind] for kind in wish.kind] == ["declare"] * 50
    torch.testing.assert_close(wish.probability, probability, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "probability",
    [
        [0.5, 0.2, 0.1, 0.1, 0.2],
        [0.4, 0.2, 0.1, 0.1, 0.1],
        [1.2, -0.2, 0.0, 0.0, 0.0],
        [float("nan"), 0.25, 0.25, 0.25, 0.25],
        [0.0, 0.0, 0.0, 0.0, 0.0],
    ],
)
def test_what_is_no_distribution_is_refused_and_not_normalised(protocol, probability):
    with pytest.raises(ActionError, match="must be a distribution"):
        protocol.declarations(torch.tensor([[0.2] * 5, probability]))


def test_a_declaration_of_too_few_answers_is_refused(protocol):
    with pytest.raises(ActionError, match=r"thermodynamic_1.*none.*\(n, 5\); given \(1, 4\)"):
        protocol.declarations(torch.full((1, 4), 0.25))


@pytest.mark.parametrize(("bias_v", "time_s"), [(0.4, 1.0), (25.0, 1.0), (float("nan"), 1.0), (5.0, 0.5)])
def test_a_design_outside_the_ranges_is_refused(protocol, bias_v, time_s):
    with pytest.raises(ConfigError, match="bias_v must be within|time_s must be one of"):
        protocol.experiments(torch.tensor([[bias_v, time_s]]), torch.tensor([0]))


@pytest.mark.parametrize("site", [-1, 5, 7])
def test_a_site_that_is_not_there_is_refused(protocol, site):
    with pytest.raises(ConfigError, match=rf"Sites go from 0 to 4; given \[{site}\]"):
        protocol.experiments(torch.tensor([[5.0, 1.0]]), torch.tensor([site]))


def test_plain_lists_of_probabilities_are_taken(protocol):
    given = [[0.2, 0.2, 0.2, 0.2, 0.2]]
    assert torch.equal(protocol.declarations(given), protocol.declarations(torch.tensor(given)))


def test_the_observation_says_what_was_measured(protocol):
    generator = torch.Generator().manual_seed(2)
    design = protocol.designs()[torch.randint(0, 120, (3, 4), generator=generator)]
    done = torch.arange(4) < torch.tensor([[0], [2], [4]])
    history = History(
        done,
        design,
        torch.randint(0, 5, (3, 4), generator=generator),
        300.0 * torch.rand(3, 4, generator=generator) - 10.0,
        torch.exp(3.0 * torch.rand(3, 4, generator=generator)),
        torch.rand(3, 4, generator=generator) > 0.5,
        torch.rand(3, 4, generator=generator) > 0.5,
    )
    numbers = protocol.measurement(history)
    assert numbers.shape == (3, 4, protocol.measurement_size)
    assert not bool(numbers[~done].any()), "what is not there is all zeros"
    back = protocol.history(numbers)
    assert back.done.tolist() == done.tolist()
    for name in ("design", "site", "value", "noise_factor", "fresh", "calibrated"):
        torch.testing.assert_close(getattr(back, name)[done], getattr(history, name)[done], rtol=1e-4, atol=1e-3)


def test_the_observation_says_how_things_stand(protocol):
    present = Present(
        torch.tensor([1.0, 7.4]),
        torch.tensor([0, 4]),
        torch.tensor([[True] * 5, [False, True, False, True, True]]),
        torch.tensor([[False] * 5, [True] * 5]),
        protocol.designs()[[3, 50]],
        torch.rand(2, 3),
    )
    numbers = protocol.present_numbers(present)
    assert numbers.shape == (2, protocol.present_size) and bool((numbers.abs() <= 1.0).all())
    back = protocol.present(numbers, present.left)
    for name in ("noise_factor", "site", "fresh", "calibrated", "design", "left"):
        torch.testing.assert_close(getattr(back, name), getattr(present, name), rtol=1e-4, atol=1e-4)


def test_seconds_by_hand():
    protocol = Protocol(experiment())
    design = torch.tensor([[5.0, 10.0], [5.0, 1e-3]])
    assert protocol.seconds(design, torch.tensor([1.0, 0.0]), design).tolist() == pytest.approx([206.0, 16.001])
    damage = Protocol(
        experiment(laws="damage", sites=None, enabling={}, settle_s={"energy_kev": 2700.0, "temperature_k": 900.0})
    )
    before, after = torch.tensor([[60.0, 100.0, 1e3]]), torch.tensor([[80.0, 100.0, 1e4]])
    assert damage.seconds(after, torch.zeros(1), before).tolist() == [16.0 + 2700.0]
    assert damage.seconds(before, torch.zeros(1), before).tolist() == [16.0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"settle_s": {"bias_v": 3.0}}, "bias_v is no axis"),
        ({"noise": {"absolute": 0.0}, "enabling": {}}, "absolute must be positive"),
        ({"noise": {"absolute": 0.0, "relative": 0.1}, "enabling": {}}, "absolute must be positive"),
        ({"noise": {"absolute": 8.0}}, "tune would do nothing"),
        ({"enabling": {"declare": SECTION["enabling"]["tune"]}}, "declare is the name of"),
        ({"enabling": {"bias_v": SECTION["enabling"]["tune"]}}, "bias_v is the name of"),
        ({"settle_s": {"bias_v": -3.0}}, "settle_s.bias_v: input should be greater than or equal to 0"),
        ({"sites": None}, "erase would do nothing"),
        ({"noise": {"absolute": 8.0, "growth_s": 900.0, "untuned_s": [900.0, 100.0]}}, "untuned_s must be two times"),
        ({"noise": {"absolute": 8.0, "untuned_s": [0.0, 9.0]}, "enabling": {}}, "needs growth_s"),
    ],
)
def test_costs_and_actions_that_make_no_sense_are_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        experiment(**changes).check()


def test_another_task_has_no_protocol():
    with pytest.raises(ConfigError, match="no section 'experiment'"):
        protocol_of({"kind": "atom_targeting"})
    assert protocol_of({"experiment": SECTION}).kinds == ("experiment", "tune", "erase", "declare")
