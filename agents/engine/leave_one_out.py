"""What every measurement would have been taken for without itself: to calibrate deviations and to find what is wrong.

Closed forms of Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, section 5.4.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BELONGS = 4.0  # deviations; what is farther off gets more noise
_NORMAL_50, _NORMAL_90 = 0.6744898, 1.6448536
_PRIOR_POINTS = 4.0  # so many measurements' worth of belief in the model's own deviations
_NARROWEST, _NARROWEST_HERE, _WIDEST = 0.5, 0.1, 4.0  # factors of a whole field, and of like places
_NEAR = 0.5  # of the deviation of all predicted values
# Points' worth outside of a sample, at either end, besides half a point: none for its own quantile (type 7 of Hyndman
# and Fan, Am. Stat. 50, 361, 1996); for that of what it was drawn from, in the median of samples (nearly; type 8).
_OF_A_SAMPLE, _OF_ITS_SOURCE = -0.5, 1.0 / 6.0
_LOG_VARIANCE = 0.7818  # of the logarithm of that quantile of normal |z|, of one point: 0.9 · 0.1 / (density · 1.64)²
_NOTHING = 1e-30
_CHUNK = 512  # places at once
_LEAST_LEFT = 0.25  # of a mean square, however much the members disagree


def residuals(inverse: Tensor, weight: Tensor, fold: Tensor, members: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Measured minus predicted without it: by one member, its variance, the variance between members, by their mean.

    (n, N) each. The member is `fold` (n, N), its variance is that of the prediction with noise. `inverse` (n*E, N, N)
    of the covariance, `weight` (n*E, N) = inverse · values.
    """
    precision = inverse.diagonal(dim1=1, dim2=2)
    shape = (len(fold), members, -1)
    chosen = fold[:, None] % members
    every = (weight / precision).view(shape)
    variance = (1.0 / precision).view(shape).gather(1, chosen)[:, 0]
    return every.gather(1, chosen)[:, 0], variance, every.var(dim=1, correction=0), every.mean(dim=1)


def of_the_mean(residual: Tensor, apart: Tensor, counts: Tensor) -> Tensor:
    """Residuals (n, N) of the members' mean, from those of one member each and the variance `apart` between them.

    The mean errs less than its members do, by as much as they disagree: the mean square of its error is theirs less
    their variance (Krogh and Vedelsby, NeurIPS 1995). Only measurements that `counts` (n, N) are looked at.
    """
    square, between = ((x * counts).sum(dim=1, keepdim=True) for x in (residual.square(), apart))
    return residual * (1.0 - between / square.clamp(min=1e-30)).clamp(min=_LEAST_LEFT).sqrt()


def extra_noise(residual: Tensor, variance: Tensor, valid: Tensor) -> Tensor:
    """Noise variance (n, N) to add to measurements that are too many deviations off; the more, the less they count.

    Beyond a few deviations the noise grows with the fourth power: a little off keeps its say, a spike has none.
    Where the model errs more than it thinks everywhere, the median error is the measure, so that few are thought wrong.
    """
    z = torch.where(valid, residual / variance.sqrt(), torch.nan)
    usual = (z.abs().nanmedian(dim=1, keepdim=True).values / _NORMAL_50).nan_to_num(1.0).clamp(min=1.0)
    beyond = (z / (_BELONGS * usual)) ** 4 - 1.0
    return torch.where(valid, (variance * beyond).clamp(min=0.0), 0.0)


def calibration(z: Tensor, weight: Tensor) -> Tensor:
    """Factors (n, K) by which deviations are multiplied so that 90 % of |z| (n, N) are within 1.64 of them.

    `weight` (n, K, N) is how much each measurement counts for each factor, from 0, as in padding, to 1. Where few
    count, they count less than the model's own deviations. It is the sample's own quantile, without the correction
    below, so that searches, which decide by it, do not change.
    """
    quantile, count = _quantile(z, weight, _OF_A_SAMPLE)
    told = (quantile / _NORMAL_90).clamp(_NARROWEST, _WIDEST).log()
    return (told * (count / (count + _PRIOR_POINTS))).exp()


