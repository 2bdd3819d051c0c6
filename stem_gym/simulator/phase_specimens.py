"""Specimens of several material phases, with interfaces, precipitates and point defects of their own spectra."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stem_gym.core.config import Config
from stem_gym.core.elements import atomic_number_of
from stem_gym.core.streams import normal_quantile
from stem_gym.core.units import ANG_PER_NM
from stem_gym.simulator.phase_spectra import Detector, Eels, Phase
from stem_gym.simulator.scattering import haadf_cross_section_ang2
from stem_gym.simulator.smooth_fields import (
    LOGISTIC_10_TO_90,
    RandomRows,
    logistic,
    smooth_fields,
    soft_step,
    uneven,
    weighted_sum,
)
from stem_gym.simulator.spectral_specimen import SpectralSpecimen

_STRETCH_EDGE = 0.1  # how softly a stretch of a boundary begins, in standard deviations of its field

# Cubic cells of the textbooks: SrTiO3 a = 0.3905 nm, LaMnO3 pseudo-cubic 0.388 nm, MnO 0.4445 nm. The valences' shifts
# and ratios are assumptions of the usual size: Mn L moves down and its ratio up from Mn3+ to Mn2+.
_TITANATE = Phase(composition={"Sr": 1.0, "Ti": 1.0, "O": 3.0}, atoms_per_nm3=84.0)
_MANGANITE = Phase(composition={"La": 1.0, "Mn": 1.0, "O": 3.0}, atoms_per_nm3=85.6, white_line_ratio=2.5)
_MONOXIDE = Phase(
    composition={"Mn": 1.0, "O": 1.0}, atoms_per_nm3=91.1, edge_shift_ev={"Mn": -1.5}, white_line_ratio=4.0
)
_REDUCED_MANGANITE = Phase(
    composition={"La": 1.0, "Mn": 1.0, "O": 2.8},
    atoms_per_nm3=84.0,
    edge_shift_ev={"Mn": -1.0},
    shift_spread_ev=0.5,
    white_line_ratio=3.5,
)
_REDUCED_TITANATE = Phase(
    composition={"Sr": 1.0, "Ti": 1.0, "O": 2.5}, atoms_per_nm3=75.6, edge_shift_ev={"Ti": -1.5}, white_line_ratio=2.5
)


class PhasesRecipe(Config):
    """Domains of two or three phases, precipitates of a rare one, and states that only interfaces and defects have.

    The domains are smooth random fields cut at random levels. A few stretches of the boundary of the first phase, and
    a few points, are of phases of their own: little or nothing of them shows in the HAADF image, so that the most
    interesting spectra are at few places near those that the image tells. Any of the three may be None.
    """

    kind: Literal["phases"] = "phases"
    detector: Detector = Eels()
    energy_kev: float = Field(default=200.0, ge=30, le=300)
    fov_nm: float = Field(default=60.0, gt=1, le=5000)
    """width of the field"""
    phases: tuple[Phase, ...] = Field(default=(_TITANATE, _MANGANITE), min_length=2, max_length=3)
    precipitate: Phase | None = _MONOXIDE
    interface: Phase | None = _REDUCED_MANGANITE
    defect: Phase | None = _REDUCED_TITANATE
    domain_nm: float = Field(default=15.0, gt=0)
    """correlation length of the domains"""
    interface_width_nm: float = Field(default=2.0, gt=0)
    """from 10 to 90 % of a phase"""
    interface_share: float = Field(default=0.25, gt=0, lt=1)
    """of the first phase's boundary that is in the state `interface`"""
    precipitates_max: int = Field(default=4, ge=1, le=32)
    """there are one to this many"""
    precipitate_radius_nm: tuple[float, float] = (1.5, 4.0)
    defects_max: int = Field(default=4, ge=1, le=64)
    """there are one to this many"""
    defect_radius_nm: float = Field(default=1.2, gt=0)
    """rms of the Gaussian spot in which a defect is seen"""
    thickness_nm: tuple[float, float] = (20.0, 60.0)
    """mean thickness of a specimen"""
    wedge: float = Field(default=0.3, ge=0, lt=1)
    """largest relative change of the thickness across the field"""
    roughness: float = Field(default=0.05, ge=0, le=0.3)
    """rms relative change of the thickness from place to place"""
    haadf_mrad: tuple[float, float] = (80.0, 200.0)

    @model_validator(mode="after")
    def _ordered(self) -> PhasesRecipe:
        for name in ("precipitate_radius_nm", "thickness_nm", "haadf_mrad"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high:
                raise ValueError(f"{name} must rise from a positive value; given {low} to {high}")
        if not 0.03 <= self.domain_nm / self.fov_nm <= 2.0:
            raise ValueError(f"domain_nm must be 0.03 to 2 times fov_nm; given {self.domain_nm} and {self.fov_nm}")
        return self

    def axis(self) -> Tensor:
        """Energies of the channels, (C,) in eV."""
        return self.detector.axis()

    @property
    def materials(self) -> tuple[Phase, ...]:
        """Phases in the order of the loadings: domains, precipitate, interface, defect; without those that are None."""
        return (*self.phases, *(p for p in (self.precipitate, self.interface, self.defect) if p is not None))

    def build(
        self, streams: RandomRows, rows: Tensor, shape: tuple[int, int], device: torch.device | str | None = None
    ) -> SpectralSpecimen:
        """One specimen for each of `rows` (n,), drawn from their streams.

        Component p · O + k is material p with k losses besides its own (O = 1 for X-rays), its loading in nm.
        """
        materials = self.materials
        share = self.shares(streams, rows, shape).to(device)  # (n, P, H, W)
        thickness = self._thickness_nm(streams, rows, shape).to(device)
        uniform = streams.uniform(rows, (len(materials) + 1,)).to(share.device)
        parts = self.detector.components(materials, self.energy_kev, uniform)
        by_cell = share.flatten(2).transpose(1, 2).contiguous()  # (n, cells, P)
        along = thickness.flatten(1)
        weight = self.detector.weights(along, by_cell, materials, self.energy_kev)
        loadings = (by_cell * along[..., None])[..., None] * weight[:, :, None]
        haadf = [self._haadf_per_nm(p) for p in materials]
        # Scattered to the annulus at least once: linear while thin.
        image = -torch.expm1(-thickness * weighted_sum(share.unbind(dim=1), haadf))
        return SpectralSpecimen(image, loadings.flatten(2), parts.flatten(1, 2))

    def shares(self, streams: RandomRows, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        """How much of each cell each of the materials fills, (n, P, H, W): 0 to 1, and 1 in all."""
        pixel_nm = self.fov_nm / shape[1]
        length = self.domain_nm / self.fov_nm
        cuts = len(self.phases) - 1
        fields = smooth_fields(streams, rows, cuts + 1, shape, length)
        level = normal_quantile(0.3 + 0.4 * streams.uniform(rows, (cuts,)))
        step = soft_step(fields[:, :cuts], level, self.interface_width_nm / pixel_nm, self.domain_nm / pixel_nm)
        domains = [step[:, 0]] if cuts == 1 else [step[:, 0], (1.0 - step[:, 0]) * step[:, 1]]
        found = torch.stack([*domains, 1.0 - sum(domains[1:], domains[0])], dim=1)
        free = torch.ones_like(step[:, 0])
        if self.precipitate is not None:
            rare = self._precipitates(streams, rows, shape)
            found, free = _put_in(found, rare), 1.0 - rare
        if self.interface is not None:
            boundary = 4.0 * step[:, 0] * (1.0 - step[:, 0])
            cut = normal_quantile(torch.tensor([1.0 - self.interface_share], device=step.device))
            stretch = logistic((fields[:, -1] - cut) / _STRETCH_EDGE)
            found = _put_in(found, free * boundary * stretch)
        if self.defect is not None:
            found = _put_in(found, self._defects(streams, rows, shape))
        return found

    def _precipitates(self, streams: RandomRows, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        """Share of the rare phase, (n, H, W): ellipses of random size, form and direction with soft edges."""
        pixel_nm = self.fov_nm / shape[1]
        offset, uniform = self._spots(streams, rows, shape, self.precipitates_max)
        low, high = self.precipitate_radius_nm
        radius = low + (high - low) * uniform[:, 3, :, None]
        angle, stretch = 2.0 * math.pi * uniform[:, 4, :, None], 1.0 + 0.5 * uniform[:, 5, :, None]
        along = (offset[0] * torch.cos(angle) + offset[1] * torch.sin(angle)) / stretch
        across = (offset[1] * torch.cos(angle) - offset[0] * torch.sin(angle)) * stretch
        outside = torch.sqrt(along * along + across * across) - radius
        edge_nm = max(self.interface_width_nm, pixel_nm) / LOGISTIC_10_TO_90
        return _union(logistic(-outside / edge_nm), uniform, self.precipitates_max, shape)

    def _defects(self, streams: RandomRows, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        """Share of the defects' phase, (n, H, W): round spots of one size."""
        offset, uniform = self._spots(streams, rows, shape, self.defects_max)
        reach = (offset[0].square() + offset[1].square()) / (2.0 * self.defect_radius_nm**2)
        return _union(torch.exp(-reach), uniform, self.defects_max, shape)

    def _spots(
        self, streams: RandomRows, rows: Tensor, shape: tuple[int, int], most: int
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Distances in nm (n, most, cells) along x and y of cells from random centres, and uniforms (n, 6, most)."""
        height, width = shape
        pixel_nm = self.fov_nm / width
        uniform = streams.uniform(rows, (6, most))
        x = (torch.arange(width, device=uniform.device) + 0.5) * pixel_nm
        y = (torch.arange(height, device=uniform.device) + 0.5) * pixel_nm
        across, down = x.repeat(height), y.repeat_interleave(width)
        centre_x, centre_y = uniform[:, 0] * width * pixel_nm, uniform[:, 1] * height * pixel_nm
        return (across - centre_x[..., None], down - centre_y[..., None]), uniform

    def _thickness_nm(self, streams: RandomRows, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        """(n, H, W): a wedge in a random direction, and a smooth roughness; at least a tenth of the mean."""
        length = min(2.0, 1.5 * self.domain_nm / self.fov_nm)
        relative = uneven(streams, rows, shape, (self.wedge, self.roughness, length))
        low, high = self.thickness_nm
        return (low + (high - low) * streams.uniform(rows))[:, None, None] * relative

    def _haadf_per_nm(self, phase: Phase) -> float:
        """Share of the beam that a nanometre of a phase scatters to the annulus."""
        number = torch.tensor([atomic_number_of(symbol) for symbol in phase.composition])
        density = torch.tensor(list(phase.densities().values()))
        cross = haadf_cross_section_ang2(number, torch.tensor(self.energy_kev), *self.haadf_mrad) / ANG_PER_NM**2
        return float((density * cross).sum())


def _union(covered: Tensor, uniform: Tensor, most: int, shape: tuple[int, int]) -> Tensor:
    """Share (n, H, W) that any of one to `most` spots (n, most, cells) covers; the number is drawn too."""
    number = 1.0 + torch.floor(uniform[:, 2, :1] * most)
    there = torch.arange(most, device=uniform.device) < number
    return (1.0 - (1.0 - covered * there[..., None]).prod(dim=1)).reshape(-1, *shape)


def _put_in(share: Tensor, added: Tensor) -> Tensor:
    """Shares (n, P + 1, H, W) after `added` (n, H, W) of one more material took the place of all others alike."""
    return torch.cat((share * (1.0 - added[:, None]), added[:, None]), dim=1)
