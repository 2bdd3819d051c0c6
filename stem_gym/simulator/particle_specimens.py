"""Clusters of plasmonic nanoparticles on a film: their image and their low-loss spectra, as few components.

The physics is that of `stem_gym.simulator.spectra`; this file draws the specimens and keeps the cost of a whole field
of spectra low. Spheres rest on the film, which does not change their modes, and the bulk and surface parts add up:
assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stem_gym.simulator.clusters import ClusterPlan, place_spheres
from stem_gym.simulator.low_loss import Composition, LowLossRecipe, cell_centres_nm
from stem_gym.simulator.random_fields import WAVES, smooth_field
from stem_gym.simulator.specimens import RandomRows
from stem_gym.simulator.spectra import (
    Drude,
    Modes,
    bulk_loss_per_nm,
    chord_nm,
    dipole_modes,
    field_shape,
    loss_prefactor,
    radial_field,
)
from stem_gym.simulator.spectral_specimen import SpectralSpecimen

_ROWS_AT_ONCE = 8  # of the field at all cells, which is the largest thing here: 2 MB a row
_TABLE_POINTS = 1024  # of the field against the logarithm of the distance; straight lines between them leave 1e-5
_TYPICAL_DISTANCE = 1.5  # in radii of the mean sphere: where the spectra of the spheres are strongest
_FILM_WAVES = 2.0  # the film's thickness changes over half a field


@dataclass(frozen=True)
class Material:
    """A metal or a doped oxide: Drude's parameters, and how many atoms of which element are in a nm³."""

    drude: tuple[float, float, float]  # eps_inf, Ep and Gamma in eV
    atoms_per_nm3: Composition


# Drude: simple fits for the plasmon region alone (interband absorption of Ag above 3.8 eV and of Au above 2.4 eV is not
# in them); the oxide is one like In2O3:Sn at a common doping. Densities: 7.18 g/cm3 of In2O3 (277.64 u), 10.49 of Ag,
# 19.3 of Au, 2.70 of Al (CRC Handbook), 2.0 of amorphous carbon.
MATERIALS = {
    "doped_oxide": Material((4.0, 1.96, 0.1), (("In", 31.1), ("O", 46.7))),
    "silver": Material((4.0, 9.1, 0.15), (("Ag", 58.6),)),
    "gold": Material((9.5, 9.0, 0.1), (("Au", 59.0),)),
    "aluminium": Material((1.0, 15.0, 0.6), (("Al", 60.3),)),
}
# Amorphous carbon as free electrons: 24 eV and a width of 20 eV are its broad plasmon (Egerton 2011, table C.2 gives
# 24 eV); only its slowly rising foot is seen here, an assumption.
FILM = Material((1.0, 24.0, 20.0), (("C", 100.0),))


