"""Low energy losses of fast electrons: small spheres near the beam, their coupling, and the bulk of what it crosses.

A beam electron of velocity beta c passes a sphere of radius a at distance b. The sphere is a dipole with the
polarisability volume a³ (eps − 1) / (eps + 2), and the probability of a loss E is

    Gamma(E) = P(E) |F|² Im alpha,   P = 4 alpha_fs k² / (pi hbar c beta⁴ gamma²),   k = E / (hbar c),
    F = exp(i k z / beta) [−K1(zeta) rho, (i / gamma) K0(zeta) z],   zeta = k b / (beta gamma)

(García de Abajo, Rev. Mod. Phys. 82, 209, 2010; Gaussian units). Several spheres answer one another's fields:
(1/alpha_i) p_i − sum_j W_ij p_j = F_i with W = (3 n n − 1) / r³, and Gamma = P Im sum_i F_i* · p_i. When all have one
dielectric function, 1/alpha_i = u(E) / a_i³ with u = (eps + 2) / (eps − 1), so that the eigenvectors of the real matrix
a_i^(3/2) W_ij a_j^(3/2) are the modes at every energy and for every place of the beam.

Good for spheres much smaller than the wavelength (E a / hbar c of a few tenths at most: retardation between and inside
spheres is left out) and for b ≥ 1.5 a: closer, higher multipoles take a growing part (a fifth of the loss at b = 1.5 a
and half at 1.05 a for 15 nm of silver at 100 keV). A beam inside a sphere meets the field of its surface, with the part
in the plane falling in proportion to the distance from the centre, where symmetry makes it vanish: finite and
continuous, an assumption, and without the loss of surface modes to the bulk mode (Begrenzung).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from stem_gym.core.units import BOHR_RADIUS_ANG, ELECTRON_REST_ENERGY_KEV, FINE_STRUCTURE, HC_KEV_ANG

HBAR_C_EV_NM = 100.0 * HC_KEV_ANG / (2.0 * math.pi)
_BOHR_RADIUS_NM = 0.1 * BOHR_RADIUS_ANG
_LEAST_DISTANCE_NM = 1e-3  # an absent sphere has no radius, and its field is multiplied by 0
_SURE_ROWS = 25  # of a matrix whose eigenvectors single precision gives surely
_FIELD_NUMBERS = 2**22  # of the field at one time: 32 MB in double precision
_WIDTH_PER_SIGMA = 2.0 * math.sqrt(2.0 * math.log(2.0))


def beam_velocity(beam_kev: float) -> tuple[float, float]:
    """beta = v/c and gamma = 1/√(1 − beta²) of electrons of this kinetic energy."""
    gamma = 1.0 + beam_kev / ELECTRON_REST_ENERGY_KEV
    return math.sqrt(1.0 - gamma**-2), gamma


@dataclass(frozen=True)
class Drude:
    """A free-electron dielectric function for each of n specimens: eps(E) = eps_inf − Ep² / (E (E + i Gamma))."""

    background: Tensor  # (n,) eps_inf, of the bound electrons
    plasma_ev: Tensor  # (n,) Ep
    damping_ev: Tensor  # (n,) Gamma

    def rows(self, index: Tensor) -> Drude:
        """Those of the specimens in `index`."""
        return Drude(*(getattr(self, f.name)[index] for f in fields(self)))

    def permittivity(self, energy_ev: Tensor) -> Tensor:
        """eps, (n, C) complex, at energies (C,) above zero."""
        ratio = self.damping_ev[:, None] / energy_ev
        free = (self.plasma_ev[:, None] / energy_ev) ** 2 / (1.0 + ratio * ratio)
        return torch.complex(self.background[:, None] - free, free * ratio)

    def mode_energy_ev(self, eigenvalue: Tensor) -> Tensor:
        """Where, without damping, modes (n, K) resonate: eps(E) = 1 − 3 / (1 − eigenvalue).

        A sphere by itself has the eigenvalue 0 and Ep / √(eps_inf + 2). From eigenvalue 1 on, which touching spheres in
        a plane do not reach, a mode has no restoring force; such energies are kept just above zero.
        """
        stiffness = 3.0 / (1.0 - eigenvalue).clamp(min=1e-3)
        return self.plasma_ev[:, None] / torch.sqrt(self.background[:, None] - 1.0 + stiffness)


def sphere_polarisability_nm3(permittivity: Tensor, radius_nm: Tensor) -> Tensor:
    """Polarisability volume a³ (eps − 1) / (eps + 2), (n, C) complex; permittivity (n, C), radius (n,)."""
    return radius_nm[:, None] ** 3 * (permittivity - 1.0) / (permittivity + 2.0)


def loss_prefactor(energy_ev: Tensor, beam_kev: float) -> Tensor:
    """P(E) of the module's formula, per eV and nm³; the shape of `energy_ev`."""
    beta, gamma = beam_velocity(beam_kev)
    wavenumber = energy_ev / HBAR_C_EV_NM
    return wavenumber * wavenumber * (4.0 * FINE_STRUCTURE / (math.pi * HBAR_C_EV_NM * beta**4 * gamma**2))


