"""Elastic scattering of the beam into the annular detector."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_gym.core.units import BOHR_RADIUS_ANG, ELECTRON_REST_ENERGY_KEV
from stem_gym.simulator.optics import electron_wavelength_ang

# Moliere's fit of the Thomas-Fermi screening function by three exponentials: weights and inverse lengths in units of
# the Thomas-Fermi radius (Moliere, Z. Naturforsch. 2a, 133, 1947).
_MOLIERE_WEIGHTS = (0.10, 0.55, 0.35)
_MOLIERE_DECAYS = (6.0, 1.2, 0.3)
_THOMAS_FERMI = 0.88534  # radius = 0.88534 a0 Z^(-1/3)


def haadf_cross_section_ang2(
    atomic_number: Tensor, energy_kev: Tensor, inner_mrad: Tensor | float, outer_mrad: Tensor | float
) -> Tensor:
    """Elastic cross section in Ang^2 for scattering into an annulus; arguments broadcast; differentiable but in Z.

    First Born approximation with Moliere's screened potential: f(q) = gamma (2 Z / a0) sum_i a_i / (q^2 + b_i^2) with
    q = 2 k sin(theta / 2), so that sigma = (pi / k^2) integral f^2 d(q^2) has a closed form (for one term: Lenz,
    Z. Naturforsch. 9a, 185, 1954).
    """
    charge = torch.as_tensor(atomic_number).to(energy_kev.dtype)
    wavenumber = 2.0 * math.pi / electron_wavelength_ang(energy_kev)
    gamma = 1.0 + energy_kev / ELECTRON_REST_ENERGY_KEV
    lower, upper = (
        (2.0 * wavenumber * torch.sin(0.5e-3 * torch.as_tensor(a, dtype=energy_kev.dtype, device=energy_kev.device)))
        ** 2
        for a in (inner_mrad, outer_mrad)
    )
    radius = _THOMAS_FERMI * BOHR_RADIUS_ANG * charge.clamp(min=1.0) ** (-1.0 / 3.0)
    poles = [(d / radius) ** 2 for d in _MOLIERE_DECAYS]
    total = torch.zeros_like(charge * energy_kev)
    for i, (wi, bi) in enumerate(zip(_MOLIERE_WEIGHTS, poles, strict=True)):
        total = total + wi * wi * (1.0 / (lower + bi) - 1.0 / (upper + bi))
        for wj, bj in zip(_MOLIERE_WEIGHTS[:i], poles[:i], strict=True):
            # Partial fractions of 1 / ((s + bi)(s + bj)).
            ratio = torch.log((upper + bj) * (lower + bi) / ((lower + bj) * (upper + bi)))
            total = total + 2.0 * wi * wj * ratio / (bi - bj)
    amplitude = 2.0 * gamma * charge / BOHR_RADIUS_ANG
    return math.pi / wavenumber**2 * amplitude**2 * total
