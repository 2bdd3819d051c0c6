"""The two faces of the loop: autoreset told by hand, masks, refusals, pictures and videos."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from stem_gym.core.errors import ActionError, ConfigError, InstructionError, StemGymError, UnknownNameError
from stem_gym.core.streams import row_seeds

ID = "stem_gym/AtomTargeting-v0"
MODES = list(AutoresetMode)


def make(**overrides: Any) -> gymnasium.Env:
    return gymnasium.make(ID, disable_env_checker=True, **overrides)


def make_vec(num_envs: int = 3, mode: AutoresetMode = AutoresetMode.SAME_STEP, **overrides: Any) -> Any:
    return gymnasium.make_vec(ID, num_envs=num_envs, autoreset_mode=mode, **overrides)


def small_scans(rows: int) -> np.ndarray:
    """The quickest action there is."""
    return np.tile(np.array([1.0, 0.0, 0.0, -1.0, -1.0], np.float32), (rows, 1))


# Rows that end at different times, by hand: row i was reset i steps late, and an episode has four steps.


def staggered(mode: AutoresetMode) -> Any:
    """Three rows with 2, 1 and 0 steps behind them, of 4."""
    env = make_vec(3, mode, budget={"steps": 4})
    env.reset(seed=1)
    for late in (1, 2):
        env.step(small_scans(3))
        env.reset(options={"reset_mask": np.arange(3) >= late})
    return env


def measured(info: dict[str, Any]) -> list[int]:
    return info["measurements"].tolist()


def test_same_step_resets_each_row_in_the_step_that_ends_it():
    env = staggered(AutoresetMode.SAME_STEP)
    told = [env.step(small_scans(3)) for _ in range(5)]
    assert [step[2].tolist() for step in told] == [
        [False, False, False], [True, False, False], [False, True, False], [False, False, True], [False, False, False],
    ]  # fmt: skip
    assert [measured(step[4]) for step in told] == [[3, 2, 1], [0, 3, 2], [1, 0, 3], [2, 1, 0], [3, 2, 1]]
    second = told[1][4]
    assert second["_final_obs"].tolist() == second["_final_info"].tolist() == [True, False, False]
    assert second["final_info"]["measurements"][0] == 4 and second["final_obs"]["budget"][0, 0] == 0.0
    assert second["final_info"]["_measurements"].tolist() == [True, False, False]
    assert told[1][0]["budget"][0, 0] == 1.0, "what is returned is the new episode's first observation"
    assert "final_obs" not in told[0][4]


def test_next_step_resets_each_row_in_the_step_after():
    env = staggered(AutoresetMode.NEXT_STEP)
    told = [env.step(small_scans(3)) for _ in range(5)]
    assert [step[2].tolist() for step in told] == [
        [False, False, False], [True, False, False], [False, True, False], [False, False, True], [False, False, False],
    ]  # fmt: skip
    assert [measured(step[4]) for step in told] == [[3, 2, 1], [4, 3, 2], [0, 4, 3], [1, 0, 4], [2, 1, 0]]
    assert told[2][1][0] == 0.0 and told[2][0]["budget"][0, 0] == 1.0
    assert told[1][0]["budget"][0, 0] == 0.0, "the last observation is returned by the step that ends the row"


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_the_terms_of_the_reward_are_told_for_the_rows_that_a_reset_leaves_alone(mode):
    env, summed = staggered(mode), 0
    for _ in range(5):
        _, reward, terminated, _, info = env.step(small_scans(3))
        terms = sum(info[f"reward_{part}"] for part in ("useful", "elsewhere", "time"))
        stepped = info["measurements"] > 0  # the others show the first frame of their next episode
        assert np.allclose(terms[stepped], reward[stepped], rtol=1e-5, atol=0.0)
        summed += int(not stepped.all())
    assert summed >= 2, "rows began anew beside rows that went on"


def test_next_step_ignores_the_action_of_a_row_that_only_resets():
    first, second = (make_vec(2, AutoresetMode.NEXT_STEP, budget={"steps": 1}) for _ in range(2))
    for env, scale in ((first, 1.0), (second, -1.0)):
        env.reset(seed=3)
        env.step(small_scans(2))
        env.step(scale * small_scans(2))
    one, other = first.step(small_scans(2)), second.step(small_scans(2))
    assert all(np.array_equal(one[0][key], other[0][key]) for key in one[0])


def test_disabled_waits_for_a_masked_reset():
    env = staggered(AutoresetMode.DISABLED)
    env.step(small_scans(3))
    before, *_ = env.step(small_scans(3))
    with pytest.raises(ActionError, match=r"Rows \[0\] have ended.*reset_mask"):
        env.step(small_scans(3))
    after, info = env.reset(options={"reset_mask": np.array([True, False, False])})
    assert measured(info) == [0, 3, 2]
    for key in before:
        assert np.array_equal(before[key][1:], after[key][1:])
    assert measured(env.step(small_scans(3))[4]) == [1, 4, 3]


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_is_said(mode):
    env = make_vec(1, mode)
    assert env.metadata["autoreset_mode"] is mode is env.unwrapped.autoreset_mode
    assert make_vec(1, mode.value).metadata["autoreset_mode"] is mode, "the name will do"


@pytest.mark.parametrize("mode", MODES)
def test_a_restored_moment_knows_which_rows_had_ended(mode):
    env = staggered(mode).unwrapped
    env.step(small_scans(3))
    moment = env.clone_state()
    futures = []
    for _ in range(2):
        futures.append(env.step(small_scans(3)))
        env.restore_state(moment)
    (one, reward, ends, _, info), (other, again, ends_again, _, info_again) = futures
    assert ends.tolist() == ends_again.tolist() == [True, False, False]
    assert np.array_equal(reward, again) and measured(info) == measured(info_again)
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_episode_statistics_are_the_sums_of_what_the_caller_saw():
    env = make_vec(2, AutoresetMode.DISABLED, budget={"steps": 5})
    _, info = env.reset(seed=2)
    env.action_space.seed(2)
    total, clock = np.zeros(2), info["seconds"].copy()
    for _ in range(5):
        _, reward, _, _, info = env.step(env.action_space.sample())
        total += reward
        assert (info["seconds"] > clock).all()
        clock = info["seconds"].copy()
    assert info["episode_return"] == pytest.approx(total, abs=1e-5)


def test_what_is_handed_out_is_the_callers():
    """Whoever overwrites an observation, an info or an action changes nothing inside."""
    env, other = make_vec(2), make_vec(2)
    env.action_space.seed(1)
    told = env.reset(seed=1), other.reset(seed=1)
    for _ in range(4):
        action = env.action_space.sample()
        for value in [*told[0][0].values(), *told[0][1].values()]:
            value[...] = 1
        spoilt = action.copy()
        told = env.step(spoilt), other.step(action)
        spoilt[...] = np.nan
        assert all(np.array_equal(told[0][0][key], told[1][0][key]) for key in told[1][0])
        assert np.array_equal(told[0][1], told[1][1])
        assert all(np.array_equal(told[0][4][k], told[1][4][k], equal_nan=True) for k in told[1][4])
        told = ((told[0][0], told[0][4]), None)


def test_seconds_and_electrons_counted_by_hand():
    """From the numbers of the YAML: the opening frame, then dwells of two seconds at 40 pA."""
    opening_s = 64 * (64 * (2e-6 * 64e-6) ** 0.5 + 60e-6) + 0.05
    per_second = 40e-12 / 1.602176634e-19
    on_sample_s = 64 * 64 * (2e-6 * 64e-6) ** 0.5
    dwell = np.array([-1.0, 0.9, 0.9, 0.0, 1.0], np.float32)
    limits = {"seconds": opening_s + 2.5 * 2.0, "electrons": (on_sample_s + 2.5 * 2.0) * per_second}
    for name, limit in limits.items():
        env = make(budget={"steps": 99, "seconds": 1e6, "electrons": 1e15} | {name: limit})
        _, info = env.reset(seed=1)
        assert info["seconds"] == pytest.approx(opening_s, rel=1e-5)
        assert info["electrons"] == pytest.approx(on_sample_s * per_second, rel=1e-5)
        ends = []
        for number in (1, 2, 3):
            observation, _, terminated, truncated, info = env.step(dwell)
            ends.append((terminated, truncated))
            assert info["seconds"] == pytest.approx(opening_s + 2.0 * number, rel=1e-5)
            assert info["electrons"] == pytest.approx((on_sample_s + 2.0 * number) * per_second, rel=1e-5)
        assert ends == [(False, False), (False, False), (True, False)], name
        assert (observation["budget"] == 0.0).sum() == 1


def test_gymnasium_counts_the_same_episodes():
    """Gymnasium's own statistics wrapper, in the mode that it is made for."""
    env = make_vec(2, AutoresetMode.NEXT_STEP, budget={"steps": 3})
    env = gymnasium.wrappers.vector.RecordEpisodeStatistics(env)
    env.reset(seed=1)
    for _ in range(3):
        info = env.step(small_scans(2))[4]
    assert info["episode"]["l"].tolist() == [3, 3]
    assert info["episode"]["r"] == pytest.approx(info["episode_return"], abs=1e-5)


