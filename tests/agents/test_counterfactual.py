"""A replay makes the recorded choices; one thing changed changes what follows from it and nothing else."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from agents.dkl import DeepKernelAgent
from agents.engine import counterfactual
from agents.engine.acquisition import MaximumVariance, Thompson, UpperConfidenceBound
from agents.engine.counterfactual import replay, what_if_acquisition, what_if_measured, what_if_wanted
from agents.engine.decision_log import DecisionLog
from agents.engine.recorded_spectra import axis_of, recorded_spectra
from agents.engine.supervision import run_supervised
from agents.engine.verdicts import Approve, Pin, Prefer, Veto, Want
from stem_gym.core.config import parse
from stem_gym.core.errors import ConfigError, RecordError, UnknownNameError
from stem_gym.core.scalarizers import NamedScalarizer
from tests.agents.recorded import PLACES, TASK, Script, quick_agent, search_env

MEASURES = [parse(NamedScalarizer, part, "test").measure for part in TASK["scalarizers"]]
EDGE, BAND, ODD = MEASURES
DONE = 5  # steps of the plain log that are asked about: two of them believe something


@pytest.fixture(scope="module")
def supervised(tmp_path_factory) -> DecisionLog:
    """An episode in which a person says one of everything."""
    env = search_env()
    lines = {
        1: [Veto((3,)), lambda m: Veto((m.chosen,))],
        4: [Prefer(Thompson()), lambda m: Pin(int(np.flatnonzero(m.free)[4]))],
        5: [Want("odd")],
        7: [Want("band"), Prefer(UpperConfidenceBound(deviations=1.0))],
    }
    folder = tmp_path_factory.mktemp("supervised")
    run_supervised(quick_agent(env), env, Script(lines), folder, seed=11)
    return DecisionLog.read(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> DecisionLog:
    folder, env = tmp_path_factory.mktemp("plain"), search_env()
    run_supervised(quick_agent(env), env, None, folder, seed=3)
    return DecisionLog.read(folder)


def assert_same(one, other) -> None:
    for key in ("mean", "deviation", "acquisition", "embedding", "chosen", "seeding"):
        np.testing.assert_array_equal(getattr(one, key), getattr(other, key), key)


def test_a_replay_without_a_change_decides_as_recorded(supervised):
    """Bit for bit, also after vetoes, pins, random draws of Thompson's and changed wishes."""
    for step in range(9):
        assert_same(replay(supervised, step), supervised.upto(step)[-1].decision)


def test_every_row_of_a_batch_is_replayed_by_itself(tmp_path):
    """Choices are the same; sums of a batch may round in another way than those of one row."""
    env = search_env(rows=2)
    run_supervised(quick_agent(env), env, log=tmp_path, seed=5)
    log = DecisionLog.read(tmp_path)
    for row in (0, 1):
        again, recorded = replay(log, row=row), log.row(row)[-1].decision
        assert again.chosen == recorded.chosen
        scale = np.abs(recorded.mean).max()
        np.testing.assert_allclose(again.mean, recorded.mean, rtol=0, atol=1e-4 * scale)


def test_another_acquisition_function_changes_the_choice_alone(plain):
    case = what_if_acquisition(plain, MaximumVariance(), DONE)
    np.testing.assert_array_equal(case.decision.mean, case.recorded.mean)
    np.testing.assert_array_equal(case.decision.deviation, case.recorded.deviation)
    free = plain.upto(DONE)[-1].observation["measured"].ravel() == 0
    assert case.decision.chosen[0] == np.where(free, case.recorded.deviation.ravel(), -1.0).argmax()
    assert case.changed == (case.decision.chosen[0] != case.recorded.chosen[0])
    assert not what_if_acquisition(plain, plain.row(0)[0].acquisition, DONE).changed


def test_values_computed_from_the_record_are_those_that_were_told(supervised):
    """Of three scalarizers, one of which compares with the mean of all before; to float32 of sums over 128 channels."""
    spectra = recorded_spectra(supervised.row(0), supervised.task)
    assert sorted(set(spectra.wanted.tolist())) == [0, 1, 2]
    every = torch.stack([spectra.values(measure) for measure in MEASURES])
    again = every[torch.as_tensor(spectra.wanted), torch.arange(8)]
    torch.testing.assert_close(again, spectra.told, rtol=2e-4, atol=1e-6)
    assert spectra.missed_by(MEASURES) < 1e-3
    assert spectra.missed_by([EDGE, EDGE, EDGE]) > 0.1


