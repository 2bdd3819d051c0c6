"""Exact contraction of abTEM's frozen-phonon multislice into STEM image coefficients.

A STEM picture of a periodic specimen needs one multislice run per probe place and phonon configuration. The same
numbers come much faster from the scattering matrix (Ophus, Adv. Struct. Chem. Imaging 3, 13, 2017): each plane wave
of the aperture is propagated once, and the detected intensity is a quadratic form in the aperture coefficients. Its
matrix, the Gram matrix of the scattered waves over the annulus, holds the picture for *every* defocus and aberration
at once.

A probe must not see its own periodic copies, so the aperture has to be sampled finer than the reciprocal lattice of
the cell. Plane waves whose wave vectors differ by less than a reciprocal lattice vector scatter to different detector
places and never interfere, so that an n × n tiled window costs n² small runs ("Bloch offsets") in place of one n²
times larger, and gives exactly what abTEM gives for the tiled cell. `tests/datasets/test_abtem_images.py` checks this
against `abtem.Probe.scan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

__all__ = [
    "Aberrations",
    "Beams",
    "DetectorAnnulus",
    "aperture",
    "bloch_offsets",
    "gram_matrix",
    "image_coefficients",
    "wavelength_ang",
]

_ANTIALIAS = 2.0 / 3.0  # abTEM's band limit as a fraction of the Nyquist frequency


def wavelength_ang(energy_kev: float) -> float:
    """Relativistic electron wavelength in Å (Kirkland, Advanced Computing in Electron Microscopy, eq. 2.5)."""
    return 12.3984244 / np.sqrt(energy_kev * (2 * 510.99895 + energy_kev))


@dataclass(frozen=True)
class DetectorAnnulus:
    """An annular detector, semi-angles in mrad."""

    inner_mrad: float = 80.0
    outer_mrad: float = 200.0


@dataclass(frozen=True)
class Aberrations:
    """Optics of M pictures of one specimen.

    Every field (M,). Positive defocus focuses below the specimen's middle plane.
    """

    convergence_mrad: np.ndarray
    defocus_ang: np.ndarray
    astigmatism_ang: np.ndarray
    astigmatism_angle_rad: np.ndarray
    c3_mm: np.ndarray

    def __len__(self) -> int:
        return len(self.convergence_mrad)


@dataclass(frozen=True)
class Beams:
    """The plane waves of one Bloch offset that may lie inside the aperture."""

    index: np.ndarray  # (n, 2) whole reciprocal-lattice numbers (mx, my)
    wave_vector: np.ndarray  # (n, 2) 1/Å, offset included
    offset: np.ndarray  # (2,) 1/Å

    @classmethod
    def inside(cls, cell_ang: np.ndarray, cutoff_mrad: float, energy_kev: float, offset: np.ndarray) -> Beams:
        """All beams of this offset (in units of the reciprocal cell, (2,)) below the cutoff angle."""
        k_max = cutoff_mrad * 1e-3 / wavelength_ang(energy_kev)
        reach = np.ceil(k_max * cell_ang).astype(int) + 1
        mx, my = np.meshgrid(np.arange(-reach[0], reach[0] + 1), np.arange(-reach[1], reach[1] + 1), indexing="ij")
        index = np.stack([mx.ravel(), my.ravel()], axis=1)
        wave_vector = (index + offset) / cell_ang
        keep = np.hypot(*wave_vector.T) <= k_max
        return cls(index[keep], wave_vector[keep], offset / cell_ang)


def bloch_offsets(cell_ang: np.ndarray, window_ang: float) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (n, 2) in reciprocal-cell units that tile the cell to at least `window_ang`, and the window (2,) in Å."""
    tiles = np.ceil(window_ang / cell_ang - 1e-6).astype(int)
    ox, oy = np.meshgrid(np.arange(tiles[0]) / tiles[0], np.arange(tiles[1]) / tiles[1], indexing="ij")
    return np.stack([ox.ravel(), oy.ravel()], axis=1), tiles * cell_ang


def gram_matrix(
    transmission: torch.Tensor,
    beams: Beams,
    cell_ang: np.ndarray,
    energy_kev: float,
    slice_ang: float,
    annulus: DetectorAnnulus,
) -> torch.Tensor:
    """Gram matrix (n, n) of the waves scattered into the annulus, per unit beam, mean over configurations.

    `transmission` (configurations, slices, nx, ny) complex is abTEM's transmission function. Each slice acts at its
    entrance plane and is followed by free flight over `slice_ang`; flight after the last slice changes no detected
    intensity.
    """
    nx, ny = transmission.shape[-2:]
    k = [
        np.fft.fftfreq(n, length / n) + o for n, length, o in zip((nx, ny), cell_ang, beams.offset, strict=True)
    ]  # 1/Å
    angle_mrad = np.hypot(k[0][:, None], k[1][None]) * wavelength_ang(energy_kev) * 1e3
    detected = np.flatnonzero((angle_mrad >= annulus.inner_mrad) & (angle_mrad < annulus.outer_mrad))
    if transmission.shape[1] == 1:
        scattered = _shifted_spectra(torch.fft.fft2(transmission[:, 0]) / (nx * ny), beams.index, detected)
    else:
        flight = np.exp(-1j * np.pi * slice_ang * 1e-3 * angle_mrad**2 * 1e-3 / wavelength_ang(energy_kev))
        flight[~band_limit(k, cell_ang)] = 0
        through = torch.from_numpy(flight.astype(np.complex64))
        scattered = torch.cat([_multislice(one, beams.index, through, detected) for one in transmission], dim=1)
    return _hermitian_product(scattered) / len(transmission)


