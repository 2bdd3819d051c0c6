"""The probe against closed forms, published figures, finite differences and abTEM."""

import math

import numpy as np
import pytest
import torch

from stem_gym.core.errors import ConfigError
from stem_gym.simulator.optics import (
    FWHM_PER_SIGMA,
    Optics,
    electron_wavelength_ang,
    probe_fwhm_ang,
    probe_intensity,
    probe_profile,
    transfer_by_quadrature,
    transfer_function,
)

ABERRATED = {
    "defocus_ang": 60.0,
    "astigmatism_ang": 20.0,
    "astigmatism_angle_rad": 0.4,
    "c3_mm": 0.003,
    "focal_spread_ang": 25.0,
}


def frequencies(count: int = 41, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.linspace(-1.45, 1.45, count, dtype=dtype)[None]


def on_grid(optics: Optics, k: torch.Tensor) -> torch.Tensor:
    """The aberration part by direct quadrature at every point of a grid."""
    kx, ky = torch.meshgrid(k[0], k[0], indexing="xy")
    flat = transfer_by_quadrature(optics, torch.hypot(kx, ky).reshape(1, -1), torch.atan2(ky, kx).reshape(1, -1))
    return flat.reshape(1, *kx.shape)


def test_wavelengths_are_the_tabulated_ones():
    # Kirkland (2020), table 2.1 style values, four digits.
    energy = torch.tensor([60.0, 80.0, 100.0, 200.0, 300.0], dtype=torch.float64)
    tabulated = torch.tensor([0.04866, 0.04176, 0.03701, 0.02508, 0.01969], dtype=torch.float64)
    torch.testing.assert_close(electron_wavelength_ang(energy), tabulated, atol=5e-6, rtol=0)


def test_unaberrated_transfer_is_that_of_two_overlapping_discs():
    optics = Optics.of(1, dtype=torch.float64, source_fwhm_ang=0.0)
    k = torch.linspace(0.0, 1.6, 60, dtype=torch.float64)[None]
    s = (k / optics.band_limit_per_ang).clamp(max=1.0)
    discs = (2.0 / math.pi) * (torch.acos(s) - s * torch.sqrt(1.0 - s * s))
    # 1e-5: interpolation on 26 nodes, and q = 0 held off by 1e-6 of the band limit.
    torch.testing.assert_close(transfer_function(optics, k, k[:, :1] * 0.0)[:, 0], discs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        ABERRATED,
        {"defocus_ang": -100.0},
        {"defocus_ang": 100.0, "astigmatism_ang": 30.0, "energy_kev": 60.0},
        {"energy_kev": 100.0, "convergence_mrad": 30.0, "defocus_ang": 60.0, "c3_mm": 0.01},
    ],
)
def test_interpolation_holds_a_thousandth_of_the_quadrature(settings):
    optics = Optics.of(1, dtype=torch.float64, source_fwhm_ang=0.0, **settings)
    k = frequencies()
    torch.testing.assert_close(transfer_function(optics, k, k), on_grid(optics, k), atol=1e-3, rtol=0)


def test_quadrature_is_the_autocorrelation_of_the_aperture_function():
    # Independent: brute-force sum over a fine grid of k. 2e-3: the pixelated edge of that grid.
    optics = Optics.of(1, dtype=torch.float64, source_fwhm_ang=0.0, **(ABERRATED | {"focal_spread_ang": 0.0}))
    wavelength = electron_wavelength_ang(optics.energy_kev).item()
    radius = optics.band_limit_per_ang.item() / 2.0
    grid = np.linspace(-1.05 * radius, 1.05 * radius, 1200)
    kx, ky = np.meshgrid(grid, grid)

    def wave(kx, ky):
        alpha, phi = wavelength * np.hypot(kx, ky), np.arctan2(ky, kx)
        chi = (2 * math.pi / wavelength) * (
            alpha**2 / 2 * (-60.0 + 20.0 * np.cos(2 * (phi - 0.4))) + alpha**4 / 4 * 0.003e7
        )
        return (np.hypot(kx, ky) < radius) * np.exp(-1j * chi)

    norm = (np.abs(wave(kx, ky)) ** 2).sum()
    for qx, qy in ((0.3, 0.1), (-0.5, 0.6), (0.0, -0.9), (1.1, 0.3)):
        brute = (wave(kx + qx / 2, ky + qy / 2) * wave(kx - qx / 2, ky - qy / 2).conj()).sum() / norm
        q = torch.tensor([[math.hypot(qx, qy)]], dtype=torch.float64)
        angle = torch.tensor([[math.atan2(qy, qx)]], dtype=torch.float64)
        assert transfer_by_quadrature(optics, q, angle).item() == pytest.approx(brute.real, abs=2e-3)
        assert abs(brute.imag) < 2e-3  # even aberrations: the transfer function is real


