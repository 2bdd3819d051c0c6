"""Deploy: a policy on an instrument, one episode at a time, with every instruction and answer recorded."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from stem_gym.core.errors import ConfigError
from stem_gym.core.streams import row_seeds
from stem_gym.instruments.recorder import Provenance, Recorder
from stem_gym.jobs.bench import hash_of
from stem_gym.jobs.outcome import Outcome
from stem_gym.jobs.roster import check_id, policy_for

Watch = Callable[[int, Mapping[str, Any]], None]  # episode number, info of the last step


@dataclass(frozen=True)
class Deployment:
    """What to run where."""

    policy: str  # folder, shipped name or agent
    id: str
    instrument: str
    episodes: int = 1
    seed: int = 0
    record: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


def deploy(deployment: Deployment, watch: Watch | None = None, into: list[Outcome] | None = None) -> Outcome:
    """The episodes of a policy on an instrument; `watch` is told after every step.

    The outcome is appended to `into` as well; on a KeyboardInterrupt it has the finished episodes and is not complete.
    Episode k is the world `row_seeds(seed, episodes)[k]` on a simulated instrument, as in a benchmark. Raises
    StemGymError subclasses before anything moves: unknown names, a policy for another environment, a folder that can
    not be written.
    """
    if deployment.episodes < 1:
        raise ConfigError(f"A deployment needs at least one episode; given {deployment.episodes}.")
    env = gymnasium.make(check_id(deployment.id), **_with_instrument(deployment))
    try:
        policy = policy_for(deployment.policy, env)
        seeds = row_seeds(deployment.seed, deployment.episodes)
        if deployment.record is not None:
            _record(env, deployment, policy, seeds)
        settings = {"instrument": deployment.instrument, **policy.settings.model_dump(mode="json")}
        episodes: list[dict[str, Any]] = []
        try:
            for number, seed in enumerate(seeds):
                episodes.append(play(env, policy, number, seed, watch))
        finally:
            complete = len(episodes) == deployment.episodes
            done = Outcome(deployment.id, deployment.policy, hash_of(env), episodes, settings, complete)
            if into is not None and episodes:
                into.append(done)
        return done
    finally:
        env.close()


def _with_instrument(deployment: Deployment) -> dict[str, Any]:
    """The variant's own instrument section, executed by another adapter."""
    overrides = dict(deployment.overrides)
    section = dict(overrides.get("instrument") or {})
    if "adapter" in section or "kind" in section:
        raise ConfigError("The instrument is named by --instrument; overrides may change its settings, not its kind.")
    overrides["instrument"] = section | {"adapter": deployment.instrument}
    return overrides


def _record(env: Any, deployment: Deployment, policy: Any, seeds: list[int]) -> None:
    """Put a recorder between the environment and its instrument."""
    batch = env.unwrapped.batch
    provenance = Provenance(
        policy=deployment.policy,
        policy_hash=hash_of_policy(policy),
        config=env.unwrapped.config,
        config_hash=hash_of(env),
        seeds=seeds,
    )
    batch.instrument = Recorder(batch.instrument, deployment.record or Path(), provenance)


def hash_of_policy(policy: Any) -> str:
    """Twelve digits over the policy's name, settings and arrays."""
    digest = hashlib.sha256(f"{policy.name} {policy.settings.model_dump_json()}".encode())
    for name, array in sorted(policy.arrays().items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]


def play(env: Any, policy: Any, number: int, seed: int, watch: Watch | None = None) -> dict[str, Any]:
    """One episode of a one-row environment in the world `seed`; its figures."""
    observation, info = env.reset(seed=seed)
    policy.reset([0], [seed])
    total, thinking_s, steps, over = 0.0, 0.0, 0, False
    while not over:
        started = time.perf_counter()
        action = policy.act({key: value[None] for key, value in observation.items()})[0]
        thinking_s += time.perf_counter() - started
        observation, reward, terminated, truncated, info = env.step(action)
        total, steps, over = total + float(reward), steps + 1, terminated or truncated
        if watch is not None:
            watch(number, info)
    figures = {key: value for key, value in info.items() if isinstance(value, bool | int | float)}
    return {"measurements": steps} | figures | {"return": total, "thinking_s": thinking_s}