class ParticlesRecipe(LowLossRecipe):
    """Clusters and single spheres of one material on a carbon film, seen by low-loss spectroscopy.

    The components of a specimen with room for N spheres are its 3 N dipole modes, the bulk of the spheres, the film,
    and the tail of the zero loss. A mode's loading takes the electron's field at the mode's resonance energy (by a
    parabola through the lowest, middle and highest of the specimen's modes); its component is the mode's response times
    the field's slope with energy at 1.5 mean radii. Against the sum over energies with the field at each, the channels
    of a spectrum miss 1 % of its highest (doped oxide, silver, gold) or 2 % (aluminium) at the median and 4 % or 8 % at
    most, among spectra of at least a twentieth of the field's strongest; far away, where little is left, more. A beam
    inside a sphere meets the field that `spectra` gives it there: finite, an assumption.
    """

    kind: Literal["particles"] = "particles"
    material: Literal["doped_oxide", "silver", "gold", "aluminium"] = "doped_oxide"
    plasma_spread: float = Field(default=0.03, ge=0, le=0.2, description="relative rms of Ep from specimen to specimen")
    fov_nm: float = Field(default=120.0, ge=40, le=400, description="width of the field; cells are square")
    clusters: tuple[int, int] = Field(default=(1, 1), description="fewest and most clusters")
    spheres: tuple[int, int] = Field(default=(3, 8), description="fewest and most spheres of a cluster")
    isolated: tuple[int, int] = Field(default=(0, 3), description="fewest and most spheres by themselves")
    radius_nm: tuple[float, float] = Field(default=(5.0, 12.0), description="smallest and largest")
    gap_nm: tuple[float, float] = Field(default=(0.5, 3.0), description="between neighbours of a cluster, from above")
    isolation_nm: float = Field(default=6.0, ge=0, le=100, description="least gap to others, of the single ones")
    film_nm: float = Field(default=5.0, ge=0, le=50, description="mean thickness of the carbon film")
    film_spread: float = Field(default=0.15, ge=0, le=0.5, description="relative rms of the film's thickness")
    first_ev: float = Field(default=0.3, gt=0, description="energy of the first channel")
    last_ev: float = Field(default=1.4, gt=0, description="energy of the last channel")
    zero_loss_fwhm_ev: float = Field(default=0.05, gt=0, le=2, description="width of the zero loss: monochromated")
    tail_per_ev: float = Field(default=0.01, ge=0, le=1, description="zero-loss tail, first channel; assumed")
    tail_exponent: float = Field(default=3.0, ge=0, le=10, description="of the tail's power law; assumed")

    @model_validator(mode="after")
    def _possible(self) -> ParticlesRecipe:
        self._check_range("clusters", 0, 3)
        self._check_range("spheres", 1, 8)
        self._check_range("isolated", 0, 8)
        self._check_range("radius_nm", 1.0, 0.15 * self.fov_nm)
        self._check_range("gap_nm", 0.2, 50.0)
        if self._plan().slots == 0:
            raise ValueError("there must be room for a sphere: clusters or isolated above zero")
        return self

    def build(
        self,
        streams: RandomRows,
        rows: Tensor,
        shape: tuple[int, int] = (64, 64),
        device: torch.device | str | None = None,
    ) -> SpectralSpecimen:
        """One specimen of H × W cells for each of `rows` (n,), drawn from their streams."""
        plan = self._plan()
        placing = streams.uniform(rows, (plan.draws,)).to(device)
        normals = streams.normal(rows, (1 + WAVES * WAVES,)).to(device)
        field = (self.fov_nm, self.fov_nm * shape[0] / shape[1])
        xy, radius = place_spheres(placing, plan, field)
        centre = torch.cat((xy, radius[..., None]), dim=-1)  # a sphere of radius a rests on the film at z = 0
        material = self.drude(normals[:, 0])
        waves = smooth_field(normals[:, 1:].reshape(-1, WAVES, WAVES), shape, _FILM_WAVES)
        film = (self.film_nm * (1.0 + self.film_spread * waves)).clamp(min=0.0)
        modes = dipole_modes(centre, radius)
        cells = cell_centres_nm(shape, self.fov_nm, device=xy.device)
        count = modes.eigenvalue.shape[1]
        loadings = torch.ones((len(rows), len(cells), count + 3), device=xy.device)  # the last is the zero-loss tail
        for part in torch.arange(len(rows), device=xy.device).split(_ROWS_AT_ONCE):
            strength, path = self._loadings(cells, centre[part], radius[part], modes.rows(part), material.rows(part))
            loadings[part, :, :count], loadings[part, :, count] = strength, path
        loadings[..., count + 1] = film.flatten(1)
        scattered = loadings[..., count] * self.haadf_per_nm(MATERIALS[self.material].atoms_per_nm3)
        scattered = scattered + loadings[..., count + 1] * self.haadf_per_nm(FILM.atoms_per_nm3)
        image = (1.0 - torch.exp(-scattered)).reshape(-1, *shape)
        return SpectralSpecimen(image, loadings, self._components(modes, material, radius))

    def drude(self, normal: Tensor) -> Drude:
        """The material of each specimen, its plasma energy varied by standard normals (n,)."""
        background, plasma, damping = MATERIALS[self.material].drude
        varied = plasma * (1.0 + self.plasma_spread * normal.clamp(min=-3.0, max=3.0))
        return Drude(torch.full_like(normal, background), varied, torch.full_like(normal, damping))

    def _plan(self) -> ClusterPlan:
        return ClusterPlan(self.clusters, self.spheres, self.isolated, self.radius_nm, self.gap_nm, self.isolation_nm)

    def _loadings(
        self, cells: Tensor, centre: Tensor, radius: Tensor, modes: Modes, material: Drude
    ) -> tuple[Tensor, Tensor]:
        """Strength of each mode (n, P, 3N) per eV and the path inside spheres (n, P) in nm, at cells (P, 2)."""
        energy = material.mode_energy_ev(modes.eigenvalue)
        nodes, share = interpolation(energy)
        offset = centre[:, None, :, :2] - cells[:, None]
        squared = (offset * offset).sum(-1)
        radial = self._radial(torch.maximum(squared, radius[:, None] ** 2), nodes).unbind(-1)
        pairs = zip(radial[::2], radial[1::2], strict=True)
        fields = torch.cat([field_shape(offset, pair) for pair in pairs], dim=-1)
        turn = modes.amplitudes(centre[..., 2], energy[:, None], self.beam_kev)
        amplitude = fields @ (turn * share.repeat(1, 1, 2)[:, :, None]).flatten(1, 2)
        real, imaginary = (amplitude * amplitude).chunk(2, dim=-1)
        strength = (real + imaginary) * loss_prefactor(energy, self.beam_kev)[:, None]
        return strength, chord_nm(torch.sqrt(squared), radius[:, None]).sum(-1)

    def _radial(self, squared_nm2: Tensor, nodes_ev: Tensor) -> Tensor:
        """`radial_field` at squared distances (n, P, N) and energies (n, k), as (n, P, N, 2k), from a table a row."""
        least, most = 2.0 * math.log(self.radius_nm[0]), 2.0 * math.log(4.0 * self.fov_nm)
        points = torch.linspace(least, most, _TABLE_POINTS, device=squared_nm2.device)
        distance = torch.exp(0.5 * points)
        pairs = [radial_field(distance, energy[:, None], self.beam_kev) for energy in nodes_ev.unbind(1)]
        table = torch.stack([part for pair in pairs for part in pair], dim=-1)  # (n, points, 2k)
        # An absent sphere, whose modes have no strength, may stand anywhere: its place is kept inside the table.
        place = (torch.log(squared_nm2) - least) * ((_TABLE_POINTS - 1) / (most - least))
        place = place.clamp(min=0.0, max=_TABLE_POINTS - 1.001)
        left = place.to(torch.int64)
        first = (_TABLE_POINTS * torch.arange(len(table), device=place.device))[:, None, None]
        index, flat = (left + first).flatten(), table.flatten(0, 1)
        along = (place - left).flatten()[:, None]
        values = torch.lerp(flat.index_select(0, index), flat.index_select(0, index + 1), along)
        return values.reshape(*place.shape, table.shape[-1])

    def _components(self, modes: Modes, material: Drude, radius: Tensor) -> Tensor:
        """Signal per beam electron and channel of a unit of each component, (n, 3N + 3, C)."""
        source = self.source_ev(radius.device)
        of_film = Drude(*(torch.full_like(material.plasma_ev, value) for value in FILM.drude))
        bulk, film = (
            bulk_loss_per_nm(m.permittivity(source), source, self.beam_kev, self.collection_mrad)[:, None]
            for m in (material, of_film)
        )
        # The field's own slope, as it is where the spectra are strong.
        typical = _TYPICAL_DISTANCE * radius.sum(1) / (radius > 0.0).sum(1).clamp(min=1)
        typical = typical.clamp(min=self.radius_nm[0])[:, None]
        resonance = material.mode_energy_ev(modes.eigenvalue)
        slope = self._strength(typical, source)[:, None] / self._strength(typical, resonance)[..., None]
        return self.signal(torch.cat((slope * modes.response(material, source), bulk, film), dim=1))

    def _strength(self, distance_nm: Tensor, energy_ev: Tensor) -> Tensor:
        """P |F|² at distances (n, 1) and energies (n or 1, C), (n, C)."""
        across, along = radial_field(distance_nm, energy_ev, self.beam_kev)
        return ((across * distance_nm) ** 2 + along**2) * loss_prefactor(energy_ev, self.beam_kev)


def interpolation(energy_ev: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest, middle and highest (n, 3) of energies (n, K), and Lagrange's weights of these for each, (n, 3, K)."""
    low, high = energy_ev.amin(1, keepdim=True), energy_ev.amax(1, keepdim=True)
    t = (energy_ev - low) / (high - low).clamp(min=1e-9)  # 0 to 1
    weights = torch.stack(((1.0 - t) * (1.0 - 2.0 * t), 4.0 * t * (1.0 - t), t * (2.0 * t - 1.0)), dim=1)
    return torch.cat((low, 0.5 * (low + high), high), dim=1), weights
