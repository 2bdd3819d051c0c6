"""Deflection of the beam by electric fields, and the diffraction disc that shows it (4D-STEM).

A thin specimen is a phase object exp(iφ), φ = σ ∫V dz. By Ehrenfest's theorem the mean momentum that it gives to the
electron is ħ∇φ, averaged over the probe's intensity (Müller et al., Nat. Commun. 5, 5653, 2014): the centre of mass of
the diffraction pattern moves by λ/2π · ∇φ, towards higher potential, which is −C_E times the projected electric field
with C_E = λσ/2π. Directions are (x, y), and a disc moved towards +x moves towards larger kx.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from stem_gym.core.units import ANG_PER_NM, ELECTRON_REST_ENERGY_KEV
from stem_gym.simulator.optics import electron_wavelength_ang

_SUBPIXELS = 8  # samples along each side of a detector pixel


def wavelength_nm(energy_kev: float) -> float:
    """Relativistic wavelength of the electrons, in nm."""
    return float(electron_wavelength_ang(torch.tensor(energy_kev, dtype=torch.float64))) / ANG_PER_NM


def interaction_constant_rad_per_v_nm(energy_kev: float) -> float:
    """σ = 2π/(λ E) · (mc² + E) / (2mc² + E), phase per projected potential, rad/(V nm) (Kirkland 2020, eq. 5.6)."""
    rest, kinetic = ELECTRON_REST_ENERGY_KEV, energy_kev
    return 2.0 * math.pi / (wavelength_nm(energy_kev) * kinetic * 1e3) * (rest + kinetic) / (2.0 * rest + kinetic)


def deflection_per_field_mrad_per_v(energy_kev: float) -> float:
    """C_E = λσ/2π: mrad for each volt of projected field (V/nm times nm); equal to 1 / (γ m v²) in 1/V."""
    return 1e3 * wavelength_nm(energy_kev) * interaction_constant_rad_per_v_nm(energy_kev) / (2.0 * math.pi)


def deflection_mrad(phase_rad: Tensor, pixel_nm: float, energy_kev: float) -> Tensor:
    """Mean deflection (…, 2, H, W), x first, in mrad, of a probe at each cell of a phase (…, H, W): λ/2π ∇φ.

    Central differences. The gradient is taken as constant over the probe: for one that is not small beside the
    structures, average the result over its intensity.
    """
    down, across = torch.gradient(phase_rad, spacing=pixel_nm, dim=(-2, -1))
    return torch.stack((across, down), dim=-3) * (1e3 * wavelength_nm(energy_kev) / (2.0 * math.pi))


def pattern_axis_mrad(pixels: int, pixel_mrad: float) -> Tensor:
    """Angles (kx, ky) in mrad of the centres of a square camera's pixels, (pixels², 2), row by row, 0 in the middle."""
    along = (torch.arange(pixels, dtype=torch.float32) - 0.5 * (pixels - 1)) * pixel_mrad
    return torch.stack((along.repeat(pixels), along.repeat_interleave(pixels)), dim=-1)


def disc(pixels: int, pixel_mrad: float, convergence_mrad: float, edge_mrad: float, shift_mrad: Tensor) -> Tensor:
    """Share of the beam in each pixel (…, pixels²) of a camera, with the disc displaced by `shift_mrad` (…, 2).

    A uniform disc of the convergence semi-angle whose rim is an error function of rms width `edge_mrad` (the camera's
    point spread), averaged over each pixel.
    """
    place = _subpixels(pixels, pixel_mrad).to(shift_mrad) - shift_mrad[..., None, :]
    return _radial(place.norm(dim=-1), convergence_mrad, edge_mrad).unflatten(-1, (pixels**2, -1)).mean(dim=-1) * (
        pixel_mrad**2 / _area(convergence_mrad, edge_mrad)
    )


def disc_components(pixels: int, pixel_mrad: float, convergence_mrad: float, edge_mrad: float) -> Tensor:
    """The disc and its changes per mrad of displacement along x and y, (3, pixels²).

    A pattern displaced by (dx, dy) is components[0] + dx · components[1] + dy · components[2] to first order. Its
    centre of mass is exact for any displacement; its form is not. For a disc of 0.5 mrad with a rim of 0.08 mrad 0.2 %
    of the electrons are in a wrong place at 0.02 mrad, 1.2 % at 0.05 and 5 % at 0.1, where some pixels go negative by a
    fifth of a typical one: it is meant for displacements below the rim's width, which is about a pixel.
    """
    return _components(pixels, pixel_mrad, convergence_mrad, edge_mrad).clone()


@lru_cache(maxsize=16)
def _components(pixels: int, pixel_mrad: float, convergence_mrad: float, edge_mrad: float) -> Tensor:
    place = _subpixels(pixels, pixel_mrad)
    radius = place.norm(dim=-1)
    scaled = (radius - convergence_mrad) / edge_mrad
    slope = torch.exp(-0.5 * scaled * scaled) / (edge_mrad * math.sqrt(2.0 * math.pi))  # −d/dr of the rim
    direction = place / radius.clamp(min=1e-12)[:, None]
    parts = torch.stack((_radial(radius, convergence_mrad, edge_mrad), *(slope[:, None] * direction).unbind(dim=-1)))
    scale = pixel_mrad**2 / _area(convergence_mrad, edge_mrad)
    return (parts.unflatten(-1, (pixels**2, -1)).mean(dim=-1) * scale).to(torch.float32)


def _radial(radius: Tensor, convergence_mrad: float, edge_mrad: float) -> Tensor:
    return 0.5 * torch.erfc((radius - convergence_mrad) / (math.sqrt(2.0) * edge_mrad))


def _area(convergence_mrad: float, edge_mrad: float) -> float:
    """∫ of the disc over the plane, mrad²: π (R² + s²), but for terms of exp(−R²/2s²)."""
    return math.pi * (convergence_mrad**2 + edge_mrad**2)


def _subpixels(pixels: int, pixel_mrad: float) -> Tensor:
    """Sample points (pixels² · _SUBPIXELS², 2), those of one pixel together, float64."""
    within = (torch.arange(_SUBPIXELS, dtype=torch.float64) + 0.5) / _SUBPIXELS - 0.5
    x, y = within.repeat(_SUBPIXELS), within.repeat_interleave(_SUBPIXELS)
    inside = torch.stack((x, y), dim=-1) * pixel_mrad
    return (pattern_axis_mrad(pixels, pixel_mrad).to(torch.float64)[:, None] + inside).flatten(0, 1)
