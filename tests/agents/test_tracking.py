"""The drift filter against the joint Gaussian solved at once, and its rows against one another."""

from __future__ import annotations

import numpy as np
import pytest

from agents.engine.tracking import UNKNOWN_ANG, DriftPrior, SiteTracker

PRIOR = DriftPrior(speed_ang_per_s=0.3, correlation_s=20.0, diffusion_ang2_per_s=0.003)
STEPS_S = (0.4, 1.1, 0.3, 2.0)
AGES_S = (0.0, 0.2, 0.1, 0.15)
SITES = (0, 1, 0, 1)
PLACES = np.array([[3.0, 4.0], [9.1, 2.2], [3.3, 3.9], [9.5, 1.8]])
SIGMA_ANG = 0.1


def filtered(rows=1, row=0):
    """The filter after the measurements above, in row `row` of `rows`; the other rows see nothing."""
    tracker = SiteTracker(rows, 2, PRIOR)
    tracker.reset(np.arange(rows))
    for dt, age, site, place in zip(STEPS_S, AGES_S, SITES, PLACES, strict=True):
        tracker.advance(np.where(np.arange(rows) == row, dt, 0.7))
        seen = np.arange(rows) == row
        tracker.measure(site, np.full(rows, age), np.tile(place, (rows, 1)), np.full(rows, SIGMA_ANG), seen)
    return tracker


def joint(axis):
    """Mean and covariance of (x1, x2, v) at the end from one linear system: no recursion, no transition product."""
    decay, tau = PRIOR.speed_ang_per_s**2, PRIOR.correlation_s
    start = np.diag([UNKNOWN_ANG**2, UNKNOWN_ANG**2, 0.5 * decay])
    count = len(STEPS_S)
    states = 3 * (count + 1)
    covariance = np.zeros((states, states))
    covariance[:3, :3] = start
    moves = []
    for dt in STEPS_S:
        kept = np.exp(-dt / tau)
        moves.append(np.array([[1, 0, tau * (1 - kept)], [0, 1, tau * (1 - kept)], [0, 0, kept]]))
    for i, (dt, move) in enumerate(zip(STEPS_S, moves, strict=True)):
        old, new = slice(3 * i, 3 * i + 3), slice(3 * i + 3, 3 * i + 6)
        growth = decay / tau
        noise = np.full((3, 3), growth * dt**3 / 3 + 2 * PRIOR.diffusion_ang2_per_s * dt)
        noise[2, :] = noise[:, 2] = growth * dt**2 / 2
        noise[2, 2] = growth * dt
        covariance[new, : 3 * i + 3] = move @ covariance[old, : 3 * i + 3]
        covariance[: 3 * i + 3, new] = covariance[new, : 3 * i + 3].T
        covariance[new, new] = move @ covariance[old, old] @ move.T + noise
    design = np.zeros((count, states))
    for i, (site, age) in enumerate(zip(SITES, AGES_S, strict=True)):
        design[i, 3 * (i + 1) + site], design[i, 3 * (i + 1) + 2] = 1.0, -age
    gain = covariance @ design.T @ np.linalg.inv(design @ covariance @ design.T + SIGMA_ANG**2 * np.eye(count))
    mean, spread = gain @ PLACES[:, axis], covariance - gain @ design @ covariance
    return mean[-3:], spread[-3:, -3:]


@pytest.mark.parametrize("axis", [0, 1])
def test_the_filter_is_the_exact_posterior(axis):
    """Float64 all through; the recursion loses some digits to the vague start of 50 Å."""
    tracker = filtered()
    mean, covariance = joint(axis)
    np.testing.assert_allclose(tracker.mean[0, axis], mean, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(tracker.covariance[0, axis], covariance, rtol=1e-5, atol=1e-8)


def test_rows_are_apart():
    np.testing.assert_allclose(filtered(rows=4, row=2).mean[2], filtered().mean[0], rtol=1e-12)


def test_a_steady_drift_is_found_and_carried_to_sites_that_were_not_seen_again():
    """Site 0 is watched while all move at (0.3, −0.2) Å/s; site 1 was seen once. Sites are measured without error."""
    tracker = SiteTracker(1, 2, PRIOR)
    tracker.reset(np.array([0]))
    start, velocity = np.array([[3.0, 4.0], [10.0, 12.0]]), np.array([0.3, -0.2])
    for step in range(12):
        tracker.advance(np.array([0.0 if step == 0 else 0.5]))
        for site in (0, 1) if step == 0 else (0,):
            place = start[site] + velocity * 0.5 * step
            tracker.measure(site, np.zeros(1), place[None], np.full(1, 0.01), np.ones(1, dtype=bool))
    np.testing.assert_allclose(tracker.mean[0, :, -1], velocity, atol=0.03)  # diffusion of 0.08 Å in 1 s is expected
    np.testing.assert_allclose(tracker.mean[0, :, 1], start[1] + velocity * 5.5, atol=0.02)
    place, sigma = tracker.predict(np.array([1]), np.array([1.0]))
    np.testing.assert_allclose(place[0], start[1] + velocity * 6.5, atol=0.05)
    assert 0.01 < sigma[0] < 0.2
    assert tracker.speed_ang_per_s[0] == pytest.approx(np.hypot(0.3, 0.2), abs=0.03)


def test_doubt_widens_all_sites_together():
    tracker = filtered()
    before = tracker.covariance.copy()
    tracker.doubt(np.array([0.5]))
    grown = tracker.covariance - before
    np.testing.assert_allclose(grown[0, :, :2, :2], 0.25)
    np.testing.assert_allclose(grown[0, :, 2], 0.0)
