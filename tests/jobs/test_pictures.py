"""Pictures: drawn without a display, and of the right things."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stem_gym.jobs import pictures
from stem_gym.jobs.outcome import Outcome


def test_running_mean_by_hand():
    assert pictures.running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_a_spark_line_rises_with_its_values():
    assert pictures.spark([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == "▁▂▃▄▅▆▇█"
    assert len(pictures.spark(list(range(1000)), width=40)) == 40
    assert pictures.spark([2.0, 2.0]) == "▁▁"
    assert pictures.spark([]) == ""


def test_every_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    episodes = [
        {"success": True, "return": 1.0, "error_pm": math.nan},
        {"success": False, "return": 2.0, "error_pm": math.nan},
    ]
    made = [
        pictures.comparison(
            [Outcome("x/Y-v0", "a", "", episodes)], {"success": "Success", "error_pm": "Error"}, tmp_path / "c.png"
        ),
        pictures.curve([(0, 0.0), (1, 1.0)], {"other": 0.5}, ("title", "x", "y"), tmp_path / "l.png"),
        pictures.frames([("one", np.eye(8)), ("flat", np.ones((8, 8)))], "frames", tmp_path / "f.png"),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
