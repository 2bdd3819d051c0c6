"""Conformance of environments: Gymnasium's checker, the rules of vector envs, the instrument, pictures, policies."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from stem_gym.core.conformance import check_instrument, check_vector_env
from stem_gym.core.errors import ConformanceError, MissingExtraError, StemGymError
from stem_gym.envs.registration import broken_variants, variant_files
from stem_gym.envs.variants import build, load_variant
from stem_gym.jobs.roster import agents_package, check_id

_CONFIG = "configuration"
_STEPS = 3  # after as many, half of the episodes are to end here: rows then end at different, early times
_EVENTS = 20  # steps and resets of each story

Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One check of one environment."""

    id: str
    check: str
    problem: str = ""  # empty where all is well
    skipped: str = ""  # why it could not be looked at

    def as_data(self) -> dict[str, str]:
        """As plain data."""
        return asdict(self)


def check(id: str | None, overrides: Overrides, tell: Callable[[Finding], None]) -> list[Finding]:
    """Every check of one id, or of all; `tell` is called after each. A check that fails does not stop the others.

    Raises UnknownNameError and ConfigError for an id or overrides that fit nothing.
    """
    if id is not None:
        load_variant(check_id(id), overrides)
    findings: list[Finding] = []

    def note(found: Finding) -> Finding:
        findings.append(found)
        tell(found)
        return found

    for path, error in broken_variants().items() if id is None else ():
        note(Finding(f"{path.parent.name}/{path.name}", _CONFIG, str(error)))
    for name in [id] if id else [name for name, path in variant_files().items() if path not in broken_variants()]:
        if note(_run(name, _CONFIG, lambda name=name: load_variant(name))).problem:  # type: ignore[misc]
            continue
        load_variant(name, overrides)
        for what, work in _checks(name, overrides):
            note(_run(name, what, work))
    return findings


def _checks(id: str, overrides: Overrides) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "Gymnasium's checker", lambda: _gymnasium(id, overrides)
    yield "vector env in every autoreset mode", lambda: _vector(id, overrides)
    yield "instrument", lambda: check_instrument(build(load_variant(id, overrides), rows=3).instrument)
    yield "picture", lambda: _picture(id, overrides)
    for agent, folder in agents_package().shipped_policies():
        if agents_package().shipped(agent, id) == folder:
            yield f"shipped policy {agent}", lambda agent=agent: _policy(id, agent, overrides)  # type: ignore[misc]


def _run(id: str, what: str, work: Callable[[], object]) -> Finding:
    """One check; a warning is a problem, a missing extra is not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            work()
    except MissingExtraError as error:
        return Finding(id, what, skipped=str(error))
    except (StemGymError, gymnasium.error.Error, AssertionError, Warning) as error:
        return Finding(id, what, problem=f"{type(error).__name__}: {error}")
    return Finding(id, what)


def _gymnasium(id: str, overrides: Overrides) -> None:
    env = gymnasium.make(id, disable_env_checker=True, **overrides)
    try:
        check_env(env.unwrapped, skip_render_check=True)
    finally:
        env.close()


def _vector(id: str, overrides: Overrides) -> None:
    seconds, differ = _spent_s(id, overrides)
    short = dict(overrides) | {"budget": dict(overrides.get("budget") or {}) | {"seconds": seconds}}
    check_vector_env(
        lambda **asked: gymnasium.make_vec(id, **asked, **short),
        lambda: gymnasium.make(id, disable_env_checker=True, **short),
        events=_EVENTS,
        staggered=differ,
    )


def _spent_s(id: str, overrides: Overrides) -> tuple[float, bool]:
    """Microscope time that some random steps take, and whether it differs, so that rows can end at different steps."""
    env = gymnasium.make_vec(id, num_envs=8, autoreset_mode=AutoresetMode.DISABLED, **overrides)
    try:
        env.action_space.seed(0)
        env.reset(seed=0)
        spent = []
        for _ in range(_STEPS):
            _, _, terminated, truncated, info = env.step(env.action_space.sample())
            spent.append(np.asarray(info["seconds"]))
            if (ended := np.asarray(terminated | truncated)).any():
                env.reset(options={"reset_mask": ended})
        most = np.max(spent, axis=0)
        return float(np.median(most)), bool(np.ptp(most) > 0.0)
    finally:
        env.close()


def _picture(id: str, overrides: Overrides) -> None:
    env = gymnasium.make(id, render_mode="rgb_array", disable_env_checker=True, **overrides)
    try:
        env.reset(seed=0)
        picture: Any = env.render()
        if picture.dtype != "uint8" or picture.ndim != 3 or picture.shape[2] != 3 or picture.min() == picture.max():
            raise ConformanceError(
                "render() gives a picture", f"{picture.dtype} {picture.shape}", "uint8 (H, W, 3), not of one colour"
            )
    finally:
        env.close()


def _policy(id: str, agent: str, overrides: Overrides) -> None:
    agents = agents_package()
    env = gymnasium.make_vec(id, num_envs=3, autoreset_mode=AutoresetMode.DISABLED, **overrides)
    try:
        agents.check_policy(agents.load(agent, env), env)
    finally:
        env.close()
