"""`check_policy`: what must hold for every policy, one's own or a third party's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from agents.policy import Array, Policy, as_array, face_of
from stem_gym.core.errors import PolicyError

_STEPS = 4


def check_policy(policy: Policy, env: Any) -> None:
    """Run a policy on a vector env (autoreset DISABLED) and raise PolicyError for the first rule it breaks.

    Actions fill the action space's shape and type, stay inside it and are finite; the observation is not changed; the
    same world gives the same actions again; resetting one row leaves the others alone; NumPy's and torch's global
    random numbers are not touched; a saved copy acts alike.
    """
    face = face_of(env)
    if policy.face.rows != face.rows or policy.face.id != face.id:
        raise PolicyError(
            f"The policy is for {policy.face.rows} rows of {policy.face.id}; the env has {face.rows} of {face.id}."
        )
    first = _play(policy, env)
    for step, (again, before) in enumerate(zip(_play(policy, env), first, strict=True)):
        _same(again, before, f"The same worlds gave other actions at step {step}: the policy kept something over reset")
    with tempfile.TemporaryDirectory() as folder:
        copy = type(policy).load(policy.save(Path(folder) / "copy"), env)
    for step, (again, before) in enumerate(zip(_play(copy, env), first, strict=True)):
        _same(again, before, f"A saved and loaded copy gave other actions at step {step}")
    _check_partial_reset(policy, env)


def _play(policy: Policy, env: Any) -> list[Array]:
    """Actions of the first steps in fixed worlds."""
    seeds = list(range(face_of(env).rows))
    observation, _ = env.reset(seed=seeds)
    policy.reset(np.arange(len(seeds)), seeds)
    actions = []
    for _ in range(_STEPS):
        actions.append(_act(policy, observation))
        observation, _, terminated, truncated, _ = env.step(actions[-1])
        if bool((as_array(terminated) | as_array(truncated)).any()):
            break  # what an ended row would do is nobody's business
    return actions


def _act(policy: Policy, observation: Any) -> Array:
    """One action, with the rules that each must keep."""
    kept = {key: np.array(value) for key, value in observation.items()} if isinstance(observation, dict) else {}
    randomness = _global_numbers()
    action = policy.act(observation)
    space, rows = policy.face.action_space, policy.face.rows
    shape = (rows, *(space.shape or ()))
    if not isinstance(action, np.ndarray) or action.shape != shape or action.dtype != space.dtype:
        raise PolicyError(
            f"act() must give a NumPy array {shape} of {space.dtype}; it gave {type(action).__name__} "
            f"{getattr(action, 'shape', '')} of {getattr(action, 'dtype', '?')}."
        )
    outside = [row for row in range(rows) if not space.contains(action[row])]
    if outside:
        raise PolicyError(f"The action {action[outside[0]]} of row {outside[0]} is outside {space}, or not finite.")
    changed = [key for key, value in kept.items() if not np.array_equal(value, np.asarray(observation[key]))]
    if changed:
        raise PolicyError(f"act() changed the observation it was given: {', '.join(changed)}.")
    if randomness != _global_numbers():
        raise PolicyError("act() drew from a global random number generator; draw from streams of the policy's own.")
    return action


def _global_numbers() -> tuple[str, bytes]:
    """Where the global generators of NumPy and torch stand."""
    import torch

    return repr(np.random.get_state()), torch.get_rng_state().numpy().tobytes()  # noqa: NPY002 – to see it unchanged


def _check_partial_reset(policy: Policy, env: Any) -> None:
    """Row 0 starts anew in mid-episode; the other rows must act as if nothing had happened."""
    rows = face_of(env).rows
    if rows < 2:
        return
    seeds = list(range(rows))
    runs = []
    for interrupted in (False, True):
        observation, _ = env.reset(seed=seeds)
        policy.reset(np.arange(rows), seeds)
        for _ in range(2):
            observation, _, terminated, truncated, _ = env.step(_act(policy, observation))
            if bool((as_array(terminated) | as_array(truncated)).any()):
                break
        if interrupted:
            policy.reset([0], [rows])
        runs.append(_act(policy, observation)[1:])
    _same(runs[1], runs[0], "Resetting row 0 changed the action of another row")


def _same(given: Array, expected: Array, complaint: str) -> None:
    if not np.array_equal(given, expected):
        row = int(np.flatnonzero((given != expected).reshape(len(given), -1).any(axis=1))[0])
        raise PolicyError(f"{complaint}; row {row}: {given[row]}, before {expected[row]}.")
