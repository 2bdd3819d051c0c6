"""Laws by name: what ships is sound over its whole prior; what is not is refused with what was wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import yaml

from stem_gym.core.errors import ConfigError, UnknownNameError
from stem_gym.core.hypotheses import LawSpec, Normal, as_law_set, law_set_files, read_law_set
from stem_gym.simulator import laws

LINE = {
    "base": {"kind": "lognormal", "median": 1.0, "sigma": 0.1},
    "slope": {"kind": "uniform", "low": 0.0, "high": 1.0},
}
LAW_NAMES = [(set_name, name) for set_name in law_set_files() for name in read_law_set(set_name).laws]


def line(axes, *, base, slope):
    return base + slope * axes["bias_v"]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(laws, "_registered", {"line": line})


def small_set(**second):
    spec = {"law": "line", "priors": LINE}
    return as_law_set(
        {
            "name": "small",
            "summary": "two lines",
            "quantity": "radius_nm",
            "full_scale": 10.0,
            "axes": [{"name": "bias_v", "does": "Pulse.bias_v", "low": 1.0, "high": 5.0, "levels": 5}],
            "laws": {"first": spec, "second": {**spec, **second}},
        }
    )


@pytest.mark.parametrize("name", law_set_files())
def test_a_set_that_ships_is_sound_over_its_prior(name):
    bound = laws.bind_set(read_law_set(name))
    assert list(bound) == list(read_law_set(name).laws)


@pytest.mark.parametrize(("set_name", "name"), LAW_NAMES)
def test_slopes_are_those_of_finite_differences(set_name, name):
    law_set = read_law_set(set_name)
    law = laws.bind_set(law_set)[name]
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(64, len(law.parameters), generator=generator, dtype=torch.float64)
    part = 2.0 * torch.rand(64, len(law_set.axes), generator=generator, dtype=torch.float64) - 1.0
    design = torch.stack([axis.value(part[:, i]) for i, axis in enumerate(law_set.axes)], dim=1).double()
    leaf = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(law.mean(leaf, design).sum(), leaf)
    assert bool((slope != 0.0).any(0).all()), "every parameter matters somewhere"
    for i in range(len(law.parameters)):
        step = torch.zeros_like(z)
        step[:, i] = 1e-6
        expected = (law.mean(z + step, design) - law.mean(z - step, design)) / 2e-6
        torch.testing.assert_close(slope[:, i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("set_name", "name"), LAW_NAMES)
def test_single_precision_is_good_enough(set_name, name):
    law_set = read_law_set(set_name)
    law = laws.bind_set(law_set)[name]
    z = torch.randn(256, 1, len(law.parameters), generator=torch.Generator().manual_seed(5))
    design = torch.cartesian_prod(*(axis.grid() for axis in law_set.axes))
    single, double = law.mean(z, design), law.mean(z.double(), design.double())
    assert single.dtype == torch.float32 and single.shape == (256, len(design))
    away = (single - double).abs() > 1e-3 * (1.0 + double.abs())
    assert float(away.float().mean()) < 1e-3  # a threshold that falls on an experiment may round to either side


def test_parameters_are_the_keyword_arguments_in_order():
    assert laws.parameters_of(line) == ("base", "slope")
    with pytest.raises(ConfigError, match=r"after a \*.*\(axes, base\)"):
        laws.parameters_of(lambda axes, base: base)


def test_values_come_from_the_priors():
    law = laws.bind("first", small_set().laws["first"], small_set().axes)
    values = law.values(torch.zeros(3, 2))
    assert values["base"].tolist() == [1.0] * 3 and values["slope"].tolist() == [0.5] * 3
    assert law.mean(torch.zeros(2), torch.tensor([[4.0]])).tolist() == [3.0]


def test_an_unknown_law_is_named_with_its_nearest(tmp_path):
    with pytest.raises(UnknownNameError, match="thermodynamic_3.*Did you mean 'thermodynamic_"):
        laws.law("thermodynamic_3")
    data = yaml.safe_load(law_set_files()["domain_growth"].read_text())
    data["laws"]["wall_pinning"]["law"] = "wall_pining"
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(UnknownNameError, match="Did you mean 'wall_pinning'"):
        laws.bind_set(read_law_set(str(path)))


def test_an_unknown_law_of_a_set_says_whose_it_is_and_how_one_becomes_known():
    with pytest.raises(UnknownNameError, match="second: Unknown law 'lyne'.*'line'.*laws.register"):
        laws.bind_set(small_set(law="lyne"))


def test_an_axis_that_the_law_asks_for_and_the_set_lacks_is_named():
    def needs_time(axes, *, base, slope):
        return base + slope * axes["time_s"]

    laws.register("needs_time", needs_time)
    with pytest.raises(ConfigError, match="second: the law 'needs_time' asks for the axis 'time_s'; the axes.*bias_v"):
        laws.bind_set(small_set(law="needs_time"))


def test_a_file_that_lists_laws_is_found_by_being_there(tmp_path, monkeypatch):
    (tmp_path / "creep.py").write_text("def creep(axes, *, a): return a\n\nLAWS = {'creep_of_mine': creep}\n")
    (tmp_path / "other.py").write_text("raise RuntimeError('a file without laws is not imported')\n")
    monkeypatch.setattr(laws, "__file__", str(tmp_path / "laws.py"))
    creep = SimpleNamespace(LAWS={"creep_of_mine": line})
    monkeypatch.setattr(laws.importlib, "import_module", {"stem_gym.simulator.creep": creep}.__getitem__)
    monkeypatch.setattr(laws, "entry_points", lambda group: [])
    assert laws._shipped.__wrapped__() == {"creep_of_mine": line}


def test_a_law_can_be_registered_but_not_replaced():
    laws.register("own", line)
    laws.register("own", line)
    assert laws.law("own") is line
    with pytest.raises(ConfigError, match="already"):
        laws.register("wall_pinning", line)


def test_other_distributions_bring_laws_by_entry_point(monkeypatch, tmp_path):
    (tmp_path / "their_laws.py").write_text("LAWS = {'theirs': lambda axes, *, a: a * axes['bias_v']}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(laws, "entry_points", lambda group: [SimpleNamespace(value="their_laws")])
    laws._shipped.cache_clear()
    try:
        assert laws.parameters_of(laws.law("theirs")) == ("a",)
        assert laws.law("knock_on")
    finally:
        laws._shipped.cache_clear()


@pytest.mark.parametrize("priors", [{"base": LINE["base"]}, {**LINE, "offset": LINE["base"]}])
def test_priors_must_be_those_of_the_parameters(priors):
    with pytest.raises(ConfigError, match="second: the law 'line' has the parameters base, slope.*(slope|offset)"):
        laws.bind_set(small_set(priors=priors))


def test_a_negative_size_is_refused_with_where_it_arose():
    priors = {**LINE, "slope": {"kind": "normal", "mean": 0.0, "sd": 1.0}}
    with pytest.raises(ConfigError, match="second: radius_nm must be finite and not negative.*slope.*bias_v"):
        laws.bind_set(small_set(priors=priors))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(bad):
    laws.register("broken", lambda axes, *, base, slope: torch.where(axes["bias_v"] > 4.5, bad, base + slope))
    with pytest.raises(ConfigError, match="second: radius_nm must be finite.*(nan|inf)"):
        laws.bind_set(small_set(law="broken"))


def test_a_logarithm_may_be_negative_but_not_infinite():
    law_set = small_set().model_copy(update={"logarithmic": True})
    negative = LawSpec(law="line", priors={"base": Normal(mean=-5.0, sd=1.0), "slope": Normal(mean=0.0, sd=1.0)})
    laws.check_law(laws.bind("lower", negative, law_set.axes), law_set)
    laws.register("falling", lambda axes, *, base, slope: (base * slope * 0.0 * axes["bias_v"]).log())
    falling = LawSpec(law="falling", priors=negative.priors)
    with pytest.raises(ConfigError, match="lower: radius_nm must be finite over"):
        laws.check_law(laws.bind("lower", falling, law_set.axes), law_set)


@pytest.mark.parametrize(("join", "said"), [
    (lambda bias, time: torch.stack((bias, time)).sum(0), "must broadcast.*'joined' fails where each axis has"),
    (lambda bias, time: bias + time + (bias.dim() > 1), "must say the same of each experiment"),
])  # fmt: skip
def test_a_law_that_wants_axes_of_one_shape_is_refused(join, said):
    laws.register("joined", lambda axes, *, base: base + join(axes["bias_v"], axes["time_s"]))
    law_set = read_law_set("domain_growth")
    spec = LawSpec(law="joined", priors={"base": Normal(mean=20.0, sd=1.0)})
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        laws.check_law(laws.bind("third", spec, law_set.axes), law_set)


@pytest.mark.parametrize(("name", "apart"), [("thermodynamic_1", 20), ("wall_pinning", 120)])
def test_a_law_knows_which_experiments_are_the_same_to_it(name, apart):
    """Equilibrium sizes do not depend on the time: of 20 biases and 6 times, the first time stands for all."""
    growth = read_law_set("domain_growth")
    bound, grids = laws.bind_set(growth)[name], [axis.grid() for axis in growth.axes]
    same = bound.same_over_grid(grids)
    assert same.tolist() == [i - i % (120 // apart) for i in range(120)]
    value = bound.over_grid(torch.randn(2, 50, len(bound.parameters)), grids)
    assert value.shape == (2, 120, 50)
    torch.testing.assert_close(value[:, same], value)
    changes = value[0, same.unique()].diff(dim=0).abs().amax(1)
    assert (changes[1:] > 0.0).all(), "beyond half a volt, where no domain appears"


def test_a_law_that_does_not_broadcast_is_refused():
    laws.register("shapeless", lambda axes, *, base, slope: (base + slope).squeeze())
    with pytest.raises(ConfigError, match="must broadcast"):
        laws.bind_set(small_set(law="shapeless"))
