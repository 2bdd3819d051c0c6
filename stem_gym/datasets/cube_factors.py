"""What a measured cube holds beside its noise: spikes and dead cells, the size of the noise, and few smooth factors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stem_gym.core.errors import DataError
from stem_gym.datasets.cubes import SpectrumCube

Numbers = NDArray[np.float64]
Mask = NDArray[np.bool_]

SPIKE_SIGMA = 8.0  # a Poisson law passes this once in 1e10 numbers or less often, also where counts are few
_DEAD_SHARE = 0.1  # of what its neighbours count
_EDGE_MARGIN = 1.02  # the largest value of pure noise scatters about its edge by about a part in a hundred
_AROUND = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0))
_BESIDE = (-3, -2, 2, 3)  # channels; those next to a spike can hold a part of it
_PARTS = 64  # channels at a time, so that a large cube fits in memory


@dataclass(frozen=True)
class Factors:
    """A cube without its noise: spectrum(cell) = loadings[cell] @ components, in counts."""

    loadings: Numbers  # (H·W, K)
    components: Numbers  # (K, C), orthogonal where channels are weighted by 1 / expected counts
    noise_factor: float  # variance of the counts in units of a Poisson law's
    spikes: Mask  # (H, W, C) numbers that were left out
    dead: Mask  # (H, W) cells that were left out


def find_dead_pixels(cube: SpectrumCube) -> Mask:
    """Cells (H, W) that count less than a tenth of what their neighbours do, and too little for chance."""
    total = cube.spectra.sum(2, dtype=np.float64)
    around = np.median(_neighbours(total), axis=0)
    return (total < _DEAD_SHARE * around) & (total < around - SPIKE_SIGMA * np.sqrt(around))


def find_spikes(cube: SpectrumCube, noise_factor: float = 1.0) -> Mask:
    """Numbers (H, W, C) that stand out of their own spectrum and of the eight spectra around, by 8 σ each.

    What a number should be is told by the channels two and three away, and by the share that its channel has in the
    neighbours' counts, without the neighbour where that share is largest (which may be a spike itself). σ² is the
    Poisson variance of what should be and of what told it, times `noise_factor`; the square of that factor is added, so
    that few counts are judged by their longer tail.
    """
    spectra = cube.spectra
    spikes = np.zeros(spectra.shape, dtype=bool)
    for start in range(0, spectra.shape[2], _PARTS):  # few numbers stand out of their own spectrum
        part = spectra[:, :, start : start + _PARTS].astype(np.float64)
        beside = _beside(spectra, start, part.shape[2])
        sigma = np.sqrt(noise_factor * beside * (1.0 + 1.0 / len(_BESIDE)) + noise_factor**2)
        spikes[:, :, start : start + _PARTS] = part > beside + SPIKE_SIGMA * sigma
    y, x, channel = np.nonzero(spikes)
    count = spectra[y, x, channel].astype(np.float64)
    total = spectra.sum(2, dtype=np.float64)
    own = total[y, x]
    share, weight = _share_around(spectra, total, (y, x, channel))
    around = np.maximum(own - count, 0.0) * share / np.maximum(1.0 - share, 0.1)
    sigma = np.sqrt(noise_factor * around * (1.0 + own / weight) + noise_factor**2)
    spikes[y, x, channel] = count > around + SPIKE_SIGMA * sigma
    return spikes


def factorise(cube: SpectrumCube, rank: int | None = None) -> Factors:
    """The cube's noise-free part by a truncated singular value decomposition of Poisson-weighted counts.

    Counts are divided by the root of what brightness of the cell and mean spectrum lead one to expect, which makes the
    noise alike everywhere (Keenan and Kotula, Surf. Interface Anal. 36, 203, 2004). `rank` None keeps the singular
    values above the edge of pure noise, σ (√n + √p) for n × p numbers (Marchenko and Pastur, 1967), where σ comes from
    the median singular value (Gavish and Donoho, IEEE Trans. Inf. Theory 60, 5040, 2014); σ² is the noise factor, at
    least 1 for whole counts. Spikes and dead cells are first replaced by what is around them.

    Raises DataError for a rank beyond the cube's.
    """
    height, width, channels = cube.spectra.shape
    most = min(height * width, channels)
    if rank is not None and not 1 <= rank <= most:
        raise DataError(f"A cube of {height * width} cells and {channels} channels has rank 1 to {most}; given {rank}.")
    dead = find_dead_pixels(cube)
    first = _weighted(_mended(cube, np.zeros(cube.spectra.shape, dtype=bool), dead))
    noise = _noise_factor(first.singular, first.scaled.shape, cube.whole_counts)
    spikes = find_spikes(cube, noise)
    weighted = _weighted(_mended(cube, spikes, dead)) if spikes.any() else first
    if spikes.any():
        noise = _noise_factor(weighted.singular, weighted.scaled.shape, cube.whole_counts)
    kept = rank or components_above_noise(weighted.singular, weighted.scaled.shape, noise)
    direction = weighted.vectors[:, :kept]  # (p, K)
    loadings = (weighted.scaled @ direction) * weighted.cell[:, None]
    components = np.zeros((kept, channels))
    components[:, weighted.lit] = (direction * weighted.channel[:, None]).T
    return Factors(loadings, components, noise, spikes, dead)


def components_above_noise(singular: Numbers, shape: tuple[int, int], noise_factor: float) -> int:
    """How many singular values noise alone, of `noise_factor` times unit variance, would not make; at least one."""
    edge = np.sqrt(noise_factor) * (np.sqrt(shape[0]) + np.sqrt(shape[1]))
    return max(1, int((singular > _EDGE_MARGIN * edge).sum()))


@dataclass(frozen=True)
class _Weighted:
    """Counts of n cells and the p channels that ever count, scaled to unit noise, and their decomposition."""

    scaled: Numbers  # (n, p)
    cell: Numbers  # (n,) root of the brightness
    channel: Numbers  # (p,) root of the mean spectrum, so that cell × channel squared is what is expected
    lit: Mask  # (C,) channels that ever count
    singular: Numbers  # (p,) falling
    vectors: Numbers  # (p, p)


def _weighted(counts: Numbers) -> _Weighted:
    lit = np.asarray(counts.any(axis=0))
    bright = counts.sum(1)
    channel = np.sqrt(counts[:, lit].sum(0) / counts.sum())
    cell = np.sqrt(np.maximum(bright, bright[bright > 0.0].min()))
    scaled = counts[:, lit] / (cell[:, None] * channel)
    values, vectors = np.linalg.eigh(scaled.T @ scaled)
    singular = np.sqrt(np.clip(values[::-1], 0.0, None))
    return _Weighted(scaled, cell, channel, lit, singular, vectors[:, ::-1])


def _noise_factor(singular: Numbers, shape: tuple[int, int], whole_counts: bool) -> float:
    """Variance of the scaled numbers that the median singular value tells; counting noise is the least that can be."""
    few, many = min(shape), max(shape)
    sigma2 = float(np.median(singular[:few])) ** 2 / (many * _median_of_noise(few / many))
    return max(sigma2, 1.0) if whole_counts else sigma2


def _median_of_noise(ratio: float) -> float:
    """The median of the Marchenko-Pastur law for unit variance and this ratio of the sides, from its density."""
    low, high = (1.0 - np.sqrt(ratio)) ** 2, (1.0 + np.sqrt(ratio)) ** 2
    # x = middle − half · cos(angle) takes the square roots at both ends out of the integral.
    angle = np.linspace(0.0, np.pi, 4097)
    x = 0.5 * (low + high) - 0.5 * (high - low) * np.cos(angle)
    weight = np.sin(angle) ** 2 / np.maximum(x, 1e-12)
    reached = np.cumsum(weight)
    return float(np.interp(0.5 * reached[-1], reached, x))


def _mended(cube: SpectrumCube, spikes: Mask, dead: Mask) -> Numbers:
    """Counts (H·W, C) with dead cells as the mean of the living ones around, and spikes as their surroundings say."""
    spectra = cube.spectra.astype(np.float64)
    for y, x in zip(*np.nonzero(dead), strict=True):
        living = [spectra[v, u] for v, u in _cells_around(y, x, dead.shape) if not dead[v, u]]
        if living:
            spectra[y, x] = np.mean(living, axis=0)
    for y, x, channel in zip(*np.nonzero(spikes), strict=True):
        around = [spectra[v, u, channel] for v, u in _cells_around(y, x, dead.shape) if not spikes[v, u, channel]]
        if around:
            spectra[y, x, channel] = np.mean(around)
    return spectra.reshape(-1, spectra.shape[2])


def _cells_around(y: int, x: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(y + dy, x + dx) for dy, dx in _AROUND if 0 <= y + dy < shape[0] and 0 <= x + dx < shape[1]]


def _neighbours(field: Numbers) -> Numbers:
    """The eight neighbours (8, H, W, …) of each cell; beyond the border, those of the border are mirrored."""
    padded = np.pad(field, [(1, 1), (1, 1)] + [(0, 0)] * (field.ndim - 2), mode="reflect")
    height, width = field.shape[:2]
    return np.stack([padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width] for dy, dx in _AROUND])


def _share_around(
    spectra: NDArray[np.generic], total: Numbers, at: tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]
) -> tuple[Numbers, Numbers]:
    """Share (m,) that a channel has in the neighbours' counts, without the neighbour of the largest share, at m places.

    And the counts (m,) of those neighbours in all channels, which tell how well the share is known.
    """
    y, x, channel = at
    height, width = total.shape
    v = np.stack([_inside(y + dy, height) for dy, _ in _AROUND])  # (8, m)
    u = np.stack([_inside(x + dx, width) for _, dx in _AROUND])
    counts, totals = spectra[v, u, channel].astype(np.float64), np.maximum(total[v, u], 1.0)
    largest = (counts / totals).argmax(0)[None]
    weight = totals.sum(0) - np.take_along_axis(totals, largest, 0)[0]
    return (counts.sum(0) - np.take_along_axis(counts, largest, 0)[0]) / weight, weight


def _inside(index: NDArray[np.intp], length: int) -> NDArray[np.intp]:
    """Indices beyond either end mirrored back."""
    index = np.abs(index)
    return np.where(index >= length, 2 * (length - 1) - index, index)


def _beside(spectra: NDArray[np.generic], start: int, count: int) -> Numbers:
    """Mean (H, W, c) over the channels two and three away; at the ends, of those that there are."""
    channels = spectra.shape[2]
    sums, numbers = np.zeros((*spectra.shape[:2], count)), np.zeros(count)
    for step in _BESIDE:
        at = np.arange(start, start + count) + step
        inside = (at >= 0) & (at < channels)
        sums[:, :, inside] += spectra[:, :, at[inside]]
        numbers += inside
    return np.asarray(sums / np.maximum(numbers, 1.0))
