"""The shipped imaging surrogate against the held-out abTEM pictures, and the symmetries it must keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stem_gym.core.errors import ConfigError, ValidRangeError
from stem_gym.datasets.pictures import Picture, load_bundle
from stem_gym.simulator.imaging import Harmonics, image_grid
from stem_gym.simulator.optics import Optics
from stem_gym.simulator.specimens import Specimen
from stem_gym.surrogates.imaging import AtomTable, ImagingSurrogate, grid_shape
from stem_gym.surrogates.imaging_card import held_out_scores, pooled
from stem_gym.surrogates.imaging_reference import optics_of, reference_map, specimen_of
from stem_gym.surrogates.surrogate import UncertaintyWarning

PICTURES = Path(__file__).parents[2] / "benchmarks" / "held_out_haadf.npz"


@pytest.fixture(scope="module")
def surrogate() -> ImagingSurrogate:
    return ImagingSurrogate.load()


@pytest.fixture(scope="module")
def pictures() -> dict[str, Picture]:
    return load_bundle(PICTURES)


@pytest.fixture(scope="module")
def picture(pictures: dict[str, Picture]) -> Picture:
    return pictures["held_out-graphene_silicon-0-60kev"]


@pytest.mark.filterwarnings("ignore::stem_gym.surrogates.surrogate.UncertaintyWarning")
def test_held_out_pictures_are_met(surrogate: ImagingSurrogate, pictures: dict[str, Picture]) -> None:
    rows = held_out_scores(surrogate, pictures)
    seen = [row for row in rows if row["source_fwhm_ang"] == 0.7 and not row["unseen_kind"]]
    scores = pooled(seen, "surrogate")
    assert scores.r2 >= 0.995
    assert 0.85 <= scores.coverage <= 0.95
    assert scores.r2 > pooled(seen, "sum_over_atoms").r2
    # The same figures as the card's: the bundle rounds nothing but the halves' difference.
    assert scores.r2 == pytest.approx(surrogate.card.held_out["source_0.7_ang"]["r2"], abs=1e-4)


def test_absolute_scale_is_abtems(surrogate: ImagingSurrogate, picture: Picture) -> None:
    given = surrogate.estimate(specimen_of(picture), optics_of(picture, 0.7))
    reference = reference_map(picture, (given.mean.shape[1], given.mean.shape[2]), 0.7)
    assert torch.allclose(
        given.mean.mean((1, 2)), reference.mean((1, 2)), rtol=0.02
    )  # no scale is fitted; R² of 0.998 leaves about one percent


def test_a_tiled_cell_gives_the_tiled_map(surrogate: ImagingSurrogate, picture: Picture) -> None:
    specimen, optics = specimen_of(picture).rows(torch.tensor([1])), optics_of(picture, 0.7).rows(torch.tensor([1]))
    shape = grid_shape(specimen.cell_ang)
    one = surrogate.estimate(specimen, optics, shape)
    four = surrogate.estimate(tiled(specimen, 2), optics, (2 * shape[0], 2 * shape[1]))
    assert torch.allclose(four.mean, one.mean.repeat(1, 2, 2), rtol=1e-3, atol=1e-3 * float(one.mean.max()))
    assert bool(four.inside.all())


def tiled(specimen: Specimen, times: int) -> Specimen:
    steps = [specimen.cell_ang[:, None] * torch.tensor([x, y]) for x in range(times) for y in range(times)]
    repeat = {
        name: getattr(specimen, name).repeat(1, times**2) for name in ("atomic_number", "present", "thermal_sigma_ang")
    }
    places = torch.cat([specimen.xy_ang + step for step in steps], dim=1)
    return specimen.replace(cell_ang=specimen.cell_ang * times, xy_ang=places, **repeat)


def test_a_moved_specimen_moves_its_map(surrogate: ImagingSurrogate, picture: Picture) -> None:
    specimen, optics = specimen_of(picture), optics_of(picture)
    shape = grid_shape(specimen.cell_ang)
    pixel = specimen.cell_ang / torch.tensor([shape[1], shape[0]])
    moved = specimen.replace(xy_ang=specimen.xy_ang + (pixel * torch.tensor([3.0, 5.0]))[:, None])
    here, there = surrogate.estimate(specimen, optics), surrogate.estimate(moved, optics)
    expected = here.mean.roll((5, 3), (1, 2))
    assert torch.allclose(there.mean, expected, atol=1e-4 * float(expected.max()))


def test_a_row_does_not_see_its_neighbours(surrogate: ImagingSurrogate, picture: Picture) -> None:
    specimen, optics = specimen_of(picture), optics_of(picture, 0.7)
    everything = surrogate.estimate(specimen, optics)
    row = torch.tensor([4])
    alone = surrogate.estimate(specimen.rows(row), optics.rows(row))
    # Convolutions of another batch size add in another order: single precision.
    assert torch.allclose(alone.mean, everything.mean[row], rtol=1e-4, atol=1e-7)
    assert torch.allclose(alone.std, everything.std[row], rtol=1e-3)


def test_source_and_focal_spread_are_averages(surrogate: ImagingSurrogate, picture: Picture) -> None:
    specimen, optics = specimen_of(picture).rows(torch.tensor([0])), optics_of(picture).rows(torch.tensor([0]))
    sharp = surrogate.estimate(specimen, optics)
    blurred = surrogate.estimate(specimen, replace(optics, source_fwhm_ang=torch.tensor([0.7])))
    assert torch.allclose(blurred.mean.mean(), sharp.mean.mean(), rtol=1e-5)
    assert float(blurred.mean.std()) < float(sharp.mean.std())
    spread_ang = 20.0
    chromatic = surrogate.estimate(specimen, replace(optics, focal_spread_ang=torch.tensor([spread_ang])))
    defocus = torch.linspace(-3.2, 3.2, 33) * spread_ang
    weight = torch.exp(-0.5 * (defocus / spread_ang) ** 2)
    series = Optics.of(
        33,
        energy_kev=60.0,
        convergence_mrad=optics.convergence_mrad.expand(33),
        source_fwhm_ang=0.0,
        defocus_ang=defocus,
    )
    many = surrogate.estimate(specimen.rows(torch.zeros(33, dtype=torch.long)), series).mean
    expected = (many * weight[:, None, None]).sum(0) / weight.sum()
    # Five nodes against 33: the residue is the images' tenth derivative in the defocus.
    assert torch.allclose(chromatic.mean[0], expected, atol=0.01 * float(expected.max()))


def test_smooth_contamination_adds(surrogate: ImagingSurrogate, picture: Picture) -> None:
    specimen, optics = specimen_of(picture), optics_of(picture, 0.7)
    rows = len(picture.optics)
    weight_ang2 = torch.full((rows, 1), 0.02)
    dirty = specimen.replace(
        blob_xy_ang=torch.full((rows, 1, 2), 4.0),
        blob_sigma_ang=torch.full((rows, 1), 2.0),
        blob_weight_ang2=weight_ang2,
    )
    extra = surrogate.estimate(dirty, optics).mean - surrogate.estimate(specimen, optics).mean
    area = specimen.cell_ang.prod(1)
    assert torch.allclose(extra.mean((1, 2)), weight_ang2[:, 0] / area, rtol=1e-3)


def test_gradients_reach_atoms_and_optics(surrogate: ImagingSurrogate, picture: Picture) -> None:
    row = torch.tensor([3])
    specimen, optics = specimen_of(picture).rows(row), optics_of(picture, 0.7).rows(row)
    place = specimen.xy_ang.clone().requires_grad_(True)
    defocus = optics.defocus_ang.clone().requires_grad_(True)

    def brightness(xy: torch.Tensor, focus: torch.Tensor) -> torch.Tensor:
        estimate = surrogate.estimate(specimen.replace(xy_ang=xy), replace(optics, defocus_ang=focus))
        return estimate.mean[0, 10, 10] * 1e4

    brightness(place, defocus).backward()
    assert place.grad is not None and defocus.grad is not None
    atom = int(place.grad.abs().sum(-1).argmax())
    step = torch.zeros_like(place)
    step[0, atom, 0] = 0.01
    up, down = brightness(place + step, defocus), brightness(place - step, defocus)
    # Single precision at a step of 0.01 Å leaves about one percent.
    assert float((up - down).detach() / 0.02) == pytest.approx(float(place.grad[0, atom, 0]), rel=0.03, abs=0.02)
    focus_step = brightness(place, defocus + 1.0) - brightness(place, defocus - 1.0)
    assert float(focus_step.detach() / 2) == pytest.approx(float(defocus.grad), rel=0.05, abs=1e-3)


def test_outside_the_range_it_says_so(surrogate: ImagingSurrogate, picture: Picture) -> None:
    specimen, optics = specimen_of(picture), optics_of(picture, 0.7)
    energy = optics.energy_kev.clone()
    energy[2] = 200.0
    far = replace(optics, energy_kev=energy)
    with pytest.warns(UncertaintyWarning, match="energy_kev"):
        given = surrogate.estimate(specimen, far)
    assert given.inside.tolist() == [row != 2 for row in range(len(energy))]
    with pytest.raises(ValidRangeError, match="energy_kev"):
        surrogate.estimate(specimen, far, strict=True)
    with pytest.warns(UncertaintyWarning, match="pixel_ang"):
        surrogate.estimate(specimen, optics, (24, 24))
    empty = specimen.replace(present=torch.zeros_like(specimen.present))
    assert bool(torch.isfinite(surrogate.estimate(empty, optics).mean).all())


def test_widening_is_what_the_flag_means(surrogate: ImagingSurrogate, picture: Picture) -> None:
    specimen, optics = specimen_of(picture), optics_of(picture, 0.7)
    edge = torch.full_like(optics.astigmatism_ang, surrogate.card.valid_range["astigmatism_ang"][1])
    inside = surrogate.estimate(specimen, replace(optics, astigmatism_ang=edge))
    with pytest.warns(UncertaintyWarning):
        outside = surrogate.estimate(specimen, replace(optics, astigmatism_ang=edge * 1.001))
    assert float((outside.std / inside.std).median()) == pytest.approx(3.0, rel=0.05)


def test_coefficients_stand_in_for_the_physics(surrogate: ImagingSurrogate, picture: Picture) -> None:
    specimen, optics = specimen_of(picture), optics_of(picture, 0.7)
    cell = (float(picture.specimen.cell_ang[0]), float(picture.specimen.cell_ang[1]))
    harmonics = Harmonics.within(cell, float(optics.band_limit_per_ang.max()))
    coefficients = surrogate.coefficients(specimen, optics, harmonics)
    shape = grid_shape(specimen.cell_ang)
    again = image_grid(coefficients, *shape)
    expected = surrogate.estimate(specimen, optics).mean
    assert torch.allclose(
        again, expected, atol=2e-3 * float(expected.max())
    )  # beyond the band limit there is next to nothing
    with pytest.raises(ConfigError, match="grid"):
        surrogate.coefficients(specimen, optics, Harmonics(nx=400, ny=801))


def test_atom_table_meets_its_nodes() -> None:
    energy = torch.tensor([60.0, 80.0, 100.0])
    table = AtomTable(
        energy, torch.tensor([[1.0, 2.0], [0.7, 1.5], [0.5, 1.2]]), torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    )
    section, width2 = table.lookup(torch.tensor([[1, 2]] * 3), energy)
    assert torch.allclose(section, table.cross_section_ang2, rtol=1e-5)
    assert torch.allclose(width2, table.width2_ang2, atol=1e-6)
    between, _ = table.lookup(torch.tensor([[1]]), torch.tensor([70.0]))
    assert 0.7 < float(between) < 1.0
