"""Spectrometers, X-ray detectors and pixelated cameras: from expected signal per beam electron to recorded counts."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stem_gym.core.config import Config
from stem_gym.core.streams import Streams
from stem_gym.core.units import electrons
from stem_gym.simulator.detectors import CountingRows

_OFFSET_PER_NOISE = 4.0  # below, clipping at zero would lift the mean of dark channels


class SpectrometerRows(CountingRows, Protocol):
    """What a spectrometer needs of `stem_gym.core.streams.Streams`."""

    def uniform(self, rows: Tensor, shape: tuple[int, ...] = ()) -> Tensor: ...


class SpectrometerModel(Config):
    """A detector of many channels; as it is given, it counts every electron or X-ray and adds nothing."""

    quantum_efficiency: float = Field(default=1.0, gt=0, le=1, description="share of arrivals that are detected")
    gain: float = Field(default=1.0, gt=0, description="counts per detected electron or X-ray")
    offset: float = Field(default=0.0, ge=0, description="counts of an unlit channel")
    read_noise: float = Field(default=0.0, ge=0, description="rms counts of the amplifier, per channel and reading")
    saturation: float = Field(default=1.0e7, gt=0, description="largest count that a channel can record")
    energy_drift_channels: float = Field(
        default=0.0, ge=0, le=8, description="largest displacement of a spectrum along its axis; uniform up to it"
    )
    gain_pattern: float = Field(default=0.0, ge=0, lt=0.3, description="rms relative gain error of channels, fixed")
    gain_pattern_seed: int = Field(default=0, ge=0, description="which detector it is: decides its fixed pattern")
    spikes_per_s: float = Field(default=0.0, ge=0, le=10, description="stray X-rays that hit the camera, a second")
    spike_electrons: float = Field(default=1000.0, gt=0, description="mean size of a spike; exponentially distributed")

    @model_validator(mode="after")
    def _above_zero(self) -> SpectrometerModel:
        if self.offset < _OFFSET_PER_NOISE * self.read_noise:
            raise ValueError(
                f"offset must be at least {_OFFSET_PER_NOISE:g} times read_noise, or clipping at zero counts would "
                f"bias dark channels; given {self.offset} and {self.read_noise}"
            )
        return self


def expected_counts(expected: Tensor, current_pa: Tensor, exposure_s: Tensor, model: SpectrometerModel) -> Tensor:
    """Expected detected electrons or X-rays (n, C) of a signal (n, C) per beam electron; current and time (n,)."""
    arriving = electrons(current_pa, exposure_s) * model.quantum_efficiency  # type: ignore[arg-type]
    return expected.clamp(min=0.0) * torch.as_tensor(arriving)[:, None]


def detect_spectrum(
    expected: Tensor,
    streams: SpectrometerRows,
    rows: Tensor,
    current_pa: Tensor,
    exposure_s: Tensor,
    model: SpectrometerModel,
) -> Tensor:
    """Recorded counts (n, C) for an expected signal (n, C) per beam electron of `rows` (n,); not differentiable.

    Drift of the energy axis, Poisson arrival during `exposure_s` (n,) at `current_pa` (n,), spikes, fixed pattern,
    gain, offset and read-out noise, then rounding and saturation: whole counts in [0, saturation]. Undone by
    `(counts − offset) / gain / exposure_s`: detected electrons per second. A pattern (n, Ky·Kx) is the same, but for
    the drift, which knows one axis alone. Draws nothing for what the model leaves at zero.
    """
    if model.energy_drift_channels > 0.0:
        wander = model.energy_drift_channels * (2.0 * streams.uniform(rows) - 1.0)
        expected = displaced(expected, wander.to(expected.device))
    counts = streams.poisson(rows, expected_counts(expected, current_pa, exposure_s, model))
    if model.spikes_per_s > 0.0:
        counts = counts + _spikes(counts, streams, rows, exposure_s, model)
    if model.gain_pattern > 0.0:
        counts = counts * fixed_pattern(counts.shape[-1], model).to(counts.device)
    counts = counts * model.gain + model.offset
    if model.read_noise > 0.0:
        counts = counts + model.read_noise * streams.normal(rows, tuple(counts.shape[1:])).to(counts.device)
    return torch.round(counts).clamp(min=0.0, max=model.saturation)


def displaced(spectrum: Tensor, channels: Tensor) -> Tensor:
    """Spectra (n, C) moved up their axis by `channels` (n,), which may be fractions and negative.

    Linear between channels; beyond the ends the last channel goes on. The moved spectrum c holds what was at c − shift.
    """
    last = spectrum.shape[-1] - 1
    source = torch.arange(last + 1, dtype=spectrum.dtype, device=spectrum.device) - channels[:, None]
    source = source.clamp(min=0.0, max=float(last))
    below = source.floor()
    share = source - below
    lower = below.to(torch.int64)
    upper = (lower + 1).clamp(max=last)
    return spectrum.gather(1, lower) * (1.0 - share) + spectrum.gather(1, upper) * share


def fixed_pattern(channels: int, model: SpectrometerModel) -> Tensor:
    """Relative gain (C,) of each channel of this detector: the same in every episode and for every row."""
    return _pattern(channels, model.gain_pattern, model.gain_pattern_seed)


@lru_cache(maxsize=32)
def _pattern(channels: int, rms: float, seed: int) -> Tensor:
    normal = Streams([seed]).normal(torch.zeros(1, dtype=torch.int64), (channels,))[0]
    return (1.0 + rms * normal).clamp(min=0.0)


def _spikes(
    counts: Tensor, streams: SpectrometerRows, rows: Tensor, exposure_s: Tensor, model: SpectrometerModel
) -> Tensor:
    """Electrons (n, C) of a stray X-ray: at most one a reading, in one channel; a second is rare enough to leave."""
    uniform = streams.uniform(rows, (3,)).to(counts.device)
    hit = uniform[:, 0] < -torch.expm1(-model.spikes_per_s * exposure_s)
    size = -model.spike_electrons * torch.log(uniform[:, 1]) * hit
    channel = (uniform[:, 2] * counts.shape[-1]).to(torch.int64).clamp(max=counts.shape[-1] - 1)
    return torch.zeros_like(counts).scatter_(1, channel[:, None], torch.round(size)[:, None])
