"""Binomial thinning against scipy's quantile, its moments, and its ends."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from stem_gym.simulator.thinning import binomial_quantile, thin


@pytest.mark.parametrize(
    ("most", "share"), [(3, 0.5), (60, 0.02), (60, 0.97), (2000, 0.3), (60000, 0.5), (60000, 1e-4)]
)
def test_the_quantile_is_that_of_scipy(most, share):
    rng = np.random.default_rng(5)
    trials = rng.integers(1, most + 1, 4000).astype(float)
    # The grid of the streams' uniforms, with both of its ends: no rounding of scipy's lies on it.
    uniform = (rng.integers(0, 2**23, 4000) + 0.5) / 2**23
    uniform[:2] = 0.5 / 2**23, (2**23 - 0.5) / 2**23
    found = binomial_quantile(uniform, trials, np.full(4000, share))
    np.testing.assert_array_equal(found, stats.binom.ppf(uniform, trials, share))


def test_the_moments_are_those_of_the_binomial_law():
    rng = np.random.default_rng(7)
    rows, count = 4000, np.array([0.0, 1.0, 12.0, 400.0, 9000.0])
    uniform = rng.random((rows, 5), dtype=np.float32).clip(1e-7, 1 - 1e-7)
    kept = thin(np.tile(count, (rows, 1)), np.full(rows, 0.3), uniform)
    error = np.sqrt(0.3 * 0.7 * count / rows)
    assert (np.abs(kept.mean(0) - 0.3 * count) <= 5.0 * error).all()  # five standard errors
    # The standard error of a variance is √(2/rows) of it, more where counts are few: 2.2 %, five of them.
    np.testing.assert_allclose(kept.var(0)[1:], 0.21 * count[1:], rtol=0.12)
    assert (kept == np.round(kept)).all() and (kept >= 0).all() and (kept <= count).all()


def test_all_or_nothing_is_kept_where_the_share_says_so():
    count, uniform = np.array([[5.0, 0.0], [7.0, 2.0]]), np.full((2, 2), 0.5, dtype=np.float32)
    np.testing.assert_array_equal(thin(count, np.array([1.0, 0.0]), uniform), [[5.0, 0.0], [0.0, 0.0]])
