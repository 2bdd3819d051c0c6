"""The contract of everything that executes instructions: simulated, recorded, learned, or a real microscope."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stem_gym.core.batch import ends, names_every
from stem_gym.core.errors import CapabilityError, InstructionError
from stem_gym.core.instructions import Instruction, Reading, is_full, verb
from stem_gym.core.streams import Streams

_NO_TENSORS = frozenset({"rows", "shape", "channels", "trace", "stop", "detector", "name"})  # fields checked by name
_ROUNDING = 1e-6  # relative; the ends of a range belong to it, and 1e-8 in single precision is a little less


@dataclass(frozen=True)
class Limits:
    """What a value may be, ends included, in the unit of its name; where there are `values`, one of these alone."""

    low: float
    high: float
    values: tuple[float, ...] = ()

    @classmethod
    def one_of(cls, values: Sequence[float]) -> Limits:
        """A control that stands at certain values alone."""
        return cls(min(values), max(values), tuple(values))


_ANYTHING = Limits(-math.inf, math.inf)


@dataclass(frozen=True)
class Capabilities:
    """What an instrument can do. An env refuses to be built on one that lacks what its task needs."""

    verbs: frozenset[str]
    detectors: frozenset[str] = frozenset()
    settable: Mapping[str, Limits] = field(default_factory=dict)
    readable: frozenset[str] = frozenset()
    limits: Mapping[str, Limits] = field(default_factory=dict)  # of instruction fields: "Dwell.time_s", "Scan.fov_ang"
    rows: int | None = None  # the most rows it can have; None: any
    simulated: bool = False  # whether truth() has something to say
    dopants: int | None = None  # the fewest that a fresh specimen has; None: unknown
    grid: tuple[int, int] | None = None  # (H, W) cells in which spectra are at hand; None: at any place
    axes: Mapping[str, Tensor] = field(default_factory=dict)  # detector → its channels: (C,) eV, or (C, 2) mrad
    compiled: bool = False  # whether it runs in machine code, as then the task may
    told: Mapping[str, Any] = field(default_factory=dict)  # section → as plain data, where the task must say the same

    def limits_of(self, name: str) -> Mapping[str, Limits]:
        """The limits of the fields of one verb, by the name of the field."""
        return self._limits_by_verb.get(name, {})

    @functools.cached_property
    def _limits_by_verb(self) -> dict[str, dict[str, Limits]]:
        by_verb: dict[str, dict[str, Limits]] = {}
        for key, limits in self.limits.items():
            name, _, part = key.partition(".")
            by_verb.setdefault(name, {})[part] = limits
        return by_verb


class Instrument(ABC):
    """Executes the minimal instruction set on `rows` rows. Refuses what it can not do as asked; never clips.

    `reset(streams, rows, options)` starts new episodes on `rows` (n,). `execute` answers one Reading for the rows that
    the instruction names. `truth` tells what only a simulator can know, and is `{}` on a real instrument.
    """

    capabilities: Capabilities
    rows: int
    device: torch.device

    @abstractmethod
    def reset(self, streams: Streams, rows: Tensor, options: Mapping[str, Any] | None = None) -> None:
        """Start a new episode on `rows` (n,) int64."""

    @abstractmethod
    def execute(self, instruction: Instruction) -> Reading:
        """Do it, and say what was seen and what it cost."""

    def truth(self) -> Mapping[str, Tensor]:
        """What only a simulator can know, each (B, …); `{}` on a real instrument."""
        return {}

    def abort(self) -> None:  # noqa: B027 – nothing to stop is a fair answer
        """Stop what is running and make it safe: beam blanked. May be called from another thread."""

    def close(self) -> None:  # noqa: B027 – so is nothing to close
        """Make it safe and let go of it. Calling it twice does no harm."""

    def snapshot(self) -> Any:
        """The whole state, for `restore`; only simulators can."""
        raise CapabilityError(f"{type(self).__name__} can not be cloned: it is no simulator.")

    def restore(self, snapshot: Any, streams: Streams) -> None:
        """Go back to a snapshot."""
        raise CapabilityError(f"{type(self).__name__} can not be restored: it is no simulator.")


def check_instruction(instruction: Instruction, capabilities: Capabilities, rows: int) -> None:
    """Refuse an instruction outside the capabilities: verb, detector, control, rows, ranges, NaN.

    Raises CapabilityError for what the instrument lacks and InstructionError for values it does not take.
    """
    name = verb(instruction)
    if name not in capabilities.verbs:
        raise CapabilityError(f"The instrument has no verb {name}; it has {', '.join(sorted(capabilities.verbs))}.")
    _check_rows(instruction.rows, name, rows)
    for part, known in (("detector", capabilities.detectors), ("channels", capabilities.detectors)):
        asked = getattr(instruction, part, ())
        for detector in (asked,) if isinstance(asked, str) else asked:
            if detector not in known:
                raise CapabilityError(f"The instrument has no detector {detector!r}; it has {sorted(known)}.")
    limits = capabilities.limits_of(name)
    if name == "Set":
        limits = {**limits, "value": _control_limits(instruction, capabilities)}
    if name == "Read":
        _check_readable(instruction, capabilities)
    _check_shape(instruction, name)
    _check_values(instruction, name, limits)


def _check_rows(index: Tensor, name: str, rows: int) -> None:
    if index.dtype != torch.int64 or index.dim() != 1:
        raise InstructionError(f"{name}.rows must be int64 of shape (n,); given {index.dtype}, {tuple(index.shape)}.")
    n = index.shape[0]
    if names_every(index, rows):
        return
    least, most = ends(index) if n else (0, 0)
    if least < 0 or most >= rows:
        raise InstructionError(f"{name}.rows must lie in 0…{rows - 1}; given {index.tolist()[:8]}.")
    if n > 1 and bool((index.sort().values.diff() == 0).any()):
        raise InstructionError(f"{name}.rows must name each row once; given {index.tolist()[:8]}.")


def _control_limits(instruction: Any, capabilities: Capabilities) -> Limits:
    if instruction.name not in capabilities.settable:
        known = ", ".join(sorted(capabilities.settable)) or "nothing"
        raise CapabilityError(f"The control {instruction.name!r} is not allow-listed; settable: {known}.")
    return capabilities.settable[instruction.name]


def _check_readable(instruction: Any, capabilities: Capabilities) -> None:
    known = capabilities.readable | capabilities.settable.keys()
    if instruction.name not in known:
        raise CapabilityError(f"The control {instruction.name!r} can not be read; readable: {sorted(known)}.")


def _check_shape(instruction: Any, name: str) -> None:
    """Pixels of a frame and samples of a trace are whole and positive; a trace rule fits its trace."""
    shape = getattr(instruction, "shape", (1, 1))
    if len(shape) != 2 or any(type(pixels) is not int or pixels < 1 for pixels in shape):
        raise InstructionError(f"{name}.shape must be (H, W), two whole numbers of at least 1; given {shape}.")
    samples, rule = getattr(instruction, "trace", 0), getattr(instruction, "stop", None)
    if type(samples) is not int or samples < 0:
        raise InstructionError(f"{name}.trace must be a whole number of samples, 0 for none; given {samples}.")
    if rule is None:
        return
    windows = (rule.baseline_samples, rule.window_samples)
    if min(windows) < 1 or (samples and max(windows) > samples):
        raise InstructionError(f"{name}.stop must average 1…{samples or 'all'} samples of the trace; given {rule}.")
    if not all(math.isfinite(part) for part in (rule.rise, rule.fall) if part is not None):
        raise InstructionError(f"{name}.stop must rise or fall by finite fractions; given {rule}.")


def _check_values(instruction: Instruction, name: str, limits: Mapping[str, Limits]) -> None:
    n = len(instruction.rows)
    for key, value in vars(instruction).items():
        if key in _NO_TENSORS:
            continue
        right = (n, 4) if key == "region" else (n,)
        if not isinstance(value, Tensor) or tuple(value.shape) != right or (value.dtype == torch.bool) != (key == "on"):
            kind = "bool" if key == "on" else "numbers"
            given = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.40}"
            raise InstructionError(f"{name}.{key} must be a tensor {right} of {kind}; given {given}.")
        if n == 0 or key == "on" or (key == "region" and is_full(value)):
            continue
        low, high = ends(value)
        allowed = limits.get(key, _ANYTHING)
        least, most = allowed.low - _ROUNDING * abs(allowed.low), allowed.high + _ROUNDING * abs(allowed.high)
        if not (least <= low and high <= most and math.isfinite(low) and math.isfinite(high)):
            raise InstructionError(
                f"{name}.{key} must be finite and within [{allowed.low:g}, {allowed.high:g}]; "
                f"given {low:g} to {high:g}."
            )
        if allowed.values:
            _check_choice(f"{name}.{key}", value, allowed.values)


def _check_choice(key: str, value: Tensor, choices: tuple[float, ...]) -> None:
    known = torch.tensor(choices, dtype=value.dtype, device=value.device)
    if bool(((value.unsqueeze(1) - known).abs() > _ROUNDING * known.abs()).all(1).any()):
        given = [float(f"{number:g}") for number in value.unique().tolist()[:8]]
        raise InstructionError(f"{key} must be one of {', '.join(f'{one:g}' for one in choices)}; given {given}.")
