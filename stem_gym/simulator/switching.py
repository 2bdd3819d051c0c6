"""Laws of the size of a ferroelectric domain after a pulse of bias V and length τ.

The four laws of Y. Liu et al., arXiv 2202.01089, made usable: no domain below the critical bias of the first two, and
of the wall that creeps with the logarithm of time ln(1 + τ/τ0), since log τ is negative below a second. Further down
are families that none of the four describes, for agents that must notice it.

The axes are `bias_v` and `time_s`. Powers are taken of logarithms, which vectorises, and where a law begins at a
threshold the argument is kept off zero, so that the branch that is not taken has a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_LEAST = 1e-6  # of an argument that a root is taken of: r then differs by 1 % of r0 at most
_LEAST_INPUT, _LOG_OF_NONE = 1e-30, -1e4  # of a bias or a time; its logarithm below, of which any power is none
_LARGEST_LOG = 60.0  # of a factor; beyond, single precision overflows


def thermodynamic_1(axes: Mapping[str, Tensor], *, r_cr_nm: Tensor, r0_nm: Tensor, vc_v: Tensor) -> Tensor:
    """r_cr + r0 · √((V/Vc)^(2/3) − 1) above Vc, else 0."""
    over = _power(axes["bias_v"], 2.0 / 3.0) * _power(vc_v, -2.0 / 3.0) - 1.0
    return _above(over, r_cr_nm + r0_nm * torch.sqrt(over.clamp(min=_LEAST)))


def thermodynamic_2(axes: Mapping[str, Tensor], *, r_cr_nm: Tensor, r0_nm: Tensor, vc_v: Tensor) -> Tensor:
    """r_cr + r0 · ∛((V/Vc)² − 1) above Vc, else 0."""
    over = axes["bias_v"].square() * vc_v.square().reciprocal() - 1.0
    return _above(over, r_cr_nm + r0_nm * torch.exp(over.clamp(min=_LEAST).log() / 3.0))


def wall_pinning(axes: Mapping[str, Tensor], *, a_nm: Tensor, alpha: Tensor, tau0_s: Tensor) -> Tensor:
    """A · V^α · ln(1 + τ/τ0)."""
    return a_nm * _power(axes["bias_v"], alpha) * torch.log1p(axes["time_s"] / tau0_s)


def charge_injection(axes: Mapping[str, Tensor], *, a_nm: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """A · V^α · τ^β."""
    return a_nm * _exp(alpha * _log(axes["bias_v"]) + beta * _log(axes["time_s"]))


def creep(axes: Mapping[str, Tensor], *, r0_nm: Tensor, v0_v: Tensor, mu: Tensor, beta: Tensor) -> Tensor:
    """r0 · exp(−(V0/V)^μ) · (1 + τ)^β: a wall creeps through disorder (Tybell et al., PRL 89, 097601, 2002)."""
    barrier = _exp(mu * (_log(v0_v) - _log(axes["bias_v"])))
    return r0_nm * _exp(beta * torch.log1p(axes["time_s"]) - barrier)


def hybrid(axes: Mapping[str, Tensor], *, r_cr_nm: Tensor, r0_nm: Tensor, vc_v: Tensor, beta: Tensor) -> Tensor:
    """The second thermodynamic law times τ^β: it starts at a threshold, and spreads."""
    return thermodynamic_2(axes, r_cr_nm=r_cr_nm, r0_nm=r0_nm, vc_v=vc_v) * _power(axes["time_s"], beta)


def saturating(axes: Mapping[str, Tensor], *, r_max_nm: Tensor, v0_v: Tensor, tau0_s: Tensor) -> Tensor:
    """r_max · (1 − exp(−(V/V0)²)) · τ / (τ + τ0): a domain that fills what there is."""
    time_s = axes["time_s"]
    return -r_max_nm * torch.expm1(-(axes["bias_v"] / v0_v).square()) * (time_s / (time_s + tau0_s))


LAWS = {
    one.__name__: one
    for one in (thermodynamic_1, thermodynamic_2, wall_pinning, charge_injection, creep, hybrid, saturating)
}


def _log(value: Tensor) -> Tensor:
    """Logarithm of what is not negative, finite also of none."""
    return torch.where(value >= _LEAST_INPUT, value.clamp(min=_LEAST_INPUT).log(), _LOG_OF_NONE)


def _exp(exponent: Tensor) -> Tensor:
    return torch.exp(exponent.clamp(max=_LARGEST_LOG))


def _power(base: Tensor, exponent: Tensor | float) -> Tensor:
    """base^exponent of a base that is not negative."""
    return _exp(exponent * _log(base))


def _above(over: Tensor, size: Tensor) -> Tensor:
    return torch.where(over > 0.0, size, 0.0)
