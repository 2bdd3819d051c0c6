"""Nion Swift as an instrument: the minimal instruction set, carried out by Nion's scan and camera threads.

What Nion Swift would let pass is looked after here. A set is read back. A frame that ended too early is no frame. The
frame that the probe position refers to is set before parking, since `record_immediate` does not move it. A spectrum is
one exposure that begins after the probe arrived. The beam is open inside an exposure alone; the blanker is read back.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stem_gym.core.errors import CapabilityError, InstructionError, InstrumentError
from stem_gym.core.instructions import (
    FULL_FRAME,
    Acquire,
    Blank,
    Dwell,
    Instruction,
    MoveStage,
    Park,
    Read,
    Reading,
    Scan,
    Set,
    Wait,
    verb,
)
from stem_gym.core.instrument import Capabilities, Instrument, check_instruction
from stem_gym.core.streams import Streams
from stem_gym.core.units import ANG_PER_NM, electrons
from stem_gym.instruments.adapters.nion.beam import GRACE_S, BeamGate
from stem_gym.instruments.adapters.nion.column import NionColumn
from stem_gym.instruments.adapters.nion.meter import LoadedSample, Sample
from stem_gym.instruments.adapters.nion.session import NionSession
from stem_gym.instruments.adapters.nion.trace import samples_until

CAMERA = "eels"
_SQUARE = 1e-4  # relative; Nion's scan generator knows the height of a frame and takes its width from the pixels
_POINT = 1e-9  # side of a "frame" in which the probe stands still, as a fraction of the reference frame
_TRACE_SAMPLES = 16  # of a dwell that asks for no trace
_PROBE_TOLERANCE = 1e-6  # fraction of the frame


@dataclass(frozen=True)
class Outcome:
    """What a verb gave, for the one row."""

    data: Mapping[str, Any] = field(default_factory=dict)  # each (…), without the row
    calibration: Mapping[str, Any] = field(default_factory=dict)
    area_ang2: float = 0.0  # that the beam covered; 0: no beam
    metadata: Mapping[str, str] = field(default_factory=dict)


class NionInstrument(Instrument):
    """One row on a running `NionSession`. Refuses what it can not do as asked; never clips.

    `probe_area_ang2` is the area that a parked probe's electrons are said to fall on. `truth()` is empty unless the
    sample is a simulated one. Raises InstrumentError for an abort, a torn frame, a hung exposure or a read-back that
    disagrees.
    """

    def __init__(
        self,
        session: NionSession,
        column: NionColumn,
        capabilities: Capabilities,
        sample: Sample | None = None,
        probe_area_ang2: float = 1.0,
    ) -> None:
        self.rows, self.device = 1, torch.device("cpu")
        self.capabilities = capabilities
        self._session, self._column = session, column
        self._sample: Sample = sample or LoadedSample()
        self._meter = self._sample.meter
        self._probe_area_ang2 = probe_area_ang2
        self._gate = BeamGate(column, self._meter, self._halt)
        self._closed = False
        self._reference: Any = None  # frame parameters of the last frame asked for, which places refer to
        self._parked: tuple[float, float] | None = None
        self._handlers: dict[type[Instruction], Callable[[Any], Outcome]] = {
            Scan: self._scan,
            Park: self._park,
            Dwell: self._dwell,
            Acquire: self._acquire,
            Blank: self._blank,
            MoveStage: self._move_stage,
            Set: self._set,
            Read: self._read,
            Wait: self._wait,
        }
        self._column.blank(True)

    def reset(self, streams: Streams, rows: Tensor, options: Mapping[str, Any] | None = None) -> None:
        """Blank the beam, forget the frame and the parked place; a simulated sample is renewed, a real one stays."""
        self._check_open()
        self._column.blank(True)
        self._session.stem.probe_position = None
        self._reference, self._parked = None, None
        self._sample.reset(streams, rows, options)

    def execute(self, instruction: Instruction) -> Reading:
        """Do it. Raises CapabilityError or InstructionError before anything happens."""
        self._check_open()
        check_instruction(instruction, self.capabilities, self.rows)
        if len(instruction.rows) != 1:
            raise InstructionError(
                f"Nion Swift has one row; an instruction names it once, given {len(instruction.rows)}."
            )
        self._gate.begin()
        self._meter.begin()
        outcome = self._handlers[type(instruction)](instruction)
        seconds, spent = self._meter.end(self._column.read("current_pa"))
        areal = spent / outcome.area_ang2 if outcome.area_ang2 > 0.0 else 0.0
        return Reading(
            verb(instruction),
            instruction.rows,
            _row(seconds),
            _row(spent),
            _row(areal),
            {name: _row(value) for name, value in outcome.data.items()},
            {name: _row(value) for name, value in outcome.calibration.items()},
            outcome.metadata,
        )

    def truth(self) -> Mapping[str, Tensor]:
        """What a simulated sample knows; `{}` with any other."""
        return self._sample.truth()

    def abort(self) -> None:
        """Blank the beam, stop the scan and the camera; what is running raises InstrumentError. From any thread."""
        if not self._closed:
            self._gate.abort()

    def close(self) -> None:
        """Blank the beam and shut Nion Swift down; calling it twice does no harm."""
        if self._closed:
            return
        self._closed = True
        try:
            self._column.blank(True)
        finally:
            self._session.close()

    def _check_open(self) -> None:
        if self._closed:
            raise InstrumentError("This Nion Swift instrument is closed; make another.")

    def _halt(self) -> None:
        self._session.scan.abort_recording()
        if self._session.camera is not None:
            self._session.camera.acquire_sequence_cancel()

    def _record(self, parameters: Any) -> tuple[np.ndarray, Mapping[str, str]]:
        """One frame of Nion's scan thread, (channels, H, W), and Nion's words on it. Raises InstrumentError if torn."""
        shape = tuple(parameters.subscan_pixel_size or parameters.pixel_size)
        wanted_s = parameters.pixel_time_us * 1e-6 * shape[0] * shape[1]
        with self._gate.open(wanted_s):
            begun = time.perf_counter()
            frames = self._recorded(parameters)
            took_s = time.perf_counter() - begun
        if fault := self._session.devices.take_fault():
            raise InstrumentError(f"The scan device failed: {fault}") from fault
        if not frames or any(frame is None for frame in frames):
            raise InstrumentError("Nion Swift returned no frame.")
        # An aborted record comes back now and then as a complete frame with rows of zeros, but never in time.
        rows_read = min(int(frame.metadata.get("hardware_source", {}).get("valid_rows", 0)) for frame in frames)
        if took_s < 0.999 * wanted_s or rows_read < shape[0]:
            raise InstrumentError(
                f"The frame ended after {took_s:.4f} s and {rows_read} rows; it needed {wanted_s:.4f} s and {shape[0]}."
            )
        images = np.stack([np.asarray(frame.data, dtype=np.float32) for frame in frames])
        if images.shape[1:] != shape or not np.isfinite(images).all():
            raise InstrumentError(
                f"Nion Swift returned a frame of shape {images.shape[1:]} for {shape}, or not finite."
            )
        return images, {"nion": json.dumps(frames[0].metadata, default=str)}

    def _recorded(self, parameters: Any) -> Any:
        scan = self._session.scan
        give_up = time.monotonic() + GRACE_S
        while scan.is_recording and time.monotonic() < give_up:
            time.sleep(0.01)  # an interrupted frame before this one is on its way out
        try:
            return scan.record_immediate(parameters, sync_timeout=GRACE_S)
        except AssertionError as error:
            raise InstrumentError(f"Nion Swift's scan did not come to rest within {GRACE_S:g} s.") from error

    def _scan(self, scan: Scan) -> Outcome:
        fov_ang, dwell_s = float(scan.fov_ang), float(scan.dwell_s)
        left, top, width, height = (float(part) for part in scan.region[0])
        _check_pixels(scan.shape, (width, height), (left, top))
        channels = [self._channel_index(name) for name in scan.channels]
        full = (left, top, width, height) == FULL_FRAME
        size = scan.shape if full else (round(scan.shape[0] / height),) * 2
        parameters = self._refer_to(fov_ang, size, dwell_s)
        if not full:
            parameters.subscan_pixel_size = scan.shape
            parameters.subscan_fractional_size = (height, width)
            parameters.subscan_fractional_center = (top + 0.5 * height, left + 0.5 * width)
        parameters.enabled_channel_indexes = channels
        images, words = self._record(parameters)
        calibration = {
            "fov_ang": fov_ang,
            "region": scan.region[0],
            "pixel_dwell_s": dwell_s,
            "electrons_per_pixel": electrons(self._column.read("current_pa"), dwell_s),
            **self._counts_calibration(),
        }
        return Outcome({"images": images}, calibration, width * height * fov_ang**2, words)

    def _refer_to(self, fov_ang: float, size: tuple[int, int], dwell_s: float) -> Any:
        """Make a frame the one that places refer to, in Nion Swift too; gives a copy of its parameters."""
        parameters = self._session.scan.get_frame_parameters(0)
        parameters.pixel_size = size
        parameters.fov_nm = fov_ang / ANG_PER_NM
        parameters.center_nm = (0.0, 0.0)
        parameters.rotation_rad = 0.0
        parameters.pixel_time_us = dwell_s * 1e6 * self._meter.time_scale
        self._session.scan.set_current_frame_parameters(parameters)
        self._reference = parameters
        self._check_reference()
        return copy.copy(parameters)

    def _check_reference(self) -> None:
        context, wanted = self._session.stem.scan_context, self._reference
        found = (context.fov_nm, tuple(context.center_nm), context.rotation_rad)
        if found != (wanted.fov_nm, (0.0, 0.0), 0.0):
            raise InstrumentError(f"The probe position refers to the frame {found}, not to one of {wanted.fov_nm} nm.")

    def _park(self, park: Park) -> Outcome:
        from nion.utils import Geometry

        if self._reference is None:
            raise InstructionError("Park refers to the last full Scan, and there was none since the reset.")
        x, y = float(park.x), float(park.y)
        self._session.scan.set_current_frame_parameters(self._reference)  # somebody else may have scanned meanwhile
        self._check_reference()
        self._parked = None
        self._session.stem.probe_position = Geometry.FloatPoint(y=y, x=x)
        found = self._session.stem.probe_position
        if found is None or math.dist((found.x, found.y), (x, y)) > _PROBE_TOLERANCE:
            raise InstrumentError(f"The probe was sent to ({x:g}, {y:g}) and reads {found}.")
        self._parked = (found.x, found.y)
        return Outcome({"place": self._parked})

    def _parked_place(self, what: str) -> tuple[float, float]:
        if self._parked is None:
            raise InstructionError(f"{what} happens at the parked place, and the probe is not parked; send Park first.")
        return self._parked

    def _dwell(self, dwell: Dwell) -> Outcome:
        """A dwell is a frame in which the probe stands still: its pixels are the samples of the ADF trace."""
        place, samples = self._parked_place("Dwell"), dwell.trace or _TRACE_SAMPLES
        sample_s = float(dwell.time_s) / samples
        block = dwell.stop.window_samples if dwell.stop else samples  # a rule can only stop it between two records
        trace: list[float] = []
        words: Mapping[str, str] = {}
        while len(trace) < samples:
            counts, words = self._stand(place, min(block, samples - len(trace)), sample_s)
            trace += counts
            if dwell.stop and samples_until(trace, dwell.stop) is not None:
                break
        calibration = {
            "sample_s": sample_s,
            "electrons_per_sample": electrons(self._column.read("current_pa"), sample_s),
            **self._counts_calibration(),
        }
        padded = trace + [math.nan] * (samples - len(trace))
        data = {"place": place} | ({"trace": padded} if dwell.trace else {})
        return Outcome(data, calibration, self._probe_area_ang2, words)

    def _stand(
        self, place: tuple[float, float], samples: int, sample_s: float
    ) -> tuple[list[float], Mapping[str, str]]:
        parameters = copy.copy(self._reference)
        parameters.pixel_time_us = sample_s * 1e6 * self._meter.time_scale
        parameters.subscan_pixel_size = (samples, 1)
        parameters.subscan_fractional_size = (_POINT, _POINT)
        parameters.subscan_fractional_center = (place[1], place[0])
        parameters.enabled_channel_indexes = [self._channel_index("haadf")]
        images, words = self._record(parameters)
        return [float(count) for count in images[0, :, 0]], words

    def _acquire(self, acquire: Acquire) -> Outcome:
        """One exposure, begun after the probe arrived: a camera left playing would hand out the old place's frame."""
        if acquire.detector != CAMERA:
            raise CapabilityError(f"Acquire takes the detector {CAMERA!r}; {acquire.detector!r} comes with a Scan.")
        self._parked_place("Acquire")
        camera, exposure_s = self._session.camera, float(acquire.exposure_s)
        parameters = camera.get_frame_parameters(0)
        parameters.exposure_ms = exposure_s * 1e3
        camera.abort_playing(sync_timeout=GRACE_S)
        camera.acquire_sequence_prepare(1)
        with self._gate.open(exposure_s):
            part = camera.acquire_sequence_begin(parameters, 1)
            try:
                while not (part.is_complete or part.is_canceled):
                    part = camera.acquire_sequence_continue(update_period=0.1)
            finally:
                camera.acquire_sequence_end()
        if part.is_canceled or part.valid_count != 1:
            raise InstrumentError("The camera gave up the exposure.")
        energy = camera.get_camera_calibrations(parameters)[-1]
        counts = np.asarray(part.xdata.data, dtype=np.float32)[0]
        spectrum = counts.sum(0) if counts.ndim == 2 else counts  # over the direction without energy
        calibration = {
            "energy_offset_ev": energy.offset,
            "energy_per_channel_ev": energy.scale,
            "exposure_s": exposure_s,
        }
        words = {"nion": json.dumps(parameters.as_dict(), default=str)}
        return Outcome({"spectrum": spectrum}, calibration, self._probe_area_ang2, words)

    def _blank(self, blank: Blank) -> Outcome:
        """Blank at once. Unblanking is granted by each exposure for itself, so here it changes nothing."""
        self._column.blank(True)
        return Outcome()

    def _move_stage(self, move: MoveStage) -> Outcome:
        self._column.move_stage(float(move.dx_ang), float(move.dy_ang))
        return Outcome()

    def _set(self, control: Set) -> Outcome:
        self._column.set(control.name, float(control.value))
        return Outcome({control.name: self._column.read(control.name)})

    def _read(self, read: Read) -> Outcome:
        return Outcome({"value": self._column.read(read.name)})

    def _wait(self, wait: Wait) -> Outcome:
        self._meter.wait(float(wait.time_s), self._gate.aborted)
        self._gate.check()
        return Outcome()

    def _channel_index(self, name: str) -> int:
        scan = self._session.scan
        names = [str(scan.get_channel_name(index)).lower() for index in range(scan.channel_count)]
        if name not in names:
            raise CapabilityError(f"The scan unit has no channel {name!r}; it has {', '.join(names)}.")
        return names.index(name)

    def _counts_calibration(self) -> dict[str, float]:
        return {
            "counts_per_electron": self._column.read_or("haadf_counts_per_electron", 1.0),
            "counts_offset": self._column.read_or("haadf_counts_offset", 0.0),
        }


def _check_pixels(shape: tuple[int, int], size: tuple[float, float], corner: tuple[float, float]) -> None:
    """Refuse a region that is empty or reaches out of its frame, and pixels that are not square."""
    width, height = size
    if width <= 0.0 or height <= 0.0 or corner[0] + width > 1.0 + 1e-5 or corner[1] + height > 1.0 + 1e-5:
        raise InstructionError(
            "Scan.region is (left, top, width, height) in fractions of the frame, with positive size and inside it; "
            f"given ({corner[0]:g}, {corner[1]:g}, {width:g}, {height:g})."
        )
    if not math.isclose(width / shape[1], height / shape[0], rel_tol=_SQUARE):
        raise InstructionError(
            f"Nion's scan has square pixels: {shape[0]} rows and {shape[1]} columns do not fit a region of "
            f"{width:g} × {height:g} of the frame."
        )


def _row(value: Any) -> Tensor:
    """`value` with the one row in front."""
    return torch.as_tensor(value, dtype=torch.float32).unsqueeze(0)
