"""Energy losses of fast electrons in a thin specimen: edges of inner shells, background, and plural scattering.

Energies are in eV, the beam's in keV; angles in mrad; cross sections in nm² per atom. Everything broadcasts over
leading dimensions and is differentiable. Source where none is named: R. F. Egerton, "Electron Energy-Loss Spectroscopy
in the Electron Microscope", 3rd ed. 2011.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from stem_gym.core.elements import atomic_number_of
from stem_gym.core.errors import ConfigError
from stem_gym.core.units import ANG_PER_NM, BOHR_RADIUS_ANG, ELECTRON_REST_ENERGY_KEV
from stem_gym.simulator.atomic_shells import Shell, shells_of

RYDBERG_EV = 13.605693
_BOHR_NM = BOHR_RADIUS_ANG / ANG_PER_NM
# Onsets in solids where the tabulated binding energy is that of a gas (EELS atlas of Ahn and Krivanek, 1983).
_ONSET_IN_SOLIDS_EV = {("N", "K"): 401.0, ("O", "K"): 532.0}
# Oscillator strength of an edge per electron of its shell, and the power by which df/dE falls: chosen so that partial
# cross sections over 50 to 100 eV beyond the edge are within 30 % of hydrogenic ones (C, O, Si K and Ti, Mn, Fe L3).
STRENGTH_PER_ELECTRON = 0.72
EDGE_EXPONENT = 3.0
_PADDING = 4  # spectra are padded to four times their length, so that up to fourfold losses do not wrap around


def beta_squared(energy_kev: float | Tensor) -> float | Tensor:
    """(v/c)² of electrons of this kinetic energy."""
    gamma = 1.0 + energy_kev / ELECTRON_REST_ENERGY_KEV
    return 1.0 - 1.0 / (gamma * gamma)


def onset_ev(symbol: str, shell: Shell) -> float:
    """Where the edge of a shell begins in a solid, in eV."""
    return _ONSET_IN_SOLIDS_EV.get((symbol, shell.name), shell.binding_ev)


# ---- background and edges ----


def power_law(energy_ev: Tensor, amplitude: Tensor | float, exponent: Tensor | float, reference_ev: float) -> Tensor:
    """Background A (E / E_ref)^−r: the value at E_ref is A, so that A and r are nearly independent."""
    return amplitude * torch.exp(-exponent * torch.log(energy_ev / reference_ev))


def angular_factor(
    energy_ev: Tensor | float, energy_kev: float | Tensor, collection_mrad: float | Tensor
) -> Tensor | float:
    """ln(1 + β²/θ_E²), θ_E = E / (γ m v²): how much of the dipole scattering the aperture takes in (ch. 3.2)."""
    gamma = 1.0 + energy_kev / ELECTRON_REST_ENERGY_KEV
    momentum_ev = gamma * beta_squared(energy_kev) * ELECTRON_REST_ENERGY_KEV * 1e3
    characteristic_mrad = energy_ev / momentum_ev * 1e3
    ratio = torch.as_tensor(collection_mrad / characteristic_mrad)
    return torch.log1p(ratio * ratio)


def edge_cross_section_nm2(
    energy_ev: Tensor,
    edge: tuple[Tensor | float, Tensor | float, Tensor | float],
    beam: tuple[float, float],
    blur_ev: float,
) -> Tensor:
    """Loss cross section per eV and atom of one edge, nm²/eV, at losses `energy_ev` (…, C).

    `edge` is (onset in eV, oscillator strength, exponent s > 1), each broadcasting against `energy_ev`; `beam` is
    (energy in keV, collection semi-angle in mrad). Bethe's dipole formula
    dσ/dE = 4π a0² R² / (T E) · df/dE · ln(1 + β²/θ_E²) with T = m v²/2 (ch. 3.2), df/dE falling as E^−s from
    the onset on and holding the strength f in all: the power law that hydrogenic edges follow beyond their onset.
    The step is smeared by a Gaussian of rms `blur_ev`, more than zero, as a channel or the spectrometer does.
    """
    onset, strength, exponent = edge
    kinetic_ev = 0.5 * beta_squared(beam[0]) * ELECTRON_REST_ENERGY_KEV * 1e3
    above = 0.5 * (1.0 + torch.erf((energy_ev - onset) / (math.sqrt(2.0) * blur_ev)))
    ratio = energy_ev / onset
    density = strength * (exponent - 1.0) / onset * torch.exp(-exponent * torch.log(ratio)) * above
    scale = 4.0 * math.pi * (_BOHR_NM * RYDBERG_EV) ** 2 / kinetic_ev
    return scale / energy_ev * density * angular_factor(energy_ev, *beam)


def white_lines(energy_ev: Tensor, centre_ev: Tensor | float, area: Tensor | float, sigma_ev: float) -> Tensor:
    """A Gaussian of this area, per eV, at energies (…, C)."""
    scaled = (energy_ev - centre_ev) / sigma_ev
    return area * torch.exp(-0.5 * scaled * scaled) / (sigma_ev * math.sqrt(2.0 * math.pi))


def line_cross_section_nm2(
    energy_ev: Tensor, line: tuple[Tensor | float, Tensor | float], beam: tuple[float, float], sigma_ev: float
) -> Tensor:
    """Cross section per eV and atom of a white line, nm²/eV: `line` is (centre in eV, oscillator strength).

    The same dipole formula as for an edge, with all the strength in one Gaussian of rms `sigma_ev`.
    """
    centre, strength = line
    kinetic_ev = 0.5 * beta_squared(beam[0]) * ELECTRON_REST_ENERGY_KEV * 1e3
    scale = 4.0 * math.pi * (_BOHR_NM * RYDBERG_EV) ** 2 / kinetic_ev
    area = scale / centre * strength * angular_factor(centre, *beam)
    return white_lines(energy_ev, centre, area, sigma_ev)


def white_line_shares(ratio: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
    """Shares of the first (L3, M5) and the second (L2, M4) white line of their sum, for a ratio of areas."""
    return ratio / (1.0 + ratio), 1.0 / (1.0 + ratio)


# ---- thickness ----


def effective_atomic_number(atomic_number: Tensor, fraction: Tensor) -> Tensor:
    """Mean atomic number for inelastic scattering, Σ f Z^1.3 / Σ f Z^0.3 over the last dimension (eq. 5.4)."""
    log_number = torch.log(atomic_number.to(fraction.dtype))
    heavy, light = fraction * torch.exp(1.3 * log_number), fraction * torch.exp(0.3 * log_number)
    return heavy.sum(dim=-1) / light.sum(dim=-1)


def effective_number_of(composition: Mapping[str, float]) -> float:
    """The same for a chemical formula such as {"Sr": 1, "Ti": 1, "O": 3}."""
    number = torch.tensor([atomic_number_of(symbol) for symbol in composition], dtype=torch.float64)
    return float(effective_atomic_number(number, torch.tensor(list(composition.values()), dtype=torch.float64)))


def inelastic_mean_free_path_nm(
    energy_kev: Tensor | float, collection_mrad: Tensor | float, atomic_number: Tensor | float
) -> Tensor:
    """Mean free path for all inelastic scattering into the collection semi-angle β, in nm, good to ± 20 %.

    λ = 106 F E0 / (E_m ln(2 β E0 / E_m)), F = (1 + E0/1022) / (1 + E0/511)², E_m = 7.6 Z^0.36 (Malis, Cheng and
    Egerton, J. Electron Microsc. Tech. 8, 193, 1988). It was measured to β of about 20 mrad: beyond, λ hardly
    changes. Raises ConfigError where the logarithm is not positive.
    """
    energy = torch.as_tensor(energy_kev, dtype=torch.float64)
    relativistic = (1.0 + energy / 1022.0) / (1.0 + energy / 511.0) ** 2
    mean_loss_ev = 7.6 * torch.exp(0.36 * torch.log(torch.as_tensor(atomic_number, dtype=torch.float64)))
    argument = 2.0 * collection_mrad * energy / mean_loss_ev
    if bool((argument <= 1.0).any()):
        raise ConfigError(
            f"The mean free path needs 2 β E0 / E_m > 1 (mrad, keV, eV); the smallest given is {float(argument.min())}."
        )
    return 106.0 * relativistic * energy / (mean_loss_ev * torch.log(argument))


def zero_loss_fraction(thickness: Tensor) -> Tensor:
    """e^(−t/λ): the share of the beam that loses no energy; `thickness` is t/λ."""
    return torch.exp(-thickness)


def loss_weights(thickness: Tensor, orders: int) -> Tensor:
    """Shares (…, orders + 1) of electrons with 0, 1, … losses at t/λ (…): Poisson, and the last holds all the rest."""
    shares = [torch.exp(-thickness)][:orders]
    for order in range(1, orders):
        shares.append(shares[-1] * thickness / order)
    rest = (1.0 - sum(shares, torch.zeros_like(thickness))).clamp(min=0.0)
    return torch.stack([*shares, rest], dim=-1)


def drude_loss(energy_ev: Tensor, plasmon_ev: Tensor | float, width_ev: Tensor | float) -> Tensor:
    """Single-scattering distribution of a free-electron metal, Im(−1/ε), on evenly spaced losses from 0 on (…, C).

    E Ep² Γ / ((E² − Ep²)² + (E Γ)²) (ch. 3.3), normalised to a sum of 1.
    """
    square = energy_ev * energy_ev
    detuned = square - plasmon_ev * plasmon_ev
    loss = energy_ev * width_ev * plasmon_ev * plasmon_ev / (detuned * detuned + square * width_ev * width_ev)
    return loss / loss.sum(dim=-1, keepdim=True)


def plural_scattering(single: Tensor, zero_loss: Tensor, thickness: Tensor | float) -> Tensor:
    """Spectrum per beam electron (…, C) of a specimen of thickness t/λ (…): J = IFFT{Z exp[t/λ (S − 1)]}.

    `single` (…, C) is the distribution S of one loss, entry c for a loss of c channels; `zero_loss` (C,) or (…, C) the
    shape Z of the zero-loss peak, wherever on the axis it is; both sum to 1. It is the Poisson sum of all orders
    (ch. 4.1). Losses beyond the axis are lost, not folded back.
    """
    channels = single.shape[-1]
    size = _PADDING * channels
    tau = torch.as_tensor(thickness, dtype=single.dtype, device=single.device)[..., None]
    once = torch.fft.rfft(single, n=size)
    peak = torch.fft.rfft(zero_loss, n=size)
    return torch.fft.irfft(peak * torch.exp(tau * (once - 1.0)), n=size)[..., :channels]


def fourier_log(spectrum: Tensor, zero_loss: Tensor, thickness: Tensor | float) -> Tensor:
    """The single-scattering distribution (…, C) that `plural_scattering` made a spectrum (…, C) of; its inverse.

    S = 1 + ln(J / Z) / (t/λ) in Fourier space (Johnson and Spence, J. Phys. D 7, 771, 1974). The spectrum must hold
    (nearly) all losses, the zero-loss peak must be narrow (no zero in its transform), and t/λ below π, where the
    logarithm's phase stays on its branch; noise is amplified. Raises ConfigError for a thickness out of that range.
    """
    tau = torch.as_tensor(thickness, dtype=spectrum.dtype, device=spectrum.device)[..., None]
    if bool(((tau <= 0.0) | (tau >= math.pi)).any()):
        raise ConfigError(f"The thickness t/λ must be between 0 and π; given {tau.flatten().tolist()}.")
    channels = spectrum.shape[-1]
    size = _PADDING * channels
    ratio = torch.fft.rfft(spectrum, n=size) / torch.fft.rfft(zero_loss, n=size)
    return torch.fft.irfft(1.0 + torch.log(ratio) / tau, n=size)[..., :channels]


def thickness_from_log_ratio(total: Tensor, zero_loss: Tensor) -> Tensor:
    """t/λ = ln(I_total / I_zero-loss), of intensities of any shape (eq. 5.1)."""
    return torch.log(total / zero_loss)


def loosely_bound_electrons(symbol: str) -> int:
    """How many electrons of an atom are bound by less than about 100 eV: all but those of its inner shells."""
    shells = {shell.name: shell.electrons for shell in shells_of(symbol)}
    untabulated = 2 * ("K" not in shells) + 2 * ("L3" in shells) + 8 * ("M5" in shells)  # K, L1, M1 to M3
    return atomic_number_of(symbol) - sum(shells.values()) - untabulated


def edges_of(symbol: str, below_ev: float) -> list[tuple[Shell, float]]:
    """Shells of an element with an edge below `below_ev`, and their onsets in eV."""
    found = [(shell, onset_ev(symbol, shell)) for shell in shells_of(symbol)]
    return [(shell, onset) for shell, onset in found if onset < below_ev]
