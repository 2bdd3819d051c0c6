"""The parts of the spectrum surrogate against closed forms: encoder, modes, Gaussian processes, quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stem_gym.surrogates.im2spec import SpectrumPosterior, sites_of
from stem_gym.surrogates.im2spec_head import KERNELS, NOISES, Coefficients, Kernel, Sites, evidence, predict
from stem_gym.surrogates.im2spec_modes import Modes, find_modes, without_spikes
from stem_gym.surrogates.im2spec_network import REACH, PatchEncoder, standardised


def encoder() -> PatchEncoder:
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        return PatchEncoder(8, 5).requires_grad_(False)


def images(rows: int = 2, height: int = 30, width: int = 34) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).gamma(2.0, 1.0, (rows, height, width)).astype(np.float32))


# --- encoder ---


def test_a_feature_is_that_of_the_patch_around_its_cell() -> None:
    image, net = images(1), encoder()
    before = net(image).reshape(30, 34, 5)
    changed = image.clone()
    changed[0, 10, 12] += 5.0
    moved = (net(changed).reshape(30, 34, 5) - before).abs().amax(-1) > 0
    y, x = moved.nonzero().unbind(1)
    assert (int(y.min()), int(y.max())) == (10 - REACH, 10 + REACH)
    assert (int(x.min()), int(x.max())) == (12 - REACH, 12 + REACH)
    alone = net(image[:, 10 - REACH : 11 + REACH, 12 - REACH : 13 + REACH]).reshape(2 * REACH + 1, 2 * REACH + 1, 5)
    assert torch.allclose(alone[REACH, REACH], before[10, 12], atol=1e-5)


def test_unit_and_offset_of_the_detector_drop_out() -> None:
    image = images()
    assert torch.allclose(standardised(3e-5 * image + 7e-5), standardised(image), atol=1e-4)
    flat = torch.full((1, 20, 20), 0.1) + 1e-8 * images(1, 20, 20)
    assert float(standardised(flat).abs().max()) < 0.1  # rounding is not blown up to an image


# --- modes ---


def low_rank(rows: int = 2, count: int = 12, channels: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(2)
    loadings, components = rng.uniform(1, 5, (rows, count, 3)), rng.uniform(0.5, 2, (rows, 3, channels))
    return torch.from_numpy((loadings @ components).astype(np.float32)), torch.ones(rows, count)


def test_spectra_of_few_components_are_told_by_as_few_modes() -> None:
    spectra, weight = low_rank()
    modes = find_modes(spectra, weight, 4)  # three components, one of them may lie along the mean
    back = modes.centre[:, None] + modes.coefficients @ modes.vectors
    assert torch.allclose(back, spectra, rtol=1e-3)
    assert torch.allclose(modes.coefficients_of(spectra), modes.coefficients, atol=1e-4)
    assert float(modes.rest.max()) < 0.05
    gram = modes.white @ modes.white.mT
    assert torch.allclose(gram, torch.diag_embed(gram.diagonal(dim1=1, dim2=2)), atol=1e-5)


def test_counting_noise_is_alike_in_all_channels_and_is_recognised() -> None:
    """Poisson counts about one spectrum: variance 1 in every channel, but for what is added to empty channels."""
    rng = np.random.default_rng(3)
    expected = np.geomspace(20, 2000, 64)
    counts = torch.from_numpy(rng.poisson(expected, (1, 60, 64)).astype(np.float32))
    modes = find_modes(counts, torch.ones(1, 60), 5)
    white = (counts - modes.centre[:, None]) * modes.scale[:, None]
    assert float(modes.noise) == pytest.approx(
        float(white.var()), rel=0.2
    )  # the modes of mere noise take more than their part
    assert white.var(1)[0, 32:].mean() == pytest.approx(1.0, abs=0.15)
    assert float((modes.rest * modes.scale[:, :]).max()) < 0.3  # what is left is noise, not specimen


def test_a_spike_is_mended_and_a_line_is_not() -> None:
    rng = np.random.default_rng(4)
    counts = torch.from_numpy(rng.poisson(100.0, (2, 20, 50)).astype(np.float32))
    line = counts.clone()
    line[0, 3, 20:23] += torch.tensor([400.0, 900.0, 400.0])
    spiked = line.clone()
    spiked[0, 5, 30] += 2000.0
    spiked[1, 7, 0] += 2000.0
    mended = without_spikes(spiked, torch.ones(2, 20))
    changed = (mended != spiked).nonzero().tolist()
    assert changed == [[0, 5, 30], [1, 7, 0]]
    assert float(mended[0, 5, 30]) == pytest.approx(100.0, abs=40.0)  # the noise of two neighbours: 7 of 100
    assert torch.equal(without_spikes(counts, torch.ones(2, 20)), counts)


def test_fewer_spectra_than_modes_leave_the_last_at_zero() -> None:
    spectra, weight = low_rank(count=3)
    modes = find_modes(spectra, weight, 6)
    assert bool((modes.coefficients[..., 3:] == 0).all()) and bool(torch.isfinite(modes.vectors).all())


def test_nothing_is_read_along_modes_of_mere_noise_and_a_real_one_has_its_own_strength() -> None:
    """200 spectra of 60 channels about a flat one of 400 counts, half of them with a bump: two values ± ℓ^½ apart."""
    rng = np.random.default_rng(9)
    bump = 12.0 * np.exp(-0.5 * ((np.arange(60) - 30) / 5.0) ** 2)
    sign = np.tile([1.0, -1.0], 100)[:, None]
    flat, bumped = rng.poisson(400.0, (200, 60)), rng.poisson(400.0 + sign * bump)
    modes = find_modes(torch.from_numpy(np.stack((flat, bumped)).astype(np.float32)), torch.ones(2, 200), 5)
    assert modes.coefficients.any(1).tolist() == [[False] * 5, [True] + [False] * 4]
    assert (modes.hidden > 0).tolist() == [[True] * 5, [False] + [True] * 4]
    signal = float(modes.coefficients[1, :, 0].var() - modes.own_noise[1, 0])
    expected = (bump**2).sum() * float(modes.scale[1].square().mean())
    assert signal == pytest.approx(expected, rel=0.25)  # of 200 spectra: 10 % from chance, the rest from the model


# --- Gaussian processes ---


def problem(rows: int = 2, measured: int = 15, cells: int = 40) -> tuple[Sites, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(5)
    features = torch.from_numpy(rng.normal(0, 1, (rows, cells, 3)).astype(np.float32))
    place = torch.from_numpy(rng.uniform(0, 1, (rows, cells, 2)).astype(np.float32))
    cell = torch.from_numpy(np.stack([rng.choice(cells, measured, replace=False) for _ in range(rows)]))
    return Sites(features, place), cell, features[..., :1]


def modes_with(coefficients: torch.Tensor, noise: float) -> Modes:
    rows, _, count = coefficients.shape
    flat, white = torch.ones(rows, count), torch.eye(count).expand(rows, -1, -1)
    return Modes(flat, flat, white, coefficients, flat * 0, torch.full((rows,), noise), noise * flat, 0 * flat)


def by_hand(sites: Sites, cell: np.ndarray, y: np.ndarray, weight: np.ndarray, noise: float) -> tuple:
    """One row, one coefficient, with explicit inverses and determinants: mean and variance (N,) of the best kernel."""
    f, p = (part.numpy().astype(np.float64) for part in (sites.features[0], sites.place[0]))

    def covariance(a: np.ndarray, b: np.ndarray, form: tuple[float, float, float, float]) -> np.ndarray:
        length, share, linear, learned = form
        g = f * np.array([1.0, learned, learned])
        far = ((g[a][:, None] - g[b]) ** 2).sum(-1)
        near = ((p[a][:, None] - p[b]) ** 2).sum(-1)
        smooth = (1 - share) / (1 + far / (2 * length**2)) + share * np.exp(-near / (2 * 0.15**2))
        return smooth + 0.1 * linear * (g[a] @ g[b].T)

    everywhere, w = np.arange(len(f)), weight / weight.mean()
    best = (-np.inf, None)
    for form in KERNELS:
        logs, means, variances = [], [], []
        for level in NOISES:
            c = covariance(cell, cell, form) + level * np.diag(1 / w)
            inverse, n = np.linalg.inv(c), len(y)
            prior = 2.0 * (w * y**2).mean()
            amplitude = (y @ inverse @ y + prior) / (n + 2.0)
            logs.append(-0.5 * (n + 2.0) * np.log(amplitude) - 0.5 * np.linalg.slogdet(c)[1])
            cross = covariance(everywhere, cell, form)
            means.append(cross @ inverse @ y)
            own = covariance(everywhere, everywhere, form).diagonal()
            left = own - np.einsum("ij,jk,ik->i", cross, inverse, cross)
            variances.append(amplitude * left + max(0.0, amplitude * level - noise))
        logs = np.array(logs)
        total = logs.max() + np.log(np.exp(logs - logs.max()).sum())
        share_of = np.exp(logs - total)
        mean = share_of @ np.array(means)
        variance = share_of @ np.array(variances) + share_of @ np.array(means) ** 2 - mean**2
        if total > best[0]:
            best = (total, (mean, variance))
    return best[1]


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_posterior_is_that_of_explicit_inverses(noise: float) -> None:
    sites, cell, target = problem()
    rng = np.random.default_rng(6)
    y = torch.sin(2 * target).gather(1, cell[..., None]) + torch.from_numpy(
        rng.normal(0, 0.1, (2, 15, 1)).astype(np.float32)
    )
    weight = torch.from_numpy(rng.uniform(0.5, 3.0, (2, 15)).astype(np.float32))
    kernel = Kernel().requires_grad_(False)
    found = evidence(kernel, sites.at(cell), y, weight)
    law = predict(kernel, sites.at(cell), sites, modes_with(y, noise), weight, found)
    for row in range(2):
        own = Sites(sites.features[row : row + 1], sites.place[row : row + 1])
        mean, variance = by_hand(own, cell[row].numpy(), y[row, :, 0].numpy(), weight[row].numpy(), noise)
        np.testing.assert_allclose(law.mean[row, :, 0].numpy(), mean, atol=2e-3)  # float32, noise to 1e-3 of the signal
        np.testing.assert_allclose(law.variance[row, :, 0].numpy(), variance, atol=2e-3)


def test_entries_without_weight_are_as_if_they_were_not_there() -> None:
    sites, cell, target = problem()
    y = target.gather(1, cell[..., None])
    kernel = Kernel().requires_grad_(False)
    weight = torch.ones(2, 15)
    longer = torch.cat((cell, torch.zeros(2, 6, dtype=torch.int64)), 1), torch.cat((y, torch.full((2, 6, 1), 9.0)), 1)
    longer_weight = torch.cat((weight, torch.zeros(2, 6)), 1)
    laws = [
        predict(kernel, sites.at(c), sites, modes_with(v, 0.0), w, evidence(kernel, sites.at(c), v, w))
        for c, v, w in ((cell, y, weight), (*longer, longer_weight))
    ]
    assert torch.allclose(laws[0].mean, laws[1].mean, atol=1e-4)
    assert torch.allclose(laws[0].variance, laws[1].variance, atol=1e-4)


def test_places_are_x_then_y() -> None:
    sites = sites_of(torch.zeros(1, 12, 1), (3, 4))
    assert sites.place[0, 4 * 2 + 1].tolist() == [0.25, 0.5]


# --- numbers out of uncertain spectra ---


def posterior(deviation: float = 0.3) -> SpectrumPosterior:
    rng = np.random.default_rng(7)
    mean = torch.from_numpy(rng.normal(0, 1, (2, 9, 3)).astype(np.float32))
    centre, vectors = (
        torch.from_numpy(rng.uniform(low, 1, shape).astype(np.float32))
        for low, shape in ((0.0, (2, 6)), (-1.0, (2, 3, 6)))
    )
    rest, zero = torch.full((2, 6), 0.5), torch.zeros(2, 3)
    modes = Modes(centre + 10, torch.ones(2, 6), vectors, mean, rest, zero[:, 0], zero, zero)
    return SpectrumPosterior(modes, Coefficients(mean, torch.full_like(mean, deviation**2)))


def test_a_sum_of_channels_has_its_exact_mean_and_deviation() -> None:
    given, taste = posterior(), torch.tensor([1.0, 2.0, 0.0, -1.0, 0.5, 0.0])
    mean, deviation = given.scalarized(lambda spectra: spectra @ taste)
    assert torch.allclose(mean, given.mean() @ taste, atol=1e-4)
    exact = 0.3 * (given.modes.vectors @ taste).norm(dim=1)
    assert torch.allclose(deviation, exact[:, None].expand(2, 9), rtol=1e-3)


def test_a_bent_function_agrees_with_sampling() -> None:
    """Of a quotient the mean is right to second order; 20,000 samples are good to 1 % of the deviation."""
    given = posterior()

    def function(spectra: torch.Tensor) -> torch.Tensor:
        return spectra[..., 0] ** 2 / spectra[..., 3]

    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20_000, 2, 9, 3, generator=generator)
    drawn = function(given.modes.centre[:, None] + (given.coefficients.mean + 0.3 * normal) @ given.modes.vectors)
    mean, deviation = given.scalarized(function)
    assert torch.allclose(mean, drawn.mean(0), atol=0.05 * float(drawn.std(0).mean()))
    assert torch.allclose(deviation, drawn.std(0), rtol=0.05)


def test_the_deviation_of_a_channel_adds_modes_and_rest() -> None:
    given = posterior()
    expected = ((0.3**2 * given.modes.vectors.square()).sum(1) + 0.5**2).sqrt()
    assert torch.allclose(given.std(), expected[:, None].expand(2, 9, 6), rtol=1e-5)
    assert math.isclose(float(given.rows(torch.tensor([1])).std()[0, 0, 0]), float(expected[1, 0]), rel_tol=1e-5)


def test_counting_noise_of_a_sum_is_that_of_its_counts() -> None:
    """A window of 20 channels of 100 counts: √2000, to a tenth of which 64 patterns tell it, twice that is allowed."""
    rng = np.random.default_rng(8)
    counts = torch.from_numpy(rng.poisson(100.0, (1, 40, 64)).astype(np.float32))
    modes = find_modes(counts, torch.ones(1, 40), 2)
    zero = torch.zeros(1, 3, 2)
    noise = SpectrumPosterior(modes, Coefficients(zero, zero)).noise_of(lambda spectra: spectra[..., 10:30].sum(-1))
    assert float(noise) == pytest.approx(2000.0**0.5, rel=0.2)


@pytest.mark.parametrize("spectra", [2, 5, 40])
def test_modes_of_nearly_empty_spectra_are_finite(spectra: int) -> None:
    """A count here and there: most channels saw nothing, and most eigenvalues are zero."""
    generator = torch.Generator().manual_seed(3)
    counts = torch.poisson(torch.full((4, spectra, 128), 0.02), generator=generator)
    modes = find_modes(counts, torch.ones(4, spectra), 8)
    for part in (modes.centre, modes.white, modes.coefficients, modes.rest, modes.noise, modes.own_noise):
        assert part.isfinite().all()
