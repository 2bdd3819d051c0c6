"""Cross section and width of single atoms: python -m stem_gym.datasets.single_atoms --out DIR/single_atoms.npz

One atom at rest in an empty cell, in focus at 34 mrad. The image's Fourier coefficients divided by the probe's
transfer function are the atom's own: their value at zero is the cross section, their fall a Gaussian of this variance
per axis.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from stem_gym.datasets.abtem_images import ENERGIES_KEV
from stem_gym.datasets.phonon_potentials import (
    exact_projection,
    import_abtem,
    interaction_parameter,
    potential_gpts,
)
from stem_gym.datasets.pictures import HAADF
from stem_gym.datasets.scattering_matrix import (
    Aberrations,
    Beams,
    aperture,
    bloch_offsets,
    gram_matrix,
    image_coefficients,
)
from stem_gym.simulator.optics import Optics, transfer_function

__all__ = ["atom_response", "cross_section_and_width", "mean_over_places"]

_CELL_ANG = 10.5
_CONVERGENCE_MRAD = 34.0
_HARMONICS = 41
_HEAVIEST = 92
_VARIANCES_ANG2 = np.linspace(-0.01, 0.03, 161)


def atom_response(atomic_number: int, energy_kev: float) -> np.ndarray:
    """Fourier coefficients of one atom's image times the cell's area, in Å², centred on zero: (41, 41)."""
    abtem, ase = import_abtem()
    cell = np.array([_CELL_ANG, _CELL_ANG])
    middle = _CELL_ANG / 2
    atoms = ase.Atoms([atomic_number], positions=[[middle, middle, 1.0]], cell=[*cell, 2.0], pbc=True)
    gpts = potential_gpts(cell, energy_kev)
    potential = abtem.Potential(atoms, gpts=gpts, slice_thickness=2.0, integrator=exact_projection())
    phase = np.asarray(potential.build(lazy=False).array) * interaction_parameter(energy_kev)
    transmission = torch.from_numpy(np.exp(1j * phase).astype(np.complex64))[None]  # one configuration
    zero = np.zeros(1)
    optics = Aberrations(np.array([_CONVERGENCE_MRAD]), zero, zero, zero, zero)
    offsets, window = bloch_offsets(cell, 2 * _CELL_ANG)
    collected, total = np.zeros((_HARMONICS, _HARMONICS), complex), 0.0
    for offset in offsets:
        beams = Beams.inside(cell, _CONVERGENCE_MRAD + 1.2, energy_kev, offset)
        a = aperture(beams, optics, energy_kev, window)
        gram = gram_matrix(transmission, beams, cell, energy_kev, 2.0, HAADF)
        collected += image_coefficients(gram, beams, a, collected.shape)[0].numpy()
        total += float(np.sum(np.abs(a) ** 2))
    order = np.fft.fftshift(np.fft.fftfreq(_HARMONICS)) * _HARMONICS
    to_centre = np.exp(2j * np.pi * middle / _CELL_ANG * (order[:, None] + order[None]))
    return np.asarray((np.fft.fftshift(collected / total) * to_centre).real * cell.prod())


def mean_over_places(atomic_number: int, energy_kev: float, places: int = 8) -> float:
    """How much more an atom scatters on average over its places between grid points than on a grid point.

    The nucleus of a heavy atom is sharper than any grid; thermal motion averages over this, an atom at rest does not.
    """
    _, ase = import_abtem()
    cell = np.array([_CELL_ANG, _CELL_ANG])
    gpts = potential_gpts(cell, energy_kev)
    pixel = (float(cell[0] / gpts[0]), float(cell[1] / gpts[1]))
    normal_incidence = Beams.inside(cell, 0.01, energy_kev, np.zeros(2))
    found = []
    shifts = np.random.default_rng(0).uniform(-0.5, 0.5, (places, 2)) * pixel
    for shift in [np.zeros(2), *shifts]:
        x, y = _CELL_ANG / 2 + shift
        atom = ase.Atoms([atomic_number], positions=[[x, y, 1.0]], cell=[*cell, 2.0], pbc=True)
        phase = exact_projection().integrate_on_grid(atom, 0.0, 2.0, gpts, pixel) * interaction_parameter(energy_kev)
        transmission = torch.from_numpy(np.exp(1j * phase).astype(np.complex64))[None, None]
        gram = gram_matrix(transmission, normal_incidence, cell, energy_kev, 2.0, HAADF)
        found.append(float(gram[0, 0].real))
    return float(np.mean(found[1:])) / found[0]


def cross_section_and_width(atomic_number: int, energy_kev: float) -> tuple[float, float]:
    """Cross section in Å² and the variance per axis in Å² of the Gaussian that describes the atom best."""
    response = atom_response(atomic_number, energy_kev)
    half = _HARMONICS // 2
    k = torch.arange(-half, half + 1, dtype=torch.float32)[None] / _CELL_ANG
    optics = Optics.of(1, energy_kev=energy_kev, convergence_mrad=_CONVERGENCE_MRAD, source_fwhm_ang=0.0)
    transfer = transfer_function(optics, k, k)[0].numpy()
    square = k[0, :, None].numpy() ** 2 + k[0, None, :].numpy() ** 2
    section = float(response[half, half])
    misfit = [
        np.sum((response - section * transfer * np.exp(-2 * np.pi**2 * v * square)) ** 2) for v in _VARIANCES_ANG2
    ]
    return section * mean_over_places(atomic_number, energy_kev), float(_VARIANCES_ANG2[int(np.argmin(misfit))])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the table of single atoms.")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = np.empty((2, len(ENERGIES_KEV), _HEAVIEST))
    for row, energy in enumerate(ENERGIES_KEV):
        for number in range(1, _HEAVIEST + 1):
            table[:, row, number - 1] = cross_section_and_width(number, energy)
            print(f"{energy:.0f} keV, Z = {number} of {_HEAVIEST}: {table[0, row, number - 1]:.3e} Å²", flush=True)
    np.savez(given.out, energy_kev=np.array(ENERGIES_KEV), cross_section_ang2=table[0], width2_ang2=table[1])


if __name__ == "__main__":
    main()
