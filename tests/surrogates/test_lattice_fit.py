"""The lattice fit finds what it was given, and every silicon its site; the drift between frames is the stage's."""

from __future__ import annotations

import math

import pytest
import torch

from stem_gym.core.errors import ConfigError
from stem_gym.core.instructions import MoveStage, Scan
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.instruments.simulated import SimulatedMicroscope
from stem_gym.simulator.microscope import Microscope
from stem_gym.simulator.specimens import Dopant, GrapheneRecipe
from stem_gym.surrogates.atom_finder import ClassicalFinder, Kind, find_atoms
from stem_gym.surrogates.atom_finder_frames import plain_conditions, simulate_frames
from stem_gym.surrogates.frame_drift import estimate_drift
from stem_gym.surrogates.lattice_fit import fit_lattice


def honeycomb(angle_rad, spacing_ang, origin_ang, half_ang=12.5, noise_ang=0.0, missing=0.0, seed=0):
    """Atoms (1, N, 2) of a sheet about (0, 0), written down anew: hexagon middles, and two atoms beside each."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.tensor([angle_rad, angle_rad + math.pi / 3])
    vectors = spacing_ang * torch.stack((torch.cos(turn), torch.sin(turn)), dim=1)
    cells = torch.cartesian_prod(torch.arange(-15.0, 16.0), torch.arange(-15.0, 16.0))
    third = vectors.sum(0) / 3.0
    xy = torch.cat((cells @ vectors + third, cells @ vectors - third)) + torch.tensor(origin_ang)
    xy = xy[(xy.abs() < half_ang).all(1)]
    xy = xy[torch.rand(len(xy), generator=generator) >= missing]
    return (xy + noise_ang * torch.randn(xy.shape, generator=generator))[None]


@pytest.mark.parametrize("angle_deg", [0.0, 7.3, 29.9, 30.1, 51.0, 59.9])
@pytest.mark.parametrize("spacing_ang", [2.36, 2.46, 2.56])
def test_orientation_spacing_and_offset_are_recovered(angle_deg, spacing_ang):
    """With 0.1 Å of noise on 190 of 240 atoms: the angle to 0.1 / 7 / √190 rad and so on, five times that allowed."""
    angle, origin = math.radians(angle_deg), (0.71, -0.42)
    xy = honeycomb(angle, spacing_ang, origin, noise_ang=0.1, missing=0.2)
    lattice = fit_lattice(xy, torch.ones(xy.shape[:2], dtype=torch.bool))
    off = float(lattice.orientation_rad) - angle
    assert abs((off + math.pi / 6) % (math.pi / 3) - math.pi / 6) < 0.005
    assert float(lattice.spacing_ang) == pytest.approx(spacing_ang, abs=0.01)
    assert bool(lattice.found) and float(lattice.share) > 0.97
    assert float(lattice.rms_ang) == pytest.approx(0.1 * 2**0.5, rel=0.2)
    middle = torch.tensor([[origin]])
    true = honeycomb(angle, spacing_ang, origin, half_ang=4.0)
    _, place = lattice.sites(true)
    assert float((place - true).norm(dim=-1).max()) < 0.05  # so that the offset is right, but for whole cells
    assert float((lattice.sites(middle)[1] - middle).norm()) > 1.3  # and the middle of the hexagon is no site


def test_sites_have_one_index_each_and_the_index_gives_the_place_back():
    xy = honeycomb(0.3, 2.46, (0.2, 0.1))
    lattice = fit_lattice(xy, torch.ones(xy.shape[:2], dtype=torch.bool))
    index, place = lattice.sites(xy + 0.3)
    assert len(torch.unique(index[0], dim=0)) == xy.shape[1]
    torch.testing.assert_close(lattice.places(index), place, atol=1e-4, rtol=0.0)
    torch.testing.assert_close(place, xy, atol=1e-3, rtol=0.0)


def test_a_skewed_sheet_is_fitted_and_disorder_is_not():
    xy = honeycomb(0.2, 2.46, (0.0, 0.0)) @ torch.tensor([[1.0, 0.0], [0.03, 1.01]])
    noise = 25.0 * (torch.rand(1, xy.shape[1], 2, generator=torch.Generator().manual_seed(2)) - 0.5)
    both = torch.cat((xy, noise))
    lattice = fit_lattice(both, torch.ones(both.shape[:2], dtype=torch.bool))
    assert lattice.found.tolist() == [True, False]
    assert float(lattice.rms_ang[0]) < 0.01
    nothing = fit_lattice(both, torch.zeros(both.shape[:2], dtype=torch.bool))
    assert not nothing.found.any() and torch.isfinite(nothing.origin_ang).all()


def test_every_silicon_of_a_frame_gets_the_site_that_it_has():
    """The lattice of what the classical finder sees, against that of the true places: the same sites for all atoms."""
    streams = Streams(row_seeds(9, 12))
    streams.next_episode(torch.arange(12))
    frames = simulate_frames(plain_conditions(12), streams)
    found = find_atoms(frames.fraction, frames.pixel_ang, frames.electrons_per_pixel, ClassicalFinder())
    pixel = frames.pixel_ang[:, None, None]
    lattice = fit_lattice(found.xy * pixel, found.present)
    assert lattice.found.all()
    silicon = frames.present & (frames.kind == Kind.SILICON)
    _, place = lattice.sites(frames.xy * pixel)
    away = (place - frames.xy * pixel).norm(dim=-1)[silicon]
    assert float(away.max()) < 0.3  # sites are 1.42 Å apart, so half of that would be too far
    index, _ = lattice.sites(found.xy * pixel)
    told = found.are(Kind.SILICON)
    for row in range(12):
        assert len(torch.unique(index[row][told[row]], dim=0)) == int(told[row].sum())


@pytest.mark.parametrize(
    ("xy", "present"),
    [
        (torch.zeros(3, 2), torch.ones(3, dtype=torch.bool)),
        (torch.zeros(1, 3, 2), torch.ones(1, 3)),
        (torch.full((1, 3, 2), torch.nan), torch.ones(1, 3, dtype=torch.bool)),
    ],
)
def test_a_lattice_of_wrong_input_is_refused(xy, present):
    with pytest.raises(ConfigError):
        fit_lattice(xy, present)


def scans(dopants, moves):
    """Frames of the simulated microscope before and after stage moves (B, 2)."""
    rows = torch.arange(len(moves))
    recipe = GrapheneRecipe(cell_ang=34.0, dopants=dopants)
    microscope = SimulatedMicroscope(Microscope(specimen=recipe, drift={"speed_ang_per_s": 0.0}), len(moves))
    streams = Streams(row_seeds(3, len(moves)))
    streams.next_episode(rows)
    microscope.reset(streams, rows)
    full = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(moves), 4)
    scan = Scan(rows, torch.full((len(moves),), 25.0), (64, 64), torch.full((len(moves),), 2.0 / 4096), full)
    before = microscope.execute(scan)
    microscope.execute(MoveStage(rows, moves[:, 0], moves[:, 1]))
    return before.data["images"][:, 0], microscope.execute(scan).data["images"][:, 0]


SILICON = (Dopant(element="Si", count_min=2, count_max=3, window_ang=14.0),)


def test_the_drift_between_frames_is_how_far_the_stage_went():
    moves = torch.tensor([[0.0, 0.0], [0.4, -0.2], [-1.3, 0.9], [2.9, 1.7], [-3.4, -2.2], [0.1, 3.8]])
    drift = estimate_drift(*scans(SILICON, moves), torch.full((6,), 25.0 / 64))
    torch.testing.assert_close(drift.shift_ang, moves, atol=0.05, rtol=0.0)
    assert float(drift.correlation.min()) > 0.9


def test_on_a_clean_sheet_the_shorter_way_is_taken():
    moves = torch.tensor([[0.5, 0.3], [-0.6, 0.4], [0.2, -0.7]])
    drift = estimate_drift(*scans((), moves), torch.full((3,), 25.0 / 64))
    torch.testing.assert_close(drift.shift_ang, moves, atol=0.05, rtol=0.0)


@pytest.mark.parametrize(
    ("shape", "pixel", "longest", "words"),
    [
        ((2, 32, 32), 0.4, 2.0, "belong together"),
        ((1, 64, 64), -0.4, 2.0, "positive"),
        ((1, 64, 64), 0.4, 30.0, "can not be told"),
    ],
)
def test_a_drift_of_wrong_input_is_refused(shape, pixel, longest, words):
    with pytest.raises(ConfigError, match=words):
        estimate_drift(torch.zeros(1, 64, 64), torch.zeros(shape), torch.tensor([pixel]), longest)
