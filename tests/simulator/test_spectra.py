"""Low losses: against the coupled equations solved directly, closed forms, the multipole sum, and sum rules."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import special
from torch import Tensor

from stem_gym.simulator.spectra import (
    HBAR_C_EV_NM,
    Drude,
    aloof_loss,
    beam_velocity,
    bessel_pair,
    bulk_loss_per_nm,
    channel_weights,
    chord_nm,
    coupled_loss,
    dipole_modes,
    source_axis_ev,
    sphere_polarisability_nm3,
)

BEAM_KEV = 100.0
SILVER = (4.0, 9.1, 0.15)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drude(*parameters: tuple[float, float, float]) -> Drude:
    """One material for each specimen."""
    return Drude(*double(*(x for row in parameters for x in row)).reshape(-1, 3).T.contiguous())


def cluster(seed: int, specimens: int = 3, spheres: int = 5) -> tuple[Tensor, Tensor]:
    """Spheres that do not touch, at different heights: jittered places of a 3 × 3 grid."""
    draw = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(3), np.arange(3), indexing="ij"), -1).reshape(-1, 2) * 25.0
    places = np.stack([draw.permutation(grid)[:spheres] for _ in range(specimens)])
    places = np.concatenate((places, np.zeros((specimens, spheres, 1))), axis=-1)
    centre = places + draw.uniform(-2.0, 2.0, places.shape)
    return torch.from_numpy(centre), torch.from_numpy(draw.uniform(6.0, 10.0, (specimens, spheres)))


def solved_directly(energy: float, probe: np.ndarray, centre: np.ndarray, radius: np.ndarray, eps: complex) -> float:
    """Γ of one beam at one energy from p = (1/α − W)⁻¹ F, written out in complex numbers."""
    beta, gamma = beam_velocity(BEAM_KEV)
    k = energy / HBAR_C_EV_NM
    matrix = np.zeros((3 * len(centre), 3 * len(centre)), complex)
    field = np.zeros((len(centre), 3), complex)
    for i, (here, a) in enumerate(zip(centre, radius, strict=True)):
        matrix[3 * i : 3 * i + 3, 3 * i : 3 * i + 3] = np.eye(3) * (eps + 2.0) / (eps - 1.0) / a**3
        for j, there in enumerate(centre):
            if i != j:
                r = np.linalg.norm(here - there)
                n = (here - there) / r
                matrix[3 * i : 3 * i + 3, 3 * j : 3 * j + 3] = -(3.0 * np.outer(n, n) - np.eye(3)) / r**3
        rho = here[:2] - probe
        zeta = k * np.hypot(*rho) / (beta * gamma)
        field[i, :2] = -special.k1(zeta) * rho / np.hypot(*rho)
        field[i, 2] = 1j / gamma * special.k0(zeta)
        field[i] *= np.exp(1j * k * here[2] / beta)
    dipole = np.linalg.solve(matrix, field.ravel())
    prefactor = 4.0 * k**2 / (137.035999 * math.pi * HBAR_C_EV_NM * beta**4 * gamma**2)
    return float(prefactor * (field.ravel().conj() @ dipole).imag)


def multipole_loss(energy: np.ndarray, distance: float, radius: float, eps: np.ndarray, beam_kev: float) -> np.ndarray:
    """Γ of one sphere with all multipoles, not retarded: Ferrell and Echenique, Phys. Rev. Lett. 55, 1526, 1985."""
    beta, orders = beam_velocity(beam_kev)[0], 30
    zeta, size = energy * distance / (HBAR_C_EV_NM * beta), energy * radius / (HBAR_C_EV_NM * beta)
    bessel = [special.k0(zeta), special.k1(zeta)]
    for m in range(1, orders):
        bessel.append(bessel[m - 1] + 2.0 * m / zeta * bessel[m])
    total = np.zeros_like(energy)
    for order in range(1, orders + 1):
        response = (order * (eps - 1.0) / (order * eps + order + 1.0)).imag
        for m in range(order + 1):
            weight = (2 - (m == 0)) / (math.factorial(order + m) * math.factorial(order - m))
            total += weight * size ** (2 * order) * bessel[m] ** 2 * response
    return 4.0 * radius * total / (137.035999 * math.pi * HBAR_C_EV_NM * beta**2)


def dipole_share(ratio: float, radius: float, material: tuple[float, float, float], beam_kev: float) -> float:
    """Energy integral of the dipole's loss over that of all multipoles, at a distance of `ratio` radii."""
    resonance = material[1] / math.sqrt(material[0] + 2.0)
    energy = torch.linspace(0.3 * resonance, 2.0 * resonance, 1500, dtype=torch.float64)
    eps = drude(material).permittivity(energy)
    polarisability = sphere_polarisability_nm3(eps, double(radius))
    dipole = aloof_loss(energy, double(ratio * radius)[None], polarisability, beam_kev)[0, 0]
    every = multipole_loss(energy.numpy(), ratio * radius, radius, eps[0].numpy(), beam_kev)
    return float(dipole.sum()) / float(every.sum())


