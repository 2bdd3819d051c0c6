"""The kernel model against plain formulas; rows and their neighbours, spikes, coverage; what is seen in patches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from agents.engine import deep_kernel
from agents.engine.deep_kernel import Cells, KernelPlan, Points, condition, fit, predict, start
from agents.engine.field_model import standardised
from agents.engine.leave_one_out import calibration_by_value
from agents.engine.patch_features import intensity_and_gradient, patches_of, principal_features
from stem_gym.core.errors import PolicyError
from tests.agents.search import blobs

PLAN = KernelPlan(patch_features=4, hidden=5, embedding=2, basis=2, members=2, robust=False)


def problem(rows=3, cells=40, counts=(12, 9, 5), plan=PLAN, seed=0):
    """Random fields and values, with different numbers of measurements."""
    generator = torch.Generator().manual_seed(seed)
    field = Cells(
        torch.rand(rows, cells, 2, generator=generator),
        torch.randn(rows, cells, plan.patch_features, generator=generator) if plan.patch_features else None,
        torch.randn(rows, cells, plan.basis, generator=generator) if plan.basis else None,
    )
    measured = torch.zeros(rows, cells, dtype=torch.bool)
    for row, count in enumerate(counts[:rows]):
        measured[row, torch.randperm(cells, generator=generator)[:count]] = True
    value = torch.randn(rows, cells, generator=generator)
    fold = torch.randint(0, plan.members, (rows, cells), generator=generator)
    points, _, _ = standardised(measured, value, fold)
    return field, points, start(plan, torch.randn(rows, plan.members, plan.parameters, generator=generator))


def one(rows, part):
    """Row `rows` of a dataclass of tensors."""
    return replace(part, **{k: v[rows : rows + 1] for k, v in vars(part).items() if v is not None})


def plain_kernel(plan, theta, a, b):
    """The kernel written out with NumPy, cell by cell."""
    first, bias, second, skip, scalars, basis = (x.numpy() for x in theta.double().split(plan.sizes))
    p, h, d = plan.patch_features, plan.hidden, plan.embedding

    def matern(x, y):
        s = np.sqrt(5.0) * np.linalg.norm(x[:, None] - y[None], axis=-1)
        return (1 + s + s * s / 3) * np.exp(-s)

    def gaussian(x, y):
        return np.exp(-0.5 * ((x[:, None] - y[None]) ** 2).sum(-1))

    def embed(x):
        return np.tanh(x @ first.reshape(p, h) + bias) @ second.reshape(h, d) + x @ skip.reshape(p, d)

    found = np.exp(2 * (scalars[1] - 0.4)) * matern(a[0] / np.exp(scalars[2] - 1.2), b[0] / np.exp(scalars[2] - 1.2))
    found += np.exp(2 * scalars[0]) * gaussian(embed(a[1]), embed(b[1]))
    found += (a[2] * np.exp(2 * (basis - 0.7))) @ b[2].T + 1.0
    own = found.diagonal().max() if len(a[0]) == len(b[0]) else 0.0
    return found, np.exp(2 * (scalars[3] - 2.3)) + 1e-4 + 1e-6 * own


def test_the_posterior_is_that_of_the_plain_formulas():
    """Rasmussen and Williams (2.25, 2.26) with NumPy's solver, for every member; rows have different numbers of points.

    Candidates are computed in single precision: 1e-4 of a deviation.
    """
    field, points, learned = problem()
    found = predict(PLAN, learned, field, points)
    scale = condition(PLAN, learned, field, points).scale
    for row in range(3):
        keep = points.valid[row]
        index, y = points.index[row][keep], points.value[row][keep].numpy()
        every = [x[row].double().numpy() for x in (field.places, field.patches, field.basis)]
        seen = [x[index.numpy()] for x in every]
        means, variances = [], []
        for member in range(2):
            theta = learned.theta[row, member]
            k, noise = plain_kernel(PLAN, theta, seen, seen)
            cross = plain_kernel(PLAN, theta, seen, every)[0]
            solved = np.linalg.solve(k + noise * np.eye(len(k)), np.column_stack((y, cross)))
            means.append(cross.T @ solved[:, 0])
            variances.append(np.diag(plain_kernel(PLAN, theta, every, every)[0]) - (cross * solved[:, 1:]).sum(0))
        total = scale[row].item() ** 2 * np.mean(variances, 0) + np.var(means, 0)
        np.testing.assert_allclose(found.mean[row], np.mean(means, 0), atol=2e-4)
        np.testing.assert_allclose(found.deviation[row], np.sqrt(total), rtol=2e-3, atol=2e-4)


def test_a_grid_is_looked_up_as_it_would_be_computed():
    """The same posterior with and without being told that the places are a grid's, which is not square."""
    plan = replace(PLAN, grid=(5, 8))
    field, points, learned = problem(plan=plan)
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(8.0), indexing="ij")
    field = replace(field, places=(torch.stack((x, y), -1).reshape(1, 40, 2) / 8.0).expand(3, -1, -1))
    told, computed = (predict(p, learned, field, points) for p in (plan, replace(plan, grid=None)))
    np.testing.assert_allclose(told.mean, computed.mean, atol=1e-4)
    np.testing.assert_allclose(told.deviation, computed.deviation, rtol=1e-3, atol=1e-4)