def test_the_wish_that_was_recorded_changes_nothing(plain):
    case = what_if_wanted(plain, "edge", DONE)
    assert not case.changed and case.note == ""
    scale = np.abs(case.recorded.mean).max()
    np.testing.assert_allclose(case.decision.mean, case.recorded.mean, rtol=0, atol=1e-3 * scale)


def test_the_opposite_wish_believes_the_opposite(plain):
    """A Gaussian process is odd in its values, and so is what it learns of them."""
    case = what_if_wanted(plain, -1.0 * EDGE, DONE)
    scale = np.abs(case.recorded.mean).max()
    np.testing.assert_allclose(case.decision.mean, -case.recorded.mean, rtol=0, atol=1e-3 * scale)
    np.testing.assert_allclose(case.decision.deviation, case.recorded.deviation, rtol=1e-3)
    assert case.changed


def test_another_wish_of_the_task_sees_its_own_values(plain):
    case = what_if_wanted(plain, "band", DONE)
    spectra = recorded_spectra(plain.upto(DONE), plain.task)
    expected = spectra.rate[:, (spectra.axis >= 450.0) & (spectra.axis <= 500.0)].sum(1)
    around = case.decision.mean.ravel()[spectra.cell]
    assert np.corrcoef(around, expected)[0, 1] > 0.5, "the belief follows the band that was asked about"
    assert case.decision.mean.max() < 3 * float(expected.max())


def test_a_wish_that_can_not_be_is_refused(plain):
    with pytest.raises(UnknownNameError, match="Did you mean 'edge'"):
        what_if_wanted(plain, "egde")
    window = {"kind": "band_integral", "window": {"low_ev": 900.0, "high_ev": 950.0}}
    outside = parse(NamedScalarizer, {"name": "far", "measure": window}, "test").measure
    with pytest.raises(ConfigError, match="900 to 950 eV is not inside the spectrum"):
        what_if_wanted(plain, outside)


def test_averaged_channels_are_said(tmp_path):
    env = search_env(task=TASK | {"spectrum_channels": 50, "measurements": 4})
    run_supervised(quick_agent(env), env, None, tmp_path, seed=1)
    case = what_if_wanted(DecisionLog.read(tmp_path), "edge")
    assert "recorded in 50 channels" in case.note and "%" in case.note


def test_measured_where_it_was_measured_nothing_changes(plain):
    chosen = int(plain.upto(DONE)[-1].decision.chosen[0])
    case = what_if_measured(plain, DONE, chosen)
    assert_same(case.decision, plain.upto(DONE + 1)[-1].decision)


