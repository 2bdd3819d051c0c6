"""Acquisition functions against closed forms and Monte Carlo, and the choice among cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from scipy import integrate, stats

from agents.engine.acquisition import (
    AboveLevel,
    Acquisition,
    Belief,
    ExpectedImprovement,
    LevelSet,
    MaximumVariance,
    RandomChoice,
    Thompson,
    UpperConfidenceBound,
    choose,
    suited_to,
)


def belief(mean, deviation, best=1.0, lowest=-1.0):
    mean, deviation = (torch.as_tensor(x, dtype=torch.float64).reshape(1, -1) for x in (mean, deviation))
    return Belief(mean, deviation, torch.zeros(1), torch.tensor([best]), torch.tensor([lowest]))


def test_expected_improvement_is_that_of_many_draws():
    """200,000 draws: the mean improvement is known to about 0.3 %."""
    rng = np.random.default_rng(0)
    for mean, deviation, margin in ((0.5, 1.0, 0.0), (1.5, 0.3, 0.0), (0.0, 2.0, 0.25)):
        draws = rng.normal(mean, deviation, 200_000)
        expected = np.clip(draws - (1.0 + margin * 2.0), 0.0, None).mean()
        found = ExpectedImprovement(margin=margin).score(belief([mean], [deviation])).exp().item()
        assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("u", [3.0, 0.0, -0.999, -1.001, -4.0, -20.0, -37.0])
def test_the_logarithm_of_improvement_holds_far_out(u):
    """Against the integral of (z − (−u)) φ(z) beyond −u, with the density's exponent taken out."""
    peak = -0.5 * u * u if u < 0 else 0.0
    area, _ = integrate.quad(
        lambda z: z * np.exp(stats.norm.logpdf(z - u) - peak), 0.0, max(u, 0.0) + 12.0, epsabs=0.0, epsrel=1e-10
    )
    found = ExpectedImprovement().score(belief([1.0 + 0.5 * u], [0.5])).item()
    assert found == pytest.approx(np.log(0.5 * area) + peak, rel=1e-7)


def test_improvement_still_ranks_where_it_is_below_the_smallest_number():
    score = ExpectedImprovement().score(belief([-1e2, -1e3, -1e4, -1e7, -1e8], [1.0] * 5))[0]
    assert torch.isfinite(score).all() and (score.diff() < 0).all()
    assert score[2].item() == pytest.approx(-0.5 * 10001.0**2 - np.log(10001.0**2 * np.sqrt(2 * np.pi)), rel=1e-12)


def test_bound_variance_and_straddle_are_their_formulas():
    b = belief([0.0, 2.0, 0.5], [1.0, 0.1, 0.5], best=2.0, lowest=-2.0)
    np.testing.assert_allclose(UpperConfidenceBound(deviations=3.0).score(b), [[3.0, 2.3, 2.0]])
    np.testing.assert_allclose(MaximumVariance().score(b), b.deviation)
    np.testing.assert_allclose(LevelSet(level_share=0.75).score(b), [[0.96, -0.804, 0.48]])


def test_the_probability_of_being_above_is_the_normal_one():
    b = belief([0.0, 2.0, -30.0], [1.0, 0.5, 1.0], best=3.0, lowest=-1.0)
    np.testing.assert_allclose(
        AboveLevel(level_share=0.5).score(b), stats.norm.logsf(1.0, [[0.0, 2.0, -30.0]], [[1.0, 0.5, 1.0]]), rtol=1e-6
    )


def test_thompson_draws_have_the_belief_s_mean_and_deviation():
    normal = torch.from_numpy(np.random.default_rng(1).standard_normal((20_000, 2)))
    many = Belief(*(torch.tensor([x]).expand(20_000, 2) for x in ([1.0, -2.0], [0.5, 2.0])), *[torch.zeros(20_000)] * 3)
    drawn = Thompson().score(many, normal)
    np.testing.assert_allclose(drawn.mean(0), [1.0, -2.0], atol=0.05)  # 2/√20000 = 0.014
    np.testing.assert_allclose(drawn.std(0), [0.5, 2.0], rtol=0.03)
    with pytest.raises(ValueError, match="standard normal"):
        Thompson().score(many)


def test_random_choice_minds_nothing_that_is_believed():
    normal = torch.tensor([[0.3, 2.0, -1.0]])
    assert RandomChoice().score(belief([9.0, 0.0, 0.0], [1.0] * 3), normal) is normal


@pytest.mark.parametrize("kind", ["expected_improvement", "thompson", "level_set", "random_choice"])
def test_settings_name_an_acquisition_by_its_kind(kind):
    assert TypeAdapter(Acquisition).validate_python({"kind": kind}).kind == kind


def test_each_mode_has_its_own():
    assert suited_to("optimise", 0.5) == ExpectedImprovement()
    assert suited_to("discover", 0.7) == AboveLevel(level_share=0.7)
    assert suited_to("learn", 0.5) == MaximumVariance()


def test_the_choice_minds_masks_in_their_order():
    score = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).repeat(6, 1)
    free = torch.tensor([[True] * 4, [False, True, True, True], [True] * 4, [True] * 4, [False] * 4, [False] * 4])
    forbidden, pinned = torch.zeros_like(free), torch.zeros_like(free)
    forbidden[2, :2] = True
    pinned[3, 2:] = True
    forbidden[4, 0] = True
    pinned[5, 3] = True  # measured already: no longer asked for
    assert choose(score, free, forbidden, pinned).tolist() == [0, 1, 2, 2, 1, 0]


def test_a_score_that_is_no_number_is_never_chosen_before_one():
    score = torch.tensor([[torch.nan, -5.0, -torch.inf]])
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert choose(score, ~nothing, nothing, nothing).tolist() == [1]
