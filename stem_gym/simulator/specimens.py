"""Specimens: atoms on a periodic rectangular cell, and recipes that make them by the batch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from stem_gym.core.errors import ConfigError
from stem_gym.simulator.lattices import Templates, graphene_lattice, supercells
from stem_gym.simulator.placement import bonds_left, choose_sites, count_between, trench

SYMBOLS = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb Mo Tc "
    "Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi"
).split()
CARBON_THERMAL_ANG = 0.0424  # root of 0.0018 Ang^2, in-plane at 300 K


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

    def replace(self, **changes: Tensor) -> Specimen:
        """A copy with some fields replaced."""
        return replace(self, **changes)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Dopant(_Strict):
    """Foreign atoms of one element."""

    element: str
    count_min: int = Field(1, ge=0, le=64)
    count_max: int = Field(1, ge=0, le=64)


class Contamination(_Strict):
    """Broad patches of hydrocarbon, in equivalents of carbon atoms."""

    blobs_max: int = Field(0, ge=0, le=32)
    sigma_min_ang: float = Field(3.0, gt=0, le=20)
    sigma_max_ang: float = Field(6.0, gt=0, le=20)
    atoms_min: float = Field(5.0, ge=0)
    atoms_max: float = Field(30.0, ge=0)
    atom_weight_ang2: float = Field(7.0e-4, gt=0)


class GrapheneRecipe(_Strict):
    """A graphene sheet in random orientation with substitutional dopants, vacancies, perhaps an edge, and contamination."""

    kind: Literal["graphene"] = "graphene"
    cell_ang: float = Field(30.0, ge=8.0, le=200.0)
    lattice_constant_ang: float = Field(2.46, gt=2.0, lt=3.0)
    dopants: tuple[Dopant, ...] = ()
    dopant_separation_ang: float = Field(4.0, ge=0)
    vacancies_max: int = Field(0, ge=0, le=64)
    edge_probability: float = Field(0.0, ge=0, le=1)
    edge_width_fraction: tuple[float, float] = (0.2, 0.4)
    contamination: Contamination = Contamination()
    thermal_sigma_ang: float = Field(CARBON_THERMAL_ANG, ge=0, le=0.5)

    def templates(self) -> Templates:
        """The orientations that the sheet can have."""
        return supercells(graphene_lattice(self.lattice_constant_ang), self.cell_ang)

    @property
    def largest_cell_ang(self) -> tuple[float, float]:
        """Upper bounds (x, y) of the cells that the recipe makes."""
        x, y = self.templates().cell_ang.max(axis=0)
        return float(x), float(y)

    def build(self, streams: RandomRows, rows: Tensor, device: torch.device | str | None = None) -> Specimen:
        """One specimen for each of `rows` (n,), drawn from their streams."""
        sheet, neighbours = draw_lattice(self.templates(), streams, rows, device)
        present = sheet.present
        if self.edge_probability > 0.0:
            uniform = streams.uniform(rows, (6,))
            cut = trench(sheet.xy_ang, sheet.cell_ang, uniform[:, 1:], self.edge_width_fraction)
            present = present & ~(cut & (uniform[:, :1] < self.edge_probability))
            for _ in range(2):  # atoms left hanging by one bond do not survive
                present = present & (bonds_left(present, neighbours) >= 2)
        free = present & (bonds_left(present, neighbours) == 3)
        number = sheet.atomic_number
        for dopant in self.dopants:
            uniform = streams.uniform(rows, (1 + free.shape[1],))
            count = count_between(uniform[:, 0], dopant.count_min, dopant.count_max)
            site, found, free = choose_sites(
                uniform[:, 1:], free, sheet.xy_ang, sheet.cell_ang, count, dopant.count_max, self.dopant_separation_ang
            )
            number = put(number, site, found, atomic_number_of(dopant.element))
        if self.vacancies_max > 0:
            uniform = streams.uniform(rows, (1 + free.shape[1],))
            count = count_between(uniform[:, 0], 0, self.vacancies_max)
            site, found, free = choose_sites(
                uniform[:, 1:],
                free,
                sheet.xy_ang,
                sheet.cell_ang,
                count,
                self.vacancies_max,
                self.dopant_separation_ang,
            )
            present = put(present, site, found, False)
        sigma = torch.full_like(sheet.thermal_sigma_ang, self.thermal_sigma_ang)
        sheet = sheet.replace(atomic_number=number, present=present, thermal_sigma_ang=sigma)
        return add_contamination(sheet, self.contamination, streams, rows)


Recipe = Annotated[GrapheneRecipe, Field(discriminator="kind")]


def atomic_number_of(symbol: str) -> int:
    """Atomic number of an element's symbol; raises ConfigError for one that is not known."""
    if symbol not in SYMBOLS[1:]:
        raise ConfigError(f"Unknown element {symbol!r}; give a symbol such as 'Si'.")
    return SYMBOLS.index(symbol)


def put(values: Tensor, site: Tensor, found: Tensor, value: int | bool) -> Tensor:
    """A copy of values (B, K) with `value` at sites (B, J) where `found` (B, J)."""
    fresh = torch.where(found, torch.full_like(values.gather(1, site), value), values.gather(1, site))
    return values.scatter(1, site, fresh)


def draw_lattice(
    templates: Templates, streams: RandomRows, rows: Tensor, device: torch.device | str | None
) -> tuple[Specimen, Tensor]:
    """A lattice in random orientation, place and handedness for each of `rows`, and its neighbours (n, K, 3)."""
    uniform = streams.uniform(rows, (4,)).to(device)
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
    xy = torch.remainder(torch.stack((x, y), dim=-1), cell[:, None, :])
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
