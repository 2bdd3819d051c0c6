"""Priors have the moments that they say; axes and sets that make no sense are refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import yaml

from stem_gym.core.errors import ConfigError, UnknownNameError
from stem_gym.core.hypotheses import (
    NONE,
    Axis,
    LogNormal,
    LogUniform,
    Normal,
    Uniform,
    as_law_set,
    law_set_files,
    read_law_set,
)

PRIORS = [
    Normal(mean=-1.5, sd=0.3),
    LogNormal(median=20.0, sigma=0.4),
    Uniform(low=-0.5, high=2.0),
    LogUniform(low=1e-5, high=3e-4),
]
SET = {
    "name": "mine",
    "summary": "two of four",
    "quantity": "radius_nm",
    "full_scale": 100.0,
    "axes": [{"name": "bias_v", "does": "Pulse.bias_v", "low": 0.5, "high": 20.0, "log": True, "levels": 4}],
    "laws": {
        "one": {"law": "a", "priors": {"x": {"kind": "normal", "mean": 0.0, "sd": 1.0}}},
        "two": {"law": "b", "priors": {"x": {"kind": "uniform", "low": 0.0, "high": 1.0}}},
    },
}


def even_normal(count: int) -> torch.Tensor:
    """Standard normal numbers that are spread evenly: the mid-points of as many equal shares."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: prior.kind)
def test_samples_have_the_stated_moments(prior):
    value = prior.value(even_normal(200_000))
    mean, sd = prior.moments()
    assert float(value.mean()) == pytest.approx(mean, rel=1e-3)
    assert float(value.std()) == pytest.approx(sd, rel=2e-3)


def test_moments_and_ends_by_hand():
    assert LogNormal(median=2.0, sigma=1.0).moments()[0] == pytest.approx(2.0 * math.exp(0.5))
    assert Uniform(low=0.0, high=6.0).moments() == (3.0, pytest.approx(math.sqrt(3.0)))
    assert LogUniform(low=1.0, high=math.e).moments()[0] == pytest.approx(math.e - 1.0)
    z = torch.tensor([-9.0, 0.0, 9.0], dtype=torch.float64)
    torch.testing.assert_close(Uniform(low=1.0, high=2.0).value(z), torch.tensor([1.0, 1.5, 2.0]).double())
    torch.testing.assert_close(LogUniform(low=1.0, high=100.0).value(z), torch.tensor([1.0, 10.0, 100.0]).double())


@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: prior.kind)
def test_a_prior_rises_and_has_a_slope(prior):
    z = torch.linspace(-4.0, 4.0, 81, dtype=torch.float64, requires_grad=True)
    value = prior.value(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    assert bool((value.diff() > 0.0).all()) and bool((slope > 0.0).all())


@pytest.mark.parametrize(
    ("axis", "grid"),
    [
        (Axis(name="a", does="Set", low=0.0, high=4.0, levels=3), [0.0, 2.0, 4.0]),
        (Axis(name="a", does="Set", low=1.0, high=100.0, log=True, levels=3), [1.0, 10.0, 100.0]),
        (Axis(name="a", does="Set", values=(60.0, 80.0, 300.0)), [60.0, 80.0, 300.0]),
    ],
)
def test_the_grid_of_an_axis_and_back(axis, grid):
    torch.testing.assert_close(axis.grid(), torch.tensor(grid))
    torch.testing.assert_close(axis.value(axis.coordinate(axis.grid())), axis.grid())


def test_some_values_have_equal_shares_of_the_coordinates():
    axis = Axis(name="a", does="Set", values=(60.0, 80.0, 300.0))
    coordinate = torch.tensor([-1.0, -0.34, -0.32, 0.32, 0.34, 1.0])
    assert axis.value(coordinate).tolist() == [60.0, 60.0, 80.0, 80.0, 300.0, 300.0]
    assert axis.value(torch.tensor([-7.0, 7.0])).tolist() == [60.0, 300.0]


@pytest.mark.parametrize(
    ("axis", "given", "words"),
    [
        (Axis(name="bias_v", does="Set", low=1.0, high=2.0), 2.1, r"bias_v must be within \[1, 2\]; given 2.1"),
        (Axis(name="bias_v", does="Set", low=1.0, high=2.0), math.nan, "bias_v must be within"),
        (Axis(name="energy_kev", does="Set", values=(60.0, 80.0)), 70.0, r"one of \[60.0, 80.0\]; given \[70.0\]"),
    ],
)
def test_a_value_that_can_not_be_chosen_is_refused(axis, given, words):
    with pytest.raises(ConfigError, match=words):
        axis.coordinate(torch.tensor([given]))


def test_what_ships_can_be_read_and_answers_end_with_none():
    assert {"domain_growth", "damage", "coarsening"} <= law_set_files().keys()
    for name in law_set_files():
        laws = read_law_set(name)
        assert laws.name == name and laws.answers == (*laws.laws, NONE)


def test_a_set_from_a_file_is_the_same_as_one_from_python(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SET))
    assert read_law_set(str(path)) == as_law_set(SET)


def test_an_unknown_set_is_named_with_its_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'domain_growth'"):
        read_law_set("domain_grow")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("laws", {"one": SET["laws"]["one"]}, r"nothing to discriminate in 1 law\(s\); give at least two"),
        ("laws", {}, "at least two"),
        ("laws", {**SET["laws"], "none": SET["laws"]["one"]}, "no law may be called 'none'"),
        ("laws.two.priors.x.low", 1.0, "mine, two, x: low must be below high; given 1 and 1"),
        ("laws.two.priors.x.low", math.nan, "finite"),
        ("laws.one.priors.x.sd", math.nan, "finite"),
        ("laws.one.priors.x.sd", 0.0, "greater than 0"),
        ("laws.one.priors.x.kind", "gaussian", "normal"),
        ("laws.one.priors.x", {"kind": "lognormal", "median": -3.0, "sigma": 0.2}, "greater than 0"),
        ("laws.one.priors.x", {"kind": "loguniform", "low": 0.0, "high": 1.0}, "greater than 0"),
        ("laws.one.low", 3.0, "low"),
        ("axes", [], "at least 1"),
        ("axes.0.high", 0.5, "bias_v: low must be below high; given 0.5 and 0.5"),
        ("axes.0.low", 0.0, "a logarithmic range must be positive; given 0 to 20"),
        ("axes.0.values", (1.0, 2.0), "either values, or low and high"),
        ("axes.0.levels", 0, "greater than or equal to 1"),
        ("axes.0.does", "Dwell.time_s", "Pulse.bias_v"),
        ("full_scale", 0.0, "greater than 0"),
        ("axes", [*SET["axes"], SET["axes"][0] | {"does": "Set"}], "two axes have the name bias_v"),
        ("axes", [*SET["axes"], SET["axes"][0] | {"name": "again_v"}], "two axes have the does Pulse.bias_v"),
    ],
)
def test_what_makes_no_set_is_refused(place, value, words, tmp_path):
    data = copy.deepcopy(SET)
    *path, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    target = data
    for key in path:
        target = target[key]
    target[last] = value
    with pytest.raises(ConfigError, match=words):
        as_law_set(data)
