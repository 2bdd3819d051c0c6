"""Expected HAADF images of a periodic specimen as finite Fourier series.

An incoherent image is the sum over atoms of a cross section times the probe's current density at the atom. On a periodic
cell it is a Fourier series whose coefficients are the specimen's structure coefficients times the probe's transfer function.
The band limit 2 alpha / lambda makes the series finite, so nothing is interpolated and positions need no grid:

    fraction(x, y) = sum_h F[hy, hx] exp(2 pi i (hx x / Lx + hy y / Ly)),   F = S T,
    S[hy, hx] = 1 / (Lx Ly) sum_atoms sigma exp(-2 pi^2 u^2 k^2) exp(-2 pi i (hx x_a / Lx + hy y_a / Ly)).

The image is real, so only hx >= 0 is kept; hy runs from -(Ny - 1)/2 to (Ny - 1)/2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stem_gym.core.errors import ConfigError
from stem_gym.simulator.scattering import haadf_cross_section_ang2
from stem_gym.simulator.specimens import Specimen


@dataclass(frozen=True)
class Harmonics:
    """How many Fourier coefficients an image keeps: hx = 0 .. nx - 1 and hy = -(ny - 1)/2 .. (ny - 1)/2."""

    nx: int
    ny: int

    @classmethod
    def within(cls, cell_ang: tuple[float, float], cutoff_per_ang: float) -> Harmonics:
        """The harmonics of a cell (Lx, Ly) up to a spatial frequency; use the largest cell and cutoff of a batch."""
        if min(*cell_ang, cutoff_per_ang) <= 0.0:
            raise ConfigError(f"Cell and cutoff must be positive; given {cell_ang} Ang and {cutoff_per_ang} /Ang.")
        return cls(nx=int(cell_ang[0] * cutoff_per_ang) + 1, ny=2 * int(cell_ang[1] * cutoff_per_ang) + 1)

    def orders(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """hx (nx,) and hy (ny,) with the dtype and device of `like`."""
        half = (self.ny - 1) // 2
        x = torch.arange(self.nx, dtype=like.dtype, device=like.device)
        return x, torch.arange(-half, half + 1, dtype=like.dtype, device=like.device)

    def frequencies(self, cell_ang: Tensor) -> tuple[Tensor, Tensor]:
        """kx (B, nx) and ky (B, ny) in 1/Ang for cells (B, 2)."""
        x, y = self.orders(cell_ang)
        return x / cell_ang[:, :1], y / cell_ang[:, 1:]


def atom_weights_ang2(specimen: Specimen, energy_kev: Tensor, inner_mrad: float, outer_mrad: float) -> Tensor:
    """HAADF cross section of every atom of a specimen at energies (B,): (B, K), zero where there is no atom."""
    sigma = haadf_cross_section_ang2(specimen.atomic_number, energy_kev[:, None], inner_mrad, outer_mrad)
    return torch.where(specimen.present, sigma, torch.zeros_like(sigma))


def scatterer_coefficients(
    cell_ang: Tensor, xy_ang: Tensor, weight_ang2: Tensor, sigma_ang: Tensor, harmonics: Harmonics
) -> Tensor:
    """Fourier coefficients in 1/Ang^2 x Ang^2 of Gaussian scatterers: (B, Ny, Nx) complex.

    `cell_ang` (B, 2), `xy_ang` (B, K, 2), `weight_ang2` and `sigma_ang` (rms per axis) (B, K). A sum of separable Gaussians is
    one matrix product. Linear in the weight: an atom that moves is a scatterer of weight -w at the old place and +w at the new.
    """
    kx, ky = harmonics.frequencies(cell_ang)
    half = (harmonics.ny - 1) // 2
    ky = ky[:, half:]  # hy >= 0; the other half follows from cos and sin
    damping = (-2.0 * math.pi**2) * sigma_ang * sigma_ang
    scale = weight_ang2 / (cell_ang[:, :1] * cell_ang[:, 1:])
    x_factor = torch.exp(damping[..., None] * (kx * kx)[:, None, :]) * scale[..., None]  # (B, K, Nx)
    y_factor = torch.exp(damping[..., None] * (ky * ky)[:, None, :])  # (B, K, Hy + 1)
    x_phase = (2.0 * math.pi) * xy_ang[..., :1] * kx[:, None, :]
    y_phase = (2.0 * math.pi) * xy_ang[..., 1:] * ky[:, None, :]
    x_basis = torch.cat((x_factor * torch.cos(x_phase), x_factor * torch.sin(x_phase)), dim=-1)
    y_basis = torch.cat((y_factor * torch.cos(y_phase), y_factor * torch.sin(y_phase)), dim=-1)
    product = torch.bmm(y_basis.transpose(1, 2), x_basis)  # (B, 2 (Hy + 1), 2 Nx)
    cosines, sines = product[:, : half + 1], product[:, half + 1 :]
    nx = harmonics.nx
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

    `removed` and `added` are (xy_ang (B, J, 2), weight_ang2 (B, J), sigma_ang (B, J)); a weight of zero changes nothing.
    """
    xy, weight, sigma = (torch.cat(pair, dim=1) for pair in zip(removed, added, strict=True))
    gone = removed[1].shape[1]
    sign = torch.ones_like(weight)
    sign[:, :gone] = -1.0
    return scatterer_coefficients(cell_ang, xy, weight * sign, sigma, harmonics)


def image_coefficients(structure: Tensor, transfer: Tensor) -> Tensor:
    """Coefficients of the expected image: structure (B, Ny, Nx) complex times transfer (B, Ny, Nx) real."""
    return structure * transfer


