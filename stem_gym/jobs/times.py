"""Times to a goal in figures that do not flatter failures, and regret in seconds against another agent.

An episode that did not reach its goal counts with the time limit, however early it ended. Figures of two agents are
compared world by world, since the same worlds were met.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from stem_gym.core.errors import ConfigError
from stem_gym.jobs.outcome import Episode, Outcome, mean_and_error, plain, share_interval

BESIDE = ("jumps", "lost_atoms", "lost_dopant", "broken", "electrons", "seconds", "measurements")


def goal_times(episodes: Sequence[Episode]) -> list[float]:
    """Seconds at which each episode reached its goal; infinite where it did not.

    Raises ConfigError for episodes that tell no `success` or no `goal_s`.
    """
    missing = {key for key in ("success", "goal_s") for episode in episodes if key not in episode}
    if missing:
        raise ConfigError(f"Times to a goal need episodes that tell success and goal_s; missing: {sorted(missing)}.")
    return [float(episode["goal_s"]) if episode["success"] else math.inf for episode in episodes]


def censored_s(episodes: Sequence[Episode], limit_s: float) -> list[float]:
    """Seconds to the goal of each episode; the limit where it was not reached by then."""
    if not limit_s > 0.0:
        raise ConfigError(f"A time limit must be positive; given {limit_s:g} s.")
    return [min(seconds, limit_s) for seconds in goal_times(episodes)]


def success_at(episodes: Sequence[Episode], limit_s: float) -> tuple[float, float, float]:
    """Share of the episodes that reached the goal within the limit, and its 95 % interval (Wilson)."""
    wins = sum(seconds <= limit_s for seconds in goal_times(episodes))
    low, high = share_interval(wins, len(episodes))
    return (wins / len(episodes) if episodes else math.nan), low, high


def curve(episodes: Sequence[Episode], at_s: Sequence[float]) -> list[dict[str, float]]:
    """The share of episodes that have reached the goal by each of the times `at_s`, with its interval."""
    points = []
    for limit_s in at_s:
        share, low, high = success_at(episodes, limit_s)
        points.append({"seconds": float(limit_s), "share": share, "low": low, "high": high})
    return points


def regret_s(episodes: Sequence[Episode], best: Sequence[Episode], limit_s: float) -> tuple[float, float]:
    """Mean and standard error of the seconds lost against `best` in the same worlds, failures censored at the limit.

    Raises ConfigError where the two did not meet the same number of worlds.
    """
    if len(episodes) != len(best):
        raise ConfigError(
            f"Regret compares agents world by world; given {len(episodes)} and {len(best)} episodes. "
            "Evaluate both with the same seed and the same number of episodes."
        )
    pairs = zip(censored_s(episodes, limit_s), censored_s(best, limit_s), strict=True)
    return mean_and_error(own - other for own, other in pairs)


def summarise_times(outcome: Outcome, limits_s: Sequence[float], best: Outcome | None = None) -> dict[str, Any]:
    """One flat row: success at each limit with its interval, censored mean time and regret at the last of them.

    Beside these the means and standard errors of what it cost: jumps, atoms knocked out, electrons.
    """
    if not limits_s:
        raise ConfigError("Name at least one time limit in seconds.")
    episodes, last_s = outcome.episodes, limits_s[-1]
    row: dict[str, Any] = {"id": outcome.id, "agent": outcome.agent, "episodes": len(episodes), "limit_s": last_s}
    for limit_s in limits_s:
        name = f"success_{limit_s:g}s"
        row[name], row[f"{name}_low"], row[f"{name}_high"] = success_at(episodes, limit_s)
    row["censored_s"], row["censored_s_error"] = mean_and_error(censored_s(episodes, last_s))
    if best is not None:
        row["regret_s"], row["regret_s_error"] = regret_s(episodes, best.episodes, last_s)
    for name in BESIDE:
        if all(name in episode for episode in episodes):
            row[name], row[f"{name}_error"] = mean_and_error(float(episode[name]) for episode in episodes)
    return plain(row)