def aloof_loss(energy_ev: Tensor, distance_nm: Tensor, polarisability_nm3: Tensor, beam_kev: float) -> Tensor:
    """Loss probability of one sphere per specimen, per eV, (n, P, C): the closed form.

    Energies (C,), distances (n, P) of the beam from the centre, above zero, polarisabilities (n, C).
    """
    beta, gamma = beam_velocity(beam_kev)
    zeta = distance_nm[..., None] * (energy_ev / (HBAR_C_EV_NM * beta * gamma))
    k0, k1 = bessel_pair(zeta)
    field = k1 * k1 + (k0 / gamma) ** 2
    return loss_prefactor(energy_ev, beam_kev) * field * polarisability_nm3.imag[:, None, :]


@dataclass(frozen=True)
class Modes:
    """The dipole modes of n groups of N spheres: 3 N each, in order of falling resonance energy."""

    eigenvalue: Tensor  # (n, 3N)
    vector: Tensor  # (n, 3N, 3N) [:, axis · N + i, mode], weighted by a_i^(3/2): times the field F_i, an amplitude

    def rows(self, index: Tensor) -> Modes:
        """Those of the specimens in `index`."""
        return Modes(self.eigenvalue[index], self.vector[index])

    def amplitudes(self, height_nm: Tensor, energy_ev: Tensor, beam_kev: float) -> Tensor:
        """What turns `field_shape` (…, 3N) into amplitudes of the modes, (n, c, 3N, 6N).

        The first 3 N columns give the real parts, the others the imaginary parts. Heights of the centres (n, N);
        energies (n, c, 1), or (n, c, 3N) for each mode its own.
        """
        phase = energy_ev[:, :, None] * height_nm[:, None, :, None] / (HBAR_C_EV_NM * beam_velocity(beam_kev)[0])
        cosine, sine = torch.cos(phase), torch.sin(phase)
        real, imaginary = torch.cat((-cosine, -cosine, -sine), dim=2), torch.cat((-sine, -sine, cosine), dim=2)
        return torch.cat([part * self.vector[:, None] for part in (real, imaginary)], dim=-1)

    def response(self, material: Drude, energy_ev: Tensor) -> Tensor:
        """Im 1/(u(E) − eigenvalue) ≥ 0, (n, 3N, C): how strongly each mode takes energy at energies (C,)."""
        u = 1.0 + 3.0 / (material.permittivity(energy_ev) - 1.0)
        distance = (u.real[:, None, :] - self.eigenvalue[..., None]) ** 2 + u.imag[:, None, :] ** 2
        return -u.imag[:, None, :] / distance


