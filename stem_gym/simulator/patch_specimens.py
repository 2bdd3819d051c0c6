"""Patches: smooth random fields, each with a Gaussian peak of its own: a synthetic specimen, for tests."""

from __future__ import annotations

import functools
import math
from typing import Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stem_gym.core.config import Config
from stem_gym.simulator.spectral_specimen import SpectralSpecimen


class RandomRows(Protocol):
    """What a recipe needs of `stem_gym.core.streams.Streams`."""

    def uniform(self, rows: Tensor, shape: tuple[int, ...] = ()) -> Tensor: ...
    def normal(self, rows: Tensor, shape: tuple[int, ...] = ()) -> Tensor: ...


class PatchRecipe(Config):
    """Fields between 0 and 1, each the share of one Gaussian peak over a flat background; no material is meant.

    A field is a logistic function of a random sum of half waves across the field of view. The image is a sum of the
    fields with weights of their own, so that what is seen tells of the spectra, but not of all of them alike.
    """

    kind: Literal["patches"] = "patches"
    """this recipe"""
    fov_nm: float = Field(default=32.0, gt=0, le=1e5)
    """width of the field"""
    peaks: int = Field(default=4, ge=1, le=32)
    """number of fields and of peaks"""
    waves: int = Field(default=5, ge=1, le=32)
    """most half waves across the field of view, on either axis"""
    sharpness: float = Field(default=4.0, gt=0, le=100)
    """how steep the patches' borders are"""
    channels: int = Field(default=128, ge=2, le=4096)
    """of a spectrum"""
    first_ev: float = Field(default=0.0, ge=-100)
    """energy of the first channel"""
    last_ev: float = Field(default=50.0, gt=0)
    """energy of the last channel"""
    pattern_pixels: int = Field(default=0, ge=0, le=256)
    """side of a diffraction pattern; 0: spectra"""
    pattern_mrad: float = Field(default=20.0, gt=0)
    """largest angle of a pattern along x and y"""
    width: float = Field(default=0.04, gt=0, le=1)
    """standard deviation of a peak, as a part of the axis"""
    peak_fraction: float = Field(default=4.0e-4, gt=0, le=1)
    """of the beam, detected in the middle channel of a peak where its field is 1"""
    background_fraction: float = Field(default=1.0e-4, ge=0, le=1)
    """of the beam, detected in every channel"""
    image_fraction: float = Field(default=0.02, gt=0, le=0.5)
    """of the beam, on the annular detector where all fields are 0; twice that where all are 1"""

    @model_validator(mode="after")
    def _rising(self) -> PatchRecipe:
        if self.last_ev <= self.first_ev:
            raise ValueError(f"last_ev must exceed first_ev; given {self.first_ev} to {self.last_ev}")
        return self

    def axis(self) -> Tensor:
        """Energies (C,) in eV; angles (C, 2) in mrad, x first and fast, where patterns are made."""
        if not self.pattern_pixels:
            return torch.linspace(self.first_ev, self.last_ev, self.channels)
        side = torch.linspace(-self.pattern_mrad, self.pattern_mrad, self.pattern_pixels)
        y, x = torch.meshgrid(side, side, indexing="ij")
        return torch.stack((x, y), dim=-1).flatten(0, 1)

    def build(
        self, streams: RandomRows, rows: Tensor, shape: tuple[int, int], device: torch.device | str = "cpu"
    ) -> SpectralSpecimen:
        """Fresh specimens of `rows` (n,) on cells `shape` (H, W); each is a function of its own row's stream."""
        n, peaks = len(rows), self.peaks
        wave_y, wave_x = (_half_waves(side, self.waves, torch.device(device)) for side in shape)
        amplitude = streams.normal(rows, (peaks * self.waves, self.waves)).to(device)
        # One product for each row: a product over all rows could round a row by its neighbours.
        along_y = torch.bmm(
            wave_y.expand(n * peaks, -1, -1), amplitude.reshape(n * peaks, self.waves, self.waves)
        )  # (n · peaks, H, waves)
        height = torch.bmm(along_y, wave_x.T.expand(n * peaks, -1, -1)).reshape(n, peaks, *shape)
        draw = streams.uniform(rows, (peaks, 4)).to(device)
        level = draw[:, :, 0] - 0.5
        field = torch.sigmoid(self.sharpness * (height - level[:, :, None, None]))
        weight = draw[:, :, 1] / draw[:, :, 1].sum(1, keepdim=True)
        image = self.image_fraction * (1.0 + (weight[:, :, None, None] * field).sum(1))
        loadings = torch.cat((field.flatten(2), torch.ones_like(field[:, :1].flatten(2))), dim=1).transpose(1, 2)
        return SpectralSpecimen(image, loadings.contiguous(), self._components(draw[:, :, 2:]))

    def _components(self, place: Tensor) -> Tensor:
        """Peaks at `place` (n, peaks, 2) in parts of the axis, and the background: (n, peaks + 1, C)."""
        axis = self.axis().to(place.device)
        axis = axis if axis.dim() == 2 else axis.unsqueeze(1)  # (C, D)
        low, high = axis.amin(0), axis.amax(0)
        parts = (axis - low) / (high - low)
        inside = 0.1 + 0.8 * place[:, :, None, : axis.shape[1]]
        away2 = (parts - inside).square().sum(-1)  # (n, peaks, C)
        peaks = self.peak_fraction * torch.exp(-0.5 * away2 / self.width**2)
        return torch.cat((peaks, torch.full_like(peaks[:, :1], self.background_fraction)), dim=1)


@functools.cache
def _half_waves(cells: int, waves: int, device: torch.device) -> Tensor:
    """Cosines (cells, waves) of 0, 1, … half waves; those of many are weaker, and their squares sum to 1."""
    order = torch.arange(waves, device=device)
    strength = 1.0 / (1.0 + order)
    middle = (torch.arange(cells, device=device) + 0.5) / cells
    return strength / strength.norm() * torch.cos(math.pi * order * middle[:, None])
