"""A field whose spectra are known by hand: two Gaussian peaks, without noise, drift or cost in time but exposures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stem_gym.core.instructions import Acquire, Instruction, Park, Reading, Scan, no_dose
from stem_gym.core.instrument import Capabilities, Instrument, check_instruction
from stem_gym.core.streams import Streams

AXIS_EV = torch.linspace(0.0, 63.0, 64)
ELECTRONS_PER_S = 1e6


@dataclass
class Toy(Instrument):
    """Loadings (B, H·W, 2) are given by whoever makes it."""

    loadings: Tensor
    grid: tuple[int, int]
    knows: bool = True

    def __post_init__(self) -> None:
        self.rows, self.device = len(self.loadings), torch.device("cpu")
        self.capabilities = Capabilities(
            verbs=frozenset({"Scan", "Park", "Acquire"}),
            detectors=frozenset({"haadf", "eels"}),
            simulated=self.knows,
            grid=self.grid,
            axes={"eels": AXIS_EV},
        )
        peaks = torch.stack([torch.exp(-0.5 * ((AXIS_EV - centre) / 3.0) ** 2) for centre in (20.0, 45.0)])
        self.components = peaks.expand(self.rows, -1, -1)
        self.place = torch.zeros(self.rows, 2)
        self.acquired = torch.zeros(self.rows, 2)

    def reset(self, streams: Streams, rows: Tensor, options: Mapping[str, Any] | None = None) -> None:
        self.acquired.index_fill_(0, rows, 0.0)

    def execute(self, instruction: Instruction) -> Reading:
        check_instruction(instruction, self.capabilities, self.rows)
        rows, one = instruction.rows, torch.ones(len(instruction.rows))
        if isinstance(instruction, Park):
            self.place[rows] = torch.stack((instruction.x, instruction.y), dim=1)
            return no_dose(instruction, 0.0 * one, {"place": self.place[rows]})
        if isinstance(instruction, Scan):
            image = self.loadings[rows].sum(-1).reshape(-1, 1, *self.grid)
            unit = {"counts_per_electron": one, "counts_offset": 0.0 * one, "electrons_per_pixel": one}
            return Reading("Scan", rows, one, one, one, {"images": image}, unit | {"region": instruction.region})
        assert isinstance(instruction, Acquire)
        height, width = self.grid
        cell = (self.place[rows, 1] * height).long() * width + (self.place[rows, 0] * width).long()
        self.acquired[rows] = self.loadings[rows, cell]
        rate = (self.acquired[rows].unsqueeze(1) @ self.components[rows]).squeeze(1)
        exposure = instruction.exposure_s
        # Two counts an electron and an offset of seven: the task must take both out.
        counts = 2.0 * rate * exposure.unsqueeze(1) + 7.0
        calibration = {"exposure_s": exposure, "counts_per_electron": 2.0 * one, "counts_offset": 7.0 * one}
        data = {"spectrum": counts, "place": self.place[rows]}
        return Reading("Acquire", rows, exposure, exposure * ELECTRONS_PER_S, one, data, calibration)

    def truth(self) -> Mapping[str, Tensor]:
        if not self.knows:
            return {}
        return {
            "loadings": self.loadings,
            "components": 0.25 * self.components,
            "acquired": self.acquired,
            "electrons_per_s": torch.full((self.rows,), 4.0),
        }
