"""A probe on a grid of cells: where it is parked, what it has spent, and what spectral columns answer alike.

Cell number y · W + x is column x and row y of a field of H × W square cells; a place (x, y) in fractions of the field
belongs to the cell floor(x · W), floor(y · H).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from stem_gym.core.config import Config
from stem_gym.core.errors import CapabilityError, InstructionError
from stem_gym.core.instructions import FULL_FRAME, Acquire, Instruction, Park, Read, Reading, Scan, no_dose
from stem_gym.core.instrument import Capabilities, Limits
from stem_gym.core.units import ELECTRONS_PER_PC

HAADF = "haadf"
_ANG_PER_UM = 1e4


class SpectralOverheads(Config):
    """What instructions cost beside the exposure."""

    scan_s: float = Field(default=0.05, ge=0)
    """start and read-out of a frame"""
    park_s: float = Field(default=0.0, ge=0)
    """placing the probe, however far"""
    park_s_per_um: float = Field(default=0.0, ge=0)
    """settling of the deflectors, per micrometre of the way"""
    readout_s: float = Field(default=0.0, ge=0)
    """read-out of a spectrum or a pattern"""


@dataclass
class ProbeRows:
    """The probe and the ledger of B rows."""

    place: Tensor  # (B, 2) parked probe, fractions of the field
    blanked: Tensor  # (B,) bool
    clock_s: Tensor  # (B,)
    electrons: Tensor  # (B,) float64


@dataclass(frozen=True)
class ProbeGrid:
    """A field of cells and the costs of moving over it; every method takes the rows' state and changes it in place."""

    shape: tuple[int, int]  # (H, W)
    cell_ang: float
    current_pa: float
    overheads: SpectralOverheads

    @property
    def fov_ang(self) -> float:
        """Width of the field; its height is that times H / W."""
        return self.shape[1] * self.cell_ang

    def capabilities(self, axes: Mapping[str, Tensor], exposure_s: Limits) -> Capabilities:
        """What a column with these spectrometers (detector → channels) can do."""
        limits = {
            "Scan.fov_ang": Limits(self.fov_ang, self.fov_ang),
            "Scan.dwell_s": Limits(1e-8, 1.0),
            "Scan.region": Limits(0.0, 1.0),
            "Park.x": Limits(0.0, 1.0),
            "Park.y": Limits(0.0, 1.0),
            "Acquire.exposure_s": exposure_s,
            "Wait.time_s": Limits(0.0, 1e5),
        }
        return Capabilities(
            verbs=frozenset({"Scan", "Park", "Acquire", "Blank", "Wait", "Read"}),
            detectors=frozenset({HAADF, *axes}),
            readable=frozenset({"clock_s", "electrons", "fov_ang", "blanked"}),
            limits=limits,
            simulated=True,
            grid=self.shape,
            axes=axes,
        )

    def start(self, rows: int, device: torch.device) -> ProbeRows:
        """Rows whose probe is parked in the middle, blanked, and that have spent nothing."""
        zero = torch.zeros(rows, device=device)
        blanked = torch.ones(rows, dtype=torch.bool, device=device)
        return ProbeRows(torch.full((rows, 2), 0.5, device=device), blanked, zero, zero.double())

    def cells_of(self, place: Tensor) -> Tensor:
        """Cell numbers (n,) of places (n, 2); the far edges belong to the last cells."""
        height, width = self.shape
        column = (place[:, 0] * width).long().clamp(0, width - 1)
        return (place[:, 1] * height).long().clamp(0, height - 1) * width + column

    def check_scan(self, scan: Scan) -> None:
        """Refuse any frame but that of the whole field. Raises CapabilityError or InstructionError."""
        if tuple(scan.channels) != (HAADF,):
            raise CapabilityError(f"Scan takes the one channel {HAADF!r} here; given {tuple(scan.channels)}.")
        whole = torch.tensor(FULL_FRAME, device=scan.region.device).expand_as(scan.region)
        if tuple(scan.shape) != self.shape or not torch.allclose(scan.region, whole, rtol=0.0, atol=1e-6):
            raise InstructionError(
                f"Scan takes the whole field of {self.shape[0]} × {self.shape[1]} cells here, region {FULL_FRAME}; "
                f"given {tuple(scan.shape)}, region {scan.region[:1].tolist()}."
            )

    def check_acquire(self, acquire: Acquire, known: Capabilities) -> None:
        """Refuse a detector that gives images alone. Raises CapabilityError."""
        if acquire.detector not in known.axes:
            raise CapabilityError(
                f"Acquire takes the detectors {sorted(known.axes)}; {acquire.detector!r} comes with a Scan."
            )

    def scan_reading(self, scan: Scan, images: Tensor, calibration: Mapping[str, Tensor], flyback_s: float) -> Reading:
        """The reading of a frame (n, H, W) in counts; `calibration` is the detector's."""
        height, width = self.shape
        seconds = height * (width * scan.dwell_s + flyback_s) + self.overheads.scan_s
        per_pixel = self.current_pa * scan.dwell_s * ELECTRONS_PER_PC
        told = {
            "fov_ang": scan.fov_ang,
            "region": scan.region,
            "pixel_dwell_s": scan.dwell_s,
            "electrons_per_pixel": per_pixel,
            **calibration,
        }
        areal, data = per_pixel / self.cell_ang**2, {"images": images.unsqueeze(1)}
        return Reading("Scan", scan.rows, seconds, per_pixel * (height * width), areal, data, told)

    def acquire_reading(
        self, acquire: Acquire, place: Tensor, counts: Mapping[str, Tensor], calibration: Mapping[str, Tensor]
    ) -> Reading:
        """The reading of a spectrum or pattern; its dose is said to fall on one cell."""
        electrons = self.current_pa * acquire.exposure_s * ELECTRONS_PER_PC
        told = {"exposure_s": acquire.exposure_s, **calibration}
        seconds, areal = acquire.exposure_s + self.overheads.readout_s, electrons / self.cell_ang**2
        return Reading("Acquire", acquire.rows, seconds, electrons, areal, {**counts, "place": place}, told)

    def park(self, state: ProbeRows, park: Park) -> Reading:
        """Place the probe; the way costs time."""
        place = torch.stack((park.x, park.y), dim=-1)
        way = place - state.place.index_select(0, park.rows)
        height, width = self.shape
        way_um = torch.hypot(way[:, 0] * width, way[:, 1] * height) * (self.cell_ang / _ANG_PER_UM)
        state.place.index_copy_(0, park.rows, place)
        return no_dose(park, self.overheads.park_s + self.overheads.park_s_per_um * way_um, {"place": place})

    def read(self, state: ProbeRows, read: Read) -> Reading:
        """The value of a monitor."""
        if read.name == "fov_ang":
            value = torch.full((len(read.rows),), self.fov_ang, device=read.rows.device)
        else:
            value = getattr(state, read.name).index_select(0, read.rows).float()
        return no_dose(read, torch.zeros(len(read.rows), device=read.rows.device), {"value": value})

    def spend(self, state: ProbeRows, reading: Reading) -> None:
        """Write a reading's time and electrons into the ledger."""
        state.clock_s.index_add_(0, reading.rows, reading.seconds)
        state.electrons.index_add_(0, reading.rows, reading.electrons.double())


def of_detector(rows: Tensor, counts_per_electron: float, counts_offset: float) -> dict[str, Tensor]:
    """The calibration of a detector, (n,) each: detected electrons are (counts − offset) / counts_per_electron."""
    one = torch.ones(len(rows), device=rows.device)
    return {"counts_per_electron": one * counts_per_electron, "counts_offset": one * counts_offset}


def blank(state: ProbeRows, instruction: Instruction, on: Tensor) -> Reading:
    """Blank or unblank; between instructions the beam is closed in any case."""
    state.blanked.index_copy_(0, instruction.rows, on)
    return no_dose(instruction, torch.zeros(len(instruction.rows), device=on.device))
