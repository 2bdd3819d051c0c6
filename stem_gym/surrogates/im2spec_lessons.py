"""Lessons for the spectrum surrogate: noisy images, some noisy spectra, and what the others should have been."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stem_gym.simulator.spectral_specimen import SpectralSpecimen

__all__ = ["COUNTS", "IMAGE_COUNTS", "MEASURED", "Lesson", "draw_lesson", "size_of"]

MEASURED = (5, 100)  # spectra of a lesson
COUNTS = (300.0, 300_000.0)  # of a mean spectrum
IMAGE_COUNTS = (50.0, 5000.0)  # of a mean pixel
_SOUGHT = 1.5  # how strongly high places are preferred where a lesson is one of searching


@dataclass(frozen=True)
class Lesson:
    """B specimens of one recipe as an episode knows them, and the truth."""

    image: Tensor  # (B, H, W) noisy
    cell: Tensor  # (B, n) measured
    spectra: Tensor  # (B, n, S) counts
    asked: Tensor  # (B, Q) cells
    truth: Tensor  # (B, Q, S) expected counts


def size_of(specimens: SpectralSpecimen) -> int:
    """How many specimens there are."""
    return len(specimens.image)


def draw_lesson(
    rng: np.random.Generator, pools: Sequence[SpectralSpecimen], rows: int, measured: int, asked: int
) -> Lesson:
    """A lesson on one of the pools, turned or mirrored, at doses of its own.

    In half of the lessons the measured cells are spread evenly; in the others two thirds of them gather where some sum
    of the components is high, as in a search.
    """
    pool = pools[int(rng.integers(len(pools)))]
    index = torch.from_numpy(rng.choice(size_of(pool), size=rows, replace=size_of(pool) < rows))
    image, loadings = _turned(rng, pool.image[index], pool.loadings[index])
    components = pool.components[index]
    pixel_counts = _log_uniform(rng, IMAGE_COUNTS, rows)[:, None, None] / image.mean((1, 2), keepdim=True)
    seen = _poisson(rng, image * pixel_counts)
    gumbel = torch.from_numpy(rng.gumbel(size=loadings.shape[:2]).astype(np.float32))
    cell = gumbel.topk(measured, dim=1).indices
    if bool(rng.integers(2)):
        seeds = cell[:, : (measured + 2) // 3]
        wished = (gumbel + _SOUGHT * _wish(rng, loadings)).scatter(1, seeds, torch.inf)
        cell = wished.topk(measured, dim=1).indices
    wanted = torch.from_numpy(rng.integers(loadings.shape[1], size=(rows, asked)))
    dose = _log_uniform(rng, COUNTS, rows) / (loadings.mean(1)[:, None] @ components).sum((1, 2)).clamp(min=1e-30)
    return Lesson(
        seen,
        cell,
        _poisson(rng, _spectra(loadings, components, cell) * dose[:, None, None]),
        wanted,
        _spectra(loadings, components, wanted) * dose[:, None, None],
    )


def _spectra(loadings: Tensor, components: Tensor, cell: Tensor) -> Tensor:
    return loadings.gather(1, cell[..., None].expand(-1, -1, loadings.shape[-1])) @ components


def _wish(rng: np.random.Generator, loadings: Tensor) -> Tensor:
    """(B, N) standardised sums of the loadings with random signs and sizes."""
    spread = loadings.std(1, keepdim=True).clamp(min=1e-30)
    taste = torch.from_numpy(rng.normal(size=(len(loadings), 1, loadings.shape[-1])).astype(np.float32))
    wish = (loadings / spread * taste).sum(-1)
    return (wish - wish.mean(1, keepdim=True)) / wish.std(1, keepdim=True).clamp(min=1e-30)


def _turned(rng: np.random.Generator, image: Tensor, loadings: Tensor) -> tuple[Tensor, Tensor]:
    """Both turned by a multiple of 90° and perhaps mirrored; fields that are not square by 180° only."""
    height, width = image.shape[1:]
    quarter = int(rng.integers(4)) if height == width else 2 * int(rng.integers(2))
    mirrored = bool(rng.integers(2))
    number = torch.rot90(torch.arange(height * width).reshape(height, width), quarter)
    number = number.flip(1) if mirrored else number
    flat = number.flatten()
    return image.flatten(1)[:, flat].reshape(len(image), *number.shape), loadings[:, flat]


def _log_uniform(rng: np.random.Generator, span: tuple[float, float], rows: int) -> Tensor:
    return torch.from_numpy(np.exp(rng.uniform(np.log(span[0]), np.log(span[1]), rows)).astype(np.float32))


def _poisson(rng: np.random.Generator, expected: Tensor) -> Tensor:
    return torch.from_numpy(rng.poisson(expected.clamp(min=0.0).numpy()).astype(np.float32))
