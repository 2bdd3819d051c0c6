"""Atoms placed exactly: the collected intensity does not depend on the grid, and abTEM's own projection tends to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from stem_gym.datasets.phonon_potentials import (
    exact_projection,
    interaction_parameter,
    phonon_potentials,
    potential_gpts,
)
from stem_gym.datasets.reference_specimens import held_out_specimen
from stem_gym.datasets.scattering_matrix import Beams, DetectorAnnulus, gram_matrix
from stem_gym.datasets.single_atoms import cross_section_and_width
from stem_gym.surrogates.imaging import ImagingSurrogate

abtem = pytest.importorskip("abtem")
ase = pytest.importorskip("ase")

CELL_ANG = np.array([8.0, 8.0])


def scattered_by_carbon(place_ang: float, gpts: int, integrator: Any = None) -> float:
    """Share of the incident plane wave that one carbon atom of the cell scatters into the annulus at 60 keV."""
    atoms = ase.Atoms("C", positions=[[place_ang, place_ang, 1.0]], cell=[*CELL_ANG, 2.0], pbc=True)
    settings = {} if integrator is None else {"integrator": integrator}
    potential = abtem.Potential(atoms, gpts=(gpts, gpts), slice_thickness=2.0, **settings).build(lazy=False)
    transmission = torch.from_numpy(np.exp(1j * interaction_parameter(60.0) * np.asarray(potential.array)))
    beams = Beams.inside(CELL_ANG, 0.1, 60.0, np.zeros(2))
    gram = gram_matrix(transmission.to(torch.complex64)[None], beams, CELL_ANG, 60.0, 2.0, DetectorAnnulus())
    return float(gram[0, 0].real)


def test_exact_placement_does_not_see_the_grid() -> None:
    places = [scattered_by_carbon(place, 128, exact_projection()) for place in (4.0, 4.011, 4.03)]
    finer = scattered_by_carbon(4.011, 256, exact_projection())
    assert np.ptp(places) < 0.005 * places[0]  # what is left is the aliasing of exp(iσV) at the edge of the grid
    assert places[0] == pytest.approx(finer, rel=0.01)


def test_abtems_own_projection_tends_to_the_exact_one() -> None:
    exact = scattered_by_carbon(4.011, 256, exact_projection())
    coarse, fine = (np.mean([scattered_by_carbon(p, n) for p in (4.0, 4.011, 4.03)]) for n in (128, 1024))
    assert coarse < 0.92 * exact
    assert fine == pytest.approx(exact, rel=0.015)


def test_displacements_come_in_opposite_pairs() -> None:
    specimen = held_out_specimen("graphene", np.random.default_rng(0))
    built = phonon_potentials(specimen, 60.0, 4, 1)
    again = phonon_potentials(specimen, 60.0, 4, 1)
    array = np.asarray(built.array)
    assert np.array_equal(array, np.asarray(again.array))
    # The mean of a pair has no first-order displacement: two such means differ much less than two configurations.
    pair = np.abs(array[0] + array[1] - array[2] - array[3]).mean() / 2
    single = np.abs(array[0] - array[2]).mean()
    assert pair < 0.6 * single


def test_carbon_cross_section_of_the_shipped_table() -> None:
    table = ImagingSurrogate.load().table
    section, width2 = cross_section_and_width(6, 60.0)
    assert float(table.cross_section_ang2[0, 5]) == pytest.approx(
        section, rel=0.005
    )  # the grid of the potential differs
    assert float(table.width2_ang2[0, 5]) == pytest.approx(width2, abs=5e-4)  # two steps of the search


def test_heavy_atoms_need_the_finer_grid() -> None:
    """exp(iσV) of a heavy atom folds back into the annulus on the grid that merely holds the waves."""
    coarse, usual, fine = (scattered_by(42, CELL_ANG, factor) for factor in (0.5, 1, 2))
    assert abs(coarse / fine - 1) > 0.04
    assert usual == pytest.approx(fine, rel=0.015)


def scattered_by(atomic_number: int, cell_ang: np.ndarray, factor: float) -> float:
    """Share that one atom scatters into the annulus at 60 keV, on the usual grid made finer by a factor."""
    gpts = tuple(int(n * factor) for n in potential_gpts(cell_ang, 60.0))
    atoms = ase.Atoms([atomic_number], positions=[[4.0, 4.0, 1.0]], cell=[*cell_ang, 2.0], pbc=True)
    potential = abtem.Potential(atoms, gpts=gpts, slice_thickness=2.0, integrator=exact_projection()).build(lazy=False)
    transmission = torch.from_numpy(np.exp(1j * interaction_parameter(60.0) * np.asarray(potential.array)))
    beams = Beams.inside(cell_ang, 0.1, 60.0, np.zeros(2))
    gram = gram_matrix(transmission.to(torch.complex64)[None], beams, cell_ang, 60.0, 2.0, DetectorAnnulus())
    return float(gram[0, 0].real)
