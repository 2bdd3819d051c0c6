"""What must hold for every id. The ids are found, not listed: a new YAML is tested without an edit here."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from stem_gym.core.conformance import check_instrument, check_vector_env
from stem_gym.core.errors import ActionError, InstructionError
from stem_gym.core.streams import row_seeds
from stem_gym.envs.registration import config_root, variant_files
from stem_gym.envs.variants import build, load_variant

IDS = sorted(variant_files())
every_id = pytest.mark.parametrize("id", IDS)


def make(id: str, **overrides: Any) -> gymnasium.Env:
    return gymnasium.make(id, disable_env_checker=True, **overrides)


def make_vec(id: str, num_envs: int, mode: AutoresetMode = AutoresetMode.SAME_STEP, **overrides: Any) -> Any:
    return gymnasium.make_vec(id, num_envs=num_envs, autoreset_mode=mode, **overrides)


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit; NaN equals NaN."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return np.array_equal(np.asarray(one), np.asarray(other), equal_nan=np.asarray(one).dtype.kind == "f")


def until_the_end(env: Any, actions: Any) -> Iterator[Any]:
    """The steps of the actions, as far as the episode goes."""
    for action in actions:
        step = env.step(action)
        yield step
        if step[2]:
            return


def sampled(env: Any, count: int, seed: int = 0) -> list[np.ndarray]:
    """Random actions, of which none ends an episode by itself."""
    env.action_space.seed(seed)
    task = env.unwrapped.batch.task
    rows = getattr(env, "num_envs", None)
    found: list[np.ndarray] = []
    while len(found) < count:
        action = env.action_space.sample()
        batch = torch.as_tensor(action if rows else np.asarray(action)[None])
        if not bool(task.closes(batch).any()):
            found.append(action)
    return found


def test_every_yaml_is_registered_once_and_without_a_step_limit():
    files = list(config_root().glob("*/*.yaml"))
    assert len(IDS) == len(files) >= 1
    for id in IDS:
        spec = gymnasium.spec(id)
        assert spec.max_episode_steps is None, "a budget is part of the task, not a truncation"
        assert spec.vector_entry_point is not None


@every_id
def test_gymnasium_accepts_it(id):
    """Warnings are errors here. The checker renders in every mode, on a screen that nobody sees."""
    env = make(id)
    check_env(env.unwrapped, skip_render_check=not all(find_spec(name) for name in ("PIL", "pygame")))
    env.close()


@every_id
def test_the_vector_env_keeps_the_rules(id):
    """Episodes of at most five actions, of which long ones end a row earlier than its neighbours, where they differ."""
    env = make_vec(id, 8)
    env.reset(seed=1)
    used = [env.step(action)[4]["seconds"] for action in sampled(env, 3)][-1]
    short = {"budget": {"steps": 5, "seconds": float(np.median(used))}}
    check_vector_env(
        lambda **kw: gymnasium.make_vec(id, **kw, **short),
        lambda: make(id, **short),
        events=9,
        staggered=bool(np.ptp(used) > 0.0),
    )


@every_id
def test_its_instrument_keeps_the_contract(id):
    check_instrument(build(load_variant(id), rows=2).instrument, frame_shape=(8, 8))


@every_id
@pytest.mark.parametrize("steps", [1, 5])
def test_the_budget_of_steps_counted_by_hand(id, steps):
    """Terminated in exactly that step, never truncated, in the single env and in every row."""
    rich = {"steps": steps, "seconds": 1e9, "electrons": 1e18}
    env = make(id, budget=rich)
    env.reset(seed=1)
    for number, action in enumerate(sampled(env, steps), start=1):
        observation, _, terminated, truncated, info = env.step(action)
        assert (terminated, truncated) == (number == steps, False)
        assert info["measurements"] == number
        assert observation["budget"][0] == pytest.approx(1.0 - number / steps)
    vector = make_vec(id, 2, AutoresetMode.DISABLED, budget=rich)
    vector.reset(seed=1)
    ends = [vector.step(action)[2].tolist() for action in sampled(vector, steps)]
    assert ends == [[False, False]] * (steps - 1) + [[True, True]]


@every_id
def test_what_the_ledger_says_is_what_the_budget_loses(id):
    env = make(id)
    budget = load_variant(id).variant.budget
    observation, info = env.reset(seed=4)
    looked = "measurements" not in observation  # a campaign of experiments begins without a look
    assert info["measurements"] == 0
    assert (info["seconds"] > 0, info["electrons"] > 0) == (looked, looked), "the first look is paid for"
    for action in sampled(env, 4):
        observation, _, terminated, _, info = env.step(action)
        used = [info["measurements"] / budget.steps, info["seconds"] / budget.seconds]
        used.append(info["electrons"] / budget.electrons)
        assert observation["budget"] == pytest.approx(1.0 - np.array(used), abs=1e-6)
        if terminated:
            break


@every_id
@pytest.mark.parametrize("spent", ["seconds", "electrons"])
def test_a_budget_of_seconds_or_electrons_ends_the_episode_when_it_is_spent(id, spent):
    rich = {"steps": 10**6, "seconds": 1e9, "electrons": 1e18}
    env = make(id, budget=rich)
    actions = sampled(env, 5, seed=2)
    _, info = env.reset(seed=6)
    used = [info[spent]] + [env.step(action)[4][spent] for action in actions]
    assert used == sorted(used) and used[-1] > used[0]
    limit = 0.5 * (used[0] + used[-1])
    by_hand = next(number for number, value in enumerate(used) if value >= limit)
    poor = make(id, budget=rich | {spent: limit})
    poor.reset(seed=6)
    for number, action in enumerate(actions[:by_hand], start=1):
        _, _, terminated, truncated, _ = poor.step(action)
        assert (terminated, truncated) == (number == by_hand, False)


@every_id
def test_a_cloned_moment_comes_back(id):
    env = make(id).unwrapped
    env.reset(seed=4)
    first, *rest = sampled(env, 4)
    env.step(first)
    moment = env.clone_state()
    futures = []
    for _ in range(2):
        futures.append([*until_the_end(env, rest), env.reset()])
        env.restore_state(moment)
    for one, other in zip(*futures, strict=True):
        assert same(one[0], other[0]) and same(one[-1], other[-1])


@every_id
def test_a_pickled_env_goes_on_alike(id):
    env = make(id)
    pickle.loads(pickle.dumps(env)).reset(seed=1)  # one that has not begun
    env.reset(seed=9)
    first, *rest = sampled(env, 4)
    env.step(first)
    copy = pickle.loads(pickle.dumps(env))
    for one, other in zip(until_the_end(env, rest), until_the_end(copy, rest), strict=True):
        assert same(one[0], other[0]) and one[1:4] == other[1:4] and same(one[4], other[4])


@every_id
def test_an_episode_ends_by_its_own_budget_with_finite_numbers(id):
    """Rows run to their end with random actions; every reward and metric stays finite (but means over nothing)."""
    env = make_vec(id, 4, AutoresetMode.DISABLED, budget={"steps": 12})
    env.reset(seed=2)
    over = np.zeros(4, dtype=bool)
    for action in sampled(env, 12):
        observation, reward, terminated, _, info = env.step(action)
        assert np.isfinite(reward).all()
        assert all(np.isfinite(value).all() for value in observation.values())
        unusual = {key for key, value in info.items() if not key.startswith("_") and not np.isfinite(value).all()}
        assert {key for key in unusual if not key.startswith("measurements_to_")} <= {"pointing_error_pm", "goal_s"}
        over |= terminated
        if terminated.any() and not over.all():  # a goal that was reached early; the others have their own budget
            env.reset(options={"reset_mask": terminated})
        if over.all():
            break
    assert over.all()


@every_id
def test_global_randomness_is_neither_used_nor_touched(id):
    def play() -> Any:
        env = make(id)
        start = env.reset(seed=5)[0]
        return start, env.step(np.zeros(env.action_space.shape, env.action_space.dtype))[0]

    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 – the global state is what is watched
    first = play()
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    second = play()
    assert same(first[0], second[0]) and same(first[1], second[1])
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_neighbouring_seeds_share_no_world():
    """Not even two rows of two batches with seeds 0 and 1: `seed + i` would."""
    env = make_vec(IDS[0], 4)
    images = [row for seed in range(4) for row in next(iter(env.reset(seed=seed)[0].values()))]
    for a in range(len(images)):
        for b in range(a):
            assert not np.array_equal(images[a], images[b])


def test_two_processes_play_the_rows_of_one_batch():
    """Gymnasium's own AsyncVectorEnv, one process per env, started afresh ("spawn")."""
    id = IDS[0]
    actions = sampled(make_vec(id, 2), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        apart = gymnasium.vector.AsyncVectorEnv([_maker(id)] * 2, context="spawn")
        together = make_vec(id, 2)
        seeds = row_seeds(8, 2)
        first, other = apart.reset(seed=seeds)[0], together.reset(seed=8)[0]
        assert same(dict(first), other)
        for action in actions:
            one, two = apart.step(action), together.step(action)
            assert same(dict(one[0]), two[0]) and np.allclose(one[1], two[1], atol=1e-6)
        apart.close()


class _maker:
    """Makes one env, in whatever process it is called; a class, so that any process can be sent it."""

    def __init__(self, id: str) -> None:
        self.id = id

    def __call__(self) -> gymnasium.Env:
        import stem_gym  # noqa: F401 – registers the ids

        return make(self.id)


@every_id
def test_nothing_happens_after_the_end_or_after_closing(id):
    env = make(id, budget={"steps": 2}).unwrapped
    env.reset(seed=1)
    action = env.action_space.sample()
    while not env.step(action)[2]:
        pass
    over = env.batch.ledger
    for _ in range(2):
        with pytest.raises(ActionError, match=r"have ended; call reset\(\)"):
            env.step(action)
    assert env.batch.ledger is over, "a refused step costs nothing"
    moment = env.clone_state()
    env.reset()
    env.step(action)
    env.restore_state(moment)
    with pytest.raises(ActionError, match="have ended"):
        env.step(action)
    env.reset()
    env.close()
    for call in (env.reset, lambda: env.step(action)):
        with pytest.raises(InstructionError, match="was closed"):
            call()
