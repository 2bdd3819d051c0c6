"""Flakes: layers, edges, holes, their plasmons, and smooth random fields under them."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stem_gym.core.scalarizers import PeakRatio, Window
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.simulator.flake_specimens import ATOMS_PER_NM3, LAYER_NM, FlakesRecipe, loss_area_ev
from stem_gym.simulator.random_fields import WAVES, level_of, share_above, slope, smooth_field
from stem_gym.simulator.spectra import Drude
from stem_gym.simulator.spectral_specimen import SpectralSpecimen

ROWS = 12
SHAPE = (48, 64)


def build(rows: int = ROWS, shape: tuple[int, int] = SHAPE, **changes: Any) -> SpectralSpecimen:
    return FlakesRecipe(**changes).build(Streams(row_seeds(7, rows)), torch.arange(rows), shape)


@pytest.fixture(scope="module")
def built() -> SpectralSpecimen:
    return build()


def test_a_specimen_is_what_the_contract_says(built):
    recipe = FlakesRecipe()
    assert built.image.shape == (ROWS, *SHAPE)
    assert built.loadings.shape == (ROWS, SHAPE[0] * SHAPE[1], 5) and built.components.shape == (ROWS, 5, 128)
    for f in fields(built):
        value = getattr(built, f.name)
        assert value.dtype == torch.float32 and torch.isfinite(value).all() and (value >= 0.0).all(), f.name
    assert recipe.axis().shape == (128,)


def test_a_row_does_not_depend_on_the_batch(built):
    rows = torch.tensor([10, 2, 5])
    part = FlakesRecipe().build(Streams(row_seeds(7, ROWS)), rows, SHAPE)
    for f in fields(part):
        assert torch.equal(getattr(part, f.name), getattr(built, f.name)[rows]), f.name
    assert len(torch.unique(built.image.flatten(1), dim=0)) == ROWS


def test_layers_share_the_cells_and_make_the_image(built):
    of_layers = built.loadings[..., :3]
    assert of_layers.sum(-1).max() <= 1.0 + 1e-5
    layers = (of_layers * torch.tensor([1.0, 2.0, 3.0])).sum(-1)
    per_layer = LAYER_NM * FlakesRecipe().haadf_per_nm(ATOMS_PER_NM3)
    torch.testing.assert_close(built.image.flatten(1), 1.0 - torch.exp(-per_layer * layers))
    assert (of_layers.mean(1) > 0.0).float().mean() > 0.8, "most fields have all three"


def test_coverage_is_what_was_asked_for():
    """Cells that the outline cuts count by their share, half on average."""
    covered = build(coverage=(0.6, 0.6), holes=(0, 0)).loadings[..., :3].sum(-1).mean(1)
    torch.testing.assert_close(covered, torch.full_like(covered, 0.6), atol=0.01, rtol=0.0)


def test_holes_take_their_area():
    """One round hole in a flake that is nearly everywhere: pi r² where it does not touch a border or an edge."""
    settings = {"coverage": (0.95, 0.95), "fov_nm": 100.0}
    whole = build(holes=(0, 0), **settings).loadings[..., :3].sum(-1)
    uniform = torch.tensor([[0.9, 0.5, 0.4, 0.0]])
    beside = FlakesRecipe(holes=(1, 1), hole_nm=(6.0, 6.0), **settings)._beside_holes(uniform, (64, 64))
    assert float((1.0 - beside).sum()) * (100.0 / 64) ** 2 == pytest.approx(math.pi * 36.0, rel=0.02)
    assert float(beside[0, 25, 32]) == 0.0 and float(beside[0, 32, 10]) == 1.0, "x is the column, y the row"
    assert (build(holes=(3, 3), **settings).loadings[..., :3].sum(-1).mean() < whole.mean()).all()


def test_one_layer_alone_is_possible():
    built = build(layers=1)
    assert built.loadings.shape[-1] == 3 and built.loadings[..., 0].max() == 1.0


# Edges


def test_the_edge_mode_falls_exponentially_from_a_straight_edge():
    """exp(−d / length); the edge itself is some cells wide, so it is compared from two cells on and by its integral."""
    recipe = FlakesRecipe(fov_nm=100.0)
    flake = (torch.arange(100) >= 50).float().expand(1, 100, 100).contiguous()
    strength = recipe._near_edges(flake)[0]
    length = recipe.localisation_nm()  # cells are 1 nm wide
    column = torch.arange(100)
    d = (column - 49.5).abs()
    near = (d > 2.0) & (d < 15.0)
    torch.testing.assert_close(strength[50, near], torch.exp(-d[near] / length), rtol=0.06, atol=0.0)
    assert float(strength[50].sum()) == pytest.approx(2.0 * length, rel=0.02)
    assert float(strength[50].max()) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("degrees", [0.0, 30.0, 45.0])
def test_the_edge_mode_does_not_know_the_direction_of_the_edge(degrees):
    recipe = FlakesRecipe(fov_nm=100.0)
    x, y = torch.arange(100.0) - 49.5, torch.arange(100.0)[:, None] - 49.5
    across = x * math.cos(math.radians(degrees)) + y * math.sin(math.radians(degrees))
    strength = recipe._near_edges(share_above(across[None], torch.zeros(1)))[0]
    for distance in (4.0, 8.0):
        ring = ((across.abs() - distance).abs() < 0.6) & (x.abs() < 20.0) & (y.abs() < 20.0)
        expected = torch.exp(-across.abs() / recipe.localisation_nm())
        assert float(strength[ring].mean()) == pytest.approx(float(expected[ring].mean()), rel=0.08)


def test_the_border_of_the_field_is_no_edge():
    recipe = FlakesRecipe()
    assert float(recipe._near_edges(torch.ones(1, 40, 40)).max()) < 1e-6
    left = torch.zeros(1, 40, 60)
    left[..., 3:] = 1.0
    assert float(recipe._near_edges(left)[0, :, -1].max()) < 1e-3, "nor does the other side shine through"


def test_the_localisation_is_half_of_the_fields():
    """60 keV: beta 0.4463, gamma 1.1174, so 197.33 · 0.4987 / 21.2 = 4.64 nm at 10.6 eV."""
    assert FlakesRecipe().localisation_nm() == pytest.approx(4.64, abs=0.01)


# Spectra


def test_the_plasmon_falls_from_the_bulk_to_the_monolayer():
    recipe = FlakesRecipe(layers=6, energy_spread_ev=0.0, bulk_width_ev=2.0, monolayer_width_ev=2.0)
    assert recipe.plasmon_ev().tolist() == pytest.approx([19.0 - 4.0 / n for n in range(1, 7)])
    components = recipe.build(Streams(row_seeds(1, 1)), torch.arange(1), (8, 8)).components[0]
    peak = recipe.axis()[components[:6].argmax(-1)]
    torch.testing.assert_close(peak, recipe.plasmon_ev(), atol=0.3, rtol=0.0)  # a channel is 0.25 eV


def test_more_layers_lose_more():
    """At its peak Im(−1/eps) = Ep / Γ; at 60 keV m v² = 101.8 keV and theta_E = E / (gamma m v²) = 0.167 mrad at 19 eV.

    A channel, 0.25 eV wide, is at most half of that from the peak: (0.25 / 6)² of it.
    """
    recipe = FlakesRecipe(monolayer_ev=19.0, monolayer_width_ev=6.0, energy_spread_ev=0.0)
    layers = recipe.build(Streams(row_seeds(1, 1)), torch.arange(1), (8, 8)).components[0, :3]
    torch.testing.assert_close(layers, layers[0] * torch.tensor([[1.0], [2.0], [3.0]]), rtol=1e-5, atol=0.0)
    per_nm = 19.0 / 6.0 * math.log(1.0 + (20.0 / 0.167) ** 2) / (math.pi * 0.0529177 * 101.8e3)
    channel = 32.0 / 127.0
    assert float(layers[0].max()) == pytest.approx(0.5 * channel * 0.649 * per_nm, rel=0.01)


def test_the_area_of_a_damped_loss_peak():
    energy = np.linspace(1e-3, 4000.0, 2_000_000)
    for plasma, damping in ((10.6, 2.5), (15.0, 8.0), (19.0, 0.5)):
        eps = 1.0 - plasma**2 / (energy * (energy + 1j * damping))
        expected = np.trapezoid((-1.0 / eps).imag, energy)
        electrons = Drude(*(torch.tensor([x], dtype=torch.float64) for x in (1.0, plasma, damping)))
        assert float(loss_area_ev(electrons)) == pytest.approx(expected, rel=1e-4)


def test_the_edge_mode_has_its_probability():
    """What is missing are the feet of the peak below the first and above the last channel."""
    recipe = FlakesRecipe(edge_probability=0.02, collected=0.25, edge_width_ev=0.5)
    edge = recipe.build(Streams(row_seeds(1, 3)), torch.arange(3), (8, 8)).components[:, -2].sum(-1)
    torch.testing.assert_close(edge, torch.full_like(edge, 0.25 * 0.02), rtol=0.02, atol=0.0)


def test_the_ratio_of_the_peaks_is_highest_at_edges_of_thin_flakes(built):
    """What such an experiment looks for; the floor keeps vacuum from winning."""
    recipe = FlakesRecipe()
    rate = 6.24e8 * (built.loadings @ built.components)  # 100 pA
    edge, bulk = Window(low_ev=9.0, high_ev=12.0), Window(low_ev=14.0, high_ev=20.0)
    ratio = PeakRatio(
        numerator=edge, denominator=bulk, floor_per_s=0.1 * float((rate @ bulk.of(recipe.axis()).float()).max())
    )
    ratio.check(recipe.axis())
    value = ratio(rate, recipe.axis())
    best = value.argmax(1)
    row = torch.arange(ROWS)
    assert (built.loadings[row, best, 3] > 0.5).all(), "at an edge"
    vacuum = (built.loadings[..., :3].sum(-1) == 0.0) & (built.loadings[..., 3] < 0.05)
    assert vacuum.any(1).all() and (value.masked_fill(~vacuum, 0.0).amax(1) < 0.5 * value.amax(1)).all()
    thick = (rate @ bulk.of(recipe.axis()).float()).argmax(1)
    assert (built.loadings[row, thick, 2] > 0.9).float().mean() > 0.8, "and the bulk's band in the thickest part"


@pytest.mark.parametrize(("changes", "message"), [
    ({"coverage": (0.8, 0.4)}, "coverage"), ({"hole_nm": (0.0, 3.0)}, "hole_nm"), ({"edge_width_ev": 25.0}, "width"),
    ({"last_ev": 1.0}, "last_ev"),
])  # fmt: skip
def test_what_can_not_be_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        FlakesRecipe(**changes)


# Smooth random fields


def normals(rows: int) -> torch.Tensor:
    return Streams(row_seeds(5, rows)).normal(torch.arange(rows), (WAVES, WAVES))


@pytest.mark.parametrize("waves", [1.0, 2.0, 4.0])
def test_smooth_fields_have_mean_0_and_rms_1(waves):
    """Over 400 fields the mean square of each is a sum of few terms: 5 % of scatter, at most."""
    field = smooth_field(normals(400), (32, 32), waves)
    assert float(field.mean(dim=(1, 2)).abs().max()) < 1e-4
    assert float(field.square().mean()) == pytest.approx(1.0, abs=0.1)


def test_a_field_is_the_same_whatever_it_is_sampled_at():
    """The four cells about a coarse one's centre average to it but for the curvature."""
    coarse, fine = (smooth_field(normals(5), (n, 2 * n), 2.0) for n in (40, 80))
    averaged = torch.nn.functional.avg_pool2d(fine[:, None], 2)[:, 0]
    torch.testing.assert_close(averaged, coarse, atol=0.02, rtol=0.0)


def test_more_waves_are_steeper():
    gentle, steep = (slope(smooth_field(normals(50), (64, 64), waves)).mean() for waves in (1.0, 4.0))
    assert steep > 2.0 * gentle


def test_a_level_has_its_share_below_it():
    field = smooth_field(normals(6), (64, 64), 2.0)
    share = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.5])
    below = (field < level_of(field, share)[:, None, None]).float().mean(dim=(1, 2))
    torch.testing.assert_close(below, share, atol=1e-3, rtol=0.0)


def test_a_straight_outline_cuts_cells_by_their_share():
    x = torch.arange(20.0)
    ramp = 0.3 * x.expand(1, 10, 20)
    share = share_above(ramp, torch.tensor([0.3 * 7.25]))
    assert share[0, 5, 5:10].tolist() == pytest.approx([0.0, 0.0, 0.25, 1.0, 1.0], abs=1e-5)
