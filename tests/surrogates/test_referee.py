"""The referee's posterior, against closed forms, quadrature, and the share of claims that are right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stem_gym.core.experiments import History, Protocol
from stem_gym.core.hypotheses import LawSet, as_law_set
from stem_gym.simulator.laws import bind_set, known_laws, register
from stem_gym.surrogates.gaussian_law import GaussianLaw
from stem_gym.surrogates.particles import gaussian_of, systematic
from stem_gym.surrogates.referee import Referee
from tests.surrogates.campaigns import domain_growth, drawn, first, history_of, simulated


def line(axes: Any, *, offset: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    return offset + slope * axes["x"]


def level(axes: Any, *, offset: torch.Tensor) -> torch.Tensor:
    return offset + 0.0 * axes["x"]


def lines() -> LawSet:
    """A straight line against a constant: Gaussian in all that is unknown."""
    for law in (line, level):
        if law.__name__ not in known_laws():
            register(law.__name__, law)
    normal = {"kind": "normal", "mean": 1.0, "sd": 2.0}
    return as_law_set(
        {
            "name": "lines",
            "summary": "a line or a constant",
            "quantity": "y",
            "full_scale": 1.0,
            "logarithmic": True,
            "axes": [{"name": "x", "does": "Set", "low": -1.0, "high": 1.0, "levels": 5}],
            "laws": {
                "line": {"law": "line", "priors": {"offset": normal, "slope": {**normal, "mean": 0.0}}},
                "level": {"law": "level", "priors": {"offset": normal}},
            },
        }
    )


def of_lines(**changes: Any) -> Any:
    return domain_growth(laws=lines().model_dump(mode="json"), noise={"absolute": 0.5}, **changes)


def test_the_evidence_of_linear_laws_is_that_of_their_gaussian():
    x = torch.linspace(-1.0, 1.0, 6).repeat(5, 1)
    value = 1.0 + 1.5 * drawn(5, 1, seed=1) + 1.5 * drawn(5, 1, seed=2) * x + 0.5 * drawn(5, 6, seed=3)
    referee = Referee(of_lines(), 5)
    referee.update(history_of(x.unsqueeze(2), value))
    exact = torch.stack([gaussian(value, basis(6, x[0], columns)) for columns in (2, 1)], dim=1)
    close_where_it_counts(referee, exact)


def basis(count: int, x: torch.Tensor, columns: int) -> torch.Tensor:
    """Covariance (T, T) of offset and slope, or of the offset alone, and of the noise."""
    design = torch.stack([torch.ones(count), x], dim=1)[:, :columns].double()
    return 4.0 * design @ design.T + 0.25 * torch.eye(count, dtype=torch.float64)


def gaussian(value: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Log density (B,) of values (B, T) around the prior's mean."""
    mean = torch.ones(value.shape[1], dtype=torch.float64)
    return torch.distributions.MultivariateNormal(mean, covariance).log_prob(value.double())


def close_where_it_counts(referee: Referee, exact: torch.Tensor) -> None:
    """Probabilities, and the evidence of the likelier law; that of a law which is out is not followed so far."""
    probability = torch.softmax(exact, dim=1)
    torch.testing.assert_close(referee.probability[:, : exact.shape[1]].double(), probability, atol=0.02, rtol=0.0)
    best = probability.argmax(1, keepdim=True)
    found = referee.log_evidence.double().gather(1, best)
    torch.testing.assert_close(found, exact.gather(1, best), atol=0.1, rtol=0.0)


