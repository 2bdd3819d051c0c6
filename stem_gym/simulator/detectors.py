"""The annular detector: from expected electrons to recorded counts, and the scan line it records them on."""

from __future__ import annotations

from typing import Protocol

import torch
from pydantic import Field
from torch import Tensor

from stem_gym.core.batch import number
from stem_gym.core.config import Config
from stem_gym.core.units import ELECTRONS_PER_PC


class CountingRows(Protocol):
    """What the detector needs of `stem_gym.core.streams.Streams`."""

    def normal(self, rows: Tensor, shape: tuple[int, ...] = ()) -> Tensor: ...
    def poisson(self, rows: Tensor, rate: Tensor) -> Tensor: ...


class DetectorModel(Config):
    """An annular dark-field detector with its amplifier and its scan line."""

    inner_mrad: float = Field(default=80.0, gt=0, lt=500, description="inner collection semi-angle")
    outer_mrad: float = Field(default=200.0, gt=0, lt=1000, description="outer collection semi-angle")
    gain: float = Field(default=1.0, gt=0, description="counts per detected electron")
    offset: float = Field(default=0.0, description="counts of an unlit pixel")
    read_noise: float = Field(default=0.0, ge=0, description="rms counts of the amplifier, per reading")
    saturation: float = Field(default=65535.0, gt=0, description="largest count that can be recorded")
    dark_electrons_per_s: float = Field(default=0.0, ge=0, description="electrons detected with the beam blanked")
    line_jitter_ang: float = Field(default=0.0, ge=0, description="rms displacement of a scan line along x")
    flyback_s: float = Field(default=0.0, ge=0, description="time from the end of a scan line to the start of the next")

    def model_post_init(self, context: object) -> None:
        """Refuse an annulus whose outer angle is not the larger one."""
        if self.outer_mrad <= self.inner_mrad:
            raise ValueError(f"outer_mrad must exceed inner_mrad; given {self.inner_mrad} to {self.outer_mrad}.")


def expected_electrons(fraction: Tensor, current_pa: Tensor, dwell_s: Tensor, detector: DetectorModel) -> Tensor:
    """Expected electrons on the detector (B, …): collected fraction (B, …), current (B,) and time (B,) per reading."""
    shape, dtype = (-1,) + (1,) * (fraction.ndim - 1), dwell_s.dtype
    beam = (current_pa * dwell_s * number(ELECTRONS_PER_PC, dtype)).reshape(shape)
    collected = fraction.clamp(min=0.0).mul_(beam)
    if detector.dark_electrons_per_s == 0.0:
        return collected
    return collected.add_((number(detector.dark_electrons_per_s, dtype) * dwell_s).reshape(shape))


def detect(expected: Tensor, streams: CountingRows, rows: Tensor, detector: DetectorModel) -> Tensor:
    """Recorded counts (n, …) for expected electrons (n, …) of `rows` (n,); not differentiable.

    Poisson arrival, then gain, offset and read noise, then rounding and saturation: whole counts in [0, saturation].
    """
    counts = streams.poisson(rows, expected)
    if detector.gain != 1.0 or detector.offset != 0.0:
        counts = counts * detector.gain + detector.offset
    if detector.read_noise > 0.0:
        counts = counts + detector.read_noise * streams.normal(rows, tuple(expected.shape[1:]))
    whole = detector.gain % 1.0 == 0.0 and detector.offset % 1.0 == 0.0 and detector.read_noise == 0.0
    return (counts if whole else torch.round(counts)).clamp_(min=0.0, max=detector.saturation)


def electrons_from_counts(counts: Tensor, detector: DetectorModel) -> Tensor:
    """The electrons that counts stand for, by the detector's own calibration; dark electrons are still in."""
    return (counts - detector.offset) / detector.gain


def line_jitter_ang(streams: CountingRows, rows: Tensor, lines: int, detector: DetectorModel) -> Tensor:
    """Random displacement of each scan line, (n, lines, 2) in Å, along x only."""
    along_x = detector.line_jitter_ang * streams.normal(rows, (lines,))
    return torch.stack((along_x, torch.zeros_like(along_x)), dim=-1)
