"""The training command in miniature: what it teaches is the truth, and it writes everything a loader needs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from stem_gym.core.units import ELECTRONS_PER_PC
from stem_gym.surrogates import atom_finder_card, train_atom_finder
from stem_gym.surrogates.atom_finder import Kind, NetworkFinder
from stem_gym.surrogates.atom_finder_frames import Frames, draw_conditions, plain_conditions
from stem_gym.surrogates.atom_finder_network import KINDS, Maps
from stem_gym.surrogates.regrid import CANVAS_PIXEL_ANG, on_canvas
from stem_gym.surrogates.surrogate import load_weights
from stem_gym.surrogates.train_atom_finder import loss, targets_of


def frames_with(places, kinds, pixels=64, pixel_ang=CANVAS_PIXEL_ANG):
    """One frame of a flat image in which atoms are said to be at `places` [(x, y)] pixels."""
    xy = torch.tensor([places])
    kind = torch.tensor([[int(kind) for kind in kinds]])
    weight = torch.where(kind == int(Kind.VACANCY), 0.0, torch.where(kind == int(Kind.SILICON), 4.8, 1.0))
    image = torch.full((1, pixels, pixels), 3e-4)
    return Frames(image, torch.tensor([pixel_ang]), torch.tensor([1e5]), xy, kind, weight, kind >= 0)


def answer_of(targets, sure=12.0):
    """Maps that say exactly the targets."""
    score = torch.where(targets.heat == 1.0, sure, -sure)
    return Maps(score, targets.offset.clone(), torch.full_like(targets.log_weight, -3.0), targets.log_weight.clone())


def test_targets_are_the_atoms_on_the_canvas():
    """A frame of twice the canvas' fineness: place p is at (p + ½) / 2 − ½ of the canvas."""
    places = [(20.3, 45.9), (60.0, 10.0), (90.0, 90.0)]
    frames = frames_with(places, (Kind.SILICON, Kind.CARBON, Kind.VACANCY), 128, CANVAS_PIXEL_ANG / 2.0)
    targets = targets_of(frames, on_canvas(frames.fraction, frames.pixel_ang, 4))
    assert (targets.heat == 1.0).sum((0, 2, 3)).tolist() == [1, 1, 1, 0]  # in the order of Kind
    for place, kind in zip(places, (Kind.SILICON, Kind.CARBON, Kind.VACANCY), strict=True):
        y, x = (targets.heat[0, kind] == 1.0).nonzero()[0].tolist()
        expected = (torch.tensor(place) + 0.5) / 2.0 - 0.5
        torch.testing.assert_close(torch.tensor([float(x), float(y)]) + targets.offset[0, :, y, x], expected)
        assert targets.near[0, y - 1 : y + 2, x - 1 : x + 2].all()
    assert int(targets.near.sum()) == 27 and int(targets.atom.sum()) == 18  # a vacancy is no atom
    assert float(targets.log_weight[targets.near].max()) == pytest.approx(1.5686, abs=1e-3)  # ln 4.8


def test_training_conditions_reach_as_far_as_the_valid_range():
    """Fields, pixels and doses that the card calls valid are drawn; a tenth, since the corners are drawn seldom."""
    drawn = [draw_conditions(np.random.default_rng(seed), 8) for seed in range(200)]
    fields = [c.fov_ang for c in drawn]
    dose = torch.cat([c.current_pa * c.frame_s * ELECTRONS_PER_PC / c.fov_ang**2 for c in drawn])
    pixel = [c.fov_ang / c.pixels for c in drawn]
    for name, values in {"field_ang": fields, "electrons_per_ang2": dose, "pixel_ang": pixel}.items():
        low, high = atom_finder_card.VALID_RANGE[name]
        assert float(min(values)) < 1.1 * low and float(max(values)) > high / 1.1, name


def test_the_right_answer_costs_least():
    frames = frames_with([(20.3, 45.9), (40.0, 10.0)], (Kind.SILICON, Kind.CARBON))
    canvas = on_canvas(frames.fraction, frames.pixel_ang, 4)
    targets = targets_of(frames, canvas)
    right = loss(answer_of(targets), targets, canvas.mask)
    for spoil in ("score", "offset", "log_weight"):
        wrong = answer_of(targets)
        getattr(wrong, spoil).add_(1.0 if spoil != "score" else 20.0)
        assert float(loss(wrong, targets, canvas.mask)) > float(right) + 0.1


def test_the_command_writes_a_loadable_finder(tmp_path: Path, monkeypatch, capsys) -> None:
    usual = {atom_finder_card.USUAL: plain_conditions(2)}
    monkeypatch.setattr(atom_finder_card, "held_out_conditions", lambda rows: usual)
    monkeypatch.setattr(train_atom_finder, "draw_conditions", lambda rng, rows: plain_conditions(rows))  # one cell
    out = tmp_path / "toy"
    train_atom_finder.main(f"--out {out} --steps 3 --rows 2 --frames 2 --width 4".split())
    finder = NetworkFinder.load(out)
    assert finder.card.training["frames"] == 6
    assert {entry["finder"] for entry in finder.card.held_out["all"]} == {"network", "classical"}
    assert finder.card.held_out["usual"]["classical"]["atoms"] > 0
    assert "## Silicon" in out.with_suffix(".md").read_text()
    assert len(finder.settings["thresholds"]) == KINDS
    assert re.search(r"step 3/3  loss .* steps/s", capsys.readouterr().out)
    before, *_ = load_weights(out)
    again = tmp_path / "again"
    train_atom_finder.main(f"--out {again} --start {out} --judge-only --rows 2 --frames 2 --width 4".split())
    after, *_ = load_weights(again)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert NetworkFinder.load(again).card.training == finder.card.training