def test_a_shared_factor_is_that_of_the_gaussian_as_well():
    """Constants at two sites, each with an offset of its own: a block of the covariance."""
    sites = {"count": 2, "factor": 1.5}
    value, x = 1.0 + 2.0 * drawn(4, 1, seed=4) + 0.5 * drawn(4, 6, seed=5), torch.zeros(4, 6, 1)
    site = torch.tensor([0, 0, 1, 1, 1, 0]).expand(4, -1)
    calibrated = torch.tensor([False, False, False, False, True, True]).expand(4, -1)
    one = torch.ones(4, 6)
    referee = Referee(of_lines(sites=sites, enabling={}), 4)
    referee.update(History(one > 0, x, site, value, one, one > 0, calibrated))
    same = (site[0][:, None] == site[0]) & ~calibrated[0] & ~calibrated[0][:, None]
    shared = 2.25 * same.double()
    zero = torch.zeros(6)
    exact = torch.stack([gaussian(value, basis(6, zero, columns) + shared) for columns in (2, 1)], dim=1)
    close_where_it_counts(referee, exact)


def test_probabilities_of_the_domain_laws_are_those_of_many_prior_samples():
    """Importance sampling from the prior: slow, and independent of weights, resampling and moves."""
    experiment = domain_growth()
    history, _ = simulated(experiment, 6, 4, seed=2)
    referee = Referee(experiment, 6)
    for count in range(1, 5):
        referee.update(first(history, count))
    exact = []
    for law in bind_set(experiment.law_set).values():
        total = torch.full((6,), -torch.inf, dtype=torch.float64)
        for block in range(8):
            z = drawn(50_000, 3, seed=10 + block)
            said = law.mean(z[:, None, None], history.design)  # (S, B, T)
            sd = experiment.noise_sd(said, torch.ones(1))
            log = (-0.5 * ((history.value - said) / sd).square() - sd.log() - 0.9189385).sum(2).double()
            total = torch.logaddexp(total, log.logsumexp(0))
        exact.append(total)
    probability = torch.softmax(torch.stack(exact, dim=1), dim=1)
    torch.testing.assert_close(referee.probability[:, :4].double(), probability, atol=0.03, rtol=0.0)


def test_the_order_of_measurements_of_fresh_sites_does_not_matter():
    experiment = domain_growth()
    history, _ = simulated(experiment, 6, 10, seed=3)
    order = torch.tensor([7, 2, 9, 0, 4, 1, 8, 3, 6, 5])
    other = History(*(part[:, order] for part in vars(history).values()))
    told = []
    for one in (history, other):
        referee = Referee(experiment, 6)
        for count in (3, 6, 10):
            referee.update(first(one, count))
        told.append(referee.probability)
    torch.testing.assert_close(told[0], told[1], atol=0.03, rtol=0.0)


def test_a_row_depends_on_its_seed_alone():
    experiment = domain_growth()
    history, _ = simulated(experiment, 4, 8, seed=4)
    told = []
    for rows in ([0, 1, 2, 3], [2]):
        referee = Referee(experiment, len(rows), particles=2048)
        referee.reset(torch.arange(len(rows)), [10 + row for row in rows])
        part = History(*(value[rows] for value in vars(history).values()))
        for count in range(1, 9):
            referee.update(first(part, count))
        told.append(referee.probability)
    torch.testing.assert_close(told[0][2:3], told[1], atol=1e-4, rtol=1e-3)


def test_a_reset_row_is_back_at_the_prior_and_its_neighbour_is_not():
    experiment = domain_growth()
    history, _ = simulated(experiment, 2, 5, seed=5)
    referee = Referee(experiment, 2, particles=1024)
    referee.update(history)
    kept = referee.probability[1].clone()
    referee.reset(torch.tensor([0]))
    assert referee.probability[0].tolist() == pytest.approx([0.25] * 4 + [0.0])
    torch.testing.assert_close(referee.probability[1], kept)


def test_claims_at_95_percent_are_right_about_as_often():
    experiment = domain_growth()
    history, true = simulated(experiment, 160, 12, seed=6)
    referee = Referee(experiment, 160, particles=2048)
    right = claims = 0
    open_rows = torch.ones(160, dtype=torch.bool)
    for count in range(2, 13, 2):
        referee.update(first(history, count))
        share, answer = referee.probability.max(1)
        sure = open_rows & (share > 0.95)
        claims, right = claims + int(sure.sum()), right + int((sure & (answer == true)).sum())
        open_rows &= ~sure
    assert claims > 60
    assert 0.91 <= right / claims <= 1.0
    # What is left over is calibrated as well: the mean probability of the truth is how often the likeliest is right.
    share, answer = referee.probability.max(1)
    assert float((answer == true).float().mean()) == pytest.approx(float(share.mean()), abs=0.08)