# The dielectric function


def test_drude_is_its_formula():
    energy = torch.linspace(0.2, 20.0, 50, dtype=torch.float64)
    eps = drude(SILVER, (1.0, 15.0, 0.6)).permittivity(energy)
    for row, (background, plasma, damping) in zip(eps, (SILVER, (1.0, 15.0, 0.6)), strict=True):
        expected = background - plasma**2 / (energy.numpy() * (energy.numpy() + 1j * damping))
        np.testing.assert_allclose(row.numpy(), expected, rtol=1e-13)


def test_the_sum_rule_of_the_bulk():
    """∫ E Im(−1/eps) dE = π Ep² / 2 for free electrons; the tail beyond the grid, Ep² Γ / E, is added."""
    energy = torch.linspace(0.005, 400.0, 400_000, dtype=torch.float64)
    eps = drude((1.0, 15.0, 0.6)).permittivity(energy)[0]
    found = torch.trapezoid(energy * (-1.0 / eps).imag, energy) + 15.0**2 * 0.6 / 400.0
    assert float(found) == pytest.approx(math.pi / 2.0 * 15.0**2, rel=1e-4)


# One sphere


def test_one_sphere_resonates_where_eps_is_minus_two():
    """Damping moves the peak of Im α by a part in (Γ/E)² ≈ 2e-3 at most; the grid is finer than that."""
    energy = torch.linspace(3.0, 4.5, 3001, dtype=torch.float64)
    polarisability = sphere_polarisability_nm3(drude(SILVER).permittivity(energy), double(10.0))
    peak = float(energy[polarisability.imag[0].argmax()])
    assert peak == pytest.approx(9.1 / math.sqrt(6.0), rel=2e-3)
    assert float(drude(SILVER).mode_energy_ev(double(0.0)[None])) == pytest.approx(9.1 / math.sqrt(6.0), rel=1e-12)


