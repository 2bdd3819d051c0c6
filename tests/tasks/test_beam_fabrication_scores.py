"""Beam fabrication: rewards by hand; who follows its nose wins; observations hold no truth; bad input is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from stem_gym.core.errors import CapabilityError, ConfigError
from tests.tasks.fabrication import (
    BOND_ANG,
    ID,
    TERMS,
    batch,
    dwelled,
    frame,
    greedy,
    opened,
    pairs,
    start,
    task,
    world,
)

KINDS = [ID] + [f"stem_gym/BeamFabrication-{kind}-v0" for kind in ("discrete", "feedback", "image", "trimer")]


# Scores by hand


def test_the_terms_of_the_reward_by_hand():
    """Two bonds from the goal, then half a bond nearer, then on it: progress, success, time and damage."""
    it = task(progress_weight=0.2, success_weight=3.0, time_weight=0.6, damage_weight=0.5)
    state = opened(it, [(0.0, 0.0)])
    goal = state.goal_ang[0, 0].clone()
    unit = goal / goal.norm()

    def at(bonds: float) -> list[tuple[float, float]]:
        return [tuple((goal - bonds * BOND_ANG * unit).tolist())]

    state, score = it.score(state, [frame(at(2.0))], world(at(2.0)))
    assert float(score.metrics["reward_progress"]) == 0.0, "the first frame is where it begins"
    assert float(score.metrics["distance_ang"]) == pytest.approx(2.0 * BOND_ANG, abs=1e-4)
    readings = [dwelled([1.0] * 8, 10.0), frame(at(1.5))]
    state, score = it.score(it.observe(state, readings)[0], readings, world(at(1.5), lost=2))
    terms = [float(score.metrics[term]) for term in TERMS]
    assert terms == pytest.approx([0.2 * 0.5, 0.0, -0.6 * 12.0 / 60.0, -0.5 * 2], abs=1e-4)
    assert float(score.reward) == pytest.approx(sum(terms), abs=1e-5) and not score.terminated
    assert float(score.metrics["discount"]) == pytest.approx(math.exp(-12.0 / 300.0))
    readings = [frame(at(0.45))]
    state, score = it.score(it.observe(state, readings)[0], readings, world(at(0.45), lost=2))
    terms = [float(score.metrics[term]) for term in TERMS]
    assert terms == pytest.approx([0.2 * 1.05, 3.0, -0.02, 0.0], abs=1e-4)
    assert score.terminated and score.metrics["success"] == 1.0
    assert float(score.metrics["goal_s"]) == pytest.approx(16.0)


@pytest.mark.parametrize(("bonds", "reached"), [(0.49, True), (0.51, False)])
def test_success_is_half_a_bond(bonds, reached):
    it = task()
    state = opened(it, [(0.0, 0.0)])
    goal = state.goal_ang[0, 0]
    _, score = it.score(state, [], world([(float(goal[0]), float(goal[1]) + bonds * BOND_ANG)]))
    assert bool(score.metrics["success"]) == bool(score.terminated) == reached


def test_every_goal_must_have_its_atom():
    it = pairs(task)
    state = opened(it, [(-6.0, 0.0), (5.0, 1.0)])
    first, second = ([tuple(place.tolist())] for place in state.goal_ang[0])
    _, score = it.score(state, [], world(first * 2))
    assert not score.terminated and float(score.metrics["distance_ang"]) == pytest.approx(BOND_ANG, abs=1e-3)
    _, score = it.score(state, [], world(second + first))
    assert score.terminated and score.metrics["success"] == 1.0, "whichever atom"


def test_a_lost_dopant_and_a_broken_sheet_end_the_episode():
    it = task(vacancies_max=3)
    state = opened(it, [(0.0, 0.0)])
    state, _ = it.score(state, [], world([(0.0, 0.0)]))
    _, score = it.score(state, [], world([(0.0, 0.0)], there=[False]))
    assert score.terminated and score.metrics["lost_dopant"] == 1.0 and score.metrics["success"] == 0.0
    assert float(score.reward) == pytest.approx(-0.5), "a dopant's damage, and no distance"
    held, score = it.score(state, [], world([(0.0, 0.0)], lost=3))
    assert not score.terminated and score.metrics["broken"] == 0.0
    _, score = it.score(held, [], world([(0.0, 0.0)], lost=4))
    assert score.terminated and score.metrics["broken"] == 1.0
    assert float(score.metrics["reward_damage"]) == pytest.approx(-0.5), "each counts once"


def test_without_truth_it_scores_what_it_saw_and_either_can_be_the_reward():
    for source in ("truth", "perception"):
        it = task(scores_from=source)
        state = opened(it, [(0.0, 0.0)])
        goal = tuple(state.goal_ang[0, 0].tolist())
        state, _ = it.score(state, [], world([(0.0, 0.0)]))
        readings = [frame([(0.3, 0.3)])]
        for truth in ({}, world([goal])):
            _, score = it.score(it.observe(state, readings)[0], readings, truth)
            by_truth = source == "truth" and bool(truth)
            assert bool(score.terminated) == by_truth
            assert (float(score.reward) > 0.9) == by_truth
            assert score.metrics["success_perceived"] == 0.0
        assert score.metrics["success"] == 1.0 and "jumps" in score.metrics


# With the microscope


@pytest.mark.parametrize("id", [ID, "stem_gym/BeamFabrication-discrete-v0"])
def test_a_sensible_policy_wins(id):
    """A mirrored axis or a wrong sign anywhere between action and score would make it fail."""
    env = batch(16, id, instrument={"drift": {"speed_ang_per_s": 0.02}})
    start(env, seed=5)
    alive, success = torch.ones(16).bool(), torch.zeros(16)
    while alive.any():
        step = env.step(greedy(env), alive.nonzero().squeeze(1))
        assert torch.allclose(sum(step.metrics[term] for term in TERMS)[alive], step.reward[alive], atol=1e-5)
        success = torch.where(alive, step.metrics["success"], success)
        alive &= ~step.terminated
    assert success.mean() > 0.8
    assert ((env.ledger.seconds >= 600.0) | (success > 0)).float().mean() > 0.9, "the others ran out of time"


def test_the_budget_ends_the_episode():
    env = batch(1, budget={"steps": 3})
    start(env)
    ends = [bool(env.step(torch.tensor([[1.0, 1.0, -1.0]])).terminated) for _ in range(3)]
    assert ends == [False, False, True]


@pytest.mark.parametrize("id", KINDS)
def test_the_observation_holds_no_truth(id):
    """Worlds that differ in what only truth knows look the same, and what is judged does not feed back."""
    env = batch(3, id)
    start(env)
    begin, played = env.snapshot(), []
    for _ in range(4):
        action, rows = greedy(env), (~env.ended).nonzero().squeeze(1)
        played.append((action, rows, env.step(action, rows)))

    def lies() -> Mapping[str, Tensor]:
        truth = dict(type(env.instrument).truth(env.instrument))
        return truth | {"dopant_xy_ang": truth["dopant_xy_ang"] + 0.1, "lost_atoms": truth["lost_atoms"] + 1}

    env.restore(begin)
    env.instrument.truth = lies
    differs = False
    for action, rows, one in played:
        env.ended = env.ended.index_fill(0, rows, False)  # where they are judged otherwise, they go on
        other = env.step(action, rows)
        assert one.observation.keys() == other.observation.keys()
        for key in one.observation:
            assert torch.equal(one.observation[key], other.observation[key]), key
        differs |= not torch.equal(one.reward, other.reward)
    assert differs, "the lies were told to the judge"


# Bad input


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dopants": 2}, "2 dopants need a pattern"),
        ({"dopants": 2, "pattern": "dimmer"}, "Unknown pattern 'dimmer'.*dimer"),
        ({"dopants": 3, "pattern": "dimer"}, "must have 3 different sites"),
        ({"dopants": 2, "pattern": ((0, 0, 0), (0, 0, 0))}, "must have 2 different sites"),
        ({"dopants": 2, "pattern": ((0, 0, 0), (0, 0, 2))}, "sublattice, 0 or 1"),
        ({"dopants": 2, "pattern": ((0, 0, 0), (9, 0, 0))}, "does not fit into a field of 25"),
        ({"dopants": 7, "pattern": "ring6"}, "dopants"),
        ({"dwell_min_s": 9.0, "dwell_max_s": 3.0}, "dwell_min_s must not exceed"),
        ({"dwells_s": (0.1,)}, "dwells_s must lie within"),
        ({"energies_kev": (60.0, 60.0)}, "different positive"),
        ({"energies_kev": (60.0, 0.0)}, "different positive"),
        ({"stop": {"rise": -0.1}}, "rise"),
        ({"success_weight": -1.0}, "success_weight"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, why):
    with pytest.raises(ConfigError, match=why):
        task(**changes)


def test_more_dopants_than_there_are_for_certain_are_refused():
    with pytest.raises(CapabilityError, match=r"needs 2 dopants .* only 1\. .*count_min"):
        batch(1, task={"dopants": 2, "pattern": "dimer"})
    some = {"specimen": {"dopants": [{"element": "Si", "count_min": 1, "count_max": 3, "window_ang": 12.0}]}}
    with pytest.raises(CapabilityError, match="only 1"):
        batch(1, task={"dopants": 2, "pattern": "dimer"}, instrument=some)
    it = pairs(task)
    with pytest.raises(ConfigError, match="task.dopants is 2; the instrument tells at most 1"):
        opened(it, [(0.0, 0.0)])
