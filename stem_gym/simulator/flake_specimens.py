"""Flakes of a layered crystal such as MnPS3 with terraces, holes and edges: their image and low-loss spectra.

Each number of layers has its own plasmon, from the bulk's energy down to the monolayer's; edges have a mode of their
own, which the beam meets over a decay length of the electron's field; the tail of the zero loss is everywhere.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stem_gym.simulator.low_loss import LowLossRecipe, cell_centres_nm
from stem_gym.simulator.placement import count_between
from stem_gym.simulator.random_fields import WAVES, level_of, share_above, slope, smooth_field
from stem_gym.simulator.specimens import RandomRows
from stem_gym.simulator.spectra import (
    HBAR_C_EV_NM,
    Drude,
    beam_velocity,
    bulk_loss_per_nm,
)
from stem_gym.simulator.spectral_specimen import SpectralSpecimen

# MnPS3 (monoclinic, a = 6.077, b = 10.524, c = 6.796 Å, beta = 107.35°, four formulas a cell; Ouvrard, Brec and Rouxel,
# Mater. Res. Bull. 20, 1181, 1985): layers c sin(beta) apart, atoms per nm³ of the cell's 0.4149 nm³.
LAYER_NM = 0.649
ATOMS_PER_NM3 = (("Mn", 9.64), ("P", 9.64), ("S", 28.92))
_MOST_SIGMAS = 3.0  # of the spread of the energies
_PAD_LENGTHS = 6.0  # decay lengths of empty field around the cells, so that its other side does not shine through


class FlakesRecipe(LowLossRecipe):
    """Flakes of one to a few layers over vacuum, with terraces and holes.

    The components are the plasmon of each number of layers (free electrons, the loss per path of
    `spectra.bulk_loss_per_nm`), the edges' mode and the zero-loss tail. The plasmon's 19 eV of the bulk and 15 eV of
    the monolayer are measured (Kinyanjui et al., Phys. Rev. B 98, 035417, 2018); in between, the shift is taken to fall
    as 1 / layers, an assumption. So are the widths, the strength of the edge mode, its width, and its energy, for which
    the planar surface mode of the monolayer's electrons, 15 eV / √2, stands in. The edge mode falls with the distance d
    from an edge as exp(−d / length), length = hbar c beta gamma / (2 E): the intensity K1² of the electron's field.
    """

    kind: Literal["flakes"] = "flakes"
    fov_nm: float = Field(default=100.0, ge=20, le=1000, description="width of the field; cells are square")
    layers: int = Field(default=3, ge=1, le=6, description="most layers")
    coverage: tuple[float, float] = Field(default=(0.45, 0.75), description="share of the field that has a flake")
    thin_share: tuple[float, float] = Field(default=(0.2, 0.5), description="share of the terraces that has one layer")
    outline_waves: float = Field(default=2.0, ge=1, le=4, description="how ragged; about half waves along a side")
    holes: tuple[int, int] = Field(default=(0, 4), description="fewest and most holes")
    hole_nm: tuple[float, float] = Field(default=(2.0, 6.0), description="smallest and largest radius of a hole")
    bulk_ev: float = Field(default=19.0, gt=0, description="plasmon of the bulk")
    monolayer_ev: float = Field(default=15.0, gt=0, description="plasmon of one layer")
    bulk_width_ev: float = Field(default=6.0, gt=0, le=30, description="its damping; assumed")
    monolayer_width_ev: float = Field(
        default=8.0, gt=0, le=30, description="its damping; assumed, more than the bulk's"
    )
    edge_ev: float = Field(default=10.6, gt=0, description="energy of the edge mode; assumed, 15 / √2")
    edge_width_ev: float = Field(default=2.5, gt=0, le=30, description="its damping; assumed")
    edge_probability: float = Field(
        default=0.006, ge=0, le=0.5, description="its losses per electron at an edge; assumed"
    )
    energy_spread_ev: float = Field(default=0.2, ge=0, le=2, description="rms of both energies between specimens")
    first_ev: float = Field(default=4.0, gt=0, description="energy of the first channel")
    last_ev: float = Field(default=36.0, gt=0, description="energy of the last channel")
    zero_loss_fwhm_ev: float = Field(
        default=0.3, gt=0, le=2, description="width of the zero loss: a cold field emitter"
    )
    tail_per_ev: float = Field(default=1.0e-3, ge=0, le=1, description="zero-loss tail, first channel; assumed")
    tail_exponent: float = Field(default=2.0, ge=0, le=10, description="of the tail's power law; assumed")

    @model_validator(mode="after")
    def _possible(self) -> FlakesRecipe:
        self._check_range("coverage", 0.05, 0.95)
        self._check_range("thin_share", 0.0, 0.95)
        self._check_range("holes", 0, 16)
        self._check_range("hole_nm", 0.1, 0.5 * self.fov_nm)
        lowest = min(self.edge_ev, self.monolayer_ev, self.bulk_ev) - _MOST_SIGMAS * self.energy_spread_ev
        widest = max(self.edge_width_ev, self.monolayer_width_ev, self.bulk_width_ev)
        if lowest <= 0.5 * widest:
            raise ValueError(
                f"no width may exceed twice an energy; given {widest:g} eV wide, energies from {lowest:g} eV"
            )
        return self

    def build(
        self,
        streams: RandomRows,
        rows: Tensor,
        shape: tuple[int, int] = (64, 64),
        device: torch.device | str | None = None,
    ) -> SpectralSpecimen:
        """One specimen of H × W cells for each of `rows` (n,), drawn from their streams."""
        uniform = streams.uniform(rows, (3 + 3 * self.holes[1],)).to(device)
        normals = streams.normal(rows, (2 + 2 * WAVES * WAVES,)).to(device)
        outline, terraces = (
            smooth_field(part.reshape(-1, WAVES, WAVES), shape, self.outline_waves)
            for part in normals[:, 2:].chunk(2, dim=1)
        )
        cover, thin = (
            low + (high - low) * uniform[:, i] for i, (low, high) in enumerate((self.coverage, self.thin_share))
        )
        flake = share_above(outline, level_of(outline, 1.0 - cover)) * self._beside_holes(uniform[:, 2:], shape)
        of_layers = self._of_layers(flake, terraces, thin)
        edges = self._near_edges(flake)[:, None]
        loadings = torch.cat((of_layers, edges, torch.ones_like(edges)), dim=1).flatten(2).transpose(1, 2).contiguous()
        layers = (of_layers * self._numbers(of_layers.device)[:, None, None]).sum(1)
        image = 1.0 - torch.exp(-LAYER_NM * self.haadf_per_nm(ATOMS_PER_NM3) * layers)
        return SpectralSpecimen(
            image, loadings, self._components(self.energy_spread_ev * normals[:, :2].clamp(-_MOST_SIGMAS, _MOST_SIGMAS))
        )

    def localisation_nm(self) -> float:
        """Decay length of the edge mode's loss with the distance from the edge."""
        beta, gamma = beam_velocity(self.beam_kev)
        return HBAR_C_EV_NM * beta * gamma / (2.0 * self.edge_ev)

    def plasmon_ev(self) -> Tensor:
        """Plasmon energy of 1, 2, … layers."""
        return self.bulk_ev - (self.bulk_ev - self.monolayer_ev) / self._numbers(None)

    def _numbers(self, device: torch.device | str | None) -> Tensor:
        return torch.arange(1.0, self.layers + 1.0, device=device)

    def _beside_holes(self, uniform: Tensor, shape: tuple[int, int]) -> Tensor:
        """How much of each cell (n, H, W) no hole takes; uniforms (n, 1 + 3 · most holes)."""
        rows, most = len(uniform), self.holes[1]
        cells = cell_centres_nm(shape, self.fov_nm, device=uniform.device)
        pixel = self.fov_nm / shape[1]
        x, y, size = uniform[:, 1:].reshape(rows, 3, most).unbind(1)
        there = torch.arange(most, device=uniform.device) < count_between(uniform[:, :1], *self.holes)
        radius = torch.where(there, self.hole_nm[0] + (self.hole_nm[1] - self.hole_nm[0]) * size, -pixel)
        centre = torch.stack((x * self.fov_nm, y * pixel * shape[0]), dim=-1)
        distance = (cells[None, :, None] - centre[:, None]).norm(dim=-1) - radius[:, None]  # (n, P, holes)
        return (0.5 + distance / pixel).clamp(min=0.0, max=1.0).prod(-1).reshape(rows, *shape)

    def _of_layers(self, flake: Tensor, terraces: Tensor, thin: Tensor) -> Tensor:
        """How much of each cell is 1, 2, … layers thick, (n, layers, H, W); `thin` (n,) of the terraces have one."""
        steps = max(1, self.layers - 1)
        above = [torch.ones_like(flake)]
        above += [share_above(terraces, level_of(terraces, thin + (1.0 - thin) * n / steps)) for n in range(steps)]
        at_least = torch.stack((*above[: self.layers], torch.zeros_like(flake)), dim=1)
        return flake[:, None] * (at_least[:, :-1] - at_least[:, 1:])

    def _near_edges(self, flake: Tensor) -> Tensor:
        """Strength of the edge mode at each cell, (n, H, W): 1 at a straight edge, exp(−d / length) beside it.

        The length of edge in each cell is spread with the Green's function of 1 − length² Laplacian, K0(r / length) /
        (2 pi length²), whose sum along a straight line is exp(−d / length) / (2 length). The field's border is no edge.
        """
        pixel = self.fov_nm / flake.shape[2]
        length = self.localisation_nm() / pixel  # in cells
        pad = math.ceil(_PAD_LENGTHS * length)
        size = tuple(side + pad for side in flake.shape[1:])
        turns = (torch.fft.fftfreq(size[0], device=flake.device), torch.fft.rfftfreq(size[1], device=flake.device))
        curvature_y, curvature_x = (2.0 - 2.0 * torch.cos(2.0 * math.pi * turn) for turn in turns)
        spread = 2.0 * length / (1.0 + length**2 * (curvature_y[:, None] + curvature_x))
        edge = torch.fft.rfft2(slope(flake), s=size) * spread
        return torch.fft.irfft2(edge, s=size)[:, : flake.shape[1], : flake.shape[2]].clamp(min=0.0)

    def _components(self, shift_ev: Tensor) -> Tensor:
        """Signal per beam electron and channel of a unit of each component, (n, layers + 2, C); shifts (n, 2)."""
        source = self.source_ev(shift_ev.device)
        numbers = self._numbers(shift_ev.device)
        plasmon = self.plasmon_ev().to(shift_ev) + shift_ev[:, :1]  # (n, layers)
        width = self.bulk_width_ev - (self.bulk_width_ev - self.monolayer_width_ev) / numbers
        electrons = Drude(
            *(part.flatten() for part in torch.broadcast_tensors(torch.ones_like(plasmon), plasmon, width))
        )
        per_nm = bulk_loss_per_nm(electrons.permittivity(source), source, self.beam_kev, self.collection_mrad)
        layers = per_nm.reshape(*plasmon.shape, -1) * (LAYER_NM * numbers[:, None])
        at = self.edge_ev + shift_ev[:, 1]
        line = Drude(torch.ones_like(at), at, torch.full_like(at, self.edge_width_ev))
        edge = (-1.0 / line.permittivity(source)).imag * (self.edge_probability / loss_area_ev(line))[:, None]
        return self.signal(torch.cat((layers, edge[:, None]), dim=1))


def loss_area_ev(electrons: Drude) -> Tensor:
    """Integral of Im(−1/eps) over all energies, (n,), for free electrons (eps_inf 1) damped by less than 2 Ep."""
    plasma, damping = electrons.plasma_ev, electrons.damping_ev
    root = torch.sqrt(4.0 * plasma**2 - damping**2)
    return plasma**2 / root * (0.5 * math.pi + torch.atan((2.0 * plasma**2 - damping**2) / (damping * root)))
