"""The training command on a handful of pictures: it learns, calibrates, and writes everything a loader needs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from stem_gym.core.errors import RecordError
from stem_gym.datasets.pictures import load_bundle, save_picture
from stem_gym.surrogates import train_imaging
from stem_gym.surrogates.imaging import ImagingSurrogate
from stem_gym.surrogates.imaging_reference import load_set

PICTURES = Path(__file__).parents[2] / "benchmarks" / "held_out_haadf.npz"
STEPS = 30


@pytest.mark.filterwarnings("ignore::stem_gym.surrogates.surrogate.UncertaintyWarning")
def test_training_writes_a_loadable_surrogate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = {name: p for name, p in load_bundle(PICTURES).items() if "graphene" in name}
    for number, picture in enumerate(list(pictures.values())[:6]):
        split = ("train", "train", "train", "train", "valid", "held_out")[number]
        save_picture(picture, tmp_path / f"{split}-{picture.kind}-{number}.npz")
    table = ImagingSurrogate.load().table
    np.savez(tmp_path / "single_atoms.npz", **{name: value.numpy() for name, value in vars(table).items()})
    out, bundle = tmp_path / "toy", tmp_path / "bundle.npz"
    files = f"--data {tmp_path} --out {out} --bundle {bundle}"
    arguments = f"{files} --steps {STEPS} --spread-steps 10 --pictures 2 --rows 2 --width 8"
    train_imaging.main(arguments.split())
    surrogate = ImagingSurrogate.load(out)
    assert surrogate.card.training["specimens"] == 4
    assert surrogate.card.held_out["source_0.7_ang"]["r2"] > 0.9  # the sum over atoms is the start
    assert len(surrogate.settings["calibration"]) == len(train_imaging.CALIBRATION_FWHM_ANG)
    assert "held-out" in out.with_suffix(".md").read_text().lower()
    assert list(load_bundle(bundle)) == ["held_out-graphene_silicon-5"] or len(load_bundle(bundle)) == 1
    assert re.search(rf"step {STEPS}/{STEPS}  loss .* steps/s", capsys.readouterr().out)


def test_training_without_pictures_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"stem_gym\.datasets\.abtem_images"):
        load_set(tmp_path, "train")
