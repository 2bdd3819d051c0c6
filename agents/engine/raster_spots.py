"""A careful full frame, then dwells on its brightest spots one after the other: the raster of atom targeting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agents.engine.sight import brightest_spots, field_of, fractions_of
from agents.policy import Array, Face, Observation, as_array
from stem_gym.core.units import ELECTRONS_PER_PC


class SpotRaster:
    """A full frame, then dwells on its brightest spots in the order of their brightness; then all of it again."""

    def __init__(self, face: Face, current_pa: float, margin: float) -> None:
        self.field = field_of(face, "raster")
        seconds = (1.0 + margin) * self.field.wanted_electrons / (current_pa * ELECTRONS_PER_PC)
        self._dwells = max(1, int(np.ceil(seconds / self.field.dwell_max_s)))  # at each spot
        self._dwell_s = seconds / self._dwells
        self._spots = np.zeros((face.rows, self.field.targets, 2))
        self._step = np.zeros(face.rows, dtype=np.int64)

    def reset(self, rows: Sequence[int] | Array) -> None:
        """Begin again with a full frame."""
        index = np.asarray(rows, dtype=np.int64)
        self._spots[index], self._step[index] = 0.0, 0

    def act(self, observation: Observation) -> Array:
        """Actions (B, 5)."""
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
