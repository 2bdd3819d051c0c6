"""What the simulated columns share: rows that begin, are kept and restored; a parked probe, and time that passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from stem_gym.core.batch import rows_where, take, take_rows, write, write_rows, write_sum
from stem_gym.core.instructions import Blank, Instruction, Park, Reading, no_dose
from stem_gym.core.streams import Streams
from stem_gym.instruments.simulation import Simulation
from stem_gym.simulator.drift import DriftState, advance


@dataclass
class ColumnRows:
    """What belongs to a row of any column."""

    drift: DriftState
    fov_ang: Tensor  # (B,)
    place: Tensor  # (B, 2) parked probe, fractions
    blanked: Tensor  # (B,) bool
    clock_s: Tensor  # (B,)
    electrons: Tensor  # (B,) float64


Rows = TypeVar("Rows", bound=ColumnRows)


class Column(Simulation[Rows]):
    """B rows of a simulated column. A kind of column says how its rows begin, and how it executes each verb."""

    config: Any  # with sections `probe`, `drift`, `detector` and `overheads`

    @torch.inference_mode()
    def abort(self) -> None:
        """Blank every row."""
        if self._state is not None:
            self._state.blanked.fill_(True)

    def _draw_defocus(self, streams: Streams, rows: Tensor) -> Tensor:
        """Where fresh `rows` (n,) are focused, in Å; (n,)."""
        probe = self.config.probe
        mean = torch.full((len(rows),), probe.defocus_ang, device=self.device)
        return mean + probe.defocus_sd_ang * streams.normal(rows) if probe.defocus_sd_ang > 0.0 else mean

    def _advance(self, rows: Tensor, dt_s: Tensor) -> tuple[Tensor, DriftState]:
        """Displacements (n, J + 1, 2), the present one first, over steps dt_s (n, J), and the drift after."""
        before = take_rows(self._now.drift, rows)
        path, after = advance(self.config.drift, before, dt_s, self._streams, rows)
        return torch.cat((before.offset_ang.unsqueeze(1), path), dim=1), after

    def _park(self, park: Park) -> Reading:
        place = torch.stack((park.x, park.y), dim=-1)
        write(self._now.place, park.rows, place)
        if self.config.overheads.park_s == 0.0:
            return no_dose(park, torch.zeros_like(park.x), {"place": place})
        return self._pass_time(park, torch.full_like(park.x, self.config.overheads.park_s), {"place": place})

    def _blank(self, blank: Blank) -> Reading:
        write(self._now.blanked, blank.rows, blank.on)
        return no_dose(blank, torch.zeros(len(blank.rows), device=self.device))

    def _pass_time(
        self, instruction: Instruction, seconds: Tensor, data: Mapping[str, Tensor] | None = None
    ) -> Reading:
        moving = rows_where(seconds > 0.0)  # no time, no draw: whoever waits beside it
        if len(moving):
            self._drift(take(instruction.rows, moving), take(seconds, moving))
        return no_dose(instruction, seconds, data)

    def _drift(self, rows: Tensor, seconds: Tensor) -> None:
        """Let `rows` (n,) drift for some seconds (n,) without a beam."""
        _, drift = self._advance(rows, seconds.unsqueeze(1))
        self._spend(rows, seconds, torch.zeros_like(seconds), drift)

    def _spend(self, rows: Tensor, seconds: Tensor, electrons: Tensor, drift: DriftState) -> None:
        state = self._now
        write_rows(state.drift, rows, drift)
        write_sum(state.clock_s, rows, seconds)
        write_sum(state.electrons, rows, electrons)

    def _detector_calibration(self, like: Tensor) -> dict[str, Tensor]:
        detector = self.config.detector
        return {
            "counts_per_electron": torch.full_like(like, detector.gain),
            "counts_offset": torch.full_like(like, detector.offset),
        }
