"""Raster: scan everything once, slowly and carefully, then visit the brightest spots one after the other.

What is commonly done by hand or by a simple script; it does not look again, so the drift carries the sites away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from agents.engine.sight import brightest_spots, field_of, fractions_of
from agents.policy import Array, Face, Observation, Policy, as_array
from stem_gym.core.config import Config
from stem_gym.core.units import ELECTRONS_PER_PC


class Settings(Config):
    """What can be chosen."""

    current_pa: float = Field(40.0, gt=0)
    """beam current, from which the length of the visits follows"""
    margin: float = Field(0.1, ge=0)
    """electrons given beyond what is wanted, as a fraction"""


class Raster(Policy):
    """A full frame, then dwells on its brightest spots in the order of their brightness; then all of it again."""

    name = "raster"
    Settings = Settings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        self.field = field_of(face, self.name)
        seconds = (1.0 + settings.margin) * self.field.wanted_electrons / (settings.current_pa * ELECTRONS_PER_PC)
        self._dwells = max(1, int(np.ceil(seconds / self.field.dwell_max_s)))  # at each spot
        self._dwell_s = seconds / self._dwells
        self._spots = np.zeros((face.rows, self.field.targets, 2))
        self._step = np.zeros(face.rows, dtype=np.int64)

    def reset(self, rows: Sequence[int] | Array, seeds: Sequence[int] | None = None) -> None:
        index = np.asarray(rows, dtype=np.int64)
        self._spots[index], self._step[index] = 0.0, 0

    def act(self, observation: Observation) -> Array:
        field, rows = self.field, np.arange(len(self._step))
        looks = self._step == 0
        scanned = self._step == 1
        if scanned.any():
            image = fractions_of({"image": as_array(observation["image"])}, field)
            pixels, _ = brightest_spots(image, field.probe_sigma_ang * image.shape[2] / field.fov_ang, field.targets)
            self._spots = np.where(scanned[:, None, None], (pixels + 0.5) / image.shape[2], self._spots)
        visit = ((self._step - 1) // self._dwells).clip(0, field.targets - 1)
        stay = field.stay(self._spots[rows, visit], np.full(len(rows), self._dwell_s))
        middle, side = np.full((len(rows), 2), 0.5), np.full(len(rows), field.fov_ang)
        scan = field.scan(middle, side, np.full(len(rows), field.pixel_dwell_max_s))
        self._step = np.where(self._step == self._dwells * field.targets, 0, self._step + 1)
        return np.where(looks[:, None], scan, stay)


POLICY = Raster
