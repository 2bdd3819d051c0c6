"""The simulated spectral column: B rows of a field of cells, each with its own specimen, drift, clock and ledger.

Places: a fraction f of the field is (f − ½) · field in Å, distorted as the scan coils do; minus the sample's
displacement at that time this is a place on the specimen. Between the middles of cells image and loadings are
interpolated bilinearly; beyond the outermost middles they go on as they are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stem_gym.core.batch import take_rows, write_rows
from stem_gym.core.config import parse
from stem_gym.core.instructions import Acquire, Blank, Park, Read, Reading, Scan, Wait, no_dose
from stem_gym.core.instrument import Limits
from stem_gym.core.streams import Streams
from stem_gym.core.units import ANG_PER_NM, ELECTRONS_PER_PC
from stem_gym.instruments.simulation import Simulation
from stem_gym.simulator.detectors import detect, expected_electrons, line_jitter_ang
from stem_gym.simulator.drift import DriftState, advance, distort, start_drift
from stem_gym.simulator.exposure import displacement_of_rows, pixel_centres
from stem_gym.simulator.probe_grid import ProbeGrid, ProbeRows, blank, of_detector
from stem_gym.simulator.spectral_column import DIFFRACTION, SpectralColumn
from stem_gym.simulator.spectral_specimen import SpectralSpecimen
from stem_gym.simulator.spectrometer import detect_spectrum

Config = SpectralColumn  # what `settings` of this kind must be
_FRAME_KNOTS = 8  # drift is drawn at so many times of a frame and is straight in between
_PATH_SAMPLES = 4  # even parts of an exposure, each spent in the middle of its way
_EXPOSURE_S = Limits(1e-6, 1000.0)


@dataclass
class _Rows:
    """Everything that belongs to a row."""

    specimen: SpectralSpecimen
    drift: DriftState
    probe: ProbeRows
    acquired: Tensor  # (B, K) loadings where the last exposure was; NaN before the first


def make(settings: Mapping[str, Any], rows: int, device: torch.device) -> SpectralInstrument:
    """A simulated spectral column from the `instrument` section of a variant."""
    return SpectralInstrument(parse(SpectralColumn, settings, "instrument"), rows, device)


class SpectralInstrument(Simulation[_Rows]):
    """Executes Scan, Park, Acquire, Blank, Wait and Read on simulated fields of spectra or diffraction patterns.

    Scan answers the annular image of the whole field. The beam is open inside Scan and Acquire alone.
    """

    title = "The spectral column"

    def __init__(self, config: SpectralColumn, rows: int, device: torch.device | str = "cpu") -> None:
        super().__init__(rows, device)
        self.config = config
        cell_ang = config.specimen.fov_nm * ANG_PER_NM / config.shape[1]
        self._grid = ProbeGrid(config.shape, cell_ang, config.current_pa, config.overheads)
        axis = config.specimen.axis()
        self._data_shape = (math.isqrt(len(axis)),) * 2 if config.spectrometer == DIFFRACTION else (len(axis),)
        self.capabilities = self._grid.capabilities({config.spectrometer: axis}, _EXPOSURE_S)
        per_s = config.current_pa * ELECTRONS_PER_PC * config.camera.quantum_efficiency
        self._detected_per_s = torch.full((rows,), per_s, device=self.device)
        self._handlers = {
            Scan: self._scan,
            Park: self._park,
            Acquire: self._acquire,
            Blank: self._blank,
            Wait: self._wait,
            Read: self._read,
        }

    def _fresh(self, streams: Streams, rows: Tensor) -> _Rows:
        """A specimen, drift and clock of its own for each row."""
        specimen = self.config.specimen.build(streams, rows, self.config.shape, self.device)
        return _Rows(
            specimen=specimen,
            drift=start_drift(self.config.drift, streams, rows),
            probe=self._grid.start(len(rows), self.device),
            acquired=torch.full((len(rows), specimen.loadings.shape[2]), torch.nan, device=self.device),
        )

    def _book(self, reading: Reading) -> None:
        self._grid.spend(self._now.probe, reading)

    def truth(self) -> Mapping[str, Tensor]:
        """Loadings, components and image of the field, the loadings where the last Acquire was, and the frame's place.

        `electrons_per_s` turns a spectrum per beam electron into detected electrons per second. These are the live
        buffers, good until the next instruction. `acquired` is NaN before the first Acquire.
        """
        state = self._now
        return {
            "loadings": state.specimen.loadings,
            "components": state.specimen.components,
            "image": state.specimen.image,
            "acquired": state.acquired,
            "electrons_per_s": self._detected_per_s,
            "fov_ang": torch.full((self.rows,), self._grid.fov_ang, device=self.device),
            "frame_centre_ang": -state.drift.offset_ang,
        }

    @torch.inference_mode()
    def abort(self) -> None:
        """Blank every row."""
        if self._state is not None:
            self._state.probe.blanked.fill_(True)

    def _advance(self, rows: Tensor, dt_s: Tensor) -> tuple[Tensor, DriftState]:
        """Displacements (n, J + 1, 2) in Å, the present one first, over steps dt_s (n, J); moves the sample on."""
        before = take_rows(self._now.drift, rows)
        path, after = advance(self.config.drift, before, dt_s, self._streams, rows)
        knots = torch.cat((before.offset_ang.unsqueeze(1), path), dim=1)
        write_rows(self._now.drift, rows, after)  # which `before` may share its memory with
        return knots, after

    def _scan(self, scan: Scan) -> Reading:
        self._grid.check_scan(scan)
        config, rows = self.config, scan.rows
        height, width = config.shape
        line_s = width * scan.dwell_s + config.detector.flyback_s
        seconds = height * line_s + config.overheads.scan_s
        knots, drift = self._advance(rows, (seconds / _FRAME_KNOTS).unsqueeze(1).expand(-1, _FRAME_KNOTS))
        shift = -displacement_of_rows(knots, height)
        if config.detector.line_jitter_ang > 0.0:
            shift = shift + line_jitter_ang(self._streams, rows, height, config.detector)
        y, x = torch.meshgrid(
            pixel_centres(height, self.device), pixel_centres(width, self.device), indexing="ij"
        )  # (H, W)
        place = torch.stack((x, y), dim=-1).flatten(0, 1)
        wanted = self._from_centre_ang(place.expand(len(rows), -1, -1))
        true = distort(drift, wanted) + shift.repeat_interleave(width, dim=1)
        fraction = self._image_at(rows, true)
        current = torch.full_like(scan.dwell_s, config.current_pa)
        mean = expected_electrons(fraction, current, scan.dwell_s, config.detector)
        counts = detect(mean, self._streams, rows, config.detector)
        calibration = of_detector(rows, config.detector.gain, config.detector.offset)
        return self._grid.scan_reading(scan, counts, calibration, config.detector.flyback_s)

    def _acquire(self, acquire: Acquire) -> Reading:
        self._grid.check_acquire(acquire, self.capabilities)
        state, rows = self._now, acquire.rows
        part_s = (acquire.exposure_s / _PATH_SAMPLES).unsqueeze(1).expand(-1, _PATH_SAMPLES)
        knots, drift = self._advance(rows, part_s)
        place = state.probe.place.index_select(0, rows)
        wanted = self._from_centre_ang(place.unsqueeze(1))
        path = distort(drift, wanted) - 0.5 * (knots[:, 1:] + knots[:, :-1])  # (n, J, 2)
        loadings = self._interpolated(state.specimen.loadings, rows, path).mean(1)  # (n, K)
        state.acquired.index_copy_(0, rows, loadings)
        components = state.specimen.components.index_select(0, rows)
        expected = (loadings.unsqueeze(2) * components).sum(1)  # (n, C) per beam electron
        current, camera = torch.full_like(acquire.exposure_s, self.config.current_pa), self.config.camera
        counts = detect_spectrum(expected, self._streams, rows, current, acquire.exposure_s, camera)
        if self.config.overheads.readout_s > 0.0:
            self._advance(rows, torch.full_like(acquire.exposure_s, self.config.overheads.readout_s).unsqueeze(1))
        key = "pattern" if len(self._data_shape) == 2 else "spectrum"
        data = {key: counts.reshape(-1, *self._data_shape)}
        return self._grid.acquire_reading(acquire, place, data, of_detector(rows, camera.gain, camera.offset))

    def _park(self, park: Park) -> Reading:
        return self._pass_time(self._grid.park(self._now.probe, park))

    def _blank(self, instruction: Blank) -> Reading:
        return blank(self._now.probe, instruction, instruction.on)

    def _wait(self, wait: Wait) -> Reading:
        return self._pass_time(no_dose(wait, wait.time_s))

    def _read(self, read: Read) -> Reading:
        return self._grid.read(self._now.probe, read)

    def _pass_time(self, reading: Reading) -> Reading:
        moving = (reading.seconds > 0.0).nonzero().squeeze(1)  # no time, no draw: whoever waits beside it
        if len(moving):
            self._advance(reading.rows[moving], reading.seconds[moving].unsqueeze(1))
        return reading

    def _from_centre_ang(self, place: Tensor) -> Tensor:
        """Places (n, P, 2) in fractions as Å from the middle of the field."""
        height, width = self.config.shape
        field = torch.tensor([width, height], device=place.device) * self._grid.cell_ang
        return (place - 0.5) * field

    def _image_at(self, rows: Tensor, xy_ang: Tensor) -> Tensor:
        """The image of `rows` at places xy_ang (n, H·W, 2) from the middle of the field: (n, H, W)."""
        height, width = self.config.shape
        half_ang = torch.tensor([width, height], device=xy_ang.device) * (0.5 * self._grid.cell_ang)
        at = (xy_ang / half_ang).reshape(-1, height, width, 2)
        image = self._now.specimen.image.index_select(0, rows).unsqueeze(1)
        return torch.nn.functional.grid_sample(image, at, padding_mode="border", align_corners=False).squeeze(1)

    def _interpolated(self, values: Tensor, rows: Tensor, xy_ang: Tensor) -> Tensor:
        """Values (B, H·W, K) of `rows` at places xy_ang (n, P, 2) from the middle of the field: (n, P, K)."""
        height, width = self.config.shape
        at = xy_ang / self._grid.cell_ang
        x = (at[..., 0] + 0.5 * (width - 1)).clamp(0.0, width - 1.0)
        y = (at[..., 1] + 0.5 * (height - 1)).clamp(0.0, height - 1.0)
        left, top = x.long().clamp(max=width - 2), y.long().clamp(max=height - 2)
        right, low = (x - left).unsqueeze(-1), (y - top).unsqueeze(-1)
        first = rows.unsqueeze(1) * (height * width) + top * width + left  # (n, P) in values without its first axis
        flat = values.flatten(0, 1)

        def corner(step: int) -> Tensor:
            return flat.index_select(0, (first + step).flatten()).reshape(*first.shape, -1)

        above = torch.lerp(corner(0), corner(1), right)
        below = torch.lerp(corner(width), corner(width + 1), right)
        return torch.lerp(above, below, low)
