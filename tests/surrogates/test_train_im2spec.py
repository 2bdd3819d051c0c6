"""The training command: it learns, calibrates, and writes everything a loader needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stem_gym.surrogates import train_im2spec
from stem_gym.surrogates.im2spec import Im2Spec, Im2SpecNetwork
from stem_gym.surrogates.im2spec_lessons import draw_lesson
from stem_gym.surrogates.train_im2spec import lesson_loss, new_network
from tests.surrogates.spectral_toys import blobs

SETTINGS = {"rate": 1e-2, "rows": 4, "asked": 64, "modes": 4}


def trained(seed: int, steps: int = 3) -> Im2SpecNetwork:
    network = new_network(6, 4, seed)
    rng = np.random.default_rng(seed)
    train_im2spec.train(network, rng, [blobs(0, 16)], SETTINGS | {"steps": steps}, lambda *_: None)
    return network


def test_a_seed_decides_everything() -> None:
    def numbers(seed: int) -> torch.Tensor:
        return torch.cat([p.flatten() for p in trained(seed).parameters()])

    assert torch.equal(numbers(1), numbers(1))
    assert not torch.equal(numbers(1), numbers(2))


def test_training_lowers_the_loss_on_other_specimens() -> None:
    rng = np.random.default_rng(9)
    lessons = [draw_lesson(rng, [blobs(1, 8)], 8, 25, 64) for _ in range(4)]

    def loss(network: Im2SpecNetwork) -> float:
        return float(np.mean([float(lesson_loss(network, lesson, 4).detach()) for lesson in lessons]))

    assert loss(trained(0, steps=80)) < loss(new_network(6, 4, 0)) - 0.05


def test_a_lesson_is_turned_with_its_truth() -> None:
    """Spectra follow the image: the brightest pixels of the toys have the most of the first line."""
    for seed in range(6):
        lesson = draw_lesson(np.random.default_rng(seed), [blobs(2, 4)], 2, 20, 400)
        brightness = lesson.image.flatten(1).gather(1, lesson.asked)
        total = lesson.truth.sum(-1)
        both = torch.stack((brightness[0], total[0]))
        assert float(torch.corrcoef(both)[0, 1]) > 0.6
        measured = torch.stack((lesson.image.flatten(1).gather(1, lesson.cell)[0], lesson.spectra.sum(-1)[0]))
        assert float(torch.corrcoef(measured)[0, 1]) > 0.4


def test_training_writes_a_loadable_surrogate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "im2spec"
    state = torch.random.get_rng_state()
    arguments = f"--out {out} --steps 4 --rows 2 --asked 32 --specimens 3 --lessons 1 --width 4 --features 3".split()
    train_im2spec.main(arguments)
    assert torch.equal(torch.random.get_rng_state(), state)
    surrogate = Im2Spec.load(out)
    assert surrogate.settings["width"] == 4 and surrogate.settings["std_factor"] > 0
    card = surrogate.card
    assert card.training["lessons"] == 4 and len(card.held_out["all"]) == 5 * len(card.training["recipes"])
    text = out.with_suffix(".md").read_text()
    assert all(f"| {name} | 100 |" in text for name in card.training["recipes"])
    assert "4/4" in capsys.readouterr().out
