"""Benchmark: agents on environments, in the same worlds, with everything stored as it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode

from stem_gym.core.config import config_hash
from stem_gym.core.errors import ConfigError
from stem_gym.jobs.outcome import Outcome, make_folder, mean_and_error, store
from stem_gym.jobs.roster import agents_package, check_id, policy_for

MOST_ROWS = 32  # episodes side by side; more saves little on one core and blurs the thinking time
Report = Callable[[str, str, int, int], None]  # id, agent, episodes done, episodes in all


@dataclass(frozen=True)
class Plan:
    """What to compare."""

    ids: Sequence[str]
    agents: Sequence[str]
    episodes: int
    seed: int
    overrides: Mapping[str, Any] = field(default_factory=dict)


def bench(
    plan: Plan, folder: Path | None = None, report: Report | None = None, into: list[Outcome] | None = None
) -> list[Outcome]:
    """The outcomes of every agent on every id; after each one the files in `folder` are renewed.

    They are appended to `into` as they come, and on a KeyboardInterrupt the episodes that are finished of the running
    one, marked as not complete. Raises StemGymError subclasses for unknown names before anything runs.
    """
    if plan.episodes < 1:
        raise ConfigError(f"A benchmark needs at least one episode; given {plan.episodes}.")
    if folder is not None:
        make_folder(folder)
    _check_names(plan)
    outcomes = [] if into is None else into
    for id in plan.ids:
        for agent in plan.agents:
            try:
                _run(plan, id, agent, report, outcomes)
            finally:
                if folder is not None and outcomes:
                    store(outcomes, plan.seed, folder)
    return outcomes


def _check_names(plan: Plan) -> None:
    """Make every pair once with one row, so that a wrong name stops the run at its start and not after an hour."""
    if not plan.ids or not plan.agents:
        raise ConfigError(f"Name at least one environment id and one agent; given {plan.ids} and {plan.agents}.")
    for id in plan.ids:
        env = gymnasium.make_vec(check_id(id), num_envs=1, autoreset_mode=AutoresetMode.DISABLED, **plan.overrides)
        try:
            for agent in plan.agents:
                policy_for(agent, env)
        finally:
            env.close()


def _run(plan: Plan, id: str, agent: str, report: Report | None, into: list[Outcome]) -> None:
    rows = min(plan.episodes, MOST_ROWS)
    env = gymnasium.make_vec(id, num_envs=rows, autoreset_mode=AutoresetMode.DISABLED, **plan.overrides)
    finished: dict[int, Any] = {}
    try:
        policy = policy_for(agent, env)
        progress = None if report is None else (lambda done, of: report(id, agent, done, of))
        evaluate = agents_package().evaluate
        try:
            evaluate(policy, id, plan.episodes, plan.seed, env=env, progress=progress, finished=finished)
        finally:
            if finished:
                numbers = sorted(finished)
                episodes, settings = [finished[number] for number in numbers], policy.settings.model_dump(mode="json")
                complete = len(numbers) == plan.episodes
                into.append(Outcome(id, agent, hash_of(env), episodes, settings, complete, numbers))
    finally:
        env.close()


def hash_of(env: Any) -> str:
    """The hash of the configuration behind an environment."""
    found = getattr(env.unwrapped, "config_hash", None)
    return str(found) if found else config_hash(dict(getattr(env.unwrapped, "task_config", {})))


def unmet(outcomes: Sequence[Outcome], demands: Sequence[str]) -> list[str]:
    """A sentence for each demand such as `lock_on.success>=0.9` that the means do not meet.

    Raises ConfigError for a demand of another form, or for an agent or a figure that is not there.
    """
    return [text for demand in demands for text in _judge(outcomes, demand)]


def _judge(outcomes: Sequence[Outcome], demand: str) -> list[str]:
    left, sign, right = demand.partition(">=")
    agent, _, name = left.strip().rpartition(".")
    try:
        least = float(right)
    except ValueError:
        sign = ""
    if not sign or not agent:
        raise ConfigError(f"A demand must read AGENT.FIGURE>=NUMBER, such as lock_on.success>=0.9; given {demand!r}.")
    concerned = [outcome for outcome in outcomes if outcome.agent == agent]
    if not concerned or any(name not in outcome.episodes[0] for outcome in concerned):
        known = sorted({outcome.agent for outcome in outcomes})
        raise ConfigError(f"The demand {demand!r} names an agent or a figure that was not measured; agents: {known}.")
    means = {outcome.id: mean_and_error(float(e[name]) for e in outcome.episodes)[0] for outcome in concerned}
    return [
        f"{id}: {agent}.{name} is {mean:.4g}, at least {least:g} was demanded"
        for id, mean in means.items()
        if not mean >= least
    ]
