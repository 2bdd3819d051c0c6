"""Where the sample is: steady and wandering drift, random walk, settling of the stage; and where the scan thinks it is.

The sample's velocity is an Ornstein and Uhlenbeck process (Phys. Rev. 36, 823, 1930) of a given rms speed and
correlation time. It is advanced exactly over any time step, position and velocity together (Gillespie, Phys. Rev. E 54,
2084, 1996). A random walk (variance 2 D t on each axis) and the exponential creep after a stage move are added.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stem_gym.core.batch import number
from stem_gym.core.config import Config


class NormalRows(Protocol):
    """What the drift needs of `stem_gym.core.streams.Streams`."""

    def normal(self, rows: Tensor, shape: tuple[int, ...] = ()) -> Tensor: ...


class DriftModel(Config):
    """How a stage drifts, and how the scan is distorted."""

    speed_ang_per_s: float = Field(default=0.3, ge=0, le=100, description="root mean square drift speed")
    correlation_s: float = Field(default=60.0, gt=0, description="time over which the velocity forgets itself")
    diffusion_ang2_per_s: float = Field(
        default=0.0, ge=0, description="random walk; variance on each axis grows as 2 D t"
    )
    settling_fraction: float = Field(
        default=0.0, ge=0, le=1, description="part of a stage move that creeps in afterwards"
    )
    settling_s: float = Field(default=10.0, gt=0, description="time constant of the creep after a stage move")
    scale_error: float = Field(
        default=0.0, ge=0, le=0.2, description="rms relative error of the scan's scale, on each axis"
    )
    shear_error: float = Field(default=0.0, ge=0, le=0.2, description="rms shear of the scan, x per y")


@dataclass(frozen=True)
class DriftState:
    """Where B samples are and how they move; positions are the sample's displacement under the scan, in Å."""

    position_ang: Tensor  # (B, 2) without the creep
    velocity_ang_per_s: Tensor  # (B, 2)
    creep_ang: Tensor  # (B, 2) what is still to come of stage moves
    distortion: Tensor  # (B, 2, 2) true scan displacement = distortion @ wanted

    def rows(self, index: Tensor) -> DriftState:
        """The states of the rows in `index` (n,)."""
        return DriftState(*(getattr(self, f.name)[index] for f in fields(self)))

    def with_rows(self, index: Tensor, other: DriftState) -> DriftState:
        """A copy in which the rows in `index` (n,) are those of `other`."""
        return DriftState(*(getattr(self, f.name).index_copy(0, index, getattr(other, f.name)) for f in fields(self)))

    @property
    def offset_ang(self) -> Tensor:
        """(B, 2) displacement of the sample: a stage move arrives but for the creep that is still to come."""
        return self.position_ang - self.creep_ang


def start_drift(model: DriftModel, streams: NormalRows, rows: Tensor) -> DriftState:
    """A fresh state for each of `rows` (n,): at the origin, with a random velocity and scan distortion."""
    draw = streams.normal(rows, (5,))
    velocity = draw[:, :2] * (model.speed_ang_per_s / 2.0**0.5)
    distortion = torch.eye(2, device=draw.device).repeat(len(rows), 1, 1)
    if model.scale_error or model.shear_error:
        distortion[:, 0, 0] += model.scale_error * draw[:, 2]
        distortion[:, 1, 1] += model.scale_error * draw[:, 3]
        distortion[:, 0, 1] += model.shear_error * draw[:, 4]
    zero = torch.zeros_like(velocity)
    return DriftState(zero, velocity, zero.clone(), distortion)


def move_stage(model: DriftModel, state: DriftState, step_ang: Tensor) -> DriftState:
    """The state after a stage move (B, 2): all of it at once but for `settling_fraction`, which creeps in."""
    return DriftState(
        state.position_ang + step_ang,
        state.velocity_ang_per_s,
        state.creep_ang + model.settling_fraction * step_ang,
        state.distortion,
    )


def advance(
    model: DriftModel, state: DriftState, dt_s: Tensor, streams: NormalRows, rows: Tensor
) -> tuple[Tensor, DriftState]:
    """Displacements (B, J, 2) after each of J consecutive steps dt_s (B, J) >= 0, and the state after the last.

    Exact for any step, so splitting a step changes no statistics; a step of zero changes nothing. Not differentiable:
    on a CPU numpy computes it, which starts these many small operations several times faster.
    """
    noise = streams.normal(rows, (dt_s.shape[1], 3, 2))
    step_s = dt_s[:, :1] if dt_s.stride(1) == 0 else dt_s  # one number expanded to even steps is worked on once
    given = (state.position_ang, state.velocity_ang_per_s, state.creep_ang, dt_s, step_s, noise)
    if dt_s.device.type != "cpu":
        path, position, velocity, creep = _walk(model, given, torch)
    else:
        walked = _walk(model, tuple(part.numpy() for part in given), np)
        path, position, velocity, creep = (torch.from_numpy(part) for part in walked)
    return path, DriftState(position, velocity, creep, state.distortion)


