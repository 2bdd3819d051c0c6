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
_CHUNK = 512  # places at once
_LEAST_LEFT = 0.25  # of a mean square, however much the members disagree


def residuals(inverse: Tensor, weight: Tensor, fold: Tensor, members: int) -> tuple[Tensor, Tensor, Tensor]:
    """Measured minus predicted without it, that prediction's variance with noise, and how far the members are apart.

    (n, N) each; the first two of the member `fold` (n, N), the last as a variance over all. `inverse` (n*E, N, N) of
    the covariance, `weight` (n*E, N) = inverse · values.
    """
    precision = inverse.diagonal(dim1=1, dim2=2)
    shape = (len(fold), members, -1)
    chosen = fold[:, None] % members
    every = (weight / precision).view(shape)
    variance = (1.0 / precision).view(shape).gather(1, chosen)[:, 0]
    return every.gather(1, chosen)[:, 0], variance, every.var(dim=1, correction=0)


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


def calibration(z: Tensor, weight: Tensor, narrowest: float = _NARROWEST) -> Tensor:
    """Factors (n, K) by which deviations are multiplied so that 90 % of |z| (n, N) are within 1.64 of them.

    `weight` (n, K, N) is how much each measurement counts for each factor, from 0, as in padding, to 1. Where few
    count, they count less than the model's own deviations.
    """
    used = (weight > 0).any(dim=1)
    order = torch.where(used, z.abs(), math.inf).argsort(dim=1)
    size = torch.where(used, z.abs(), 0.0).gather(1, order).to(weight.dtype)
    weight = weight.gather(2, order[:, None].expand_as(weight))
    middle = weight.cumsum(dim=2).sub_(weight, alpha=0.5)  # of each measurement's share
    last = (used.sum(dim=1) - 1).clamp(min=0)[:, None, None].expand(-1, weight.shape[1], 1)
    wanted = torch.lerp(middle[..., :1], middle.gather(2, last), 0.9)
    low = (middle <= wanted).sum(dim=2, keepdim=True).sub_(1).clamp_(min=0).minimum(last)
    high = (low + 1).minimum(last)
    before, after = middle.gather(2, low), middle.gather(2, high)
    share = ((wanted - before) / (after - before).clamp(min=1e-12)).clamp(0.0, 1.0)[..., 0]
    quantile = torch.lerp(size.gather(1, low[..., 0]), size.gather(1, high[..., 0]), share)
    scale = (quantile / _NORMAL_90).clamp(narrowest, _WIDEST)
    count = weight.sum(dim=2)
    return (scale.log() * (count / (count + _PRIOR_POINTS))).exp()


def calibration_by_value(z: Tensor, valid: Tensor, at: Tensor, value: Tensor) -> Tensor:
    """Factors (n, C) for places where `value` (n, C) is predicted, from |z| (n, N) where `at` (n, N) was.

    Noise follows the signal, and where much is expected more was measured than elsewhere; so a measurement counts the
    more, the nearer its value is (localised conformal prediction: Guan, Biometrika 110, 33, 2023).
    """
    width = (_NEAR * value.std(dim=1, keepdim=True)).clamp(min=1e-6)[..., None]
    factors = []
    for some in value.split(_CHUNK, dim=1):
        away = (some[..., None] - at[:, None]) / width
        weight = away.square_().mul_(-0.5).exp_().add_(1e-6) * valid[:, None]
        factors.append(calibration(z, weight, _NARROWEST_HERE))
    return torch.cat(factors, dim=1)