def test_seeds_by_row_by_list_and_by_mask():
    env = make_vec(3)
    by_number, _ = env.reset(seed=5)
    by_list, _ = env.reset(seed=row_seeds(5, 3))
    assert all(np.array_equal(by_number[key], by_list[key]) for key in by_number)
    mask = np.array([False, True, False])
    fresh, _ = env.reset(seed=6, options={"reset_mask": mask})
    all_fresh, _ = env.reset(seed=6)
    for key in fresh:
        assert np.array_equal(fresh[key][1], all_fresh[key][1]) and np.array_equal(fresh[key][0], by_list[key][0])
    first, _ = make().reset(seed=row_seeds(5, 3)[2])
    assert all(np.array_equal(first[key], by_number[key][2]) for key in first)


def test_without_a_seed_episodes_differ():
    env = make()
    images = [env.reset()[0]["image"] for _ in range(3)] + [make().reset()[0]["image"]]
    assert all(not np.array_equal(images[a], images[b]) for a in range(4) for b in range(a))


def test_a_mean_over_nothing_is_left_out():
    """No dwell yet, no pointing error: absent from the single env's info, masked in the vector env's."""
    _, info = make().reset(seed=1)
    assert "pointing_error_pm" not in info
    env = make_vec(2)
    env.reset(seed=1)
    action = small_scans(2)
    action[1, 0] = -1.0
    info = env.step(action)[4]
    assert (
        info["_pointing_error_pm"].tolist() == [False, True] and info["_success"].all() and info["_reward_time"].all()
    )


