"""The scattering-matrix contraction is abTEM's own multislice, and abTEM's optics are ours."""

from __future__ import annotations

import numpy as np
import pytest

from stem_gym.datasets.abtem_images import held_out_optics, reference_coefficients
from stem_gym.datasets.direct_scan import abtem_scan, contracted_scan
from stem_gym.datasets.pictures import Picture, Settings
from stem_gym.datasets.reference_specimens import held_out_specimen
from stem_gym.datasets.scattering_matrix import Aberrations, bloch_offsets, wavelength_ang

pytest.importorskip("abtem")

ABERRATED = 7  # number of the held-out setting with astigmatism and spherical aberration


def a_picture(kind: str, energy_kev: float) -> Picture:
    rng = np.random.default_rng(5)
    specimen, optics = held_out_specimen(kind, rng), held_out_optics(rng)
    return Picture(kind, "held_out", specimen, Settings(energy_kev, 4, 3), optics, np.zeros(0))


# One slice: only the rounding of single precision differs. Three slices: abTEM limits the band of the tiled cell's wave
# on a finer reciprocal grid, which moves the limit by less than a pixel.
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tolerance"), [("graphene_silicon", 1e-5), ("mos2", 5e-4)])
def test_contraction_equals_abtem_scan(kind: str, tolerance: float) -> None:
    picture = a_picture(kind, 60.0)
    direct = abtem_scan(picture, ABERRATED, 4, (3, 2))
    ours = contracted_scan(picture, ABERRATED, 4, (3, 2))
    assert np.abs(ours - direct).max() < tolerance * direct.max()
    assert direct.max() > 1.5 * direct.min()


def test_wavelength_is_the_published_one() -> None:
    assert wavelength_ang(60.0) == pytest.approx(0.04866, abs=1e-5)  # Kirkland 2020, table 2.2 lists 0.0487
    assert wavelength_ang(100.0) == pytest.approx(0.03701, abs=1e-5)


def test_offsets_tile_the_window() -> None:
    offsets, window = bloch_offsets(np.array([11.0, 22.0]), 21.0)
    assert window.tolist() == [22.0, 22.0]
    assert sorted(map(tuple, offsets.tolist())) == [(0.0, 0.0), (0.5, 0.0)]


def test_image_is_real_and_its_mean_does_not_depend_on_focus() -> None:
    picture = a_picture("graphene_silicon", 60.0)
    one = Aberrations(**{name: values[:3] for name, values in vars(picture.optics).items()})
    coefficients = reference_coefficients(picture.specimen, picture.settings, one).mean(axis=0)
    image = np.fft.ifft2(coefficients)
    assert np.abs(image.imag).max() < 1e-6 * image.real.max()
    means = coefficients[
        :, 0, 0
    ].real  # every electron lands somewhere, in focus or not; neighbours' interference is < 2 %
    assert np.ptp(means) < 0.02 * means.mean()
