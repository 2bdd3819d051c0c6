"""One exposure: the region it takes, when each row of a frame is recorded, and when a dwell stops by itself."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from stem_gym.core.batch import ends, number
from stem_gym.core.errors import InstructionError
from stem_gym.core.instructions import Dwell, Scan, TraceRule, is_full
from stem_gym.simulator.drift import DriftState


@functools.cache
def pixel_centres(count: int, device: torch.device) -> Tensor:
    """Middles of `count` even parts of a unit length."""
    return (torch.arange(count, device=device) + 0.5) / count


@functools.cache
@torch.inference_mode(False)
def _share_of_knots(knots: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The knots before and after each row's middle time, (rows,), and what share (rows, 1) each has."""
    at = pixel_centres(rows, device) * (knots - 1)
    left = at.floor().long()
    share = (at - left)[:, None]
    return left, left + 1, 1.0 - share, share


def displacement_of_rows(knots: Tensor, rows: int) -> Tensor:
    """Displacements (n, rows, 2) at the middle times of evenly timed rows, straight between knots (n, J + 1, 2)."""
    left, right, before, after = _share_of_knots(knots.shape[1], rows, knots.device)
    return knots.index_select(1, left) * before + knots.index_select(1, right) * after


@dataclass(frozen=True)
class Raster:
    """Where a frame of n rows goes on the specimen."""

    x_ang: Tensor  # (n, W) columns
    y_ang: Tensor  # (n, H) rows
    shift_ang: Tensor  # (n, H, 2) what is added to each row: drift, beam shift, shear
    corner_ang: Tensor  # (n, 2) of the undistorted region
    size_ang: Tensor  # (n, 2)


def raster(scan: Scan, distortion: Tensor, shift_ang: Tensor) -> Raster:
    """The raster of a scan under a distortion (n, 2, 2), upper triangular, with shifts (n, H, 2) of its rows."""
    height, width = scan.shape
    fov_ang = scan.fov_ang.unsqueeze(1)
    corner_ang = (scan.region[:, :2] - number(0.5, fov_ang.dtype)) * fov_ang
    size_ang = scan.region[:, 2:] * fov_ang
    x = corner_ang[:, :1] + size_ang[:, :1] * pixel_centres(width, scan.fov_ang.device)
    y = corner_ang[:, 1:] + size_ang[:, 1:] * pixel_centres(height, scan.fov_ang.device)
    shift_ang = shift_ang + torch.stack((distortion[:, 0, 1:] * y, torch.zeros_like(y)), dim=-1)
    return Raster(distortion[:, 0, :1] * x, distortion[:, 1, 1:] * y, shift_ang, corner_ang, size_ang)


def straight(knots: Tensor, parts: int) -> Tensor:
    """Places (n, parts + 1, 2) at the ends of even parts of the time that knots (n, J + 1, 2) are spread over."""
    left, right, share = _share_of_ends(knots.shape[1], parts, knots.device)
    return torch.lerp(knots.index_select(1, left), knots.index_select(1, right), share)


@functools.cache
@torch.inference_mode(False)
def _share_of_ends(knots: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The knots before and after the ends of even parts, (parts + 1,), and how far (parts + 1, 1) they are between."""
    at = torch.arange(parts + 1, device=device) * ((knots - 1) / parts)
    left = at.long().clamp(max=knots - 2)
    return left, left + 1, (at - left)[:, None]


def samples_of(dwell: Dwell, least: int) -> int:
    """How many samples a dwell is taken in: those of its trace; without one `least`, or what its rule averages."""
    rule = dwell.stop
    return dwell.trace or max(least, *((rule.baseline_samples, rule.window_samples) if rule else (1, 1)))


def samples_until(counts: Tensor, rule: TraceRule) -> Tensor:
    """How many samples (n,) of a trace (n, J) are recorded before the rule stops it; all of them if it never does."""
    samples = counts.shape[1]
    baseline = counts[:, : rule.baseline_samples].mean(1, keepdim=True)
    running = torch.nn.functional.avg_pool1d(counts.unsqueeze(1), rule.window_samples, stride=1).squeeze(1)
    end = torch.arange(rule.window_samples, samples + 1, device=counts.device)  # samples used by each window
    hit = torch.zeros_like(running, dtype=torch.bool)
    if rule.rise is not None:
        hit = hit | (running >= baseline * (1.0 + rule.rise))
    if rule.fall is not None:
        hit = hit | (running <= baseline * (1.0 - rule.fall))
    hit = hit & (end > rule.baseline_samples)
    return torch.where(hit, end, samples).amin(1)


def spread_over(used: Tensor, samples: int) -> Tensor:
    """Indices (n, samples) that spread evenly over the first `used` (n,) samples."""
    return (pixel_centres(samples, used.device) * used.unsqueeze(1)).long()


def drift_at(used: Tensor, knots: Tensor, before: DriftState, after: DriftState) -> DriftState:
    """The drift when a dwell of J samples stopped after `used` (n,): exact in place, between the ends in velocity."""
    share = (used / (knots.shape[1] - 1)).unsqueeze(1)
    creep = before.creep_ang + share * (after.creep_ang - before.creep_ang)
    place = torch.gather(knots, 1, used[:, None, None].expand(-1, 1, 2)).squeeze(1)
    velocity = before.velocity_ang_per_s + share * (after.velocity_ang_per_s - before.velocity_ang_per_s)
    return DriftState(place + creep, velocity, creep, after.distortion)


def check_region(region: Tensor) -> None:
    """Refuse regions (n, 4) that are empty or reach beyond the frame. Raises InstructionError."""
    if is_full(region):
        return
    corner, size = region[:, :2], region[:, 2:]
    if len(region) and (ends(size)[0] <= 0.0 or ends(corner + size)[1] > 1.0 + 1e-5):
        raise InstructionError(
            "Scan.region is (left, top, width, height) in fractions of the frame, with positive size and inside it; "
            f"given {region.tolist()[:4]}."
        )
