"""The network that reads maps: its regression by hand, symmetries, masks, and fields of other sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

import agents
from agents.learning.map_network import MapNetwork, MapSettings, planes_of, reads_maps
from agents.policy import Face
from stem_gym.core.errors import PolicyError

LARGE = 1e30


def spaces_of(height: int, width: int) -> tuple[spaces.Dict, spaces.Discrete]:
    grid = (height, width)
    observation = {
        "image": spaces.Box(0, 255, grid, np.uint8),
        "value": spaces.Box(-LARGE, LARGE, grid, np.float32),
        "measured": spaces.Box(0, 1, grid, np.uint8),
        "budget": spaces.Box(0.0, 1.0, (3,), np.float32),
    }
    return spaces.Dict(observation), spaces.Discrete(height * width)


def seen(rows: int = 3, height: int = 16, width: int = 20, points: int = 9) -> dict[str, torch.Tensor]:
    """Random images with some measured cells; every row has one measurement more than the last."""
    generator = torch.Generator().manual_seed(5)
    measured = torch.zeros(rows, height * width, dtype=torch.uint8)
    for row in range(rows):
        measured[row, torch.randperm(height * width, generator=generator)[: points + row]] = 1
    measured = measured.reshape(rows, height, width)
    return {
        "image": torch.randint(0, 256, (rows, height, width), generator=generator, dtype=torch.uint8),
        "value": torch.randn(rows, height, width, generator=generator) * measured * 1e4,
        "measured": measured,
        "budget": torch.rand(rows, 3, generator=generator),
    }


def network(height: int = 16, width: int = 20) -> MapNetwork:
    torch.manual_seed(0)
    return MapNetwork(*spaces_of(height, width), MapSettings())


def test_a_measured_cell_is_never_the_most_likely() -> None:
    observation = seen()
    logits = network()(observation)[0]
    chosen = logits.argmax(1)
    assert (observation["measured"].flatten(1).gather(1, chosen.unsqueeze(1)) == 0).all()
    assert (logits[observation["measured"].flatten(1) > 0] < -1e3).all()


def test_nearness_is_the_weighted_mean_of_the_values_by_hand() -> None:
    """Two values, +1 and −1 in standard deviations, seen from a cell between them, nearer to the first."""
    height = width = 25
    value, measured = torch.zeros(1, height, width), torch.zeros(1, height, width, dtype=torch.uint8)
    for x, number in ((10, 300.0), (13, 100.0)):
        value[0, 12, x], measured[0, 12, x] = number, 1
    observation = {"image": torch.zeros(1, height, width, dtype=torch.uint8), "value": value, "measured": measured}
    planes = planes_of(observation | {"budget": torch.ones(1, 3)})
    weights = [np.exp(-0.5 * (d / (25 * 0.12)) ** 2) for d in (1.0, 2.0)]
    expected = (weights[0] - weights[1]) / (sum(weights) + 0.05)
    assert planes[0, 10, 12, 11] == pytest.approx(expected, rel=1e-4)
    assert planes[0, 11, 12, 11] == pytest.approx(sum(weights) / (sum(weights) + 1.0), rel=1e-4)


def test_likeness_is_the_weighted_mean_over_like_neighbourhoods() -> None:
    """Half the field is bright: a value in the bright half says nothing of the dark one, and much of its own."""
    image = torch.zeros(1, 32, 32, dtype=torch.uint8)
    image[:, :, 16:] = 200
    value, measured = torch.zeros(1, 32, 32), torch.zeros(1, 32, 32, dtype=torch.uint8)
    for x, number in ((4, 1.0), (28, 3.0)):
        value[0, 6, x], measured[0, 6, x] = number, 1
    planes = planes_of({"image": image, "value": value, "measured": measured, "budget": torch.ones(1, 3)})
    assert planes[0, 6, 24, 27] > 0.9 and planes[0, 6, 24, 4] < -0.9


def test_mirrored_fields_have_mirrored_planes() -> None:
    observation = seen(height=16, width=16)
    flipped = {key: part.flip(2) if part.dim() == 3 else part for key, part in observation.items()}
    turned = {key: part.transpose(1, 2) if part.dim() == 3 else part for key, part in observation.items()}
    planes = planes_of(observation)
    torch.testing.assert_close(planes_of(flipped), planes.flip(3), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(planes_of(turned), planes.transpose(2, 3), atol=1e-4, rtol=1e-4)


def test_neither_the_neighbours_nor_the_unit_of_the_value_matter() -> None:
    observation, net = seen(), network()
    together = net(observation)[0]
    for row in range(3):
        alone = net({key: part[row : row + 1] for key, part in observation.items()})[0]
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)
    other_unit = net(observation | {"value": 1e-3 * observation["value"]})[0]
    torch.testing.assert_close(other_unit, together, atol=1e-3, rtol=1e-3)


def test_the_same_arrays_fit_a_field_of_any_size() -> None:
    small, large = network(16, 20), network(50, 41)
    large.load_state_dict(small.state_dict())
    logits, value = large(seen(height=50, width=41))
    assert logits.shape == (3, 2050) and value.shape == (3,) and logits.isfinite().all()


def test_nothing_measured_yet_is_no_trouble() -> None:
    observation = {key: torch.zeros_like(part) for key, part in seen().items()}
    logits, value = network()(observation)
    assert logits.isfinite().all() and value.isfinite().all()


def test_other_spaces_are_refused() -> None:
    observation, action = spaces_of(8, 9)
    assert reads_maps(observation, action)
    assert not reads_maps(observation, spaces.Discrete(71))
    assert not reads_maps(observation, spaces.Box(-1.0, 1.0, (3,)))
    with pytest.raises(PolicyError, match="maps"):
        MapNetwork(observation, spaces.Discrete(71), MapSettings())


def test_a_fresh_policy_goes_where_the_regression_says_high_and_nothing_is_known() -> None:
    """The start of the learning is already a search: not at the least value, and not beside what was measured."""
    observation, action = spaces_of(16, 20)
    face: Any = Face("toy-v0", 3, observation, action, {"kind": "spectrum_search"})
    policy = agents.make("ppo", face, weights="fresh")
    arrays = {key: part.numpy() for key, part in seen().items()}
    chosen = policy.act(arrays)
    assert chosen.shape == (3,) and chosen.dtype == np.int64
    assert all(arrays["measured"][row].flat[cell] == 0 for row, cell in enumerate(chosen))
