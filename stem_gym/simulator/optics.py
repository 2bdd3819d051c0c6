"""The electron probe: wavelength, lens aberrations, and the Fourier transform of the probe intensity.

A probe formed by an aperture A(k) with the even aberration function chi(k) has the intensity spectrum

    T(q) = integral A(k + q/2) A(k - q/2) cos(chi(k + q/2) - chi(k - q/2)) dk / integral A(k)^2 dk,

with chi(k) = (2 pi / lambda) [ (-defocus + astigmatism cos 2(phi - angle)) alpha^2 / 2 + C3 alpha^4 / 4 ] and
alpha = lambda k (Kirkland, "Advanced Computing in Electron Microscopy", 3rd ed. 2020, ch. 2 and 5). The sign of the
defocus is abTEM's: defocus = -C10, so a positive defocus (underfocus) balances a positive C3. A Gaussian spread of the
focus damps the integrand by exp(-2 (pi lambda focal_spread k . q)^2), which is exact; a Gaussian source multiplies T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from stem_gym.core.errors import ConfigError
from stem_gym.core.units import ELECTRON_REST_ENERGY_KEV, HC_KEV_ANG
from stem_gym.simulator.harmonics import in_blocks
from stem_gym.simulator.quadrature import gauss_legendre

FWHM_PER_SIGMA = 2.0 * math.sqrt(2.0 * math.log(2.0))
_ANG_PER_MM = 1e7

# The spectrum is tabulated on Chebyshev nodes and interpolated. At 60 keV and 34 mrad these sizes hold 1e-5 up to a
# defocus of 100 Å, 1e-3 with an astigmatism of 30 Å besides, and 3e-3 up to a defocus of 200 Å.
_NODES_ALONG = 14  # quadrature along q
_NODES_ACROSS = 7  # quadrature across q
_NODES_RADIAL = 26  # Chebyshev nodes in arccos(q / band limit)
_NODES_ANGULAR = 7  # Chebyshev nodes in cos 2(angle of q - angle of the astigmatism)


def electron_wavelength_ang(energy_kev: Tensor) -> Tensor:
    """Relativistic wavelength in Å of electrons of this kinetic energy; any shape (Kirkland 2020, eq. 2.5)."""
    return HC_KEV_ANG / torch.sqrt(energy_kev * (2.0 * ELECTRON_REST_ENERGY_KEV + energy_kev))


@dataclass(frozen=True)
class Optics:
    """Settings of the illumination, one per row; every field is a tensor of shape (B,)."""

    energy_kev: Tensor  # (B,) kinetic energy of the beam
    convergence_mrad: Tensor  # (B,) semi-angle of the probe-forming aperture
    defocus_ang: Tensor  # (B,) positive is underfocus: defocus = -C10, as in abTEM
    astigmatism_ang: Tensor  # (B,) twofold astigmatism C12
    astigmatism_angle_rad: Tensor  # (B,) its azimuth phi12
    c3_mm: Tensor  # (B,) spherical aberration C30
    focal_spread_ang: Tensor  # (B,) rms spread of the focus (chromatic)
    source_fwhm_ang: Tensor  # (B,) full width at half maximum of the source, in the specimen plane

    @classmethod
    def of(
        cls,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        **settings: float | Tensor,
    ) -> Optics:
        """Optics of `batch` rows from numbers or (B,) tensors; what is not given is an ideal, corrected 60 keV probe.

        Raises ConfigError for a setting that does not exist.
        """
        unknown = sorted(set(settings) - set(IDEAL_PROBE))
        if unknown:
            raise ConfigError(f"Unknown optical settings {unknown}; the settings are {sorted(IDEAL_PROBE)}.")
        values = {**IDEAL_PROBE, **settings}
        return cls(**{k: torch.as_tensor(v, dtype=dtype, device=device).expand(batch) for k, v in values.items()})

    def rows(self, index: Tensor) -> Optics:
        """The optics of the rows in `index` (n,)."""
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @property
    def band_limit_per_ang(self) -> Tensor:
        """(B,) highest spatial frequency of the probe intensity, 2 alpha / lambda."""
        return 2e-3 * self.convergence_mrad / electron_wavelength_ang(self.energy_kev)


IDEAL_PROBE: dict[str, float] = {
    "energy_kev": 60.0,
    "convergence_mrad": 34.0,
    "defocus_ang": 0.0,
    "astigmatism_ang": 0.0,
    "astigmatism_angle_rad": 0.0,
    "c3_mm": 0.0,
    "focal_spread_ang": 0.0,
    "source_fwhm_ang": 0.7,
}


def transfer_function(optics: Optics, kx_per_ang: Tensor, ky_per_ang: Tensor) -> Tensor:
    """Fourier transform of the probe intensity per unit current: (B, Ny, Nx), real, 1 at k = 0; kx (B, Nx), ky (B, Ny).

    Contains aperture, defocus, astigmatism, C3, focal spread and source size. The aberration part is tabulated by exact
    quadrature on Chebyshev nodes and interpolated, which costs a tenth of a quadrature at every frequency.
    """
    return in_blocks(_interpolated, kx_per_ang, ky_per_ang, *(getattr(optics, f.name) for f in fields(optics)))


def transfer_by_quadrature(optics: Optics, frequency_per_ang: Tensor, angle_rad: Tensor) -> Tensor:
    """The aberration part of the transfer function at polar frequencies (B, P): (B, P), by direct quadrature.

    Exact and slow; `transfer_function` interpolates it. Without source size. With u along q and v across it, the
    phase is 2 pi lambda q [(-defocus + C12 cos 2d) u - C12 sin 2d v] + pi C3 lambda^3 q u (2 u^2 + 2 v^2 + q^2 / 2), d
    the angle from the astigmatism's azimuth to q. The four quadrants of the discs' overlap are folded onto one.
    """
    turn = 2.0 * (angle_rad - optics.astigmatism_angle_rad[:, None])
    return _overlap(optics, frequency_per_ang, torch.cos(turn), torch.sin(turn))


def probe_intensity(optics: Optics, offset_ang: Tensor, window_ang: float = 40.0) -> Tensor:
    """Current density per unit current, in 1/Å², at offsets (B, N, 2) from the probe's centre: (B, N).

    The probe repeats with period `window_ang`; offsets should stay well inside half of it.
    """
    spectrum, kx, ky = _windowed_spectrum(optics, window_ang)
    phase_y = 2.0 * math.pi * offset_ang[..., 1:] * ky[:, None, :]  # (B, N, Ny)
    phase_x = 2.0 * math.pi * offset_ang[..., :1] * kx[:, None, :]  # (B, N, Nx)
    along_x = torch.cos(phase_y) @ spectrum * torch.cos(phase_x) - torch.sin(phase_y) @ spectrum * torch.sin(phase_x)
    return along_x.sum(-1) / window_ang**2


def probe_profile(optics: Optics, x_ang: Tensor, window_ang: float = 40.0) -> Tensor:
    """Current density per unit current, in 1/Å², along x through the probe's centre, at x (N,): (B, N)."""
    spectrum, kx, _ = _windowed_spectrum(optics, window_ang)
    phase = 2.0 * math.pi * x_ang[None, None, :] * kx[:, :, None]  # (B, Nx, N)
    return (spectrum.sum(-2, keepdim=True) @ torch.cos(phase)).squeeze(-2) / window_ang**2


