"""The adapter to Stable-Baselines3: what a learner sees of rows that end, and the bootstrap of truncated ones."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from agents.learning.vec_env import VectorAdapter
from stem_gym.core.errors import CapabilityError
from tests.agents.toys import TERMINATED_AT, TRUNCATED_AT, ToyVectorEnv

GAMMA = 0.9


def value_of(observation):
    """A value that tells rows and steps apart: 10 × row + the step's count."""
    return 10.0 * np.arange(len(observation["count"])) + 10.0 * observation["count"][:, 0]


def steps(adapter, count):
    adapter.reset()
    for _ in range(count):
        yield adapter.step(np.full((adapter.num_envs, 5), 0.5, dtype=np.float32))


def test_truncated_rows_are_bootstrapped_and_terminated_ones_are_not():
    """Rows 0 and 2 terminate at step 3; rows 1 and 3 are truncated at 5: reward 0.5 + γ V(last observation)."""
    adapter = VectorAdapter(ToyVectorEnv(4), value_of, GAMMA)
    rewards = np.array([reward for _, reward, _, _ in steps(adapter, TRUNCATED_AT)])
    expected = np.full((TRUNCATED_AT, 4), 0.5)
    expected[TRUNCATED_AT - 1, 1] += GAMMA * (10.0 + 5.0)
    expected[TRUNCATED_AT - 1, 3] += GAMMA * (30.0 + 5.0)
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)  # float32 rewards


def test_the_bootstrap_is_one_call_for_all_rows():
    calls = []

    def counted(observation):
        calls.append(len(observation["count"]))
        return value_of(observation)

    list(steps(VectorAdapter(ToyVectorEnv(4), counted, GAMMA), TRUNCATED_AT))
    assert calls == [4]


def test_it_gives_what_the_learner_itself_would_add(monkeypatch):
    """Stable-Baselines3's own loop over truncated rows makes the same rewards; fed with ours, it adds nothing."""
    adapter = VectorAdapter(ToyVectorEnv(4), value_of, GAMMA)
    *_, (_, rewards, dones, infos) = steps(adapter, TRUNCATED_AT)
    theirs = np.full(4, 0.5)
    for row, done in enumerate(dones):  # on_policy_algorithm.py, collect_rollouts
        if done:
            last = {key: value[None].repeat(4, 0) for key, value in infos[row]["terminal_observation"].items()}
            theirs[row] += GAMMA * value_of(last)[row]
        assert not infos[row].get("TimeLimit.truncated", False)
    np.testing.assert_allclose(rewards, theirs, rtol=1e-6)


def test_truncation_without_a_value_is_an_error():
    with pytest.raises(CapabilityError, match="value_of"):
        list(steps(VectorAdapter(ToyVectorEnv(4)), TRUNCATED_AT))


def test_episodes_are_told_when_they_end_and_begin_anew():
    adapter = VectorAdapter(ToyVectorEnv(2), value_of, GAMMA)
    told = [[info.get("episode") for info in infos] for *_, infos in steps(adapter, 6)]
    ends = {(step, row): told[step][row] for step in range(6) for row in range(2) if told[step][row]}
    assert ends.keys() == {(2, 0), (5, 0), (4, 1)}  # row 0 every 3 steps, row 1 after 5
    assert ends[2, 0]["l"] == ends[5, 0]["l"] == TERMINATED_AT and ends[4, 1]["l"] == TRUNCATED_AT
    assert ends[2, 0]["r"] == pytest.approx(1.5)


def test_the_last_observation_is_that_of_the_ended_episode():
    adapter = VectorAdapter(ToyVectorEnv(2), value_of, GAMMA)
    seen = list(steps(adapter, TERMINATED_AT))[-1]
    assert seen[3][0]["terminal_observation"]["count"][0] == pytest.approx(0.3)
    assert seen[0]["count"][0, 0] == 0.0  # the row has begun again
    assert seen[3][0]["is_success"] is True and seen[3][0]["metrics"]["seconds"] == TERMINATED_AT


def test_another_autoreset_is_refused():
    with pytest.raises(CapabilityError, match="SAME_STEP"):
        VectorAdapter(ToyVectorEnv(2, AutoresetMode.NEXT_STEP))


def test_rows_are_not_objects():
    adapter = VectorAdapter(ToyVectorEnv(3), value_of, GAMMA)
    assert adapter.get_attr("render_mode") == [None] * 3 and adapter.env_is_wrapped(object, [0, 1]) == [False, False]
    with pytest.raises(CapabilityError):
        adapter.env_method("render")
    with pytest.raises(CapabilityError):
        adapter.set_attr("render_mode", "human")