# Bad input


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"budgets": {}}, ConfigError, "takes no argument 'budgets'. Did you mean 'budget'"),
        ({"budget": {"steps": 0}}, ConfigError, "greater than 0; given 0"),
        ({"task": {"radius_nm": 0.05}}, ConfigError, "unknown key 'radius_nm'. Did you mean 'radius_ang'"),
        ({"task": {"kind": "atom_targetting"}}, UnknownNameError, "Unknown task .*Did you mean 'atom_targeting'"),
        ({"instrument": "simulatd"}, UnknownNameError, "Unknown instrument 'simulatd'. Did you mean 'simulated'"),
        ({"instrument": {"probe": {"energy_kev": "60kV"}}}, ConfigError, "energy_kev.*given \"60kV\""),
        ({"task": {"element": "Sj"}}, ConfigError, "Unknown element 'Sj'"),
        ({"render_mode": "ansi"}, ConfigError, "render_mode must be one of"),
        ({"device": "tpu9000"}, ConfigError, "device 'tpu9000' can not be used"),
        ({"device": 1.5}, ConfigError, "device 1.5 can not be used"),
    ],
    ids=str,
)  # fmt: skip
def test_what_can_not_be_made_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        make(**given)
    with pytest.raises(error, match=message):
        make_vec(2, **given)