def probe_fwhm_ang(optics: Optics, window_ang: float = 40.0) -> Tensor:
    """(B,) full width at half of the central density, along x; not differentiable."""
    x = torch.linspace(0.0, window_ang / 4.0, 2001, dtype=optics.energy_kev.dtype, device=optics.energy_kev.device)
    profile = probe_profile(optics, x, window_ang).detach()
    half = 0.5 * profile[:, :1]
    first_below = (profile < half).to(torch.int8).argmax(-1, keepdim=True).clamp(min=1)
    above, below = profile.gather(1, first_below - 1), profile.gather(1, first_below)
    step = x[1] - x[0]
    return 2.0 * step * (first_below.to(x.dtype) - (half - below) / (above - below)).squeeze(-1)


def _interpolated(kx_per_ang: Tensor, ky_per_ang: Tensor, *settings: Tensor) -> Tensor:
    """`transfer_function` with the settings of the optics in the order of its fields."""
    optics = Optics(*settings)
    kx, ky = kx_per_ang.unsqueeze(-2), ky_per_ang.unsqueeze(-1)  # (B, 1, Nx), (B, Ny, 1)
    square = kx * kx + ky * ky  # (B, Ny, Nx)
    batch, frequencies = square.shape[0], square[0].numel()
    limit = optics.band_limit_per_ang[:, None, None]
    reduced = torch.sqrt(square + 1e-12 * limit * limit) / limit  # q over the band limit; never 0, for the gradient
    angle = 2.0 * optics.astigmatism_angle_rad[:, None, None]
    quadrupole = (torch.cos(angle) * (kx * kx - ky * ky) + torch.sin(angle) * (2.0 * kx * ky)) / (
        square + 1e-12 * limit * limit
    )
    depth = torch.acos(reduced.clamp(max=1.0 - 1e-6)) * (4.0 / math.pi) - 1.0  # Chebyshev variable in [-1, 1]
    radial = _chebyshev(depth.reshape(batch, frequencies), _NODES_RADIAL)  # (B, Nr, F)
    angular = _chebyshev(quadrupole.reshape(batch, frequencies), _NODES_ANGULAR)  # (B, Na, F)
    coefficients = _tabulate(optics)  # (B, Na, Nr)
    aberrated = (torch.bmm(coefficients, radial) * angular).sum(1).reshape(square.shape)
    source_sigma = optics.source_fwhm_ang[:, None, None] / FWHM_PER_SIGMA
    blur = torch.exp((-2.0 * math.pi**2) * source_sigma * source_sigma * square)
    return torch.where(reduced < 1.0, aberrated, torch.zeros_like(aberrated)) * blur


