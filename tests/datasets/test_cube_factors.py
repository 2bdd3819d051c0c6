"""Spikes, dead cells, the noise and the number of factors, on cubes whose truth is known, and on measured ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stem_gym.core.errors import DataError
from stem_gym.datasets.cube_factors import factorise, find_dead_pixels, find_spikes
from stem_gym.datasets.cubes import SpectrumCube, read_cube
from tests.datasets.test_cubes import DATA

HEIGHT, WIDTH, CHANNELS = 24, 30, 80


def truth(rank: int, counts: float) -> np.ndarray:
    """A noise-free cube (H, W, C) of this rank with about `counts` in each number."""
    y, x = np.meshgrid(np.linspace(0, 1, HEIGHT), np.linspace(0, 1, WIDTH), indexing="ij")
    energy = np.linspace(0, 1, CHANNELS)
    cube = np.ones((HEIGHT, WIDTH, 1)) * np.exp(-energy)
    for k in range(1, rank):
        field = 0.5 + 0.5 * np.sin(2.0 * np.pi * (k * x + (rank - k) * y) / 2.0 + k)
        cube = cube + field[..., None] * 2.0 * np.exp(-0.5 * ((energy - k / rank) / 0.05) ** 2)
    return counts * cube


def cube_of(spectra: np.ndarray, whole: bool = True) -> SpectrumCube:
    energy = np.arange(spectra.shape[2], dtype=float)
    return SpectrumCube(spectra, energy, np.ones(spectra.shape[:2]), 1.0, 1.0, 1.0, "made", "", "0" * 64, whole)


# A sixth factor of one count a number would drown in the noise: no rule can see it.
@pytest.mark.parametrize(("rank", "counts"), [(1, 1.0), (2, 1.0), (4, 1.0), (1, 200.0), (3, 200.0), (6, 200.0)])
def test_the_rank_is_found_and_the_noise_is_gone(rank, counts):
    right = truth(rank, counts)
    factors = factorise(cube_of(np.random.default_rng(3).poisson(right)))
    assert factors.components.shape == (rank, CHANNELS) and factors.loadings.shape == (HEIGHT * WIDTH, rank)
    found = (factors.loadings @ factors.components).reshape(right.shape)
    error = np.sqrt(((found - right) ** 2 / right).mean())
    # Noise keeps the share of its n p directions that K rank-one terms have: √(K (n + p) / n p), 1.5 of it.
    assert error < 1.5 * np.sqrt(rank * (HEIGHT * WIDTH + CHANNELS) / (HEIGHT * WIDTH * CHANNELS))
    assert factors.noise_factor == pytest.approx(1.0, abs=0.1)
    assert not factors.spikes.any() and not factors.dead.any()


def test_a_detector_with_gain_has_more_noise_and_no_more_factors():
    counts = 5.0 * np.random.default_rng(3).poisson(truth(3, 200.0))
    factors = factorise(cube_of(counts))
    assert factors.noise_factor == pytest.approx(5.0, rel=0.1)
    assert len(factors.components) == 3
    scaled = factorise(cube_of(counts / 50.0, whole=False))  # no counts any more: a tenth of an electron is a unit
    assert scaled.noise_factor == pytest.approx(0.1, rel=0.1)
    assert len(scaled.components) == 3


@pytest.mark.parametrize("counts", [0.05, 2.0, 500.0])
def test_spikes_are_found_where_they_are_and_nowhere_else(counts):
    right = truth(4, counts)
    spectra = np.random.default_rng(5).poisson(right)
    assert not find_spikes(cube_of(spectra)).any()
    planted = [(3, 4, 10), (0, 0, 0), (23, 29, 79), (12, 12, 40), (12, 13, 40)]  # at a corner, and two side by side
    for y, x, channel in planted:
        spectra[y, x, channel] += int(40 + 20 * np.sqrt(3.0 * counts))
    found = {tuple(int(i) for i in place) for place in np.argwhere(find_spikes(cube_of(spectra)))}
    assert found == set(planted)
    mended = factorise(cube_of(spectra))
    there = (mended.loadings @ mended.components).reshape(right.shape)[3, 4, 10]
    assert abs(there - right[3, 4, 10]) < 3.0 * np.sqrt(right[3, 4, 10]) + 1.0, "the truth knows nothing of a spike"


def test_a_line_or_an_edge_that_many_cells_share_is_no_spike():
    right = truth(1, 100.0)
    right[:, :, 30] += 900.0  # a line one channel wide, in every cell
    right[5:9, 5:9] *= 20.0  # a bright particle
    assert not find_spikes(cube_of(np.random.default_rng(5).poisson(right))).any()


def test_dead_cells_are_found_and_filled():
    right = truth(2, 50.0)
    spectra = np.random.default_rng(5).poisson(right)
    spectra[4, 7] = 0
    spectra[20, 0] //= 40
    cube = cube_of(spectra)
    assert [tuple(place) for place in np.argwhere(find_dead_pixels(cube))] == [(4, 7), (20, 0)]
    found = (lambda f: f.loadings @ f.components)(factorise(cube)).reshape(right.shape)
    np.testing.assert_allclose(found[4, 7].sum(), right[4, 7].sum(), rtol=0.1)


def test_a_vacuum_with_few_counts_is_not_dead():
    right = truth(1, 0.02)
    assert not find_dead_pixels(cube_of(np.random.default_rng(5).poisson(right))).any()


def test_a_rank_can_be_given_and_must_fit():
    cube = cube_of(np.random.default_rng(3).poisson(truth(3, 50.0)))
    assert len(factorise(cube, rank=7).components) == 7
    with pytest.raises(DataError, match="rank 1 to 80; given 81"):
        factorise(cube, rank=81)


def measured(name: str) -> SpectrumCube:
    path = DATA / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the project")
    return read_cube(path)


def test_the_spike_of_the_measured_eels_map_is_found():
    cube = measured("cuzn_eels_50x40x162")
    factors = factorise(cube)
    places = np.argwhere(factors.spikes)
    assert factors.spikes[42, 11, int(np.flatnonzero(cube.energy_ev == 1076.0)[0])]
    assert len(places) <= 10 and len(set(map(tuple, places[:, :2]))) == len(places), "few, one channel each"
    smooth = (factors.loadings @ factors.components).reshape(cube.spectra.shape)
    channel = int(np.flatnonzero(cube.energy_ev == 1076.0)[0])
    assert smooth[42, 11, channel] < 0.4 * cube.spectra[42, 11, channel]
    assert 3 <= len(factors.components) <= 10
    assert 2.0 < factors.noise_factor < 8.0  # a scintillator camera: several counts an electron


def test_the_measured_x_rays_are_counted_ones():
    cube = measured("fept_core_shell_eds_64x64x992")
    factors = factorise(replace(cube, spectra=cube.spectra[:, :, :500]))
    assert factors.noise_factor == pytest.approx(1.0, abs=0.05)
    assert 2 <= len(factors.components) <= 5
    assert not factors.spikes.any()
