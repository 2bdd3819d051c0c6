"""What experiments are expected to tell, against nested Monte Carlo, closed forms and limits."""

from __future__ import annotations

import math

import pytest
import torch

from stem_gym.core.experiments import Noise
from stem_gym.surrogates.information import (
    Forecast,
    bma_variance,
    box_hill,
    evened,
    expected_information,
    information_bound,
    unevened,
)
from tests.surrogates.campaigns import drawn

NOISE = Noise(absolute=8.0, relative=0.08)
EVEN = Noise(absolute=2.0)


def forecast(rows: int = 3, laws: int = 4, draws: int = 400, experiments: int = 6, noise: Noise = NOISE) -> Forecast:
    """Log-normal values of different medians and spreads."""
    middle = 60.0 * torch.exp(drawn(rows, laws, 1, experiments, seed=1))
    spread = 0.05 + 0.4 * torch.rand(rows, laws, 1, experiments, generator=torch.Generator().manual_seed(2))
    value = middle * torch.exp(spread * drawn(rows, laws, draws, experiments, seed=3))
    return Forecast(value, noise, torch.linspace(1.0, 3.0, rows))


def probabilities(rows: int = 3, laws: int = 4) -> torch.Tensor:
    return torch.softmax(1.5 * drawn(rows, laws, seed=4), dim=1)


def nested(probability: torch.Tensor, told: Forecast, samples: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """The information (B, E) of the very mixtures by Monte Carlo over measurements, and its standard error."""
    value = told.value.double()
    rows, laws, draws, experiments = value.shape
    generator = torch.Generator().manual_seed(5)
    index = torch.randint(0, draws, (rows, laws, samples, experiments), generator=generator)
    true = value.gather(2, index)
    sd = told.noise_factor.double()[:, None, None, None] * (NOISE.absolute**2 + (NOISE.relative * value) ** 2).sqrt()
    shown = true + sd.gather(2, index) * torch.randn(true.shape, generator=generator, dtype=torch.float64)
    gain = torch.zeros(rows, laws, samples, experiments, dtype=torch.float64)
    for row in range(rows):
        for number in range(experiments):
            y = shown[row, :, :, number].flatten()
            log = -0.5 * ((y[:, None, None] - value[row, :, :, number]) / sd[row, :, :, number]).square()
            density = (log - sd[row, :, :, number].log()).logsumexp(2) - math.log(draws)  # (L · samples, L)
            mixture = (density + probability[row].double().log()).logsumexp(1)
            own = density.reshape(laws, samples, laws).diagonal(dim1=0, dim2=2).T  # (L, samples)
            gain[row, :, :, number] = own - mixture.reshape(laws, samples)
    weight = probability.double()[:, :, None]
    error = (weight.square() * gain.var(2) / samples).sum(1).sqrt()
    return (weight * gain.mean(2)).sum(1), error


def test_the_quadrature_is_the_nested_monte_carlo_within_its_error():
    told = forecast(rows=2, draws=60, experiments=4)
    probability = probabilities(rows=2)
    expected, error = nested(probability, told)
    found = expected_information(probability, told).double()
    assert bool(((found - expected).abs() < 5.0 * error + 0.01 * expected).all()), (found, expected, error)


def dense(probability: torch.Tensor, told: Forecast, nodes: int = 3000) -> torch.Tensor:
    """The information (B, E) of the very mixtures by a dense sum in double precision, even in units of the noise."""
    value, noise, found = told.value.double(), told.noise, []
    for p, row, factor in zip(probability.double(), value, told.noise_factor.double(), strict=True):
        sd = factor * (noise.absolute**2 + (noise.relative * row) ** 2).sqrt()
        first, last = evened((row - 8.0 * sd).min(), noise), evened((row + 8.0 * sd).max(), noise)
        even = first + (last - first) * torch.linspace(0.0, 1.0, nodes, dtype=torch.float64)
        y = unevened(even, noise)
        bell = torch.exp(-0.5 * ((y - row.unsqueeze(3)) / sd.unsqueeze(3)).square()) / sd.unsqueeze(3)  # (L, S, E, n)
        density = bell.mean(1) * (noise.absolute**2 + (noise.relative * y) ** 2).sqrt()
        density = density / density.sum(2, keepdim=True)
        mixture = (p[:, None, None] * density).sum(0)
        entropy = [-(one * one.clamp(min=1e-300).log()).sum(-1) for one in (mixture, density)]
        found.append(entropy[0] - (p.unsqueeze(1) * entropy[1]).sum(0))
    return torch.stack(found)


@pytest.mark.parametrize("noise", [NOISE, Noise(absolute=15.0, relative=0.15), Noise(absolute=4.0, relative=0.03)])
@pytest.mark.parametrize("factor", [1.0, 20.0, 150.0, 400.0])
def test_the_quadrature_is_a_dense_sum_however_much_the_noise_has_grown(noise, factor):
    told = forecast(rows=2, draws=64, experiments=5, noise=noise)
    told = Forecast(told.value, noise, torch.tensor([1.0, factor]))
    probability = probabilities(rows=2)
    torch.testing.assert_close(
        expected_information(probability, told).double(), dense(probability, told), atol=0.005, rtol=0.0
    )


def test_laws_that_say_exactly_zero_are_not_told_apart_by_their_cell():
    """Below their thresholds, two laws say zero, another one hardly more: all that is there is the third."""
    told = forecast(rows=2, draws=64, experiments=5)
    value = told.value.clone()
    value[:, :2, :, :3] = 0.0
    value[:, 2, :, :3] = 6.0
    told, probability = Forecast(value, NOISE, torch.ones(2)), probabilities(rows=2)
    torch.testing.assert_close(
        expected_information(probability, told).double(), dense(probability, told), atol=0.006, rtol=0.0
    )


def test_zero_is_in_the_middle_of_its_cell_with_values_below_it_too():
    """One answer has values on both sides of the zero that two laws say, as "none of these" does."""
    value = forecast(rows=2, draws=64, experiments=5).value.clone()
    value[:, :2] = 0.0
    value[:, 2] = 30.0 * drawn(2, 64, 5, seed=7)
    told, probability = Forecast(value, NOISE, torch.ones(2)), probabilities(rows=2)
    torch.testing.assert_close(
        expected_information(probability, told).double(), dense(probability, told), atol=0.003, rtol=0.0
    )


def test_values_that_are_all_alike_tell_nothing():
    for constant in (0.0, 3.0, 5e4):
        told = Forecast(torch.full((2, 4, 64, 3), constant), NOISE, torch.ones(2))
        assert float(expected_information(probabilities(rows=2), told).max()) < 1e-5


def test_the_bound_of_predictions_without_spread_by_hand():
    """In units of the noise both are Gaussians of deviation 2, by asinh(0.08 · 240 / 8) / 0.08 and of 150 apart."""
    value = torch.tensor([150.0, 240.0]).reshape(1, 2, 1, 1).expand(1, 2, 64, 1)
    apart = (math.asinh(0.08 * 240.0 / 8.0) - math.asinh(0.08 * 150.0 / 8.0)) / 0.08
    alike = math.exp(-0.5 * (apart / 2.0) ** 2)
    expected = -0.3 * math.log(0.3 + 0.7 * alike) - 0.7 * math.log(0.7 + 0.3 * alike)
    told = Forecast(value, NOISE, torch.tensor([2.0]))
    found = information_bound(torch.tensor([[0.3, 0.7]]), told)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert float(dense(torch.tensor([[0.3, 0.7]]), told)) < float(found)


def test_precisions_may_be_mixed():
    told, probability = forecast(), probabilities()
    weight = torch.softmax(drawn(3, 4, told.value.shape[2], seed=9), dim=2)
    expected = expected_information(probability, Forecast(told.value, NOISE, told.noise_factor, weight))
    for values, chances, weights in (
        (torch.float64, torch.float32, torch.float32),
        (torch.float32,) + 2 * (torch.float64,),
    ):
        mixed = Forecast(told.value.to(values), NOISE, told.noise_factor.to(values), weight.to(weights))
        found = expected_information(probability.to(chances), mixed)
        torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=0.0)


