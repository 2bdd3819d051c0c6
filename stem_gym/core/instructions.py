"""The minimal instruction set, and the readings that answer it.

Ten or so verbs reach every instrument. All are frozen dataclasses of batch-first tensors: `rows` names the rows of the
batch that an instruction is for, every other tensor has one entry per named row (n). Places are fractions (x, y) in
[0, 1] of the reference frame, the last full Scan; x is the fast axis, y the slow one, origin top left.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

FULL_FRAME = (0.0, 0.0, 1.0, 1.0)  # left, top, width, height
ATOMS = "atoms"  # the detector that gives what an atom finder makes of a frame, instead of the frame


@dataclass(frozen=True)
class TraceRule:
    """When a dwell stops by itself: the running mean of the trace rises or falls by a fraction of its own start.

    `baseline_samples` first samples give the reference, `window_samples` the running mean that is compared with it.
    """

    rise: float | None = None  # stop at (1 + rise) × baseline
    fall: float | None = None  # stop at (1 − fall) × baseline
    baseline_samples: int = 4
    window_samples: int = 2


@dataclass(frozen=True)
class Instruction:
    """What every instruction has: the rows it is for. Rows that it does not name are not touched."""

    rows: Tensor  # (n,) int64


@dataclass(frozen=True)
class Scan(Instruction):
    """Raster a frame, or the sub-frame `region` of it; answers `images` (n, channels, H, W) in counts.

    The channel "atoms" is no picture: it answers `atoms` (n, D, 2), the places of found dopants in fractions of the
    reference frame, sorted along x and NaN where none; `bonds_ang` (n, D, 3, 2) to their lattice neighbours; and
    `shift_ang` (n, 2), by how much the sample has moved since the last frame.
    """

    fov_ang: Tensor  # (n,) side of the full frame
    shape: tuple[int, int]  # (H, W) pixels of what is scanned
    dwell_s: Tensor  # (n,) per pixel
    region: Tensor  # (n, 4) left, top, width, height as fractions of the full frame
    channels: tuple[str, ...] = ("haadf",)


@dataclass(frozen=True)
class Park(Instruction):
    """Place the probe, beam blanked; answers `place` (n, 2), as read back."""

    x: Tensor  # (n,)
    y: Tensor  # (n,)


@dataclass(frozen=True)
class Dwell(Instruction):
    """Unblank at the parked place; answers `place` (n, 2) and `trace` (n, samples) in counts, NaN after an early stop.

    The calibration of Scan and Dwell: `electrons_per_pixel` or `electrons_per_sample`, `counts_per_electron` and
    `counts_offset`, each (n,), so that (counts − offset) / gain / electrons is the collected fraction of the beam.
    """

    time_s: Tensor  # (n,)
    trace: int = 0  # samples of the ADF signal; 0: none
    stop: TraceRule | None = None


@dataclass(frozen=True)
class Acquire(Instruction):
    """A spectrum or a diffraction pattern at the parked place; answers `spectrum` or `pattern`."""

    detector: str
    exposure_s: Tensor  # (n,)


@dataclass(frozen=True)
class Map(Instruction):
    """A spectrum image or 4D-STEM block."""

    detector: str
    shape: tuple[int, int]
    region: Tensor  # (n, 4)
    dwell_s: Tensor  # (n,)


@dataclass(frozen=True)
class Pulse(Instruction):
    """An electric pulse at the parked place."""

    bias_v: Tensor  # (n,)
    time_s: Tensor  # (n,)


@dataclass(frozen=True)
class MoveStage(Instruction):
    """Move the stage: the sample moves by this much in the frame's own directions, then settles."""

    dx_ang: Tensor  # (n,)
    dy_ang: Tensor  # (n,)


@dataclass(frozen=True)
class Set(Instruction):
    """Set one allow-listed control; the unit is in its name (defocus_ang, current_pa, beam_shift_x_ang, …).

    Answers the control under its own name, (n,), as read back.
    """

    name: str
    value: Tensor  # (n,)


@dataclass(frozen=True)
class Blank(Instruction):
    """Blank or unblank the beam. Between instructions the beam is blanked in any case."""

    on: Tensor  # (n,) bool


@dataclass(frozen=True)
class Wait(Instruction):
    """Let time pass, beam blanked."""

    time_s: Tensor  # (n,)


@dataclass(frozen=True)
class Read(Instruction):
    """Read one control or monitor; answers `value` (n,)."""

    name: str


VERBS: dict[str, type[Instruction]] = {
    kind.__name__: kind for kind in (Scan, Park, Dwell, Acquire, Map, Pulse, MoveStage, Set, Blank, Wait, Read)
}


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def full_frames(rows: int, device: torch.device) -> Tensor:
    """The region (rows, 4) of a full frame. Not to be written to."""
    return torch.tensor(FULL_FRAME, device=device).repeat(rows, 1)


def is_full(region: Tensor) -> bool:
    """Whether a region is known to be that of full frames."""
    return region is full_frames(region.shape[0], region.device)


def verb(instruction: Instruction) -> str:
    """The verb's name, as in `Capabilities.verbs`."""
    return type(instruction).__name__


@dataclass(frozen=True)
class Reading:
    """What an instrument answers: data with its calibration, and the ledger as the instrument measured it."""

    verb: str
    rows: Tensor  # (n,) int64
    seconds: Tensor  # (n,)
    electrons: Tensor  # (n,)
    electrons_per_ang2: Tensor  # (n,) mean areal dose where the beam was
    data: Mapping[str, Tensor] = field(default_factory=dict)  # each (n, …)
    calibration: Mapping[str, Tensor] = field(default_factory=dict)  # each (n, …), unit in the name
    metadata: Mapping[str, str] = field(default_factory=dict)  # the vendor's own words, verbatim


def no_dose(instruction: Instruction, seconds: Tensor, data: Mapping[str, Tensor] | None = None) -> Reading:
    """The reading of an instruction that delivered no electrons."""
    zero = torch.zeros_like(seconds)
    return Reading(verb(instruction), instruction.rows, seconds, zero, zero, data or {})
