"""The simulated microscope: B rows, each with its own specimen, drift, clock, dose and ledger.

Places: a fraction f of the reference frame is (f − ½) · fov in Å, distorted as the scan coils do; the beam shift is
added, and minus the sample's displacement at that time this is a place on the specimen's periodic cell.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stem_gym.core.batch import number, take, take_rows, write, write_rows, write_sum
from stem_gym.core.config import parse
from stem_gym.core.instructions import (
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
    no_dose,
)
from stem_gym.core.streams import Streams
from stem_gym.core.units import ELECTRONS_PER_PC
from stem_gym.instruments.column import Column, ColumnRows
from stem_gym.simulator import dose, imaging, removal
from stem_gym.simulator.detectors import detect, expected_electrons, line_jitter_ang
from stem_gym.simulator.drift import frame_time_s, move_stage, start_drift
from stem_gym.simulator.exposure import (
    check_region,
    displacement_of_rows,
    drift_at,
    raster,
    samples_of,
    samples_until,
    spread_over,
)
from stem_gym.simulator.microscope import Microscope, capabilities
from stem_gym.simulator.optics import Optics, probe_fwhm_ang, transfer_function
from stem_gym.simulator.specimens import Specimen

Config = Microscope  # what `settings` of this kind must be
PATH_SAMPLES = 16  # evenly spaced times of the last dwell at which truth tells where the beam was
_FRAME_KNOTS = 8  # drift is drawn at so many times of a frame and is straight in between


@dataclass
class _Rows(ColumnRows):
    """Everything that belongs to a row."""

    specimen: Specimen
    fragile: removal.Fragile  # atoms that the beam can remove
    structure: Tensor  # (B, Ny, Nx) complex64
    transfer: Tensor  # (B, Ny, Nx)
    series: Tensor  # (B, 2 N, 2 N) the expected image as a real series
    defocus_ang: Tensor  # (B,)
    current_pa: Tensor  # (B,)
    beam_shift_ang: Tensor  # (B, 2)
    dose_map: Tensor  # (B, n, n) electrons per Å²
    probe_path_ang: Tensor  # (B, P, 2) where the beam was on the specimen during the last dwell


def make(settings: Mapping[str, Any], rows: int, device: torch.device) -> SimulatedMicroscope:
    """A simulated microscope from the `instrument` section of a variant."""
    return SimulatedMicroscope(parse(Microscope, settings, "instrument"), rows, device)


class SimulatedMicroscope(Column[_Rows]):
    """Executes Scan, Park, Dwell, MoveStage, Set, Blank, Wait and Read on simulated specimens.

    The beam is open inside Scan and Dwell alone, blanked during flyback and in between.
    """

    title = "The simulated microscope"

    def __init__(self, config: Microscope, rows: int, device: torch.device | str = "cpu") -> None:
        super().__init__(rows, device)
        self.config: Config = config
        self.capabilities = capabilities()
        nominal = self._optics(torch.full((1,), config.probe.defocus_ang))
        self._probe_fwhm_ang = float(probe_fwhm_ang(nominal))
        largest = config.specimen.largest_cell_ang
        self.harmonics = imaging.Harmonics.within(largest, float(nominal.band_limit_per_ang))
        self._bins = max(1, round(max(largest) / config.dose_pixel_ang))
        self._learned_image = _learned_image(config, self.device)
        self._handlers: dict[type[Instruction], Any] = {
            Scan: self._scan,
            Park: self._park,
            Dwell: self._dwell,
            MoveStage: self._move_stage,
            Set: self._set,
            Blank: self._blank,
            Wait: self._wait,
            Read: self._read,
        }

    def truth(self) -> Mapping[str, Tensor]:
        """Atoms (places in Å on the cell), where the beam was, where the frame lies, and the dose map in e/Å².

        These are the live buffers, good until the next instruction.
        """
        state = self._now
        return {
            "atom_xy_ang": state.specimen.xy_ang,
            "atomic_number": state.specimen.atomic_number,
            "present": state.specimen.present,
            "cell_ang": state.specimen.cell_ang,
            "probe_path_ang": state.probe_path_ang,
            "frame_centre_ang": state.beam_shift_ang - state.drift.offset_ang,
            "fov_ang": state.fov_ang,
            "dose_map": state.dose_map,
        }

    def _optics(self, defocus_ang: Tensor) -> Optics:
        settings = self.config.probe.model_dump(exclude={"defocus_ang", "defocus_sd_ang"})
        return Optics.of(len(defocus_ang), device=defocus_ang.device, defocus_ang=defocus_ang, **settings)

    def _fresh(self, streams: Streams, rows: Tensor) -> _Rows:
        """New episodes for `rows` (n,)."""
        config, n = self.config, len(rows)
        specimen = config.specimen.build(streams, rows, self.device)
        structure = imaging.structure_coefficients(specimen, self._weights_ang2(specimen), self.harmonics)
        defocus = self._draw_defocus(streams, rows)
        transfer = self._transfer(specimen.cell_ang, defocus)
        zero = torch.zeros(n, device=self.device)
        pair = torch.zeros(n, 2, device=self.device)
        return _Rows(
            specimen=specimen,
            fragile=removal.fragile_atoms(specimen, config.removal),
            structure=structure,
            transfer=transfer,
            series=self._image(structure, transfer, specimen, defocus),
            drift=start_drift(config.drift, streams, rows),
            defocus_ang=defocus,
            current_pa=zero + config.current_pa,
            beam_shift_ang=pair.clone(),
            fov_ang=zero + config.fov_ang,
            place=pair + 0.5,
            blanked=torch.ones(n, dtype=torch.bool, device=self.device),
            clock_s=zero.clone(),
            electrons=zero.double(),
            dose_map=torch.zeros(n, self._bins, self._bins, device=self.device),
            probe_path_ang=torch.zeros(n, PATH_SAMPLES, 2, device=self.device),
        )

    def _weights_ang2(self, specimen: Specimen) -> Tensor:
        energy = torch.full((len(specimen.cell_ang),), self.config.probe.energy_kev, device=self.device)
        detector = self.config.detector
        return imaging.atom_weights_ang2(specimen, energy, detector.inner_mrad, detector.outer_mrad)

    def _transfer(self, cell_ang: Tensor, defocus_ang: Tensor) -> Tensor:
        return transfer_function(self._optics(defocus_ang), *self.harmonics.frequencies(cell_ang))

    def _image(self, structure: Tensor, transfer: Tensor, specimen: Specimen, defocus_ang: Tensor) -> Tensor:
        """The expected image as a real series, corrected by the surrogate where the configuration says so."""
        if self._learned_image is None:
            return imaging.real_series(imaging.image_coefficients(structure, transfer))
        return imaging.real_series(self._learned_image(specimen, self._optics(defocus_ang), self.harmonics))

    def _scan(self, scan: Scan) -> Reading:
        config, state, rows = self.config, self._now, scan.rows
        check_region(scan.region)
        height, width = scan.shape
        seconds = frame_time_s(scan.shape, scan.dwell_s, config.detector.flyback_s) + number(config.overheads.scan_s)
        knots, drift = self._advance(rows, (seconds / number(_FRAME_KNOTS)).unsqueeze(1).expand(-1, _FRAME_KNOTS))
        shift = take(state.beam_shift_ang, rows).unsqueeze(1) - displacement_of_rows(knots, height)
        places = raster(scan, drift.distortion, shift)
        x, y, shift = places.x_ang, places.y_ang, places.shift_ang
        if config.detector.line_jitter_ang > 0.0:
            shift = shift + line_jitter_ang(self._streams, rows, height, config.detector)
        corner_ang, size_ang = places.corner_ang, places.size_ang
        cell, current = take(state.specimen.cell_ang, rows), take(state.current_pa, rows)
        fraction = self._through_haze(imaging.scan_image(state.series, cell, x, y, shift, rows), rows)
        mean = expected_electrons(fraction, current, scan.dwell_s, config.detector)
        counts = detect(mean, self._streams, rows, config.detector)
        electrons = current * scan.dwell_s * number(height * width * ELECTRONS_PER_PC)
        write(state.fov_ang, rows, scan.fov_ang)
        true_x, true_y = x + shift[:, :, 0].mean(1, keepdim=True), y + shift[:, :, 1]
        write_sum(state.dose_map, rows, dose.frame_map(electrons, true_x, true_y, cell, self._bins))
        self._spend(rows, seconds, electrons, drift)
        if config.removal is not None:
            atoms = self._fragile_places(rows)
            corner = corner_ang + shift.mean(1)
            self._remove(config.removal, rows, dose.dose_in_frame(atoms, electrons, corner, size_ang, cell))
        areal = electrons / (size_ang[:, 0] * size_ang[:, 1])
        calibration = {
            "fov_ang": scan.fov_ang,
            "region": scan.region,
            "pixel_dwell_s": scan.dwell_s,
            "electrons_per_pixel": electrons / number(height * width),
            **self._detector_calibration(electrons),
        }
        return Reading("Scan", rows, seconds, electrons, areal, {"images": counts.unsqueeze(1)}, calibration)

    def _dwell(self, dwell: Dwell) -> Reading:
        config, state, rows = self.config, self._now, dwell.rows
        samples = samples_of(dwell, PATH_SAMPLES)
        sample_s = dwell.time_s / number(samples)
        knots, drift = self._advance(rows, sample_s.unsqueeze(1).expand(-1, samples))
        parked = take(state.place, rows)
        wanted = (parked - number(0.5)) * take(state.fov_ang, rows).unsqueeze(1)
        place = (drift.distortion * wanted.unsqueeze(1)).sum(2) + take(state.beam_shift_ang, rows)
        path = place.unsqueeze(1) - number(0.5) * (knots[:, 1:] + knots[:, :-1])  # (n, J, 2)
        cell, current = take(state.specimen.cell_ang, rows), take(state.current_pa, rows)
        fraction = self._through_haze(imaging.probe_signal(state.series, cell, path, rows), rows)
        counts = detect(
            expected_electrons(fraction, current, sample_s, config.detector), self._streams, rows, config.detector
        )
        used = torch.full_like(rows, samples)
        if dwell.stop is not None:
            used = samples_until(counts, dwell.stop)
            drift = drift_at(used, knots, take_rows(state.drift, rows), drift)
            counts = torch.where(torch.arange(samples, device=self.device) < used.unsqueeze(1), counts, torch.nan)
        seconds = sample_s * used
        electrons = current * seconds * number(ELECTRONS_PER_PC)
        path = torch.gather(path, 1, spread_over(used, PATH_SAMPLES).unsqueeze(-1).expand(-1, -1, 2))
        write(state.probe_path_ang, rows, path)
        write_sum(state.dose_map, rows, dose.point_map(electrons, path, cell, self._bins))
        self._spend(rows, seconds, electrons, drift)
        if config.removal is not None:
            atoms = self._fragile_places(rows)
            areal = dose.dose_of_probe(atoms, electrons, path, cell, self._probe_fwhm_ang)
            self._remove(config.removal, rows, areal)
        calibration = {
            "sample_s": sample_s,
            "electrons_per_sample": current * sample_s * number(ELECTRONS_PER_PC),
            **self._detector_calibration(electrons),
        }
        mean_areal = electrons / number(0.25 * torch.pi * self._probe_fwhm_ang**2)
        data = {"place": parked.clone(), **({"trace": counts} if dwell.trace else {})}
        return Reading("Dwell", rows, seconds, electrons, mean_areal, data, calibration)

    def _move_stage(self, move: MoveStage) -> Reading:
        step, before = torch.stack((move.dx_ang, move.dy_ang), dim=-1), take_rows(self._now.drift, move.rows)
        write_rows(self._now.drift, move.rows, move_stage(self.config.drift, before, step))
        return self._pass_time(move, torch.full_like(move.dx_ang, self.config.overheads.stage_s))

    def _set(self, control: Set) -> Reading:
        state, rows, value = self._now, control.rows, control.value
        if control.name == "current_pa":
            state.current_pa[rows] = value
        elif control.name == "defocus_ang":
            state.defocus_ang[rows] = value
            specimen = take_rows(state.specimen, rows)
            state.transfer[rows] = self._transfer(specimen.cell_ang, value)
            state.series[rows] = self._image(state.structure[rows], state.transfer[rows], specimen, value)
        else:
            state.beam_shift_ang[rows, int(control.name == "beam_shift_y_ang")] = value
        return self._pass_time(control, torch.full_like(value, self.config.overheads.set_s), {control.name: value})

    def _wait(self, wait: Wait) -> Reading:
        return self._pass_time(wait, wait.time_s)

    def _read(self, read: Read) -> Reading:
        state = self._now
        values = {
            "beam_shift_x_ang": state.beam_shift_ang[:, 0],
            "beam_shift_y_ang": state.beam_shift_ang[:, 1],
            "blanked": state.blanked,
        }
        value = values[read.name] if read.name in values else getattr(state, read.name)
        return no_dose(read, torch.zeros(len(read.rows), device=self.device), {"value": value[read.rows].float()})

    def _through_haze(self, fraction: Tensor, rows: Tensor) -> Tensor:
        """The collected fraction (n, …) with what the contamination adds that the dose so far has gathered."""
        if self.config.contamination_per_dose == 0.0:
            return fraction
        cell = take(self._now.specimen.cell_ang, rows)
        haze = self.config.contamination_per_dose * take(self._now.electrons, rows).float() / cell.prod(1)
        return fraction + haze.reshape(-1, *(1,) * (fraction.dim() - 1))

    def _fragile_places(self, rows: Tensor) -> Tensor:
        site = take(self._now.fragile.site, rows)
        return torch.gather(take(self._now.specimen.xy_ang, rows), 1, site.unsqueeze(-1).expand(-1, -1, 2))

    def _remove(self, model: removal.RemovalModel, rows: Tensor, dose_e_per_ang2: Tensor) -> None:
        """Take away the atoms that the dose (n, V) removes, from the specimen and from its image."""
        state = self._now
        specimen, fragile = take_rows(state.specimen, rows), take_rows(state.fragile, rows)
        there = fragile.there & specimen.present.gather(1, fragile.site)
        lost = there & removal.lost_atoms(model, dose_e_per_ang2, self._streams, rows)
        weight = self._weights_ang2(specimen).gather(1, fragile.site) * lost
        sigma = specimen.thermal_sigma_ang.gather(1, fragile.site)
        place = self._fragile_places(rows)
        change = -imaging.scatterer_coefficients(specimen.cell_ang, place, weight, sigma, self.harmonics)
        write_sum(state.structure, rows, change)
        write_sum(state.series, rows, imaging.real_series(change * take(state.transfer, rows)))
        kept = specimen.present.scatter(1, fragile.site, specimen.present.gather(1, fragile.site) & ~lost)
        write(state.specimen.present, rows, kept)


def _learned_image(config: Microscope, device: torch.device) -> Callable[..., Tensor] | None:
    """What gives the expected image instead of the sum over atoms, where the configuration says so."""
    if not config.surrogate:
        return None
    from stem_gym.surrogates.imaging import ImagingSurrogate, grid_shape  # weights are read only where they are used

    # One grid for all rows, of the largest cell, so that no row depends on its neighbours' cells.
    shape = grid_shape(torch.tensor([config.specimen.largest_cell_ang]))
    return functools.partial(ImagingSurrogate.load(device=device).coefficients, shape=shape)