def test_one_step_goes_down_the_gradient_of_likelihood_and_priors():
    """Adam's first step is the gradient's sign; the gradient by central differences of the whole objective."""
    plan = replace(PLAN, members=1)
    field, points, learned = problem(rows=1, plan=plan)

    def objective(theta):
        index = points.index[0]
        seen = [x[0][index].double().numpy() for x in (field.places, field.patches, field.basis)]
        k, noise = plain_kernel(plan, theta, seen, seen)
        k, y = k + noise * np.eye(len(k)), points.value[0].numpy()
        likelihood = -0.5 * y @ np.linalg.solve(k, y) - 0.5 * np.linalg.slogdet(k)[1]
        return -likelihood + 0.5 * float((theta.square() / plan.prior_variance()).sum())

    theta = learned.theta[0, 0].double()
    slope = []
    for i in range(len(theta)):
        aside = torch.zeros_like(theta)
        aside[i] = 1e-5
        slope.append((objective(theta + aside) - objective(theta - aside)) / 2e-5)
    after = fit(plan, learned, field, points, 1)
    slope = np.array(slope) * min(1.0, 10.0 / np.linalg.norm(slope))
    np.testing.assert_allclose(after.first[0, 0] / (1 - deep_kernel._BETAS[0]), slope, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(after.theta[0, 0] - theta, -plan.learning_rate * np.sign(slope), rtol=1e-3, atol=1e-6)


def test_a_measurement_is_as_far_away_as_processes_without_it_say():
    """The error of both members' mean, by the calibrated deviation of the fold's own, their disagreement and noise."""
    field, points, learned = problem(rows=1)
    known = condition(PLAN, learned, field, points)
    index, y, fold = points.index[0], points.value[0].numpy(), points.fold[0].numpy()
    seen = [x[0][index].double().numpy() for x in (field.places, field.patches, field.basis)]
    count = np.arange(len(y))
    means, latents, noises = np.empty((3, 2, len(y)))
    for member in range(2):
        k, noise = plain_kernel(PLAN, learned.theta[0, member], seen, seen)
        for i in count:
            rest = np.delete(count, i)
            solved = np.linalg.solve(k[np.ix_(rest, rest)] + noise * np.eye(len(rest)), k[rest, i])
            means[member, i], latents[member, i] = solved @ y[rest], k[i, i] - solved @ k[rest, i]
            noises[member, i] = noise
    residual, apart = y - means[fold, count], means.var(axis=0)
    error = residual * np.sqrt(1.0 - apart.sum() / (residual**2).sum())
    total = known.scale.item() ** 2 * latents[fold, count] + apart + noises[fold, count]
    np.testing.assert_allclose(known.away[0], error / np.sqrt(total), rtol=2e-3)
    assert abs(known.scale.item() - 1.0) > 0.05 and error[0] / residual[0] < 0.99, "both would be seen"


def test_a_member_does_not_learn_from_its_fold():
    """Other values in a fold change the fit of all members but the fold's own."""
    field, points, learned = problem(rows=1)
    other = replace(points, value=torch.where(points.fold == 1, points.value + 1.0, points.value))
    before, after = (fit(PLAN, learned, field, p, 3).theta[0] for p in (points, other))
    assert torch.equal(before[1], after[1]) and not torch.allclose(before[0], after[0])


@pytest.mark.parametrize("robust", [False, True])
def test_a_row_does_not_hang_on_its_neighbours(robust):
    """Alone and beside rows with more points: the same but for rounding, which sixty steps of Adam let grow."""
    plan = replace(PLAN, robust=robust)
    field, points, learned = problem(plan=plan)
    together = predict(plan, fit(plan, learned, field, points, 60), field, points)
    for row in range(3):
        alone = [one(row, part) for part in (field, points, learned)]
        keep = int(points.valid[row].sum())
        fewer = Points(*(x[:, :keep] for x in vars(alone[1]).values()))
        apart = predict(plan, fit(plan, alone[2], alone[0], fewer, 60), alone[0], fewer)
        np.testing.assert_allclose(apart.mean[0], together.mean[row], atol=1e-3)
        np.testing.assert_allclose(apart.deviation[0], together.deviation[row], rtol=1e-2)
        np.testing.assert_allclose(apart.spread[0], together.spread[row], rtol=2e-2)


def test_a_place_is_likened_to_what_was_predicted_of_others_without_their_own_measurement(monkeypatch):
    """Each measurement's prediction is that of processes that were never told of it, the mean of both."""
    field, points, learned = problem(rows=1)
    given = []

    def watched(z, valid, at, value):
        given.append(at)
        return calibration_by_value(z, valid, at, value)

    monkeypatch.setattr(deep_kernel, "calibration_by_value", watched)
    predict(PLAN, learned, field, points)
    for i in range(points.index.shape[1]):
        rest = [j for j in range(points.index.shape[1]) if j != i]
        untold = predict(PLAN, learned, field, Points(*(x[:, rest] for x in vars(points).values())))
        assert given[0][0, i].item() == pytest.approx(untold.mean[0, points.index[0, i]].item(), abs=1e-4)


def world(count, seed, rows=6):
    """Fields of blobs with `count` cells measured at random."""
    fields = blobs(rows, seed=seed)
    rng = np.random.default_rng(seed)
    measured = torch.zeros(fields.value.shape, dtype=torch.bool)
    for row in range(rows):
        measured[row, torch.from_numpy(rng.permutation(measured.shape[1])[:count])] = True
    image = torch.from_numpy(fields.image).float() / 255.0
    y, x = np.mgrid[:32, :32] / 32.0
    places = torch.from_numpy(np.stack((x, y), -1).reshape(1, -1, 2)).float().expand(rows, -1, -1)
    cells = Cells(places, principal_features(patches_of(image, 7), 6))
    return fields, cells, measured, torch.from_numpy(rng.integers(0, 3, measured.shape))


def posterior(plan, cells, value, measured, fold, steps=100):
    """Mean and deviation of a measurement, in the value's unit."""
    points, middle, spread = standardised(measured, value, fold)
    normal = torch.randn(len(value), plan.members, plan.parameters, generator=torch.Generator().manual_seed(0))
    found = predict(plan, fit(plan, start(plan, normal), cells, points, steps), cells, points)
    return middle[:, None] + spread[:, None] * found.mean, spread[:, None] * found.spread


@pytest.mark.parametrize("count", [20, 50])
def test_intervals_hold_what_they_promise(count):
    """90 % intervals over cells that were not measured: 80–97 %, the mean over fields."""
    fields, cells, measured, fold = world(count, seed=7)
    value = torch.from_numpy(fields.value)
    mean, deviation = posterior(KernelPlan(patch_features=6), cells, value, measured, fold)

    def held(scale):
        inside = ((value - mean).abs() < 1.6448536 * scale * deviation) & ~measured
        return inside.sum().item() / (~measured).sum().item()

    assert 0.80 <= held(1.0) <= 0.97
    assert held(0.5) < 0.80 and held(2.0) > 0.97, "half or twice the scale would be seen"
    error, plain = ((value - mean) ** 2)[~measured].mean().sqrt(), value[~measured].std()
    assert error < 0.75 * plain, "patches tell something of the value"


def test_a_spike_does_not_derail_the_map():
    """One value 100 spreads too high: the robust map stays nearly as good as without it, the plain one does not."""
    fields, cells, measured, fold = world(40, seed=9)
    value = torch.from_numpy(fields.value)
    spiked = value.clone()
    struck = measured.int().argmax(dim=1)
    spiked[torch.arange(6), struck] += 100.0 * value.std()

    def error(robust, told):
        mean, _ = posterior(KernelPlan(patch_features=6, robust=robust), cells, told, measured, fold)
        return ((value - mean) ** 2)[~measured].mean().sqrt().item()

    clean = error(True, value)
    assert error(True, spiked) < 1.5 * clean
    assert error(False, spiked) > 2.5 * clean


def test_standardised_values_have_middle_0_and_spread_1_whatever_one_of_them_does():
    rng = np.random.default_rng(2)
    value = torch.from_numpy(rng.normal(1e6, 10.0, (1, 400)))
    value[0, 3] = 1e6 + 500.0
    measured = torch.ones(1, 400, dtype=torch.bool)
    points, middle, spread = standardised(measured, value, torch.zeros(1, 400, dtype=torch.int64))
    assert middle.item() == pytest.approx(1e6, abs=2.0) and spread.item() == pytest.approx(10.0, rel=0.15)
    assert points.value.median().abs() < 0.1
    flat, _, spread = standardised(measured, torch.full((1, 400), 3.0), torch.zeros(1, 400, dtype=torch.int64))
    assert (flat.value == 0).all() and spread.item() == 1.0


# Patches


def test_a_patch_is_what_surrounds_the_cell_mirrored_at_the_border():
    image = torch.arange(30.0).reshape(1, 5, 6)
    patches = patches_of(image, 3).reshape(5, 6, 3, 3)
    assert torch.equal(patches[2, 3], image[0, 1:4, 2:5])
    assert patches[0, 0].tolist() == [[7, 6, 7], [1, 0, 1], [7, 6, 7]]
    even = patches_of(image, 4).reshape(5, 6, 4, 4)
    assert torch.equal(even[2, 3], image[0, 0:4, 1:5])


def test_a_patch_larger_than_the_image_is_refused():
    with pytest.raises(PolicyError, match=r"9 × 9 .* 12 × 8; give a side of 1 to 8"):
        patches_of(torch.zeros(1, 8, 12), 9)


def test_features_keep_what_distances_tell():
    """With all components and no weighting the distances are those of whitened patches: checked by the covariance."""
    image = torch.randn(2, 20, 20, generator=torch.Generator().manual_seed(1))
    features = principal_features(patches_of(image, 3), 4).double()
    covariance = features.mT @ features / 400
    aside = covariance - torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    assert aside.abs().max() < 1e-5
    strength = torch.linalg.eigvalsh(torch.stack([torch.cov(p.T, correction=0) for p in patches_of(image, 3)]))
    share = strength.flip(1)[:, :4] / strength.flip(1)[:, :1]
    np.testing.assert_allclose(covariance.diagonal(dim1=1, dim2=2), share.sqrt(), rtol=1e-4)
    assert (principal_features(torch.ones(1, 30, 9), 4) == 0).all(), "a flat image has no directions"


def test_gradients_are_those_of_a_slope():
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    columns = intensity_and_gradient(torch.where(x > 5, 3.0 * x, 15.0)[None], 1).reshape(12, 12, 3)
    steep = columns[..., 2]
    assert (steep[:, 8] > steep[:, 2]).all() and torch.allclose(columns.mean((0, 1)), torch.zeros(3), atol=1e-6)
    assert torch.allclose(columns[..., 0], columns[..., 1]), "no blur"
