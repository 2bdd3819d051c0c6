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


def smooth(image: Tensor, sigma_pixels: Tensor) -> Tensor:
    """`image` (B, H, W) under a Gaussian of each row's own width (B,), kept at the borders."""
    height, width = image.shape[1:]
    return _window(height, sigma_pixels) @ image @ _window(width, sigma_pixels).transpose(1, 2)


def _window(size: int, sigma_pixels: Tensor) -> Tensor:
    at = torch.arange(size, dtype=torch.float32)
    weight = torch.exp(-0.5 * ((at[:, None] - at) / sigma_pixels[:, None, None]).square())  # (B, size, size)
    return weight / weight.sum(2, keepdim=True)


def brightest_spots(image: Tensor, sigma_pixels: float, count: int) -> tuple[Array, Array]:
    """The `count` highest maxima of the matched-filtered frames: places (B, count, 2) in pixels (x, y), and heights.

    Height is the smoothed fraction; where a frame has fewer maxima it is 0.
    """
    rows, width = len(image), image.shape[2]
    filtered = smooth(image, torch.full((rows,), 0.8 * sigma_pixels))
    reach = 2 * max(1, round(1.5 * sigma_pixels)) + 1
    highest = torch.nn.functional.max_pool2d(filtered[:, None], reach, stride=1, padding=reach // 2)[:, 0]
    peaks = torch.where(filtered == highest, filtered, 0.0).flatten(1)
    value, index = peaks.topk(count, dim=1)
    places = torch.stack((index % width, index // width), dim=-1)
    return places.numpy().astype(np.float64), value.numpy().astype(np.float64)


def centroids(image: Tensor, start: Array, sigma_pixels: Array, steps: int = 6) -> tuple[Array, Array]:
    """Sub-pixel centres of spots: (B, N, 2) pixels, and their mean height over the background (B, N).

    A Gaussian-weighted centroid, moved until it stands still, each step doubled since window and spot have the same
    width (half of the way is left otherwise). `start` (B, N, 2) pixels, `sigma_pixels` (B,).
    """
    height, width = image.shape[1:]
    background = torch.quantile(image.flatten(1), 0.3, dim=1)[:, None, None]
    signal = (image - background).clamp(min=0.0)
    centre = torch.as_tensor(start, dtype=torch.float32)
    sigma = torch.as_tensor(sigma_pixels, dtype=torch.float32)[:, None, None]
    x, y = torch.arange(width, dtype=torch.float32), torch.arange(height, dtype=torch.float32)
    mass = torch.zeros(centre.shape[:2])
    for _ in range(steps):
        along_x = torch.exp(-0.5 * ((x - centre[:, :, :1]) / sigma).square())  # (B, N, W)
        along_y = torch.exp(-0.5 * ((y - centre[:, :, 1:]) / sigma).square())
        columns = along_y @ signal  # (B, N, W)
        mass = (columns * along_x).sum(2)
        mean_x = (columns * along_x * x).sum(2) / mass.clamp(min=1e-12)
        mean_y = ((along_y * y) @ signal * along_x).sum(2) / mass.clamp(min=1e-12)
        shift = torch.stack((mean_x, mean_y), dim=-1) - centre
        centre = centre + (2.0 * shift).clamp(-2.0 * sigma, 2.0 * sigma) * (mass > 1e-12).unsqueeze(-1)
    height_over = mass / (along_x.sum(2) * along_y.sum(2)).clamp(min=1e-12)
    return centre.numpy().astype(np.float64), height_over.numpy().astype(np.float64)


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
