"""X-rays of a thin specimen under a fast beam: characteristic lines, bremsstrahlung, and the detector's resolution.

Energies are in eV, the beam's in keV; cross sections in nm² per atom. Absorption in the specimen and fluorescence by
its own X-rays are left out, which is the thin-film limit; so are Coster-Kronig transitions between subshells.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stem_gym.core.units import ANG_PER_NM, BOHR_RADIUS_ANG, ELECTRON_REST_ENERGY_KEV, FINE_STRUCTURE
from stem_gym.simulator.atomic_shells import Shell, shells_of
from stem_gym.simulator.core_loss import RYDBERG_EV, beta_squared

MANGANESE_EV = 5895.0  # Mn Kα, at which the resolution of a detector is told
_BOHR_NM = BOHR_RADIUS_ANG / ANG_PER_NM
_CLASSICAL_RADIUS_NM = _BOHR_NM * FINE_STRUCTURE**2
_FANO_EV = 2.5  # FWHM² per eV of X-ray energy: 8 ln 2 × Fano factor 0.12 × 3.76 eV for a pair in silicon
# Bethe parameters of K shells (Powell, Rev. Mod. Phys. 48, 33, 1976); assumed for L and M shells as well.
_BETHE_B, _BETHE_C = 0.9, 0.65


def ionisation_cross_section_nm2(shell: Shell, energy_kev: float) -> float:
    """Cross section for ionising a shell of one atom, nm²; 0 where the beam has too little energy.

    Relativistic Bethe formula σ = 4π a0² R² n b / (T I) · [ln(c T / I) − ln(1 − β²) − β²], T = m v²/2 (Williams, Proc.
    R. Soc. A 139, 163, 1933).
    """
    squared = float(beta_squared(energy_kev))
    kinetic_ev = 0.5 * squared * ELECTRON_REST_ENERGY_KEV * 1e3
    bracket = math.log(_BETHE_C * kinetic_ev / shell.binding_ev) - math.log(1.0 - squared) - squared
    scale = 4.0 * math.pi * (_BOHR_NM * RYDBERG_EV) ** 2 / (kinetic_ev * shell.binding_ev)
    return max(0.0, scale * shell.electrons * _BETHE_B * bracket)


def line_cross_sections_nm2(symbol: str, energy_kev: float) -> list[tuple[float, float]]:
    """Lines of an element as (energy in eV, cross section in nm² for one such X-ray in any direction), per atom.

    Raises ConfigError for an element that is not tabulated.
    """
    return [
        (energy_ev, share * shell.fluorescence_yield * ionisation_cross_section_nm2(shell, energy_kev))
        for shell in shells_of(symbol)
        for energy_ev, share in shell.lines
    ]


def bremsstrahlung_cross_section_nm2(energy_ev: Tensor, atomic_number: float, energy_kev: float) -> Tensor:
    """Cross section per eV and atom for an X-ray of `energy_ev`, any shape, in any direction: nm²/eV.

    Kramers' semiclassical law for a thin target, 16π / (3√3) · α r_e² Z² / (β² E), up to the energy of the beam (Phil.
    Mag. 46, 836, 1923); it falls as 1 / E. The beam's direction is not preferred in it, as it is in truth.
    """
    squared = float(beta_squared(energy_kev))
    scale = 16.0 * math.pi / (3.0 * math.sqrt(3.0)) * FINE_STRUCTURE * (_CLASSICAL_RADIUS_NM * atomic_number) ** 2
    return torch.where(energy_ev < energy_kev * 1e3, scale / squared / energy_ev, torch.zeros_like(energy_ev))


def resolution_fwhm_ev(energy_ev: Tensor, manganese_fwhm_ev: float = 130.0) -> Tensor:
    """Full width at half maximum of a line at `energy_ev`, any shape, of a detector with this width at Mn Kα.

    FWHM² = FWHM_Mn² + 2.5 eV (E − E_Mn): the statistics of electron-hole pairs on top of constant noise (Fiori and
    Newbury, SEM/1978/I, 401; Goldstein et al., "Scanning Electron Microscopy and X-ray Microanalysis", 3rd ed. 2003).
    """
    return torch.sqrt((manganese_fwhm_ev**2 + _FANO_EV * (energy_ev - MANGANESE_EV)).clamp(min=1.0))


def line_shape(channel_ev: Tensor, line_ev: Tensor, manganese_fwhm_ev: float = 130.0) -> Tensor:
    """Share of a line's X-rays in each channel, (…, C): Gaussian integrals over evenly spaced channels (C,).

    `line_ev` (…,) are the energies of the lines, `channel_ev` the centres of the channels.
    """
    sigma = resolution_fwhm_ev(line_ev, manganese_fwhm_ev)[..., None] / (2.0 * math.sqrt(2.0 * math.log(2.0)))
    half = 0.5 * (channel_ev[1] - channel_ev[0])
    offset = channel_ev - line_ev[..., None]
    upper, lower = (torch.erf((offset + edge) / (math.sqrt(2.0) * sigma)) for edge in (half, -half))
    return 0.5 * (upper - lower)


def window_transmission(energy_ev: Tensor, half_ev: float) -> Tensor:
    """Share of X-rays that pass the detector's window: 1/2 at `half_ev`, by the E⁻³ law of photoabsorption.

    One absorption edge less than a real window: an assumption that keeps soft X-rays rare, as they are.
    """
    ratio = half_ev / energy_ev
    return torch.exp(-math.log(2.0) * ratio * ratio * ratio)
