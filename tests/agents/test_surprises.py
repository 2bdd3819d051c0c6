"""Deviations that grow with surprises, where these were, and not with their absence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.engine.acquisition import Belief
from agents.engine.search_field import Scene
from agents.engine.surprises import Surprises

CELLS = 400


def scene(value, measured, wanted=0):
    none = torch.zeros(1)
    wanted = torch.tensor([wanted])
    return Scene(none.view(1, 1, 1), value[None].float(), measured[None], none.long(), none.view(1, 1), wanted)


def belief(mean):
    flat = torch.ones_like(mean)[None]
    return Belief(mean[None], 0.6 * flat, torch.tensor([0.8]), torch.zeros(1), torch.zeros(1))


def played(noise, wanted=lambda step: 0, steps=200):
    """A model that says 0 of dark and 10 of bright cells with a deviation of 1; `noise` (2,) is what it really is."""
    rng = np.random.default_rng(0)
    bright = torch.arange(CELLS) % 2
    mean = 10.0 * bright.float()
    value = mean + torch.from_numpy(rng.standard_normal(CELLS)).float() * torch.tensor(noise)[bright]
    order, surprises = rng.permutation(CELLS), Surprises(1, CELLS)
    measured, row = torch.zeros(CELLS, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    for step in range(steps):
        found = surprises.calibrated(belief(mean), scene(value, measured, wanted(step)), row)
        measured[order[step]] = True
    return found.spread[0, 0].item(), found.spread[0, 1].item(), surprises


def test_deviations_grow_where_the_surprises_are():
    dark, bright, _ = played((1.0, 3.0))
    assert dark == pytest.approx(1.0, abs=0.2) and bright == pytest.approx(3.0, rel=0.2)


def test_a_few_surprises_in_dark_cells_are_none_in_bright_ones():
    """Three in dark cells: what is expected of bright ones stays the model's own."""
    dark, bright, _ = played((4.0, 1.0), steps=8)
    assert dark > 1.15 and bright == pytest.approx(1.0, abs=0.1)


def test_a_model_that_was_too_cautious_is_left_alone():
    dark, bright, _ = played((0.2, 0.2))
    assert dark == pytest.approx(1.0) and bright == pytest.approx(1.0)


def test_surprises_about_another_wish_and_of_another_episode_are_forgotten():
    dark, bright, surprises = played((1.0, 3.0), wanted=lambda step: int(step == 199))
    assert bright == pytest.approx(1.0), "all were about what was wanted before"
    _, bright, surprises = played((1.0, 3.0))
    surprises.forget(torch.tensor([0]))
    mean = torch.zeros(CELLS)
    found = surprises.calibrated(belief(mean), scene(mean, torch.zeros(CELLS, dtype=torch.bool)), torch.tensor([0]))
    torch.testing.assert_close(found.spread, torch.ones(1, CELLS))


def test_what_is_believed_otherwise_stays():
    mean = torch.linspace(0.0, 1.0, CELLS)
    before = belief(mean)
    after = Surprises(1, CELLS).calibrated(before, scene(mean, torch.ones(CELLS, dtype=torch.bool)), torch.tensor([0]))
    assert torch.equal(after.mean, before.mean) and torch.equal(after.deviation, before.deviation)