def _hermitian_product(rows: torch.Tensor, blocks: int = 5) -> torch.Tensor:
    """rows · rows^†, (n, n), from the blocks on and below the diagonal alone."""
    edges = np.linspace(0, len(rows), blocks + 1).astype(int)
    out = rows.new_zeros(len(rows), len(rows))
    for start, stop in pairwise(edges.tolist()):
        strip = rows[start:] @ rows[start:stop].conj().T
        out[start:, start:stop] = strip
        out[start:stop, stop:] = strip[stop - start :].conj().T
    return out


def band_limit(k: list[np.ndarray], cell_ang: np.ndarray) -> np.ndarray:
    """Mask (nx, ny) of the frequencies that abTEM keeps: 2/3 of the Nyquist frequency of the coarser axis."""
    nyquist = min(len(axis) / length for axis, length in zip(k, cell_ang, strict=True)) / 2
    return np.hypot(k[0][:, None], k[1][None]) < _ANTIALIAS * nyquist


def _shifted_spectra(spectra: torch.Tensor, index: np.ndarray, detected: np.ndarray) -> torch.Tensor:
    """Thin slices: a beam's exit wave is a slice's spectrum (configurations, nx, ny) moved by the beam.

    Gives the detected pixels of all configurations side by side, (n, configurations × pixels).
    """
    nx, ny = spectra.shape[-2:]
    x, y = np.divmod(detected, ny)
    place = ((x[None] - index[:, :1]) % nx) * ny + (y[None] - index[:, 1:]) % ny
    flat = torch.from_numpy(place.ravel())
    return torch.cat([spectrum.reshape(-1)[flat].reshape(place.shape) for spectrum in spectra], dim=1)


def _multislice(
    transmission: torch.Tensor, index: np.ndarray, flight: torch.Tensor, detected: np.ndarray, chunk: int = 8
) -> torch.Tensor:
    """Several slices: transmit and fly, a few beams at a time so that they stay in the cache; (n, detected pixels)."""
    nx, ny = flight.shape
    at = torch.from_numpy(detected)
    tiled = (torch.fft.fft2(transmission[0]) / (nx * ny)).repeat(
        2, 2
    )  # a window of it is the spectrum moved by one beam
    corners = np.stack([-index[:, 0] % nx, -index[:, 1] % ny], axis=1)
    out = []
    for start in range(0, len(index), chunk):
        wave = torch.stack([tiled[x : x + nx, y : y + ny] for x, y in corners[start : start + chunk]])
        for layer in transmission[1:]:
            wave = torch.fft.fft2(torch.fft.ifft2(wave * flight) * layer)
        out.append(wave.reshape(len(wave), -1)[:, at])
    return torch.cat(out)


def aperture(beams: Beams, optics: Aberrations, energy_kev: float, window_ang: np.ndarray) -> np.ndarray:
    """Complex aperture coefficients (M, n), not normalised.

    AbTEM's soft edge of one window pixel, exp(−iχ) of Kirkland eq. 2.10.
    """
    wavelength = wavelength_ang(energy_kev)
    alpha = np.hypot(*beams.wave_vector.T) * wavelength  # (n,)
    azimuth = np.arctan2(beams.wave_vector[:, 1], beams.wave_vector[:, 0])
    pixel = np.hypot(np.cos(azimuth) * wavelength / window_ang[0], np.sin(azimuth) * wavelength / window_ang[1])
    inside = np.clip((optics.convergence_mrad[:, None] * 1e-3 - alpha) / pixel + 0.5, 0, 1)
    turn = np.cos(2 * (azimuth - optics.astigmatism_angle_rad[:, None]))
    second_order = (-optics.defocus_ang[:, None] + optics.astigmatism_ang[:, None] * turn) * alpha**2 / 2
    fourth_order = optics.c3_mm[:, None] * 1e7 * alpha**4 / 4
    return inside * np.exp(-2j * np.pi / wavelength * (second_order + fourth_order))


def image_coefficients(
    gram: torch.Tensor, beams: Beams, aperture_coefficients: np.ndarray, shape: tuple[int, int]
) -> torch.Tensor:
    """This offset's share of the image's Fourier coefficients (M, ny, nx), not yet divided by the probe's intensity.

    The collected intensity at probe place p is Σ_bb' a_b a*_b' G_bb' exp(−2πi (k_b − k_b')·p), so that the pair (b, b')
    belongs to the harmonic h = m_b' − m_b.
    """
    harmonic = beams.index[None, :, :] - beams.index[:, None, :]  # (n, n, 2)
    place = torch.from_numpy((harmonic[..., 1] % shape[0]) * shape[1] + harmonic[..., 0] % shape[1]).reshape(-1)
    a = torch.from_numpy(aperture_coefficients).to(torch.complex64)
    out = torch.zeros(len(a), shape[0] * shape[1], dtype=torch.complex128)
    for m in range(len(a)):
        pairs = (a[m][:, None] * a[m].conj()[None] * gram).reshape(-1).to(torch.complex128)
        out[m].index_add_(0, place, pairs)
    return out.reshape(len(a), *shape)
