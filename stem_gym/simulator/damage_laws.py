"""Rival laws of beam damage: ln of the rate against beam energy, temperature and dose rate.

Every law goes through `ln_reference` at 80 keV, 300 K and 1e4 e/Å²/s, so that only how the rate depends on the three
controls tells them apart, not how large it is. None falls below the rate at which things change without the beam, an
assumption that keeps what can not be seen from telling. The axes are `energy_kev`, `temperature_k` and
`dose_rate_e_ang2_s`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from stem_gym.core.units import ELECTRON_REST_ENERGY_KEV
from stem_gym.simulator.damage import ISOTOPE_MASS_U, displacement_cross_section

ENERGY_KEV, TEMPERATURE_K, DOSE_RATE_E_ANG2_S = 80.0, 300.0, 1e4  # where the reference is
BOLTZMANN_EV_K = 8.617333262e-5
LN_LEAST_RATE_PER_S = math.log(1e-6)

# Carbon of graphene at 300 K: mean square velocity along the beam, Susi et al., Nat. Commun. 7, 13040 (2016). At other
# temperatures it is that of an oscillator of the Debye temperature that gives it, 1287 K out of plane (Tewary and Yang,
# Phys. Rev. B 79, 125416, 2009).
_VARIANCE_300_M2_S2 = 3.17e5
_DEBYE_K = 1287.0
_ENERGIES_KEV = (40.0, 320.0, 57)  # ends and number of the table's knots, even in the logarithm
_THRESHOLDS_EV = (8.0, 32.0, 49)
_TEMPERATURES_K = (50.0, 1050.0, 11)


def knock_on(axes: Mapping[str, Tensor], *, ln_reference: Tensor, threshold_ev: Tensor) -> Tensor:
    """∝ σ(E, T) · j: the cross section of `damage.displacement_cross_section` for carbon, with its thermal motion."""
    there = _ln_cross_section(axes["energy_kev"], threshold_ev, axes["temperature_k"])
    reference = torch.full_like(threshold_ev, ENERGY_KEV), torch.full_like(threshold_ev, TEMPERATURE_K)
    here = _ln_cross_section(reference[0], threshold_ev, reference[1])
    return _seen(ln_reference + there - here + _ln_dose_rate(axes))


def radiolysis(axes: Mapping[str, Tensor], *, ln_reference: Tensor, ionisation_ev: Tensor) -> Tensor:
    """∝ [ln(2 m c² β² γ² / I) − β²] / β² · j: Bethe's cross section of excitations, without a threshold."""
    return _seen(ln_reference + _excitation(axes["energy_kev"], ionisation_ev) + _ln_dose_rate(axes))


def heating(axes: Mapping[str, Tensor], *, ln_reference: Tensor, activation_ev: Tensor, heating_k: Tensor) -> Tensor:
    """Arrhenius at T + ΔT; ΔT ∝ j times the stopping of the beam, `heating_k` at the reference."""
    stopping = torch.exp(_excitation(axes["energy_kev"], torch.full_like(heating_k, 80.0)))
    hot_k = axes["temperature_k"] + heating_k * stopping * torch.exp(_ln_dose_rate(axes))
    reference_k = TEMPERATURE_K + heating_k
    return _seen(ln_reference + activation_ev / BOLTZMANN_EV_K * (1.0 / reference_k - 1.0 / hot_k))


def dose_rate(axes: Mapping[str, Tensor], *, ln_reference: Tensor, order: Tensor, ionisation_ev: Tensor) -> Tensor:
    """∝ (excitations · j)^order: damage that takes more than one electron within the life of an excitation."""
    return _seen(ln_reference + order * (_excitation(axes["energy_kev"], ionisation_ev) + _ln_dose_rate(axes)))


LAWS = {one.__name__: one for one in (knock_on, radiolysis, heating, dose_rate)}