def test_one_coupled_sphere_is_the_closed_form():
    energy = torch.linspace(1.0, 6.0, 40, dtype=torch.float64)
    material, radius = drude(SILVER, (9.5, 9.0, 0.1)), double(8.0, 12.0)
    centre = torch.tensor([[[3.0, 4.0, 1.0]], [[-2.0, 0.5, 7.0]]], dtype=torch.float64)
    distance = double(13.0, 20.0, 45.0).expand(2, 3)
    turn = double(0.3, 2.0, 4.0)
    probe = centre[:, :, :2] + distance[..., None] * torch.stack((torch.cos(turn), torch.sin(turn)), dim=-1)
    coupled = coupled_loss(energy, probe, centre, radius[:, None], material, BEAM_KEV)
    polarisability = sphere_polarisability_nm3(material.permittivity(energy), radius)
    torch.testing.assert_close(coupled, aloof_loss(energy, distance, polarisability, BEAM_KEV), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize(("ratio", "share"), [(1.05, 0.54), (1.5, 0.80), (2.0, 0.92), (3.0, 1.115)])
def test_the_dipole_against_all_multipoles(ratio, share):
    """15 nm of silver at 100 keV: close by, multipoles are missing; far away, the multipole sum lacks retardation."""
    assert dipole_share(ratio, 15.0, SILVER, 100.0) == pytest.approx(share, abs=0.005)


def test_far_from_a_slow_beam_the_dipole_is_all():
    """Without relativity (2 keV, γ² = 1.008) the quadrupole's share falls as (a/b)²: 1 % at eight radii, at most."""
    assert dipole_share(8.0, 0.2, SILVER, 2.0) == pytest.approx(1.0, abs=0.02)
    assert dipole_share(2.0, 0.2, SILVER, 2.0) < 0.95


# Several spheres


def test_coupled_spheres_are_the_direct_solution():
    """Two ways through the same linear algebra in double precision: 1e-5 is generous, 1e-9 is what is left."""
    centre, radius = cluster(1)
    material = drude(SILVER, (9.5, 9.0, 0.1), (1.0, 15.0, 0.6))
    energy = double(1.3, 2.9, 3.4, 3.9, 8.0)
    draw = np.random.default_rng(2)
    probe = torch.from_numpy(draw.uniform(-20.0, 70.0, (3, 40, 2)))
    outside = (probe[:, :, None] - centre[:, None, :, :2]).norm(dim=-1) > radius[:, None]
    loss = coupled_loss(energy, probe, centre, radius, material, BEAM_KEV)
    eps = material.permittivity(energy)
    compared = 0
    for row, place in zip(*np.nonzero(outside.all(-1).numpy()), strict=True):
        for c, value in enumerate(energy.tolist()):
            direct = solved_directly(
                value, probe[row, place].numpy(), centre[row].numpy(), radius[row].numpy(), complex(eps[row, c])
            )
            assert float(loss[row, place, c]) == pytest.approx(direct, rel=1e-9)
            compared += 1
    assert compared > 200


def test_losses_are_never_negative():
    """Anywhere, also inside spheres and on their centres, at any energy, for touching spheres as well."""
    centre, radius = cluster(3, specimens=2, spheres=6)
    centre[:, 1] = centre[:, 0] + torch.tensor([1.0, 0.0, 0.0]) * (radius[:, :1] + radius[:, 1:2])
    probe = torch.cat(
        (torch.rand(2, 200, 2, generator=torch.Generator().manual_seed(4)) * 80.0 - 10.0, centre[..., :2]), 1
    )
    loss = coupled_loss(
        torch.linspace(0.05, 20.0, 60), probe.float(), centre.float(), radius.float(), drude(SILVER, SILVER), 60.0
    )
    assert torch.isfinite(loss).all() and (loss >= 0.0).all() and loss.max() > 0.0


def test_a_pair_splits_as_two_dipoles_do():
    """Eigenvalues of two equal spheres at distance d: ±2 (a/d)³ along the axis and ±(a/d)³, twice, across it."""
    centre = torch.tensor([[[0.0, 0.0, 0.0], [30.0, 0.0, 0.0]]], dtype=torch.float64)
    modes = dipole_modes(centre, double(10.0, 10.0)[None])
    unit = (10.0 / 30.0) ** 3
    expected = unit * double(-2.0, -1.0, -1.0, 1.0, 1.0, 2.0)
    torch.testing.assert_close(modes.eigenvalue[0], expected, rtol=1e-10, atol=1e-14)
    energy = drude(SILVER).mode_energy_ev(modes.eigenvalue)[0]
    assert (energy.diff() <= 1e-12).all() and energy[-1] < 9.1 / math.sqrt(6.0) < energy[0]


@pytest.mark.parametrize("mirror", [False, True])
def test_turning_and_mirroring_beam_and_spheres_changes_nothing(mirror):
    centre, radius = cluster(5)
    energy, material = double(2.0, 3.6, 3.9), drude(SILVER, SILVER, SILVER)
    probe = torch.from_numpy(np.random.default_rng(6).uniform(-20.0, 70.0, (3, 30, 2)))
    turn = torch.tensor([[math.cos(0.7), math.sin(0.7)], [-math.sin(0.7), math.cos(0.7)]], dtype=torch.float64)
    if mirror:
        turn = turn @ torch.diag(double(-1.0, 1.0))
    turned = torch.cat((centre[..., :2] @ turn.T, centre[..., 2:]), dim=-1)
    before = coupled_loss(energy, probe, centre, radius, material, BEAM_KEV)
    after = coupled_loss(energy, probe @ turn.T, turned, radius, material, BEAM_KEV)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=0.0)
    assert not torch.allclose(
        before, coupled_loss(energy, probe @ turn.T, centre, radius, material, BEAM_KEV), rtol=0.1
    )


