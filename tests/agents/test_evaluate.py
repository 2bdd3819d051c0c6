"""Evaluation: the same worlds for every policy and any number of rows, figures of an episode counted by hand."""

from __future__ import annotations

import math

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import agents
from agents.policy import Policy, face_of
from stem_gym.core.config import Config
from stem_gym.core.errors import CapabilityError, PolicyError
from stem_gym.core.streams import row_seeds
from tests.agents.toys import TERMINATED_AT, TOY_ID, TRUNCATED_AT, ToyVectorEnv

ID = "stem_gym/AtomTargeting-v0"


class Steady(Policy):
    """Always the same action; keeps what it was told."""

    name = "steady"

    def __init__(self, face):
        super().__init__(face, Config())
        self.began, self.transitions = [], []

    def reset(self, rows, seeds=None):
        self.began.append((list(rows), list(seeds)))

    def act(self, observation):
        return np.full((self.face.rows, 5), 0.25, dtype=np.float32)

    def update(self, transition):
        self.transitions.append(transition)


def toy(rows):
    return gymnasium.make_vec(TOY_ID, num_envs=rows, autoreset_mode=AutoresetMode.DISABLED)


@pytest.mark.parametrize("rows", [1, 3, 7, 20])
def test_episodes_are_counted_as_by_hand(rows):
    """Seven worlds; even seeds last 3 steps and end well, odd ones 5 steps; reward 0.25 a step."""
    results = agents.evaluate(Steady(face_of(toy(rows))), TOY_ID, episodes=7, seed=3)
    assert len(results) == 7
    for seed, result in zip(row_seeds(3, 7), results, strict=True):
        steps = TERMINATED_AT if seed % 2 == 0 else TRUNCATED_AT
        assert (result["measurements"], result["seconds"]) == (steps, steps)
        assert result["return"] == pytest.approx(0.25 * steps)
        assert bool(result["success"]) == (seed % 2 == 0)
        assert result["thinking_s"] >= 0.0
    assert {result["measurements"] for result in results} == {TERMINATED_AT, TRUNCATED_AT}  # both kinds were met


def test_the_policy_is_told_which_worlds_begin_and_what_happened():
    policy = Steady(face_of(toy(2)))
    agents.evaluate(policy, TOY_ID, episodes=3, seed=3)
    seeds = row_seeds(3, 3)
    assert policy.began[0] == ([0, 1], seeds[:2])
    assert sum(seed == seeds[2] for _, given in policy.began for seed in given) == 1
    assert all(transition.action.shape == (2, 5) for transition in policy.transitions)


def test_progress_counts_to_the_end():
    told = []
    agents.evaluate(Steady(face_of(toy(2))), TOY_ID, 5, seed=0, progress=lambda done, of: told.append((done, of)))
    assert told[-1] == (5, 5) and told == sorted(told)


@pytest.mark.parametrize("name", ["uniform", "raster", "lock_on"])
def test_an_episode_does_not_depend_on_the_rows_beside_it(name):
    """Five worlds on one row, and on four rows: the same figures but for rounding (batched sums) and time to think."""
    results = []
    for rows in (1, 4):
        env = gymnasium.make_vec(ID, num_envs=rows, autoreset_mode=AutoresetMode.DISABLED, budget={"steps": 24})
        results.append(agents.evaluate(agents.make(name, env), ID, 5, seed=2, env=env))
        env.close()
    for one, four in zip(*results, strict=True):
        assert one.keys() == four.keys()
        for key in one.keys() - {"thinking_s"}:
            assert one[key] == pytest.approx(four[key], rel=1e-3, abs=1e-3, nan_ok=True), key


def test_every_policy_meets_the_same_worlds():
    """The opening frame of an episode is the world's; the first observations agree between two agents."""

    class Looking(Steady):
        def act(self, observation):
            self.first = getattr(self, "first", observation["image"].copy())
            return super().act(observation)

    env = gymnasium.make_vec(ID, num_envs=2, autoreset_mode=AutoresetMode.DISABLED, budget={"steps": 3})
    policies = [Looking(face_of(env)), Looking(face_of(env))]
    for policy in policies:
        agents.evaluate(policy, ID, 2, seed=5, env=env)
    np.testing.assert_array_equal(policies[0].first, policies[1].first)
    assert not np.array_equal(policies[0].first[0], policies[0].first[1])
    env.close()


def test_figures_of_atom_targeting_are_complete():
    env = gymnasium.make_vec(ID, num_envs=2, autoreset_mode=AutoresetMode.DISABLED)
    (result,) = agents.evaluate(agents.make("lock_on", env), ID, 1, seed=1, env=env)
    wanted = {
        "success",
        "return",
        "seconds",
        "electrons",
        "measurements",
        "thinking_s",
        "targets_served",
        "useful_share",
    }
    assert wanted <= result.keys() and all(math.isfinite(result[key]) for key in wanted)
    assert result["return"] == pytest.approx(result["episode_return"], abs=1e-4)  # our sum and the core's own
    env.close()


def test_a_policy_for_another_env_is_refused():
    with pytest.raises(PolicyError, match=TOY_ID):
        agents.evaluate(Steady(face_of(toy(1))), ID, 1, seed=0)


def test_an_env_that_resets_by_itself_is_refused():
    env = ToyVectorEnv(2, AutoresetMode.SAME_STEP)
    policy = Steady(agents.Face(TOY_ID, 2, env.single_observation_space, env.single_action_space))
    with pytest.raises(CapabilityError, match="DISABLED"):
        agents.evaluate(policy, TOY_ID, 1, seed=0, env=env)
