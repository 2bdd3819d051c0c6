"""Laws of domain growth: sizes by hand, what happens at thresholds and at the ends, and finite slopes everywhere."""

from __future__ import annotations

import math

import pytest
import torch

from stem_gym.simulator.laws import parameters_of
from stem_gym.simulator.switching import LAWS

TYPICAL = {
    "r_cr_nm": 20.0, "r0_nm": 50.0, "vc_v": 1.5, "a_nm": 4.0, "alpha": 1.2, "tau0_s": 1e-4, "beta": 0.1, "v0_v": 3.0,
    "mu": 0.7, "r_max_nm": 300.0,
}  # fmt: skip
BY_HAND = {
    "thermodynamic_1": lambda v, t: 20.0 + 50.0 * math.sqrt((v / 1.5) ** (2 / 3) - 1.0),
    "thermodynamic_2": lambda v, t: 20.0 + 50.0 * ((v / 1.5) ** 2 - 1.0) ** (1 / 3),
    "wall_pinning": lambda v, t: 4.0 * v**1.2 * math.log(1.0 + t / 1e-4),
    "charge_injection": lambda v, t: 4.0 * v**1.2 * t**0.1,
    "creep": lambda v, t: 50.0 * math.exp(-((3.0 / v) ** 0.7)) * (1.0 + t) ** 0.1,
    "hybrid": lambda v, t: (20.0 + 50.0 * ((v / 1.5) ** 2 - 1.0) ** (1 / 3)) * t**0.1,
    "saturating": lambda v, t: 300.0 * (1.0 - math.exp(-((v / 3.0) ** 2))) * t / (t + 1e-4),
}
WITH_THRESHOLD = ("thermodynamic_1", "thermodynamic_2", "hybrid")


def size(name, bias_v, time_s, **changed):
    """The size in nm and its slopes along the parameters and the axes."""
    number = {
        one: torch.tensor(changed.get(one, TYPICAL[one]), requires_grad=True) for one in parameters_of(LAWS[name])
    }
    axes = {"bias_v": torch.tensor(bias_v, requires_grad=True), "time_s": torch.tensor(time_s, requires_grad=True)}
    found = LAWS[name](axes, **number)
    slopes = torch.autograd.grad(found, [*number.values(), *axes.values()], allow_unused=True)
    return float(found.detach()), [float(slope) for slope in slopes if slope is not None]


def test_every_law_has_a_case():
    assert LAWS.keys() == BY_HAND.keys()


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(("bias_v", "time_s"), [(2.0, 1e-3), (5.0, 1.0), (20.0, 100.0)])
def test_a_size_by_hand(name, bias_v, time_s):
    assert size(name, bias_v, time_s)[0] == pytest.approx(BY_HAND[name](bias_v, time_s), rel=1e-5)


@pytest.mark.parametrize("name", WITH_THRESHOLD)
def test_below_the_critical_bias_there_is_no_domain(name):
    assert size(name, 1.49, 1.0)[0] == 0.0
    assert size(name, 1.51, 1.0)[0] > 20.0


@pytest.mark.parametrize("name", ["wall_pinning", "charge_injection", "hybrid", "saturating"])
def test_a_pulse_of_no_time_leaves_no_domain(name):
    assert size(name, 5.0, 0.0)[0] == 0.0
    assert size(name, 5.0, 1e-9)[0] < size(name, 5.0, 1e-3)[0]


@pytest.mark.parametrize("name", ["wall_pinning", "charge_injection", "creep", "saturating"])
def test_no_bias_leaves_no_domain(name):
    assert size(name, 0.0, 1.0)[0] == pytest.approx(0.0, abs=1e-20)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("bias_v", [0.0, 0.5, 1.5, 20.0, 1e6])
@pytest.mark.parametrize("time_s", [0.0, 1e-38, 1e-3, 1e6])
@pytest.mark.parametrize("steep", [{}, {"alpha": 100.0, "mu": 60.0, "beta": 5.0}, {"alpha": -100.0, "beta": -5.0}])
def test_sizes_and_slopes_are_finite_at_every_end(name, bias_v, time_s, steep):
    found, slopes = size(name, bias_v, time_s, **steep)
    assert math.isfinite(found) and found >= 0.0
    assert all(math.isfinite(slope) for slope in slopes)


def test_a_power_that_overflows_stops_growing():
    assert size("charge_injection", 20.0, 1.0, alpha=90.0)[0] == pytest.approx(4.0 * math.exp(60.0), rel=1e-4)


@pytest.mark.parametrize("name", LAWS)
def test_rows_broadcast_and_do_not_know_of_their_neighbours(name):
    names = parameters_of(LAWS[name])
    number = {one: TYPICAL[one] * torch.linspace(0.8, 1.2, 7).unsqueeze(1) for one in names}
    axes = {"bias_v": torch.tensor([1.0, 4.0, 9.0]), "time_s": torch.tensor([0.01, 1.0, 30.0])}
    whole = LAWS[name](axes, **number)
    assert whole.shape == (7, 3)
    alone = LAWS[name]({one: value[1:2] for one, value in axes.items()}, **{one: number[one][4] for one in names})
    torch.testing.assert_close(whole[4, 1:2], alone, rtol=1e-6, atol=0.0)
