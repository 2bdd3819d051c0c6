"""What the classical agents see in a frame: bright spots, and where exactly one of them stands. Batched over rows.

Lengths are in Å or in fractions of the reference frame, as named; images are (B, H, W) collected fractions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.policy import Array, Face
from stem_gym.core.errors import PolicyError
from stem_gym.core.units import fwhm_from_sigma
from stem_gym.surrogates import spots
from stem_gym.surrogates.atom_finder import COARSEST_PIXEL_ANG, BrightestSpots, find_atoms
from stem_gym.surrogates.spots import smooth

__all__ = ["Field", "brightest_spots", "centroids", "field_of", "fractions_of", "same_sites", "smooth"]

_NEEDED = (
    "targets",
    "pixels",
    "fov_ang",
    "scan_side_min_ang",
    "pixel_dwell_min_s",
    "pixel_dwell_max_s",
    "dwell_min_s",
    "dwell_max_s",
    "image_full_scale",
    "accepted_fraction",
    "probe_fwhm_ang",
    "wanted_electrons",
    "radius_ang",
)
SCAN, STAY = 1.0, -1.0


@dataclass(frozen=True)
class Field:
    """The public numbers of an atom-targeting task, and the way from quantities to its actions."""

    targets: int
    pixels: int
    fov_ang: float
    scan_side_min_ang: float
    pixel_dwell_min_s: float
    pixel_dwell_max_s: float
    dwell_min_s: float
    dwell_max_s: float
    image_full_scale: float
    accepted_fraction: float
    probe_fwhm_ang: float
    wanted_electrons: float
    radius_ang: float

    @property
    def probe_sigma_ang(self) -> float:
        return self.probe_fwhm_ang / fwhm_from_sigma(1.0)

    def scan(self, centre: Array, side_ang: Array, pixel_dwell_s: Array) -> Array:
        """Actions (n, 5) that scan squares around `centre` (n, 2) fractions; side and dwell (n,)."""
        size = (side_ang - self.scan_side_min_ang) / (self.fov_ang - self.scan_side_min_ang)
        return self._action(
            SCAN, centre, size, _log_part(pixel_dwell_s, self.pixel_dwell_min_s, self.pixel_dwell_max_s)
        )

    def stay(self, place: Array, time_s: Array) -> Array:
        """Actions (n, 5) that dwell at `place` (n, 2) fractions for `time_s` (n,)."""
        return self._action(
            STAY, place, np.full(len(place), 0.5), _log_part(time_s, self.dwell_min_s, self.dwell_max_s)
        )

    def _action(self, kind: float, place: Array, size: Array, time: Array) -> Array:
        part = np.column_stack((place, size, time))
        return np.column_stack((np.full(len(part), kind), 2.0 * part - 1.0)).clip(-1.0, 1.0).astype(np.float32)


def field_of(face: Face, agent: str) -> Field:
    """The field of an atom-targeting face. Raises PolicyError where the task is another one."""
    missing = [key for key in _NEEDED if key not in face.task]
    if missing:
        raise PolicyError(
            f"The agent {agent!r} needs a task that says {', '.join(missing)}; {face.id} does not. "
            "It serves the atom-targeting ids."
        )
    return Field(**{key: face.task[key] for key in _NEEDED})


def fractions_of(observation: Mapping[str, Any], field: Field) -> Tensor:
    """The last frames as collected fractions, (B, H, W) float32."""
    image = torch.as_tensor(np.asarray(observation["image"]))[:, 0]
    return image.float() * (field.image_full_scale / 255.0)


def brightest_spots(image: Tensor, sigma_pixels: float, count: int) -> tuple[Array, Array]:
    """The `count` highest maxima of the matched-filtered frames: places (B, count, 2) in pixels (x, y), and heights.

    Height is the smoothed fraction; where a frame has fewer maxima it is 0.
    """
    # Only the probe's width in pixels matters here, so the pixel is told as if the probe were the usual one.
    pixel_ang = torch.full((len(image),), 2.0 * COARSEST_PIXEL_ANG / fwhm_from_sigma(sigma_pixels))
    found = find_atoms(image, pixel_ang, None, BrightestSpots(count, sigma_pixels))
    return found.xy.numpy().astype(np.float64), found.score.numpy().astype(np.float64)


def centroids(image: Tensor, start: Array, sigma_pixels: Array, steps: int = 6) -> tuple[Array, Array]:
    """Sub-pixel centres of spots: (B, N, 2) pixels, and their mean height over the background (B, N).

    `start` (B, N, 2) pixels, `sigma_pixels` (B,) the probe's rms width.
    """
    width = torch.as_tensor(sigma_pixels, dtype=torch.float32)
    centre, height = spots.centroids(image, torch.as_tensor(start, dtype=torch.float32), width, steps)
    return centre.numpy().astype(np.float64), height.numpy().astype(np.float64)


def same_sites(old_ang: Array, new_ang: Array, tolerance_ang: float) -> Array:
    """For each new site (n, N, 2) which of the old ones (n, N, 2) it was, −1 where none: (n, N).

    Both are the same rigid pattern up to a shift: every pair of an old and a new site proposes one, and the shift under
    which most sites agree wins, the smaller of two equal ones.
    """
    shift = new_ang[:, None] - old_ang[:, :, None]  # (n, N old, N new, 2)
    proposals = shift.reshape(len(shift), shift.shape[1] * shift.shape[2], 2)  # (n, P, 2)
    away = np.linalg.norm(shift[:, None] - proposals[:, :, None, None], axis=-1)  # (n, P, N old, N new)
    agree = (away.min(2) < tolerance_ang).sum(2) - 0.02 * np.linalg.norm(proposals, axis=-1)
    rows = np.arange(len(shift))
    best = away[rows, agree.argmax(1)]  # (n, N old, N new)
    match: Array = np.where(best.min(1) < tolerance_ang, best.argmin(1), -1)
    return match


def _log_part(value: Array, low: float, high: float) -> Array:
    """Where `value` is on the logarithmic way from low (0) to high (1)."""
    part: Array = np.log(np.clip(value, low, high) / low) / np.log(high / low)
    return part