def test_the_alarm_is_quiet_inside_and_rings_outside():
    from stem_gym.core.config import parse
    from stem_gym.core.hypotheses import LawSpec

    experiment = domain_growth()
    spec = {
        "law": "hybrid",
        "priors": {
            "r_cr_nm": {"kind": "lognormal", "median": 20.0, "sigma": 0.4},
            "r0_nm": {"kind": "lognormal", "median": 50.0, "sigma": 0.5},
            "vc_v": {"kind": "uniform", "low": 0.6, "high": 2.0},
            "beta": {"kind": "uniform", "low": 0.05, "high": 0.2},
        },
    }
    alarms = []
    for truth in (None, parse(LawSpec, spec, "test")):
        referee = Referee(experiment, 40, particles=2048)
        referee.update(simulated(experiment, 40, 15, seed=7, spec=truth)[0])
        alarms.append(float(referee.chi2.mean()))
    assert 0.6 < alarms[0] < 1.05
    assert alarms[1] > 1.3


def test_what_a_site_has_seen_is_in_the_forecast():
    sites = {"count": 2, "factor": 0.5, "remembers": True, "move_s": 1.0}
    experiment = domain_growth(sites=sites)
    design = torch.tensor([[20.0, 100.0]]).expand(2, 1, 2)
    referee = Referee(experiment, 2, particles=4096)
    referee.update(history_of(design, torch.full((2, 1), 400.0)))
    weak = torch.tensor([[0.5, 1e-3]])
    there = referee.forecast(weak, torch.ones(2), 256, torch.tensor([0, 0]))
    fresh = referee.forecast(weak, torch.ones(2), 256, torch.tensor([1, 1]))
    assert float(there.value.mean()) == pytest.approx(400.0, rel=0.15), "the domain is still there"
    assert float(fresh.value.mean()) < 30.0


@pytest.mark.parametrize("laws", ["domain_growth", "damage", "coarsening"])
def test_the_grid_of_all_experiments_is_forecast_as_any_other_list_of_them(laws):
    experiment = domain_growth(laws=laws)
    referee, designs = Referee(experiment, 2, 1024), Protocol(experiment).designs()
    whole, back = (referee.forecast(some, torch.ones(2), 64).value for some in (designs, designs.flip(0)))
    torch.testing.assert_close(whole.flip(3), back)
    assert whole.std() > 0.0


def test_a_forecast_weighs_its_particles():
    """After a measurement that leaves enough of them to go on with, means are those of the weighted particles."""
    experiment = domain_growth(noise={"absolute": 150.0})
    referee, designs = Referee(experiment, 2, 4096), Protocol(experiment).designs()
    before = referee.forecast(designs, torch.ones(2), 256).value_moments()[0]
    seen = simulated(experiment, 2, 1)[0]
    referee.update(dataclasses.replace(seen, value=seen.value + 200.0))
    weight = referee._cloud.weight
    assert weight.std() > 0.1 * weight.mean(), "it is weights that tell, not new particles"
    said = torch.stack(
        [law.over_grid(referee._cloud.z[:, i].mT, referee._grids) for i, law in enumerate(referee._laws)], dim=1
    )
    mean = (said * weight.unsqueeze(2)).sum(3)
    found = referee.forecast(designs, torch.ones(2), 256).value_moments()[0]
    assert (found - mean).abs().mean() < 0.3 * (before - mean).abs().mean()


