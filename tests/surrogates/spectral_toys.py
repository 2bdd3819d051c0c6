"""Made-up specimens of spectra whose law is known: bright blobs whose middle and rim have spectra of their own."""

from __future__ import annotations

import numpy as np
import torch

from stem_gym.simulator.spectral_specimen import SpectralSpecimen


def blobs(seed: int, count: int, side: int = 32, channels: int = 40) -> SpectralSpecimen:
    """Spectrum = background + thickness × line + steepness × another line, at energies that differ by specimen."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    centre = rng.uniform(0, 1, (count, 8, 2, 1, 1))
    width = rng.uniform(0.04, 0.09, (count, 8, 1, 1))
    square = (x - centre[:, :, 0]) ** 2 + (y - centre[:, :, 1]) ** 2
    thickness = np.exp(-0.5 * square / width**2).sum(1)
    slope = np.hypot(*np.gradient(thickness, axis=(1, 2)))
    energy = np.linspace(0, 1, channels)
    place = np.stack((rng.uniform(0.2, 0.35, count), rng.uniform(0.6, 0.75, count)), 1)[..., None]
    lines = np.exp(-0.5 * ((energy - place) / 0.06) ** 2)
    background = np.broadcast_to(0.2 * (0.2 + energy) ** -1.5, (count, 1, channels))
    loadings = np.stack((np.ones_like(slope), thickness, 6.0 * slope), -1).reshape(count, side * side, 3)
    image, components = 0.01 + 0.05 * thickness, np.concatenate((background, lines), axis=1)
    return SpectralSpecimen(*(torch.from_numpy(part.astype(np.float32)) for part in (image, loadings, components)))
