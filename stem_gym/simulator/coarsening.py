"""Laws of the mean size of particles that coarsen at a temperature for a time.

rⁿ − r0ⁿ = K · t with K = K_ref · exp(−Q/k · (1/T − 1/T_ref)): n = 2 where the step into the lattice limits (Wagner,
Z. Elektrochem. 65, 581, 1961), 3 where diffusion through the volume does (Lifshitz and Slyozov, J. Phys. Chem. Solids
19, 35, 1961), 4 along grain boundaries or surfaces (Speight, Acta Metall. 16, 133, 1968), 7 where particles migrate as
a whole. A rate constant means something else for each n, so a law is told the size that it reaches in an hour at 600 K,
in units of the first. Or growth stops at a size. The axes are `temperature_k` and `time_s`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stem_gym.simulator.damage_laws import BOLTZMANN_EV_K

TEMPERATURE_K, TIME_S = 600.0, 3600.0  # of the reference
_LARGEST_LOG = 60.0  # of a growth; beyond, single precision overflows


def _power_law(n: int) -> Callable[..., Tensor]:
    def coarsening(axes: Mapping[str, Tensor], *, r0_nm: Tensor, growth: Tensor, activation_ev: Tensor) -> Tensor:
        """(r0ⁿ + K · t)^(1/n)."""
        whole = 1.0 + (torch.exp(n * growth.log()) - 1.0) * torch.exp(_ln_advance(axes, activation_ev))
        return r0_nm * torch.exp(whole.log() / n)

    return coarsening


def stagnation(
    axes: Mapping[str, Tensor], *, r0_nm: Tensor, growth: Tensor, activation_ev: Tensor, part: Tensor
) -> Tensor:
    """r0 + (r_end − r0) · (1 − exp(−k · t)); of the way to the end, `part` is done in an hour at 600 K."""
    done = -torch.expm1(torch.log1p(-part) * torch.exp(_ln_advance(axes, activation_ev)))
    return r0_nm * (1.0 + (growth - 1.0) * done)


LAWS = {**{f"coarsening_{n}": _power_law(n) for n in (2, 3, 4, 7)}, "stagnation": stagnation}


def _ln_advance(axes: Mapping[str, Tensor], activation_ev: Tensor) -> Tensor:
    """Logarithm of how far a thermally activated process is, in units of an hour at the reference temperature."""
    arrhenius = activation_ev / BOLTZMANN_EV_K * (1.0 / TEMPERATURE_K - 1.0 / axes["temperature_k"])
    return (arrhenius + (axes["time_s"] / TIME_S).log()).clamp(max=_LARGEST_LOG)
