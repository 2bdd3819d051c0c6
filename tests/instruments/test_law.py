"""The instrument that obeys a law: noise, memory, routines, truth, and laws that a program brings itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stem_gym.core.config import parse
from stem_gym.core.errors import CapabilityError, ConfigError, InstructionError
from stem_gym.core.instructions import Acquire, Park, Pulse, Read, Set, Wait
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.instruments.law import Config, LawInstrument
from stem_gym.simulator.laws import law, register

EXPERIMENT: dict[str, Any] = {
    "laws": "domain_growth",
    "noise": {"absolute": 8.0, "relative": 0.08, "growth_s": 900.0},
    "measure_s": 16.0,
    "enabling": {"tune": {"does": "tune", "seconds": 300.0}},
}
SITES = {"count": 3, "factor": 0.5, "remembers": True, "move_s": 180.0}
ROUTINES = {
    "tune": {"does": "tune", "seconds": 300.0},
    "erase": {"does": "erase", "seconds": 60.0},
    "gauge": {"does": "calibrate", "seconds": 30.0},
}


def instrument(rows: int, seed: int = 0, outside: Any = None, **changes: Any) -> LawInstrument:
    config = parse(Config, {"experiment": {**EXPERIMENT, **changes}, "outside": outside}, "test")
    made = LawInstrument(config, rows)
    streams = Streams(row_seeds(seed, rows))
    streams.next_episode(torch.arange(rows))
    made.reset(streams, torch.arange(rows))
    return made


def whole(rows: int, value: float) -> torch.Tensor:
    return torch.full((rows,), value)


def pulsed(made: LawInstrument, bias_v: float, time_s: float, x: float = 0.5) -> torch.Tensor:
    """What is measured in every row after a pulse at a place."""
    rows = torch.arange(made.rows)
    made.execute(Park(rows, whole(made.rows, x), whole(made.rows, 0.5)))
    made.execute(Pulse(rows, whole(made.rows, bias_v), whole(made.rows, time_s)))
    return measured(made)


def measured(made: LawInstrument) -> torch.Tensor:
    reading = made.execute(Acquire(torch.arange(made.rows), "radius_nm", whole(made.rows, 16.0)))
    return reading.data["radius_nm"]


def test_noise_is_as_large_as_the_description_says():
    made = instrument(4000, noise={"absolute": 8.0, "relative": 0.08}, enabling={})
    first = pulsed(made, 10.0, 1.0)
    again = torch.stack([measured(made) for _ in range(20)])
    true = made._now.value[:, 0].float()
    assert bool((true > 0.0).all())
    z = (torch.cat((first.unsqueeze(0), again)) - true) / (8.0**2 + (0.08 * true) ** 2).sqrt()
    assert float(z.mean()) == pytest.approx(0.0, abs=5.0 / z.numel() ** 0.5)
    assert float(z.var()) == pytest.approx(1.0, abs=5.0 * (2.0 / z.numel()) ** 0.5)


def test_noise_grows_by_the_clock_and_is_back_after_tuning():
    made, rows = instrument(2), torch.arange(2)
    made.execute(Wait(rows, whole(2, 900.0)))
    assert made.execute(Read(rows, "noise_factor")).data["value"].tolist() == pytest.approx([2.71828] * 2, rel=1e-4)
    reading = made.execute(Acquire(rows, "radius_nm", whole(2, 16.0)))
    assert reading.calibration["noise_factor"].tolist() == pytest.approx([2.71828] * 2, rel=1e-4)
    assert made.execute(Set(rows[:1], "tune", whole(1, 1.0))).seconds.tolist() == [300.0]
    factors = made.execute(Read(rows, "noise_factor")).data["value"]
    assert factors[0] == 1.0 and float(factors[1]) == pytest.approx(2.71828 * 1.0179, rel=1e-3)


def test_an_episode_may_begin_out_of_tune():
    made = instrument(2000, noise={"absolute": 8.0, "growth_s": 900.0, "untuned_s": [900.0, 2700.0]})
    factor = made.execute(Read(torch.arange(2000), "noise_factor")).data["value"].log()
    assert 1.0 <= float(factor.min()) < 1.02 and 2.98 < float(factor.max()) <= 3.0
    assert float(factor.mean()) == pytest.approx(2.0, abs=0.06)


def test_a_domain_at_a_site_that_remembers_only_grows():
    made = instrument(64, sites=SITES, enabling=ROUTINES)
    pulsed(made, 20.0, 100.0, x=0.1)
    large = made._now.value[:, 0].clone()
    pulsed(made, 2.0, 0.001, x=0.1)
    assert torch.equal(made._now.value[:, 0], large), "a weaker pulse leaves what is there"
    pulsed(made, 2.0, 0.001, x=0.9)
    assert bool((made._now.value[:, 2] < large).all()), "another site knows nothing of it"
    made.execute(Park(torch.arange(64), whole(64, 0.1), whole(64, 0.5)))
    made.execute(Set(torch.arange(64), "erase", whole(64, 1.0)))
    pulsed(made, 2.0, 0.001, x=0.1)
    torch.testing.assert_close(made._now.value[:, 0], made._now.value[:, 2])


def test_a_site_has_its_factor_until_it_is_calibrated():
    quiet = {"absolute": 0.01, "relative": 0.01}
    made = instrument(3000, sites={**SITES, "remembers": False}, enabling={"gauge": ROUTINES["gauge"]}, noise=quiet)
    values = pulsed(made, 20.0, 100.0)
    bare = made._now.value[:, 1].float()
    factor = (values / bare).log()
    assert float(factor.std()) == pytest.approx(0.5, abs=0.04)
    made.execute(Set(torch.arange(3000), "gauge", whole(3000, 1.0)))
    assert float((measured(made) / bare).log().std()) == pytest.approx(0.01, abs=0.003)


def test_moving_costs_time_only_to_another_site():
    made, rows = instrument(2, sites=SITES, enabling=ROUTINES), torch.arange(2)
    there = made.execute(Park(rows, torch.tensor([0.1, 0.9]), whole(2, 0.5)))
    assert there.seconds.tolist() == [0.0, 180.0]


def test_a_control_settles_only_when_it_changes():
    damage = {
        "laws": "damage",
        "noise": {"absolute": 1.0},
        "enabling": {},
        "settle_s": {"energy_kev": 2700.0},
    }
    made, rows = instrument(2, **damage), torch.arange(2)
    assert made.execute(Set(rows, "energy_kev", torch.tensor([60.0, 80.0]))).seconds.tolist() == [0.0, 2700.0]
    assert made.execute(Set(rows, "energy_kev", torch.tensor([60.0, 80.0]))).seconds.tolist() == [0.0, 0.0]
    reading = made.execute(Acquire(rows, "ln_rate_per_s", whole(2, 60.0)))
    assert bool(torch.isfinite(reading.data["ln_rate_per_s"]).all()) and bool((reading.electrons > 0).all())


def test_laws_are_drawn_evenly_and_parameters_from_their_priors():
    made = instrument(8000)
    share = torch.bincount(made.truth()["law"], minlength=4) / 8000
    assert bool(((share - 0.25).abs() < 5.0 * (0.25 * 0.75 / 8000) ** 0.5).all())
    r_cr_nm, r0_nm, vc_v = made._now.parameters[:, :3].unbind(1)
    for values, mean, sd in ((r_cr_nm.log(), 2.9957, 0.4), (r0_nm.log(), 4.6052, 0.5), (vc_v, 1.3, 1.4 / 12**0.5)):
        assert float(values.mean()) == pytest.approx(mean, abs=5.0 * sd / 8000**0.5)
        assert float(values.std()) == pytest.approx(sd, rel=0.05)


def constant_law(axes: Any, *, size_nm: torch.Tensor) -> torch.Tensor:
    """A truth that nobody expects."""
    return size_nm + 0.0 * axes["bias_v"]


def test_truths_outside_the_set_are_a_programs_own():
    register("constant_of_a_test", constant_law)
    assert law("constant_of_a_test") is constant_law
    spec = {"law": "constant_of_a_test", "priors": {"size_nm": {"kind": "uniform", "low": 900.0, "high": 901.0}}}
    made = instrument(4000, outside={"share": 0.3, "laws": {"constant": spec}})
    values, truth = pulsed(made, 1.0, 0.001), made.truth()
    outside = truth["answer"] == 4
    assert float(outside.float().mean()) == pytest.approx(0.3, abs=0.04)
    assert float(values[outside].mean()) == pytest.approx(900.5, abs=15.0) and float(values[~outside].max()) < 700.0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"laws": "domain_grwth"}, "Did you mean 'domain_growth'"),
        ({"outside": {"share": 0.5, "laws": {"wall_pinning": {"law": "creep", "priors": {}}}}}, "is a name of the set"),
        ({"outside": {"share": 0.5, "laws": {"slow": {"law": "crep", "priors": {}}}}}, "Did you mean 'creep'"),
        ({"outside": {"share": 0.5, "laws": {"slow": {"law": "creep", "priors": {}}}}}, "needs a prior"),
    ],
)
def test_laws_that_do_not_exist_are_refused(changes, told):
    with pytest.raises((ConfigError, KeyError), match=told):
        instrument(1, **changes)


def test_what_it_can_not_do_is_refused_and_nothing_changes():
    made, rows = instrument(2), torch.arange(2)
    before = made.snapshot()
    with pytest.raises(InstructionError, match="bias_v must be finite and within"):
        made.execute(Pulse(rows, whole(2, 30.0), whole(2, 1.0)))
    with pytest.raises(InstructionError, match="time_s must be one of"):
        made.execute(Pulse(rows, whole(2, 3.0), whole(2, 0.3)))
    with pytest.raises(CapabilityError, match="'voltage' is not allow-listed"):
        made.execute(Set(rows, "voltage", whole(2, 1.0)))
    with pytest.raises(InstructionError, match="no reset options"):
        made.reset(Streams([0, 1]), rows, {"law": 1})
    for name, value in vars(before).items():
        assert torch.equal(value, getattr(made.snapshot(), name)), name
