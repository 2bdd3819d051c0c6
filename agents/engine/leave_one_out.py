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
_NARROWEST, _WIDEST = 0.5, 4.0


def residuals(inverse: Tensor, weight: Tensor, fold: Tensor, members: int) -> tuple[Tensor, Tensor]:
    """Measured minus predicted without it, and that prediction's variance with noise, (n, N) each.

    `inverse` (n*E, N, N) of the covariance, `weight` (n*E, N) = inverse · values, `fold` (n, N) the member to ask.
    """
    precision = inverse.diagonal(dim1=1, dim2=2)
    shape = (len(fold), members, -1)
    chosen = fold[:, None] % members
    residual = (weight / precision).view(shape).gather(1, chosen)[:, 0]
    return residual, (1.0 / precision).view(shape).gather(1, chosen)[:, 0]


def extra_noise(residual: Tensor, variance: Tensor, valid: Tensor) -> Tensor:
    """Noise variance (n, N) to add to measurements that are too many deviations off; the more, the less they count.

    Beyond a few deviations the noise grows with the fourth power: a little off keeps its say, a spike has none.
    Where the model errs more than it thinks everywhere, the median error is the measure, so that few are thought wrong.
    """
    z = torch.where(valid, residual / variance.sqrt(), torch.nan)
    usual = (z.abs().nanmedian(dim=1, keepdim=True).values / _NORMAL_50).nan_to_num(1.0).clamp(min=1.0)
    beyond = (z / (_BELONGS * usual)) ** 4 - 1.0
    return torch.where(valid, (variance * beyond).clamp(min=0.0), 0.0)


def calibration(z: Tensor, valid: Tensor) -> Tensor:
    """The factor (n,) by which deviations are multiplied so that 90 % of |z| (n, N) are within 1.64 of them.

    The few first measurements count less than the model's own deviations.
    """
    count = valid.sum(dim=1)
    size = torch.where(valid, z.abs(), math.inf).sort(dim=1).values
    rank = 0.9 * (count - 1).clamp(min=0).double()
    low = rank.floor().long()[:, None]
    high = (low + 1).minimum((count - 1).clamp(min=0)[:, None])
    share = (rank - rank.floor())[:, None]
    quantile = torch.lerp(size.gather(1, low), size.gather(1, high), share.to(size.dtype))[:, 0]
    quantile = torch.where(count > 0, quantile, _NORMAL_90)
    scale = (quantile / _NORMAL_90).clamp(_NARROWEST, _WIDEST)
    return (scale.log() * (count / (count + _PRIOR_POINTS))).exp()
