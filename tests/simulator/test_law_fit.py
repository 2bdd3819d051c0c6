"""Fits of laws: against linear algebra where a closed form exists, and back to where the data came from."""

from __future__ import annotations

import math

import pytest
import torch

from stem_gym.core.errors import DataError
from stem_gym.core.hypotheses import Axis, LawSpec, Normal, read_law_set
from stem_gym.simulator import laws
from stem_gym.simulator.law_fit import fit_law

AXES = (Axis(name="bias_v", does="Pulse.bias_v", low=-2.0, high=2.0, levels=9),)
LINE = LawSpec(law="line", priors={"base": Normal(mean=1.0, sd=0.5), "slope": Normal(mean=-0.3, sd=2.0)})


def line(axes, *, base, slope):
    return base + slope * axes["bias_v"]


@pytest.fixture
def straight(monkeypatch):
    monkeypatch.setattr(laws, "_registered", {"line": line})
    return laws.bind("line", LINE, AXES)


@pytest.mark.parametrize("experiments", [9.0, 30.0])
def test_of_a_straight_line_it_is_linear_algebra(straight, experiments):
    generator = torch.Generator().manual_seed(0)
    design = AXES[0].grid().double().unsqueeze(1)
    value = 2.0 * torch.randn(5, 9, generator=generator, dtype=torch.float64)
    sd = 0.3 + torch.rand(5, 9, generator=generator, dtype=torch.float64)
    found = fit_law(straight, design, value, sd, experiments)
    slopes = torch.cat((torch.full_like(design, 0.5), 2.0 * design), dim=1)  # of the mean, along z
    for row in range(5):
        weight = experiments / 9.0 / sd[row].square()
        precision = slopes.T @ (weight.unsqueeze(1) * slopes) + torch.eye(2).double()
        away = value[row] - (1.0 - 0.3 * design[:, 0])
        z = torch.linalg.solve(precision, slopes.T @ (weight * away))
        square = (weight * (away - slopes @ z).square()).sum()
        torch.testing.assert_close(found.z[row], z, rtol=1e-3, atol=1e-3)
        assert float(found.chi2[row]) == pytest.approx(float(square) / experiments, rel=1e-4)
        evidence = -0.5 * (square + z.square().sum() + torch.logdet(precision))
        assert float(found.log_evidence[row]) == pytest.approx(float(evidence), rel=1e-4)


def test_the_evidence_is_that_of_the_marginal_gaussian(straight):
    """Each experiment done once: ln N(value; mean, SSᵀ + σ²), but for the part that no law changes."""
    design, sd = AXES[0].grid().double().unsqueeze(1), torch.full((1, 9), 0.7).double()
    value = torch.randn(1, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slopes = torch.cat((torch.full_like(design, 0.5), 2.0 * design), dim=1)
    marginal = torch.distributions.MultivariateNormal(
        1.0 - 0.3 * design[:, 0], slopes @ slopes.T + torch.diag(sd[0].square())
    )
    shared = -sd.log().sum() - 4.5 * math.log(2.0 * math.pi)
    found = fit_law(straight, design, value, sd, 9.0).log_evidence + shared
    assert float(found) == pytest.approx(float(marginal.log_prob(value[0])), rel=1e-5)


@pytest.mark.parametrize("set_name", ["domain_growth", "damage", "coarsening"])
def test_a_law_fits_what_it_gave_itself(set_name):
    """Nothing beats the truth by more than the prior pulls: the minimum found is never above that of the truth."""
    law_set = read_law_set(set_name)
    design = torch.cartesian_prod(*(axis.grid() for axis in law_set.axes)).double()
    for law in laws.bind_set(law_set).values():
        truth = torch.randn(8, len(law.parameters), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        value = law.mean(truth.unsqueeze(1), design)
        sd = torch.sqrt(0.5**2 + (0.05 * value).square())
        found = fit_law(law, design, value, sd, 50.0)
        assert bool((50.0 * found.chi2 + found.z.square().sum(1) < truth.square().sum(1) + 0.1).all()), law.name
        assert float(found.chi2.max()) < 0.1


def test_worlds_do_not_know_of_one_another(straight):
    design, sd = AXES[0].grid().double().unsqueeze(1), torch.ones(3, 9).double()
    value = torch.randn(3, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    whole, alone = fit_law(straight, design, value, sd, 9.0), fit_law(straight, design, value[1:2], sd[1:2], 9.0)
    torch.testing.assert_close(whole.z[1:2], alone.z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("value", "sd", "experiments", "words"),
    [
        (torch.zeros(2, 8), torch.ones(2, 8), 9.0, r"\(9, 1\), \(2, 8\)"),
        (torch.zeros(2, 9), torch.ones(9), 9.0, r"\(2, 9\) and \(9,\)"),
        (torch.zeros(2, 9), torch.zeros(2, 9), 9.0, "positive deviations"),
        (torch.full((2, 9), math.nan), torch.ones(2, 9), 9.0, "finite"),
        (torch.zeros(2, 9), torch.ones(2, 9), 0.0, "number of experiments; given 0"),
    ],
)
def test_what_is_no_measurement_is_refused(straight, value, sd, experiments, words):
    with pytest.raises(DataError, match=words):
        fit_law(straight, AXES[0].grid().unsqueeze(1), value, sd, experiments)
