"""Knock-on damage: what the beam's electrons give to a nucleus, and how often they give more than a threshold.

An electron of kinetic energy E (rest energy m c²) that is turned back by a nucleus of mass M leaves it the energy

    Tmax(v) = (r + t)² / 2M,   r = sqrt(E (E + 2 m c²)) / c + M v,
                               t = sqrt((E + En) (E + 2 m c² + En)) / c,   En = M v² / 2,

where v is the speed at which the nucleus already moved along the beam (Susi et al., Nat. Commun. 7, 13040, 2016); at
rest this is 2 E (E + 2 m c²) / M c². How often the nucleus takes a transfer T is McKinley and Feshbach's expansion of
Mott's cross section (Phys. Rev. 74, 1759, 1948), good to about Z = 28. Its integral above a threshold has a closed form
(Zobelli et al., Phys. Rev. B 75, 245402, 2007), which lattice vibrations average over the Gaussian of v.

Every argument is a number or a tensor; they broadcast. Inside all is float64, because the tails span many decades;
results have the dtype of the floating tensors given (torch's default where there is none). Everything is
differentiable, except along the atomic number. What has no physical meaning is refused with a ConfigError.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from stem_gym.core.errors import ConfigError
from stem_gym.core.units import (
    ANG2_PER_BARN,
    ATOMIC_MASS_EV,
    BOHR_RADIUS_ANG,
    ELECTRON_REST_ENERGY_KEV,
    FINE_STRUCTURE,
    SPEED_OF_LIGHT_M_S,
)
from stem_gym.simulator.quadrature import gauss_legendre

ISOTOPE_MASS_U = {
    # Single isotopes: Wang et al., Chinese Phys. C 45, 030003 (2021).
    "12C": 12.0,
    "13C": 13.003355,
    "14N": 14.003074,
    "27Al": 26.981538,
    "28Si": 27.976927,
    "31P": 30.973762,
    # Natural mixtures: IUPAC's abridged standard atomic weights. Near a threshold the mean mass is not the mean of the
    # isotopes' cross sections; use those where it matters.
    "C": 12.011,
    "Si": 28.085,
}
"""Masses of nuclei that the beam may move, in u, by isotope or by element for its natural mixture."""

HIGHEST_ATOMIC_NUMBER = 28  # beyond it McKinley and Feshbach's expansion in Z / 137 is no longer good

_REST_ENERGY_EV = 1e3 * ELECTRON_REST_ENERGY_KEV
_PI_RADIUS2_BARN = math.pi * (FINE_STRUCTURE**2 * BOHR_RADIUS_ANG) ** 2 / ANG2_PER_BARN  # of the classical electron

# The average over v runs from the threshold (but no further than this below the mean) to where the Gaussian has fallen
# by exp(-28) more, so that the nodes lie where the integrand does, however far out in the tail that is.
_REACH_SIGMA = 7.5
_VELOCITY_NODES = 24  # holds 1e-6 of the value, everywhere that the tests look
# A standstill is 1 mm/s rms: below what any threshold notices, and the derivative along the variance exists.
_STANDSTILL_M2_S2 = 1e-6

_RULES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "energy_kev": (lambda x: x > 0, "positive"),
    "mass_u": (lambda x: x > 0, "positive"),
    "threshold_ev": (lambda x: x > 0, "positive"),
    "lowest_ev": (lambda x: x > 0, "positive"),
    "transfer_ev": (lambda x: x > 0, "positive"),
    "largest_ev": (lambda x: x > 0, "positive"),
    "velocity_variance_m2_s2": (lambda x: x >= 0, "zero or positive"),
    "speed_m_s": (lambda x: x.abs() < SPEED_OF_LIGHT_M_S, "below the speed of light"),
    "atomic_number": (
        lambda x: (x >= 1) & (x <= HIGHEST_ATOMIC_NUMBER) & (x == x.round()),
        f"a whole number from 1 to {HIGHEST_ATOMIC_NUMBER}, where the cross section of McKinley and Feshbach is good",
    ),
}


@dataclass(frozen=True)
class RecoilSpectrum:
    """Recoils to sum over: sum(cross_section_barn * P) is the integral of dσ/dT P, for any smooth P of the recoil.

    The leading dimensions are those that the arguments broadcast to; N runs over the recoils.
    """

    transfer_ev: Tensor  # (..., N) energy of the struck nucleus
    largest_ev: Tensor  # (..., N) the most that it could have been given; with transfer_ev it sets the direction
    cross_section_barn: Tensor  # (..., N) share of the cross section; zero where the transfer is impossible


def largest_transfer_ev(energy_kev: Tensor | float, mass_u: Tensor | float, speed_m_s: Tensor | float = 0.0) -> Tensor:
    """Most energy in eV that a nucleus can have after one electron; `speed_m_s` is its speed along the beam before.

    Zero where the nucleus flees against the beam so fast that not even backscattering stops it.
    """
    (energy, mass, speed), dtype = _checked(energy_kev=energy_kev, mass_u=mass_u, speed_m_s=speed_m_s)
    return _largest_transfer(1e3 * energy, ATOMIC_MASS_EV * mass, speed).to(dtype)


def differential_cross_section(
    transfer_ev: Tensor | float,
    energy_kev: Tensor | float,
    atomic_number: Tensor | int,
    mass_u: Tensor | float,
    speed_m_s: Tensor | float = 0.0,
) -> Tensor:
    """dσ/dT in barn per eV at the transfer T; zero above the largest transfer.

    π (Z rₑ)² (1 − β²) / β⁴ · Tmax / T² · [1 − β² T/Tmax + π α β (sqrt(T/Tmax) − T/Tmax)] with α = Z / 137
    (McKinley and Feshbach, Phys. Rev. 74, 1759, 1948).
    """
    (transfer, energy, charge, mass, speed), dtype = _checked(
        transfer_ev=transfer_ev,
        energy_kev=energy_kev,
        atomic_number=atomic_number,
        mass_u=mass_u,
        speed_m_s=speed_m_s,
    )
    largest = _largest_transfer(1e3 * energy, ATOMIC_MASS_EV * mass, speed)
    # Kept off zero, so that the branch which is not taken has a gradient.
    density = _scaled_density(transfer, largest.clamp(min=1e-30), 1e3 * energy, charge) / (transfer * transfer)
    return torch.where(transfer <= largest, density, torch.zeros_like(density)).to(dtype)


def displacement_cross_section(
    energy_kev: Tensor | float,
    atomic_number: Tensor | int,
    mass_u: Tensor | float,
    threshold_ev: Tensor | float,
    velocity_variance_m2_s2: Tensor | float = 0.0,
) -> Tensor:
    """Cross section in barn for giving a nucleus at least `threshold_ev`.

    `velocity_variance_m2_s2` is the mean square of the nucleus' velocity along the beam. The number 0 means a nucleus
    at rest: the closed form, zero where the transfer is impossible. Otherwise the closed form with Tmax(v) is averaged
    over the Gaussian of v (Susi et al., Nat. Commun. 7, 13040, 2016).
    """
    (energy, charge, mass, threshold, variance), dtype = _checked(
        energy_kev=energy_kev,
        atomic_number=atomic_number,
        mass_u=mass_u,
        threshold_ev=threshold_ev,
        velocity_variance_m2_s2=velocity_variance_m2_s2,
    )
    energy, rest = 1e3 * energy, ATOMIC_MASS_EV * mass
    if _is_zero(velocity_variance_m2_s2):
        largest = _largest_transfer(energy, rest, torch.zeros_like(energy))
        return _above(threshold, largest, energy, charge).to(dtype)
    speed, weight = _thermal_speeds(energy, rest, threshold, variance, _VELOCITY_NODES)  # (..., V)
    largest = _largest_transfer(energy[..., None], rest[..., None], speed)
    return (weight * _above(threshold[..., None], largest, energy[..., None], charge[..., None])).sum(-1).to(dtype)


def recoil_spectrum(
    energy_kev: Tensor | float,
    atomic_number: Tensor | int,
    mass_u: Tensor | float,
    lowest_ev: Tensor | float,
    velocity_variance_m2_s2: Tensor | float = 0.0,
    transfers: int = 12,
    velocities: int = 16,
) -> RecoilSpectrum:
    """Recoils of at least `lowest_ev`, to sum an outcome's probability over: N = transfers × velocities of them.

    Gauss and Legendre in 1/T, in which dσ/dT is smooth, at every velocity of the thermal average (one, at rest, where
    the variance is the number 0). A probability with a step needs a spectrum from the step up, or many transfers.
    """
    if transfers < 1 or velocities < 1:
        raise ConfigError(f"transfers and velocities must be at least 1; given {transfers} and {velocities}.")
    (energy, charge, mass, lowest, variance), dtype = _checked(
        energy_kev=energy_kev,
        atomic_number=atomic_number,
        mass_u=mass_u,
        lowest_ev=lowest_ev,
        velocity_variance_m2_s2=velocity_variance_m2_s2,
    )
    energy, rest = 1e3 * energy, ATOMIC_MASS_EV * mass
    if _is_zero(velocity_variance_m2_s2):
        speed, weight = torch.zeros_like(energy)[..., None], torch.ones_like(energy)[..., None]
    else:
        speed, weight = _thermal_speeds(energy, rest, lowest, variance, velocities)  # (..., V)
    energy, charge, rest, lowest = (x[..., None, None] for x in (energy, charge, rest, lowest))
    largest = _largest_transfer(energy, rest, speed[..., None]).clamp(min=lowest)  # (..., V, 1)
    node, share = _nodes(transfers, energy.device)
    width = 1.0 / lowest - 1.0 / largest
    transfer = 1.0 / (1.0 / largest + width * node)  # (..., V, T)
    barn = weight[..., None] * share * width * _scaled_density(transfer, largest, energy, charge)
    parts = (x.flatten(-2).to(dtype) for x in (transfer, largest.expand_as(transfer), barn))
    return RecoilSpectrum(*parts)


def recoil_direction(transfer_ev: Tensor | float, largest_ev: Tensor | float) -> Tensor:
    """Cosine of the angle between the beam and the recoil, sqrt(T / Tmax); 1 where T is Tmax or more.

    Momentum conservation for a nucleus at rest; the azimuth is uniform.
    """
    (transfer, largest), dtype = _checked(transfer_ev=transfer_ev, largest_ev=largest_ev)
    return torch.sqrt((transfer / largest).clamp(max=1.0)).to(dtype)


def _largest_transfer(energy_ev: Tensor, rest_ev: Tensor, speed_m_s: Tensor) -> Tensor:
    """Tmax(v) in eV; `rest_ev` is M c²."""
    momentum, _ = _final_momentum(energy_ev, rest_ev, speed_m_s / SPEED_OF_LIGHT_M_S)
    momentum = momentum.clamp(min=0.0)
    return momentum * momentum / (2.0 * rest_ev)


def _final_momentum(energy_ev: Tensor, rest_ev: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """(r + t) c in eV of a nucleus that moved at `beta` times c, and its derivative along beta."""
    total = energy_ev + 0.5 * rest_ev * beta * beta
    turned = torch.sqrt(total * (total + 2.0 * _REST_ENERGY_EV))
    sent = torch.sqrt(energy_ev * (energy_ev + 2.0 * _REST_ENERGY_EV))
    return sent + rest_ev * beta + turned, rest_ev * (1.0 + beta * (total + _REST_ENERGY_EV) / turned)


def _threshold_speed(energy_ev: Tensor, rest_ev: Tensor, threshold_ev: Tensor) -> Tensor:
    """The speed in m/s from which on Tmax(v) is at least the threshold: two steps of Newton, exact to rounding.

    At v far below the electron's speed r + t is linear in v to one part in ten thousand.
    """
    wanted = torch.sqrt(2.0 * rest_ev * threshold_ev)
    beta = torch.zeros_like(wanted)
    for _ in range(2):
        momentum, slope = _final_momentum(energy_ev, rest_ev, beta)
        beta = beta + (wanted - momentum) / slope
    return SPEED_OF_LIGHT_M_S * beta


def _thermal_speeds(
    energy_ev: Tensor, rest_ev: Tensor, threshold_ev: Tensor, variance_m2_s2: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Speeds (..., count) above the threshold's and their weights under the Gaussian, which sum to its area there."""
    sigma = torch.sqrt(variance_m2_s2 + _STANDSTILL_M2_S2)
    start = (_threshold_speed(energy_ev, rest_ev, threshold_ev) / sigma).clamp(min=-_REACH_SIGMA)
    beyond = start.clamp(min=0.0)
    width = torch.sqrt(beyond * beyond + _REACH_SIGMA**2) - start
    node, share = _nodes(count, energy_ev.device)
    x = start[..., None] + width[..., None] * node
    weight = share * width[..., None] * torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return sigma[..., None] * x, weight