def scan_image(
    coefficients: Tensor, cell_ang: Tensor, x_ang: Tensor, y_ang: Tensor, row_offset_ang: Tensor | None = None
) -> Tensor:
    """Expected collected fraction on a raster: (B, H, W).

    `coefficients` (B, Ny, Nx), `cell_ang` (B, 2), columns `x_ang` (B, W), scan rows `y_ang` (B, H). `row_offset_ang` (B, H, 2)
    is added to the probe's place in the specimen's frame for each scan row, and is exact, not interpolated.
    """
    if row_offset_ang is not None:
        y_ang = y_ang + row_offset_ang[..., 1]
    amplitude = _rows_of_series(coefficients, cell_ang, y_ang)  # (B, H, 2 Nx): real parts, then imaginary
    nx = coefficients.shape[-1]
    if row_offset_ang is not None:
        shift = _powers(row_offset_ang[..., 0] / cell_ang[:, :1], nx)  # (B, H, 2 Nx)
        cosine, sine = shift[..., :nx], shift[..., nx:]
        real, imaginary = amplitude[..., :nx], amplitude[..., nx:]
        amplitude = torch.cat((real * cosine - imaginary * sine, real * sine + imaginary * cosine), dim=-1)
    return torch.bmm(amplitude, _columns_of_series(x_ang / cell_ang[:, :1], nx).transpose(1, 2))


def probe_signal(coefficients: Tensor, cell_ang: Tensor, xy_ang: Tensor) -> Tensor:
    """Expected collected fraction at single probe places (B, J, 2): (B, J)."""
    amplitude = _rows_of_series(coefficients, cell_ang, xy_ang[..., 1])
    columns = _columns_of_series(xy_ang[..., 0] / cell_ang[:, :1], coefficients.shape[-1])
    return (amplitude * columns).sum(-1)


def image_grid(coefficients: Tensor, ny: int, nx: int) -> Tensor:
    """The periodic image on ny x nx points, point (0, 0) at the cell's origin: (B, ny, nx). Raises ConfigError below Nyquist."""
    half, columns = (coefficients.shape[1] - 1) // 2, coefficients.shape[2]
    if ny < 2 * half + 1 or nx < 2 * columns - 1:
        raise ConfigError(
            f"A grid for these coefficients needs at least {2 * half + 1} x {2 * columns - 1} points; given {ny} x {nx}."
        )
    spectrum = coefficients.new_zeros((coefficients.shape[0], ny, nx // 2 + 1))
    spectrum[:, : half + 1, :columns] = coefficients[:, half:]
    if half:
        spectrum[:, -half:, :columns] = coefficients[:, :half]
    return torch.fft.irfft2(spectrum, s=(ny, nx), norm="forward")


def grid_coefficients(image: Tensor, harmonics: Harmonics) -> Tensor:
    """The coefficients (B, Ny, Nx) of a periodic image (B, ny, nx): inverse of `image_grid`. Raises ConfigError below Nyquist."""
    ny, nx = image.shape[-2:]
    half = (harmonics.ny - 1) // 2
    if ny < harmonics.ny or nx < 2 * harmonics.nx - 1:
        raise ConfigError(
            f"{harmonics} need a grid of at least {harmonics.ny} x {2 * harmonics.nx - 1}; given {ny} x {nx}."
        )
    spectrum = torch.fft.rfft2(image, norm="forward")[:, :, : harmonics.nx]
    return torch.cat((spectrum[:, ny - half :], spectrum[:, : half + 1]), dim=1)


def _rows_of_series(coefficients: Tensor, cell_ang: Tensor, y_ang: Tensor) -> Tensor:
    """The series summed over hy at y (B, H): (B, H, 2 Nx), real parts then imaginary; hx > 0 counted twice.

    With cos and sin as the basis along y the product is real: half the work of the complex one.
    """
    half = (coefficients.shape[1] - 1) // 2
    parts = torch.view_as_real(coefficients)  # (B, Ny, Nx, 2)
    positive, negative = parts[:, half:], parts[:, : half + 1].flip(1)
    even, odd = positive + negative, positive - negative
    # The column of hy = 0 was added to itself.
    even = torch.cat((even[:, :1] * 0.5, even[:, 1:]), dim=1)
    cosines = torch.cat((even[..., 0], even[..., 1]), dim=-1)  # (B, Hy + 1, 2 Nx)
    sines = torch.cat((-odd[:, 1:, :, 1], odd[:, 1:, :, 0]), dim=-1)  # i (a + ib) = -b + ia
    y_basis = _powers(y_ang / cell_ang[:, 1:], half + 1)  # (B, H, 2 (Hy + 1))
    basis = torch.cat((y_basis[..., : half + 1], y_basis[..., half + 2 :]), dim=-1)
    return torch.bmm(basis, torch.cat((cosines, sines), dim=1))


def _columns_of_series(turns: Tensor, count: int) -> Tensor:
    """What the amplitudes of `_rows_of_series` are multiplied with along x, at x / Lx (B, W): (B, W, 2 Nx)."""
    basis = 2.0 * _powers(turns, count)
    cosine, sine = basis[..., :count], basis[..., count:]
    first = torch.ones_like(cosine[..., :1])
    return torch.cat((first, cosine[..., 1:], -sine), dim=-1)


def _powers(turns: Tensor, count: int) -> Tensor:
    """cos and sin of 2 pi h t for h = 0 .. count - 1 at t (B, P): (B, P, 2 count), cosines first."""
    orders = torch.arange(count, dtype=turns.dtype, device=turns.device)
    phase = (2.0 * math.pi) * (turns - torch.round(turns.detach()))[..., None] * orders
    return torch.cat((torch.cos(phase), torch.sin(phase)), dim=-1)