def test_focal_spread_is_the_average_over_defoci():
    nodes, weights = np.polynomial.hermite_e.hermegauss(31)
    k = frequencies(21)
    spread = transfer_function(Optics.of(1, dtype=torch.float64, defocus_ang=20.0, focal_spread_ang=30.0), k, k)
    average = torch.zeros_like(spread)
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        average += weight * transfer_function(Optics.of(1, dtype=torch.float64, defocus_ang=20.0 + 30.0 * node), k, k)
    torch.testing.assert_close(spread, average, atol=1e-3, rtol=0)  # interpolation at the far defoci


def test_source_size_multiplies_by_its_gaussian():
    k = frequencies(21)
    point = transfer_function(Optics.of(1, dtype=torch.float64, source_fwhm_ang=0.0), k, k)
    wide = transfer_function(Optics.of(1, dtype=torch.float64, source_fwhm_ang=0.9), k, k)
    square = k[:, None, :] ** 2 + k[:, :, None] ** 2
    blur = torch.exp(-2.0 * math.pi**2 * (0.9 / FWHM_PER_SIGMA) ** 2 * square)
    torch.testing.assert_close(wide, point * blur)


def test_transfer_is_normalised_bounded_and_band_limited():
    k = frequencies(61)
    transfer = transfer_function(Optics.of(1, dtype=torch.float64, **ABERRATED), k, k)[0]
    assert transfer[30, 30].item() == pytest.approx(1.0, abs=1e-5)
    assert transfer.abs().max() <= 1.0 + 1e-5
    outside = torch.hypot(k[0][None, :], k[0][:, None]) > Optics.of(1).band_limit_per_ang.double()
    assert (transfer[outside] == 0.0).all()


def test_defocus_balances_spherical_aberration_only_when_positive():
    # Scherzer: underfocus of sqrt(C3 lambda) sharpens a probe with C3 > 0, overfocus blurs it (sign as in abTEM).
    width = {
        d: probe_fwhm_ang(Optics.of(1, convergence_mrad=20.0, c3_mm=0.05, defocus_ang=d, source_fwhm_ang=0.0)).item()
        for d in (-60.0, 60.0)
    }
    assert width[60.0] < width[-60.0]


def test_turning_the_astigmatism_turns_the_probe():
    radius, angle = 1.0, torch.linspace(0.0, 6.0, 13)
    places = radius * torch.stack((torch.cos(angle), torch.sin(angle)), dim=-1)
    turned = radius * torch.stack((torch.cos(angle + 0.7), torch.sin(angle + 0.7)), dim=-1)
    settings = {"defocus_ang": 40.0, "astigmatism_ang": 30.0}
    before = probe_intensity(Optics.of(1, **settings), places[None])
    after = probe_intensity(Optics.of(1, astigmatism_angle_rad=0.7, **settings), turned[None])
    # 1e-4 of the peak, 0.8 per square Å: float32 and interpolation.
    torch.testing.assert_close(before, after, atol=1e-4, rtol=0)
    assert (before.max() - before.min()) > 0.01  # the probe is not round, or the test says nothing


def test_probe_of_a_corrected_60_kev_column():
    # 60 keV, 34 mrad, 0.7 Å source: FWHM about 1.0 Å, peak about 0.79 per Å²; relative flux falls to about 0.49 at
    # 0.5 Å, 0.06 at 1.0 Å and 0.014 at 1.42 Å (computed apart from this code, two digits).
    optics = Optics.of(1)
    assert probe_fwhm_ang(optics).item() == pytest.approx(1.0, abs=0.03)
    profile = probe_profile(optics, torch.tensor([0.0, 0.5, 1.0, 1.42]))[0]
    assert profile[0].item() == pytest.approx(0.79, abs=0.01)
    torch.testing.assert_close(profile[1:] / profile[0], torch.tensor([0.485, 0.061, 0.0136]), atol=0.005, rtol=0)


