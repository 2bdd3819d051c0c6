"""The training command on made-up recoils: it learns, calibrates, and writes everything a loader needs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from stem_gym.core.errors import RecordError
from stem_gym.datasets.recoil_shards import OUTCOMES, Trajectories, save_shard, shard_path
from stem_gym.datasets.recoil_thresholds import Threshold
from stem_gym.datasets.recoil_trajectories import draw
from stem_gym.surrogates import train_displacement
from stem_gym.surrogates.displacement import DisplacementSurrogate
from stem_gym.surrogates.displacement_card import Recoils

THRESHOLD_EV = 20.0


def made_up(seed: int, count: int = 200) -> Trajectories:
    """Every atom is ejected above one energy, whatever the direction."""
    site, transfer, direction, weight = draw(np.random.default_rng(seed), count)
    outcome = np.where(transfer > THRESHOLD_EV, OUTCOMES.index("ejected"), 0)
    side = np.where(site < 2, 1, 0)
    return Trajectories(site, transfer, direction, weight, outcome, side, np.full(count, 500.0))


def test_training_writes_a_loadable_surrogate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(10):
        save_shard(shard_path(tmp_path, number), made_up(number), {"seed": 0})
    reference = [
        Threshold("pristine", 0.0, 0.0, "ejected", THRESHOLD_EV),
        Threshold("vacancy", 20.0, 90.0, "exchange", None),
    ]
    (tmp_path / "thresholds.json").write_text(json.dumps({"thresholds": [asdict(t) for t in reference]}))
    out = tmp_path / "displacement"
    state = torch.random.get_rng_state()
    arguments = f"--data {tmp_path} --out {out} --steps 300 --members 2 --width 16 --batch 128".split()
    train_displacement.main(arguments)
    assert torch.equal(torch.random.get_rng_state(), state)
    surrogate = DisplacementSurrogate.load(out)
    held = surrogate.card.held_out
    assert held["recoils"] == 400 and held["accuracy"] > 0.93 > held["accuracy_of_a_constant_guess"]
    assert held["thresholds"]["ejected"]["within_0.5_ev"] == 1
    assert held["thresholds"]["exchange"]["within_0.5_ev"] == 1  # both say never
    assert surrogate.card.training["trajectories"] == 1200
    text = out.with_suffix(".md").read_text()
    assert "| pristine | 0° | 0° | ejected | 20.00 |" in text and "| exchange | never | never |" in text
    assert "300/300" in capsys.readouterr().out


def test_a_seed_decides_everything() -> None:
    settings = {"steps": 5, "batch": 64, "rate": 5e-3, "decay": 0.01}

    def trained(seed: int) -> torch.Tensor:
        network = train_displacement.new_network(8, 2, seed)
        recoils = Recoils.of(made_up(0))
        train_displacement.train(network, recoils, np.random.default_rng(seed), lambda *_: None, settings)
        return torch.cat([p.flatten() for p in network.parameters()])

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_training_without_data_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"stem_gym\.datasets\.recoil_thresholds"):
        train_displacement.main(f"--data {tmp_path} --out {tmp_path / 'x'}".split())


def test_the_temperature_of_sharpened_logits_is_found() -> None:
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(0, 2, (4000, 4)))
    drawn = [rng.choice(4, p=p) for p in torch.softmax(logits, -1).numpy()]
    found = train_displacement.best_temperature(2.5 * logits, torch.tensor(np.array(drawn)))
    assert found == pytest.approx(2.5, rel=0.1)
