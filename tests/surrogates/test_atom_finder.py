"""Both finders on frames whose atoms are known, the rules that every finder keeps, and the counting itself."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import binom

from stem_gym.core.errors import ConfigError, ValidRangeError
from stem_gym.core.instructions import Scan
from stem_gym.core.periodic import nearest_image
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.instruments.simulated import SimulatedMicroscope
from stem_gym.simulator.microscope import Microscope
from stem_gym.simulator.specimens import Dopant, GrapheneRecipe
from stem_gym.surrogates.atom_finder import (
    BrightestSpots,
    ClassicalFinder,
    Finder,
    Found,
    Kind,
    NetworkFinder,
    find_atoms,
)
from stem_gym.surrogates.atom_finder_frames import Frames, kind_of, plain_conditions, simulate_frames
from stem_gym.surrogates.atom_finder_scores import Counts, judge
from stem_gym.surrogates.spots import distances
from stem_gym.surrogates.surrogate import UncertaintyWarning

FRAMES, BATCH = 40, 20
RARE = 0.999  # a share at its limit fails the floors below once in a thousand seeds


def simulated(conditions, seed):
    streams = Streams(row_seeds(seed, conditions.rows))
    streams.next_episode(torch.arange(conditions.rows))
    return simulate_frames(conditions, streams)


@pytest.fixture(scope="module")
def batches() -> list[Frames]:
    """The issue's frames: 40 pA, 2 s, 25 Å, 64 × 64."""
    return [simulated(plain_conditions(BATCH), seed) for seed in range(100, 100 + FRAMES // BATCH)]


@pytest.fixture(scope="module", params=["network", "classical"])
def finder(request) -> Finder:
    return NetworkFinder.load() if request.param == "network" else ClassicalFinder()


def look(finder: Finder, frames: Frames) -> Found:
    return find_atoms(frames.fraction, frames.pixel_ang, frames.electrons_per_pixel, finder)


def matched_ang(found: Found, other: Found, pixel_ang: float) -> torch.Tensor:
    """Distance from every silicon of one answer to the nearest of another."""
    away = distances(found.xy, other.xy) * pixel_ang
    away = torch.where(other.are(Kind.SILICON)[:, None], away, math.inf).amin(2)
    return away[found.are(Kind.SILICON)]


def test_silicon_is_found_at_the_usual_dose(finder, batches):
    """At least 99 % found, less than 1 % false, within 0.15 Å, with the margin that so few atoms need."""
    counts = sum((judge(frames, look(finder, frames), Kind.SILICON) for frames in batches), start=Counts())
    assert counts.there > 100
    assert counts.there - counts.found <= binom.ppf(RARE, counts.there, 0.01)
    assert counts.false <= binom.ppf(RARE, counts.told, 0.01)
    assert counts.rms_ang <= 0.15


def test_the_network_finds_the_sheet_and_knows_its_errors(batches):
    network = NetworkFinder.load()
    found = look(network, batches[0])
    carbon = judge(batches[0], found, Kind.CARBON)
    assert carbon.found_share > 0.98 and carbon.false_share < 0.02 and carbon.rms_ang < 0.15
    assert 0.6 < carbon.std_ratio < 1.5  # calibrated on all conditions together, of which this is one
    weight = found.weight[found.are(Kind.SILICON)]
    assert float(weight.median()) == pytest.approx(4.75, rel=0.1)  # Si over C at 60 keV in the simulator's table


def test_elements_are_told_by_brightness(finder):
    usual = plain_conditions(8)
    dopants = tuple(Dopant(element=e, count_min=2, count_max=2, window_ang=20.0) for e in ("P", "Al", "Ge"))
    recipe = usual.recipe.model_copy(update={"dopants": dopants, "separation_ang": 4.0, "vacancies_max": 0})
    frames = simulated(dataclasses.replace(usual, recipe=recipe), 7)
    found = look(finder, frames)
    assert judge(frames, found, Kind.SILICON).found_share > 0.9  # P and Al
    assert judge(frames, found, Kind.HEAVY).found_share > 0.9
    assert kind_of(torch.tensor([5, 6, 7, 13, 14, 15, 32])).tolist() == [1, 1, 1, 2, 2, 2, 3]


def test_frames_of_the_simulated_microscope_are_read_as_well(finder):
    """The instrument's own scan and truth, which the finder's training frames share no code with but the physics."""
    recipe = GrapheneRecipe(cell_ang=34.0, dopants=(Dopant(element="Si", count_min=3, count_max=3, window_ang=20.0),))
    microscope = SimulatedMicroscope(Microscope(specimen=recipe, drift={"speed_ang_per_s": 0.0}), 4)
    streams, rows = Streams(row_seeds(5, 4)), torch.arange(4)
    streams.next_episode(rows)
    microscope.reset(streams, rows)
    full = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(4, 4)
    reading = microscope.execute(Scan(rows, torch.full((4,), 25.0), (64, 64), torch.full((4,), 2.0 / 4096), full))
    electrons = reading.calibration["electrons_per_pixel"]
    fraction = reading.data["images"][:, 0] / electrons[:, None, None]
    found = find_atoms(fraction, torch.full((4,), 25.0 / 64), electrons, finder)
    truth = microscope.truth()
    silicon = nearest_image(truth["atom_xy_ang"], truth["cell_ang"][:, None])[truth["atomic_number"] == 14]
    told = (found.fractions((64, 64)) - 0.5) * 25.0
    away = distances(silicon.reshape(4, 3, 2), told)
    away = torch.where(found.are(Kind.SILICON)[:, None], away, math.inf).amin(2)
    assert float(away.max()) < 0.2


@pytest.mark.parametrize("dims", [(2,), (1,), (1, 2)], ids=["x", "y", "both"])
def test_a_mirrored_frame_gives_mirrored_places(finder, batches, dims):
    """The canvas is not symmetric to the last pixel, so that a few hundredths of an Å may be left."""
    frames = batches[0].rows(slice(0, 6))
    straight = look(finder, frames)
    mirrored = look(finder, dataclasses.replace(frames, fraction=frames.fraction.flip(dims)))
    xy = mirrored.xy.clone()
    for dim in dims:
        xy[..., 2 - dim] = 63.0 - xy[..., 2 - dim]
    away = matched_ang(straight, dataclasses.replace(mirrored, xy=xy), 25.0 / 64)
    assert float(away.quantile(0.95)) < 0.1 and float(away.median()) < 0.05


def test_a_batch_is_its_rows_whatever_their_pixels(finder):
    large, small = simulated(plain_conditions(2), 3), simulated(plain_conditions(2, fov_ang=17.0), 3)
    fraction, pixel, electrons = (
        torch.cat((getattr(large, name), getattr(small, name)))
        for name in ("fraction", "pixel_ang", "electrons_per_pixel")
    )
    together = find_atoms(fraction, pixel, electrons, finder)
    for row in range(4):
        alone = find_atoms(fraction[row : row + 1], pixel[row : row + 1], electrons[row : row + 1], finder)
        count = int(alone.present.sum())
        assert count == int(together.present[row].sum()) > 50
        # Equal but for the order of entries whose scores differ by rounding.
        away = distances(alone.xy[0, :count], together.xy[row, :count]).amin(1)
        assert float(away.max()) < 1e-3
        torch.testing.assert_close(alone.score[0, :20], together.score[row, :20], atol=1e-4, rtol=1e-4)


def test_entries_are_padded_and_sorted_and_places_are_x_first(finder, batches):
    found = look(finder, batches[0])
    assert (found.score.diff(dim=1) <= 0.0).all() and (found.present == (found.score > 0.0)).all()
    assert isinstance(finder, Finder) and found.inside.all()
    image = torch.full((1, 64, 64), 1e-4)
    image[0, 20, 45] = 3e-3
    image = torch.nn.functional.avg_pool2d(image[:, None], 3, 1, 1)[:, 0]
    spot = find_atoms(image, torch.full((1,), 0.39), torch.full((1,), 1.2e5), BrightestSpots(1, 1.1))
    assert spot.xy[0, 0].tolist() == [45.0, 20.0]
    torch.testing.assert_close(spot.fractions((64, 64))[0, 0], torch.tensor([45.5 / 64, 20.5 / 64]))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"fraction": torch.zeros(64, 64)}, ConfigError, r"\(B, H, W\)"),
        ({"fraction": torch.zeros(2, 64, 64, dtype=torch.int64)}, ConfigError, "floating-point"),
        ({"fraction": torch.full((2, 64, 64), torch.nan)}, ConfigError, r"rows \[0, 1\]"),
        ({"pixel_ang": torch.tensor([0.39])}, ConfigError, "each of 2 frames"),
        ({"pixel_ang": torch.tensor([0.39, 0.0])}, ConfigError, "pixel_ang must be positive"),
        ({"electrons": torch.tensor([1e5, -1.0])}, ConfigError, "electrons_per_pixel must be positive"),
        ({"electrons": torch.tensor([1e5, torch.inf])}, ConfigError, "finite"),
        ({"pixel_ang": torch.tensor([0.39, 0.51])}, ValidRangeError, "half the probe"),
    ],
)
def test_bad_input_is_refused_with_the_reason(finder, change, error, words):
    given = {
        "fraction": torch.full((2, 64, 64), 3e-4),
        "pixel_ang": torch.full((2,), 0.39),
        "electrons": torch.full((2,), 1e5),
    } | change
    with pytest.raises(error, match=words):
        find_atoms(given["fraction"], given["pixel_ang"], given["electrons"], finder)


