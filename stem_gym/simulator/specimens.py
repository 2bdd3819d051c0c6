"""Specimens: atoms on a periodic rectangular cell, and recipes that make them by the batch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from stem_gym.core.config import Config
from stem_gym.core.elements import atomic_number_of
from stem_gym.core.errors import ConfigError, missing_extra
from stem_gym.core.periodic import nearest_image, wrapped
from stem_gym.simulator.lattices import Templates, cubic_points, graphene_lattice, mos2_lattice, supercells
from stem_gym.simulator.placement import bonds_left, choose_sites, count_between, random_rotation, trench

CARBON_THERMAL_ANG = 0.0424  # root of 0.0018 Å², in-plane at 300 K


class RandomRows(Protocol):
    """What a recipe needs of `stem_gym.core.streams.Streams`."""

    def uniform(self, rows: Tensor, shape: tuple[int, ...] = ()) -> Tensor: ...
    def normal(self, rows: Tensor, shape: tuple[int, ...] = ()) -> Tensor: ...


@dataclass(frozen=True)
class Specimen:
    """Atoms and contamination of B periodic cells; atoms are padded to K, blobs to C."""

    cell_ang: Tensor  # (B, 2)
    xy_ang: Tensor  # (B, K, 2)
    atomic_number: Tensor  # (B, K) int64
    present: Tensor  # (B, K) bool
    thermal_sigma_ang: Tensor  # (B, K) rms displacement per axis
    blob_xy_ang: Tensor  # (B, C, 2)
    blob_sigma_ang: Tensor  # (B, C)
    blob_weight_ang2: Tensor  # (B, C) integrated HAADF cross section of a blob

    def rows(self, index: Tensor) -> Specimen:
        """The specimens of the rows in `index` (n,)."""
        return Specimen(*(getattr(self, f.name)[index] for f in fields(self)))

    def with_rows(self, index: Tensor, other: Specimen) -> Specimen:
        """A copy in which the rows in `index` (n,) are those of `other`."""
        return Specimen(*(getattr(self, f.name).index_copy(0, index, getattr(other, f.name)) for f in fields(self)))

    def write_rows_(self, index: Tensor, other: Specimen) -> None:
        """Overwrite the rows in `index` (n,) with those of `other`, in place: for buffers that an instrument owns."""
        for f in fields(self):
            getattr(self, f.name)[index] = getattr(other, f.name)

    def to(self, device: torch.device | str | None) -> Specimen:
        """The specimens on a device; None leaves them where they are."""
        return self if device is None else Specimen(*(getattr(self, f.name).to(device) for f in fields(self)))

    def replace(self, **changes: Tensor) -> Specimen:
        """A copy with some fields replaced."""
        return replace(self, **changes)


class Dopant(Config):
    """Foreign atoms of one element, on the lattice's sites."""

    element: str
    count_min: int = Field(default=1, ge=0, le=64)
    count_max: int = Field(default=1, ge=0, le=64)
    site: Literal["metal", "chalcogen"] = Field(default="metal", description="sublattice; only where there are two")
    window_ang: float = Field(default=1000.0, gt=0, description="side of the square about the optical axis they are in")

    @field_validator("element")
    @classmethod
    def _known(cls, element: str) -> str:
        atomic_number_of(element)
        return element

    @model_validator(mode="after")
    def _ordered(self) -> Dopant:
        if self.count_max < self.count_min:
            raise ValueError(f"count_max must not be below count_min; given {self.count_min} to {self.count_max}")
        return self


class Contamination(Config):
    """Broad patches of hydrocarbon, in equivalents of carbon atoms."""

    blobs_max: int = Field(default=0, ge=0, le=32)
    sigma_min_ang: float = Field(default=3.0, gt=0, le=20)
    sigma_max_ang: float = Field(default=6.0, gt=0, le=20)
    atoms_min: float = Field(default=5.0, ge=0)
    atoms_max: float = Field(default=30.0, ge=0)
    atom_weight_ang2: float = Field(default=8.0e-4, gt=0, description="HAADF cross section of a carbon atom")


