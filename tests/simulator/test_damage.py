"""Knock-on damage against published numbers, quadrature of the defining integrals, and finite differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq

from stem_gym.core.errors import ConfigError
from stem_gym.simulator.damage import (
    ISOTOPE_MASS_U,
    differential_cross_section,
    displacement_cross_section,
    largest_transfer_ev,
    recoil_direction,
    recoil_spectrum,
)

CARBON_EV = 21.14  # threshold of carbon in graphene: Susi et al., Nat. Commun. 7, 13040 (2016)
V12, V13 = 3.17e5, 2.86e5  # m²/s², mean square velocities out of the plane at 300 K of 12C and 13C, same paper
M12, M13 = ISOTOPE_MASS_U["12C"], ISOTOPE_MASS_U["13C"]

# Written out once more from the papers, in other units and with plain numbers, for the checks below.
MC2, U, C = 510998.95, 931494102.42, 299792458.0


def plain_largest(energy_kev: float, mass_u: float, v: float = 0.0) -> float:
    energy, rest = 1e3 * energy_kev, mass_u * U
    moved = rest * (v / C) ** 2 / 2
    r = math.sqrt(energy * (energy + 2 * MC2)) + rest * v / C
    t = math.sqrt((energy + moved) * (energy + 2 * MC2 + moved))
    return (r + t) ** 2 / (2 * rest)


def plain_differential(transfer: float, energy_kev: float, number: int, largest: float) -> float:
    beta2 = 1 - (1 + energy_kev * 1e3 / MC2) ** -2
    beta, alpha, x = math.sqrt(beta2), number / 137.036, transfer / largest
    rutherford = 0.24946720 * number**2 * (1 - beta2) / beta2**2 * largest / transfer**2
    return rutherford * (1 - beta2 * x + math.pi * alpha * beta * (math.sqrt(x) - x))


def plain_static(energy_kev: float, number: int, largest: float, threshold: float) -> float:
    if largest <= threshold:
        return 0.0
    return quad(lambda t: plain_differential(t, energy_kev, number, largest), threshold, largest, epsrel=1e-10)[0]


def plain_thermal(energy_kev: float, number: int, mass_u: float, threshold: float, variance: float) -> float:
    """Adaptive quadrature over the velocity, in pieces of a quarter of sigma, of a quadrature over the transfer."""
    sigma = math.sqrt(variance)
    stopped = -C * math.sqrt(2 * plain_largest(energy_kev, mass_u) / (mass_u * U))
    onset = brentq(lambda v: plain_largest(energy_kev, mass_u, v) - threshold, 0.99 * stopped, 1e5, xtol=1e-9)

    def integrand(v: float) -> float:
        weight = math.exp(-v * v / (2 * variance)) / math.sqrt(2 * math.pi * variance)
        return weight * plain_static(energy_kev, number, plain_largest(energy_kev, mass_u, v), threshold)

    first = max(onset, -6 * sigma)
    edges = np.linspace(first, max(first, 0) + 6 * sigma, 25)
    return sum(quad(integrand, a, b, epsabs=0, epsrel=1e-6)[0] for a, b in itertools.pairwise(edges))


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_largest_transfer_to_carbon_at_rest():
    # Published to two decimals.
    ours = largest_transfer_ev(doubles(60, 80, 100), M12)
    torch.testing.assert_close(ours, doubles(11.62, 15.77, 20.08), rtol=0, atol=0.005)


@pytest.mark.parametrize("v", [-3000.0, -500.0, 0.0, 500.0, 3000.0])
def test_largest_transfer_conserves_energy_and_momentum(v):
    # Head-on collision, all along the beam: solve for the electron's momentum after it, without any approximation.
    energy, rest = 80e3, 12.0 * U
    before, momentum = math.sqrt(energy * (energy + 2 * MC2)), rest * v / C

    def energy_missing(after: float) -> float:
        nucleus = momentum + before - after
        electron = math.sqrt(after * after + MC2 * MC2) - MC2
        return electron + nucleus**2 / (2 * rest) - energy - momentum**2 / (2 * rest)

    after = brentq(energy_missing, -2 * before, 0.0, xtol=1e-9)
    exact = (momentum + before - after) ** 2 / (2 * rest)
    # The formula neglects what the electron has lost: a share T / E of its momentum, here 2e-4.
    assert largest_transfer_ev(80.0, doubles(12.0), v).item() == pytest.approx(exact, rel=5e-4)


def test_a_nucleus_that_flees_is_never_sent_forward():
    leaves = [doubles(v).requires_grad_() for v in (1.0, 60.0, M12, -5e4)]
    transfer, energy, mass, speed = leaves
    largest = largest_transfer_ev(energy, mass, speed)
    density = differential_cross_section(transfer, energy, 6, mass, speed)
    assert largest.item() == 0.0 and density.item() == 0.0
    assert [slope.item() for slope in torch.autograd.grad((largest + density).sum(), leaves)] == [0.0] * 4


@pytest.mark.parametrize(("energy", "number", "mass"), [(60, 6, 12.0), (100, 14, 27.977), (300, 28, 58.7)])
def test_differential_cross_section_is_the_formula_of_mckinley_and_feshbach(energy, number, mass):
    largest = plain_largest(energy, mass)
    transfer = [0.01 * largest, 0.5 * largest, 0.999 * largest]
    expected = doubles(*(plain_differential(t, energy, number, largest) for t in transfer))
    ours = differential_cross_section(doubles(*transfer), energy, number, mass)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)  # 137.036 has six digits
    assert differential_cross_section(doubles(1.001 * largest), energy, number, mass).item() == 0.0


def test_small_transfers_are_rutherfords():
    # The other terms vanish with sqrt(T): dσ/dT -> 2 π Z² e⁴ / (M v² T²), here with e² = 14.399645 eV Å.
    energy, transfer = 60.0, 1e-7
    gamma = 1 + energy * 1e3 / MC2
    beta2 = 1 - gamma**-2
    rutherford = 2 * math.pi * 36 * 14.399645**2 / (12.0 * U * beta2) / transfer**2 * 1e8  # Å² to barn
    ours = differential_cross_section(doubles(transfer), energy, 6, 12.0).item()
    assert ours == pytest.approx(rutherford, rel=1e-4)


@pytest.mark.parametrize(
    ("energy", "number", "mass", "threshold"),
    [
        (80, 6, 12.0, 13.5),
        (100, 6, 12.0, 17.0),
        (120, 6, 13.003355, 21.14),
        (200, 14, 28.085, 13.0),
        (300, 1, 1.008, 5),
    ],
)
def test_static_cross_section_is_the_integral_of_the_differential(energy, number, mass, threshold):
    expected = plain_static(energy, number, plain_largest(energy, mass), threshold)
    ours = displacement_cross_section(float(energy), number, doubles(mass), float(threshold))
    assert ours.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("energy", "published"), [(80, 4.105e-6), (100, 0.3449), (120, 5.500)])
def test_thermal_cross_section_of_graphene(energy, published):
    # To the digits given: half a unit in the fourth.
    ours = displacement_cross_section(doubles(energy), 6, M12, CARBON_EV, V12)
    assert ours.item() == pytest.approx(published, rel=1.5e-4)


@pytest.mark.parametrize(
    ("energy", "mass", "threshold", "variance"),
    [
        (60, M12, 21.14, V12),  # 1e-17 b, more than eight sigma out
        (60, M13, 13.5, V13),
        (80, M12, 13.5, V12),
        (80, M13, 21.14, V13),
        (100, M12, 17.0, 2e3),  # nearly at rest
        (120, M12, 21.14, 3e6),  # ten times 300 K
    ],
)
def test_thermal_cross_section_is_the_average_over_the_velocity(energy, mass, threshold, variance):
    expected = plain_thermal(energy, 6, mass, threshold, variance)
    ours = displacement_cross_section(doubles(energy), 6, mass, threshold, variance)
    assert ours.item() == pytest.approx(expected, rel=2e-5)


def test_silicon_in_graphene_as_tabulated():
    # Natural carbon, exchange being what passes 13.5 eV without passing 17 eV; two digits were given.
    energy = doubles(60, 80, 100)
    threshold = doubles(13.5, 17.0, 19.5)[:, None]
    above = displacement_cross_section(energy, 6, ISOTOPE_MASS_U["C"], threshold, V12)
    torch.testing.assert_close(above[0] - above[1], doubles(0.124, 13.4, 16.7), rtol=0.005, atol=0)
    torch.testing.assert_close(above[1], doubles(3e-7, 0.39, 9.2), rtol=0.05, atol=0)
    torch.testing.assert_close(above[2], doubles(4e-13, 1e-3, 2.1), rtol=0.06, atol=0)
    pristine = displacement_cross_section(energy, 6, M12, CARBON_EV, V12)
    torch.testing.assert_close(pristine[1:], doubles(4.1e-6, 0.345), rtol=0.005, atol=0)
    assert 1e-17 < pristine[0].item() < 1.5e-17


def test_the_heavier_isotope_is_safer():
    light = displacement_cross_section(doubles(80, 90, 100), 6, M12, CARBON_EV, V12)
    heavy = displacement_cross_section(doubles(80, 90, 100), 6, M13, CARBON_EV, V13)
    natural = displacement_cross_section(doubles(80, 90, 100), 6, ISOTOPE_MASS_U["C"], CARBON_EV, V12)
    assert (light > 10 * heavy).all()
    assert (natural / light)[1].item() == pytest.approx(0.96, abs=0.005)  # natural carbon shifts 90 keV by 4 %


def test_more_energy_displaces_more_near_the_threshold():
    energy = torch.linspace(30, 130, 401, dtype=torch.float64)
    assert (displacement_cross_section(energy, 6, M12, CARBON_EV, V12).diff() > 0).all()
    static = displacement_cross_section(energy, 6, M12, CARBON_EV)
    possible = largest_transfer_ev(energy, M12) > CARBON_EV
    assert (static[~possible] == 0).all() and (static[possible] > 0).all() and (static[possible].diff() > 0).all()


def test_vibrations_of_no_size_are_a_nucleus_at_rest():
    energy = torch.linspace(40, 200, 50, dtype=torch.float64)
    still = displacement_cross_section(energy, 6, M12, 17.0)
    torch.testing.assert_close(displacement_cross_section(energy, 6, M12, 17.0, doubles(0.0)), still, rtol=1e-6, atol=0)
    assert (still == 0).sum() > 5


def loss(energy, mass, threshold, variance):
    return displacement_cross_section(energy, 6, mass, threshold, variance).log()


@pytest.mark.parametrize(("energy", "threshold"), [(60.0, 21.14), (80.0, 13.5), (100.0, 21.14), (200.0, 17.0)])
def test_gradients_are_those_of_finite_differences(energy, threshold):
    # Of the logarithm, since the values span 17 decades.
    values = [doubles(v) for v in (energy, 12.0, threshold, V12)]
    leaves = [v.clone().requires_grad_() for v in values]
    slopes = torch.autograd.grad(loss(*leaves).sum(), leaves)
    for index, slope in enumerate(slopes):
        step = 1e-5 * values[index]
        ends = [loss(*(v + sign * step if i == index else v for i, v in enumerate(values))) for sign in (1, -1)]
        torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-12)


def test_the_gradient_along_the_variance_at_rest_is_half_the_curvature():
    # <f(v)> = f(0) + f''(0) variance / 2.
    variance = doubles(0.0).requires_grad_()
    displacement_cross_section(80.0, 6, M12, 13.5, variance).sum().backward()
    step = 20.0
    f = [plain_static(80, 6, plain_largest(80, 12.0, v), 13.5) for v in (-step, 0.0, step)]
    assert variance.grad.item() == pytest.approx((f[0] - 2 * f[1] + f[2]) / step**2 / 2, rel=1e-2)


@pytest.mark.parametrize("variance", [0.0, 1e-3, V12, 1e9])
def test_gradients_are_finite_everywhere(variance):
    energy = torch.linspace(1, 400, 300, dtype=torch.float32)[:, None].requires_grad_()
    threshold = torch.tensor([0.5, 21.14, 100.0]).requires_grad_()
    mass = torch.tensor(12.0, requires_grad=True)
    spread = torch.tensor(variance, requires_grad=True)
    for given in (spread, variance):  # a tensor, and the number
        leaves = [energy, threshold, mass, *([spread] if given is spread else [])]
        sigma = displacement_cross_section(energy, 6, mass, threshold, given)
        density = differential_cross_section(threshold, energy, 6, mass)
        recoils = recoil_spectrum(energy, 6, mass, threshold, given)
        cosine = recoil_direction(recoils.transfer_ev, recoils.largest_ev)
        total = sigma.sum() + density.sum() + (recoils.cross_section_barn * cosine).sum()
        assert sigma.isfinite().all() and (sigma >= 0).all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(total, leaves))


@pytest.mark.parametrize(("energy", "lowest", "variance"), [(100.0, 13.5, 0.0), (60.0, 17.0, V12), (90.0, 12.0, V12)])
def test_recoils_add_up_to_the_cross_section(energy, lowest, variance):
    recoils = recoil_spectrum(doubles(energy), 6, M12, lowest, variance)
    sigma = displacement_cross_section(doubles(energy), 6, M12, lowest, variance)
    torch.testing.assert_close(recoils.cross_section_barn.sum(-1), sigma, rtol=1e-4, atol=0)
    assert (recoils.transfer_ev >= lowest).all() and (recoils.transfer_ev <= recoils.largest_ev).all()


def test_recoils_integrate_an_outcome():
    # A smooth onset at 15 eV, 1 eV wide, that also needs a recoil close to the beam.
    def outcome(transfer, largest, exp):
        return transfer / largest / (1.0 + exp(15.0 - transfer))

    largest = plain_largest(100, 12.0)

    def integrand(t: float) -> float:
        return plain_differential(t, 100, 6, largest) * outcome(t, largest, math.exp)

    expected = quad(integrand, 10.0, largest)[0]
    recoils = recoil_spectrum(doubles(100.0), 6, M12, 10.0)
    ours = (recoils.cross_section_barn * outcome(recoils.transfer_ev, recoils.largest_ev, torch.exp)).sum()
    assert ours.item() == pytest.approx(expected, rel=1e-4)


def test_recoils_that_are_impossible_weigh_nothing():
    recoils = recoil_spectrum(torch.tensor([60.0, 100.0]), 6, M12, 15.0)
    assert recoils.cross_section_barn.shape == (2, 12)
    assert (recoils.cross_section_barn[0] == 0).all() and (recoils.cross_section_barn[1] > 0).all()
    assert (recoils.transfer_ev >= 15.0).all()


def test_recoils_leave_along_the_beam_when_they_get_everything():
    cosine = recoil_direction(doubles(0.01, 0.25, 1.0, 1.5), 1.0)
    torch.testing.assert_close(cosine, doubles(0.1, 0.5, 1.0, 1.0))
    # Elastic scattering by the angle a moves the nucleus at (180° - a) / 2 and T = Tmax sin²(a / 2).
    angle = 2.0
    share = doubles(math.sin(angle / 2) ** 2)
    assert recoil_direction(share, 1.0).acos().item() == pytest.approx((math.pi - angle) / 2)


def test_arguments_broadcast_and_the_dtype_is_theirs():
    energy = torch.tensor([60.0, 80.0, 100.0])
    threshold, variance = torch.tensor([[13.5], [21.14]]), torch.tensor(V12, dtype=torch.float64)
    assert displacement_cross_section(energy, torch.tensor(6), M12, threshold).shape == (2, 3)
    assert displacement_cross_section(energy, torch.tensor(6), M12, threshold).dtype == torch.float32
    mixed = displacement_cross_section(energy, 6, M12, threshold, variance)
    assert mixed.shape == (2, 3) and mixed.dtype == torch.float64
    assert displacement_cross_section(80.0, 6, M12, 13.5).shape == ()
    assert displacement_cross_section(80.0, 6, M12, 13.5).dtype == torch.get_default_dtype()
    recoils = recoil_spectrum(energy, 6, M12, threshold, V12, transfers=5, velocities=4)
    assert {x.shape for x in (recoils.transfer_ev, recoils.largest_ev, recoils.cross_section_barn)} == {(2, 3, 20)}
    assert largest_transfer_ev(energy, threshold).shape == differential_cross_section(threshold, energy, 6, M12).shape


def test_a_row_does_not_depend_on_its_batch():
    energy = torch.linspace(40, 130, 37)
    rows = displacement_cross_section(energy, 6, M12, 17.0, V12)
    single = torch.cat([displacement_cross_section(e[None], 6, M12, 17.0, V12) for e in energy])
    assert torch.equal(rows, single)


GOOD = {"energy_kev": 80.0, "atomic_number": 6, "mass_u": 12.0, "threshold_ev": 17.0, "velocity_variance_m2_s2": V12}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("energy_kev", 0.0, "energy_kev must be finite and positive; given 0"),
        ("energy_kev", torch.tensor([60.0, -80.0]), "energy_kev .* given -80"),
        ("energy_kev", math.nan, "energy_kev .* given nan"),
        ("mass_u", -12.0, "mass_u must be finite and positive; given -12"),
        ("mass_u", math.inf, "mass_u .* given inf"),
        ("threshold_ev", 0.0, "threshold_ev must be finite and positive; given 0"),
        ("velocity_variance_m2_s2", -1.0, "velocity_variance_m2_s2 must be finite and zero or positive; given -1"),
        ("atomic_number", 0, "atomic_number .* whole number from 1 to 28.* McKinley and Feshbach .* given 0"),
        ("atomic_number", 42, "atomic_number .* from 1 to 28.* given 42"),
        ("atomic_number", 6.5, "atomic_number .* whole number .* given 6.5"),
    ],
)
def test_what_has_no_meaning_is_refused(name, value, words):
    given = {**GOOD, name: value}
    with pytest.raises(ConfigError, match=words):
        displacement_cross_section(**given)
    given["lowest_ev"] = given.pop("threshold_ev")
    with pytest.raises(ConfigError, match=words.replace("threshold_ev", "lowest_ev")):
        recoil_spectrum(**given)


def test_other_arguments_without_meaning_are_refused():
    with pytest.raises(
        ConfigError, match=r"broadcast to one shape; given .*'energy_kev': \(2,\).*'threshold_ev': \(3,\)"
    ):
        displacement_cross_section(doubles(60, 80), 6, 12.0, doubles(1, 2, 3))
    with pytest.raises(ConfigError, match="transfer_ev must be finite and positive"):
        differential_cross_section(0.0, 80.0, 6, 12.0)
    with pytest.raises(ConfigError, match="speed_m_s must be finite and below the speed of light"):
        largest_transfer_ev(80.0, 12.0, 3e8)
    with pytest.raises(ConfigError, match="largest_ev must be finite and positive"):
        recoil_direction(1.0, 0.0)
    with pytest.raises(ConfigError, match="transfers and velocities must be at least 1; given 0 and 16"):
        recoil_spectrum(80.0, 6, 12.0, 13.5, transfers=0)
