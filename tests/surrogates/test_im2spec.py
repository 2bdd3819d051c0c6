"""The spectrum surrogate on specimens that it was not trained on: error, coverage, fitting, refusals."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from stem_gym.core.errors import ConfigError, ValidRangeError
from stem_gym.surrogates.im2spec import Im2Spec
from stem_gym.surrogates.im2spec_card import explained, held_out_scores, window_errors
from stem_gym.surrogates.im2spec_lessons import Lesson, draw_lesson
from stem_gym.surrogates.surrogate import UncertaintyWarning
from tests.surrogates.spectral_toys import blobs

SURROGATE = Im2Spec.load()
TOYS = blobs(seed=50, count=12)
SHAPE = (32, 32)


def lesson(measured: int = 20, rows: int = 4, seed: int = 0) -> Lesson:
    return draw_lesson(np.random.default_rng(seed), [TOYS], rows, measured, 64)


def fitted(given: Lesson, **others: torch.Tensor):
    return SURROGATE.fit(SURROGATE.encode(given.image), SHAPE, given.cell, given.spectra, **others)


# --- on specimens of a law that no training set has ---


def test_more_spectra_lower_the_error_and_the_mean_spectrum_is_beaten() -> None:
    shares = {}
    for measured in (6, 20, 80):
        lessons = [lesson(measured, rows=12, seed=seed) for seed in (1, 2)]  # the same worlds and doses each time
        found = [explained(fitted(given).at(given.asked).mean(), given) for given in lessons]
        shares[measured] = float(torch.cat(found).median())
    assert 0.0 < shares[6] < shares[20] < shares[80]
    assert shares[20] > 0.4 and shares[80] > 0.75


def test_shipped_features_say_more_than_brightness_and_place() -> None:
    (entry,) = [e for e in held_out_scores(SURROGATE, {"toys": TOYS}, 3, 1) if e["measured"] == 20]
    assert entry["explained"]["im2spec"] > entry["explained"]["brightness"] > entry["explained"]["place"]


def test_intervals_hold_what_they_promise() -> None:
    """90 % intervals of window integrals, over 48 specimens and all numbers of spectra: 80 to 97 %."""
    rng, inside = np.random.default_rng(3), []
    for measured in (10, 20, 40, 80):
        given = lesson(measured, rows=12, seed=measured)
        inside.append(window_errors(rng, fitted(given).at(given.asked), given).abs() < 1.645)
    assert 0.80 < float(torch.cat(inside).float().mean()) < 0.97


def test_what_was_measured_is_met() -> None:
    given = lesson(30)
    posterior = fitted(given)
    near, far = posterior.at(given.cell), posterior
    assert float(near.coefficients.variance.mean()) < float(far.coefficients.variance.mean())


# --- the card ---


def test_the_card_keeps_what_was_promised() -> None:
    held = SURROGATE.card.held_out
    assert 0.85 < held["coverage_90_window"] < 0.95
    for entry in held["all"]:
        shares = entry["explained"]
        if entry["measured"] >= 20:
            assert shares["im2spec"] > 0.0 and shares["im2spec"] > shares["place"]


# --- the fit ---


def test_rows_of_a_batch_are_fitted_as_alone() -> None:
    given = lesson(15, rows=3)
    many = fitted(given)
    one = SURROGATE.fit(SURROGATE.encode(given.image[1:2]), SHAPE, given.cell[1:2], given.spectra[1:2])
    scale = float(many.mean()[1].std())
    assert torch.allclose(many.mean()[1], one.mean()[0], atol=1e-3 * scale)
    assert torch.allclose(many.std()[1], one.std()[0], atol=1e-3 * scale)


def test_rows_of_different_lengths_are_one_batch() -> None:
    given = lesson(15, rows=2)
    weight = torch.ones(2, 15)
    weight[1, 9:] = 0.0
    nonsense = given.spectra.clone()
    nonsense[1, 9:] = torch.nan
    many = SURROGATE.fit(SURROGATE.encode(given.image), SHAPE, given.cell, nonsense, weight)
    one = SURROGATE.fit(SURROGATE.encode(given.image[1:]), SHAPE, given.cell[1:, :9], given.spectra[1:, :9])
    assert torch.allclose(many.mean()[1], one.mean()[0], atol=1e-3 * float(one.mean().std()))


def test_the_unit_of_spectra_and_image_does_not_matter() -> None:
    given = lesson(20)
    small = replace(given, spectra=1e-6 * given.spectra, image=1e-4 * given.image)
    one, other = fitted(given), fitted(small)
    scale = float(one.mean().std())
    assert torch.allclose(one.mean(), 1e6 * other.mean(), atol=1e-2 * scale)
    assert torch.allclose(one.std(), 1e6 * other.std(), atol=1e-2 * scale)


def test_a_longer_exposure_counts_more() -> None:
    """Ten spectra at one cell, half of them wrong: the answer there follows the weights."""
    given = lesson(20, rows=1)
    cell = given.cell.clone()
    cell[0, :10] = cell[0, 0]
    spectra = given.spectra.clone()
    spectra[0, :5], spectra[0, 5:10] = 2.0 * spectra[0, 0], 0.5 * spectra[0, 0]

    def there(first: float, second: float) -> float:
        weight = torch.ones(1, 20)
        weight[0, :5], weight[0, 5:10] = first, second
        posterior = SURROGATE.fit(SURROGATE.encode(given.image), SHAPE, cell, spectra, weight)
        return float(posterior.at(cell[:, :1]).mean().sum())

    assert there(20.0, 0.05) > 1.5 * there(0.05, 20.0)


def test_spectra_without_a_single_count_are_told_as_such() -> None:
    given = lesson(8)
    posterior = SURROGATE.fit(SURROGATE.encode(given.image), SHAPE, given.cell, torch.zeros_like(given.spectra))
    assert float(posterior.mean().abs().max()) == 0.0 and bool(torch.isfinite(posterior.std()).all())


# --- range and refusal ---


def test_rows_outside_the_valid_range_are_flagged_or_refused() -> None:
    given = lesson(8, rows=2)
    weight = torch.ones(2, 8)
    weight[1, 2:] = 0.0
    with pytest.warns(UncertaintyWarning, match="measured_spectra from 2 to 8"):
        wide = SURROGATE.estimate(given.image, given.cell, given.spectra, weight)
    assert wide.inside.tolist() == [True, False]
    assert wide.mean.shape == wide.std.shape == (2, 32 * 32, 40)
    plain = fitted(given, weight=weight)
    assert torch.allclose(wide.std[1], 3.0 * plain.std()[1]) and torch.allclose(wide.std[0], plain.std()[0])
    with pytest.raises(ValidRangeError, match="measured_spectra"):
        SURROGATE.estimate(given.image, given.cell, given.spectra, weight, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SURROGATE.estimate(given.image, given.cell, given.spectra)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (torch.zeros(32, 32), r"\(B, H, W\)"),
        (torch.zeros(1, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 8, 32), "more than 8 pixels a side"),
        (torch.full((1, 32, 32), torch.nan), "finite"),
    ],
)
def test_images_that_make_no_sense_are_refused(image: torch.Tensor, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        SURROGATE.encode(image)


def test_measurements_that_make_no_sense_are_refused() -> None:
    given = lesson(8, rows=2)
    features, ones = SURROGATE.encode(given.image), torch.ones(2, 8)
    bad = given.spectra.clone()
    bad[0, 0, 0] = torch.inf
    with pytest.raises(ConfigError, match="must be finite"):
        SURROGATE.fit(features, SHAPE, given.cell, bad)
    with pytest.raises(ConfigError, match=r"0 to 1023; given torch\.int64"):
        SURROGATE.fit(features, SHAPE, given.cell + 1024, given.spectra)
    with pytest.raises(ConfigError, match="must agree"):
        SURROGATE.fit(features, SHAPE, given.cell[:, :5], given.spectra)
    with pytest.raises(ConfigError, match=r"\(B, 1024, d\)"):
        SURROGATE.fit(features[:, :9], SHAPE, given.cell, given.spectra)
    with pytest.raises(ConfigError, match="every row needs a spectrum"):
        SURROGATE.fit(features, SHAPE, given.cell, given.spectra, ones * torch.tensor([[1.0], [0.0]]))
