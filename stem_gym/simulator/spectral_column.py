"""The settings of a simulated column that records spectra or diffraction patterns cell by cell."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stem_gym.core.config import Config
from stem_gym.simulator.detectors import DetectorModel
from stem_gym.simulator.drift import DriftModel
from stem_gym.simulator.field_specimens import FieldsRecipe
from stem_gym.simulator.flake_specimens import FlakesRecipe
from stem_gym.simulator.particle_specimens import ParticlesRecipe
from stem_gym.simulator.patch_specimens import PatchRecipe
from stem_gym.simulator.phase_specimens import PhasesRecipe
from stem_gym.simulator.probe_grid import SpectralOverheads
from stem_gym.simulator.spectrometer import SpectrometerModel

DIFFRACTION = "diffraction"  # the detector that answers patterns
SpectralRecipe = Annotated[
    ParticlesRecipe | FlakesRecipe | PhasesRecipe | FieldsRecipe | PatchRecipe, Field(discriminator="kind")
]


class SpectralColumn(Config):
    """A simulated column with a field of cells, each with its spectrum or pattern."""

    kind: Literal["spectral"] = "spectral"
    """this instrument"""
    specimen: SpectralRecipe
    """what is under the beam"""
    spectrometer: Literal["eels", "eds", "diffraction"] = "eels"
    """name of the detector that Acquire takes"""
    shape: tuple[int, int]
    """cells (H, W) of the field, which is as wide as the specimen says; cells are square"""
    current_pa: float = Field(default=40.0, gt=0, le=10000)
    """beam current"""
    detector: DetectorModel = DetectorModel()
    """annular detector"""
    camera: SpectrometerModel = SpectrometerModel()
    """how the spectrometer, X-ray detector or pixelated camera counts"""
    drift: DriftModel = DriftModel()
    """drift and scan distortion"""
    overheads: SpectralOverheads = SpectralOverheads()
    """time beside exposure"""

    @model_validator(mode="after")
    def _fits(self) -> SpectralColumn:
        if min(self.shape) < 2 or max(self.shape) > 4096:
            raise ValueError(f"shape must be 2 to 4096 cells on either side; given {self.shape}")
        patterns = self.specimen.axis().dim() == 2
        if patterns != (self.spectrometer == DIFFRACTION):
            made = "diffraction patterns" if patterns else "spectra"
            raise ValueError(f"the specimen makes {made}, which {self.spectrometer!r} does not record")
        return self
