"""The network points at what is bright and was not served, wherever the frame was taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.learning.network import NetworkSettings, PointingNetwork
from stem_gym.core.errors import PolicyError

ACTION = spaces.Box(-1.0, 1.0, (5,), np.float32)


def space(size=64):
    return spaces.Dict(
        {
            "image": spaces.Box(0, 255, (2, size, size), np.uint8),
            "region": spaces.Box(0.0, 1.0, (4,), np.float32),
            "probe": spaces.Box(0.0, 1.0, (2,), np.float32),
        }
    )


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return PointingNetwork(space(), ACTION, NetworkSettings())


def view(spots, region, served=(), size=64, width=0.018):
    """A frame on `region`, as an observation (1, …): bright spots and served marks at places of the reference frame."""
    left, top, wide, high = region
    at = (torch.arange(size) + 0.5) / size
    x, y = left + wide * at, top + high * at

    def draw(places, sigma, top_value):
        image = torch.zeros(size, size)
        for px, py in places:
            image += torch.exp(-0.5 * ((y - py) / sigma)[:, None] ** 2 - 0.5 * ((x - px) / sigma) ** 2)
        return (top_value * image).clamp(0, 255)

    image = torch.stack((20 + draw(spots, width, 120), draw(served, 0.042, 255)))
    return {
        "image": image.to(torch.uint8)[None],
        "region": torch.tensor([region], dtype=torch.float32),
        "probe": torch.tensor([[0.5, 0.5]]),
    }


@pytest.mark.parametrize("region", [(0.0, 0.0, 1.0, 1.0), (0.2, 0.5, 0.25, 0.25), (0.1, 0.4, 0.5, 0.5)])
def test_every_keypoint_is_at_the_only_spot(network, region):
    """Half a pixel of the coarse copy (1/16 of the frame) is what a sharp maximum in it can tell."""
    place = (0.31, 0.62)
    _, keypoints = network._features(view([place], region))
    np.testing.assert_allclose(keypoints[0].detach(), np.tile(place, (8, 1)), atol=region[2] / 32)


def test_x_comes_first(network):
    _, keypoints = network._features(view([(0.8, 0.2)], (0.0, 0.0, 1.0, 1.0)))
    assert (keypoints[0, :, 0] > 0.7).all() and (keypoints[0, :, 1] < 0.3).all()


def test_a_served_spot_is_left_alone(network):
    frame = view([(0.3, 0.3), (0.7, 0.6)], (0.0, 0.0, 1.0, 1.0), served=[(0.3, 0.3)])
    _, keypoints = network._features(frame)
    np.testing.assert_allclose(keypoints[0].detach(), np.tile((0.7, 0.6), (8, 1)), atol=0.03)


def test_the_action_points_there_from_the_start(network):
    with torch.no_grad():
        mean, value = network(view([(0.31, 0.62)], (0.2, 0.5, 0.25, 0.25)))
    np.testing.assert_allclose((mean[0, 1:3] + 1) / 2, (0.31, 0.62), atol=0.05)  # the perceptron adds a little
    assert mean.shape == (1, 5) and value.shape == (1,)


def test_equal_spots_are_told_apart_by_direction(network):
    """Eight keypoints and two equal spots: some see the one, some the other, none the middle."""
    spots = np.array([(0.2, 0.3), (0.8, 0.7)])
    _, keypoints = network._features(view(spots, (0.0, 0.0, 1.0, 1.0)))
    away = np.linalg.norm(keypoints[0].detach().numpy()[:, None] - spots, axis=2)
    directed = away[0::2]  # the others are drawn to the probe, which is in the middle of the two
    assert directed.min(1).max() < 0.08 and set(directed.argmin(1)) == {0, 1}


def test_it_is_small_and_learns_in_every_part(network):
    assert sum(p.numel() for p in network.parameters()) < 500_000
    mean, value = network(view([(0.3, 0.3), (0.5, 0.62)], (0.0, 0.0, 1.0, 1.0), served=[(0.35, 0.3)]))
    (mean.square().sum() + value.sum()).backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert silent == ["log_std"]
    assert float(network.finder.mixture.grad.abs().sum()) > 0.0


def test_the_value_alone_is_the_same_value(network):
    frame = view([(0.3, 0.3)], (0.0, 0.0, 1.0, 1.0))
    with torch.no_grad():
        np.testing.assert_allclose(network.value(frame), network(frame)[1])


def test_numbers_alone_are_enough():
    settings = NetworkSettings(place=None, log_std=(0.0, 0.0))
    plain = spaces.Dict({"budget": spaces.Box(0.0, 1.0, (3,), np.float32)})
    network = PointingNetwork(plain, spaces.Box(-1.0, 1.0, (2,), np.float32), settings)
    assert network({"budget": torch.rand(7, 3)})[0].shape == (7, 2)


@pytest.mark.parametrize(
    ("observation", "action", "words"),
    [
        (spaces.Box(0.0, 1.0, (3,)), ACTION, "Dict"),
        (space(), spaces.Discrete(3), "Box of actions"),
        (space(), spaces.Box(-1.0, 1.0, (4,)), "log_std needs 4 values"),
    ],
)
def test_spaces_that_do_not_fit_are_refused(observation, action, words):
    with pytest.raises(PolicyError, match=words):
        PointingNetwork(observation, action, NetworkSettings())
