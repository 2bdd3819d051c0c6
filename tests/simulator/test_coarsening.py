"""Coarsening against the differential equations that the laws solve."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import solve_ivp

from stem_gym.simulator.coarsening import LAWS
from stem_gym.simulator.laws import parameters_of

BOLTZMANN_EV_K = 8.617333262e-5
R0_NM, GROWTH, ACTIVATION_EV, PART = 2.0, 1.8, 1.1, 0.6
NUMBERS = {"r0_nm": R0_NM, "growth": GROWTH, "activation_ev": ACTIVATION_EV, "part": PART}


def arrhenius(temperature_k: float) -> float:
    return math.exp(-ACTIVATION_EV / BOLTZMANN_EV_K * (1.0 / temperature_k - 1.0 / 600.0))


def size(name: str, temperature_k: float, time_s: float, **changed: float) -> float:
    number = {
        one: torch.tensor(changed.get(one, NUMBERS[one]), dtype=torch.float64) for one in parameters_of(LAWS[name])
    }
    axes = {"temperature_k": torch.tensor(temperature_k).double(), "time_s": torch.tensor(time_s).double()}
    return float(LAWS[name](axes, **number))


def integrated(slope, time_s: float) -> float:
    return float(solve_ivp(slope, (0.0, time_s), [R0_NM], rtol=1e-10, atol=1e-12).y[0, -1])


@pytest.mark.parametrize("n", [2, 3, 4, 7])
@pytest.mark.parametrize(("temperature_k", "time_s"), [(500.0, 7200.0), (600.0, 900.0), (700.0, 3600.0)])
def test_a_power_law_solves_its_rate_equation(n, temperature_k, time_s):
    """dr/dt = K / (n r^(n−1)), the form that each exponent is derived in."""
    rate = ((R0_NM * GROWTH) ** n - R0_NM**n) / 3600.0 * arrhenius(temperature_k)
    expected = integrated(lambda _, r: rate / (n * r ** (n - 1)), time_s)
    assert size(f"coarsening_{n}", temperature_k, time_s) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("temperature_k", "time_s"), [(500.0, 7200.0), (600.0, 900.0), (700.0, 3600.0)])
def test_stagnation_solves_its_rate_equation(temperature_k, time_s):
    rate = -math.log(1.0 - PART) / 3600.0 * arrhenius(temperature_k)
    expected = integrated(lambda _, r: rate * (R0_NM * GROWTH - r), time_s)
    assert size("stagnation", temperature_k, time_s) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_growth_is_what_an_hour_at_600_k_brings(n):
    assert size(f"coarsening_{n}", 600.0, 3600.0) == pytest.approx(R0_NM * GROWTH, rel=1e-9)


@pytest.mark.parametrize("name", LAWS)
def test_no_time_changes_nothing_and_much_time_stays_finite(name):
    assert size(name, 600.0, 1e-9) == pytest.approx(R0_NM, rel=1e-9)
    assert size(name, 300.0, 60.0) == pytest.approx(R0_NM, rel=1e-6)
    assert math.isfinite(size(name, 5000.0, 1e9, activation_ev=20.0))


def test_stagnation_ends_at_its_last_size():
    assert size("stagnation", 900.0, 7200.0) == pytest.approx(R0_NM * GROWTH, rel=1e-6)
