"""The imaging surrogate: expected HAADF maps as abTEM multislice with frozen phonons gives them.

A sum of atoms, each a cross section times the probe, misses what neighbouring atoms do together: their scattered
waves interfere, and in thicker places the first atom bends the beam for the next. The surrogate takes that sum as its
first guess, with cross sections and widths measured on single atoms in abTEM, and lets a small network correct it.
Source size and focal spread are applied afterwards: both are linear, hence exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stem_gym.core.errors import ConfigError
from stem_gym.simulator.imaging import Harmonics, grid_coefficients, image_grid, scatterer_coefficients
from stem_gym.simulator.optics import FWHM_PER_SIGMA, Optics, transfer_function
from stem_gym.simulator.specimens import Specimen
from stem_gym.surrogates.imaging_network import CorrectionNetwork
from stem_gym.surrogates.surrogate import Estimate, ModelCard, judge_range, load_weights

__all__ = ["AtomTable", "ImagingSurrogate", "grid_shape"]

PIXEL_ANG = 0.25
USUAL_SOURCE_ANG = 0.7  # full width at half maximum
_NEIGHBOURHOOD_ANG = 0.8  # rms width of the local scale that corrections are relative to
_CARBON = 6
_GRAPHENE_DENSITY_PER_ANG2 = 0.38
_FLOOR = 0.15  # of a graphene sheet: keeps the local scale finite over vacuum
_LARGEST_CORRECTION = 0.2
_OUTSIDE_FACTOR = 3.0
FEATURES = 5
CONDITIONS = 8
# Nodes and weights of Gauss and Hermite for a normal distribution: exact to the ninth power of the defocus.
_SPREAD_NODES = (-2.8569700, -1.3556262, 0.0, 1.3556262, 2.8569700)
_SPREAD_WEIGHTS = (0.0112574, 0.2220759, 0.5333333, 0.2220759, 0.0112574)


def grid_shape(cell_ang: Tensor) -> tuple[int, int]:
    """Even numbers of pixels (ny, nx) nearest to 0.25 Å for the mean of the cells (B, 2)."""
    nx, ny = (2 * max(8, round(float(side) / (2 * PIXEL_ANG))) for side in cell_ang.mean(0))
    return ny, nx


@dataclass(frozen=True)
class AtomTable:
    """Cross section and squared width of single atoms, from abTEM."""

    energy_kev: Tensor  # (3,)
    cross_section_ang2: Tensor  # (3, Z) for atomic numbers 1 … Z
    width2_ang2: Tensor  # (3, Z) added to the thermal variance, per axis

    def lookup(self, atomic_number: Tensor, energy_kev: Tensor) -> tuple[Tensor, Tensor]:
        """Cross section and squared width of atoms (B, K) at energies (B,).

        Quadratic in log energy through the table.
        """
        index = (atomic_number - 1).clamp(0, self.cross_section_ang2.shape[1] - 1)
        basis = _lagrange(torch.log(self.energy_kev), torch.log(energy_kev))  # (B, 3)
        logarithm = torch.log(self.cross_section_ang2)[:, index]  # (3, B, K)
        section = torch.exp(torch.einsum("be,ebk->bk", basis, logarithm))
        return section, torch.einsum("be,ebk->bk", basis, self.width2_ang2[:, index])


def _lagrange(nodes: Tensor, x: Tensor) -> Tensor:
    """Lagrange polynomials (B, n) of the nodes (n,) at x (B,)."""
    count = len(nodes)
    others = [[j for j in range(count) if j != i] for i in range(count)]
    return torch.stack(
        [torch.prod((x[:, None] - nodes[o]) / (nodes[i] - nodes[o]), dim=1) for i, o in enumerate(others)], dim=1
    )


@dataclass(frozen=True)
class Features:
    """What the network sees, and what its answer is relative to."""

    base: Tensor  # (B, ny, nx) sum over atoms, collected fraction
    scale: Tensor  # (B, ny, nx) local mean of the collected fraction, with a floor
    maps: Tensor  # (B, FEATURES, ny, nx)
    conditions: Tensor  # (B, CONDITIONS)


def features(specimen: Specimen, optics: Optics, table: AtomTable, shape: tuple[int, int]) -> Features:
    """The sum over atoms and the network's inputs on a grid (ny, nx).

    Source size and focal spread of `optics` are ignored.
    """
    point = replace(
        optics,
        source_fwhm_ang=torch.zeros_like(optics.energy_kev),
        focal_spread_ang=torch.zeros_like(optics.energy_kev),
    )
    harmonics = Harmonics(nx=shape[1] // 2, ny=2 * (shape[0] // 2) - 1)
    kx, ky = harmonics.frequencies(specimen.cell_ang)
    square = kx[:, None, :] ** 2 + ky[:, :, None] ** 2
    section, width2 = table.lookup(specimen.atomic_number, optics.energy_kev)
    section = torch.where(specimen.present, section, torch.zeros_like(section))
    width = torch.sqrt(specimen.thermal_sigma_ang**2 + width2)
    carbon, _ = table.lookup(torch.full_like(specimen.atomic_number[:, :1], _CARBON), optics.energy_kev)
    carbon = carbon[:, :, None]  # (B, 1, 1)

    def series(weight: Tensor) -> Tensor:
        return scatterer_coefficients(specimen.cell_ang, specimen.xy_ang, weight, width, harmonics)

    def blurred(coefficients: Tensor, sigma_ang: float) -> Tensor:
        return image_grid(coefficients * torch.exp(-2 * math.pi**2 * sigma_ang**2 * square), *shape)

    atoms = series(section)
    heavy = series(section * section)
    base = image_grid(atoms * transfer_function(point, kx, ky), *shape)
    sheet = _GRAPHENE_DENSITY_PER_ANG2 * carbon
    scale = blurred(atoms, _NEIGHBOURHOOD_ANG).clamp(min=0) + _FLOOR * sheet
    mean_section = (blurred(heavy, 0.5).clamp(min=0) + 0.05 * sheet * carbon) / (
        blurred(atoms, 0.5).clamp(min=0) + 0.05 * sheet
    )
    maps = torch.stack(
        [
            base / scale - 1,
            blurred(atoms, 0.3) / scale - 1,
            blurred(atoms, 0.5) / scale - 1,
            torch.log(scale / sheet),
            torch.log(mean_section / carbon),
        ],
        dim=1,
    )
    return Features(base, scale, maps, _conditions(specimen, optics))


def _conditions(specimen: Specimen, optics: Optics) -> Tensor:
    """Settings of the optics and the mean thermal amplitude, each of order one: (B, CONDITIONS)."""
    count = specimen.present.sum(1).clamp(min=1)
    thermal = (specimen.thermal_sigma_ang * specimen.present).sum(1) / count
    c3 = optics.c3_mm / 0.005
    defocus = optics.defocus_ang / 50
    return torch.stack(
        [
            (optics.energy_kev - 80) / 20,
            (optics.convergence_mrad - 32) / 3,
            defocus,
            defocus.abs(),
            optics.astigmatism_ang / 20,
            c3,
            c3 * defocus,
            (thermal - 0.05) / 0.01,
        ],
        dim=1,
    )


class ImagingSurrogate:
    """Expected HAADF maps with uncertainty, from the same specimen and optics as the physics model.

    Batched, on any device, differentiable. Rows share one pixel grid; their cells may differ by a few percent.
    """

    def __init__(self, network: CorrectionNetwork, table: AtomTable, card: ModelCard, settings: dict[str, Any]) -> None:
        self.network, self.table, self._card, self.settings = network, table, card, settings
        self.network.eval().requires_grad_(False)

    @property
    def card(self) -> ModelCard:
        """The model card: training data, held-out error, valid range."""
        return self._card

    @classmethod
    def load(cls, path: Path | None = None, device: torch.device | str | None = None) -> ImagingSurrogate:
        """The shipped surrogate, or one from PATH(.safetensors, .json). Raises RecordError for damaged files."""
        shipped = Path(str(files("stem_gym.surrogates") / "weights" / "imaging_haadf"))
        tensors, card, settings = load_weights(path or shipped)
        network = CorrectionNetwork(FEATURES, CONDITIONS, int(settings["width"]), tuple(settings["dilations"]))
        network.load_state_dict({name[8:]: value for name, value in tensors.items() if name.startswith("network.")})
        table = AtomTable(*(tensors[f"table.{name}"].to(device) for name in vars(_EMPTY_TABLE)))
        return cls(network.to(device), table, card, settings)

    def estimate(
        self, specimen: Specimen, optics: Optics, shape: tuple[int, int] | None = None, strict: bool = False
    ) -> Estimate:
        """Expected collected fraction per incident electron on the cell's pixel grid: mean and std (B, ny, nx).

        `shape` is the grid (ny, nx), by default the one nearest to 0.25 Å. Rows outside the valid range are flagged,
        warned about and given a wider uncertainty; with `strict` they raise ValidRangeError.
        """
        shape = shape or grid_shape(specimen.cell_ang)
        inside = judge_range(self.card, self._extremes(specimen, optics, shape), strict)
        mean, log_spread = self._focused(specimen, optics, shape)
        mean = self._blur(mean, optics, specimen, shape)
        blurred = (optics.source_fwhm_ang / USUAL_SOURCE_ANG)[:, None, None].clamp(max=1.5)
        raw = torch.exp((1 - blurred) * log_spread[:, 0] + blurred * log_spread[:, 1])
        calibration = self._calibration(optics.source_fwhm_ang)[:, None, None]
        widened = torch.where(inside, 1.0, _OUTSIDE_FACTOR)[:, None, None]
        return Estimate(mean + self._blobs(specimen, optics, shape), raw * calibration * widened, inside)

    def coefficients(
        self, specimen: Specimen, optics: Optics, harmonics: Harmonics, shape: tuple[int, int] | None = None
    ) -> Tensor:
        """Fourier coefficients (B, Ny, Nx) of the expected image, to use in place of the physics model's."""
        estimate = self.estimate(specimen, optics, shape)
        ny, nx = estimate.mean.shape[-2:]
        if ny < harmonics.ny or nx < 2 * harmonics.nx - 1:
            raise ConfigError(f"{harmonics} go beyond the surrogate's grid of {ny} x {nx} pixels of {PIXEL_ANG} Å.")
        return grid_coefficients(estimate.mean, harmonics)

    def sum_over_atoms(self, specimen: Specimen, optics: Optics, shape: tuple[int, int] | None = None) -> Tensor:
        """The first guess, without the network's correction: (B, ny, nx)."""
        shape = shape or grid_shape(specimen.cell_ang)
        base = features(specimen, optics, self.table, shape).base
        return self._blur(base, optics, specimen, shape)

    def correct(self, seen: Features) -> tuple[Tensor, Tensor]:
        """Mean (B, ny, nx) for a point source in one focus, and log of the raw standard deviations (B, 2, ny, nx).

        The standard deviations are of the sharp image and of the image blurred by the usual source.
        """
        correction, log_spread = self.network(seen.maps, seen.conditions)
        mean = seen.base + seen.scale * _LARGEST_CORRECTION * correction
        return mean, log_spread.clamp(-5, 5) - 5 + torch.log(seen.scale)[:, None]

    def _focused(self, specimen: Specimen, optics: Optics, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Mean over the focal spread: one map for each node of a quadrature, or one map where no row has a spread."""
        if not bool((optics.focal_spread_ang > 0).any()):
            return self.correct(features(specimen, optics, self.table, shape))
        mean, log_spread = torch.zeros(()), torch.zeros(())
        for node, weight in zip(_SPREAD_NODES, _SPREAD_WEIGHTS, strict=True):
            shifted = replace(optics, defocus_ang=optics.defocus_ang + node * optics.focal_spread_ang)
            one_mean, one_spread = self.correct(features(specimen, shifted, self.table, shape))
            mean, log_spread = mean + weight * one_mean, log_spread + weight * one_spread
        return mean, log_spread

    def _blur(self, image: Tensor, optics: Optics, specimen: Specimen, shape: tuple[int, int]) -> Tensor:
        """Convolution with the Gaussian source."""
        ky = torch.fft.fftfreq(shape[0], device=image.device) * shape[0] / specimen.cell_ang[:, 1:]  # (B, ny)
        kx = torch.fft.rfftfreq(shape[1], device=image.device) * shape[1] / specimen.cell_ang[:, :1]
        sigma = optics.source_fwhm_ang[:, None, None] / FWHM_PER_SIGMA
        damping = torch.exp(-2 * math.pi**2 * sigma**2 * (kx[:, None, :] ** 2 + ky[:, :, None] ** 2))
        return torch.fft.irfft2(torch.fft.rfft2(image) * damping, s=shape)

    def _blobs(self, specimen: Specimen, optics: Optics, shape: tuple[int, int]) -> Tensor | float:
        """Smooth contamination: broad Gaussians that scatter independently; the physics model's own term."""
        if specimen.blob_weight_ang2.shape[1] == 0:
            return 0.0
        harmonics = Harmonics(nx=shape[1] // 2, ny=2 * (shape[0] // 2) - 1)
        kx, ky = harmonics.frequencies(specimen.cell_ang)
        blobs = scatterer_coefficients(
            specimen.cell_ang, specimen.blob_xy_ang, specimen.blob_weight_ang2, specimen.blob_sigma_ang, harmonics
        )
        return image_grid(blobs * transfer_function(optics, kx, ky), *shape)

    def _calibration(self, source_fwhm_ang: Tensor) -> Tensor:
        """Factor on the raw standard deviation, linear between the source sizes it was measured at: (B,)."""
        sizes = torch.tensor(
            self.settings["calibration_fwhm_ang"], dtype=source_fwhm_ang.dtype, device=source_fwhm_ang.device
        )
        factors = torch.tensor(self.settings["calibration"], dtype=source_fwhm_ang.dtype, device=source_fwhm_ang.device)
        upper = torch.bucketize(source_fwhm_ang.detach().contiguous(), sizes).clamp(1, len(sizes) - 1)
        share = ((source_fwhm_ang - sizes[upper - 1]) / (sizes[upper] - sizes[upper - 1])).clamp(0, 1)
        return factors[upper - 1] * (1 - share) + factors[upper] * share

    def _extremes(self, specimen: Specimen, optics: Optics, shape: tuple[int, int]) -> dict[str, tuple[Tensor, Tensor]]:
        """Lowest and highest value in every row of each quantity that has a valid range."""
        spread = _SPREAD_NODES[-2] * optics.focal_spread_ang
        pixels = specimen.cell_ang / torch.tensor(
            [shape[1], shape[0]], dtype=optics.energy_kev.dtype, device=specimen.cell_ang.device
        )
        thermal = specimen.thermal_sigma_ang
        hidden = ~specimen.present
        alone = {
            "energy_kev": optics.energy_kev,
            "convergence_mrad": optics.convergence_mrad,
            "astigmatism_ang": optics.astigmatism_ang,
            "c3_mm": optics.c3_mm,
            "source_fwhm_ang": optics.source_fwhm_ang,
        }
        number = specimen.atomic_number.to(thermal.dtype)
        density = self._projected_density(specimen)
        return {
            **{name: (value, value) for name, value in alone.items()},
            "defocus_ang": (optics.defocus_ang - spread, optics.defocus_ang + spread),
            "pixel_ang": (pixels.min(1).values, pixels.max(1).values),
            "atomic_number": (number.masked_fill(hidden, _CARBON).amin(1), number.masked_fill(hidden, _CARBON).amax(1)),
            "thermal_sigma_ang": (thermal.masked_fill(hidden, 0.05).amin(1), thermal.masked_fill(hidden, 0.05).amax(1)),
            "atoms_per_ang2": (density, density),
        }

    def _projected_density(self, specimen: Specimen) -> Tensor:
        """Atoms per Å² averaged over the cell: (B,)."""
        return specimen.present.sum(1) / specimen.cell_ang.prod(1)


_EMPTY_TABLE = AtomTable(torch.zeros(3), torch.ones(3, 1), torch.ones(3, 1))


def table_from_arrays(arrays: dict[str, np.ndarray]) -> AtomTable:
    """The table that `stem_gym.datasets.single_atoms` wrote."""
    return AtomTable(*(torch.as_tensor(arrays[name], dtype=torch.float32) for name in vars(_EMPTY_TABLE)))