def test_what_is_forecast_the_same_is_said_to_be_for_none_of_them_too():
    """The answer "none of these" sees every axis; memory and factor of a site keep the same what was."""
    sites = {"count": 2, "factor": 0.5, "remembers": True, "move_s": 1.0}
    experiment = domain_growth(sites=sites)
    referee, designs = Referee(experiment, 3, 1024, none=GaussianLaw(experiment)), Protocol(experiment).designs()
    referee.update(simulated(experiment, 3, 4)[0])
    told = referee.forecast(
        designs, torch.ones(3), 64, torch.tensor([0, 1, 0]), fresh=torch.tensor([True, False, False])
    )
    assert told.same.shape == (5, 120) and told.value.shape == (3, 5, 64, 120)
    assert [len(row.unique()) for row in told.same] == [20, 20, 120, 120, 120]
    torch.testing.assert_close(told.value.gather(3, told.same[None, :, None].expand_as(told.value)), told.value)


@pytest.mark.parametrize("particles", [512, 500, 513])
@pytest.mark.parametrize("draws", [8, 31, 500, 512, 2000])
def test_particles_are_taken_as_often_as_they_weigh(draws, particles):
    weight = torch.rand(2, 3, particles, generator=torch.Generator().manual_seed(0)).pow(8)
    weight /= weight.sum(2, keepdim=True)
    index = systematic(weight, draws, torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1).expand(2, 3, 1))
    assert index.shape == (2, 3, draws) and (index.diff(dim=2) >= 0).all()
    times = torch.zeros_like(weight).scatter_add(2, index, torch.ones(index.shape))
    assert ((times - draws * weight).abs() < 1.0 + 1e-3).all(), "by less than one off, as even steps are"


def test_the_curve_goes_through_the_parameters_of_each_law_alone():
    """One law has two parameters and the other one: in its order, no number that it does not use has a say."""
    referee = Referee(of_lines(), 1, 1024)
    two, one = referee._cloud.z[0]
    assert one[0].diff().abs().mean() < 0.01 and two[0].diff().abs().mean() > 0.05
    assert one[1].diff().abs().mean() > 0.5, "this one is not used"


@pytest.mark.parametrize("measured", [0, 2, 6])
def test_few_particles_in_the_order_of_the_curve_stand_for_all(measured):
    """Means of 64 in order have at most six tenths of the error of 64 in any other order, for every law."""
    experiment = domain_growth()
    referee, designs = Referee(experiment, 24, 4096), Protocol(experiment).designs()
    if measured:
        referee.update(simulated(experiment, 24, measured)[0])

    def means(draws: int) -> torch.Tensor:
        return referee.forecast(designs, torch.ones(24), draws).value_moments(even=True)[0]

    every = means(4096)
    ordered = (means(64) - every).square().mean((0, 2)).sqrt()
    shuffled = torch.rand(24, 4, 4096, generator=torch.Generator().manual_seed(0)).argsort(2)
    referee._cloud = referee._cloud.picked(shuffled)
    other = (means(64) - every).square().mean((0, 2)).sqrt()
    assert bool((ordered < 0.6 * other).all()), (ordered, other)