def test_inside_a_sphere_the_loss_is_continuous_and_falls_towards_the_centre():
    centre, radius = torch.zeros(1, 1, 3, dtype=torch.float64), double(10.0)[None]
    x = double(0.0, 5.0, 10.0 - 1e-9, 10.0 + 1e-9)
    probe = torch.stack((x, torch.zeros_like(x)), dim=-1)[None]
    loss = coupled_loss(double(3.7), probe, centre, radius, drude(SILVER), BEAM_KEV)[0, :, 0]
    assert float(loss[2]) == pytest.approx(float(loss[3]), rel=1e-6)
    assert loss[0] < loss[1] < loss[2]


def test_absent_spheres_change_nothing():
    centre, radius = cluster(7)
    probe = torch.from_numpy(np.random.default_rng(8).uniform(-20.0, 70.0, (3, 10, 2)))
    energy, material = double(3.0, 3.7), drude(SILVER, SILVER, SILVER)
    padded = torch.cat((centre, torch.zeros(3, 2, 3, dtype=torch.float64)), dim=1)
    none = torch.cat((radius, torch.zeros(3, 2, dtype=torch.float64)), dim=1)
    with_none = coupled_loss(energy, probe, padded, none, material, BEAM_KEV)
    torch.testing.assert_close(
        with_none, coupled_loss(energy, probe, centre, radius, material, BEAM_KEV), rtol=1e-10, atol=0.0
    )


def test_a_batch_is_its_rows():
    centre, radius = cluster(9)
    probe = torch.from_numpy(np.random.default_rng(10).uniform(-20.0, 70.0, (3, 10, 2)))
    energy, material = double(3.0, 3.7), drude(SILVER, (9.5, 9.0, 0.1), (1.0, 15.0, 0.6))
    whole = coupled_loss(energy, probe, centre, radius, material, BEAM_KEV)
    for row in range(3):
        one = torch.tensor([row])
        part = coupled_loss(energy, probe[one], centre[one], radius[one], material.rows(one), BEAM_KEV)
        torch.testing.assert_close(part, whole[one], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("spheres", [3, 4, 5])
def test_modes_are_the_same_to_the_last_bit_in_any_batch(spheres):
    """An odd number of float32 would leave every second matrix at another alignment."""
    centre, radius = (part.float() for part in cluster(12, specimens=5, spheres=spheres))
    whole, rows = dipole_modes(centre, radius), torch.tensor([3, 0, 1])
    part = dipole_modes(centre[rows], radius[rows])
    assert torch.equal(part.eigenvalue, whole.eigenvalue[rows]) and torch.equal(part.vector, whole.vector[rows])


@pytest.mark.parametrize("name", ["plasma_ev", "damping_ev", "background", "probe", "radius"])
def test_gradients_are_finite_differences(name):
    """Central differences of relative step 1e-5 in double precision are good to about 1e-8."""
    centre, radius = cluster(11, specimens=1)
    material = drude(SILVER)
    probe, energy = double(33.0, 41.0)[None, None], double(3.5)

    def loss(value: Tensor) -> Tensor:
        given = replace(material, **{name: value}) if hasattr(material, name) else material
        beam, size = (value if name == key else other for key, other in (("probe", probe), ("radius", radius)))
        return coupled_loss(energy, beam, centre, size, given, BEAM_KEV).sum()

    at = {"probe": probe, "radius": radius}.get(name, getattr(material, name, None)).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at), at)
    step = torch.zeros_like(at)
    step.view(-1)[0] = 1e-5 * float(at.detach().flatten()[0])
    slope = (loss(at.detach() + step) - loss(at.detach() - step)) / (2.0 * step.sum())
    assert float(gradient.flatten()[0]) == pytest.approx(float(slope), rel=1e-6)


