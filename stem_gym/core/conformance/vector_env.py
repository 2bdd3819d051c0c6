"""`check_vector_env`: what must hold for every Gymnasium vector env, one's own or a third party's."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import Env, spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from stem_gym.core.conformance.tapes import Actions, Event, Tape, as_array, compare, differs, mode_of, play, row_of
from stem_gym.core.errors import ConformanceError
from stem_gym.core.streams import row_seeds

ROWS = 3
Make = Callable[..., VectorEnv[Any, Any, Any]]


def check_vector_env(
    make: Make,
    make_single: Callable[[], Env[Any, Any]] | None = None,
    modes: Sequence[AutoresetMode] = tuple(AutoresetMode),
    events: int = 24,
    seed: int = 0,
    staggered: bool = True,
) -> None:
    """Play a vector env in each of its autoreset modes and raise ConformanceError for the first rule it breaks.

    `make(num_envs=…, autoreset_mode=…)` makes the env, `make_single()` the same as a `gymnasium.Env`. The rules:

    * spaces, shapes and types; observations that are not reused buffers, actions that are left alone;
    * one seed is one episode; a row does not depend on the number of rows, on its neighbours or on when they are reset,
      and equals the single env seeded with its `row_seeds`;
    * every autoreset mode tells the same story;
    * unusable actions are refused and change nothing; a pickled copy goes on alike.

    Rows must end at different times within `events` steps and resets: make short episodes. `staggered=False` is for an
    env whose rows can not.
    """
    stories = {mode: _check_mode(make, mode, events, seed, staggered) for mode in modes}
    first = modes[0]
    for mode in modes[1:]:
        compare(stories[mode], stories[first], f"Autoreset {mode.value} tells the same story as {first.value}")
    _check_rows_apart(make, first, stories[first], events, seed)
    _check_refusals(make, first, stories[first], seed)
    _check_copies(make, first, events, seed)
    if make_single is not None:
        _check_single(make_single, stories[first], seed)


def _check_mode(make: Make, mode: AutoresetMode, events: int, seed: int, staggered: bool) -> list[Tape]:
    """The story of one mode, told twice."""
    env = make(num_envs=ROWS, autoreset_mode=mode)
    if mode_of(env) is not mode:
        raise ConformanceError("A vector env has the autoreset mode that was asked", str(mode_of(env)), str(mode))
    _check_spaces(env)
    story = _story(env, seed, events)
    compare(_story(env, seed, events), story, f"The same seed gives the same episodes ({mode.value})")
    if staggered:
        _check_staggered(story, mode)
    _check_answers(env, seed)
    env.close()
    env.close()
    return story


def _story(env: VectorEnv[Any, Any, Any], seed: Any, events: int, names: Sequence[int] | None = None) -> list[Tape]:
    """Reset with `seed`, then `events` events of each row; `names` choose the rows' actions, by default 0, 1, 2, …"""
    actions = Actions(env.single_action_space, names or range(env.num_envs))
    observation, _ = env.reset(seed=seed)
    opening = [[Event(-1, row_of(observation, row))] for row in range(env.num_envs)]
    return [start + rest for start, rest in zip(opening, play(env, actions, events), strict=True)]


def _check_spaces(env: VectorEnv[Any, Any, Any]) -> None:
    for name in ("observation_space", "action_space"):
        batched, single = getattr(env, name), getattr(env, f"single_{name}")
        right = batch_space(single, env.num_envs)
        if batched != right:
            raise ConformanceError(f"{name} is single_{name} batched", str(batched)[:200], str(right)[:200])


def _check_staggered(story: Sequence[Tape], mode: AutoresetMode) -> None:
    """Rows that all end together hide what one row's reset does to its neighbours."""
    ends = [[number for number, event in enumerate(tape) if event.terminated or event.truncated] for tape in story]
    if all(row == ends[0] for row in ends):
        raise ConformanceError(
            f"Rows end at different times within the check ({mode.value})",
            f"ends of each row at events {ends}",
            "a row that ends while another goes on; make shorter episodes or allow more events",
        )


def _check_answers(env: VectorEnv[Any, Any, Any], seed: int) -> None:
    """Shapes and types of what reset and step give; buffers that stay the caller's."""
    rows, actions = env.num_envs, Actions(env.single_action_space, range(env.num_envs))
    observation, info = env.reset(seed=seed)
    _check_observation(env, observation, info)
    kept = [row_of(observation, row) for row in range(rows)]
    action = actions.stack([0] * rows)
    given = action.copy()
    after, reward, terminated, truncated, info = env.step(action)
    _check_observation(env, after, info)
    for name, value, kind in (("reward", reward, "f"), ("terminated", terminated, "b"), ("truncated", truncated, "b")):
        array = as_array(value)
        if array.shape != (rows,) or array.dtype.kind != kind or (kind == "f" and not np.isfinite(array).all()):
            right = f"({rows},) of finite floats" if kind == "f" else f"({rows},) of bool"
            raise ConformanceError(f"step() gives a {name} for each row", f"{array.shape} {array.dtype}", right)
    if not np.array_equal(given, action):
        raise ConformanceError("step() does not change the action it is given", f"{action}", f"{given}")
    for row in range(rows):
        if why := differs(row_of(observation, row), kept[row]):
            raise ConformanceError(
                "Observations are not reused buffers",
                f"row {row} of the last one changed: {why}",
                "a copy at each step",
            )


