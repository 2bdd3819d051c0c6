"""Recipes: lattices, dopants, vacancies, edges, contamination, particles and atoms from ASE."""

import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from stem_gym.core.errors import ConfigError
from stem_gym.core.periodic import nearest_image
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.simulator import specimens
from stem_gym.simulator.lattices import LARGEST_STRAIN, cubic_points, graphene_lattice, mos2_lattice, supercells
from stem_gym.simulator.placement import choose_sites, count_between, random_rotation
from stem_gym.simulator.specimens import (
    AtomsRecipe,
    Contamination,
    Dopant,
    GrapheneRecipe,
    MoS2Recipe,
    NanoparticleRecipe,
    Recipe,
    Specimen,
    specimen_from_atoms,
)

ROWS = 48
RECIPES = {
    "graphene": GrapheneRecipe(
        dopants=(Dopant(element="Si", count_min=1, count_max=4), Dopant(element="N", count_min=0, count_max=2)),
        vacancies_max=2,
        edge_probability=0.5,
        contamination=Contamination(blobs_max=3),
    ),
    "mos2": MoS2Recipe(
        dopants=(Dopant(element="W", count_max=3), Dopant(element="Se", site="chalcogen", count_max=2)),
        sulphur_vacancies_max=3,
    ),
    "nanoparticle": NanoparticleRecipe(cell_ang=30.0),
}


def build(recipe, rows: int = ROWS, seed: int = 7) -> Specimen:
    return recipe.build(Streams(row_seeds(seed, rows)), torch.arange(rows))


def periodic_distances(specimen: Specimen, row: int, index: torch.Tensor) -> torch.Tensor:
    place = specimen.xy_ang[row, index]
    step = nearest_image((place[:, None] - place[None])[None], specimen.cell_ang[row : row + 1])
    return step[0].norm(dim=-1)


@pytest.fixture(scope="module", params=RECIPES)
def built(request) -> tuple[str, Specimen]:
    return request.param, build(RECIPES[request.param])


def test_shapes_types_and_places(built):
    name, specimen = built
    atoms = specimen.xy_ang.shape[1]
    assert specimen.cell_ang.shape == (ROWS, 2) and specimen.xy_ang.shape == (ROWS, atoms, 2)
    assert specimen.atomic_number.dtype == torch.int64 and specimen.present.dtype == torch.bool
    for field in (specimen.atomic_number, specimen.present, specimen.thermal_sigma_ang):
        assert field.shape == (ROWS, atoms)
    assert (specimen.xy_ang >= 0).all() and (specimen.xy_ang <= specimen.cell_ang[:, None]).all()
    assert (specimen.atomic_number[specimen.present] > 0).all()
    largest = torch.tensor(RECIPES[name].largest_cell_ang)
    assert (specimen.cell_ang <= largest + 1e-4).all()


def test_a_row_does_not_depend_on_the_batch(built):
    name, specimen = built
    streams = Streams(row_seeds(7, ROWS))
    rows = torch.tensor([31, 2])
    part = RECIPES[name].build(streams, rows)
    for field in Specimen.__dataclass_fields__:
        assert torch.equal(getattr(part, field), getattr(specimen, field)[rows]), field


def test_rows_differ(built):
    _, specimen = built
    assert len(torch.unique(specimen.xy_ang[:, 0], dim=0)) == ROWS


def test_rows_can_be_gathered_and_replaced(built):
    name, specimen = built
    other = build(RECIPES[name], 2, seed=99)
    index = torch.tensor([5, 0])
    merged = specimen.with_rows(index, other)
    assert torch.equal(merged.rows(index).xy_ang, other.xy_ang)
    assert torch.equal(merged.xy_ang[1:5], specimen.xy_ang[1:5])
    buffer = specimen.rows(torch.arange(ROWS))
    buffer.write_rows_(index, other)
    assert torch.equal(buffer.xy_ang, merged.xy_ang) and not torch.equal(buffer.xy_ang, specimen.xy_ang)


