"""The synthetic patches: ranges, what the parts mean, and rows that know nothing of one another."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from stem_gym.core.streams import Streams, row_seeds
from stem_gym.simulator.patch_specimens import PatchRecipe


def build(recipe: PatchRecipe, rows: int, shape: tuple[int, int] = (16, 24)):
    return recipe.build(Streams(row_seeds(1, rows)), torch.arange(rows), shape)


def test_fields_are_shares_and_the_peaks_are_where_the_axis_has_them():
    recipe = PatchRecipe(peaks=3, channels=200, background_fraction=2e-4)
    made = build(recipe, 5)
    assert (
        made.image.shape == (5, 16, 24) and made.loadings.shape == (5, 384, 4) and made.components.shape == (5, 4, 200)
    )
    assert bool(((made.loadings[..., :3] > 0.0) & (made.loadings[..., :3] < 1.0)).all())
    assert bool((made.loadings[..., 3] == 1.0).all())
    torch.testing.assert_close(made.components[:, 3], torch.full((5, 200), 2e-4))
    peak = made.components[:, :3]
    assert float(peak.amax(2).min()) > 0.9 * recipe.peak_fraction
    above = (peak > 0.5 * recipe.peak_fraction).sum(2)  # channels above half: 2.355 σ = 2.355 · 0.04 · 199
    assert bool(((above >= 18) & (above <= 19)).all())
    assert bool((made.image >= recipe.image_fraction).all()) and bool((made.image <= 2 * recipe.image_fraction).all())


def test_fields_differ_between_places_rows_and_peaks():
    made = build(PatchRecipe(), 4)
    field = made.loadings[..., :4]
    assert float(field.std(1).min()) > 0.02
    assert not torch.allclose(field[0], field[1])
    assert not torch.allclose(field[..., 0], field[..., 1])


def test_a_row_does_not_depend_on_its_neighbours():
    one, many = build(PatchRecipe(), 1), build(PatchRecipe(), 9)
    for key in ("image", "loadings", "components"):
        assert torch.equal(getattr(one, key)[0], getattr(many, key)[0])


def test_an_axis_rises():
    with pytest.raises(ValidationError, match="last_ev must exceed first_ev"):
        PatchRecipe(first_ev=50.0, last_ev=10.0)