def _walk(model: DriftModel, given: tuple[Any, ...], xp: Any) -> tuple[Any, Any, Any, Any]:
    """Displacements (B, J, 2), and position, velocity and creep (B, 2) at the end, in the arrays of `xp`.

    `given` are position, velocity and creep (B, 2) before, the steps (B, J) in s, the same as (B, 1) where they are
    even, and normals (B, J, 3, 2).
    """
    position, velocity, creep, dt_s, step_s, noise = given
    tau = model.correlation_s
    scaled = (step_s / tau)[..., None]  # (B, J, 1) or (B, 1, 1)
    gone = -xp.expm1(-scaled)
    # Exact covariance of an integrated Ornstein-Uhlenbeck step, for a velocity of variance s2 on each axis.
    velocity_variance = -xp.expm1(-2.0 * scaled)
    to_path = gone * gone / xp.sqrt(_at_least(1e-30, velocity_variance))
    rest = _at_least(0.0, _path_variance(scaled, gone, velocity_variance, xp) - to_path * to_path)
    sigma = model.speed_ang_per_s / 2.0**0.5
    kick = sigma * xp.sqrt(velocity_variance) * noise[:, :, 0]
    wander = sigma * tau * (to_path * noise[:, :, 0] + xp.sqrt(rest) * noise[:, :, 1])
    elapsed = dt_s.cumsum(1)
    velocities = _velocities(velocity, elapsed / tau, kick, xp)  # (B, J + 1, 2)
    stride = velocities[:, :-1] * gone * tau + wander
    if model.diffusion_ang2_per_s > 0.0:
        stride = stride + xp.sqrt(2.0 * model.diffusion_ang2_per_s * step_s)[..., None] * noise[:, :, 2]
    places = position[:, None] + stride.cumsum(1)
    creeps = creep[:, None] * xp.exp(-elapsed[..., None] / model.settling_s)
    return places - creeps, places[:, -1], velocities[:, -1], creeps[:, -1]


def _at_least(low: float, values: Any) -> Any:
    """The values, none below `low`; by what starts soonest."""
    return np.maximum(values, low) if isinstance(values, np.ndarray) else values.clamp(min=low)


@functools.cache
def _triangle(size: int) -> np.ndarray:
    """Ones on and below the diagonal, (size, size)."""
    return np.tri(size, dtype=np.float32)


def row_times_s(shape: tuple[int, int], dwell_s: Tensor, flyback_s: float) -> Tensor:
    """Times (B, H) at which the middle of each scan row is recorded, from the start of a frame (H, W); dwell_s (B,)."""
    height, width = shape
    line = dwell_s * width + flyback_s
    order = torch.arange(height, dtype=dwell_s.dtype, device=dwell_s.device)
    return order * line[:, None] + 0.5 * width * dwell_s[:, None]


def frame_time_s(shape: tuple[int, int], dwell_s: Tensor, flyback_s: float) -> Tensor:
    """(B,) seconds that a frame (H, W) takes, the flyback after the last row included."""
    height, width, flyback = (number(float(part), dwell_s.dtype) for part in (*shape, flyback_s))
    return height * (width * dwell_s + flyback)


def distort(state: DriftState, xy_ang: Tensor) -> Tensor:
    """Where the probe truly goes, (B, N, 2), when the scan is told to go to `xy_ang` (B, N, 2) from its centre."""
    return xy_ang @ state.distortion.transpose(1, 2)


def _path_variance(scaled: Any, gone: Any, gone_twice: Any, xp: Any) -> Any:
    """2 x - 3 + 4 exp(-x) - exp(-2x): variance of the path in units of (sigma tau)^2, after x correlation times.

    `gone` is 1 - exp(-x), `gone_twice` 1 - exp(-2x).
    """
    exact = 2.0 * scaled - 4.0 * gone + gone_twice
    # The terms cancel to third order, which float32 can not carry below x of about 0.1.
    square = scaled * scaled
    cube = square * scaled
    series = cube * (2.0 / 3.0 - 0.5 * scaled + (7.0 / 30.0) * square - cube / 12.0)
    return xp.where(scaled < 0.1, series, exact)


def _velocities(start: Any, elapsed: Any, kick: Any, xp: Any) -> Any:
    """Velocities (B, J + 1, 2) before, between and after steps that end at `elapsed` (B, J) correlation times.

    Each kick (B, J, 2) decays from the end of its step: a triangular product instead of a loop over the steps.
    """
    age = elapsed[:, :, None] - elapsed[:, None, :]  # (B, J, J), of kick i at the end of step j
    decay = xp.exp(-_at_least(0.0, age))
    decay = decay * _triangle(age.shape[1]) if xp is np else xp.tril(decay)
    later = start[:, None] * xp.exp(-elapsed)[..., None] + xp.matmul(decay, kick)
    return xp.concatenate((start[:, None], later), 1)
