"""Spots in frames: found, placed to a fraction of a pixel, known again after a shift; actions do what was meant."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from agents.engine.sight import brightest_spots, centroids, field_of, fractions_of, same_sites, smooth
from agents.policy import face_of

ID = "stem_gym/AtomTargeting-v0"


def frame(places, sigma, size=64, background=0.1):
    """A noiseless frame of Gaussian spots at `places` (N, 2) pixels (x, y): (1, size, size)."""
    at = torch.arange(size, dtype=torch.float32)
    spots = [torch.exp(-0.5 * (((at - y) / sigma) ** 2)[:, None] - 0.5 * ((at - x) / sigma) ** 2) for x, y in places]
    return (background + sum(spots))[None]


def test_spots_are_found_in_order_of_brightness_x_first():
    image = frame([(10.0, 40.0)], 2.0) + 0.5 * frame([(50.0, 20.0)], 2.0, background=0.0)
    places, heights = brightest_spots(image, 2.0, 2)
    np.testing.assert_array_equal(places[0], [[10, 40], [50, 20]])
    assert heights[0, 0] > heights[0, 1] > 0.1


@pytest.mark.parametrize(("x", "y", "sigma"), [(20.3, 41.7, 1.2), (33.5, 12.1, 3.0), (15.0, 50.25, 6.0)])
def test_a_centre_is_found_from_a_pixel_away(x, y, sigma):
    """A noiseless Gaussian has its centroid at its centre; 0.03 pixels are left by the background that is cut off."""
    start = np.round([[[x + 0.8, y - 0.8]]])
    centre, height = centroids(frame([(x, y)], sigma), start, np.array([sigma]))
    np.testing.assert_allclose(centre[0, 0], [x, y], atol=0.03)
    assert height[0, 0] == pytest.approx(0.5, rel=0.05)  # a Gaussian seen through its own width


def test_smoothing_keeps_a_flat_frame_flat_and_widens_a_spot():
    flat = smooth(torch.full((2, 16, 16), 3.0), torch.tensor([1.0, 4.0]))
    np.testing.assert_allclose(flat, 3.0, rtol=1e-5)
    wide = smooth(frame([(32.0, 32.0)], 2.0, background=0.0), torch.tensor([2.0]))[0]
    assert float(wide[32, 32]) == pytest.approx(0.5, rel=1e-3)  # σ² doubles, so does the area: half the height
    assert float(wide[32, 36] / wide[32, 32]) == pytest.approx(np.exp(-16.0 / 16.0), rel=1e-2)


def test_sites_are_recognised_after_a_common_shift_in_any_order():
    old = np.array([[[3.0, 4.0], [10.0, 5.0], [12.0, 15.0]]])
    new = old[:, [2, 0, 1]] + np.array([1.9, -1.2]) + 0.1
    np.testing.assert_array_equal(same_sites(old, new, 0.8), [[2, 0, 1]])


def test_a_site_that_was_never_there_is_none_of_the_old_ones():
    old = np.array([[[3.0, 4.0], [10.0, 5.0], [12.0, 15.0]]])
    new = old + 0.7
    new[0, 1] = [20.0, 20.0]
    np.testing.assert_array_equal(same_sites(old, new, 0.8), [[0, -1, 2]])


def test_no_rows_are_no_trouble():
    assert same_sites(np.zeros((0, 3, 2)), np.zeros((0, 3, 2)), 0.8).shape == (0, 3)


def test_actions_do_what_was_meant():
    """The instrument's own answer: the region that was scanned, the place where the probe was parked, the times."""
    env = gymnasium.make_vec(ID, num_envs=2)
    env.reset(seed=1)
    field = field_of(face_of(env), "test")
    centre = np.array([[0.4, 0.6], [0.7, 0.3]])
    scanned, *_ = env.step(field.scan(centre, np.array([6.0, 8.0]), np.array([4e-6, 32e-6])))
    side = np.array([6.0, 8.0]) / field.fov_ang
    np.testing.assert_allclose(scanned["region"][:, 2], side, rtol=1e-5)
    np.testing.assert_allclose(scanned["region"][:, :2] + scanned["region"][:, 2:] / 2, centre, atol=1e-5)
    np.testing.assert_allclose(scanned["frame"][:, 0] * field.pixel_dwell_max_s, [4e-6, 32e-6], rtol=1e-4)
    parked, *_ = env.step(field.stay(centre, np.array([0.1, 1.5])))
    np.testing.assert_allclose(parked["probe"], centre, atol=1e-6)
    np.testing.assert_allclose(parked["dwell"][:, 4] * field.dwell_max_s, [0.1, 1.5], rtol=1e-4)
    env.close()


def test_frames_come_back_as_collected_fractions():
    env = gymnasium.make_vec(ID, num_envs=1)
    field = field_of(face_of(env), "test")
    image = np.zeros((1, 2, 4, 4), np.uint8)
    image[0, 0, 1, 2] = 255
    assert float(fractions_of({"image": image}, field)[0, 1, 2]) == pytest.approx(field.image_full_scale)
    env.close()
