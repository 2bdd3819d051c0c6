"""Expected HAADF images of a periodic specimen as finite Fourier series.

An incoherent image is the sum over atoms of a cross section times the probe's current density at the atom. On a
periodic cell it is a Fourier series whose coefficients are the specimen's structure coefficients times the probe's
transfer function. The band limit 2 alpha / lambda makes the series finite, so nothing is interpolated:

    fraction(x, y) = sum_h F[hy, hx] exp(2 pi i (hx x / Lx + hy y / Ly)),   F = S T,
    S[hy, hx] = 1 / (Lx Ly) sum_atoms sigma exp(-2 pi² u² k²) exp(-2 pi i (hx x_a / Lx + hy y_a / Ly)).

The image is real, so only hx >= 0 is kept; hy runs from -(Ny - 1)/2 to (Ny - 1)/2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from stem_gym.core.batch import names_every
from stem_gym.core.errors import ConfigError
from stem_gym.simulator.harmonics import Harmonics, harmonic_table, in_blocks, padded_orders
from stem_gym.simulator.scattering import OBJECT_SIGMA_ANG, haadf_cross_section_ang2
from stem_gym.simulator.specimens import Specimen


def atom_weights_ang2(specimen: Specimen, energy_kev: Tensor, inner_mrad: float, outer_mrad: float) -> Tensor:
    """HAADF cross section of every atom of a specimen at energies (B,): (B, K), zero where there is no atom."""
    sigma = haadf_cross_section_ang2(specimen.atomic_number, energy_kev[:, None], inner_mrad, outer_mrad)
    return torch.where(specimen.present, sigma, torch.zeros_like(sigma))


def scatterer_coefficients(
    cell_ang: Tensor, xy_ang: Tensor, weight_ang2: Tensor, sigma_ang: Tensor, harmonics: Harmonics
) -> Tensor:
    """Fourier coefficients, without unit, of Gaussian scatterers: (B, Ny, Nx) complex.

    `cell_ang` (B, 2), `xy_ang` (B, K, 2), `weight_ang2` and `sigma_ang` (rms per axis) (B, K). The width of scattering
    itself, OBJECT_SIGMA_ANG, is added to sigma. A sum of separable Gaussians is one matrix product. Linear in the
    weight: an atom that moves is a scatterer of weight -w at the old place and +w at the new.
    """
    return in_blocks(partial(_scatterers, harmonics), cell_ang, xy_ang, weight_ang2, sigma_ang)


def _scatterers(
    harmonics: Harmonics, cell_ang: Tensor, xy_ang: Tensor, weight_ang2: Tensor, sigma_ang: Tensor
) -> Tensor:
    half, nx, atoms = (harmonics.ny - 1) // 2, harmonics.nx, xy_ang.shape[1]
    orders = torch.arange(max(nx, half + 1), dtype=cell_ang.dtype, device=cell_ang.device)
    turns = (xy_ang / cell_ang[:, None, :]).transpose(1, 2)  # (B, 2, K)
    table = harmonic_table(turns.reshape(-1, 2 * atoms), len(orders))
    n = table.shape[1] // 2
    table = table.reshape(-1, 2, n, 2, atoms)  # (B, cos and sin, order, x and y, K)
    frequency = orders[:, None] / cell_ang[:, None, :]  # (B, order, 2)
    damping = (-2.0 * math.pi**2) * (sigma_ang * sigma_ang + OBJECT_SIGMA_ANG**2)
    factor = torch.exp((frequency * frequency)[..., None] * damping[:, None, None, :])[:, None]  # (B, 1, order, 2, K)
    scale = (weight_ang2 / (cell_ang[:, :1] * cell_ang[:, 1:]))[:, None, None, :]
    x_basis = (table[:, :, :nx, 0] * factor[:, :, :nx, 0] * scale).reshape(-1, 2 * nx, atoms)
    y_basis = (table[:, :, : half + 1, 1] * factor[:, :, : half + 1, 1]).reshape(-1, 2 * (half + 1), atoms)
    product = torch.bmm(y_basis, x_basis.transpose(1, 2))  # (B, 2 (Hy + 1), 2 Nx)
    cosines, sines = product[:, : half + 1], product[:, half + 1 :]
    positive = torch.complex(cosines[..., :nx] - sines[..., nx:], -(cosines[..., nx:] + sines[..., :nx]))
    negative = torch.complex(cosines[..., :nx] + sines[..., nx:], sines[..., :nx] - cosines[..., nx:])
    return torch.cat((negative[:, 1:].flip(1), positive), dim=1)


def structure_coefficients(specimen: Specimen, weight_ang2: Tensor, harmonics: Harmonics) -> Tensor:
    """Structure coefficients of a specimen, (B, Ny, Nx) complex: atoms of weight (B, K) and contamination blobs."""
    atoms = torch.where(specimen.present, weight_ang2, torch.zeros_like(weight_ang2))
    return scatterer_coefficients(
        specimen.cell_ang,
        torch.cat((specimen.xy_ang, specimen.blob_xy_ang), dim=1),
        torch.cat((atoms, specimen.blob_weight_ang2), dim=1),
        torch.cat((specimen.thermal_sigma_ang, specimen.blob_sigma_ang), dim=1),
        harmonics,
    )


def structure_change(
    cell_ang: Tensor, removed: tuple[Tensor, Tensor, Tensor], added: tuple[Tensor, Tensor, Tensor], harmonics: Harmonics
) -> Tensor:
    """What to add to structure coefficients when scatterers go and come: (B, Ny, Nx) complex.

    `removed` and `added` are (xy_ang (B, J, 2), weight_ang2 (B, J), sigma_ang (B, J)); weight 0 changes nothing.
    """
    xy, weight, sigma = (torch.cat(pair, dim=1) for pair in zip(removed, added, strict=True))
    gone = removed[1].shape[1]
    sign = torch.ones_like(weight)
    sign[:, :gone] = -1.0
    return scatterer_coefficients(cell_ang, xy, weight * sign, sigma, harmonics)


def image_coefficients(structure: Tensor, transfer: Tensor) -> Tensor:
    """Coefficients of the expected image: structure (B, Ny, Nx) complex times transfer (B, Ny, Nx) real."""
    return structure * transfer


def real_series(coefficients: Tensor) -> Tensor:
    """The series (B, Ny, Nx) complex over cosines and sines along y: (B, 2 N, 2 N) real, ready to be scanned.

    Rows: cosines, then sines, of the N orders along y; columns: real, then negated imaginary parts along x; both padded
    to the N that `harmonic_table` makes. The product along y is then real, half the work of the complex one. Scans take
    either form, but converting costs half of a 64 x 64 scan: whoever scans an unchanged specimen often converts once.
    The conversion is linear, so the series of a change can be added.
    """
    half, nx = (coefficients.shape[1] - 1) // 2, coefficients.shape[2]
    size = padded_orders(max(half + 1, nx))
    parts = torch.view_as_real(coefficients)
    # Both signs of hx count, and those of hy are folded onto one: hx = 0 and hy = 0 occur once.
    fold = torch.full((half + 1, nx, 1), 2.0, dtype=parts.dtype, device=parts.device)
    fold[:, 0] *= 0.5
    fold[0] *= 0.5
    positive, negative = parts[:, half:] * fold, parts[:, : half + 1].flip(1) * fold
    even, odd = positive + negative, positive - negative
    cosines = torch.stack((even[..., 0], -even[..., 1]), dim=2)  # (B, Hy + 1, 2, Nx)
    sines = torch.stack((-odd[..., 1], -odd[..., 0]), dim=2)
    series = torch.stack((cosines, sines), dim=1)
    series = torch.nn.functional.pad(series, (0, size - nx, 0, 0, 0, size - half - 1))
    return series.reshape(-1, 2 * size, 2 * size)


def scan_image(
    coefficients: Tensor,
    cell_ang: Tensor,
    x_ang: Tensor,
    y_ang: Tensor,
    row_offset_ang: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Expected collected fraction on a raster: (B, H, W).

    `coefficients` (B, Ny, Nx) complex or their `real_series`, `cell_ang` (B, 2), columns `x_ang` (B, W), scan rows
    `y_ang` (B, H). `row_offset_ang` (B, H, 2) is added to the probe's place on the specimen for each scan row, and is
    exact, not interpolated. With `rows` (B,) the coefficients are those of more rows, of which these are scanned.
    """
    if row_offset_ang is None:
        return _of_rows(_still_scan, coefficients, rows, x_ang / cell_ang[:, :1], y_ang / cell_ang[:, 1:])
    y_ang = y_ang + row_offset_ang[..., 1]
    shift = row_offset_ang[..., 0] / cell_ang[:, :1]
    return _of_rows(_shifted_scan, coefficients, rows, x_ang / cell_ang[:, :1], y_ang / cell_ang[:, 1:], shift)