def test_the_network_needs_the_dose_and_flags_what_it_was_not_tested_on(batches):
    network, frames = NetworkFinder.load(), batches[0].rows(slice(0, 2))
    with pytest.raises(ConfigError, match="needs electrons_per_pixel"):
        find_atoms(frames.fraction, frames.pixel_ang, None, network)
    dose = frames.electrons_per_pixel * torch.tensor([1.0, 100.0])
    with pytest.warns(UncertaintyWarning, match="electrons_per_ang2"):
        outside = find_atoms(frames.fraction, frames.pixel_ang, dose, network)
    assert outside.inside.tolist() == [True, False]
    narrow = dataclasses.replace(network.card, valid_range=network.card.valid_range | {"field_ang": (10.0, 11.0)})
    with pytest.warns(UncertaintyWarning, match="field_ang from 25 to 25"):
        wider = look(NetworkFinder(network.network, narrow, network.settings), frames)
    torch.testing.assert_close(wider.std, 3.0 * look(network, frames).std)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = network.estimate(frames.fraction, frames.pixel_ang, frames.electrons_per_pixel)
    found = look(network, frames)
    assert torch.equal(torch.isnan(estimate.mean[..., 0]), ~found.present)
    places = found.fractions((64, 64))[found.present]
    torch.testing.assert_close(estimate.mean[found.present], places)