def calibration_by_value(z: Tensor, valid: Tensor, at: Tensor, value: Tensor, fair_sample: bool = True) -> Tensor:
    """Factors (n, C) for places where `value` (n, C) is predicted, from |z| (n, N) where `at` (n, N) was.

    Noise follows the signal, and where much is expected more was measured than elsewhere; so a measurement counts the
    more, the nearer its prediction is (localised conformal prediction: Guan, Biometrika 110, 33, 2023). `at` is what
    was predicted without the measurement, as `value` is: a measurement draws the prediction to itself.

    What like places tell stands against what the whole field tells, and how much of it is believed follows from the
    field: the more the factors of places differ beyond chance, the less a place is taken for any other (empirical
    Bayes; Efron and Morris, J. Am. Stat. Assoc. 70, 311, 1975). Where measurements are no fair sample of what they
    would tell elsewhere, what like places tell stands against the model's own deviations.
    """
    whole, count = _log_factor(z, valid[:, None].to(z.dtype), fair_sample)
    whole = whole * (count / (count + _PRIOR_POINTS)) * fair_sample
    width = (_NEAR * value.std(dim=1, keepdim=True)).clamp(min=1e-6)[..., None]
    parts = []
    for some in value.split(_CHUNK, dim=1):
        away = (some[..., None] - at[:, None]) / width
        weight = away.square_().mul_(-0.5).exp_().add_(1e-6) * valid[:, None]
        parts.append(_log_factor(z, weight, fair_sample))
    like, counts = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    apart, chance = like - whole, _LOG_VARIANCE / counts
    differ = (apart.square() - chance).mean(dim=1, keepdim=True).clamp(min=0.0)
    return (whole + apart * (differ / (differ + chance))).exp()


def _log_factor(z: Tensor, weight: Tensor, fair_sample: bool) -> tuple[Tensor, Tensor]:
    """Logarithm of what |z| comes from over a normal deviate, and how many measurements that is worth; (n, K) each.

    Half of all fair samples tell more and half tell less (type 8 of Hyndman and Fan). Fewer than seven do not reach as
    far as the quantile that is wanted: their largest stands for it, and is divided by the median of the largest, below
    which a normal |z| is with a chance of 2^(−1/count), instead of by the quantile. Not so of a sample that is unfair:
    its surprises only widen, and few of them would by chance.
    """
    quantile, count = _quantile(z, weight, _OF_ITS_SOURCE)
    normal = torch.full_like(count, _NORMAL_90)
    if fair_sample:
        normal = (math.sqrt(2.0) * torch.erfinv(0.5 ** (1.0 / count.clamp(min=1.0)))).minimum(normal)
    return (quantile / normal).clamp(_NARROWEST_HERE, _WIDEST).log(), count


def _quantile(z: Tensor, weight: Tensor, beyond: float) -> tuple[Tensor, Tensor]:
    """The weighted 90 % quantile of |z|, and how many measurements that is worth; (n, K) each.

    As many as would tell a mean as surely with even weights (Kish, Survey Sampling, 1965). `beyond` is `_OF_A_SAMPLE`
    (type 7) or `_OF_ITS_SOURCE` (type 8).
    """
    used = (weight > 0).any(dim=1)
    order = torch.where(used, z.abs(), math.inf).argsort(dim=1)
    size = torch.where(used, z.abs(), 0.0).gather(1, order).to(weight.dtype)
    weight = weight.gather(2, order[:, None].expand_as(weight))
    total = weight.sum(dim=2, keepdim=True)
    point = weight.square().sum(dim=2, keepdim=True) / total.clamp(min=_NOTHING)  # the weight of one that counts
    middle = weight.cumsum(dim=2).sub_(weight, alpha=0.5)  # of each measurement's share
    wanted = 0.9 * (total + 2.0 * beyond * point) - beyond * point
    last = (used.sum(dim=1) - 1).clamp(min=0)[:, None, None].expand(-1, weight.shape[1], 1)
    low = (middle <= wanted).sum(dim=2, keepdim=True).sub_(1).clamp_(min=0).minimum(last)
    high = (low + 1).minimum(last)
    before, after = middle.gather(2, low), middle.gather(2, high)
    share = ((wanted - before) / (after - before).clamp(min=1e-12)).clamp(0.0, 1.0)[..., 0]
    quantile = torch.lerp(size.gather(1, low[..., 0]), size.gather(1, high[..., 0]), share)
    return quantile, (total / point.clamp(min=_NOTHING))[..., 0]