def test_probe_holds_one_unit_of_current():
    axis = torch.linspace(-20.0, 20.0, 161, dtype=torch.float64)[:-1]
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    density = probe_intensity(Optics.of(1, dtype=torch.float64, **ABERRATED), torch.stack((x, y), -1).reshape(1, -1, 2))
    assert (density.sum() * 0.25**2).item() == pytest.approx(1.0, abs=1e-5)
    assert density.min() > -1e-4  # a density, but for the interpolation


def test_profile_is_the_intensity_on_the_axis():
    x = torch.linspace(0.0, 3.0, 7)
    optics = Optics.of(1, **ABERRATED)
    places = torch.stack((x, torch.zeros_like(x)), dim=-1)[None]
    torch.testing.assert_close(probe_profile(optics, x), probe_intensity(optics, places), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "name", ["defocus_ang", "astigmatism_ang", "astigmatism_angle_rad", "c3_mm", "focal_spread_ang", "source_fwhm_ang"]
)
def test_gradients_match_finite_differences(name):
    check_gradient(name, {"c3_mm": 1e-5}.get(name, 1e-3))


@pytest.mark.parametrize("name", ["energy_kev", "convergence_mrad"])
def test_gradients_of_what_sets_the_band_limit(name):
    check_gradient(name, 1e-4)


def check_gradient(name: str, step: float) -> None:
    settings = {**ABERRATED, "energy_kev": 60.0, "convergence_mrad": 34.0, "source_fwhm_ang": 0.5}
    k = torch.linspace(0.0, 1.3, 14, dtype=torch.float64)[None]
    weight = torch.randn(14, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(value: torch.Tensor) -> torch.Tensor:
        return (transfer_function(Optics.of(1, dtype=torch.float64, **{**settings, name: value}), k, k) * weight).sum()

    value = torch.tensor(settings[name], dtype=torch.float64, requires_grad=True)
    loss(value).backward()
    numeric = (loss(value.detach() + step) - loss(value.detach() - step)) / (2 * step)
    assert value.grad.item() == pytest.approx(numeric.item(), rel=1e-4, abs=1e-7)


def test_rows_do_not_depend_on_their_neighbours():
    defocus = torch.linspace(-80.0, 80.0, 64)
    k = frequencies(21, torch.float32).expand(64, -1)
    batch = transfer_function(Optics.of(64, defocus_ang=defocus), k, k)
    for rows in ([5], [0, 5, 63], [40, 5]):
        index = torch.tensor(rows)
        alone = transfer_function(Optics.of(64, defocus_ang=defocus).rows(index), k[index], k[index])
        assert torch.equal(alone, batch[index])


def test_unknown_setting_is_named():
    with pytest.raises(ConfigError, match="defocus_nm"):
        Optics.of(1, defocus_nm=3.0)


@pytest.mark.parametrize("defocus_ang", [0.0, 50.0, -50.0])
def test_probe_agrees_with_abtem(defocus_ang):
    abtem = pytest.importorskip("abtem")
    # The sign of the defocus shows: with this C3 the peak is six times higher at +50 Å than at -50 Å.
    c3_mm, window, points = 0.02, 50.0, 400
    probe = abtem.Probe(
        energy=60e3, semiangle_cutoff=34, defocus=defocus_ang, C30=c3_mm * 1e7, extent=window, gpts=points
    )
    wave = np.squeeze(probe.build(lazy=False).array)  # centred on the middle of the window
    density = np.abs(wave) ** 2
    density /= density.sum() * (window / points) ** 2
    x = torch.arange(25) * (window / points)
    ours = probe_profile(Optics.of(1, defocus_ang=defocus_ang, c3_mm=c3_mm, source_fwhm_ang=0.0), x, window).numpy()[0]
    theirs = density[points // 2 : points // 2 + 25, points // 2]
    # 4 % of the peak: abTEM's aperture has pixels of 1/50 per Å, 1.5 % of its diameter, at either edge.
    np.testing.assert_allclose(ours, theirs, atol=0.04 * theirs.max())
