"""Drift against the closed forms of its processes; row times; scan distortion."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stem_gym.core.streams import Streams, row_seeds
from stem_gym.simulator.drift import (
    DriftModel,
    DriftState,
    _path_variance,
    advance,
    distort,
    frame_time_s,
    move_stage,
    row_times_s,
    start_drift,
)

ROWS = 4000
ALL = torch.arange(ROWS)
# Standard error of a variance from 8,000 normal values (two axes) is 1.6 %; five of them.
FIVE_ERRORS = 0.08


def streams(rows: int = ROWS, seed: int = 5) -> Streams:
    return Streams(row_seeds(seed, rows))


def offsets(model: DriftModel, dt_s: list[float]) -> torch.Tensor:
    """Offsets (ROWS, J, 2) of a fresh state after steps that are the same for all rows."""
    source = streams()
    state = start_drift(model, source, ALL)
    return advance(model, state, torch.tensor(dt_s).expand(ROWS, -1), source, ALL)[0]


def path_variance(model: DriftModel, time_s: float) -> float:
    """Variance on an axis of an Ornstein-Uhlenbeck path from a stationary start: s² tau² 2 (x - 1 + exp(-x))."""
    x = time_s / model.correlation_s
    return model.speed_ang_per_s**2 / 2 * model.correlation_s**2 * 2 * (x - 1 + math.exp(-x))


def test_random_walk_spreads_as_two_d_t():
    found = offsets(DriftModel(speed_ang_per_s=0.0, diffusion_ang2_per_s=0.3), [0.5, 1.5, 6.0])
    for step, time in enumerate((0.5, 2.0, 8.0)):
        assert found[:, step].var().item() == pytest.approx(2 * 0.3 * time, rel=FIVE_ERRORS)


@pytest.mark.parametrize("dt_s", [[8.0], [0.5] * 16, [0.001, 0.4, 3.0, 4.599]])
def test_wandering_spreads_as_an_ornstein_uhlenbeck_path_however_it_is_cut(dt_s):
    model = DriftModel(speed_ang_per_s=1.0, correlation_s=5.0)
    assert offsets(model, dt_s)[:, -1].var().item() == pytest.approx(path_variance(model, 8.0), rel=FIVE_ERRORS)


def test_variance_of_a_short_path_survives_float32():
    # The closed form in float64; below a tenth of a correlation time float32 needs the series, to 1e-3 at the join.
    scaled = torch.tensor([1e-4, 1e-2, 0.09, 0.099, 0.101, 0.3, 2.0, 20.0])
    exact = scaled.double()
    exact = 2 * exact - 3 + 4 * torch.exp(-exact) - torch.exp(-2 * exact)
    exact[0] = 2.0 / 3.0 * 1e-12  # its own cancellation, even in float64; the leading term is within 1e-4
    for xp, x in ((torch, scaled), (np, scaled.numpy())):
        given = _path_variance(x, -xp.expm1(-x), -xp.expm1(-2.0 * x), xp)
        torch.testing.assert_close(torch.as_tensor(given), exact.float(), rtol=1e-3, atol=0)


def test_path_between_two_times_is_correlated_as_it_should_be():
    model = DriftModel(speed_ang_per_s=1.0, correlation_s=2.0)
    found = offsets(model, [1.0, 2.0])
    covariance = (found[:, 0] * found[:, 1]).mean().item()
    # Cov(x(s), x(t)) from the variances of the path over s, t and t - s, whose increments are stationary.
    expected = (path_variance(model, 1.0) + path_variance(model, 3.0) - path_variance(model, 2.0)) / 2
    assert covariance == pytest.approx(expected, rel=FIVE_ERRORS)


def test_velocity_forgets_itself_exponentially_and_keeps_its_speed():
    model = DriftModel(speed_ang_per_s=0.8, correlation_s=4.0)
    source = streams()
    start = start_drift(model, source, ALL)
    _, after = advance(model, start, torch.full((ROWS, 3), 1.0), source, ALL)
    speed = start.velocity_ang_per_s.square().sum(1).mean().sqrt().item()
    assert speed == pytest.approx(0.8, rel=FIVE_ERRORS / 2)
    assert after.velocity_ang_per_s.var().item() == pytest.approx(0.32, rel=FIVE_ERRORS)
    correlation = (start.velocity_ang_per_s * after.velocity_ang_per_s).mean().item() / 0.32
    assert correlation == pytest.approx(math.exp(-0.75), abs=5 / math.sqrt(2 * ROWS))


def test_short_steps_follow_the_velocity():
    model = DriftModel(speed_ang_per_s=1.0, correlation_s=60.0)
    source = streams(8)
    state = start_drift(model, source, torch.arange(8))
    found, _ = advance(model, state, torch.full((8, 64), 1e-3), source, torch.arange(8))
    # Over 64 ms the velocity of 1 Å/s changes by sqrt(2 t / tau) = 5 % of itself, and the path by less.
    torch.testing.assert_close(found[:, -1], state.velocity_ang_per_s * 0.064, atol=0.064 * 0.15, rtol=0)


def test_settling_is_exponential():
    model = DriftModel(speed_ang_per_s=0.0, settling_fraction=0.25, settling_s=3.0)
    state = start_drift(model, streams(2), torch.arange(2))
    moved = move_stage(model, state, torch.tensor([[8.0, 0.0], [0.0, -4.0]]))
    torch.testing.assert_close(moved.offset_ang, torch.tensor([[6.0, 0.0], [0.0, -3.0]]))
    found, after = advance(model, moved, torch.tensor([[1.0, 5.0]]).expand(2, -1), streams(2), torch.arange(2))
    left = [math.exp(-1.0 / 3.0), math.exp(-6.0 / 3.0)]
    torch.testing.assert_close(found[0, :, 0], torch.tensor([8.0 - 2.0 * f for f in left]))
    torch.testing.assert_close(found[1, :, 1], torch.tensor([-4.0 + 1.0 * f for f in left]))
    torch.testing.assert_close(after.offset_ang, found[:, -1])


def test_no_time_no_motion():
    model = DriftModel(diffusion_ang2_per_s=0.1)
    source = streams(4)
    state = start_drift(model, source, torch.arange(4))
    found, after = advance(model, state, torch.zeros(4, 5), source, torch.arange(4))
    assert (found == 0.0).all()
    torch.testing.assert_close(after.velocity_ang_per_s, state.velocity_ang_per_s)


def test_even_steps_are_only_a_quicker_way():
    """One number expanded over the steps gives what the same numbers written out give."""
    model = DriftModel(diffusion_ang2_per_s=0.1, settling_fraction=0.5)
    dt_s = torch.tensor([[0.5], [30.0], [0.0]]).expand(-1, 6)
    even, written_out = (
        advance(model, start_drift(model, source, torch.arange(3)), steps, source, torch.arange(3))
        for source, steps in ((streams(3), dt_s), (streams(3), dt_s.contiguous()))
    )
    assert torch.equal(even[0], written_out[0]) and torch.equal(
        even[1].velocity_ang_per_s, written_out[1].velocity_ang_per_s
    )
    assert even[0][1].abs().max() > 1.0


def test_rows_do_not_depend_on_the_batch():
    model = DriftModel(diffusion_ang2_per_s=0.1, scale_error=0.01, shear_error=0.01)
    dt = torch.rand(40, 64, generator=torch.Generator().manual_seed(0)) * 0.1

    def run(rows: torch.Tensor) -> list[torch.Tensor]:
        source = streams(40)
        state = start_drift(model, source, rows)
        found, after = advance(model, state, dt[rows], source, rows)
        return [found, after.position_ang, after.velocity_ang_per_s, after.distortion]

    rows = torch.tensor([17, 4, 33])
    for part, whole in zip(run(rows), run(torch.arange(40)), strict=True):
        assert torch.equal(part, whole[rows])


def test_rows_can_be_gathered_and_replaced():
    model = DriftModel()
    state, other = (start_drift(model, streams(6, seed), torch.arange(6)) for seed in (1, 2))
    index = torch.tensor([4, 1])
    merged = state.with_rows(index, other.rows(torch.tensor([0, 1])))
    assert torch.equal(merged.velocity_ang_per_s[4], other.velocity_ang_per_s[0])
    assert torch.equal(merged.velocity_ang_per_s[0], state.velocity_ang_per_s[0])


def test_rows_of_a_frame_are_recorded_one_after_the_other():
    dwell = torch.tensor([16e-6, 8e-6])
    times = row_times_s((64, 32), dwell, 100e-6)
    assert times.shape == (2, 64)
    line = 32 * 16e-6 + 100e-6
    torch.testing.assert_close(times[0, 1:] - times[0, :-1], torch.full((63,), line), rtol=1e-3, atol=0)
    assert times[0, 0].item() == pytest.approx(16 * 16e-6)
    torch.testing.assert_close(frame_time_s((64, 32), dwell, 100e-6)[0], torch.tensor(64 * line))


def test_distortion_scales_and_shears_the_scan():
    zero = torch.zeros(1, 2)
    state = DriftState(zero, zero, zero, torch.tensor([[[1.02, 0.01], [0.0, 0.97]]]))
    place = distort(state, torch.tensor([[[10.0, 0.0], [0.0, 10.0]]]))
    torch.testing.assert_close(place, torch.tensor([[[10.2, 0.0], [0.1, 9.7]]]))
    drawn = start_drift(DriftModel(scale_error=0.02, shear_error=0.01), streams(), ALL).distortion
    assert drawn[:, 0, 0].std().item() == pytest.approx(0.02, rel=FIVE_ERRORS)
    assert drawn[:, 0, 1].std().item() == pytest.approx(0.01, rel=FIVE_ERRORS)
    assert (drawn[:, 1, 0] == 0).all()  # shear along the fast axis alone


@pytest.mark.parametrize("wrong", [{"speed_ang_per_s": -1.0}, {"correlation_s": 0.0}, {"speed": 1.0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        DriftModel(**wrong)
