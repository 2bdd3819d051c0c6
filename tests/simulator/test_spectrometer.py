"""Counts of a spectrometer: Poisson statistics, and each nuisance by itself."""

import math

import pytest
import torch
from pydantic import ValidationError

from stem_gym.core.streams import Streams, row_seeds
from stem_gym.simulator.spectrometer import (
    SpectrometerModel,
    detect_spectrum,
    displaced,
    expected_counts,
    fixed_pattern,
)

ELECTRONS_PER_PC = 6.241509074e6


def measure(expected, model, current_pa=100.0, exposure_s=0.1, rows=None):
    """Counts of rows of a batch of 400 seeds."""
    chosen = torch.arange(len(expected)) if rows is None else torch.tensor(rows)
    streams = Streams(row_seeds(5, 400))
    current, exposure = (torch.full((len(expected),), value) for value in (current_pa, exposure_s))
    return detect_spectrum(expected, streams, chosen, current, exposure, model)


def test_expected_counts_are_electrons_times_signal():
    expected = torch.tensor([[1e-6, -1.0], [1e-6, 2e-6]])
    counts = expected_counts(
        expected, torch.tensor([100.0, 50.0]), torch.tensor([0.1, 1.0]), SpectrometerModel(quantum_efficiency=0.5)
    )
    unit = 1e-6 * ELECTRONS_PER_PC
    torch.testing.assert_close(counts, unit * torch.tensor([[5.0, 0.0], [25.0, 50.0]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mean", [0.02, 0.8, 600.0], ids=["EDS", "weak", "EELS"])
def test_counts_are_poisson(mean):
    expected = torch.full((400, 128), mean / (10.0 * ELECTRONS_PER_PC))
    counts = measure(expected, SpectrometerModel())
    n = counts.numel()
    # 5 standard errors of mean and variance of a Poisson law.
    assert counts.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(mean / n))
    assert counts.var().item() == pytest.approx(mean, abs=5 * math.sqrt((2 * mean**2 + mean) / n))
    assert torch.equal(counts, counts.round())


def test_quantum_efficiency_and_gain_change_mean_and_noise_apart():
    # Half the electrons at twice the gain: the same mean of 100 counts, twice the variance of 2 · 100.
    expected = torch.full((400, 128), 100.0 / (10.0 * ELECTRONS_PER_PC))
    counts = measure(expected, SpectrometerModel(quantum_efficiency=0.5, gain=2.0))
    n = counts.numel()
    assert counts.mean().item() == pytest.approx(100.0, abs=5 * math.sqrt(200.0 / n))
    assert counts.var().item() == pytest.approx(200.0, rel=5 * math.sqrt(2.0 / n) + 0.01)


def test_read_noise_is_about_the_offset_and_is_not_clipped():
    model = SpectrometerModel(offset=40.0, read_noise=6.0)
    counts = measure(torch.zeros(400, 128), model)
    n = counts.numel()
    variance = 36.0 + 1.0 / 12.0  # rounding adds a twelfth
    assert counts.mean().item() == pytest.approx(40.0, abs=5 * math.sqrt(variance / n))
    assert counts.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2.0 / n))


def test_calibration_gives_back_the_rate():
    model = SpectrometerModel(offset=50.0, gain=3.0, read_noise=5.0)
    expected = torch.linspace(1e-6, 3e-6, 128).expand(400, -1)
    rate = (measure(expected, model) - model.offset) / model.gain / 0.1
    truth = expected[0] * 100.0 * ELECTRONS_PER_PC
    # Mean over 400 rows of at most 190 electrons each and the amplifier's noise: 5 standard errors.
    error = 5 * torch.sqrt((truth * 0.1 + (5.0 / 3.0) ** 2) / 400) / 0.1
    assert ((rate.mean(0) - truth).abs() < error).all()