def test_a_vector_env_needs_rows_and_a_known_mode():
    for rows in (0, -1, "a"):
        with pytest.raises(ConfigError, match="at least one row"):
            make_vec(rows)
    with pytest.raises(ConfigError, match="Unknown autoreset_mode 'SameStp'. Did you mean 'SameStep'"):
        make_vec(2, "SameStp")


def test_an_unknown_id_is_refused():
    with pytest.raises(gymnasium.error.Error, match="AtomTargting"):
        gymnasium.make("stem_gym/AtomTargting-v0")
    from stem_gym.envs.faces import make_env

    with pytest.raises(UnknownNameError, match="Did you mean 'stem_gym/AtomTargeting-v0'"):
        make_env("stem_gym/AtomTargting-v0")


BAD_ACTIONS = [
    (lambda a: a[:-1], "shape"),
    (lambda a: np.concatenate((a, a)), "shape"),
    (lambda a: a[None], "shape"),
    (lambda a: np.float32(0.5), "shape"),
    (lambda a: a + np.nan, "finite"),
    (lambda a: a + np.inf, "finite"),
    (lambda a: a * 0 + 1.01, r"within \[-1, 1\]; given 1.01"),
    (lambda a: a + 1j, "array of numbers"),
    (lambda a: "north", "array of numbers"),
    (lambda a: None, "array of numbers"),
    (lambda a: [[1.0], [2.0, 3.0]], "array of numbers"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_ACTIONS)
def test_unusable_actions_are_refused_and_change_nothing(spoil, message):
    good = small_scans(3)
    env, other = make_vec(3), make_vec(3)
    for one in (env, other):
        one.reset(seed=1)
    with pytest.raises(ActionError, match=message):
        env.step(spoil(good))
    after, expected = env.step(good), other.step(good)
    assert all(np.array_equal(after[0][key], expected[0][key]) for key in after[0])
    single = make()
    single.reset(seed=1)
    with pytest.raises(ActionError, match=message.replace("shape", r"shape \(5,\)")):
        single.step(spoil(good[0]))


def test_one_bad_row_spoils_the_step():
    env = make_vec(3)
    env.reset(seed=1)
    action = small_scans(3)
    action[2, 4] = np.nan
    with pytest.raises(ActionError, match="finite"):
        env.step(action)


def test_a_step_before_the_first_reset_is_refused():
    with pytest.raises(InstructionError, match="before reset"):
        make().unwrapped.step(small_scans(1)[0])
    with pytest.raises(InstructionError, match="before reset"):
        make_vec(3).step(small_scans(3))


@pytest.mark.parametrize(
    "mask", [np.zeros(3, bool), np.ones(2, bool), np.ones(3), np.array([0, 2, 1]), "all", [[True] * 3]], ids=str
)
def test_a_bad_reset_mask_is_refused(mask):
    env = make_vec(3)
    env.reset(seed=1)
    with pytest.raises(ConfigError, match=r"reset_mask must be \(3,\) bool"):
        env.reset(options={"reset_mask": mask})


@pytest.mark.parametrize(
    "seed", [-1, [1, 2], [1, 2, -3], [1, None, 2], 1.5, "seed", [1, 2.5, 3], ["a", "b", "c"]], ids=str
)
def test_a_bad_seed_is_refused(seed):
    env = make_vec(3)
    with pytest.raises(ConfigError, match=r"[Ss]eed"):
        env.reset(seed=seed)
    with pytest.raises(gymnasium.error.Error, match="Seed"):
        make().reset(seed=-1)


def test_unknown_options_are_refused():
    with pytest.raises(StemGymError, match="takes no reset options; given"):
        make().reset(seed=1, options={"tilt": 3})


def test_the_first_reset_must_start_every_row():
    with pytest.raises(InstructionError, match="first reset must start all 3 rows"):
        make_vec(3).reset(seed=1, options={"reset_mask": np.array([True, False, False])})


def test_reset_options_are_a_mapping():
    for env in (make(), make_vec(2)):
        with pytest.raises(ConfigError, match="must be a mapping or None; given 5"):
            env.reset(options=5)
