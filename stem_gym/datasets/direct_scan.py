"""The same picture by abTEM's own scan, probe by probe.

What the scattering-matrix contraction is checked and timed against.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stem_gym.datasets.abtem_images import reference_coefficients
from stem_gym.datasets.phonon_potentials import import_abtem, phonon_potentials
from stem_gym.datasets.pictures import Picture
from stem_gym.datasets.scattering_matrix import Aberrations, bloch_offsets, wavelength_ang

__all__ = ["abtem_scan", "contracted_scan", "scan_shape"]


def scan_shape(picture: Picture, setting: int) -> tuple[int, int]:
    """Fewest probe places (nx, ny) that hold the whole picture: the Nyquist rate of the band limit 2α/λ."""
    limit = 2e-3 * picture.optics.convergence_mrad[setting] / wavelength_ang(picture.settings.energy_kev)
    nx, ny = (2 * int(np.ceil(limit * side)) + 1 for side in picture.specimen.cell_ang)
    return nx, ny


def abtem_scan(picture: Picture, setting: int, configurations: int, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Collected fraction (nx, ny) by `abtem.Probe.scan` on the tiled cell, mean over phonon configurations."""
    abtem, _ = import_abtem()
    specimen, settings, optics = picture.specimen, picture.settings, picture.optics
    cell = specimen.cell_ang
    _, window = bloch_offsets(cell, settings.window_ang)
    tiles = np.round(window / cell).astype(int)
    potential = phonon_potentials(specimen, settings.energy_kev, configurations, settings.seed)
    pixel = tuple(cell / np.array(potential.array.shape[-2:]))
    probe = abtem.Probe(
        energy=settings.energy_kev * 1e3,
        semiangle_cutoff=optics.convergence_mrad[setting],
        aberrations={
            "C10": -(optics.defocus_ang[setting] + specimen.mid_plane_ang),
            "C12": optics.astigmatism_ang[setting],
            "phi12": optics.astigmatism_angle_rad[setting],
            "C30": optics.c3_mm[setting] * 1e7,
        },
    )
    detector = abtem.AnnularDetector(settings.annulus.inner_mrad, settings.annulus.outer_mrad)
    places = abtem.GridScan((0, 0), tuple(cell), gpts=shape or scan_shape(picture, setting), endpoint=False)
    total = np.zeros(1)
    for one in np.asarray(potential.array):
        tiled = np.tile(one, (1, *tiles))
        slices = abtem.PotentialArray(tiled, slice_thickness=specimen.slice_ang, sampling=pixel)
        total = total + np.asarray(probe.scan(slices, scan=places, detectors=detector, lazy=False).array).squeeze()
    return np.asarray(total) / configurations


def contracted_scan(picture: Picture, setting: int, configurations: int, shape: tuple[int, ...]) -> np.ndarray:
    """The same (nx, ny) from the contraction, with the same phonon configurations."""
    optics = Aberrations(**{name: values[[setting]] for name, values in vars(picture.optics).items()})
    settings = replace(picture.settings, configurations=configurations, shared=False)
    coefficients = reference_coefficients(picture.specimen, settings, optics).mean(axis=0)[0]
    orders = [np.round(np.fft.fftfreq(n) * n) for n in coefficients.shape]
    along_y, along_x = (
        np.exp(2j * np.pi * np.outer(np.arange(n) / n, order)) for n, order in zip(shape[::-1], orders, strict=True)
    )
    return np.asarray((along_y @ coefficients @ along_x.T).real.T)
