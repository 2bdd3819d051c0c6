"""abTEM potentials of a thermally displaced specimen, with the atoms placed exactly."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from scipy.fft import next_fast_len

from stem_gym.core.errors import missing_extra
from stem_gym.datasets.reference_specimens import ReferenceSpecimen
from stem_gym.datasets.scattering_matrix import wavelength_ang

__all__ = ["exact_projection", "import_abtem", "interaction_parameter", "phonon_potentials", "potential_gpts"]

_LARGEST_ANGLE_MRAD = 238.0  # a beam at 36 mrad scattered across to 200 mrad on the other side
# Waves are followed on the grid that holds this angle; exp(iσV) is taken on one twice as fine. On the coarse grid its
# own harmonics fold back into the annulus: the cross section of Mo or Pt is then wrong by up to 25 %, here by 1 %.
FINER = 2


def import_abtem() -> tuple[ModuleType, ModuleType]:
    """The modules abtem and ase. Raises MissingExtraError when they are not installed."""
    try:
        import abtem
        import abtem.integrals
        import ase
    except ImportError as error:
        raise missing_extra("Making abTEM reference pictures", "physics") from error
    return abtem, ase


def interaction_parameter(energy_kev: float) -> float:
    """abTEM's interaction parameter in 1/(Å eV): phase shift per projected potential."""
    abtem, _ = import_abtem()
    return float(abtem.core.energy.energy2sigma(energy_kev * 1e3))


@cache
def exact_projection() -> Any:
    """An abTEM integrator that places atoms exactly, by the phase of their structure factor.

    abTEM's own infinite projection spreads each atom over the four nearest pixels. In an annulus of 80 to 200 mrad
    that loses several percent of the scattered intensity at the usual pixels of 0.05 to 0.07 Å, by an amount that
    depends on where the atom lies on the grid. Placed exactly, the result does not depend on the grid: it is the
    limit that abTEM's own integrator approaches on ever finer pixels (`tests/datasets/test_phonon_potentials.py`).
    """
    abtem, ase = import_abtem()
    base: Any = abtem.integrals.ScatteringFactorProjectionIntegrals

    class ExactProjection(base):
        def integrate_on_grid(
            self,
            atoms: Any,
            a: float,
            b: float,
            gpts: tuple[int, int],
            sampling: tuple[float, float],
            device: str = "cpu",
        ) -> np.ndarray:
            kx, ky = (np.fft.fftfreq(n, pixel) for n, pixel in zip(gpts, sampling, strict=True))
            spectrum = np.zeros(gpts, dtype=complex)
            for number in np.unique(atoms.numbers):
                x, y = atoms.positions[atoms.numbers == number, :2].T
                structure = np.exp(-2j * np.pi * np.outer(kx, x)) @ np.exp(-2j * np.pi * np.outer(y, ky))
                factor = self.get_scattering_factor(ase.data.chemical_symbols[number], gpts, sampling, device)
                spectrum += structure * factor
            return np.asarray(np.fft.ifft2(spectrum).real / (sampling[0] * sampling[1]), dtype=np.float32)

    return ExactProjection()


def potential_gpts(cell_ang: np.ndarray, energy_kev: float) -> tuple[int, int]:
    """Points (x, y) of the grid on which potentials are built."""
    pixel_ang = wavelength_ang(energy_kev) / (2 * _LARGEST_ANGLE_MRAD * 1e-3) * 2 / 3
    nx, ny = (FINER * next_fast_len(int(np.ceil(side / pixel_ang))) for side in cell_ang)
    return nx, ny


def phonon_potentials(specimen: ReferenceSpecimen, energy_kev: float, configurations: int, seed: int) -> Any:
    """abTEM's potential of all phonon configurations: a PotentialArray of shape (configurations, slices, 2 nx, 2 ny).

    Einstein model, isotropic Gaussian displacements, as in `abtem.FrozenPhonons`; but every second configuration has
    the opposite displacements of the one before it. Such pairs have the same expectation and cancel the noise of
    first order.
    """
    abtem, ase = import_abtem()
    height_ang = (specimen.layer.max() + 1) * specimen.slice_ang
    z_ang = (specimen.layer + 0.5) * specimen.slice_ang
    resting = np.column_stack([specimen.xy_ang, z_ang])
    rng = np.random.default_rng([seed, 77])
    drawn = rng.normal(size=(configurations // 2, *resting.shape)) * specimen.thermal_sigma_ang[:, None]
    displaced = [resting + sign * step for step in drawn for sign in (1, -1)]
    cell = [*specimen.cell_ang, height_ang]
    thermal = [ase.Atoms(numbers=specimen.atomic_number, positions=xyz, cell=cell, pbc=True) for xyz in displaced]
    gpts = potential_gpts(specimen.cell_ang, energy_kev)
    return abtem.Potential(
        abtem.AtomsEnsemble(thermal),
        gpts=gpts,
        slice_thickness=specimen.slice_ang,
        integrator=exact_projection(),
    ).build(lazy=False)