def _seen(ln_rate: Tensor) -> Tensor:
    """With what changes without the beam."""
    return torch.logaddexp(ln_rate, torch.full_like(ln_rate, LN_LEAST_RATE_PER_S))


def _ln_dose_rate(axes: Mapping[str, Tensor]) -> Tensor:
    return (axes["dose_rate_e_ang2_s"] / DOSE_RATE_E_ANG2_S).log()


def _excitation(energy_kev: Tensor, ionisation_ev: Tensor) -> Tensor:
    """Logarithm of the excitation cross section over that at the reference energy."""
    return (_bethe(energy_kev, ionisation_ev) / _bethe(torch.full_like(ionisation_ev, ENERGY_KEV), ionisation_ev)).log()


def _bethe(energy_kev: Tensor, ionisation_ev: Tensor) -> Tensor:
    gamma = 1.0 + energy_kev / ELECTRON_REST_ENERGY_KEV
    beta2 = 1.0 - 1.0 / gamma.square()
    log = (2e3 * ELECTRON_REST_ENERGY_KEV * beta2 * gamma.square() / ionisation_ev).log()
    return (log - beta2) / beta2


def variance_m2_s2(temperature_k: Tensor) -> Tensor:
    """Mean square velocity of a carbon atom along the beam, of an oscillator at a temperature."""

    def coth(at: Tensor) -> Tensor:
        return 1.0 / torch.tanh(_DEBYE_K / 2.0 / at)

    return _VARIANCE_300_M2_S2 * coth(temperature_k) / coth(torch.full_like(temperature_k, 300.0))


@functools.cache
def _table() -> Tensor:
    """ln σ (energies, thresholds, temperatures); made once, in a second."""
    low, high, count = _ENERGIES_KEV
    energy = torch.exp(torch.linspace(math.log(low), math.log(high), count, dtype=torch.float64))
    threshold, temperature = (
        torch.linspace(low, high, count, dtype=torch.float64) for low, high, count in (_THRESHOLDS_EV, _TEMPERATURES_K)
    )
    barn = displacement_cross_section(
        energy[:, None, None], 6, ISOTOPE_MASS_U["12C"], threshold[:, None], variance_m2_s2(temperature)
    )
    return barn.clamp(min=1e-40).log().float()


def _ln_cross_section(energy_kev: Tensor, threshold_ev: Tensor, temperature_k: Tensor) -> Tensor:
    """ln σ by interpolation in the table, linear along its three axes; beyond its ends it goes on straight."""
    table = _table()
    energy, threshold, temperature = torch.broadcast_tensors(
        _at(energy_kev.log(), tuple(math.log(end) for end in _ENERGIES_KEV[:2]), _ENERGIES_KEV[2]),
        _at(threshold_ev, _THRESHOLDS_EV[:2], _THRESHOLDS_EV[2]),
        _at(temperature_k, _TEMPERATURES_K[:2], _TEMPERATURES_K[2]),
    )
    places = (energy, threshold, temperature)
    first = [place.detach().long().clamp(0, size - 2) for place, size in zip(places, table.shape, strict=True)]
    part = [place - index for place, index in zip(places, first, strict=True)]
    flat, strides = table.flatten(), table.stride()
    base = first[0] * strides[0] + first[1] * strides[1] + first[2]

    def along_temperature(offset: int) -> Tensor:
        low = flat[base + offset]
        return low + part[2] * (flat[base + offset + 1] - low)

    def along_threshold(offset: int) -> Tensor:
        low = along_temperature(offset)
        return low + part[1] * (along_temperature(offset + strides[1]) - low)

    low = along_threshold(0)
    return low + part[0] * (along_threshold(strides[0]) - low)


def _at(value: Tensor, span: tuple[float, ...], count: int) -> Tensor:
    """The place of a value between the knots of a table, from 0 to count − 1."""
    return (value - span[0]) * ((count - 1) / (span[1] - span[0]))