@pytest.mark.parametrize("lattice", [graphene_lattice(), mos2_lattice()])
@pytest.mark.parametrize("side_ang", [12.0, 30.0])
def test_supercells_are_hardly_strained_and_whole(lattice, side_ang):
    templates = supercells(lattice, side_ang)
    (ax, ay), (bx, by) = lattice.vectors_ang
    density = len(lattice.atoms_ang) / abs(ax * by - ay * bx)
    for cell, xy, number in zip(templates.cell_ang, templates.xy_ang, templates.atomic_number, strict=True):
        atoms = xy[number > 0]
        # The number of atoms is whole, and a strain e changes the area by at most 2 e.
        assert len(atoms) == pytest.approx(density * cell.prod(), rel=2 * LARGEST_STRAIN)
        step = atoms[:, None] - atoms[None]
        distance = np.linalg.norm(step - cell * np.round(step / cell), axis=-1)
        bonds = (distance > 0.1) & (distance < 1.3 * lattice.bond_ang)
        # Every bond within the strain of its length: also across the borders, where mistakes would show.
        np.testing.assert_allclose(distance[bonds], lattice.bond_ang, rtol=LARGEST_STRAIN * 1.01)
        per_atom = bonds.sum(1)
        columns = {6: {3}, 42: {6}, 16: {3}}  # a Mo has two S at each of three places
        assert all(per_atom[i] in columns[n] for i, n in enumerate(number[number > 0]))


def test_neighbours_are_one_bond_away():
    templates = supercells(graphene_lattice(), 20.0)
    for cell, xy, number, neighbours in zip(
        templates.cell_ang, templates.xy_ang, templates.atomic_number, templates.neighbours, strict=True
    ):
        there = number > 0
        step = xy[neighbours] - xy[:, None]
        distance = np.linalg.norm(step - cell * np.round(step / cell), axis=-1)
        np.testing.assert_allclose(distance[there], 1.42, rtol=2 * LARGEST_STRAIN)
        assert (np.sort(neighbours[there])[:, 1:] != np.sort(neighbours[there])[:, :-1]).all()  # three different ones
        assert (neighbours[~there] == np.nonzero(~there)[0][:, None]).all()


def test_supercells_sample_the_orientations():
    angles = np.degrees(supercells(graphene_lattice(), 30.0).angle_rad)
    assert angles.min() < 10.0 and angles.max() > 45.0 and len(np.unique(angles.round(3))) >= 5


def test_a_cell_that_nothing_fits_is_refused():
    with pytest.raises(ConfigError, match="larger"):
        supercells(graphene_lattice(), 2.0)


def test_graphene_dopants_are_as_many_and_as_far_apart_as_asked():
    specimen = build(RECIPES["graphene"])
    silicon = (specimen.atomic_number == 14) & specimen.present
    nitrogen = (specimen.atomic_number == 7) & specimen.present
    assert set(silicon.sum(1).tolist()) == {1, 2, 3, 4}
    assert set(nitrogen.sum(1).tolist()) == {0, 1, 2}
    for row in range(ROWS):
        index = torch.nonzero(silicon[row] | nitrogen[row])[:, 0]
        distance = periodic_distances(specimen, row, index) + 1e3 * torch.eye(len(index))
        assert len(index) < 2 or distance.min() >= 4.0


