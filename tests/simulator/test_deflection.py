"""Deflection by fields against closed forms and abTEM, and the disc that is displaced."""

import math

import numpy as np
import pytest
import torch

from stem_gym.simulator.deflection import (
    deflection_mrad,
    deflection_per_field_mrad_per_v,
    disc,
    disc_components,
    interaction_constant_rad_per_v_nm,
    pattern_axis_mrad,
    wavelength_nm,
)


@pytest.mark.parametrize("energy", [60.0, 200.0, 300.0])
def test_a_field_deflects_by_its_push_over_twice_the_kinetic_energy(energy):
    # Classical: transverse momentum e E t / v over the momentum γ m v, for any energy.
    gamma = 1.0 + energy / 510.99895
    classical = 1e3 / (gamma * 510998.95 * (1.0 - gamma**-2))
    assert deflection_per_field_mrad_per_v(energy) == pytest.approx(classical, rel=1e-6)


def test_interaction_constant_is_the_tabulated_one():
    # Reimer and Kohl, Transmission Electron Microscopy, 5th ed. 2008: 7.2884e-3 rad/(V nm) at
    # 200 keV, 9.2440e-3 at 100 keV; λ = 2.5079 and 3.7014 pm.
    assert interaction_constant_rad_per_v_nm(200.0) == pytest.approx(7.2884e-3, rel=1e-4)
    assert interaction_constant_rad_per_v_nm(100.0) == pytest.approx(9.2440e-3, rel=1e-4)
    assert wavelength_nm(200.0) == pytest.approx(2.5079e-3, rel=1e-4)


def test_a_linear_phase_ramp_deflects_everywhere_alike():
    x, y = torch.arange(20.0, dtype=torch.float64), torch.arange(12.0, dtype=torch.float64)
    phase = 0.3 * x - 0.1 * y[:, None]  # per cell of 2 nm
    moved = deflection_mrad(phase[None], 2.0, 200.0)[0]
    per_radian = 1e3 * wavelength_nm(200.0) / (2 * math.pi) / 2.0
    torch.testing.assert_close(moved[0], torch.full((12, 20), 0.3 * per_radian, dtype=torch.float64))
    torch.testing.assert_close(moved[1], torch.full((12, 20), -0.1 * per_radian, dtype=torch.float64))


def test_a_positive_potential_draws_electrons_in():
    # The electron is negative: it is deflected towards a hill of potential, on every side of it.
    at = torch.arange(33.0, dtype=torch.float64) - 16.0
    hill = torch.exp(-(at**2 + at[:, None] ** 2) / 50.0)
    moved = deflection_mrad(interaction_constant_rad_per_v_nm(200.0) * hill[None], 1.0, 200.0)[0]
    assert moved[0, 16, 10] > 0 > moved[0, 16, 22]
    assert moved[1, 10, 16] > 0 > moved[1, 22, 16]


def test_the_axis_of_a_pattern_runs_along_x_first():
    axis = pattern_axis_mrad(4, 0.5)
    assert axis[:2].tolist() == [[-0.75, -0.75], [-0.25, -0.75]]
    assert axis[4].tolist() == [-0.75, -0.25]


CAMERA = {"pixels": 16, "pixel_mrad": 0.1, "convergence_mrad": 0.5, "edge_mrad": 0.08}


