"""Cross sections and the scale of images against quadrature, Rutherford's law and abTEM."""

import math

import numpy as np
import pytest
import torch

from stem_gym.simulator.harmonics import Harmonics
from stem_gym.simulator.imaging import atom_weights_ang2, image_coefficients, image_grid, structure_coefficients
from stem_gym.simulator.optics import Optics, transfer_function
from stem_gym.simulator.scattering import haadf_cross_section_ang2
from stem_gym.simulator.specimens import specimen_from_atoms


def test_cross_section_is_the_integral_of_the_screened_born_amplitude():
    # Quadrature of the defining integral; its closed form must agree to rounding.
    energy, inner, outer = 60.0, 80.0, 200.0
    for number in (6, 14, 79):
        theta = np.linspace(inner * 1e-3, outer * 1e-3, 20001)
        wavelength = 0.0486604  # at 60 keV
        q = 4 * math.pi / wavelength * np.sin(theta / 2)
        radius = 0.88534 * 0.529177210903 * number ** (-1 / 3)
        gamma = 1 + energy / 510.99895
        weights, decays = (0.10, 0.55, 0.35), (6.0, 1.2, 0.3)
        screened = sum(w / (q**2 + (d / radius) ** 2) for w, d in zip(weights, decays, strict=True))
        amplitude = 2 * gamma * number / 0.529177210903 * screened
        born = np.trapezoid(amplitude**2 * 2 * math.pi * np.sin(theta), theta)
        eta = number / 137.035999 / math.sqrt(1 - gamma**-2)
        expected = born * 1.146 / (1 + 0.670 * eta**2)
        ours = haadf_cross_section_ang2(torch.tensor(number), torch.tensor(energy).double(), inner, outer)
        assert ours.item() == pytest.approx(expected, rel=1e-4)  # the wavelength has six digits


def test_cross_section_of_a_wide_annulus_at_high_angle_is_rutherfords():
    # Beyond screening f = 2 gamma Z / (a0 q^2): sigma = pi (2 gamma Z / a0 k)^2 (1 / q1^2 - 1 / q2^2), here within 4 %:
    # carbon's screening at 0.4 rad.
    energy = torch.tensor(60.0, dtype=torch.float64)
    ours = haadf_cross_section_ang2(torch.tensor(6), energy, 400.0, 1200.0)
    k, gamma = 2 * math.pi / 0.0486604, 1 + 60 / 510.99895
    q1, q2 = 2 * k * math.sin(0.2), 2 * k * math.sin(0.6)
    rutherford = math.pi * (2 * gamma * 6 / 0.529177 / k) ** 2 * (q1**-2 - q2**-2)
    eta = 6 / 137.036 / math.sqrt(1 - gamma**-2)
    assert ours.item() / 1.146 * (1 + 0.67 * eta**2) == pytest.approx(rutherford, rel=0.04)


# Mean of abTEM 1.0 images times the cell's area: one atom at rest, infinite projection, Lobato's potentials, 34 mrad,
# 80 to 200 mrad, sampling 0.045 Å on 8 Å.
ABTEM_ANG2 = {
    (6, 60.0): 7.957e-4,
    (14, 60.0): 3.904e-3,
    (42, 60.0): 2.172e-2,
    (79, 60.0): 4.254e-2,
    (6, 80.0): 4.846e-4,
    (16, 80.0): 3.075e-3,
    (74, 80.0): 2.925e-2,
    (5, 100.0): 2.401e-4,
    (24, 100.0): 4.431e-3,
    (47, 100.0): 1.293e-2,
}


def test_cross_sections_stay_within_five_per_cent_of_abtem():
    number, energy = (torch.tensor(v) for v in zip(*ABTEM_ANG2, strict=True))
    ours = haadf_cross_section_ang2(number, energy, 80.0, 200.0)
    torch.testing.assert_close(ours, torch.tensor(list(ABTEM_ANG2.values())), rtol=0.05, atol=0)


def test_graphene_with_silicon_agrees_with_abtem():
    # Multislice of atoms at rest on a small cell, against the incoherent image of the same atoms. The shape agrees to a
    # residual of 1 % (cross-talk of neighbours); the scale is 0.88 of that of free atoms, since in a lattice at rest
    # the scattering beyond 80 mrad still interferes.
    abtem, build = pytest.importorskip("abtem"), pytest.importorskip("ase.build")
    dask = pytest.importorskip("dask")
    atoms = build.graphene(a=2.46, size=(1, 1, 1), vacuum=2.0)
    atoms = abtem.orthogonalize_cell(atoms) * (3, 2, 1)
    atoms.numbers[5] = 14
    with dask.config.set(scheduler="single-threaded"):
        potential = abtem.Potential(atoms, sampling=0.06, slice_thickness=4.0)
        probe = abtem.Probe(energy=60e3, semiangle_cutoff=34)
        probe.grid.match(potential)
        sides = np.diag(atoms.cell)[:2]
        points = [math.ceil(side * 1.42) * 2 for side in sides]
        scan = abtem.GridScan((0, 0), sides, gpts=points, endpoint=False)
        measured = probe.scan(potential, scan=scan, detectors=abtem.AnnularDetector(80, 200)).compute(
            progress_bar=False
        )
    theirs = torch.tensor(measured.array.T.copy())[None]  # abTEM is x first
    specimen = specimen_from_atoms(atoms, thermal_sigma_ang=0.0)
    optics = Optics.of(1, source_fwhm_ang=0.0)
    harmonics = Harmonics.within((sides[0], sides[1]), float(optics.band_limit_per_ang))
    weight = atom_weights_ang2(specimen, optics.energy_kev, 80.0, 200.0)
    structure = structure_coefficients(specimen, weight, harmonics)
    transfer = transfer_function(optics, *harmonics.frequencies(specimen.cell_ang))
    ours = image_grid(image_coefficients(structure, transfer), points[1], points[0])
    scale = (ours * theirs).sum() / (ours**2).sum()
    residual = ((scale * ours - theirs) ** 2).sum() / ((theirs - theirs.mean()) ** 2).sum()
    assert residual.item() < 0.01
    assert scale.item() == pytest.approx(0.88, abs=0.05)