def dipole_modes(centre_nm: Tensor, radius_nm: Tensor) -> Modes:
    """Modes of spheres at (n, N, 3) with radii (n, N); a radius of 0 is no sphere.

    Differentiable in centres and radii where no two modes have one eigenvalue (a pair of spheres always has such two).
    """
    count = centre_nm.shape[1]
    step = centre_nm[:, :, None, :] - centre_nm[:, None, :, :]
    same = torch.eye(count, dtype=torch.bool, device=centre_nm.device)
    squared = (step * step).sum(-1).masked_fill(same, 1.0).clamp(min=_LEAST_DISTANCE_NM**2)
    distance = torch.sqrt(squared)
    weight = radius_nm * torch.sqrt(radius_nm)
    strength = (weight[:, :, None] * weight[:, None, :] / (squared * distance)).masked_fill(same, 0.0)
    direction = step / distance[..., None]
    unit = torch.eye(3, dtype=step.dtype, device=step.device)
    coupling = strength[..., None, None] * (3.0 * direction[..., :, None] * direction[..., None, :] - unit)
    matrix = coupling.permute(0, 3, 1, 4, 2).reshape(len(step), 3 * count, 3 * count)
    eigenvalue, vector = _eigenvectors(matrix)
    return Modes(eigenvalue, vector * weight.repeat(1, 3)[..., None])


