"""What instructions cost, and the sample that is in the column."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from stem_gym.core.errors import InstructionError
from stem_gym.core.streams import Streams
from stem_gym.core.units import electrons


class Meter(Protocol):
    """What an instruction cost."""

    time_scale: float  # seconds that Nion's threads are given for one second of the instruction

    def begin(self) -> None:
        """An instruction starts."""

    def beam(self, is_open: bool) -> None:
        """The blanker has just opened or closed."""

    def wait(self, time_s: float, aborted: threading.Event) -> None:
        """Let time pass; returns early when aborted."""

    def end(self, current_pa: float) -> tuple[float, float]:
        """(seconds, electrons) since `begin`."""


class Stopwatch:
    """Cost as seen from outside: the wall clock, and the beam current for as long as the blanker was open."""

    time_scale = 1.0

    def __init__(self) -> None:
        self._begun_s = self._opened_s = time.perf_counter()
        self._open_s = 0.0

    def begin(self) -> None:
        self._begun_s, self._open_s = time.perf_counter(), 0.0

    def beam(self, is_open: bool) -> None:
        now = time.perf_counter()
        if is_open:
            self._opened_s = now
        else:
            self._open_s += now - self._opened_s

    def wait(self, time_s: float, aborted: threading.Event) -> None:
        aborted.wait(time_s)

    def end(self, current_pa: float) -> tuple[float, float]:
        return time.perf_counter() - self._begun_s, electrons(current_pa, self._open_s)


class Sample(Protocol):
    """What is under the beam."""

    meter: Meter

    def reset(self, streams: Streams, rows: Tensor, options: Mapping[str, Any] | None) -> None:
        """A new episode begins."""

    def truth(self) -> Mapping[str, Tensor]:
        """What only a simulator can know."""


class LoadedSample:
    """Whatever the operator has put in: nothing can renew it, and nothing is known of it but what is measured."""

    def __init__(self) -> None:
        self.meter: Meter = Stopwatch()

    def reset(self, streams: Streams, rows: Tensor, options: Mapping[str, Any] | None) -> None:
        if options:
            raise InstructionError(f"Nion Swift takes no reset options; given {sorted(options)}.")

    def truth(self) -> Mapping[str, Tensor]:
        return {}
