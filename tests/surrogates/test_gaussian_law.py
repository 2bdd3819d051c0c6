"""The law "none of these": its evidence is that of a Gaussian process, and it wins where no law of the set is true."""

from __future__ import annotations

import math

import pytest
import torch

from stem_gym.core.config import parse
from stem_gym.core.errors import ConfigError
from stem_gym.core.hypotheses import LawSpec
from stem_gym.surrogates.gaussian_law import GaussianLaw
from stem_gym.surrogates.information import evened
from stem_gym.surrogates.referee import Referee
from tests.surrogates.campaigns import domain_growth, first, simulated

SATURATING = {
    "law": "saturating",
    "priors": {
        "r_max_nm": {"kind": "lognormal", "median": 250.0, "sigma": 0.4},
        "v0_v": {"kind": "uniform", "low": 2.0, "high": 8.0},
        "tau0_s": {"kind": "loguniform", "low": 1e-3, "high": 1e-1},
    },
}


def test_the_evidence_of_one_measurement_is_a_mixture_of_gaussians():
    experiment = domain_growth()
    history, _ = simulated(experiment, 5, 1, seed=1)
    none = GaussianLaw(experiment)
    found = none.log_evidence(history, torch.ones(5, dtype=torch.int64))
    mean, spread = none._expected(history.design)
    even = evened(history.value, experiment.noise)
    parts = [
        torch.distributions.Normal(mean, (amplitude**2 * spread**2 + 1.0).sqrt()).log_prob(even)
        for amplitude in (0.5, 1.0)
    ]
    exact = torch.logsumexp(torch.stack(parts), 0) - math.log(2.0)
    exact = exact - 0.5 * (64.0 + (0.08 * history.value) ** 2).log()  # the slope of values in units of the noise
    torch.testing.assert_close(found, exact[:, 0], atol=1e-3, rtol=1e-3)


def test_it_wins_outside_the_set_and_costs_little_inside():
    experiment = domain_growth()
    shares = []
    for spec in (None, parse(LawSpec, SATURATING, "test")):
        history, _ = simulated(experiment, 40, 15, seed=2, spec=spec)
        referee = Referee(experiment, 40, particles=2048, none=GaussianLaw(experiment, 0.2))
        referee.update(history)
        shares.append(referee.probability[:, -1])
    assert float(shares[0].mean()) < 0.1
    assert float((shares[1] > 0.5).float().mean()) > 0.8


def test_before_anything_was_measured_it_has_its_prior():
    experiment = domain_growth()
    referee = Referee(experiment, 2, particles=256, none=GaussianLaw(experiment, 0.3))
    assert referee.probability.tolist() == [pytest.approx([0.175] * 4 + [0.3])] * 2


def test_its_forecast_covers_what_comes():
    experiment = domain_growth()
    history, _ = simulated(experiment, 60, 13, seed=3)
    none = GaussianLaw(experiment)
    seen, used = first(history, 12), torch.full((60,), 12)
    inside = []
    for row in range(60):
        value = none.forecast(seen, used, history.design[row, 12:], 200)[row, :, 0]
        low, high = value.quantile(0.05), value.quantile(0.95)
        sd = float(experiment.noise_sd(history.value[row, 12], torch.ones(1)))
        inside.append(float(low) - 1.64 * sd <= float(history.value[row, 12]) <= float(high) + 1.64 * sd)
    assert sum(inside) / 60 >= 0.85


def test_a_prior_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="between 0 and 1"):
        GaussianLaw(domain_growth(), 0.0)