def test_the_disc_holds_the_beam_and_lies_where_it_was_put():
    shift = torch.tensor([[0.0, 0.0], [0.07, -0.03], [-0.11, 0.05]], dtype=torch.float64)
    pattern = disc(shift_mrad=shift, **CAMERA)
    # The rim's tail beyond the frame's edge at 0.8 mrad: 0.3 mrad or 3.75 rms from the rim, less 0.11 of displacement.
    torch.testing.assert_close(pattern.sum(-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=2e-3)
    centre = pattern @ pattern_axis_mrad(16, 0.1).double() / pattern.sum(-1, keepdim=True)
    torch.testing.assert_close(centre, shift, rtol=0, atol=1e-3)
    flat = disc(16, 0.1, 0.5, 0.01, torch.zeros(2, dtype=torch.float64))
    assert flat.max().item() == pytest.approx(0.1**2 / (math.pi * 0.5**2), rel=1e-3), "uniform inside"


def test_components_are_the_disc_and_its_derivatives():
    parts = disc_components(**CAMERA).double()
    step = 1e-4
    for part, direction in ((1, [step, 0.0]), (2, [0.0, step])):
        there = disc(shift_mrad=torch.tensor(direction, dtype=torch.float64), **CAMERA)
        back = disc(shift_mrad=-torch.tensor(direction, dtype=torch.float64), **CAMERA)
        torch.testing.assert_close(parts[part], (there - back) / (2 * step), rtol=0, atol=1e-6)
    torch.testing.assert_close(parts[0], disc(shift_mrad=torch.zeros(2, dtype=torch.float64), **CAMERA))


@pytest.mark.parametrize(("moved_mrad", "misplaced"), [(0.02, 2.1e-3), (0.05, 1.3e-2), (0.1, 5e-2)])
def test_the_linear_pattern_is_good_below_a_pixel(moved_mrad, misplaced):
    # The share of electrons in a wrong pixel is what the docstring says; the centre of mass has no such error.
    shift = moved_mrad * torch.tensor([0.8, 0.6], dtype=torch.float64)
    parts = disc_components(**CAMERA).double()
    linear = parts[0] + shift[0] * parts[1] + shift[1] * parts[2]
    exact = disc(shift_mrad=shift, **CAMERA)
    wrong = 0.5 * (linear - exact).abs().sum().item()
    assert 0.9 * misplaced < wrong < misplaced
    centre = linear @ pattern_axis_mrad(16, 0.1).double() / linear.sum()
    torch.testing.assert_close(centre, shift, rtol=0, atol=1e-3 * moved_mrad)


def test_abtem_moves_its_patterns_as_much():
    # A potential of 100 Å period in x and 50 in y, seen by a probe of 10 mrad (about 1.5 Å): the gradient averaged over
    # the probe is smaller by (2π σ / L)² / 2, below 1 % for its waist; its tails and the finite grid stay below 2 %.
    abtem, dask = pytest.importorskip("abtem"), pytest.importorskip("dask")
    sides, points = (100.0, 100.0), (200, 200)
    x, y = (np.arange(n) * side / n for n, side in zip(points, sides, strict=True))
    projected_v_ang = 300.0 * np.sin(2 * np.pi * x / 100)[:, None] + 80.0 * np.cos(4 * np.pi * y / 100)[None]
    positions = np.array([[10.0, 20.0], [50.0, 31.0], [3.0, 6.0], [80.0, 60.0]])
    with dask.config.set(scheduler="single-threaded"):
        potential = abtem.PotentialArray(
            projected_v_ang[None].astype(np.float32), slice_thickness=1.0, extent=sides, ensemble_axes_metadata=[]
        )
        probe = abtem.Probe(energy=200e3, semiangle_cutoff=10.0)
        probe.grid.match(potential)
        measured = probe.scan(
            potential, scan=abtem.CustomScan(positions), detectors=abtem.PixelatedDetector(max_angle=20)
        ).compute(progress_bar=False)
    pattern = np.asarray(measured.array)
    angles = [
        np.fft.fftshift(np.fft.fftfreq(n, 1 / n)) * step
        for n, step in zip(pattern.shape[-2:], measured.angular_sampling, strict=True)
    ]
    total = pattern.sum((-2, -1))
    theirs = np.stack(
        (
            (pattern * angles[0][:, None]).sum((-2, -1)) / total,
            (pattern * angles[1][None, :]).sum((-2, -1)) / total,
        ),
        axis=-1,
    )
    projected_v_nm = torch.tensor(projected_v_ang.T / 10.0)  # ours is y first
    phase = interaction_constant_rad_per_v_nm(200.0) * projected_v_nm
    moved = deflection_mrad(phase, sides[0] / points[0] / 10.0, 200.0)
    index = np.rint(positions / np.array(sides) * np.array(points)).astype(int)
    ours = moved[:, index[:, 1], index[:, 0]].T.numpy()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=0.02 * np.abs(ours).max())
