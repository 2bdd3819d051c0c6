"""The specimens of the abTEM reference set: small periodic cells with everything an image surrogate must have seen.

Each specimen is drawn from its own generator, so that number i of a set is the same whatever was made before it.
Cells are near-rectangular supercells of the rotated lattice, sheared by at most 3° to be exactly rectangular and
periodic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

__all__ = ["HELD_OUT", "RECIPES", "UNSEEN", "ReferenceSpecimen", "held_out_specimen", "training_specimen"]

_CARBON = 6
_GRAPHENE_DOPANTS = (5, 7, 8, 13, 14, 15, 16, 24, 26, 34)  # B N O Al Si P S Cr Fe Se
_METAL_DOPANTS = (23, 41, 74, 75)  # V Nb W Re on the metal site of a dichalcogenide
_CHALCOGEN_DOPANTS = (8, 34, 52)  # O Se Te on the chalcogen site
_CLUSTER_METALS = {
    46: 3.89,
    47: 4.09,
    78: 3.92,
    79: 4.08,
}  # fcc lattice constants in Å (Kittel, Solid State Physics, 8th ed.)
_GRAPHENE_A_ANG = 2.46
_MOS2_A_ANG = 3.16  # Wilson & Yoffe, Adv. Phys. 18, 193 (1969)
_MOS2_HALF_THICKNESS_ANG = 1.56
_ADATOM_HEIGHT_ANG = 3.0

# Kinds that no training specimen contains: they show what happens just outside the training set.
UNSEEN = frozenset({"graphene_unseen_dopants", "mos2_unseen_dopants", "gold_cluster"})


@dataclass(frozen=True)
class ReferenceSpecimen:
    """One periodic specimen of K atoms in slices of equal thickness."""

    kind: str
    cell_ang: np.ndarray  # (2,)
    xy_ang: np.ndarray  # (K, 2)
    layer: np.ndarray  # (K,) slice number of each atom, 0 is where the beam enters
    slice_ang: float
    atomic_number: np.ndarray  # (K,)
    thermal_sigma_ang: np.ndarray  # (K,) rms per axis

    @property
    def mid_plane_ang(self) -> float:
        """Depth of the Z²-weighted middle below the entrance plane; defocus 0 focuses there."""
        weight = self.atomic_number.astype(float) ** 2
        return float(np.sum(weight * self.layer) / np.sum(weight) * self.slice_ang)


def _supercells(a_ang: float, low_ang: float = 10.5, high_ang: float = 13.7) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of lattice vectors (2, 2 whole numbers; 2, 2 Å) within 3° of a right angle, both sides within bounds."""
    lattice = a_ang * np.array([[1.0, 0.0], [-0.5, np.sqrt(3) / 2]])
    reach = int(np.ceil(high_ang / a_ang)) + 2
    grid = np.stack(np.meshgrid(np.arange(-reach, reach + 1), np.arange(-reach, reach + 1)), axis=-1).reshape(-1, 2)
    vectors = grid @ lattice
    length = np.hypot(*vectors.T)
    keep = (length >= low_ang) & (length <= high_ang)
    grid, vectors, length = grid[keep], vectors[keep], length[keep]
    cosine = vectors @ vectors.T / length[:, None] / length[None]
    turn = vectors[:, None, 0] * vectors[None, :, 1] - vectors[:, None, 1] * vectors[None, :, 0]
    first, second = np.nonzero((np.abs(cosine) < np.sin(np.deg2rad(3.0))) & (turn > 0))
    return [(grid[[i, j]], vectors[[i, j]]) for i, j in zip(first, second, strict=True)]