# Bulk, chords, channels, Bessel functions


def test_bulk_loss_is_the_integral_over_angles():
    """dP/dΩ = Im(−1/eps) / (π² a0 m v² (θ² + θ_E²)) per length, added up in rings (Egerton 2011, eq. 3.32)."""
    energy = double(5.0, 15.0, 22.0)
    eps = drude((1.0, 15.0, 0.6)).permittivity(energy)
    beta, gamma = beam_velocity(200.0)
    found = bulk_loss_per_nm(eps, energy, 200.0, 12.0)[0]
    for value, e, one in zip(found.tolist(), energy.tolist(), eps[0].tolist(), strict=True):
        mv2 = 510998.95 * beta**2
        theta = np.concatenate(([0.0], np.geomspace(1e-8, 12e-3, 20001)))
        rings = 2.0 * np.pi * theta / (theta**2 + (e / (gamma * mv2)) ** 2)
        expected = (-1.0 / one).imag / (np.pi**2 * 0.0529177 * mv2) * np.trapezoid(rings, theta)
        assert value == pytest.approx(expected, rel=1e-4)


def test_chords_of_a_sphere_make_its_volume():
    x = torch.linspace(-12.0, 12.0, 601, dtype=torch.float64)
    distance = torch.sqrt(x[:, None] ** 2 + x[None, :] ** 2)
    assert float(chord_nm(distance, double(10.0)).sum()) * 0.04**2 == pytest.approx(4.0 / 3.0 * math.pi * 1e3, rel=1e-3)


def test_channels_spread_a_line_as_a_gaussian_and_lose_nothing():
    axis = 1.0 + 0.01 * torch.arange(200, dtype=torch.float64)
    source = source_axis_ev(axis, 0.1)
    weights = channel_weights(source, axis, 0.1)
    assert weights.shape == (len(source), 200) and source[0] > 0.0
    middle = int((source - 2.0).abs().argmin())
    line = weights[middle] / (source[1] - source[0])
    assert float(line.sum()) == pytest.approx(1.0, abs=1e-9)
    mean = float((line * axis).sum())
    assert mean == pytest.approx(float(source[middle]), abs=1e-6)
    spread = math.sqrt(float((line * (axis - mean) ** 2).sum()))
    expected = math.hypot(0.1 / 2.354820, 0.01 / math.sqrt(12.0))  # a channel is a box
    assert spread == pytest.approx(expected, rel=1e-3)
    flat = torch.ones(len(source), dtype=torch.float64) @ weights
    torch.testing.assert_close(flat, torch.full_like(axis, 0.01), rtol=1e-3, atol=0.0)


def test_an_axis_near_zero_has_no_source_below_it():
    source = source_axis_ev(0.02 + 0.01 * torch.arange(50, dtype=torch.float64), 0.1)
    assert float(source[0]) == pytest.approx(0.005)


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_bessel_functions_are_scipys(kind, tolerance):
    x = torch.logspace(-4.0, 1.8, 2000, dtype=kind)
    for found, reference in zip(bessel_pair(x), (special.k0, special.k1), strict=True):
        np.testing.assert_allclose(found.double().numpy(), reference(x.double().numpy()), rtol=tolerance)