def test_two_values_that_noise_does_not_mix_tell_the_entropy():
    value = torch.tensor([100.0, 400.0]).reshape(1, 2, 1, 1).expand(1, 2, 50, 1)
    probability = torch.tensor([[0.3, 0.7]])
    entropy = -(0.3 * math.log(0.3) + 0.7 * math.log(0.7))
    assert float(expected_information(probability, Forecast(value, EVEN, torch.ones(1)))) == pytest.approx(
        entropy, abs=1e-4
    )
    assert float(information_bound(probability, Forecast(value, EVEN, torch.ones(1)))) == pytest.approx(
        entropy, abs=1e-4
    )


def test_equal_predictions_tell_nothing():
    value = forecast().value[:, :1].expand(-1, 4, -1, -1)
    told = Forecast(value, NOISE, torch.ones(3))
    assert float(expected_information(probabilities(), told).max()) < 1e-5
    assert float(information_bound(probabilities(), told).max()) < 1e-5
    assert float(box_hill(probabilities(), told).abs().max()) < 1e-5


def test_it_is_never_negative_nor_more_than_the_entropy_and_falls_with_noise():
    probability, told = probabilities(), forecast()
    entropy = -(probability * probability.log()).sum(1, keepdim=True)
    loud = Forecast(told.value, told.noise, 10.0 * told.noise_factor)
    for figure in (expected_information, information_bound):
        found = figure(probability, told)
        assert bool((found >= 0.0).all()) and bool((found <= entropy + 1e-5).all())
        assert bool((entropy <= math.log(4)).all())
        assert bool((figure(probability, loud) < found).all())


