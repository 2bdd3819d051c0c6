"""The spectrum surrogate in a running episode: it follows the truth, and what is wanted may change without a fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.engine.spectrum_model import SpectrumModel
from agents.policy import Face
from stem_gym.core.errors import ConfigError, PolicyError
from tests.agents.spectral_field import SCALARIZERS, SIDE, Field, face

ONE_S = np.ones(2)


def played(field: Field, model: SpectrumModel, steps: int, seed: int = 0) -> None:
    """Random cells, shown one by one."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        field.measure(rng.integers(SIDE * SIDE, size=len(field.cell)))
        model.learn(field.observation(), np.ones(len(field.cell)))


def explained(told: torch.Tensor, truth: torch.Tensor) -> float:
    """Share of the truth's variance."""
    return 1.0 - float((told - truth).square().mean() / truth.var())


def test_what_is_wanted_is_read_off_the_same_spectra_without_another_fit() -> None:
    field, model = Field(2), SpectrumModel(face(2), "im2spec", 64)
    played(field, model, 25)
    fits, told = model.fits, {}
    assert fits == 25
    for number in (0, 1):
        field.wanted[:] = number
        observation = field.observation()
        model.learn(observation, ONE_S)
        told[number] = model.wanted(observation).mean
    assert model.fits == fits
    for row in range(2):
        for number in (0, 1):
            right, wrong = (explained(told[number][row], field.truth(other)[row]) for other in (number, 1 - number))
            assert right > 0.7 and right > wrong + 0.1


def test_rows_may_want_different_things() -> None:
    field, model = Field(2), SpectrumModel(face(2), "im2spec", 64)
    played(field, model, 12)
    single = []
    for number in (0, 2):
        field.wanted[:] = number
        single.append(model.wanted(field.observation()).mean)
    field.wanted[:] = (0, 2)
    mixed = model.wanted(field.observation()).mean
    assert torch.allclose(mixed[0], single[0][0]) and torch.allclose(mixed[1], single[1][1])


def test_intervals_of_what_is_wanted_hold_what_they_promise() -> None:
    """90 % intervals over 6 specimens after 20 random measurements: 80 % at least, and narrower than the map."""
    field, model = Field(6, seed=4), SpectrumModel(face(6), "im2spec", 64)
    played(field, model, 20)
    for number in (0, 1):
        field.wanted[:] = number
        told = model.wanted(field.observation())
        inside = (told.mean - field.truth(number)).abs() < 1.645 * told.deviation
        assert float(inside.float().mean()) > 0.8
        assert bool((told.deviation.median(1).values < 0.8 * field.truth(number).std(1)).all())


def test_a_row_that_begins_anew_knows_nothing_and_the_other_keeps_what_it_knew() -> None:
    field, model = Field(2), SpectrumModel(face(2), "im2spec", 64)
    played(field, model, 8)
    before = model.wanted(field.observation())
    model.forget(np.array([0]))
    field.measured[0] = 0
    model.learn(field.observation(), ONE_S)
    told = model.wanted(field.observation())
    assert bool((told.mean[0] == 0).all()) and bool((told.deviation[0] == 1).all())
    assert torch.allclose(told.mean[1], before.mean[1], rtol=1e-4)


def test_a_new_image_is_encoded_and_fitted() -> None:
    field, model = Field(2), SpectrumModel(face(2), "im2spec", 64)
    played(field, model, 6)
    features, fits = model.features.clone(), model.fits
    other = field.observation()
    other["image"] = other["image"].copy()
    other["image"][1] = other["image"][1].T
    model.learn(other, ONE_S)
    assert model.fits == fits + 1
    assert torch.equal(model.features[0], features[0]) and not torch.equal(model.features[1], features[1])


def test_a_face_without_an_energy_axis_is_refused() -> None:
    with pytest.raises(PolicyError, match="learns spectra along an energy axis"):
        SpectrumModel(face(2, detector="diffraction"), "im2spec", 64)
    with pytest.raises(PolicyError, match="learns spectra along an energy axis"):
        SpectrumModel(Face("other/Task-v0", 1, face(1).observation_space, face(1).action_space, {}), "im2spec", 64)


def test_a_scalarizer_that_the_channels_shown_do_not_resolve_is_told() -> None:
    narrow = {"name": "n", "measure": {"kind": "band_integral", "window": {"low_ev": 451.0, "high_ev": 452.0}}}
    field, model = Field(2), SpectrumModel(face(2, scalarizers=[narrow, *SCALARIZERS[1:]]), "im2spec", 64)
    played(field, model, 2)
    with pytest.raises(ConfigError, match="holds 0 channel"):
        model.wanted(field.observation())