def test_what_the_agent_is_shown_differs_in_what_was_changed_alone(plain):
    """Where and what was measured in truth, put in as a change, gives the observation that was recorded."""
    entries = plain.upto(DONE + 1)
    spectra = recorded_spectra(entries, plain.task)
    now, cell = entries[-1], int(spectra.cell[-1])
    rate, before = spectra.rate[-1].numpy(), entries[-2].observation["measured"]
    elsewhere = counterfactual._Elsewhere(DONE + 1, cell, float(spectra.told[-1]), rate, before)
    wanted = counterfactual._Wanted(spectra, spectra.values(EDGE), 0, None)
    for change in (elsewhere, wanted):
        for key, value in change.observation(now).items():
            tolerance = 2e-4 * np.abs(now.observation[key]).max()  # float32 sums over 128 channels
            np.testing.assert_allclose(value, now.observation[key], rtol=0, atol=tolerance, err_msg=key)
            assert value.dtype == now.observation[key].dtype
    other = next(c for c in range(120) if c % 12 != c // 12 and c not in spectra.cell)
    seen = counterfactual._Elsewhere(DONE + 1, other, 7.0, rate, before).observation(now)
    assert seen["measured"].sum() == DONE + 1 and seen["value"][other // 12, other % 12] == 7.0 == seen["last_value"][0]
    np.testing.assert_allclose(seen["probe"], ((other % 12 + 0.5) / 12, (other // 12 + 0.5) / 10))
    assert seen["measured"].ravel()[cell] == 0 == seen["value"].ravel()[cell]


def test_a_high_value_elsewhere_draws_the_belief(plain):
    measured = plain.upto(DONE + 1)[-1].observation["measured"].ravel() > 0
    cell = int(np.flatnonzero(~measured)[0])
    highest = float(plain.upto(DONE)[-1].observation["value"].max())
    low, high = (what_if_measured(plain, DONE, cell, value) for value in (0.0, 2.0 * highest))
    assert high.decision.mean.ravel()[cell] > low.decision.mean.ravel()[cell] + 0.2 * highest
    assert cell not in (high.decision.chosen[0], low.decision.chosen[0]), "it is measured"


def test_what_a_later_measurement_found_is_taken_from_the_record(plain):
    spectra = recorded_spectra(plain.row(0), plain.task)
    later = int(spectra.cell[-1])
    case = what_if_measured(plain, DONE, later)
    assert_same(case.decision, what_if_measured(plain, DONE, later, float(spectra.told[-1])).decision)
    rate = spectra.rate[-1].numpy()
    by_spectrum = what_if_measured(plain, DONE, later, spectrum=rate).decision
    np.testing.assert_allclose(by_spectrum.mean, case.decision.mean, rtol=1e-3, atol=1e-3 * np.abs(rate).max())


def test_a_measurement_that_can_not_be_is_refused(plain):
    spectra = recorded_spectra(plain.row(0), plain.task)
    unknown = int(np.setdiff1d(np.arange(120), [*spectra.cell, *plain.row(0)[-1].decision.chosen])[0])
    for cell, step, said in (
        (int(spectra.cell[0]), DONE, f"was measured before step {DONE}"),
        (120, DONE, "cells 0 to 119; given 120"),
        (unknown, DONE, "give value or spectrum"),
        (unknown, 8, "steps 0 to 8 of row 0; asked for step 9"),
    ):
        with pytest.raises(RecordError, match=said):
            what_if_measured(plain, step, cell)


class _Reader(DeepKernelAgent):
    """Believes something of spectra."""

    def predict(self, scene, rows):
        belief = super().predict(scene, rows)
        return counterfactual.replace(belief, mean=belief.mean + 0.0 * scene.spectrum.sum(1, keepdim=True))


def test_an_agent_that_reads_spectra_must_be_given_one(plain, monkeypatch):
    monkeypatch.setattr(counterfactual, "policy_class", lambda name: _Reader)
    measured = plain.upto(DONE + 1)[-1].observation["measured"].ravel() > 0
    spectra = recorded_spectra(plain.row(0), plain.task)
    cell = next(
        int(c) for c in np.flatnonzero(~measured) if c not in spectra.cell and c != plain.row(0)[-1].decision.chosen
    )
    with pytest.raises(RecordError, match="reads spectra: give the spectrum"):
        what_if_measured(plain, DONE, cell, 1.0)
    what_if_measured(plain, DONE, cell, 1.0, spectrum=spectra.rate[0].numpy())


def test_places_and_exposures_are_read_from_the_actions(tmp_path):
    """Exposures that differ weigh the mean spectrum, with which an anomaly compares."""
    env = search_env(**PLACES)
    policy = quick_agent(env, exposure_share=0.1)

    def hook(moment):
        """The exposure grows from step to step."""
        policy.settings = policy.settings.model_copy(update={"exposure_share": 0.1 * (moment.step + 2)})
        return Want("odd") if moment.wanted == "edge" and moment.step else Approve()

    run_supervised(policy, env, hook, tmp_path, seed=2)
    log = DecisionLog.read(tmp_path)
    assert log.row(0)[0].action.shape == (3,)
    assert recorded_spectra(log.row(0), log.task).missed_by(MEASURES) < 1e-3


def test_patterns_have_the_angles_of_their_pixels(tmp_path):
    """The centre of mass that the environment told comes out of the recorded pattern."""
    task, shape = {"measurements": 4}, {"shape": [8, 8]}
    env = gymnasium.make("stem_gym/SpectrumSearch-fields-v0", task=task, instrument=shape)
    run_supervised(quick_agent(env), env, Script({1: [Want("along_x")]}), tmp_path, seed=2)
    log = DecisionLog.read(tmp_path)
    spectra = recorded_spectra(log.row(0), log.task)
    along = [parse(NamedScalarizer, part, "test").measure for part in log.task["scalarizers"]]
    assert spectra.axis.shape == (256, 2) and spectra.missed_by(along) < 1e-3
    odd = {"axis": np.array([-8.0, 8.0]), "spectrum": np.zeros(50)}
    with pytest.raises(RecordError, match="50 channels, which are not those of a square"):
        axis_of(odd, log.task)