def _windowed_spectrum(optics: Optics, window_ang: float) -> tuple[Tensor, Tensor, Tensor]:
    """Transfer function on both signs of the harmonics of a square window, with the harmonics (B, Nx) and (B, Ny)."""
    highest = int(float(optics.band_limit_per_ang.max()) * window_ang) + 1
    k = torch.arange(-highest, highest + 1, dtype=optics.energy_kev.dtype, device=optics.energy_kev.device) / window_ang
    k = k.expand(optics.energy_kev.shape[0], -1)
    return transfer_function(optics, k, k), k, k


def _tabulate(optics: Optics) -> Tensor:
    """Chebyshev coefficients (B, Na, Nr) of the transfer function in 4 arccos(q / limit) / pi - 1 and cos 2d."""
    dtype, device = optics.energy_kev.dtype, optics.energy_kev.device
    depth = torch.as_tensor(_chebyshev_nodes(_NODES_RADIAL), dtype=dtype, device=device)
    quadrupole = torch.as_tensor(_chebyshev_nodes(_NODES_ANGULAR), dtype=dtype, device=device)
    reduced = torch.cos((depth + 1.0) * (math.pi / 4.0))
    cosine = quadrupole.repeat(_NODES_RADIAL)[None, :]
    frequency = optics.band_limit_per_ang[:, None] * reduced.repeat_interleave(_NODES_ANGULAR)[None, :]
    table = _overlap(optics, frequency, cosine, torch.sqrt(1.0 - cosine * cosine))
    to_radial = torch.as_tensor(_chebyshev_transform(_NODES_RADIAL), dtype=dtype, device=device)
    to_angular = torch.as_tensor(_chebyshev_transform(_NODES_ANGULAR), dtype=dtype, device=device)
    return to_angular @ table.reshape(-1, _NODES_RADIAL, _NODES_ANGULAR).transpose(1, 2) @ to_radial.T


def _overlap(optics: Optics, q: Tensor, cos_turn: Tensor, sin_turn: Tensor) -> Tensor:
    """The quadrature behind `transfer_by_quadrature` at frequencies q (B, P), with cos and sin of 2d (B or 1, P)."""
    wavelength = electron_wavelength_ang(optics.energy_kev)[:, None]
    radius = 0.5 * optics.band_limit_per_ang[:, None]
    inside = (q < 2.0 * radius).to(q.dtype)
    half = (radius - 0.5 * q).clamp(min=0.0) + 1e-9 * radius  # (B, P) half length of the overlap along q
    quadrature = (*gauss_legendre(_NODES_ALONG), *gauss_legendre(_NODES_ACROSS))
    t, wt, s, ws = (torch.as_tensor(a, dtype=q.dtype, device=q.device) for a in quadrature)
    u = half[..., None] * (1.0 - t * t)  # (B, P, Nu); the square removes the root singularity at the tip of the lens
    height = torch.sqrt(half[..., None] * (u + radius[..., None] + 0.5 * q[..., None])) * t  # (B, P, Nu)
    measure = half[..., None] * 2.0 * t * wt * height
    qu = q[..., None] * u
    spread = math.pi * wavelength * optics.focal_spread_ang[:, None]
    measure = measure * torch.exp(-2.0 * (spread[..., None] * qu) ** 2)
    v = height[..., None] * s  # (B, P, Nu, Nv)
    c12 = optics.astigmatism_ang[:, None]
    linear = 2.0 * math.pi * wavelength * (c12 * cos_turn - optics.defocus_ang[:, None])
    cubic = math.pi * _ANG_PER_MM * optics.c3_mm[:, None] * wavelength**3
    phase = (linear[..., None] + cubic[..., None] * (2.0 * u * u + 0.5 * (q * q)[..., None])) * qu
    phase_v = 2.0 * cubic[..., None] * qu
    across = 2.0 * math.pi * wavelength * c12 * sin_turn * q
    folded = torch.cos(phase[..., None] + phase_v[..., None] * v * v) * torch.cos(across[..., None, None] * v)
    return inside * (4.0 / math.pi) / radius**2 * ((folded @ ws) * measure).sum(-1)


def _chebyshev(x: Tensor, count: int) -> Tensor:
    """Chebyshev polynomials of degree 0 .. count - 1 at x (B, F): (B, count, F)."""
    terms = [torch.ones_like(x), x]
    for _ in range(count - 2):
        terms.append(2.0 * x * terms[-1] - terms[-2])
    return torch.stack(terms, dim=1)


@lru_cache
def _chebyshev_nodes(count: int) -> np.ndarray:
    """Roots of the Chebyshev polynomial of this degree."""
    return np.cos(np.pi * (np.arange(count) + 0.5) / count)


@lru_cache
def _chebyshev_transform(count: int) -> np.ndarray:
    """Matrix that turns values at the Chebyshev nodes into Chebyshev coefficients."""
    angle = np.pi * (np.arange(count) + 0.5) / count
    matrix = np.cos(np.arange(count)[:, None] * angle[None, :]) * (2.0 / count)
    matrix[0] /= 2.0
    return matrix