def test_the_spread_of_particles_on_a_line_is_found():
    """Three parameters that are multiples of one, and wide: in single precision they have no Cholesky root."""
    along = 5.0 * drawn(16, 4, 1, 4096)
    weight = torch.rand(16, 4, 4096, generator=torch.Generator().manual_seed(0)).pow(20)
    weight /= weight.sum(2, keepdim=True)
    mean, root = gaussian_of(torch.cat((along, -along, 2.0 * along), dim=2), weight)
    centre = (weight * along[:, :, 0]).sum(2)
    variance = (weight * (along[:, :, 0] - centre.unsqueeze(2)).square()).sum(2)
    line = torch.tensor([1.0, -1.0, 2.0])
    torch.testing.assert_close(mean.squeeze(3), centre.unsqueeze(2) * line, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(root @ root.mT, variance[..., None, None] * line.outer(line), rtol=1e-4, atol=1e-4)


def test_no_particle_without_weight_is_taken():
    weight = torch.zeros(1, 1, 4096)
    weight[..., 7:107] = 0.01
    for offset in (1e-7, 0.5, 0.9996, 1.0 - 2.0**-24):
        for draws in (64, 4096):
            index = systematic(weight, draws, torch.full((1, 1, 1), offset))
            assert index.min() >= 7 and index.max() < 107


def test_what_was_done_to_a_site_since_the_last_measurement_is_told():
    """Erased, it keeps its factor; calibrated, it has none; a site of which nothing is known has that of the prior."""
    sites = {"count": 2, "factor": 0.5, "remembers": True, "move_s": 1.0}
    experiment = domain_growth(sites=sites)
    design = torch.tensor([[20.0, 100.0], [10.0, 1.0], [5.0, 0.1]]).expand(1, 3, 2)
    referee = Referee(experiment, 1, particles=8192)
    value, one = torch.tensor([[400.0, 400.0, 400.0]]), torch.ones(1, 3)
    referee.update(History(one > 0, design, torch.tensor([[0, 0, 0]]), value, one, one > 0, one < 0))
    weak, site, yes = torch.tensor([[0.5, 1e-3]]), torch.tensor([0]), torch.tensor([True])
    erased = referee.forecast(weak, torch.ones(1), 512, site, fresh=yes)
    assert float(erased.value.mean()) < 60.0

    strong = torch.tensor([[20.0, 100.0]])
    seen = referee.forecast(strong, torch.ones(1), 512, site, fresh=yes).value[0, :2]
    free = referee.forecast(strong, torch.ones(1), 512, site, yes, calibrated=yes).value[0, :2]
    unknown = referee.forecast(strong, torch.ones(1), 512).value[0, :2]

    def spread(value: torch.Tensor) -> float:
        return float(value.log().std(1).mean())

    assert float(seen.log().std(1).max()) < 0.2, "three measurements there say what comes there"
    assert spread(free) > 1.5 * spread(seen), "the law alone is known less well than the law with its factor"
    assert spread(unknown) ** 2 == pytest.approx(spread(free) ** 2 + 0.25, rel=0.15), "the factor of the prior"


def test_another_history_starts_a_row_anew():
    experiment = domain_growth()
    history, _ = simulated(experiment, 3, 6, seed=8)
    other, _ = simulated(experiment, 3, 6, seed=9)
    referee = Referee(experiment, 3, particles=1024)
    referee.update(history)
    went_on = referee.log_evidence[0].clone()
    value, design = history.value.clone(), history.design.clone()
    value[1], design[1] = other.value[1], other.design[1]  # as long, and another
    done = history.done.clone()
    done[2, 2:] = False  # shorter
    mixed = History(done, design, history.site, value, *list(vars(history).values())[4:])
    referee.update(mixed)
    torch.testing.assert_close(referee.log_evidence[0], went_on, rtol=0.0, atol=0.0)
    alone = Referee(experiment, 3, particles=16384)
    alone.update(mixed)
    torch.testing.assert_close(referee.probability, alone.probability, atol=0.1, rtol=0.0)


def test_it_agrees_with_numpyro():
    """NUTS and bridge sampling of laws written down anew: benchmarks/hypotheses_reference.py made the numbers."""
    stored = json.loads((Path(__file__).parent / "referee_reference.json").read_text())
    experiment = domain_growth()
    names = list(experiment.law_set.laws)
    value = torch.tensor([case["value_nm"] for case in stored["cases"]])
    design = torch.tensor([stored["bias_v"], stored["time_s"]]).T.expand(len(value), -1, -1)
    referee = Referee(experiment, len(value))
    referee.update(history_of(design, value))
    exact = torch.tensor([[case[name]["log_evidence"] for name in names] for case in stored["cases"]]).double()
    close_where_it_counts(referee, exact)
    weight = referee._cloud.weight.unsqueeze(2)
    mean = (weight * referee._cloud.z).sum(3)  # (B, L, 3)
    for row, case in enumerate(stored["cases"]):
        for i, name in enumerate(names):
            if float(torch.softmax(exact[row], 0)[i]) > 0.01:
                away = (mean[row, i] - torch.tensor(case[name]["mean"])) / torch.tensor(case[name]["sd"])
                assert float(away.abs().max()) < 0.15, (name, away)
