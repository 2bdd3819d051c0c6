"""Small harmless instructions within an instrument's limits, and the same ones spoilt so that they must be refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stem_gym.core.errors import CapabilityError, InstructionError
from stem_gym.core.instructions import (
    FULL_FRAME,
    VERBS,
    Acquire,
    Blank,
    Dwell,
    Instruction,
    Map,
    MoveStage,
    Park,
    Pulse,
    Read,
    Scan,
    Set,
    TraceRule,
    Wait,
)
from stem_gym.core.instrument import Capabilities, Limits

TRACE_SAMPLES = 8
_ABSENT = "absent_by_design"
# Long enough for any clock to see, short enough to wait for.
_WANTED = {
    "Scan.fov_ang": 20.0,
    "Scan.dwell_s": 1e-5,
    "Park.x": 0.3,
    "Park.y": 0.6,
    "Dwell.time_s": 0.02,
    "Acquire.exposure_s": 0.02,
    "Map.dwell_s": 0.002,
    "Pulse.bias_v": 0.0,
    "Pulse.time_s": 0.001,
    "MoveStage.dx_ang": 1.0,
    "MoveStage.dy_ang": -0.5,
    "Wait.time_s": 0.02,
}


@dataclass(frozen=True)
class Refusal:
    """An instruction that must be refused, the error that it must meet, and why."""

    instruction: Instruction
    error: type[Exception]
    why: str


class Examples:
    """One instruction of every verb for `rows` (n,), within the limits of `capabilities`."""

    def __init__(self, capabilities: Capabilities, frame_shape: tuple[int, int] = (16, 16)) -> None:
        self._has = capabilities
        self._shape = capabilities.grid or frame_shape  # where spectra lie on a grid, a frame is that grid

    @property
    def spectrometers(self) -> list[str]:
        """The detectors that Acquire takes: those whose channels are told, else the first that is no "haadf"."""
        others = sorted(self._has.detectors - {"haadf"})
        return sorted(self._has.axes) or others[:1] or ["haadf"]

    def acquire(self, rows: Tensor, detector: str) -> Acquire:
        """A short exposure of `detector`."""
        exposure_s = torch.full((len(rows),), self._within("Acquire.exposure_s"), device=rows.device)
        return Acquire(rows, detector, exposure_s)

    def of(self, name: str, rows: Tensor) -> Instruction:
        """The example of the verb `name`, claimed or not."""
        n, device = len(rows), rows.device
        region = torch.tensor(FULL_FRAME, device=device).repeat(n, 1)
        detectors = sorted(self._has.detectors)
        channels = (detectors[0] if detectors and "haadf" not in detectors else "haadf",)
        spectrometer = self.spectrometers[0]

        def value(key: str) -> Tensor:
            return torch.full((n,), self._within(f"{name}.{key}"), device=device)

        readable = sorted(self._has.readable | self._has.settable.keys()) or [_ABSENT]
        makers = {
            "Scan": lambda: Scan(rows, value("fov_ang"), self._shape, value("dwell_s"), region, channels),
            "Park": lambda: Park(rows, value("x"), value("y")),
            "Dwell": lambda: Dwell(rows, value("time_s"), trace=TRACE_SAMPLES),
            "Acquire": lambda: self.acquire(rows, spectrometer),
            "Map": lambda: Map(rows, spectrometer, (4, 4), region, value("dwell_s")),
            "Pulse": lambda: Pulse(rows, value("bias_v"), value("time_s")),
            "MoveStage": lambda: MoveStage(rows, value("dx_ang"), value("dy_ang")),
            "Set": lambda: self.set(rows, sorted(self._has.settable)[0] if self._has.settable else _ABSENT),
            "Blank": lambda: Blank(rows, torch.ones(n, dtype=torch.bool, device=device)),
            "Wait": lambda: Wait(rows, value("time_s")),
            "Read": lambda: Read(rows, readable[0]),
        }
        return makers[name]()

    def set(self, rows: Tensor, control: str, value: float | None = None) -> Set:
        """Set `control` to `value`, by default somewhere inside its limits."""
        limits = self._has.settable.get(control, Limits(0.0, 0.0))
        middle = 0.5 * (limits.low + limits.high)
        inside = _inside(limits, middle if math.isfinite(middle) else 0.0)
        given = value if value is not None else (*limits.values, inside)[0]
        return Set(rows, control, torch.full((len(rows),), given, device=rows.device))

    def refusals(self, name: str, rows: Tensor, all_rows: int) -> Iterator[Refusal]:
        """Every way in which the verb `name` must be refused."""
        good = self.of(name, rows)
        if name not in self._has.verbs:
            yield Refusal(good, CapabilityError, "the verb is not claimed")
            return
        yield Refusal(replace(good, rows=rows + all_rows), InstructionError, "a row that does not exist")
        yield Refusal(replace(good, rows=rows - all_rows), InstructionError, "a negative row")
        yield Refusal(self.of(name, torch.cat((rows, rows[:1]))), InstructionError, "the same row twice")
        yield Refusal(replace(good, rows=rows.double()), InstructionError, "rows that are no whole numbers")
        for part in ("detector", "channels"):
            if hasattr(good, part):
                unknown = _ABSENT if part == "detector" else (_ABSENT,)
                yield Refusal(_with(good, part, unknown), CapabilityError, "an unknown detector")
        if isinstance(good, Acquire) and self._has.axes and "haadf" in self._has.detectors - self._has.axes.keys():
            yield Refusal(replace(good, detector="haadf"), CapabilityError, "a detector without channels")
        if isinstance(good, (Set, Read)):
            yield Refusal(replace(good, name=_ABSENT), CapabilityError, "an unknown control")
        if hasattr(good, "shape"):
            yield Refusal(_with(good, "shape", (0, 4)), InstructionError, "a frame without pixels")
        if isinstance(good, Dwell):
            yield Refusal(replace(good, trace=-1), InstructionError, "a trace of less than no samples")
            rule = TraceRule(fall=0.2, window_samples=2 * TRACE_SAMPLES)
            yield Refusal(replace(good, stop=rule), InstructionError, "a trace rule that can never be tried")
        yield from self._bad_values(good, name)

    def _bad_values(self, good: Instruction, name: str) -> Iterator[Refusal]:
        for key, value in vars(good).items():
            if key == "rows" or not isinstance(value, Tensor):
                continue
            short = value[:-1] if len(value) > 1 else torch.cat((value, value))
            yield Refusal(_with(good, key, short), InstructionError, f"{key} for another number of rows")
            if not value.is_floating_point():
                continue
            for bad in (math.nan, math.inf, -math.inf):
                yield Refusal(_with(good, key, _spoil(value, bad)), InstructionError, f"{key} = {bad}")
            limits = self._has.settable[good.name] if isinstance(good, Set) else self._has.limits.get(f"{name}.{key}")
            beyond = [*_beyond(limits), *([0.5 * sum(limits.values[:2])] if limits and limits.values[1:] else [])]
            for bad in beyond:
                yield Refusal(_with(good, key, _spoil(value, bad)), InstructionError, f"{key} = {bad:g}")

    def _within(self, key: str) -> float:
        return _inside(self._has.limits.get(key, Limits(-math.inf, math.inf)), _WANTED[key])


def tensor_fields(name: str) -> set[str]:
    """Names of the tensor fields of a verb, `rows` aside: what limits can be given for."""
    fields = dataclasses.fields(VERBS[name])
    return {field.name for field in fields if "Tensor" in str(field.type)} - {"rows"}


def _inside(limits: Limits, wanted: float) -> float:
    return min(max(wanted, limits.low), limits.high)


def _beyond(limits: Limits | None) -> list[float]:
    """A value clearly past each finite end."""
    if limits is None:
        return []
    low, high = limits.low - 0.1 * max(1.0, abs(limits.low)), limits.high + 0.1 * max(1.0, abs(limits.high))
    return [value for value in (low, high) if math.isfinite(value)]


def _spoil(value: Tensor, bad: float) -> Tensor:
    """The first element is `bad`; the others stay right."""
    spoilt = value.clone()
    spoilt.view(-1)[0] = bad
    return spoilt


def _with(good: Instruction, key: str, value: Any) -> Instruction:
    return replace(good, **{key: value})