def test_an_empty_frame_has_no_silicon(finder):
    """Vacuum with a little noise: nothing is as bright as silicon there."""
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.poisson(0.4, (4, 64, 64)).astype(np.float32))
    found = find_atoms(counts / 1.2e5, torch.full((4,), 0.39), torch.full((4,), 1.2e5), finder)
    assert not found.are(Kind.SILICON, Kind.HEAVY).any()


def test_the_truth_of_a_frame_is_where_the_beam_met_the_atom():
    """The brightest pixels about each silicon are at its place, drift and line jitter and all."""
    frames = simulated(plain_conditions(8, current_pa=400.0), 11)
    silicon = frames.present & (frames.kind == Kind.SILICON)
    silicon &= ((frames.xy > 4.0) & (frames.xy < 59.0)).all(-1)
    at = torch.arange(64.0)
    offset = torch.stack(torch.meshgrid(at, at, indexing="xy"), dim=-1) - frames.xy[silicon][:, None, None]
    row = silicon.nonzero()[:, 0]
    weight = frames.fraction[row] * (offset.square().sum(-1) < 2.5**2)
    mean = (weight[..., None] * offset).sum((1, 2)) / weight.sum((1, 2))[:, None]
    assert float(mean.mean(0).abs().max()) < 0.12  # pixels, 0.05 Å: no mirror, no half pixel
    assert float(mean.square().mean().sqrt()) < 0.3


def test_counts_of_a_case_done_by_hand():
    """Two silicon atoms, one found 0.3 Å away, one missed, one find where nothing is, one at the border left out."""
    xy = torch.tensor([[[10.0, 10.0], [30.0, 30.0], [40.0, 10.0]]])
    kind = torch.tensor([[2, 2, 1]])
    one, yes = torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)
    frames = Frames(torch.zeros(1, 64, 64), torch.tensor([0.5]), torch.tensor([1e5]), xy, kind, one, yes)
    told = torch.tensor([[[10.6, 10.0], [50.0, 50.0], [0.2, 20.0]]])
    found = Found(told, torch.full((1, 3), 2), one, 0.6 * one, one, yes, yes[:, 0])
    counts = judge(frames, found, Kind.SILICON)
    assert (counts.there, counts.found, counts.told, counts.false) == (2, 1, 2, 1)
    assert counts.rms_ang == pytest.approx(0.3, rel=1e-5)
    assert counts.std_ratio == pytest.approx(0.5**0.5, rel=1e-5)  # 0.3 Å in the plane, 0.3 Å told on each axis
    assert judge(frames, found, Kind.HEAVY).document()["found_share"] is None
