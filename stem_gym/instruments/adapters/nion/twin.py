"""Our own specimen behind Nion's threads: a simulated microscope that Nion's devices ask for every frame.

So the same specimen can be reached in process and through Nion Swift, and the two compared. There are two ways to pass
the time: in nominal time Nion's threads run faster than the instruction says, while the sample lives through every
second of it; in real time the sample also drifts between the instructions, and an open beam that stands idle doses the
place where it is parked (the middle of the frame before that). A frame delivers its whole dose when it starts, so an
aborted one is counted too high.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stem_gym.core.errors import InstructionError
from stem_gym.core.instructions import FULL_FRAME, Dwell, Instruction, Park, Reading, Scan, Wait
from stem_gym.core.streams import Streams
from stem_gym.instruments.adapters.nion.meter import Meter, Stopwatch
from stem_gym.instruments.simulated import SimulatedMicroscope

ROW = torch.tensor([0])
_STANDING_ANG = 1e-3  # a "frame" smaller than this is a dwell
_SHORTEST_S = 1e-6  # what the simulated microscope takes for a dwell
_ROUNDING = 1e-9  # of a fraction of the frame that went through nanometres and back


class NominalMeter:
    """The clock and the electrons of the twin's own microscope; Nion's threads get `time_scale` of every second."""

    def __init__(self, sample: TwinSample, time_scale: float) -> None:
        self.time_scale = time_scale
        self._sample = sample
        self._begun = (0.0, 0.0)

    def begin(self) -> None:
        self._begun = self._sample.spent

    def beam(self, is_open: bool) -> None:
        """The blanker needs no stopwatch here."""

    def wait(self, time_s: float, aborted: threading.Event) -> None:
        self._sample.ask(Wait(ROW, torch.tensor([time_s])))

    def end(self, current_pa: float) -> tuple[float, float]:
        return self._sample.spent[0] - self._begun[0], self._sample.spent[1] - self._begun[1]


class TwinSample:
    """A simulated microscope of one row as the sample behind Nion's devices.

    `time_scale` is how many seconds Nion's threads take for one second of the instruction; None is real time.
    """

    def __init__(self, microscope: SimulatedMicroscope, time_scale: float | None) -> None:
        self.microscope = microscope
        self.meter: Meter = Stopwatch() if time_scale is None else NominalMeter(self, time_scale)
        self.spent = (0.0, 0.0)  # seconds and electrons, by the simulated microscope's own account
        self.beam_open = False
        self.on_reset: list[Callable[[], None]] = []
        self._realtime = time_scale is None
        self._lock = threading.RLock()  # the caller's thread and Nion's scan thread both come here
        self._ready = False
        self._fov_ang = microscope.config.fov_ang
        self._place: tuple[float, float] | None = None  # parked, as a fraction of the reference frame
        self._over_s = 0.0  # real time at which what was asked last is over
        self._idle: list[tuple[float, bool]] = []  # seconds in between, and whether the beam was open

    def reset(self, streams: Streams, rows: Tensor, options: Mapping[str, Any] | None) -> None:
        """A fresh specimen."""
        with self._lock:
            self.microscope.reset(streams, rows, options)
            self._ready, self._place, self._over_s = True, None, time.monotonic()
            self._idle.clear()
            self._fov_ang = self.microscope.config.fov_ang
        for listener in self.on_reset:
            listener()

    def truth(self) -> Mapping[str, Tensor]:
        """What the simulated microscope knows."""
        with self._lock:
            self._live_until(time.monotonic())
            return self.microscope.truth()

    def ask(self, instruction: Instruction) -> Reading:
        """What the simulated microscope answers. Raises InstructionError before the first reset."""
        with self._lock:
            if not self._ready:
                raise InstructionError("There is no sample yet; call reset(streams, rows) first.")
            now_s = time.monotonic()
            self._live_until(now_s)
            reading = self._do(instruction)
            self._over_s = now_s + float(reading.seconds)
            return reading

    def open_beam(self, is_open: bool) -> None:
        """The blanker has moved."""
        with self._lock:
            self._note_idle(time.monotonic())  # is lived through later: a blanker does not wait
            self.beam_open = is_open

    def park(self, x_ang: float, y_ang: float) -> None:
        """The probe was sent to a place, in Å from the middle of the frame."""
        if self._ready:  # Nion also tells where the probe is while it starts
            place = (0.5 + x_ang / self._fov_ang, 0.5 + y_ang / self._fov_ang)
            self.ask(Park(ROW, torch.tensor([place[0]]), torch.tensor([place[1]])))
            self._place = place

    def frame(
        self,
        fov_ang: float,
        centre: tuple[float, float],
        size: tuple[float, float],
        shape: tuple[int, int],
        dwell_s: float,
    ) -> np.ndarray:
        """Counts (H, W) of the frame of `size` (w, h) Å about `centre` (x, y) Å, within a reference frame of `fov_ang`.

        A blanked frame takes as long, sees nothing and doses nothing.
        """
        if not self.beam_open:
            self.ask(Wait(ROW, torch.tensor([dwell_s * math.prod(shape)])))
            return np.full(shape, self.microscope.config.detector.offset, dtype=np.float32)
        if size[1] < _STANDING_ANG:
            return self._stand(centre, shape, dwell_s)
        corner = [0.5 + (c - 0.5 * s) / fov_ang for c, s in zip(centre, size, strict=True)]
        region = (*corner, size[0] / fov_ang, size[1] / fov_ang)
        if min(corner) < -_ROUNDING or max(corner[0] + region[2], corner[1] + region[3]) > 1.0 + _ROUNDING:
            if centre != (0.0, 0.0):
                raise InstructionError(f"A frame of {size} Å about {centre} Å leaves the field of {fov_ang:g} Å.")
            region, fov_ang = FULL_FRAME, size[1]
        places = torch.tensor([[max(0.0, part) for part in region]])
        reading = self.ask(Scan(ROW, torch.tensor([fov_ang]), shape, torch.tensor([dwell_s]), places))
        self._fov_ang = fov_ang
        return reading.data["images"][0, 0].numpy()

    def _stand(self, centre: tuple[float, float], shape: tuple[int, int], sample_s: float) -> np.ndarray:
        """A frame in which the probe stands still is a dwell; its pixels are the samples of the trace."""
        place = (0.5 + centre[0] / self._fov_ang, 0.5 + centre[1] / self._fov_ang)
        if self._place is None or math.dist(place, self._place) > _ROUNDING:
            self.park(*centre)
        samples = math.prod(shape)
        reading = self.ask(Dwell(ROW, torch.tensor([sample_s * samples]), samples))
        return reading.data["trace"].reshape(shape).numpy()

    def _do(self, instruction: Instruction) -> Reading:
        reading = self.microscope.execute(instruction)
        self.spent = (self.spent[0] + float(reading.seconds), self.spent[1] + float(reading.electrons))
        return reading

    def _note_idle(self, now_s: float) -> None:
        """In real time: the time since the last instruction was over is still to be lived through by the sample."""
        if self._realtime and self._ready and now_s > self._over_s:
            self._idle.append((now_s - self._over_s, self.beam_open))
            self._over_s = now_s

    def _live_until(self, now_s: float) -> None:
        self._note_idle(now_s)
        for idle_s, was_open in self._idle:
            if idle_s > _SHORTEST_S:
                idle = torch.tensor([idle_s])
                self._do(Dwell(ROW, idle) if was_open else Wait(ROW, idle))
        self._idle.clear()