class GrapheneRecipe(Config):
    """A graphene sheet in random orientation with substitutional dopants, vacancies, an edge, and contamination."""

    kind: Literal["graphene"] = "graphene"
    cell_ang: float = Field(default=30.0, ge=8.0, le=200.0, description="wanted side; the lattice decides the rest")
    lattice_constant_ang: float = Field(default=2.46, gt=2.0, lt=3.0)
    dopants: tuple[Dopant, ...] = ()
    separation_ang: float = Field(default=4.0, ge=0, description="least distance between dopants and vacancies")
    vacancies_max: int = Field(default=0, ge=0, le=64)
    edge_probability: float = Field(default=0.0, ge=0, le=1)
    edge_width_fraction: tuple[float, float] = (0.2, 0.4)
    contamination: Contamination = Contamination()
    thermal_sigma_ang: float = Field(default=CARBON_THERMAL_ANG, ge=0, le=0.5, description="rms per axis")

    def templates(self) -> Templates:
        """The orientations that the sheet can have."""
        return supercells(graphene_lattice(self.lattice_constant_ang), self.cell_ang)

    @property
    def largest_cell_ang(self) -> tuple[float, float]:
        """Upper bounds (x, y) of the cells that the recipe makes."""
        return self.templates().largest_cell_ang

    def build(self, streams: RandomRows, rows: Tensor, device: torch.device | str | None = None) -> Specimen:
        """One specimen for each of `rows` (n,), drawn from their streams."""
        return self.build_bonded(streams, rows, device)[0]

    def build_bonded(
        self, streams: RandomRows, rows: Tensor, device: torch.device | str | None = None
    ) -> tuple[Specimen, Tensor]:
        """The specimens, and the three neighbours (n, K, 3) of each lattice site, its own index where it has fewer."""
        sheet, neighbours = draw_lattice(self.templates(), streams, rows, device)
        free = sheet.present  # in a whole sheet all have three neighbours
        if self.edge_probability > 0.0:
            sheet = self._with_edge(sheet, neighbours, streams, rows)
            free = sheet.present & (bonds_left(sheet.present, neighbours) == 3)
        sheet, free = substitute(sheet, free, self.dopants, self.separation_ang, (streams, rows))
        sheet, _ = vacate(sheet, free, self.vacancies_max, self.separation_ang, (streams, rows))
        sigma = torch.full_like(sheet.thermal_sigma_ang, self.thermal_sigma_ang)
        sheet = add_contamination(sheet.replace(thermal_sigma_ang=sigma), self.contamination, streams, rows)
        return sheet, neighbours

    def _with_edge(self, sheet: Specimen, neighbours: Tensor, streams: RandomRows, rows: Tensor) -> Specimen:
        uniform = streams.uniform(rows, (6,)).to(sheet.cell_ang.device)
        cut = trench(sheet.xy_ang, sheet.cell_ang, uniform[:, 1:], self.edge_width_fraction)
        present = sheet.present & ~(cut & (uniform[:, :1] < self.edge_probability))
        for _ in range(2):  # atoms left hanging by one bond do not survive
            present = present & (bonds_left(present, neighbours) >= 2)
        return sheet.replace(present=present)


class MoS2Recipe(Config):
    """A 2H MoS2 monolayer in random orientation with dopants on either sublattice and sulphur vacancies.

    The two S of a column are two atoms at one place; a vacancy takes one of them.
    """

    kind: Literal["mos2"] = "mos2"
    cell_ang: float = Field(default=30.0, ge=8.0, le=200.0, description="wanted side; the lattice decides the rest")
    lattice_constant_ang: float = Field(default=3.16, gt=2.5, lt=4.0)
    dopants: tuple[Dopant, ...] = ()
    separation_ang: float = Field(default=4.0, ge=0, description="least distance between dopants and vacancies")
    sulphur_vacancies_max: int = Field(default=0, ge=0, le=64)
    contamination: Contamination = Contamination()
    metal_sigma_ang: float = Field(default=0.06, ge=0, le=0.5, description="thermal, rms per axis")
    sulphur_sigma_ang: float = Field(default=0.07, ge=0, le=0.5, description="thermal, rms per axis")

    def templates(self) -> Templates:
        """The orientations that the layer can have."""
        return supercells(mos2_lattice(self.lattice_constant_ang), self.cell_ang)

    @property
    def largest_cell_ang(self) -> tuple[float, float]:
        """Upper bounds (x, y) of the cells that the recipe makes."""
        return self.templates().largest_cell_ang

    def build(self, streams: RandomRows, rows: Tensor, device: torch.device | str | None = None) -> Specimen:
        """One specimen for each of `rows` (n,), drawn from their streams."""
        sheet, _ = draw_lattice(self.templates(), streams, rows, device)
        metal, sulphur = sheet.atomic_number == 42, sheet.atomic_number == 16
        sigma = torch.where(metal, self.metal_sigma_ang, self.sulphur_sigma_ang).to(sheet.thermal_sigma_ang)
        sheet = sheet.replace(thermal_sigma_ang=sigma)
        draw = (streams, rows)
        on_metal = tuple(d for d in self.dopants if d.site == "metal")
        on_sulphur = tuple(d for d in self.dopants if d.site == "chalcogen")
        sheet, _ = substitute(sheet, metal, on_metal, self.separation_ang, draw)
        sheet, sulphur = substitute(sheet, sulphur, on_sulphur, self.separation_ang, draw)
        sheet, _ = vacate(sheet, sulphur, self.sulphur_vacancies_max, self.separation_ang, draw)
        return add_contamination(sheet, self.contamination, streams, rows)


