"""What must hold for every shipped surrogate, and for the contract's own parts."""

from __future__ import annotations

import json
import re
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from stem_gym.core.errors import RecordError, StemGymError, ValidRangeError
from stem_gym.surrogates.atom_finder import NetworkFinder
from stem_gym.surrogates.displacement import DisplacementSurrogate
from stem_gym.surrogates.im2spec import Im2Spec
from stem_gym.surrogates.imaging import ImagingSurrogate
from stem_gym.surrogates.surrogate import (
    Estimate,
    ModelCard,
    Surrogate,
    UncertaintyWarning,
    judge_range,
    load_weights,
    save_weights,
)

WEIGHTS = Path(str(files("stem_gym.surrogates") / "weights"))
SHIPPED = sorted(path.with_suffix("") for path in WEIGHTS.glob("*.safetensors"))
LOADERS = {
    "imaging_haadf": ImagingSurrogate.load,
    "atom_finder": NetworkFinder.load,
    "displacement": DisplacementSurrogate.load,
    "im2spec": Im2Spec.load,
}
# For each card a line of its Markdown, where the JSON has the figure that the line shows, and how that is rounded.
FIGURES = {
    "imaging_haadf": (r"\| all seen kinds \| all \| [\d.]+ \| ([\d.]+) \|", ("source_0.7_ang", "r2"), 1e-5),
    "atom_finder": (
        r"\| 40 pA, 2 s, 25 Å, 64 px \| network \| \d+ \| [\d.]+ % \| [\d.]+ % \| ([\d.]+) \|",
        ("usual", "network", "rms_ang"),
        1e-3,
    ),
    "displacement": (r"\| expected calibration error \| ([\d.]+) \|", ("expected_calibration_error",), 1e-4),
    "im2spec": (r"\| explained from 20 spectra \| ([\d.]+) \|", ("explained_from_20",), 1e-3),
}
CARD = ModelCard("toy", "nothing", "none", {}, {}, {"energy_kev": (60.0, 100.0)})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_surrogate_is_data_with_a_card(path: Path) -> None:
    files_of_it = [path.with_suffix(suffix) for suffix in (".safetensors", ".json", ".md")]
    assert all(file.exists() for file in files_of_it)
    assert sum(file.stat().st_size for file in files_of_it) < 5_000_000
    surrogate = LOADERS[path.name](path)
    assert isinstance(surrogate, Surrogate)
    card = surrogate.card
    assert card.name == path.name
    assert all((card.stands_for, card.reference, card.training, card.held_out, card.valid_range, card.limits))
    assert all(low <= high for low, high in card.valid_range.values())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_markdown_says_what_the_json_says(path: Path) -> None:
    card = json.loads(path.with_suffix(".json").read_text())["card"]
    text = path.with_suffix(".md").read_text()
    pattern, keys, rounding = FIGURES[path.name]
    shown = re.search(pattern, text)
    assert shown is not None
    figure = card["held_out"]
    for key in keys:
        figure = figure[key]
    assert float(shown[1]) == pytest.approx(figure, abs=rounding)


def test_weights_round_trip(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, 3)}
    save_weights(tmp_path / "toy", tensors, CARD, {"width": 3})
    found, card, settings = load_weights(tmp_path / "toy")
    assert card == CARD and settings == {"width": 3}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.json", "toy.safetensors"]


def test_foreign_damaged_or_missing_weights_are_told(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="nowhere"):
        load_weights(tmp_path / "nowhere")
    save_weights(tmp_path / "toy", {"a": torch.arange(4.0)}, CARD, {})
    shutil.copy(tmp_path / "toy.json", tmp_path / "other.json")
    save_weights(tmp_path / "second", {"a": torch.arange(5.0)}, CARD, {})
    shutil.copy(tmp_path / "second.safetensors", tmp_path / "other.safetensors")
    with pytest.raises(RecordError, match="SHA-256"):
        load_weights(tmp_path / "other")
    (tmp_path / "toy.json").write_text("{")
    with pytest.raises(RecordError, match=r"toy\.safetensors beside toy\.json"):
        load_weights(tmp_path / "toy")
    assert issubclass(RecordError, StemGymError)


def test_rows_outside_the_range_are_flagged_or_refused() -> None:
    energy = torch.tensor([60.0, 100.0, 120.0, 40.0])
    with pytest.warns(UncertaintyWarning, match=r"energy_kev from 40 to 120 \(valid: 60 to 100\)"):
        inside = judge_range(CARD, {"energy_kev": (energy, energy)}, strict=False)
    assert inside.tolist() == [True, True, False, False]
    with pytest.raises(ValidRangeError, match="physics model"):
        judge_range(CARD, {"energy_kev": (energy, energy)}, strict=True)


def test_interval_is_90_percent_of_a_normal_distribution() -> None:
    low, high = Estimate(torch.zeros(1), torch.ones(1), torch.ones(1, dtype=torch.bool)).interval()
    inside = 0.5 * (torch.erf(high / 2**0.5) - torch.erf(low / 2**0.5))
    assert float(inside) == pytest.approx(0.90, abs=1e-4)