def _lattice(a_ang: float, basis: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A random rotated supercell: its sides (2,), places (N·len(basis), 2) and the number of the basis site of each."""
    cells = _supercells(a_ang)
    whole, vectors = cells[rng.integers(len(cells))]
    sides = np.hypot(*vectors.T) * (1 + rng.uniform(-0.012, 0.012, 2))
    reach = int(np.abs(whole).sum()) + 1
    grid = np.stack(np.meshgrid(np.arange(-reach, reach + 1), np.arange(-reach, reach + 1)), axis=-1).reshape(-1, 2)
    fraction = (grid[:, None] + basis[None]) @ np.linalg.inv(whole)  # (n, sites, 2)
    origin = grid @ np.linalg.inv(whole)
    inside = np.all((origin > -1e-9) & (origin < 1 - 1e-9), axis=1)
    site = np.tile(np.arange(len(basis)), inside.sum())
    places = (fraction[inside].reshape(-1, 2) + rng.uniform(0, 1, 2)) % 1.0
    return sides, places * sides, site


def _finish(specimen: ReferenceSpecimen, rng: np.random.Generator) -> ReferenceSpecimen:
    """Static displacements of up to 0.08 Å and a thermal amplitude for each element."""
    xy = specimen.xy_ang + rng.normal(0, rng.uniform(0, 0.08), specimen.xy_ang.shape)
    sigma = np.empty(len(xy))
    for number in np.unique(specimen.atomic_number):
        sigma[specimen.atomic_number == number] = rng.uniform(0.040, 0.065)
    return replace(specimen, xy_ang=xy % specimen.cell_ang, thermal_sigma_ang=sigma)


def _keep(specimen: ReferenceSpecimen, mask: np.ndarray) -> ReferenceSpecimen:
    return replace(
        specimen,
        xy_ang=specimen.xy_ang[mask],
        layer=specimen.layer[mask],
        atomic_number=specimen.atomic_number[mask],
        thermal_sigma_ang=specimen.thermal_sigma_ang[mask],
    )


def _add(
    specimen: ReferenceSpecimen, xy_ang: np.ndarray, layer: np.ndarray, atomic_number: np.ndarray
) -> ReferenceSpecimen:
    return replace(
        specimen,
        xy_ang=np.concatenate([specimen.xy_ang, xy_ang]),
        layer=np.concatenate([specimen.layer, layer]),
        atomic_number=np.concatenate([specimen.atomic_number, atomic_number]),
        thermal_sigma_ang=np.concatenate([specimen.thermal_sigma_ang, np.full(len(xy_ang), 0.05)]),
    )


def _distance(specimen: ReferenceSpecimen, place_ang: np.ndarray) -> np.ndarray:
    """Shortest periodic distance (K,) of the atoms to one place."""
    step = specimen.xy_ang - place_ang
    return np.hypot(*(step - specimen.cell_ang * np.round(step / specimen.cell_ang)).T)


def _graphene(kind: str, rng: np.random.Generator) -> ReferenceSpecimen:
    sides, xy, site = _lattice(_GRAPHENE_A_ANG, np.array([[0.0, 0.0], [1 / 3, 2 / 3]]), rng)
    count = len(site)
    return ReferenceSpecimen(kind, sides, xy, np.zeros(count, int), 2.0, np.full(count, _CARBON), np.full(count, 0.05))


def _dope(
    specimen: ReferenceSpecimen, numbers: tuple[int, ...], sites: np.ndarray, count: int, rng: np.random.Generator
) -> ReferenceSpecimen:
    chosen = rng.choice(np.flatnonzero(sites), min(count, int(sites.sum())), replace=False)
    number = specimen.atomic_number.copy()
    number[chosen] = rng.choice(numbers, len(chosen))
    return replace(specimen, atomic_number=number)


def _pristine(rng: np.random.Generator) -> ReferenceSpecimen:
    return _finish(_graphene("graphene", rng), rng)


def _doped(
    rng: np.random.Generator, numbers: tuple[int, ...] = _GRAPHENE_DOPANTS, kind: str = "graphene_dopants"
) -> ReferenceSpecimen:
    sheet = _graphene(kind, rng)
    few = tuple(rng.choice(numbers, min(len(numbers), int(rng.integers(1, 5))), replace=False).tolist())
    sheet = _dope(sheet, few, np.ones(len(sheet.layer), bool), int(rng.integers(1, 9)), rng)
    return _finish(sheet, rng)


def _silicon(rng: np.random.Generator) -> ReferenceSpecimen:
    return _doped(rng, (14,), "graphene_silicon")


def _vacancies(rng: np.random.Generator) -> ReferenceSpecimen:
    sheet = _graphene("graphene_vacancies", rng)
    sheet = _dope(sheet, (7, 14), np.ones(len(sheet.layer), bool), int(rng.integers(0, 4)), rng)
    for _ in range(int(rng.integers(1, 5))):
        centre = sheet.xy_ang[rng.integers(len(sheet.layer))]
        sheet = _keep(sheet, _distance(sheet, centre) > rng.choice([0.1, 1.6]))
    return _finish(sheet, rng)


def _edge(rng: np.random.Generator) -> ReferenceSpecimen:
    sheet = _graphene("graphene_edge", rng)
    if rng.uniform() < 0.5:
        axis = int(rng.integers(2))
        sheet = _keep(sheet, sheet.xy_ang[:, axis] < sheet.cell_ang[axis] * rng.uniform(0.35, 0.75))
    else:
        sheet = _keep(sheet, _distance(sheet, rng.uniform(0, 1, 2) * sheet.cell_ang) > rng.uniform(2.5, 5.0))
    sheet = _keep(sheet, rng.uniform(size=len(sheet.layer)) > rng.uniform(0, 0.08))
    sheet = _dope(sheet, (7, 8, 14), np.ones(len(sheet.layer), bool), int(rng.integers(0, 6)), rng)
    return _finish(sheet, rng)


def _patch(rng: np.random.Generator) -> ReferenceSpecimen:
    """Graphene under adatoms.

    A disordered layer of carbon with some oxygen and silicon, 3 Å above, at least 1.1 Å apart.
    """
    sheet = _graphene("graphene_patch", rng)
    sheet = _dope(sheet, (14,), np.ones(len(sheet.layer), bool), int(rng.integers(0, 4)), rng)
    places: list[np.ndarray] = []
    for place in rng.uniform(0, 1, (int(rng.integers(3, 60)), 2)) * sheet.cell_ang:
        step = np.array(places).reshape(-1, 2) - place
        if not len(places) or np.hypot(*(step - sheet.cell_ang * np.round(step / sheet.cell_ang)).T).min() > 1.1:
            places.append(place)
    count = len(places)
    number = rng.choice([6, 8, 14], count, p=[0.85, 0.1, 0.05])
    sheet = replace(sheet, slice_ang=_ADATOM_HEIGHT_ANG)
    return _finish(_add(sheet, np.array(places), np.ones(count, int), number), rng)


def _dichalcogenide(
    rng: np.random.Generator,
    kind: str = "mos2",
    metals: tuple[int, ...] = _METAL_DOPANTS,
    hosts: tuple[tuple[int, int], ...] = ((42, 16), (42, 16), (42, 16), (42, 34), (74, 16), (74, 34)),
) -> ReferenceSpecimen:
    sides, xy, site = _lattice(_MOS2_A_ANG, np.array([[0.0, 0.0], [1 / 3, 2 / 3], [1 / 3, 2 / 3]]), rng)
    metal, chalcogen = hosts[rng.integers(len(hosts))]
    number = np.where(site == 0, metal, chalcogen)
    layer = np.choose(site, [1, 0, 2])
    sheet = ReferenceSpecimen(kind, sides, xy, layer, _MOS2_HALF_THICKNESS_ANG, number, np.full(len(site), 0.05))
    sheet = _dope(sheet, metals, sheet.layer == 1, int(rng.integers(0, 4)), rng)
    sheet = _dope(sheet, _CHALCOGEN_DOPANTS, sheet.layer != 1, int(rng.integers(0, 4)), rng)
    vacancy = rng.choice(np.flatnonzero(sheet.layer != 1), int(rng.integers(0, 5)), replace=False)
    return _finish(_keep(sheet, ~np.isin(np.arange(len(sheet.layer)), vacancy)), rng)


def _cluster(
    rng: np.random.Generator, metals: tuple[int, ...] = (46, 47, 78), kind: str = "cluster"
) -> ReferenceSpecimen:
    """1 to 20 metal atoms of a randomly turned fcc lattice, at most three layers high, on graphene."""
    sheet = _graphene(kind, rng)
    metal = int(rng.choice(metals))
    a = _CLUSTER_METALS[metal]
    grid = np.stack(np.meshgrid(*[np.arange(-4, 5)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    fcc = (grid[:, None] + np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])[None]).reshape(-1, 3) * a
    fcc = fcc[(fcc[:, 2] > -0.1) & (fcc[:, 2] < 1.1 * a)]
    near = np.argsort(np.linalg.norm((fcc + rng.normal(0, 0.6, 3)) * [1, 1, 1.4], axis=1))
    chosen = fcc[near[: int(rng.integers(1, 21))]]
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    xy = chosen[:, :2] @ turn.T + rng.uniform(0, 1, 2) * sheet.cell_ang
    layer = 1 + np.round((chosen[:, 2] - chosen[:, 2].min()) / 2.0).astype(int)
    return _finish(_add(sheet, xy, layer, np.full(len(chosen), metal)), rng)


RECIPES: dict[str, tuple[Callable[[np.random.Generator], ReferenceSpecimen], float]] = {
    "graphene": (_pristine, 0.06),
    "graphene_silicon": (_silicon, 0.14),
    "graphene_dopants": (_doped, 0.26),
    "graphene_vacancies": (_vacancies, 0.12),
    "graphene_edge": (_edge, 0.10),
    "graphene_patch": (_patch, 0.08),
    "mos2": (_dichalcogenide, 0.14),
    "cluster": (_cluster, 0.10),
}

_LAYERED = ("graphene_patch", "mos2", "cluster")

HELD_OUT: dict[str, Callable[[np.random.Generator], ReferenceSpecimen]] = {
    "graphene": _pristine,
    "graphene_silicon": _silicon,
    "graphene_dopants": _doped,
    "graphene_vacancies": _vacancies,
    "graphene_edge": _edge,
    "graphene_patch": _patch,
    "mos2": lambda rng: _dichalcogenide(rng, hosts=((42, 16),)),
    "mos2_selenide": lambda rng: _dichalcogenide(rng, "mos2_selenide", hosts=((74, 34),)),
    "cluster": lambda rng: _cluster(rng, (78,)),
    "graphene_unseen_dopants": lambda rng: _doped(rng, (22, 32), "graphene_unseen_dopants"),  # Ti Ge
    "mos2_unseen_dopants": lambda rng: _dichalcogenide(rng, "mos2_unseen_dopants", (24,), ((42, 16),)),  # Cr for Mo
    "gold_cluster": lambda rng: _cluster(rng, (79,), "gold_cluster"),
}


def training_specimen(rng: np.random.Generator, layered: bool = False) -> ReferenceSpecimen:
    """A random specimen of the training and validation sets; of several layers only, if asked."""
    names = [name for name in RECIPES if name in _LAYERED or not layered]
    weights = np.array([RECIPES[name][1] for name in names])
    name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    return RECIPES[name][0](rng)


def held_out_specimen(name: str, rng: np.random.Generator) -> ReferenceSpecimen:
    """A specimen that is used for nothing but the final figures."""
    return HELD_OUT[name](rng)
