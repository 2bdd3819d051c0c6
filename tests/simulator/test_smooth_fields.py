"""Smooth random fields: their statistics, and what is cut out of them."""

import math

import pytest
import torch

from stem_gym.core.errors import ConfigError
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.simulator.smooth_fields import logistic, smooth_fields, soft_step, uneven, weighted_sum


def fields(rows=400, shape=(24, 24), length=0.25, count=2):
    streams = Streams(row_seeds(1, rows))
    return smooth_fields(streams, torch.arange(rows), count, shape, length)


def test_fields_have_unit_variance_and_a_gaussian_correlation():
    found = fields()
    # 800 fields: 5 standard errors of mean, variance and correlation at one place.
    assert found[:, :, 3, 5].mean().item() == pytest.approx(0.0, abs=5 / math.sqrt(800))
    assert found[:, :, 3, 5].var().item() == pytest.approx(1.0, abs=5 * math.sqrt(2 / 800))
    for cells in (3, 6, 12):
        together = (found[:, :, 2, 4] * found[:, :, 2 + cells, 4]).mean().item()
        # Beside the statistical error, the waves left out and the finite period leave 2 %.
        expected = math.exp(-((cells / 24 / 0.25) ** 2))
        assert together == pytest.approx(expected, abs=0.02 + 5 / math.sqrt(800))
    assert (found[:, 0] * found[:, 1]).mean().abs() < 0.05, "independent fields"


def test_cells_are_square_whatever_the_frame():
    found = fields(shape=(12, 48), length=0.1)
    along_x = (found[..., 5, 10] * found[..., 5, 14]).mean().item()
    along_y = (found[..., 3, 10] * found[..., 7, 10]).mean().item()
    assert along_x == pytest.approx(math.exp(-((4 / 4.8) ** 2)), abs=0.02 + 5 / math.sqrt(800))
    assert along_y == pytest.approx(along_x, abs=5 * math.sqrt(2 / 800))


def test_rows_do_not_depend_on_the_batch():
    whole = fields(rows=6, shape=(13, 19))
    rows = torch.tensor([4, 1])
    assert torch.equal(smooth_fields(Streams(row_seeds(1, 6)), rows, 2, (13, 19), 0.25), whole[rows])


def test_a_length_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r"0\.03 to 2"):
        fields(length=0.01)


def test_a_step_has_its_width_where_the_field_is_steep():
    # A ramp of slope 1 per cell is far steeper than the floor of 1 / 1000: 10 to 90 % within 8 cells.
    ramp = torch.arange(40.0).expand(1, 1, 5, 40)
    step = soft_step(ramp, torch.tensor([[20.0]]), 8.0, 1000.0)[0, 0, 2]
    assert step[20].item() == pytest.approx(0.5)
    assert step[16].item() == pytest.approx(0.1, abs=1e-3) and step[24].item() == pytest.approx(0.9, abs=1e-3)
    narrow = soft_step(ramp, torch.tensor([[20.0]]), 0.1, 1000.0)[0, 0, 2]
    assert narrow[21].item() == pytest.approx(logistic(torch.tensor(4.394)).item(), abs=1e-3), "a cell at least"


def test_an_uneven_foil_has_a_wedge_and_never_vanishes():
    streams = Streams(row_seeds(1, 300))
    smooth = uneven(streams, torch.arange(300), (16, 16), (0.4, 0.0, 0.3))
    assert (smooth.amax((1, 2)) - smooth.amin((1, 2))).max().item() <= 0.4 * math.sqrt(2) + 1e-6
    torch.testing.assert_close(smooth.mean((1, 2)), torch.ones(300))
    rough = uneven(streams, torch.arange(300), (16, 16), (0.0, 0.3, 0.1))
    assert rough.std().item() == pytest.approx(0.3, rel=0.05)
    assert uneven(streams, torch.arange(300), (16, 16), (0.0, 3.0, 0.1)).min().item() == pytest.approx(0.1)


def test_logistic_and_weighted_sum():
    x = torch.linspace(-100.0, 100.0, 101)
    torch.testing.assert_close(logistic(x), torch.sigmoid(x), rtol=1e-5, atol=1e-30)
    parts = torch.rand(3, 4)
    torch.testing.assert_close(weighted_sum(list(parts), [1.0, -2.0, 0.5]), torch.tensor([1.0, -2.0, 0.5]) @ parts)
