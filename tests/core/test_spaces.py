"""Spaces as plain data."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gymnasium import spaces

from stem_gym.core.errors import ConfigError
from stem_gym.core.spaces import space_as_data, space_from_data


def test_spaces_with_bounds_of_their_own_are_written_out():
    space = spaces.Box(np.array([0.0, -np.inf], np.float32), np.array([1.0, 2.0], np.float32))
    data = space_as_data(space)["Box"]
    assert data["low"] == [0.0, "-inf"] and data["high"] == [1.0, 2.0]
    assert space_as_data(spaces.Discrete(3)) == {"Discrete": 3}
    with pytest.raises(ConfigError, match="Text"):
        space_as_data(spaces.Text(3))


def test_a_space_that_was_written_down_is_read_back():
    parts = {
        "image": spaces.Box(0, 255, (3, 4), np.uint8),
        "open": spaces.Box(np.array([0.0, -np.inf], np.float32), np.array([1.0, 2.0], np.float32)),
        "many": spaces.MultiDiscrete([5, 2]),
        "one": spaces.Discrete(7),
    }
    whole = spaces.Dict(parts)
    assert space_from_data(json.loads(json.dumps(space_as_data(whole)))) == whole
    for wrong in ({"Text": 3}, {"Box": {"shape": [2]}}, [], {"Discrete": "x"}, {"Box": 1, "Dict": 2}):
        with pytest.raises(ConfigError, match=r"Not a space that was written down|A space is a Box"):
            space_from_data(wrong)
