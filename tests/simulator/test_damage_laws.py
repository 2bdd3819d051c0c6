"""Laws of beam damage: against the cross section itself, and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from stem_gym.simulator.damage import ISOTOPE_MASS_U, displacement_cross_section
from stem_gym.simulator.damage_laws import LAWS, LN_LEAST_RATE_PER_S, variance_m2_s2
from stem_gym.simulator.laws import parameters_of

NUMBERS = {
    "ln_reference": -5.0, "threshold_ev": 18.0, "ionisation_ev": 80.0, "activation_ev": 0.15, "heating_k": 60.0,
    "order": 1.8,
}  # fmt: skip
BOLTZMANN_EV_K = 8.617333262e-5


def ln_rate(name: str, energy_kev=80.0, temperature_k=300.0, dose_rate=1e4, **changed: float) -> float:
    number = {one: torch.tensor(changed.get(one, NUMBERS[one])).double() for one in parameters_of(LAWS[name])}
    axes = {"energy_kev": energy_kev, "temperature_k": temperature_k, "dose_rate_e_ang2_s": dose_rate}
    return float(LAWS[name]({one: torch.tensor(value).double() for one, value in axes.items()}, **number))


def bethe(energy_kev: float, ionisation_ev: float) -> float:
    """[ln(2 m c² β² γ² / I) − β²] / β²."""
    gamma = 1.0 + energy_kev / 510.99895
    beta2 = 1.0 - 1.0 / gamma**2
    return (math.log(2.0 * 510998.95 * beta2 * gamma**2 / ionisation_ev) - beta2) / beta2


def ln_cross_section(energy_kev: float, threshold_ev: float, temperature_k: float) -> float:
    variance = variance_m2_s2(torch.tensor(temperature_k).double())
    barn = displacement_cross_section(
        torch.tensor(energy_kev).double(), 6, ISOTOPE_MASS_U["12C"], threshold_ev, variance
    )
    return math.log(float(barn))


@pytest.mark.parametrize("name", LAWS)
def test_every_law_goes_through_the_reference(name):
    floor = math.exp(LN_LEAST_RATE_PER_S)
    assert ln_rate(name) == pytest.approx(math.log(math.exp(-5.0) + floor), abs=1e-6)


@pytest.mark.parametrize("energy_kev", [60.0, 80.0, 200.0, 300.0])
@pytest.mark.parametrize("threshold_ev", [14.3, 18.0, 21.7])
@pytest.mark.parametrize("temperature_k", [100.0, 300.0, 500.0])
def test_knock_on_is_the_cross_section_of_the_fabrication_task(energy_kev, threshold_ev, temperature_k):
    """The table is linear between its knots; 0.1 is a tenth of the noise of a measurement in the shipped variant."""
    reference = 10.0  # far above the least rate, which is tested below
    here, there = (
        ln_cross_section(*place) for place in ((80.0, threshold_ev, 300.0), (energy_kev, threshold_ev, temperature_k))
    )
    expected = math.log(math.exp(reference + there - here) + math.exp(LN_LEAST_RATE_PER_S))
    found = ln_rate("knock_on", energy_kev, temperature_k, threshold_ev=threshold_ev, ln_reference=reference)
    assert found == pytest.approx(expected, abs=0.1)


def test_warmth_helps_below_the_threshold_only():
    """60 keV can give an atom at rest 11.6 eV, 300 keV can give 71 eV; the threshold is 18 eV."""

    def gain(energy_kev: float) -> float:
        cold, warm = (ln_rate("knock_on", energy_kev, at, ln_reference=10.0) for at in (100.0, 500.0))
        return warm - cold

    assert gain(60.0) > 1.0
    assert gain(300.0) == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("energy_kev", [60.0, 200.0, 300.0])
def test_radiolysis_by_hand(energy_kev):
    expected = -5.0 + math.log(bethe(energy_kev, 80.0) / bethe(80.0, 80.0))
    assert ln_rate("radiolysis", energy_kev) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("energy_kev", "temperature_k", "dose_rate"), [(60.0, 100.0, 3e4), (80.0, 500.0, 1e3), (300.0, 300.0, 1e4)]
)
def test_heating_by_hand(energy_kev, temperature_k, dose_rate):
    hot_k = temperature_k + 60.0 * bethe(energy_kev, 80.0) / bethe(80.0, 80.0) * dose_rate / 1e4
    expected = -5.0 - 0.15 / BOLTZMANN_EV_K * (1.0 / hot_k - 1.0 / 360.0)
    expected = math.log(math.exp(expected) + math.exp(LN_LEAST_RATE_PER_S))
    assert ln_rate("heating", energy_kev, temperature_k, dose_rate) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("name", "order"), [("knock_on", 1.0), ("radiolysis", 1.0), ("dose_rate", 1.8)])
def test_the_rate_is_a_power_of_the_dose_rate(name, order):
    slope = ln_rate(name, dose_rate=3e4, ln_reference=3.0) - ln_rate(name, dose_rate=1e3, ln_reference=3.0)
    assert slope == pytest.approx(order * math.log(30.0), rel=1e-4)


def test_several_electrons_by_hand():
    expected = 3.0 + 1.8 * (math.log(bethe(200.0, 80.0) / bethe(80.0, 80.0)) + math.log(3.0))
    assert ln_rate("dose_rate", 200.0, dose_rate=3e4, ln_reference=3.0) == pytest.approx(expected, abs=1e-4)


def test_nothing_is_slower_than_what_happens_without_the_beam():
    assert ln_rate("heating", temperature_k=100.0, dose_rate=1e3, activation_ev=2.0) == pytest.approx(
        LN_LEAST_RATE_PER_S
    )


def test_the_thermal_motion_is_that_of_an_oscillator():
    cold, room, hot = (float(variance_m2_s2(torch.tensor(at).double())) for at in (1.0, 300.0, 1e5))
    assert room == pytest.approx(3.17e5)
    # Far above the Debye temperature k T / m, independent of the Debye temperature but for the value at 300 K.
    assert hot / room == pytest.approx(1e5 * 2.0 / 1287.0 * math.tanh(1287.0 / 600.0), rel=1e-4)
    assert cold / room == pytest.approx(math.tanh(1287.0 / 600.0))
