"""The spectra of a log, and what any scalarizer makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.engine.decision_log import Entry
from agents.policy import Array
from stem_gym.core.errors import RecordError
from stem_gym.core.scalarizers import AnyScalarizer


@dataclass(frozen=True)
class RecordedSpectra:
    """N measurements of one row, in order. A cell that is measured again comes again, with the sum of its spectra."""

    step: Array  # (N,) of the first decision that knew it
    cell: Array  # (N,) int64
    rate: Tensor  # (N, S) detected electrons per second and channel
    reference: Tensor  # (N, S) mean of all that was measured until then
    told: Tensor  # (N,) value that the agent was told
    wanted: Array  # (N,) which of the task's scalarizers that was
    axis: Tensor  # (S,) eV, or (S, 2) mrad of the pixels of a pattern

    def values(self, measure: AnyScalarizer) -> Tensor:
        """(N,) values of a scalarizer. Raises ConfigError where it asks for channels that were not recorded."""
        measure.check(self.axis)
        return measure(self.rate, self.axis, self.reference).nan_to_num(0.0)

    def missed_by(self, measures: Sequence[AnyScalarizer]) -> float:
        """How far the task's own values are from those told, RMS over RMS, of the scalarizer that is furthest off.

        0 where nothing was measured.
        """
        worst = 0.0
        for number in np.unique(self.wanted).tolist():
            which = torch.as_tensor(self.wanted == number)
            told, again = self.told[which], self.values(measures[number])[which]
            scale = told.square().mean().sqrt().clamp(min=1e-30)
            worst = max(worst, float((again - told).square().mean().sqrt() / scale))
        return worst


def recorded_spectra(entries: Sequence[Entry], task: Mapping[str, Any]) -> RecordedSpectra:
    """The spectra that the decisions of one row knew. Raises RecordError where patterns are not whole."""
    rates, cells, steps, told, wanted, references = [], [], [], [], [], []
    each: dict[int, tuple[Array, float]] = {}  # cell → rate and seconds
    electrons, seconds = np.zeros(0), 0.0
    action: Array | None = None
    for entry in entries:
        seen = entry.observation
        if action is not None and entry.cause is None:
            cell, rate = _cell_of(seen), seen["spectrum"].astype(np.float64)
            old, spent = each.get(cell, (np.zeros_like(rate), 0.0))
            now = spent + _exposure_s(action, task)
            electrons = (electrons if electrons.size else np.zeros_like(rate)) + rate * now - old * spent
            seconds += now - spent
            each[cell] = (rate, now)
            rates.append(rate)
            cells.append(cell)
            steps.append(entry.step)
            told.append(float(seen["last_value"][0]))
            wanted.append(int(seen["scalarizer"].argmax()))
            references.append(electrons / seconds)
        action = entry.action
    channels = entries[-1].observation["spectrum"].size
    stacked = [np.array(part, dtype=np.float32).reshape(-1, channels) for part in (rates, references)]
    return RecordedSpectra(
        step=np.array(steps, dtype=np.int64),
        cell=np.array(cells, dtype=np.int64),
        rate=torch.as_tensor(stacked[0]),
        reference=torch.as_tensor(stacked[1]),
        told=torch.tensor(told),
        wanted=np.array(wanted, dtype=np.int64),
        axis=axis_of(entries[-1].observation, task),
    )


def axis_of(observation: Mapping[str, Array], task: Mapping[str, Any]) -> Tensor:
    """Energies (S,) of a spectrum's channels, or angles (S, 2) of a pattern's pixels, row by row.

    Raises RecordError for a pattern whose pixels were averaged.
    """
    first, last = (float(end) for end in observation["axis"])
    channels = observation["spectrum"].size
    if task.get("detector") != "diffraction":
        return torch.linspace(first, last, channels)
    side = math.isqrt(channels)
    if side * side != channels:
        raise RecordError(
            f"The diffraction patterns are recorded in {channels} channels, which are not those of a square; set the "
            "task's spectrum_channels to the number of pixels."
        )
    angle = torch.linspace(first, last, side)
    y, x = torch.meshgrid(angle, angle, indexing="ij")
    return torch.stack((x, y), dim=-1).reshape(-1, 2)


def _cell_of(observation: Mapping[str, Array]) -> int:
    height, width = observation["measured"].shape
    x, y = np.floor(observation["probe"] * (width, height)).astype(int).clip(0, (width - 1, height - 1))
    return int(y * width + x)


def _exposure_s(action: Array, task: Mapping[str, Any]) -> float:
    """Seconds that an action of one row measures."""
    times = task["exposures_s"]
    if task["actions"] == "place":
        share = float(np.clip(0.5 * (action[2] + 1.0), 0.0, 1.0))
        return float(times[0] * (times[-1] / times[0]) ** share)
    return float(times[0] if np.ndim(action) == 0 else times[int(action[1])])