def _eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n, K) and vectors (n, K, K) of symmetric matrices, to the last bit the same in any batch.

    The library rounds differently for matrices that do not begin at a multiple of 16 bytes, as the odd ones of a batch
    may not; so each gets some more rows, with eigenvalues above all others. Divide and conquer, which LAPACK takes for
    matrices of more than 25 rows (its SMLSIZ), does not converge or gives NaN in single precision for some of those
    with many eigenvalues alike, as absent spheres and several clusters make them: it is done in double.
    """
    size = matrix.shape[-1]
    more = -size % 4
    above = 1.0 + matrix.detach().abs().sum(-1).amax(-1, keepdim=True)  # Gershgorin's bound
    diagonal = torch.cat((torch.zeros_like(matrix[..., 0]), above.expand(-1, more)), dim=-1)
    padded = torch.nn.functional.pad(matrix, (0, more, 0, more)) + torch.diag_embed(diagonal)
    exact = padded if padded.shape[-1] <= _SURE_ROWS else padded.double()
    eigenvalue, vector = (part.to(matrix.dtype) for part in torch.linalg.eigh(exact))
    return eigenvalue[:, :size], vector[:, :size, :size]


def radial_field(distance_nm: Tensor, energy_ev: Tensor, beam_kev: float) -> tuple[Tensor, Tensor]:
    """K1(zeta) / b in 1/nm and K0(zeta) / gamma at distances above zero; both broadcast."""
    beta, gamma = beam_velocity(beam_kev)
    k0, k1 = bessel_pair(distance_nm * (energy_ev / (HBAR_C_EV_NM * beta * gamma)))
    return k1 / distance_nm, k0 / gamma


def field_shape(offset_nm: Tensor, radial: tuple[Tensor, Tensor]) -> Tensor:
    """F at the centres of N spheres without its phases and signs, (…, 3N): x, y and z one after the other.

    `offset_nm` (…, N, 2) leads from the beam to the centre, `radial` (…, N) is `radial_field` at this distance or, for
    a beam inside, at the sphere's radius.
    """
    across, along = radial
    return torch.cat((offset_nm[..., 0] * across, offset_nm[..., 1] * across, along), dim=-1)


def coupled_loss(
    energy_ev: Tensor, probe_nm: Tensor, centre_nm: Tensor, radius_nm: Tensor, material: Drude, beam_kev: float
) -> Tensor:
    """Loss probability per eV, (n, P, C), never negative, of beams at (n, P, 2) near spheres at (n, N, 3).

    The radii are (n, N), one material for all spheres of a specimen, energies (C,) above zero. One eigendecomposition
    for each specimen; nothing is approximated beyond the dipole model.
    """
    modes = dipole_modes(centre_nm, radius_nm)
    response = modes.response(material, energy_ev)
    offset = (centre_nm[:, None, :, :2] - probe_nm[:, :, None, :])[:, None]  # (n, 1, P, N, 2)
    radius = radius_nm[:, None, None, :].clamp(min=_LEAST_DISTANCE_NM)
    distance = torch.sqrt(torch.maximum((offset * offset).sum(-1), radius * radius))
    at_once = max(1, _FIELD_NUMBERS // max(1, 3 * offset[..., 0].numel()))
    parts = []
    for energy, answer in zip(energy_ev.split(at_once), response.split(at_once, dim=-1), strict=True):
        radial = radial_field(distance, energy[:, None, None], beam_kev)
        turn = modes.amplitudes(centre_nm[..., 2], energy[None, :, None].expand(len(centre_nm), -1, 1), beam_kev)
        amplitude = field_shape(offset, radial) @ turn  # (n, c, P, 6N)
        loss = (amplitude * amplitude * answer.transpose(1, 2).repeat(1, 1, 2)[:, :, None]).sum(-1)
        parts.append(loss * loss_prefactor(energy, beam_kev)[:, None])
    return torch.cat(parts, dim=1).transpose(1, 2)


def bulk_loss_per_nm(permittivity: Tensor, energy_ev: Tensor, beam_kev: float, collection_mrad: float) -> Tensor:
    """Bulk loss per eV and nm of path, of the shape of `permittivity` (…, C), scattered into a semi-angle theta.

    Im(−1/eps) ln(1 + (theta / theta_E)²) / (pi a0 m v²) with theta_E = E / (gamma m v²) (Egerton, "Electron Energy-Loss
    Spectroscopy in the Electron Microscope", 3rd ed. 2011, eq. 4.26).
    """
    beta, gamma = beam_velocity(beam_kev)
    energy_mv2_ev = 1e3 * ELECTRON_REST_ENERGY_KEV * beta**2
    characteristic = energy_ev / (gamma * energy_mv2_ev)
    spread = torch.log1p((1e-3 * collection_mrad / characteristic) ** 2)
    return (-1.0 / permittivity).imag * spread / (math.pi * _BOHR_RADIUS_NM * energy_mv2_ev)


def chord_nm(distance_nm: Tensor, radius_nm: Tensor) -> Tensor:
    """Path of the beam inside spheres of these radii whose centres it passes at these distances; 0 outside."""
    return 2.0 * torch.sqrt((radius_nm * radius_nm - distance_nm * distance_nm).clamp(min=0.0))


def source_axis_ev(axis_ev: Tensor, fwhm_ev: float, per_channel: int = 2) -> Tensor:
    """Even energies above zero, some per channel, that reach four sigma beyond the first and last channel."""
    channel = float(axis_ev[1] - axis_ev[0])
    step, reach = channel / per_channel, 4.0 * fwhm_ev / _WIDTH_PER_SIGMA + 0.5 * channel
    first = max(1, math.floor((float(axis_ev[0]) - reach) / step))
    last = math.ceil((float(axis_ev[-1]) + reach) / step)
    return step * torch.arange(first, last + 1, dtype=axis_ev.dtype, device=axis_ev.device)


def channel_weights(source_ev: Tensor, axis_ev: Tensor, fwhm_ev: float) -> Tensor:
    """Matrix (S, C) from loss per eV at even energies (S,) to the signal of even channels (C,), zero loss included.

    Each source is spread by a Gaussian of this full width at half maximum and integrated over the channels.
    """
    step, channel = float(source_ev[1] - source_ev[0]), float(axis_ev[1] - axis_ev[0])
    sigma = max(fwhm_ev / _WIDTH_PER_SIGMA, 1e-6 * channel)
    borders = torch.cat((axis_ev - 0.5 * channel, axis_ev[-1:] + 0.5 * channel))
    below = 0.5 * torch.erf((borders - source_ev[:, None]) / (math.sqrt(2.0) * sigma))
    return step * (below[:, 1:] - below[:, :-1])


class _BesselK(torch.autograd.Function):
    """K0 and K1 with their derivatives, which torch.special does not have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        k0, k1 = torch.special.modified_bessel_k0(x), torch.special.modified_bessel_k1(x)
        ctx.save_for_backward(x, k0, k1)
        return k0, k1

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        x, k0, k1 = ctx.saved_tensors
        return -gradient[0] * k1 - gradient[1] * (k0 + k1 / x)  # Abramowitz and Stegun, 9.6.26 and 9.6.27


def bessel_pair(x: Tensor) -> tuple[Tensor, Tensor]:
    """The modified Bessel functions K0 and K1 of positive numbers; once differentiable."""
    k0, k1 = _BesselK.apply(x)
    return k0, k1