class NanoparticleRecipe(Config):
    """A face-centred cubic particle in random orientation on a thin film of amorphous carbon.

    Depth is not kept: the image is the incoherent, projected one, good for a few nanometres off a zone axis.
    """

    kind: Literal["nanoparticle"] = "nanoparticle"
    cell_ang: float = Field(default=40.0, ge=15.0, le=200.0)
    element: str = "Au"
    lattice_constant_ang: float = Field(default=4.08, gt=2.0, lt=7.0)
    radius_min_ang: float = Field(default=5.0, gt=1.0, le=30.0)
    radius_max_ang: float = Field(default=9.0, gt=1.0, le=30.0)
    film_ang: float = Field(default=6.0, ge=0.0, le=100.0, description="thickness of the film")
    film_density_per_ang3: float = Field(default=0.1, gt=0.0, le=0.2, description="0.1 is 2 g/cm3 of carbon")
    thermal_sigma_ang: float = Field(default=0.08, ge=0, le=0.5, description="rms per axis")

    @field_validator("element")
    @classmethod
    def _known(cls, element: str) -> str:
        atomic_number_of(element)
        return element

    @model_validator(mode="after")
    def _ordered(self) -> NanoparticleRecipe:
        if not self.radius_min_ang <= self.radius_max_ang <= 0.5 * self.cell_ang:
            raise ValueError("radius_min_ang <= radius_max_ang <= half of cell_ang must hold")
        return self

    @property
    def largest_cell_ang(self) -> tuple[float, float]:
        """The cell (x, y), the same for every row."""
        return self.cell_ang, self.cell_ang

    def build(self, streams: RandomRows, rows: Tensor, device: torch.device | str | None = None) -> Specimen:
        """One specimen for each of `rows` (n,), drawn from their streams."""
        film = int(self.film_ang * self.film_density_per_ang3 * self.cell_ang**2)
        uniform = streams.uniform(rows, (9 + 2 * film,)).to(device)
        lattice = torch.as_tensor(cubic_points(self.radius_max_ang / self.lattice_constant_ang), device=uniform.device)
        lattice = lattice.to(torch.float32) * self.lattice_constant_ang
        turn = random_rotation(uniform[:, :3])
        points = (lattice[None] + self.lattice_constant_ang * uniform[:, None, 3:6]) @ turn.transpose(1, 2)
        radius = self.radius_min_ang + (self.radius_max_ang - self.radius_min_ang) * uniform[:, 6:7]
        inside = points.norm(dim=-1) <= radius
        particle = points[..., :2] + self.cell_ang * uniform[:, None, 7:9]
        carbon = self.cell_ang * uniform[:, 9:].reshape(len(rows), film, 2)
        xy = torch.remainder(torch.cat((particle, carbon), dim=1), self.cell_ang)
        number = torch.full(xy.shape[:2], 6, dtype=torch.int64, device=xy.device)
        number[:, : len(lattice)] = atomic_number_of(self.element)
        present = torch.cat((inside, torch.ones_like(carbon[..., 0], dtype=torch.bool)), dim=1)
        none = xy.new_zeros((len(rows), 0))
        cell = xy.new_full((len(rows), 2), self.cell_ang)
        sigma = torch.full_like(xy[..., 0], self.thermal_sigma_ang)
        return Specimen(cell, xy, number, present, sigma, none[..., None].expand(-1, -1, 2), none, none)