def test_dopants_are_spread_evenly_over_the_sheet():
    recipe = GrapheneRecipe(dopants=(Dopant(element="Si"),))
    specimen = build(recipe, 2000)
    place = specimen.xy_ang[specimen.atomic_number == 14] / specimen.cell_ang
    counts = torch.histc(place[:, 0] * 4 // 1 * 4 + place[:, 1] * 4 // 1, bins=16, min=0, max=16)
    chi_square = ((counts - 125.0) ** 2 / 125.0).sum().item()
    assert chi_square < 37.7  # 15 degrees of freedom, p = 0.001


def test_vacancies_and_edges_remove_atoms():
    whole = GrapheneRecipe()
    atoms = build(whole).present.sum(1)
    vacant = build(GrapheneRecipe(vacancies_max=3)).present.sum(1)
    assert set((atoms - vacant).tolist()) == {0, 1, 2, 3}
    cut = build(GrapheneRecipe(edge_probability=1.0))
    share = cut.present.sum(1) / atoms
    # A trench of 0.2 to 0.4 of the cell; a hanging atom more or less is a per cent.
    assert share.min() > 0.55 and share.max() < 0.85


def test_no_atom_at_an_edge_hangs_by_one_bond():
    specimen = build(GrapheneRecipe(edge_probability=1.0), 12)
    for row in range(12):
        index = torch.nonzero(specimen.present[row])[:, 0]
        distance = periodic_distances(specimen, row, index)
        bonds = ((distance > 0.5) & (distance < 1.6)).sum(1)
        assert (bonds >= 1).all() and (bonds < 2).sum() <= 1  # two passes leave a straggler at the very most


def test_dopants_at_an_edge_keep_their_three_bonds():
    recipe = GrapheneRecipe(edge_probability=1.0, dopants=(Dopant(element="Si", count_min=4, count_max=4),))
    specimen = build(recipe, 24)
    for row in range(24):
        index = torch.nonzero(specimen.present[row])[:, 0]
        distance = periodic_distances(specimen, row, index)
        bonds = ((distance > 0.5) & (distance < 1.6)).sum(1)
        assert (bonds[specimen.atomic_number[row, index] == 14] == 3).all()


@pytest.mark.parametrize("kind", ["graphene", "mos2"])
def test_lattices_are_shifted_and_mirrored_at_random(kind):
    recipe = GrapheneRecipe() if kind == "graphene" else MoS2Recipe()
    specimen = build(recipe, 1000)
    place = specimen.xy_ang[:, 0] / specimen.cell_ang
    # Uniform on [0, 1): mean 1/2 and variance 1/12, five standard errors of 1,000; x and y apart from each other.
    assert (place.mean(0) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / 1000)
    assert (place.var(0) - 1 / 12).abs().max() < 5 * math.sqrt(1 / 180 / 1000)
    assert abs(torch.corrcoef(place.T)[0, 1].item()) < 5 / math.sqrt(1000)
    # Seen from the first atom, the second lies to the left as often as to the right.
    step = nearest_image((specimen.xy_ang[:, 2] - specimen.xy_ang[:, 0])[:, None], specimen.cell_ang[:, None])[:, 0, 0]
    for size in step.abs().round(decimals=2).unique():
        same = step[(step.abs() - size).abs() < 0.01]
        if size > 0.1 and len(same) > 50:
            assert abs((same > 0).float().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(len(same))


def test_mos2_sites():
    specimen = build(RECIPES["mos2"])
    number, present = specimen.atomic_number, specimen.present
    assert set((((number == 16) | (number == 34)) & ~present).sum(1).tolist()) == {0, 1, 2, 3}
    assert not (((number == 42) | (number == 74)) & ~present & (number > 0)).any()
    assert set((number == 74).sum(1).tolist()) == {1, 2, 3} and set((number == 34).sum(1).tolist()) == {1, 2}
    for row in range(8):  # every S but the vacancies' partners shares its place with another
        index = torch.nonzero((number[row] == 16) | (number[row] == 34))[:, 0]
        paired = (periodic_distances(specimen, row, index) < 1e-3).sum(1)
        assert (paired == 2).all()


def test_contamination_is_within_its_bounds():
    specimen = build(RECIPES["graphene"])
    there = specimen.blob_weight_ang2 > 0
    assert set(there.sum(1).tolist()) == {0, 1, 2, 3}
    assert specimen.blob_weight_ang2[there].min() >= 5 * 8e-4 and specimen.blob_weight_ang2.max() <= 30 * 8e-4
    assert specimen.blob_sigma_ang.min() >= 3.0 and specimen.blob_sigma_ang.max() <= 6.0


def test_a_particle_is_a_crystal_of_the_right_size_on_a_film():
    recipe = NanoparticleRecipe(cell_ang=40.0, radius_min_ang=7.0, radius_max_ang=7.0)
    specimen = build(recipe, 64)
    gold = (specimen.atomic_number == 79) & specimen.present
    expected = 4.0 / 3.0 * math.pi * 7.0**3 * 4 / 4.08**3
    # The mean over centres of the lattice points in a sphere is its volume; the spread of one is 5 %, of 64 0.6 %.
    assert gold.sum(1).float().mean().item() == pytest.approx(expected, rel=0.03)
    assert ((specimen.atomic_number == 6) & specimen.present).sum(1).unique().tolist() == [int(6 * 0.1 * 1600)]


def test_a_sphere_keeps_all_its_points_wherever_it_sits():
    points = cubic_points(3.0)
    wide = cubic_points(6.0)
    generator = np.random.default_rng(0)
    for shift in generator.random((200, 3)):
        inside = (np.linalg.norm(wide + shift, axis=1) <= 3.0).sum()
        assert (np.linalg.norm(points + shift, axis=1) <= 3.0).sum() == inside


def test_random_rotations_are_rotations_and_uniform():
    turn = random_rotation(torch.rand(4000, 3, generator=torch.Generator().manual_seed(3)))
    torch.testing.assert_close(turn @ turn.transpose(1, 2), torch.eye(3).expand(4000, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(turn), torch.ones(4000), atol=1e-5, rtol=0)
    # Any element of a uniform rotation has mean 0 and variance 1/3; 5 standard errors.
    assert turn.mean(0).abs().max() < 5 / math.sqrt(3 * 4000)
    assert (turn.var(0) - 1 / 3).abs().max() < 0.03


def test_sites_run_out_quietly():
    keys = torch.rand(2, 5)
    xy = torch.rand(2, 5, 2)  # all within 1 Å of each other
    site, found, free = choose_sites(
        keys, torch.ones(2, 5, dtype=torch.bool), xy, torch.full((2, 2), 50.0), torch.tensor([3, 0]), 3, 4.0
    )
    assert found.tolist() == [[True, False, False], [False, False, False]]
    assert free.tolist() == [[False] * 5, [True] * 5]
    assert site[0, 0] == keys[0].argmax()


def test_counts_are_uniform_and_include_both_ends():
    counts = count_between(torch.linspace(0.0001, 0.9999, 3000), 2, 4)
    assert torch.bincount(counts).tolist() == [0, 0, 1000, 1000, 1000]
    assert count_between(torch.tensor([1.0 - 2.0**-24]), 0, 63).item() == 63


def test_atoms_of_ase_become_a_specimen():
    ase = pytest.importorskip("ase")
    atoms = ase.Atoms("CSi", positions=[(1.0, 2.0, 0.0), (11.0, 3.0, 5.0)], cell=(10.0, 8.0, 6.0), pbc=True)
    specimen = specimen_from_atoms(atoms, 3)
    assert specimen.cell_ang.tolist() == [[10.0, 8.0]] * 3
    assert specimen.xy_ang[1].tolist() == [[1.0, 2.0], [1.0, 3.0]]
    assert specimen.atomic_number[2].tolist() == [6, 14]
    lone = specimen_from_atoms(ase.Atoms("C2", positions=[(0, 0, 0), (0, 1.4, 0)]))
    assert lone.cell_ang[0].tolist() == pytest.approx([10.0, 11.4])
    assert lone.xy_ang[0].flatten().tolist() == pytest.approx([5.0, 5.0, 5.0, 6.4])  # in the middle of its vacuum


@pytest.mark.parametrize("cell", [[(10, 0, 0), (5, 8, 0), (0, 0, 5)], [(10, 0, 1), (0, 8, 0), (0, 0, 5)]])
def test_a_cell_that_is_no_rectangle_is_refused(cell):
    ase = pytest.importorskip("ase")
    with pytest.raises(ConfigError, match="rectangle"):
        specimen_from_atoms(ase.Atoms("C", positions=[(0, 0, 0)], cell=cell))


def test_no_atoms_are_refused():
    ase = pytest.importorskip("ase")
    with pytest.raises(ConfigError, match="at least one"):
        specimen_from_atoms(ase.Atoms())


def test_atoms_from_a_file(tmp_path):
    build_ase = pytest.importorskip("ase.build")
    slab = build_ase.graphene(a=2.46, vacuum=3.0)
    slab.set_cell([2.46, 4.26, 6.0], scale_atoms=False)
    path = tmp_path / "sheet.xyz"
    slab.write(path)
    recipe = AtomsRecipe(file=str(path), repeat=(4, 3))
    assert recipe.largest_cell_ang == pytest.approx((9.84, 12.78), abs=1e-4)
    specimen = build(recipe, 5)
    assert specimen.present.sum(1).tolist() == [24] * 5
    step = nearest_image(specimen.xy_ang - specimen.xy_ang[:, :1], specimen.cell_ang[:, None])
    # The same atoms, shifted as one.
    assert nearest_image(step - step[0], specimen.cell_ang[:, None]).abs().max() < 1e-4


def test_a_file_that_can_not_be_read_is_named(tmp_path):
    pytest.importorskip("ase")
    path = tmp_path / "broken.cif"
    path.write_text("nothing here\n")
    with pytest.raises(ConfigError, match=r"broken\.cif"):
        build(AtomsRecipe(file=str(path)), 1)


def test_without_ase_the_extra_is_named(monkeypatch):
    import builtins

    true_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("ase"):
            raise ImportError(name)
        return true_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    specimens._read_atoms.cache_clear()
    with pytest.raises(ImportError, match=r"stem-gym\[physics\]"):
        build(AtomsRecipe(file="some.cif"), 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "graphene", "dopant": []},
        {"kind": "diamond"},
        {"kind": "graphene", "dopants": [{"element": "Xx"}]},
        {"kind": "graphene", "dopants": [{"element": "Si", "count_min": 3, "count_max": 1}]},
        {"kind": "graphene", "cell_ang": -3.0},
        {"kind": "nanoparticle", "radius_min_ang": 9.0, "radius_max_ang": 5.0},
        {"kind": "nanoparticle", "element": "Unobtainium"},
    ],
)
def test_wrong_recipes_are_refused(wrong):
    with pytest.raises((ValidationError, ConfigError)):
        TypeAdapter(Recipe).validate_python(wrong)


def test_a_recipe_is_chosen_by_its_kind():
    recipe = TypeAdapter(Recipe).validate_python({"kind": "mos2", "cell_ang": 20.0})
    assert isinstance(recipe, MoS2Recipe) and recipe.cell_ang == 20.0


def test_every_atom_of_a_whole_sheet_has_three_neighbours():
    """What a recipe without edges takes for granted."""
    templates = GrapheneRecipe(kind="graphene", cell_ang=30.0).templates()
    own = np.arange(templates.neighbours.shape[1])[:, None]
    assert ((templates.neighbours != own).sum(-1) == 3)[templates.atomic_number > 0].all()


def test_a_site_that_was_found_is_not_lost_to_one_that_was_not():
    """What is not found names the first site, where something may have been."""
    values, site = torch.full((1, 4), 6), torch.tensor([[0, 2, 0]])
    fresh = specimens.put(values, site, torch.tensor([[True, True, False]]), 14)
    assert fresh.tolist() == [[14, 6, 14, 6]] and values.tolist() == [[6, 6, 6, 6]]
