"""What the simulated columns share: rows that begin, are kept and restored; a parked probe, and time that passes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from stem_gym.core.batch import clone_rows, rows_where, take, take_rows, write, write_rows, write_sum
from stem_gym.core.errors import InstructionError
from stem_gym.core.instructions import Blank, Instruction, Park, Reading, no_dose
from stem_gym.core.instrument import Instrument, check_instruction
from stem_gym.core.streams import Streams
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


class Column(Instrument, Generic[Rows]):
    """B rows of a simulated column. A kind of column says how its rows begin, and how it executes each verb."""

    title: ClassVar[str]  # what it is called in messages
    config: Any  # with sections `drift`, `detector` and `overheads`
    _handlers: Mapping[type[Instruction], Callable[[Any], Reading]]

    def __init__(self, rows: int, device: torch.device | str) -> None:
        self.rows, self.device = rows, torch.device(device)
        self._state: Rows | None = None
        self._streams = Streams([0] * rows, self.device)  # until the first reset hands in the caller's

    @abstractmethod
    def _fresh(self, streams: Streams, rows: Tensor) -> Rows:
        """New episodes for `rows` (n,)."""

    @torch.inference_mode()
    def reset(self, streams: Streams, rows: Tensor, options: Mapping[str, Any] | None = None) -> None:
        """A fresh specimen, drift, dose and clock on `rows`; the first call must name every row."""
        if options:
            raise InstructionError(f"{self.title} takes no reset options; given {sorted(options)}.")
        fresh = self._fresh(streams, rows)
        self._streams = streams
        if self._state is None:
            if len(rows) != self.rows:
                raise InstructionError(f"The first reset must start all {self.rows} rows; given {rows.tolist()[:8]}.")
            self._state = fresh
        else:
            write_rows(self._state, rows, fresh)

    @torch.inference_mode()
    def execute(self, instruction: Instruction) -> Reading:
        """Do it. Raises CapabilityError or InstructionError before anything happens; never clips."""
        check_instruction(instruction, self.capabilities, self.rows)
        return self._handlers[type(instruction)](instruction)

    @torch.inference_mode()
    def abort(self) -> None:
        """Blank every row."""
        if self._state is not None:
            self._state.blanked.fill_(True)

    def snapshot(self) -> Rows:
        """A copy of the state of all rows."""
        return clone_rows(self._now)

    @torch.inference_mode()
    def restore(self, snapshot: Rows, streams: Streams) -> None:
        """Go back to a snapshot; the streams are their owner's to restore."""
        self._state, self._streams = clone_rows(snapshot), streams

    @property
    def _now(self) -> Rows:
        if self._state is None:
            raise InstructionError(f"{self.title} was not reset yet; call reset(streams, rows) first.")
        return self._state

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
            rows, passed = take(instruction.rows, moving), take(seconds, moving)
            _, drift = self._advance(rows, passed.unsqueeze(1))
            self._spend(rows, passed, torch.zeros_like(passed), drift)
        return no_dose(instruction, seconds, data)

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
