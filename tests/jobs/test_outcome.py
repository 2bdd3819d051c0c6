"""Summaries of episodes, and the files that keep them."""

from __future__ import annotations

import csv
import json
import math

import pytest

from stem_gym.core.errors import RecordError
from stem_gym.jobs import outcome as outcomes
from stem_gym.jobs.outcome import Outcome


@pytest.fixture
def two_agents() -> list[Outcome]:
    good = [
        {"success": True, "return": 2.0, "pointing_error_pm": 10.0},
        {"success": True, "return": 4.0, "pointing_error_pm": 14.0},
    ]
    poor = [
        {"success": False, "return": -1.0, "pointing_error_pm": math.nan},
        {"success": True, "return": 1.0, "pointing_error_pm": 9.0},
    ]
    return [Outcome("x/Y-v0", "good", "abc", good), Outcome("x/Y-v0", "poor", "abc", poor)]


def test_mean_and_error_by_hand():
    assert outcomes.mean_and_error([2.0, 4.0]) == (3.0, 1.0)  # variance 2, over two values: error 1
    mean, error = outcomes.mean_and_error([5.0, math.nan])
    assert mean == 5.0 and math.isnan(error)
    assert all(math.isnan(value) for value in outcomes.mean_and_error([]))


def test_the_interval_of_a_share_is_wilsons():
    """8 of 10: 0.490 to 0.943, the textbook figures (Brown, Cai, DasGupta, Stat. Sci. 16, 101, 2001)."""
    assert outcomes.share_interval(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert outcomes.share_interval(0, 0) == (0.0, 1.0)
    assert outcomes.share_interval(10, 10)[1] == pytest.approx(1.0)


def test_a_summary_keeps_common_figures_first(two_agents):
    assert outcomes.numbers_of(two_agents[0].episodes) == ["success", "return", "pointing_error_pm"]
    row = outcomes.summarise(two_agents[1])
    assert (row["success"], row["return"], row["pointing_error_pm"]) == (0.5, 0.0, 9.0)


def test_files_hold_every_episode_and_no_nan(two_agents, tmp_path):
    outcomes.store(two_agents, seed=7, folder=tmp_path / "new")
    kept = json.loads((tmp_path / "new" / "bench.json").read_text(), parse_constant=pytest.fail)
    assert kept["seed"] == 7 and kept["versions"]["torch"]
    assert [run["config_hash"] for run in kept["runs"]] == ["abc", "abc"]
    rows = list(csv.DictReader((tmp_path / "new" / "episodes.csv").read_text().splitlines()))
    assert [row["return"] for row in rows] == ["2.0", "4.0", "-1.0", "1.0"]
    assert rows[2]["pointing_error_pm"] == ""
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["bench.json", "episodes.csv", "summary.csv"]


def test_a_folder_that_can_not_be_written_is_refused_first(tmp_path):
    """A file stands where the folder should be: true for every user, also for one who may write anywhere."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(RecordError, match=r"Can not write to the folder .*taken.*Name a folder"):
        outcomes.make_folder(tmp_path / "taken" / "inside")


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.0, math.nan, "0"),
        (math.nan, math.nan, "–"),
        (1234.5, 12.0, "1,234 ± 12"),
        (0.01234, math.nan, "0.0123"),
        (3.14159, 0.2, "3.14 ± 0.20"),
        (3.14159, 1e-4, "3.14"),
        (3.21e9, 2.3e6, "3.21e9 ± 2e6"),
    ],
)
def test_figures_for_people(value, error, text):
    assert outcomes.shown(value, error) == text
