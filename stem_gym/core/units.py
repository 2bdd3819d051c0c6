"""Physical constants and the few conversions that cross a border (CODATA 2018; eV, Å, s, pA inside)."""

from __future__ import annotations

import math

ELECTRONS_PER_PC = 1e-12 / 1.602176634e-19  # electrons in one picocoulomb: 1 pA for 1 s
ELECTRON_REST_ENERGY_KEV = 510.99895
HC_KEV_ANG = 12.398419843  # h c
BOHR_RADIUS_ANG = 0.529177210903
FINE_STRUCTURE = 7.2973525693e-3
ATOMIC_MASS_EV = 931494102.42  # one unified atomic mass unit times c²
SPEED_OF_LIGHT_M_S = 299792458.0
ANG_PER_NM = 10.0
ANG2_PER_BARN = 1e-8


def electrons(current_pa: float, time_s: float) -> float:
    """Electrons in a beam of `current_pa` during `time_s`; works on tensors as well."""
    return current_pa * time_s * ELECTRONS_PER_PC


def fwhm_from_sigma(sigma: float) -> float:
    """Full width at half maximum of a Gaussian with standard deviation `sigma`."""
    return 2.0 * math.sqrt(2.0 * math.log(2.0)) * sigma
