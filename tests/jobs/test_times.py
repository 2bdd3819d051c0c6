"""Times to a goal: failures count with the limit, whatever they did; regret is taken world by world."""

from __future__ import annotations

import math

import pytest

from stem_gym.core.errors import ConfigError
from stem_gym.jobs.outcome import Outcome, share_interval
from stem_gym.jobs.times import censored_s, curve, regret_s, success_at, summarise_times

NAN = math.nan
RUNS = [
    {"success": True, "goal_s": 30.0, "seconds": 30.0, "jumps": 4, "lost_atoms": 0.0, "electrons": 1e9},
    {"success": True, "goal_s": 90.0, "seconds": 90.0, "jumps": 8, "lost_atoms": 1.0, "electrons": 3e9},
    {"success": False, "goal_s": NAN, "seconds": 12.0, "jumps": 1, "lost_atoms": 4.0, "electrons": 1e9},  # broke it
    {"success": False, "goal_s": NAN, "seconds": 600.0, "jumps": 9, "lost_atoms": 0.0, "electrons": 9e9},
]


def test_an_early_failure_counts_with_the_limit():
    assert censored_s(RUNS, 600.0) == [30.0, 90.0, 600.0, 600.0]
    assert censored_s(RUNS, 60.0) == [30.0, 60.0, 60.0, 60.0]


def test_success_at_a_limit_with_its_interval():
    assert success_at(RUNS, 60.0) == (0.25, *share_interval(1, 4))
    assert success_at(RUNS, 600.0)[0] == 0.5


def test_the_curve_rises_to_the_share_that_got_there():
    assert [point["share"] for point in curve(RUNS, (10.0, 30.0, 89.0, 90.0, 600.0))] == [0.0, 0.25, 0.25, 0.5, 0.5]
    assert all(point["low"] <= point["share"] <= point["high"] for point in curve(RUNS, (10.0, 600.0)))


def test_regret_is_paired_by_world():
    best = [run | {"success": True, "goal_s": 20.0} for run in RUNS]
    mean, error = regret_s(RUNS, best, 600.0)
    assert mean == pytest.approx((10.0 + 70.0 + 580.0 + 580.0) / 4)
    assert error > 0.0
    assert regret_s(RUNS, RUNS, 600.0) == (0.0, 0.0)


def test_the_row_of_a_table_holds_what_it_cost():
    row = summarise_times(Outcome("id", "agent", "hash", RUNS), (60.0, 600.0), Outcome("id", "best", "hash", RUNS))
    assert (row["success_60s"], row["success_600s"], row["limit_s"]) == (0.25, 0.5, 600.0)
    assert (row["censored_s"], row["jumps"], row["lost_atoms"], row["regret_s"]) == (330.0, 5.5, 1.25, 0.0)
    assert row["electrons"] == pytest.approx(3.5e9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: censored_s(RUNS, 0.0), "positive"),
        (lambda: regret_s(RUNS, RUNS[:2], 600.0), "4 and 2"),
        (lambda: success_at([{"success": True}], 60.0), "goal_s"),
        (lambda: summarise_times(Outcome("id", "agent", "hash", RUNS), ()), "limit"),
    ],
)
def test_what_can_not_be_compared_is_refused(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