class AtomsRecipe(Config):
    """The atoms of a file that ASE reads, seen along z, at a random place of their periodic cell."""

    kind: Literal["atoms"] = "atoms"
    file: str
    repeat: tuple[int, int] = (1, 1)
    thermal_sigma_ang: float = Field(default=CARBON_THERMAL_ANG, ge=0, le=0.5, description="rms per axis")

    @property
    def largest_cell_ang(self) -> tuple[float, float]:
        """The cell (x, y), the same for every row."""
        x, y = self._one().cell_ang[0].tolist()
        return x, y

    def build(self, streams: RandomRows, rows: Tensor, device: torch.device | str | None = None) -> Specimen:
        """One specimen for each of `rows` (n,), shifted at random."""
        template = self._one()
        one = template.rows(torch.zeros(len(rows), dtype=torch.int64)).to(device)
        shift = streams.uniform(rows, (1, 2)).to(device) * one.cell_ang[:, None]
        return one.replace(xy_ang=torch.remainder(one.xy_ang + shift, one.cell_ang[:, None]))

    def _one(self) -> Specimen:
        return _read_atoms(self.file, self.repeat, self.thermal_sigma_ang)


Recipe = Annotated[
    GrapheneRecipe | MoS2Recipe | NanoparticleRecipe | AtomsRecipe,
    Field(discriminator="kind"),
]


def specimen_from_atoms(
    atoms: Any, batch: int = 1, device: torch.device | str | None = None, thermal_sigma_ang: float = CARBON_THERMAL_ANG
) -> Specimen:
    """`batch` equal specimens from an `ase.Atoms`, projected along z; z itself is not used.

    The cell must be rectangular in the plane; atoms without a cell get one with 5 Å of vacuum around them. Raises
    ConfigError for a cell that is not rectangular or no atoms at all.
    """
    cell = np.asarray(atoms.cell, dtype=float)[:2]
    xy = np.asarray(atoms.positions, dtype=float)[:, :2]
    if len(xy) == 0:
        raise ConfigError("There are no atoms; give at least one.")
    if not np.any(cell):
        low, high = xy.min(axis=0) - 5.0, xy.max(axis=0) + 5.0
        xy, cell = xy - low, np.diag(high - low)
    sides = np.diag(cell[:, :2])
    if np.any(sides <= 0.0) or not np.allclose(cell, np.hstack((np.diag(sides), np.zeros((2, cell.shape[1] - 2))))):
        raise ConfigError(f"The cell must be a rectangle along x and y; given {cell.tolist()}. Try a supercell.")
    one = Specimen(
        cell_ang=torch.tensor(sides, dtype=torch.float32)[None],
        xy_ang=torch.tensor(xy % sides, dtype=torch.float32)[None],
        atomic_number=torch.tensor(np.asarray(atoms.numbers), dtype=torch.int64)[None],
        present=torch.ones((1, len(xy)), dtype=torch.bool),
        thermal_sigma_ang=torch.full((1, len(xy)), thermal_sigma_ang),
        blob_xy_ang=torch.zeros((1, 0, 2)),
        blob_sigma_ang=torch.zeros((1, 0)),
        blob_weight_ang2=torch.zeros((1, 0)),
    )
    return one.rows(torch.zeros(batch, dtype=torch.int64)).to(device)


@lru_cache(maxsize=8)
def _read_atoms(file: str, repeat: tuple[int, int], thermal_sigma_ang: float) -> Specimen:
    """One specimen from a file; raises ConfigError when ASE can not read it, MissingExtraError without ASE."""
    try:
        from ase.io import read
    except ImportError as error:
        raise missing_extra("Reading atoms from a file", "physics") from error
    try:
        atoms = read(file)
    except Exception as error:  # ASE's readers raise whatever their format's parser does
        raise ConfigError(f"No atoms could be read from {file!r}: {error!r}.") from error
    return specimen_from_atoms(atoms * (*repeat, 1), thermal_sigma_ang=thermal_sigma_ang)


def put(values: Tensor, site: Tensor, found: Tensor, value: int | bool) -> Tensor:
    """A copy of values (B, K) with `value` at sites (B, J) where `found` (B, J); what was not found may name any."""
    there = torch.zeros(values.shape, device=values.device).scatter_add_(1, site, found.float()) > 0.0
    return values.masked_fill(there, value)


