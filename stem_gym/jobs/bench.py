"""Benchmark: agents on environments, in the same worlds, with everything stored as it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode

from stem_gym.core.config import config_hash
from stem_gym.core.errors import ConfigError, did_you_mean
from stem_gym.jobs.outcome import Outcome, make_folder, mean_and_error, numbers_of, store
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
    demands: Sequence[Demand] = ()


def bench(
    plan: Plan, folder: Path | None = None, report: Report | None = None, into: list[Outcome] | None = None
) -> list[Outcome]:
    """The outcomes of every agent on every id; after each one the files in `folder` are renewed.

    They are appended to `into` as they come, and on a KeyboardInterrupt the episodes that are finished of the running
    one, marked as not complete. Raises StemGymError subclasses for unknown names before anything runs, and for a
    demand on a figure that is not measured after the first agent.
    """
    if plan.episodes < 1:
        raise ConfigError(f"A benchmark needs at least one episode; given {plan.episodes}.")
    if folder is not None:
        make_folder(folder)
    _check_demands(plan)
    _check_names(plan)
    outcomes = [] if into is None else into
    for id in plan.ids:
        for agent in plan.agents:
            try:
                _run(plan, id, agent, report, outcomes)
            finally:
                if folder is not None and outcomes:
                    store(outcomes, plan.seed, folder)
            _check_figures(plan, outcomes[-1].episodes[0])
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


@dataclass(frozen=True)
class Demand:
    """What the mean of an agent's figure must reach."""

    agent: str
    figure: str
    least: float


def demand_of(text: str) -> Demand:
    """The demand that a text such as `lock_on.success>=0.9` makes. Raises ConfigError for another form."""
    left, sign, right = text.partition(">=")
    agent, _, figure = left.strip().rpartition(".")
    try:
        least = float(right)
    except ValueError:
        sign = ""
    if not sign or not agent:
        raise ConfigError(f"A demand must read AGENT.FIGURE>=NUMBER, such as lock_on.success>=0.9; given {text!r}.")
    return Demand(agent, figure, least)


def _check_demands(plan: Plan) -> None:
    for demand in plan.demands:
        if demand.agent not in plan.agents:
            raise ConfigError(
                f"The demand on {demand.agent}.{demand.figure} names an agent that does not run. "
                f"{did_you_mean(demand.agent, plan.agents)}"
            )


def _check_figures(plan: Plan, episode: Mapping[str, Any]) -> None:
    for demand in plan.demands:
        if demand.figure not in (figures := numbers_of([episode])):
            raise ConfigError(
                f"The demand on {demand.agent}.{demand.figure} names a figure that is not measured. "
                f"{did_you_mean(demand.figure, figures)}"
            )


def unmet(outcomes: Sequence[Outcome], demands: Sequence[Demand]) -> list[str]:
    """A sentence for each demand and environment where the mean does not reach it; a mean that is NaN reaches none."""
    means = [
        (demand, outcome.id, mean_and_error(float(episode[demand.figure]) for episode in outcome.episodes)[0])
        for demand in demands
        for outcome in outcomes
        if outcome.agent == demand.agent
    ]
    return [
        f"{id}: {demand.agent}.{demand.figure} is {mean:.4g}, at least {demand.least:g} was demanded"
        for demand, id, mean in means
        if not mean >= demand.least
    ]
