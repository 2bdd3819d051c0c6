"""The detector chain: Poisson statistics, gain, offset, saturation, jitter."""

import math

import pytest
import torch
from pydantic import ValidationError

from stem_gym.core.streams import Streams, row_seeds
from stem_gym.simulator.detectors import (
    DetectorModel,
    detect,
    electrons_from_counts,
    expected_electrons,
    line_jitter_ang,
)


def streams(rows: int) -> Streams:
    return Streams(row_seeds(11, rows))


def test_expected_electrons_are_current_times_dwell_times_fraction():
    fraction = torch.full((2, 3, 4), 1e-3)
    expected = expected_electrons(fraction, torch.tensor([30.0, 60.0]), torch.tensor([16e-6, 8e-6]), DetectorModel())
    # 30 pA for 16 us are 2995.98 electrons (1 pA = 6.241509e6 electrons/s).
    torch.testing.assert_close(expected, torch.full((2, 3, 4), 2.99592), rtol=1e-4, atol=0)


def test_dark_electrons_come_with_time_alone():
    detector = DetectorModel(dark_electrons_per_s=1e4)
    dark = expected_electrons(torch.zeros(1, 5), torch.tensor([0.0]), torch.tensor([1e-3]), detector)
    torch.testing.assert_close(dark, torch.full((1, 5), 10.0))


def test_negative_fractions_of_a_band_limited_image_count_as_none():
    expected = expected_electrons(torch.tensor([[-1e-6]]), torch.tensor([50.0]), torch.tensor([1.0]), DetectorModel())
    assert expected.item() == 0.0


@pytest.mark.parametrize("rate", [0.3, 3.0, 40.0])
def test_counts_are_poisson(rate):
    rows = torch.arange(200)
    counts = detect(torch.full((200, 20, 20), rate), streams(200), rows, DetectorModel())
    n = counts.numel()
    # 5 standard errors of the mean and of the variance of a Poisson law.
    assert counts.mean().item() == pytest.approx(rate, abs=5 * math.sqrt(rate / n))
    assert counts.var().item() == pytest.approx(rate, abs=5 * math.sqrt((2 * rate**2 + rate) / n))
    assert torch.equal(counts, counts.round()) and counts.min() >= 0


def test_gain_offset_and_read_noise():
    detector = DetectorModel(gain=4.0, offset=100.0, read_noise=6.0)
    counts = detect(torch.full((100, 40, 40), 5.0), streams(100), torch.arange(100), detector)
    n = counts.numel()
    variance = 16.0 * 5.0 + 36.0 + 1.0 / 12.0  # rounding adds a twelfth
    assert counts.mean().item() == pytest.approx(120.0, abs=5 * math.sqrt(variance / n))
    assert counts.var().item() == pytest.approx(variance, rel=5 * math.sqrt(3.0 / n))
    assert electrons_from_counts(counts, detector).mean().item() == pytest.approx(5.0, abs=0.05)


def test_saturation_and_floor():
    detector = DetectorModel(saturation=12.0, offset=-5.0)
    counts = detect(torch.full((4, 50, 50), 10.0), streams(4), torch.arange(4), detector)
    assert counts.min() == 0.0 and counts.max() == 12.0
    assert (counts == 12.0).any() and (counts == 0.0).any()


def test_rows_have_their_own_noise_whatever_the_batch():
    expected = torch.rand(16, 8, 8) * 20
    detector = DetectorModel(read_noise=1.0)
    whole = detect(expected, streams(16), torch.arange(16), detector)
    rows = torch.tensor([9, 3])
    part = detect(expected[rows], streams(16), rows, detector)
    assert torch.equal(part, whole[rows])


def test_line_jitter_moves_lines_along_x():
    jitter = line_jitter_ang(streams(300), torch.arange(300), 64, DetectorModel(line_jitter_ang=0.2))
    assert (jitter[..., 1] == 0).all()
    # 5 standard errors of a standard deviation from 19,200 values.
    assert jitter[..., 0].std().item() == pytest.approx(0.2, rel=5 / math.sqrt(2 * 19200))


@pytest.mark.parametrize("wrong", [{"gain": 0.0}, {"inner_mrad": 200.0, "outer_mrad": 80.0}, {"gian": 1.0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        DetectorModel(**wrong)