def _beam(energy_ev: Tensor, charge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """π (Z rₑ)² (1 − β²) / β⁴ in barn, β², and π α β."""
    gamma = 1.0 + energy_ev / _REST_ENERGY_EV
    beta2 = 1.0 - 1.0 / (gamma * gamma)
    prefactor = _PI_RADIUS2_BARN * charge * charge * (1.0 - beta2) / (beta2 * beta2)
    return prefactor, beta2, math.pi * FINE_STRUCTURE * charge * torch.sqrt(beta2)


def _scaled_density(transfer_ev: Tensor, largest_ev: Tensor, energy_ev: Tensor, charge: Tensor) -> Tensor:
    """T² dσ/dT in barn eV."""
    prefactor, beta2, spin = _beam(energy_ev, charge)
    share = transfer_ev / largest_ev
    return prefactor * largest_ev * (1.0 - beta2 * share + spin * (torch.sqrt(share) - share))


def _above(threshold_ev: Tensor, largest_ev: Tensor, energy_ev: Tensor, charge: Tensor) -> Tensor:
    """The integral of dσ/dT from the threshold to Tmax, in barn; zero, with a zero gradient, where that is empty."""
    prefactor, beta2, spin = _beam(energy_ev, charge)
    ratio = (largest_ev / threshold_ev).clamp(min=1.0)
    log = torch.log(ratio)
    return prefactor * (ratio - 1.0 - beta2 * log + spin * (2.0 * (torch.sqrt(ratio) - 1.0) - log))


def _is_zero(variance: Tensor | float) -> bool:
    return isinstance(variance, (int, float)) and variance == 0


def _nodes(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss and Legendre on [0, 1]."""
    nodes, weights = (torch.as_tensor(a, dtype=torch.float64, device=device) for a in gauss_legendre(count))
    return nodes, weights


def _checked(**given: Tensor | float) -> tuple[list[Tensor], torch.dtype]:
    """The arguments as float64 tensors of one shape, and the dtype of the result. Raises ConfigError."""
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    kinds = [t.dtype for t in tensors if t.dtype.is_floating_point]
    dtype = reduce(torch.promote_types, kinds) if kinds else torch.get_default_dtype()
    # Numbers and numbers in tensors go where a batch lies.
    device = max(tensors, key=lambda t: t.ndim).device if tensors else None
    checked = {name: torch.as_tensor(value, dtype=torch.float64, device=device) for name, value in given.items()}
    for name, value in checked.items():
        holds, words = _RULES[name]
        good = torch.isfinite(value) & holds(value)
        if not bool(good.all()):
            raise ConfigError(f"{name} must be finite and {words}; given {value[~good][0].item():g}.")
    try:
        return list(torch.broadcast_tensors(*checked.values())), dtype
    except RuntimeError as error:
        shapes = {name: tuple(value.shape) for name, value in checked.items()}
        raise ConfigError(f"The arguments must broadcast to one shape; given {shapes}.") from error