def _check_observation(env: VectorEnv[Any, Any, Any], observation: Any, info: Any) -> None:
    for row in range(env.num_envs):
        one = row_of(observation, row)
        if not env.single_observation_space.contains(one):
            raise ConformanceError(
                "Observations lie in their space", _misfit(env.single_observation_space, one), "shape, type and bounds"
            )
    for key in info if isinstance(info, Mapping) else ():
        mask = info.get(f"_{key}")
        if mask is not None and as_array(mask).shape != (env.num_envs,):
            raise ConformanceError(
                f"info has a mask for {key}", str(as_array(mask).shape), f"({env.num_envs},) of bool"
            )


def _misfit(space: spaces.Space[Any], value: Any) -> str:
    if isinstance(space, spaces.Dict) and isinstance(value, Mapping):
        if space.spaces.keys() != value.keys():
            return f"keys {sorted(value)}, space {sorted(space.spaces)}"
        return next(_misfit(part, value[key]) for key, part in space.spaces.items() if not part.contains(value[key]))
    array = np.asarray(value)
    return f"{array.shape} {array.dtype} from {array.min()} to {array.max()}, space {space}"


def _check_rows_apart(make: Make, mode: AutoresetMode, story: Sequence[Tape], events: int, seed: int) -> None:
    """A row alone, a row among others, and the first rows of a smaller batch live the same life."""
    seeds = row_seeds(seed, ROWS)
    alone = make(num_envs=1, autoreset_mode=mode)
    for row in range(ROWS):
        told = _story(alone, [seeds[row]], events, [row])
        compare(told, [story[row]], f"Row {row} of {ROWS} equals a batch of one with seed row_seeds(seed, rows)[{row}]")
    other = _story(alone, [seeds[0] + 1], 2, [0])
    if not any(differs(one.observation, two.observation) for one, two in zip(other[0], story[0], strict=False)):
        raise ConformanceError("Another seed gives another episode", "the same observations", "different ones")
    alone.close()
    fewer = make(num_envs=ROWS - 1, autoreset_mode=mode)
    told = _story(fewer, seed, events)
    compare(told, story, f"The first rows of {ROWS} equal those of {ROWS - 1} with the same seed")
    fewer.close()


def _check_refusals(make: Make, mode: AutoresetMode, story: Sequence[Tape], seed: int) -> None:
    """Unusable actions raise, and the episode goes on as if they had not been tried."""
    env = make(num_envs=ROWS, autoreset_mode=mode)
    actions = Actions(env.single_action_space, range(ROWS))
    good = actions.stack([0] * ROWS)
    observation, _ = env.reset(seed=seed)
    opening = [Event(-1, row_of(observation, row)) for row in range(ROWS)]
    for why, bad in _bad_actions(env.single_action_space, good):
        try:
            env.step(bad)
        except Exception:
            continue
        raise ConformanceError("An unusable action is refused", f"step() took {why}", "an error, before anything moves")
    told = [[first, *rest] for first, rest in zip(opening, play(env, actions, 1), strict=True)]
    compare(told, [tape[:2] for tape in story], "A refused action changes nothing")
    env.close()


def _bad_actions(space: spaces.Space[Any], good: Any) -> list[tuple[str, Any]]:
    bad: list[tuple[str, Any]] = [("actions of one row too few", good[:-1])]
    if isinstance(space, spaces.Box):
        bad.append(("actions with one number too many", np.concatenate((good, good[..., :1]), axis=-1)))
    if isinstance(space, spaces.Box) and np.issubdtype(good.dtype, np.floating):
        for name, value in (("NaN", np.nan), ("infinity", np.inf)):
            spoilt = good.copy()
            spoilt.reshape(-1)[-1] = value
            bad.append((name, spoilt))
        if space.is_bounded("above"):
            bad.append(("an action above its box", np.broadcast_to(space.high + 1.0, good.shape).astype(good.dtype)))
    return bad


def _check_copies(make: Make, mode: AutoresetMode, events: int, seed: int) -> None:
    """A pickled copy, taken in mid-episode, goes on as the original does."""
    env = make(num_envs=ROWS, autoreset_mode=mode)
    _story(env, seed, 3)
    copy = pickle.loads(pickle.dumps(env))  # noqa: S301 – bytes made in this line
    names = range(ROWS)
    stories = [play(one, Actions(one.single_action_space, names), events) for one in (env, copy)]
    compare(stories[1], stories[0], "A pickled copy goes on as the original does")
    env.close()
    copy.close()


def _check_single(make_single: Callable[[], Env[Any, Any]], story: Sequence[Tape], seed: int) -> None:
    """The single env, seeded with a row's seed, lives that row's episodes."""
    env = make_single()
    for row, row_seed in enumerate(row_seeds(seed, ROWS)):
        actions = Actions(env.action_space, range(ROWS))
        observation, _ = env.reset(seed=row_seed)
        told: Tape = [Event(-1, _copied(observation))]
        for event in story[row][1:]:
            if event.action < 0:
                observation, _ = env.reset()
                told.append(Event(-1, _copied(observation)))
                continue
            after, reward, terminated, truncated, _ = env.step(actions.of(row, event.action))
            told.append(Event(event.action, _copied(after), float(reward), bool(terminated), bool(truncated)))
        compare([told], [story[row]], f"Row {row} equals the single env with seed row_seeds(seed, rows)[{row}]")
    env.close()


def _copied(observation: Any) -> Any:
    if isinstance(observation, Mapping):
        return {key: _copied(value) for key, value in observation.items()}
    if isinstance(observation, tuple):
        return tuple(_copied(value) for value in observation)
    return as_array(observation).copy()
