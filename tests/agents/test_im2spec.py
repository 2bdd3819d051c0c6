"""The im2spec agent: it finds what is wanted, also when something else is wanted in the middle."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

import agents
from agents.policy import Face
from stem_gym.core.errors import PolicyError
from tests.agents.spectral_field import SIDE, Field, face

ROWS = 4


def searched(field: Field, policy: agents.Policy, steps: int) -> None:
    for _ in range(steps):
        field.measure(policy.act(field.observation()))


def best_share(field: Field, number: int) -> np.ndarray:
    """(B,) where between the least and the most of the field the best measured cell is, without noise."""
    truth = field.truth(number).numpy()
    best = np.where(field.measured, truth, -np.inf).max(1)
    return (best - truth.min(1)) / (truth.max(1) - truth.min(1))


def test_it_finds_the_best_place_sooner_than_chance() -> None:
    shares = {}
    for kind in (None, {"kind": "random_choice"}):
        field, policy = Field(ROWS, seed=3), agents.make("im2spec", face(ROWS), acquisition=kind)
        policy.reset(range(ROWS), range(ROWS))
        searched(field, policy, 22)
        assert field.measured.sum(1).tolist() == [22] * ROWS  # no cell twice
        shares[kind is None] = best_share(field, 0)
    assert shares[True].min() > 0.9
    assert shares[True].mean() > shares[False].mean() + 0.05


def test_another_wish_changes_the_choice_without_another_fit() -> None:
    field, policy = Field(ROWS, seed=5), agents.make("im2spec", face(ROWS))
    policy.reset(range(ROWS), range(ROWS))
    searched(field, policy, 16)
    decisions, fits = [], []
    for number in (0, 1, 0):
        field.wanted[:] = number
        policy.act(field.observation())
        decisions.append(policy.explain())
        fits.append(policy.model.fits)
    assert len(set(fits)) == 1
    first, other, again = decisions
    assert np.array_equal(first.acquisition, again.acquisition) and np.array_equal(first.chosen, again.chosen)
    assert (first.chosen != other.chosen).any()
    for row in range(ROWS):  # order of cells, which is what an acquisition function is for
        both = np.stack((first.acquisition[row], other.acquisition[row])).reshape(2, -1)
        ranks = torch.from_numpy(both.argsort(1).argsort(1).astype(np.float32))
        assert float(torch.corrcoef(ranks)[0, 1]) < 0.99


def test_after_another_wish_it_soon_finds_what_is_wanted_now() -> None:
    """Over many fields: one alone may have its best cell where nothing in the image tells of it."""
    shares = {}
    for kind in (None, {"kind": "random_choice"}):
        field, policy = Field(16, seed=5), agents.make("im2spec", face(16), acquisition=kind)
        policy.reset(range(16), range(16))
        searched(field, policy, 16)
        field.wanted[:] = 1
        searched(field, policy, 8)
        shares[kind is None] = best_share(field, 1)
    assert shares[True].mean() > 0.88 and np.median(shares[True]) > 0.95
    assert shares[True].mean() > shares[False].mean() + 0.1


def test_it_explains_itself_in_maps() -> None:
    field, policy = Field(ROWS), agents.make("im2spec", face(ROWS), first_places=5)
    policy.reset(range(ROWS), range(ROWS))
    assert policy.explain() is None
    searched(field, policy, 5)
    assert policy.explain().seeding.all() and np.isnan(policy.explain().mean).all()
    policy.act(field.observation())
    decision = policy.explain()
    assert decision.mean.shape == decision.deviation.shape == (ROWS, SIDE, SIDE)
    assert decision.embedding.shape == (ROWS, SIDE * SIDE, policy.model.features.shape[2])
    flat = np.where(field.measured, -np.inf, decision.acquisition.reshape(ROWS, -1))
    assert flat.argmax(1).tolist() == decision.chosen.tolist()


def test_the_told_deviation_is_that_of_a_measurement() -> None:
    """90 % intervals of noisy values, 6 specimens: 80 % at least."""
    field, policy = Field(6, seed=8), agents.make("im2spec", face(6))
    policy.reset(range(6), range(6))
    searched(field, policy, 25)
    policy.act(field.observation())
    decision, rng = policy.explain(), np.random.default_rng(0)
    noisy = torch.from_numpy(rng.poisson(field.rate.numpy()).astype(np.float32))
    window = (field.axis >= 450) & (field.axis <= 560)
    value = noisy[..., window].sum(-1).numpy().reshape(6, SIDE, SIDE)
    inside = np.abs(value - decision.mean) < 1.645 * decision.deviation
    assert inside.mean() > 0.8


def test_rows_do_not_feel_one_another() -> None:
    """Row 1 of three chooses as the only row of a policy in the same world."""
    many, one = (agents.make("im2spec", face(rows), first_places=6) for rows in (3, 1))
    many.reset([0, 1, 2], [11, 12, 13])
    one.reset([0], [12])
    field = Field(3, seed=2)
    for _ in range(12):
        observation = field.observation()
        chosen = many.act(observation)
        alone = one.act({key: value[1:2] for key, value in observation.items()})
        assert alone[0] == chosen[1]
        field.measure(chosen)


def test_a_longer_exposure_is_remembered_and_acted_on() -> None:
    space = gymnasium.spaces.MultiDiscrete([SIDE * SIDE, 3])
    given = face(2, exposures_s=[0.1, 1.0, 10.0])
    given = Face(given.id, 2, given.observation_space, space, given.task)
    policy, field = agents.make("im2spec", given, exposure_share=1.0), Field(2)
    policy.reset([0, 1], [0, 1])
    for _ in range(3):
        action = policy.act(field.observation())
        assert action[:, 1].tolist() == [2, 2]
        field.measure(action[:, 0])
    policy.act(field.observation())
    assert policy.model.seen.exposure_s[:, :3].tolist() == [[10.0] * 3] * 2


def test_patterns_and_other_tasks_are_refused() -> None:
    with pytest.raises(PolicyError, match="energy axis"):
        agents.make("im2spec", face(1, detector="diffraction"))
    with pytest.raises(PolicyError, match="spectrum_search"):
        agents.make("im2spec", face(1, kind="atom_targeting"))
