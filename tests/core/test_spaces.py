"""Spaces as plain data."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces

from stem_gym.core.errors import ConfigError
from stem_gym.core.spaces import space_as_data


def test_spaces_with_bounds_of_their_own_are_written_out():
    space = spaces.Box(np.array([0.0, -np.inf], np.float32), np.array([1.0, 2.0], np.float32))
    data = space_as_data(space)["Box"]
    assert data["low"] == [0.0, "-inf"] and data["high"] == [1.0, 2.0]
    assert space_as_data(spaces.Discrete(3)) == {"Discrete": 3}
    with pytest.raises(ConfigError, match="Text"):
        space_as_data(spaces.Text(3))
