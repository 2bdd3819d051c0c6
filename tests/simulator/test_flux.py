"""Electrons on an atom: the table against the probe itself, against published figures, and bounds that do bound."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stem_gym.simulator.flux import REACH_ANG, STEP_ANG, FluxTable, density_at, highest_lattice_sum
from stem_gym.simulator.optics import FWHM_PER_SIGMA, Optics, probe_intensity

BOND_ANG = 1.42
THERMAL_ANG = 0.0018**0.5  # in the plane, at 300 K
SETTINGS = ({}, {"focal_spread_ang": 40.0}, {"defocus_ang": 60.0, "c3_mm": 0.01}, {"source_fwhm_ang": 0.3})


def table(spread_ang: float = 0.0, thermal_ang: float = THERMAL_ANG, **optics: Any) -> FluxTable:
    """60 keV, 34 mrad and 0.7 Å of source, unless told otherwise."""
    return FluxTable.of(Optics.of(1, **optics), spread_ang, thermal_ang)


def on_circle(optics: Optics, distance_ang: float) -> Tensor:
    """The probe's own density at 64 places on a circle about its centre."""
    angle = torch.linspace(0.0, 2.0 * math.pi, 65)[:-1]
    ring = distance_ang * torch.stack((torch.cos(angle), torch.sin(angle)), dim=-1)
    return probe_intensity(optics, ring.unsqueeze(0))[0]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_table_is_the_density_of_the_probe_itself(settings):
    """Straight lines between points 0.05 Å apart leave f'' h² / 8: a part in a hundred of a peak at the narrowest."""
    given = Optics.of(1, **settings)
    smeared = math.hypot(float(given.source_fwhm_ang), THERMAL_ANG * FWHM_PER_SIGMA)
    optics = Optics.of(1, **settings | {"source_fwhm_ang": smeared})
    density = table(**settings).density
    for distance in (0.0, 0.31, 0.5, 1.013, BOND_ANG, 2.46, 5.037):
        direct = on_circle(optics, distance)
        assert direct.max() - direct.min() < 1e-4, "a round probe"
        given_there = float(density_at(density, torch.tensor([[distance]])))
        assert given_there == pytest.approx(float(direct.mean()), abs=3e-3 * float(density[0, 0])), distance


def test_thermal_motion_is_the_same_as_a_wider_source():
    """Both are Gaussians: 0.7 Å of source and 0.1 Å rms make a source of the root of the sum of the squares."""
    wide = table(thermal_ang=0.0, source_fwhm_ang=math.hypot(0.7, 0.1 * FWHM_PER_SIGMA))
    assert torch.allclose(table(thermal_ang=0.1).density, wide.density, atol=1e-6)


def test_the_figures_of_the_ideal_probe():
    """60 keV, 34 mrad, 0.7 Å of source: 0.79 /Å² at the peak; of it 0.49 at 0.5 Å, 0.06 at 1 Å, 0.014 at the bond."""
    density = table().density
    assert float(density[0, 0]) == pytest.approx(0.79, abs=0.005)
    relative = density_at(density, torch.tensor([[0.5, 1.0, BOND_ANG]]))[0] / density[0, 0]
    assert relative.tolist() == [
        pytest.approx(0.49, abs=0.005), pytest.approx(0.06, abs=0.005), pytest.approx(0.014, abs=5e-4),
    ]  # fmt: skip
    chromatic = table(focal_spread_ang=40.0).density
    far = density_at(chromatic, torch.tensor([[BOND_ANG]]))[0] / chromatic[0, 0]
    assert float(far) > 3.0 * float(relative[2]), "chromatic tails raise the far part several times"


@pytest.mark.parametrize("settings", SETTINGS)
def test_almost_every_electron_is_within_the_reach(settings):
    """The tail of a sharp aperture falls with the cube of the distance: a few electrons in a hundred are beyond."""
    density = table(**settings).density[0]
    distance = torch.arange(len(density)) * STEP_ANG
    assert float(distance[-1]) == pytest.approx(REACH_ANG)
    inside = float(torch.trapezoid(2.0 * math.pi * distance * density, distance))
    assert 0.96 < inside < 1.0


def test_beyond_the_reach_there_is_nothing():
    density = table().density
    assert density_at(density, torch.tensor([[REACH_ANG, REACH_ANG + 1.0, 1e6]])).eq(0.0).all()
    assert density_at(density, torch.tensor([[REACH_ANG - 1e-3]])) > 0.0


@pytest.mark.parametrize("settings", [{}, {"source_fwhm_ang": 0.0}, {"focal_spread_ang": 40.0}, {"defocus_ang": 80.0}])
def test_the_lattice_sum_is_bounded_and_the_bound_is_tight(settings):
    """Beams anywhere over a patch of honeycomb that is made here in another way, by its three bonds."""
    density = table(**settings).density
    bound = highest_lattice_sum(density, BOND_ANG)
    turn = torch.arange(3) * (2.0 * math.pi / 3.0) + 0.4
    bonds = BOND_ANG * torch.stack((torch.cos(turn), torch.sin(turn)), dim=-1)
    steps = torch.cartesian_prod(torch.arange(-9.0, 10.0), torch.arange(-9.0, 10.0))
    corners = steps @ torch.stack((bonds[0] - bonds[1], bonds[1] - bonds[2]))
    atoms = torch.cat((corners, corners + bonds[0]))
    beams = 4.0 * torch.rand(4000, 2, generator=torch.Generator().manual_seed(1)) - 2.0
    distance = torch.cdist(torch.cat((beams, atoms[atoms.norm(dim=1) < 3.0])), atoms).unsqueeze(0)
    highest = float(density_at(density, distance).sum(-1).max())
    assert highest <= bound <= 1.05 * highest


# Defocus


def test_a_table_without_spread_has_one_rung():
    one = table(defocus_ang=30.0)
    assert one.defocus_ang.tolist() == [30.0]
    assert torch.equal(one.rows(torch.tensor([0.0, 99.0])), one.density.expand(2, -1))


def test_the_ladder_interpolates_between_its_rungs_and_holds_beyond():
    """At any defocus within five spreads the row is that of a table made there; a rung adds 0.3 %."""
    ladder = table(8.0, defocus_ang=10.0)
    assert ladder.defocus_ang[0] == -30.0 and ladder.defocus_ang[-1] == 50.0
    wanted = torch.tensor([10.0, -28.3, 17.7, 44.4])
    rows = ladder.rows(wanted)
    for row, defocus in zip(rows, wanted.tolist(), strict=True):
        direct = table(defocus_ang=defocus).density[0]
        assert (row - direct).abs().max() < 3e-3 * direct.max(), defocus
    ends = ladder.rows(torch.tensor([-500.0, 500.0]))
    assert torch.allclose(ends, ladder.density[[0, -1]], atol=2e-3)


def test_defocus_of_either_sign_lowers_an_ideal_probe_alike():
    rows = table(10.0).rows(torch.tensor([-40.0, 0.0, 40.0]))
    assert torch.allclose(rows[0], rows[2], atol=1e-5)
    assert rows[1, 0] > 1.2 * rows[0, 0]


def test_rows_of_a_batch_keep_to_themselves():
    ladder = table(8.0)
    rows = ladder.rows(torch.tensor([-20.0, 5.0, 13.0]))
    distance = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(2)) * 9.0
    whole = density_at(rows, distance)
    assert whole.shape == distance.shape
    for row in range(3):
        assert torch.equal(whole[row], density_at(rows[row : row + 1], distance[row : row + 1])[0])
