"""Reference pictures in the form the surrogate and the physics model take, and the scores of estimates against them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stem_gym.core.errors import RecordError
from stem_gym.datasets.pictures import Picture, load_picture
from stem_gym.simulator.optics import FWHM_PER_SIGMA, Optics
from stem_gym.simulator.specimens import Specimen

__all__ = ["Scores", "load_set", "optics_of", "reference_map", "score", "specimen_of"]

INTERVAL_FACTOR = 1.645  # two-sided 90 % of a normal distribution


def load_set(folder: Path, split: str) -> dict[str, Picture]:
    """All pictures of one split by file name. Raises RecordError when there are none."""
    pictures = {path.stem: load_picture(path) for path in sorted(folder.glob(f"{split}-*.npz"))}
    if not pictures:
        raise RecordError(
            f"{folder} holds no {split!r} pictures. Make them: python -m stem_gym.datasets.abtem_images --out {folder}"
        )
    return pictures


def specimen_of(picture: Picture) -> Specimen:
    """The picture's specimen, once for each of its M settings of the optics."""
    given, rows = picture.specimen, len(picture.optics)
    count = len(given.layer)

    def spread(values: np.ndarray, *shape: int) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32).expand(rows, *shape)

    return Specimen(
        cell_ang=spread(given.cell_ang, 2),
        xy_ang=spread(given.xy_ang, count, 2),
        atomic_number=torch.as_tensor(given.atomic_number, dtype=torch.int64).expand(rows, count),
        present=torch.ones(rows, count, dtype=torch.bool),
        thermal_sigma_ang=spread(given.thermal_sigma_ang, count),
        blob_xy_ang=torch.zeros(rows, 0, 2),
        blob_sigma_ang=torch.zeros(rows, 0),
        blob_weight_ang2=torch.zeros(rows, 0),
    )


def optics_of(picture: Picture, source_fwhm_ang: float = 0.0) -> Optics:
    """The picture's M settings of the optics with one source size."""
    given: dict[str, Any] = {
        name: torch.as_tensor(value, dtype=torch.float32) for name, value in vars(picture.optics).items()
    }
    energy_kev = picture.settings.energy_kev
    return Optics.of(len(picture.optics), energy_kev=energy_kev, source_fwhm_ang=source_fwhm_ang, **given)


def reference_map(picture: Picture, shape: tuple[int, int], source_fwhm_ang: float = 0.0) -> Tensor:
    """abTEM's expected collected fraction on a pixel grid: (M, ny, nx)."""
    coefficients = picture.coefficients.astype(np.complex128)
    orders = [np.round(np.fft.fftfreq(n) * n).astype(int) for n in coefficients.shape[1:]]
    kept = [np.flatnonzero(np.abs(order) < n / 2) for order, n in zip(orders, shape, strict=True)]
    ky, kx = (o[k] / side for o, k, side in zip(orders, kept, picture.specimen.cell_ang[::-1], strict=True))
    damping = np.exp(-2 * np.pi**2 * (source_fwhm_ang / FWHM_PER_SIGMA) ** 2 * (ky[:, None] ** 2 + kx[None] ** 2))
    spectrum = np.zeros((len(coefficients), *shape), complex)
    places = [o[k] % n for o, k, n in zip(orders, kept, shape, strict=True)]
    spectrum[:, places[0][:, None], places[1]] = coefficients[:, kept[0][:, None], kept[1]] * damping
    return torch.from_numpy(np.fft.ifft2(spectrum, norm="forward").real.astype(np.float32))


@dataclass(frozen=True)
class Scores:
    """Sums over the pixels of M pictures of one specimen; add them up, then read off R² and coverage."""

    error: float  # Σ (estimate − reference)²
    variance: float  # Σ (reference − that picture's mean)²
    noise: float  # the part of `error` that is the reference's own phonon noise
    covered: float  # pixels inside the 90 % interval
    pixels: int
    worst: float  # lowest R² of a single picture

    def __add__(self, other: Scores) -> Scores:
        return Scores(
            self.error + other.error,
            self.variance + other.variance,
            self.noise + other.noise,
            self.covered + other.covered,
            self.pixels + other.pixels,
            min(self.worst, other.worst),
        )

    @property
    def r2(self) -> float:
        """Share of the reference's variance about each picture's mean that the estimate explains."""
        return 1 - self.error / self.variance

    @property
    def coverage(self) -> float:
        """Share of pixels inside the 90 % interval."""
        return self.covered / self.pixels

    @property
    def noise_share(self) -> float:
        """What the reference's own noise takes from R²."""
        return self.noise / self.variance


def score(picture: Picture, mean: Tensor, std: Tensor | None = None, source_fwhm_ang: float = 0.0) -> Scores:
    """Compare estimates (M, ny, nx) of one picture with abTEM; without `std` nothing counts as covered."""
    shape = (mean.shape[-2], mean.shape[-1])
    reference = reference_map(picture, shape, source_fwhm_ang)
    halves = [
        reference_map(Picture(**{**vars(picture), "halves": picture.halves[[h]]}), shape, source_fwhm_ang)
        for h in (0, 1)
    ]
    error = (mean - reference).double() ** 2
    variance = (reference - reference.mean((1, 2), keepdim=True)).double() ** 2
    noise = ((halves[0] - halves[1]).double() ** 2).sum() / 4
    covered = 0.0 if std is None else float((error <= (INTERVAL_FACTOR * std.double()) ** 2).sum())
    single = 1 - error.sum((1, 2)) / variance.sum((1, 2))
    return Scores(float(error.sum()), float(variance.sum()), float(noise), covered, error.numel(), float(single.min()))