def test_rows_do_not_depend_on_their_neighbours():
    probability, told = probabilities(), forecast()
    sized = told.value * torch.tensor([1.0, 10.0, 0.1]).reshape(3, 1, 1, 1)
    for row in range(3):
        some = slice(row, row + 1)
        alone = Forecast(sized[some], told.noise, told.noise_factor[some])
        for figure in (expected_information, information_bound, box_hill, bma_variance):
            whole = figure(probability, Forecast(sized, told.noise, told.noise_factor))[some]
            torch.testing.assert_close(whole, figure(probability[some], alone), rtol=1e-4, atol=1e-6)


def test_many_rows_are_the_rows_of_blocks():
    """More rows than are worked out at once, with and without weights, are the same as one by one."""
    told, probability = forecast(rows=7, draws=30_000, experiments=5), probabilities(rows=7)  # 600,000 values a row
    weight = torch.softmax(drawn(7, 4, 30_000, seed=9), dim=2)
    for one in (told, Forecast(told.value, told.noise, told.noise_factor, weight)):
        for figure in (expected_information, information_bound, box_hill, bma_variance):
            alone = []
            for row in range(7):
                own = None if one.weight is None else one.weight[row : row + 1]
                part = Forecast(one.value[row : row + 1], one.noise, one.noise_factor[row : row + 1], own)
                alone.append(figure(probability[row : row + 1], part))
            torch.testing.assert_close(figure(probability, one), torch.cat(alone), rtol=1e-4, atol=1e-6)


def test_weights_count_as_repeated_values():
    told, probability = forecast(draws=4), probabilities()
    twice = Forecast(told.value[:, :, [0, 0, 1, 2, 3, 3]], told.noise, told.noise_factor)
    weight = torch.tensor([2.0, 1.0, 1.0, 2.0]).div(6.0).expand(3, 4, -1)
    weighed = Forecast(told.value, told.noise, told.noise_factor, weight)
    for figure in (expected_information, information_bound, box_hill, bma_variance):
        torch.testing.assert_close(figure(probability, weighed), figure(probability, twice), rtol=1e-3, atol=1e-5)


def test_what_laws_say_the_same_of_is_worked_out_once_and_told_alike():
    """Two laws that do not see every second experiment, with and without a word of it."""
    told, probability = forecast(experiments=6), probabilities()
    same = torch.arange(6).repeat(4, 1)
    same[:2] = same[:2] // 2 * 2
    value = told.value.gather(3, same[None, :, None].expand_as(told.value))
    weight = torch.softmax(drawn(3, 4, told.value.shape[2], seed=9), dim=2)
    for weighed in (None, weight):
        apart = Forecast(value, told.noise, told.noise_factor, weighed)
        alike = Forecast(value, told.noise, told.noise_factor, weighed, same)
        assert alike.columns()[0].shape[1] == 2 * 3 + 2 * 6
        for figure in (expected_information, information_bound, box_hill, bma_variance):
            torch.testing.assert_close(figure(probability, alike), figure(probability, apart), rtol=1e-4, atol=1e-6)


def test_values_far_apart_for_the_grid_keep_the_information_within_its_bounds():
    """Over 3,000 deviations of noise, cells and nodes are wider than it; laws that share no values are told apart."""
    value = 1000.0 * torch.rand(2, 3, 50, 4, generator=torch.Generator().manual_seed(0))
    third, entropy = torch.full((2, 3), 1.0 / 3.0), math.log(3.0)
    for gap, least in ((0.0, 0.0), (2500.0, 0.99 * entropy)):
        apart = value + gap * torch.arange(3).reshape(1, 3, 1, 1)
        found = expected_information(third, Forecast(apart, EVEN, torch.ones(2)))
        assert bool((found >= least).all()) and bool((found <= entropy + 1e-5).all())


def test_box_and_hill_by_hand():
    value = torch.tensor([[0.0, 2.0], [9.0, 11.0]]).reshape(1, 2, 2, 1)
    told = Forecast(value, EVEN, torch.ones(1))  # means 1 and 10; both variances 1 + 4
    assert float(box_hill(torch.tensor([[0.4, 0.6]]), told)) == pytest.approx(0.5 * 0.24 * 81.0 * 2.0 / 5.0, rel=1e-5)
    assert float(bma_variance(torch.tensor([[0.4, 0.6]]), told)) == pytest.approx(1.0 + 0.24 * 81.0, rel=1e-5)


def test_values_in_units_of_the_noise_have_its_slope_and_come_back():
    value = torch.linspace(-30.0, 2000.0, 200, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(evened(value, NOISE).sum(), value)
    torch.testing.assert_close(slope, 1.0 / (64.0 + (0.08 * value) ** 2).sqrt().detach())
    for noise in (NOISE, EVEN):
        torch.testing.assert_close(unevened(evened(value, noise), noise), value)
