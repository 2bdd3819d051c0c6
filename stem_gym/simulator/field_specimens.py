"""Specimens with electric fields in their plane, seen as displacements of the diffraction disc."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from stem_gym.core.config import Config
from stem_gym.core.elements import atomic_number_of
from stem_gym.core.streams import normal_quantile
from stem_gym.core.units import ANG_PER_NM
from stem_gym.simulator.deflection import (
    deflection_mrad,
    disc_components,
    interaction_constant_rad_per_v_nm,
    pattern_axis_mrad,
)
from stem_gym.simulator.scattering import haadf_cross_section_ang2
from stem_gym.simulator.smooth_fields import RandomRows, smooth_fields, soft_step, uneven
from stem_gym.simulator.spectral_specimen import SpectralSpecimen


class FieldsRecipe(Config):
    """A foil with curved p-n junctions and charged inclusions, of uneven thickness.

    The projected potential is (mean inner potential + electrostatic potential) × thickness, so that thickness ramps
    deflect the beam too, as they do in truth. The junction's step is a logistic function of the distance from it (an
    assumption; its field is bell-shaped). Only the thickness shows in the HAADF image. Scattering out of the camera
    weakens the disc and leaves its place alone; Bragg discs and dynamical effects are left out, as off a zone axis.
    """

    kind: Literal["fields"] = "fields"
    energy_kev: float = Field(default=200.0, ge=30, le=300)
    fov_nm: float = Field(default=200.0, gt=10, le=20000)
    """width of the field"""
    pixels: int = Field(default=16, ge=8, le=128)
    """of the square camera, along each side"""
    pixel_mrad: float = Field(default=0.1, gt=0, le=10)
    convergence_mrad: float = Field(default=0.5, gt=0, le=40)
    """semi-angle of the probe, radius of the disc"""
    edge_mrad: float = Field(default=0.08, gt=0, le=10)
    """rms width of the disc's rim on the camera"""
    element: str = "Si"
    atoms_per_nm3: float = Field(default=50.0, gt=0, lt=250)
    """50 is silicon"""
    inner_potential_v: float = Field(default=12.6, ge=0, le=40)
    """mean inner potential; 12.57 V for Si (Kruse et al., Ultramicroscopy 106, 105, 2006)"""
    junctions: int = Field(default=2, ge=1, le=4)
    built_in_v: tuple[float, float] = (0.5, 1.2)
    """step of the potential at a junction; silicon's is 0.5 to 1.2 V by its doping"""
    junction_width_nm: tuple[float, float] = (12.0, 30.0)
    """from 10 to 90 % of the step, at a typical place"""
    domain_nm: float = Field(default=70.0, gt=0)
    """correlation length of the doped regions"""
    charges_max: int = Field(default=3, ge=0, le=32)
    """charged inclusions; there are none to this many"""
    charge_v: float = Field(default=1.0, ge=0, le=20)
    """largest potential at the middle of one, of either sign"""
    charge_radius_nm: float = Field(default=8.0, gt=0)
    """rms of its Gaussian potential"""
    thickness_nm: tuple[float, float] = (60.0, 150.0)
    """mean thickness of a specimen"""
    wedge: float = Field(default=0.2, ge=0, lt=1)
    """largest relative change of the thickness across the field"""
    roughness: float = Field(default=0.01, ge=0, le=0.3)
    """rms relative change of the thickness from place to place"""
    haadf_mrad: tuple[float, float] = (80.0, 200.0)

    @field_validator("element")
    @classmethod
    def _known(cls, element: str) -> str:
        atomic_number_of(element)
        return element

    @model_validator(mode="after")
    def _ordered(self) -> FieldsRecipe:
        for name in ("built_in_v", "junction_width_nm", "thickness_nm", "haadf_mrad"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high:
                raise ValueError(f"{name} must rise from a positive value; given {low} to {high}")
        if not 0.03 <= self.domain_nm / self.fov_nm <= 2.0:
            raise ValueError(f"domain_nm must be 0.03 to 2 times fov_nm; given {self.domain_nm} and {self.fov_nm}")
        if self.convergence_mrad + 3.0 * self.edge_mrad > 0.5 * self.pixels * self.pixel_mrad:
            raise ValueError(
                "the camera must hold the disc: convergence_mrad + 3 edge_mrad at most pixels × pixel_mrad / 2; "
                f"given {self.convergence_mrad}, {self.edge_mrad}, {self.pixels} and {self.pixel_mrad}"
            )
        return self

    def axis(self) -> Tensor:
        """Angles (kx, ky) of the camera's pixels, (C, 2) in mrad, row by row."""
        return pattern_axis_mrad(self.pixels, self.pixel_mrad)

    def build(
        self, streams: RandomRows, rows: Tensor, shape: tuple[int, int], device: torch.device | str | None = None
    ) -> SpectralSpecimen:
        """One specimen for each of `rows` (n,), drawn from their streams.

        The loadings are the share T of the beam that stays in the disc, and T times its deflection along x and along y
        in mrad; the components the disc and its derivatives, valid for deflections below a pixel or so.
        """
        thickness = self.thickness_map_nm(streams, rows, shape).to(device)
        potential = self.potential_v(streams, rows, shape).to(device)
        projected = (self.inner_potential_v + potential) * thickness
        phase = interaction_constant_rad_per_v_nm(self.energy_kev) * projected
        moved = deflection_mrad(phase, self.fov_nm / shape[1], self.energy_kev)
        half_frame_mrad = 0.5 * self.pixels * self.pixel_mrad
        stays = torch.exp(-self._scattered_per_nm(half_frame_mrad, 1000.0) * thickness)
        loadings = torch.stack((stays, stays * moved[:, 0], stays * moved[:, 1]), dim=-1).flatten(1, 2)
        parts = disc_components(self.pixels, self.pixel_mrad, self.convergence_mrad, self.edge_mrad).to(stays)
        image = -torch.expm1(-self._scattered_per_nm(*self.haadf_mrad) * thickness)
        return SpectralSpecimen(image, loadings, parts.expand(len(rows), -1, -1))

    def potential_v(self, streams: RandomRows, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        """Electrostatic potential (n, H, W) of the junctions and the charged inclusions."""
        pixel_nm = self.fov_nm / shape[1]
        fields = smooth_fields(streams, rows, self.junctions, shape, self.domain_nm / self.fov_nm)
        uniform = streams.uniform(rows, (3, self.junctions))
        low, high = self.junction_width_nm
        width = (low + (high - low) * uniform[:, 0]) / pixel_nm
        level = normal_quantile(0.2 + 0.6 * uniform[:, 1])
        step = soft_step(fields, level, width[..., None, None], self.domain_nm / pixel_nm)
        low, high = self.built_in_v
        height = (low + (high - low) * uniform[:, 2])[..., None, None]
        total = (height * step).sum(dim=1)
        return total + self._charges_v(streams, rows, shape) if self.charges_max else total

    def _charges_v(self, streams: RandomRows, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        most, pixel_nm = self.charges_max, self.fov_nm / shape[1]
        uniform = streams.uniform(rows, (4, most))[..., None, None]
        y, x = ((torch.arange(cells, device=uniform.device) + 0.5) * pixel_nm for cells in shape)
        centre_x, centre_y = uniform[:, 0] * (shape[1] * pixel_nm), uniform[:, 1] * (shape[0] * pixel_nm)
        distance2 = (x - centre_x).square() + (y[:, None] - centre_y).square()
        number = torch.floor(uniform[:, 3, :1] * (most + 1))
        there = torch.arange(most, device=uniform.device)[:, None, None] < number
        height = self.charge_v * (2.0 * uniform[:, 2] - 1.0) * there
        return (height * torch.exp(-distance2 / (2.0 * self.charge_radius_nm**2))).sum(dim=1)

    def thickness_map_nm(self, streams: RandomRows, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        """(n, H, W): a wedge in a random direction, and a smooth roughness; at least a tenth of the mean."""
        length = min(2.0, 0.5 * self.domain_nm / self.fov_nm + 0.1)
        relative = uneven(streams, rows, shape, (self.wedge, self.roughness, length))
        low, high = self.thickness_nm
        return (low + (high - low) * streams.uniform(rows))[:, None, None] * relative

    def _scattered_per_nm(self, inner_mrad: float, outer_mrad: float) -> float:
        """Share of the beam that a nanometre scatters elastically to an annulus."""
        number, energy = torch.tensor(atomic_number_of(self.element)), torch.tensor(self.energy_kev)
        cross = haadf_cross_section_ang2(number, energy, inner_mrad, outer_mrad) / ANG_PER_NM**2
        return float(self.atoms_per_nm3 * cross)