def probe_signal(coefficients: Tensor, cell_ang: Tensor, xy_ang: Tensor, rows: Tensor | None = None) -> Tensor:
    """Expected collected fraction at probe places (B, J, 2): (B, J); coefficients and rows as in `scan_image`."""
    x_turns, y_turns = xy_ang[..., 0] / cell_ang[:, :1], xy_ang[..., 1] / cell_ang[:, 1:]
    return _of_rows(_points, coefficients, rows, x_turns, y_turns)


def image_grid(coefficients: Tensor, ny: int, nx: int) -> Tensor:
    """The periodic image on ny x nx points, point (0, 0) at the cell's origin: (B, ny, nx).

    Raises ConfigError for a grid too coarse for the coefficients.
    """
    half, columns = (coefficients.shape[1] - 1) // 2, coefficients.shape[2]
    if ny < 2 * half + 1 or nx < 2 * columns - 1:
        raise ConfigError(
            f"These coefficients need a grid of at least {2 * half + 1} x {2 * columns - 1}; given {ny} x {nx}."
        )
    spectrum = coefficients.new_zeros((coefficients.shape[0], ny, nx // 2 + 1))
    spectrum[:, : half + 1, :columns] = coefficients[:, half:]
    if half:
        spectrum[:, -half:, :columns] = coefficients[:, :half]
    return torch.fft.irfft2(spectrum, s=(ny, nx), norm="forward")


def grid_coefficients(image: Tensor, harmonics: Harmonics) -> Tensor:
    """The coefficients (B, Ny, Nx) of a periodic image (B, ny, nx): inverse of `image_grid`.

    Raises ConfigError for a grid too coarse for the harmonics.
    """
    ny, nx = image.shape[-2:]
    half = (harmonics.ny - 1) // 2
    if ny < harmonics.ny or nx < 2 * harmonics.nx - 1:
        raise ConfigError(
            f"{harmonics} need a grid of at least {harmonics.ny} x {2 * harmonics.nx - 1}; given {ny} x {nx}."
        )
    spectrum = torch.fft.rfft2(image, norm="forward")[:, :, : harmonics.nx]
    return torch.cat((spectrum[:, ny - half :], spectrum[:, : half + 1]), dim=1)


def _of_rows(function: Callable[..., Tensor], coefficients: Tensor, rows: Tensor | None, *places: Tensor) -> Tensor:
    """`function` of the series of the named rows, which are picked block by block and so stay in the cache."""
    series = real_series(coefficients) if coefficients.is_complex() else coefficients
    if rows is None or names_every(rows, len(series)):
        return in_blocks(function, series, *places)
    return in_blocks(lambda some, *turns: function(series.index_select(0, some), *turns), rows, *places)


def _still_scan(series: Tensor, x_turns: Tensor, y_turns: Tensor) -> Tensor:
    """`scan_image` without row offsets; places in parts of the cell, (B, W) and (B, H)."""
    table = harmonic_table(torch.cat((y_turns, x_turns), dim=1), series.shape[1] // 2)
    rows = y_turns.shape[1]
    amplitude = torch.bmm(series.transpose(1, 2), table[:, :, :rows])  # (B, 2 N, H)
    return torch.bmm(amplitude.transpose(1, 2), table[:, :, rows:])


def _shifted_scan(series: Tensor, x_turns: Tensor, y_turns: Tensor, shift_turns: Tensor) -> Tensor:
    """`scan_image` with the offset along x of each row, (B, H) in parts of the cell: a phase on its amplitudes."""
    rows, size = y_turns.shape[1], series.shape[1] // 2
    table = harmonic_table(torch.cat((y_turns, shift_turns, x_turns), dim=1), size)
    amplitude = torch.bmm(series.transpose(1, 2), table[:, :, :rows])  # (B, 2 N, H)
    real, imaginary = amplitude[:, :size], amplitude[:, size:]
    cosine, sine = table[:, :size, rows : 2 * rows], table[:, size:, rows : 2 * rows]
    shifted = torch.cat(
        (
            (real * cosine).addcmul_(imaginary, sine),
            (imaginary * cosine).addcmul_(real, sine, value=-1.0),
        ),
        dim=1,
    )
    return torch.bmm(shifted.transpose(1, 2), table[:, :, 2 * rows :])


def _points(series: Tensor, x_turns: Tensor, y_turns: Tensor) -> Tensor:
    """`probe_signal` with places in parts of the cell, (B, J)."""
    places = x_turns.shape[1]
    table = harmonic_table(torch.cat((y_turns, x_turns), dim=1), series.shape[1] // 2)
    amplitude = torch.bmm(series.transpose(1, 2), table[:, :, :places])  # (B, 2 N, J)
    return (amplitude * table[:, :, places:]).sum(1)
