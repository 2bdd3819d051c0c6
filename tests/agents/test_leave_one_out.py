"""Leaving one out against plain formulas; quantiles of few measurements, and of like places."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.engine.leave_one_out import calibration, calibration_by_value, extra_noise, of_the_mean, residuals


def test_leaving_one_out_in_closed_form_is_leaving_it_out():
    """Each point predicted by a process that was never told of it."""
    rng = np.random.default_rng(3)
    x, y = rng.uniform(0, 1, (9, 2)), rng.standard_normal(9)
    k = np.exp(-8 * ((x[:, None] - x[None]) ** 2).sum(-1)) + 0.05 * np.eye(9)
    inverse = torch.from_numpy(np.linalg.inv(k))[None]
    fold = torch.zeros(1, 9, dtype=torch.int64)
    found, variance, apart, of_mean = residuals(inverse, (inverse[0] @ torch.from_numpy(y))[None], fold, 1)
    assert (apart == 0).all() and torch.equal(of_mean, found), "one member agrees with itself"
    for i in range(9):
        rest = np.delete(np.arange(9), i)
        solved = np.linalg.solve(k[np.ix_(rest, rest)], np.column_stack((y[rest], k[rest, i])))
        assert found[0, i].item() == pytest.approx(y[i] - k[i, rest] @ solved[:, 0])
        assert variance[0, i].item() == pytest.approx(k[i, i] - k[i, rest] @ solved[:, 1])


def test_the_mean_of_members_errs_less_by_as_much_as_they_disagree():
    """Five members with errors of their own and one in common."""
    rng = np.random.default_rng(4)
    common, own = rng.standard_normal((1, 4000)), 2.0 * rng.standard_normal((5, 4000))
    error = torch.from_numpy(common + own)
    counts = torch.arange(4000)[None] < 3000
    single = torch.where(counts, error[:1], 1e6)  # what does not count is not looked at
    left = of_the_mean(single, error.var(dim=0, correction=0)[None], counts)
    assert left[0, :3000].square().mean().sqrt().item() == pytest.approx(
        error.mean(dim=0).square().mean().sqrt().item(), rel=0.06
    )
    alike = of_the_mean(single, torch.zeros_like(single), counts)
    assert torch.equal(alike, single)


def test_a_calibration_widens_what_is_too_sure_and_narrows_what_is_not():
    z = torch.from_numpy(np.random.default_rng(5).standard_normal((3, 400))) * torch.tensor([[2.0], [1.0], [0.7]])
    alike = torch.ones(3, 1, 400, dtype=torch.float64)
    quantile = np.quantile(z.abs(), 0.9, axis=1) / 1.6448536  # numpy's, of even weights
    np.testing.assert_allclose(calibration(z, alike)[:, 0], quantile ** (400 / 404), rtol=1e-9)
    np.testing.assert_allclose(calibration(z, alike), [[2.0], [1.0], [0.7]], rtol=0.12)  # a quantile of 400
    few = alike * (torch.arange(400) < 4)
    assert 1.0 < calibration(z.abs() * 0 + 3.0, few)[0, 0] < 3.0 / 1.6448536  # four count less than the prior
    np.testing.assert_allclose(calibration(z, 0.0 * alike), 1.0)


def test_what_counts_twice_is_as_if_it_were_there_twice():
    z = torch.from_numpy(np.random.default_rng(6).standard_normal((1, 300)))
    weight = torch.from_numpy(np.random.default_rng(7).integers(1, 3, (1, 1, 300))).double()
    twice = z.repeat_interleave(weight[0, 0].long(), dim=1)
    found, plain = calibration(z, weight), calibration(twice, torch.ones(1, 1, twice.shape[1], dtype=torch.float64))
    assert found.item() == pytest.approx(plain.item(), rel=0.02)


def test_a_calibration_by_value_follows_noise_that_follows_the_signal():
    """Dark places are ten times quieter than the model thinks, bright ones twice as loud."""
    rng = np.random.default_rng(8)
    at = torch.from_numpy(rng.uniform(0.0, 1.0, (1, 600)).round()).float()
    z = torch.from_numpy(rng.standard_normal((1, 600))).float() * torch.where(at > 0.5, 2.0, 0.2)
    valid = torch.arange(600)[None] < 590
    z[~valid] = 1e6  # padding
    factors = calibration_by_value(z, valid, at, torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
    np.testing.assert_allclose(factors, [[0.2, 2.0, 0.2, 2.0]], rtol=0.15)


def test_measurements_count_by_how_evenly_they_weigh():
    """A tenth of the weight for all is the same evidence; four that count are few, though others count a thousandth."""
    z = torch.from_numpy(np.random.default_rng(9).standard_normal((1, 400))) * 2.0
    alike = torch.ones(1, 1, 400, dtype=torch.float64)
    assert calibration(z, 0.1 * alike).item() == pytest.approx(calibration(z, alike).item(), rel=1e-9)
    few = torch.where(torch.arange(400) < 4, alike, 1e-3 * alike)
    count = (4 + 396e-3) ** 2 / (4 + 396e-6)
    z[0, :4] = 3.0
    assert calibration(z, few).item() == pytest.approx((3.0 / 1.6448536) ** (count / (count + 4)), rel=1e-6)


def test_ten_measurements_tell_the_deviation_of_what_they_were_drawn_from():
    """In the median of samples the factor is right; their own quantile is an eighth too small."""
    z = torch.from_numpy(np.random.default_rng(10).standard_normal((20000, 10)))
    flat = torch.zeros(20000, 10, dtype=torch.float64)
    factors = calibration_by_value(z, torch.ones_like(flat, dtype=torch.bool), flat, flat[:, :2])
    assert factors.median().item() == pytest.approx(1.0, abs=0.03)


def of_alike(z):
    """What calibration_by_value takes |z| to tell where no place differs from any other, without the prior."""
    flat, count = torch.zeros_like(z), z.shape[1]
    factors = calibration_by_value(z, torch.ones_like(z, dtype=torch.bool), flat, z.new_zeros(len(z), 2))[:, 0]
    return factors ** ((count + 4) / count)


def test_the_quantile_of_what_measurements_were_drawn_from_is_numpys():
    z = torch.from_numpy(np.random.default_rng(13).standard_normal((50, 30)))
    quantile = np.quantile(z.abs(), 0.9, axis=1, method="median_unbiased")
    np.testing.assert_allclose(of_alike(z), quantile / 1.6448536, rtol=1e-5)


@pytest.mark.parametrize("count", range(1, 8))
def test_fewer_than_a_quantile_needs_do_not_tell_too_little(count):
    """In the median of samples the factor is right; over the quantile, the largest of two is a third too small."""
    z = torch.from_numpy(np.random.default_rng(14).standard_normal((40000, count)))
    assert of_alike(z).median().item() == pytest.approx(1.0, abs=0.02)


def test_two_at_the_edge_of_an_interval_widen_it_only_where_they_are_a_fair_sample():
    z = torch.full((1, 2), 1.6448536, dtype=torch.float64)
    fair, other = (calibration_by_value(z, z > 0, 0.0 * z, 0.0 * z, fair_sample=told) for told in (True, False))
    assert (fair > 1.1).all() and other.tolist() == [pytest.approx([1.0, 1.0], abs=1e-6)]


def test_how_much_a_place_is_taken_for_others_follows_from_the_field():
    """Where dark places are ten times quieter, eight of them suffice; where all are alike, all tell of each."""
    rng = np.random.default_rng(11)
    at = torch.from_numpy(np.tile(np.arange(40) >= 8, (200, 1))).double()
    normal, valid = torch.from_numpy(rng.standard_normal(at.shape)), torch.ones_like(at, dtype=torch.bool)
    places = torch.from_numpy(np.tile(np.arange(40) % 2, (200, 1))).double()

    def dark(z):
        return calibration_by_value(z, valid, at, places)[:, 0].log()

    assert dark(normal * torch.where(at > 0.5, 2.0, 0.2)).median().exp().item() == pytest.approx(0.2, rel=0.15)
    eight = normal[:, :8].abs().quantile(0.9, dim=1).log()
    assert dark(normal).std() < 0.55 * eight.std()


def test_a_sample_that_is_not_fair_leaves_a_place_of_which_little_is_known_to_the_model():
    """Twelve dark measurements are four times as far off as was thought, and three bright ones are not."""
    at = torch.from_numpy(np.tile(np.arange(15) >= 12, (400, 1))).double()
    z = torch.from_numpy(np.random.default_rng(12).standard_normal(at.shape)) * torch.where(at > 0.5, 1.0, 4.0)
    places = torch.from_numpy(np.tile(np.arange(40) % 2, (400, 1))).double()
    fair, other = (
        calibration_by_value(z, torch.ones_like(at, dtype=torch.bool), at, places, fair_sample=told)[:, 1].median()
        for told in (True, False)
    )
    assert fair > 1.25 and 0.9 < other < 1.1


def test_only_what_is_far_off_gets_more_noise():
    residual = torch.tensor([[0.5, -1.0, 0.8, 20.0, 0.3, -0.6]])
    variance, valid = torch.ones_like(residual), torch.ones(1, 6, dtype=torch.bool)
    extra = extra_noise(residual, variance, valid)
    assert (extra[0] > 0).tolist() == [False, False, False, True, False, False]
    usual = 0.6 / 0.6744898  # the lower of the two middle ones is below 1 deviation: no allowance
    assert usual < 1 and (1.0 + extra[0, 3]).item() == pytest.approx((20.0 / 4.0) ** 4)
    off_everywhere = extra_noise(torch.tensor([[5.0, -6.0, 7.0, -5.5, 6.5, 5.2]]), variance, valid)
    assert (off_everywhere == 0).all()