def substitute(
    sheet: Specimen, free: Tensor, dopants: tuple[Dopant, ...], separation_ang: float, draw: tuple[RandomRows, Tensor]
) -> tuple[Specimen, Tensor]:
    """The specimen with dopants on `free` sites (B, K), and the sites still free; `draw` is (streams, rows)."""
    for dopant in dopants:
        x, y = nearest_image(sheet.xy_ang, sheet.cell_ang.unsqueeze(1)).abs().unbind(-1)
        inside = torch.maximum(x, y) < 0.5 * dopant.window_ang
        counts = (dopant.count_min, dopant.count_max)
        site, found, left = _draw_sites(sheet, free & inside, counts, separation_ang, draw)
        free = left | (free & ~inside)
        sheet = sheet.replace(atomic_number=put(sheet.atomic_number, site, found, atomic_number_of(dopant.element)))
    return sheet, free


def vacate(
    sheet: Specimen, free: Tensor, most: int, separation_ang: float, draw: tuple[RandomRows, Tensor]
) -> tuple[Specimen, Tensor]:
    """The specimen with 0 to `most` of the `free` sites (B, K) empty, and the sites that are still free."""
    if most == 0:
        return sheet, free
    site, found, free = _draw_sites(sheet, free, (0, most), separation_ang, draw)
    return sheet.replace(present=put(sheet.present, site, found, False)), free


def _draw_sites(
    sheet: Specimen, free: Tensor, counts: tuple[int, int], separation_ang: float, draw: tuple[RandomRows, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Random sites (B, counts[1]), which of them count, and what is still free (B, K)."""
    streams, rows = draw
    uniform = streams.uniform(rows, (1 + free.shape[1],)).to(free.device)
    count = count_between(uniform[:, 0], *counts)
    return choose_sites(uniform[:, 1:], free, sheet.xy_ang, sheet.cell_ang, count, counts[1], separation_ang)


def draw_lattice(
    templates: Templates, streams: RandomRows, rows: Tensor, device: torch.device | str | None
) -> tuple[Specimen, Tensor]:
    """A lattice in random orientation, place and handedness for each of `rows`, and its neighbours (n, K, 3)."""
    uniform = streams.uniform(rows, (4,)).to(device)
    device = uniform.device
    choice = torch.floor(uniform[:, 0] * len(templates.cell_ang)).to(torch.int64)
    cell, xy = (
        torch.as_tensor(a, dtype=torch.float32, device=device)[choice] for a in (templates.cell_ang, templates.xy_ang)
    )
    number, neighbours = (
        torch.as_tensor(a, device=device)[choice] for a in (templates.atomic_number, templates.neighbours)
    )
    mirror = torch.where(uniform[:, 3:] < 0.5, -1.0, 1.0)
    x = xy[..., 0] * mirror + uniform[:, 1:2] * cell[:, :1]
    y = xy[..., 1] + uniform[:, 2:3] * cell[:, 1:]
    xy = torch.stack((wrapped(x, cell[:, :1]), wrapped(y, cell[:, 1:])), dim=-1)
    none = cell.new_zeros((len(cell), 0))
    blank = torch.zeros_like(x)
    sheet = Specimen(cell, xy, number, number > 0, blank, cell.new_zeros((len(cell), 0, 2)), none, none)
    return sheet, neighbours


def add_contamination(specimen: Specimen, contamination: Contamination, streams: RandomRows, rows: Tensor) -> Specimen:
    """The specimen with 0 to `blobs_max` random blobs."""
    blobs = contamination.blobs_max
    if blobs == 0:
        return specimen
    uniform = streams.uniform(rows, (1 + 4 * blobs,)).to(specimen.cell_ang.device)
    count = count_between(uniform[:, 0], 0, blobs)
    x, y, width, strength = uniform[:, 1:].reshape(-1, 4, blobs).unbind(1)
    place = torch.stack((x, y), dim=-1) * specimen.cell_ang[:, None, :]
    sigma = contamination.sigma_min_ang + (contamination.sigma_max_ang - contamination.sigma_min_ang) * width
    atoms = contamination.atoms_min + (contamination.atoms_max - contamination.atoms_min) * strength
    there = torch.arange(blobs, device=count.device)[None, :] < count[:, None]
    weight = torch.where(there, atoms * contamination.atom_weight_ang2, torch.zeros_like(atoms))
    return specimen.replace(blob_xy_ang=place, blob_sigma_ang=sigma, blob_weight_ang2=weight)
