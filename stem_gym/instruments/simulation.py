"""What everything that is simulated or replayed row by row shares: rows that begin, act, are kept and put back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from stem_gym.core.batch import clone_rows, write_rows
from stem_gym.core.errors import InstructionError
from stem_gym.core.instructions import Instruction, Reading
from stem_gym.core.instrument import Instrument, check_instruction
from stem_gym.core.streams import Streams

Rows = TypeVar("Rows")


class Simulation(Instrument, Generic[Rows]):
    """B rows in memory. A kind says how its rows begin (`_fresh`), how it executes each verb, and what that costs."""

    title: ClassVar[str]  # what it is called in messages
    _handlers: Mapping[type[Instruction], Callable[[Any], Reading]]

    def __init__(self, rows: int, device: torch.device | str) -> None:
        self.rows, self.device = rows, torch.device(device)
        self._state: Rows | None = None
        self._streams = Streams([0] * rows, self.device)  # until the first reset hands in the caller's

    @abstractmethod
    def _fresh(self, streams: Streams, rows: Tensor) -> Rows:
        """New episodes for `rows` (n,)."""

    def _begin(self, streams: Streams, rows: Tensor) -> None:
        """Put new episodes on `rows` (n,) of the state that there is."""
        write_rows(self._now, rows, self._fresh(streams, rows))

    def _book(self, reading: Reading) -> None:
        """Take the cost of a reading into the rows."""

    @torch.inference_mode()
    def reset(self, streams: Streams, rows: Tensor, options: Mapping[str, Any] | None = None) -> None:
        """New episodes on `rows`; the first call must name every row."""
        if options:
            raise InstructionError(f"{self.title} takes no reset options; given {sorted(options)}.")
        if self._state is None and len(rows) != self.rows:
            raise InstructionError(f"The first reset must start all {self.rows} rows; given {rows.tolist()[:8]}.")
        if self._state is None:
            self._state = clone_rows(self._fresh(streams, rows))  # may be expanded views, and is written to from now on
        else:
            self._begin(streams, rows)
        self._streams = streams

    def execute(self, instruction: Instruction) -> Reading:
        """Do it. Raises CapabilityError or InstructionError before anything happens; never clips."""
        if not torch.is_inference_mode_enabled():  # to enter it again takes longer than to park
            with torch.inference_mode():
                return self.execute(instruction)
        check_instruction(instruction, self.capabilities, self.rows)
        reading = self._handlers[type(instruction)](instruction)
        self._book(reading)
        return reading

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
