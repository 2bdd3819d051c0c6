"""Raster: scan everything once, slowly and carefully, then visit the brightest spots; or spectra on an even grid.

What is commonly done by hand or by a simple script. Over atoms it does not look again, so the drift carries the sites
away; in a spectrum search it measures where a grid says, whatever it has found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from agents.engine.raster_grid import GridRaster
from agents.engine.raster_spots import SpotRaster
from agents.engine.search_field import is_search
from agents.policy import Array, Face, Observation, Policy
from stem_gym.core.config import Config


class Settings(Config):
    """What can be chosen."""

    current_pa: float = Field(40.0, gt=0)
    """beam current, from which the length of the visits to spots follows"""
    margin: float = Field(0.1, ge=0)
    """electrons given to a spot beyond what is wanted, as a fraction"""
    exposure_share: float = Field(0.5, ge=0, le=1)
    """exposure of a spectrum: where on the logarithmic way from the shortest to the longest"""


class Raster(Policy):
    """A full frame and its brightest spots where atoms are the targets; an even grid where spectra are searched."""

    name = "raster"
    Settings = Settings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        self.strategy: GridRaster | SpotRaster = (
            GridRaster(face, settings.exposure_share)
            if is_search(face)
            else SpotRaster(face, settings.current_pa, settings.margin)
        )

    def reset(self, rows: Sequence[int] | Array, seeds: Sequence[int] | None = None) -> None:
        self.strategy.reset(rows)

    def act(self, observation: Observation) -> Array:
        return self.strategy.act(observation)


POLICY = Raster