def test_a_displaced_spectrum_moves_up_the_axis():
    peak = torch.zeros(3, 32)
    peak[:, 10] = 1.0
    moved = displaced(peak, torch.tensor([2.0, -3.0, 0.25]))
    assert moved[0].argmax() == 12 and moved[1].argmax() == 7
    assert moved[2, 10].item() == pytest.approx(0.75) and moved[2, 11].item() == pytest.approx(0.25)
    torch.testing.assert_close(moved.sum(-1), torch.ones(3))
    ramp = torch.arange(32.0).expand(1, -1)
    torch.testing.assert_close(displaced(ramp, torch.tensor([1.5]))[0, 3:], ramp[0, 3:] - 1.5)
    assert (displaced(torch.ones(1, 8), torch.tensor([5.0])) == 1.0).all(), "the last channel goes on"


def test_energy_drift_is_uniform_up_to_its_largest():
    line = torch.zeros(400, 64)
    line[:, 32] = 1e-3
    counts = measure(line, SpectrometerModel(energy_drift_channels=2.0))
    place = (counts * torch.arange(64.0)).sum(-1) / counts.sum(-1) - 32.0
    # 62,000 electrons tell the place to 0.002 channels; 5 standard errors of mean and rms of 400 uniform draws.
    assert place.abs().max() <= 2.02
    assert place.mean().item() == pytest.approx(0.0, abs=5 * 2 / math.sqrt(3 * 400))
    assert place.std().item() == pytest.approx(2 / math.sqrt(3), rel=5 * math.sqrt(0.8 / 4 / 400))


def test_the_gain_pattern_is_fixed_and_belongs_to_the_detector():
    model = SpectrometerModel(gain_pattern=0.05, gain_pattern_seed=3)
    pattern = fixed_pattern(128, model)
    # 5 standard errors of a standard deviation of 128 values.
    assert pattern.std().item() == pytest.approx(0.05, rel=5 / math.sqrt(2 * 128))
    assert not torch.equal(pattern, fixed_pattern(128, SpectrometerModel(gain_pattern=0.05, gain_pattern_seed=4)))
    expected = torch.full((400, 128), 1e-4)
    seen = measure(expected, model).mean(0) / (1e-4 * 10 * ELECTRONS_PER_PC)
    # 400 spectra of 6,200 electrons: 0.06 % a channel.
    torch.testing.assert_close(seen, pattern, rtol=0, atol=5 * 6.4e-4)


def test_spikes_are_rare_and_large():
    model = SpectrometerModel(spikes_per_s=0.5, spike_electrons=2000.0)
    counts = measure(torch.zeros(400, 128), model, exposure_s=1.0)
    struck = counts > 0
    assert struck.sum(-1).max() == 1, "one channel a reading"
    share = 1 - math.exp(-0.5)
    hits = struck.any(-1).double().mean().item()
    assert hits == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 400))
    # Exponential sizes: their standard deviation is their mean.
    assert counts[struck].mean().item() == pytest.approx(2000.0, rel=5 / math.sqrt(400 * share))
    channels = struck.double().argmax(-1)[struck.any(-1)].double()
    assert channels.mean().item() == pytest.approx(63.5, abs=5 * 37 / math.sqrt(400 * share))


def test_counts_saturate():
    counts = measure(torch.full((4, 16), 1e-3), SpectrometerModel(saturation=1000.0))
    assert (counts == 1000.0).all()


def test_rows_have_their_own_noise_whatever_the_batch():
    model = SpectrometerModel(
        offset=30.0, read_noise=3.0, energy_drift_channels=1.0, gain_pattern=0.02, spikes_per_s=2.0, gain=1.7
    )
    expected = torch.rand(20, 100) * 1e-5
    whole = measure(expected, model, rows=range(20))
    part = measure(expected[[11, 4]], model, rows=[11, 4])
    assert torch.equal(part, whole[[11, 4]])


@pytest.mark.parametrize(
    "wrong", [{"gain": 0.0}, {"read_noise": 2.0, "offset": 5.0}, {"quantum_efficiency": 1.2}, {"gian": 1.0}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        SpectrometerModel(**wrong)
