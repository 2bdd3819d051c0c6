"""Binomial thinning: what a shorter exposure would have recorded, from counts that were recorded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import special

from stem_gym.core.streams import normal_quantile

Numbers = NDArray[np.float64]


def thin(count: Numbers, share: Numbers, uniform: NDArray[np.float32]) -> Numbers:
    """Each of `count` (n, C) whole counts kept with probability `share` (n,); float64 (n, C).

    Thinning counts of a Poisson law of mean m gives a Poisson law of mean share × m.
    `uniform` (n, C) in (0, 1) decides.
    """
    each = np.broadcast_to(share[:, None], count.shape)
    kept = np.where(each >= 1.0, count, 0.0)
    some = (count > 0.0) & (each > 0.0) & (each < 1.0)
    kept[some] = binomial_quantile(uniform[some].astype(np.float64), count[some], each[some])
    return kept


def binomial_quantile(uniform: Numbers, trials: Numbers, share: Numbers) -> Numbers:
    """The smallest k whose cumulative binomial probability reaches `uniform`; flat arrays, trials > 0, 0 < share < 1.

    Exact up to the rounding of the cumulative probability, which is summed from one regularised incomplete beta
    function; the Cornish-Fisher expansion (Biometrika 5, 1937) tells where to start, and most often is right.
    """
    spread = np.sqrt(trials * share * (1.0 - share))
    normal = normal_quantile(uniform.astype(np.float32), np).astype(np.float64)
    guess = trials * share + spread * normal + (1.0 - 2.0 * share) * (normal**2 - 1.0) / 6.0
    k = np.clip(np.ceil(guess - 0.5), 0.0, trials)
    reached = np.where(k < trials, special.betainc(np.maximum(trials - k, 1.0), k + 1.0, 1.0 - share), 1.0)
    term = np.exp(
        special.gammaln(trials + 1.0)
        - special.gammaln(k + 1.0)
        - special.gammaln(trials - k + 1.0)
        + special.xlogy(k, share)
        + special.xlog1py(trials - k, -share)
    )
    odds = share / (1.0 - share)
    low = np.flatnonzero((reached < uniform) & (k < trials))
    high = np.flatnonzero((reached >= uniform) & (reached - term >= uniform) & (k > 0.0))
    _climb(low, k, reached, term, (uniform, trials, odds))
    _descend(high, k, reached, term, (uniform, trials, odds))
    return np.asarray(k)


def _climb(
    low: NDArray[np.int64], k: Numbers, reached: Numbers, term: Numbers, given: tuple[Numbers, Numbers, Numbers]
) -> None:
    """Raise k at the indices `low`, in place, until the cumulative probability reaches the uniform."""
    uniform, trials, odds = given
    while len(low):
        term[low] *= (trials[low] - k[low]) / (k[low] + 1.0) * odds[low]
        k[low] += 1.0
        reached[low] += term[low]
        low = low[(reached[low] < uniform[low]) & (k[low] < trials[low])]


def _descend(
    high: NDArray[np.int64], k: Numbers, reached: Numbers, term: Numbers, given: tuple[Numbers, Numbers, Numbers]
) -> None:
    """Lower k at the indices `high`, in place, while the one below reaches the uniform as well."""
    uniform, trials, odds = given
    while len(high):
        reached[high] -= term[high]
        term[high] *= k[high] / ((trials[high] - k[high] + 1.0) * odds[high])
        k[high] -= 1.0
        high = high[(reached[high] - term[high] >= uniform[high]) & (k[high] > 0.0)]
