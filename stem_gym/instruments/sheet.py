"""A doped sheet under the beam, seen as an operator's software sees it: perceived atoms instead of pictures.

The physics that moves and breaks atoms is `simulator.kinetics`; what a frame shows is the detector "atoms": places of
the dopants with the errors of an atom finder, the bonds that a lattice fit gives, and the shift since the last frame.
Without pictures to render, thousands of rows run side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stem_gym.core.batch import (
    changed,
    every_row,
    rows_where,
    take,
    take_rows,
    write,
    write_sum,
)
from stem_gym.core.config import parse
from stem_gym.core.errors import ConfigError
from stem_gym.core.instructions import Blank, Dwell, Instruction, Park, Read, Reading, Scan, Set, Wait, no_dose
from stem_gym.core.periodic import nearest_image
from stem_gym.core.streams import Streams
from stem_gym.core.units import ELECTRONS_PER_PC
from stem_gym.instruments.column import Column
from stem_gym.instruments.sheet_beams import Beams
from stem_gym.instruments.sheet_compiled import CompiledSheet
from stem_gym.instruments.sheet_haze import ATOMS_PER_ANG2, Haze
from stem_gym.instruments.sheet_rows import SheetRows
from stem_gym.simulator.detectors import detect, expected_electrons, line_jitter_ang
from stem_gym.simulator.drift import DriftState, frame_time_s, start_drift
from stem_gym.simulator.exposure import (
    check_region,
    displacement_of_rows,
    drift_at,
    raster,
    samples_of,
    samples_until,
    straight,
)
from stem_gym.simulator.finder import View
from stem_gym.simulator.flux import density_at
from stem_gym.simulator.kinetics import Beam, Frame
from stem_gym.simulator.microscope import SheetColumn, sheet_capabilities
from stem_gym.simulator.pictures import Pictures
from stem_gym.simulator.sheet import CARBON, NOTHING, Event, beginning

Config = SheetColumn  # what `settings` of this kind must be
_SAMPLES = 8  # parts of a dwell without a trace
_DWELL_KNOTS, _FRAME_KNOTS = 2, 4  # drift is drawn at so many times of an exposure and is straight in between
_FRAME_PASSES = 64  # events that one frame may see; more would be no sheet any longer


def make(settings: Mapping[str, Any], rows: int, device: torch.device) -> SheetMicroscope:
    """A sheet under the beam from the `instrument` section of a variant."""
    return SheetMicroscope(parse(Config, settings, "instrument"), rows, device)


class SheetMicroscope(Column[SheetRows]):
    """Executes Scan (channel "atoms"), Park, Dwell, Blank, Wait and Read on simulated sheets.

    What a scan answers is told by `core.instructions.Scan`.
    """

    title = "The sheet"

    def __init__(self, config: Config, rows: int, device: torch.device | str = "cpu") -> None:
        super().__init__(rows, device)
        self.config: Config = config
        self._fewest = sum(dopant.count_min for dopant in config.specimen.dopants)
        self.capabilities = sheet_capabilities(config, self._fewest)
        probe = config.probe
        if probe.astigmatism_ang > 0.0:
            raise ConfigError(
                f"instrument.probe.astigmatism_ang must be 0: the flux on atoms is that of a round probe; "
                f"given {probe.astigmatism_ang:g}."
            )
        if config.drift.scale_error > 0.0 or config.drift.shear_error > 0.0:
            raise ConfigError(
                "instrument.drift.scale_error and shear_error must be 0: places are told as by a calibrated scan; "
                f"given {config.drift.scale_error:g} and {config.drift.shear_error:g}."
            )
        self._slots = sum(dopant.count_max for dopant in config.specimen.dopants) + config.free_slots
        if self._slots == 0:
            raise ConfigError("instrument.specimen.dopants is empty, and no free_slots are given: nothing could move.")
        self._beams = Beams(config, self.device)
        self.kinetics = self._beams.kinetics(config, self.device)
        weight_ang2 = self._beams.weight_ang2[0]
        self._pictures = Pictures(config.specimen, self._beams.optics, weight_ang2) if config.pictures else None
        self._haze = Haze(config.kinetics.contamination, self._pictures)
        self._compiled = CompiledSheet(config, self._beams, self.kinetics, self._slots) if config.compiled else None
        self._handlers: dict[type[Instruction], Any] = {
            Scan: self._scan,
            Park: self._park,
            Dwell: self._dwell,
            Set: self._set,
            Blank: self._blank,
            Wait: self._wait,
            Read: self._read,
        }

    def truth(self) -> Mapping[str, Tensor]:
        """Where the dopants really are, where the frame lies, and what the beam has done. Live buffers."""
        state, sheet = self._now, self._now.sheet
        return {
            "dopant_xy_ang": sheet.near.dopant_ang,
            "dopant_there": sheet.there,
            "cell_ang": sheet.cell_ang,
            "frame_centre_ang": state.drift.creep_ang - state.drift.position_ang,
            "fov_ang": state.fov_ang,
            "jumps": sheet.jumps,
            "lost_atoms": sheet.lost,
            "vacancies": sheet.open.sum(1),
        }

    def _fresh(self, streams: Streams, rows: Tensor) -> SheetRows:
        config, n = self.config, len(rows)
        specimen, neighbours = config.specimen.build_bonded(streams, rows, self.device)
        sheet = self.kinetics.sheet(specimen, neighbours, self._slots, streams, rows)
        self._check_room(sheet.there)
        defocus = self._draw_defocus(streams, rows)
        zero = torch.zeros(n, device=self.device)
        density, signal = self._beams.densities(zero.long(), defocus)
        none = torch.zeros(n, 0, device=self.device)
        series, transfer = self._pictures.start(specimen, defocus) if self._pictures else (none, none.clone())
        return SheetRows(
            sheet=sheet,
            drift=start_drift(config.drift, streams, rows),
            defocus_ang=defocus,
            density=density,
            signal=signal,
            weight_ang2=self._beams.weight_ang2[0].repeat(n, 1),
            energy_kev=zero + config.probe.energy_kev,
            fov_ang=zero + config.fov_ang,
            beam_shift_ang=torch.zeros(n, 2, device=self.device),
            place=torch.full((n, 2), 0.5, device=self.device),
            blanked=torch.ones(n, dtype=torch.bool, device=self.device),
            clock_s=zero,
            electrons=zero.double(),
            seen_ang=torch.zeros(n, 2, device=self.device),
            series=series,
            transfer=transfer,
        )

    def _begin(self, streams: Streams, rows: Tensor) -> None:
        config, state, compiled = self.config, self._now, self._compiled
        if compiled is None or not compiled.begins:
            super()._begin(streams, rows)
            return
        sites = compiled.lay(state, streams, rows)
        law = config.kinetics.jumps.parameters(streams, rows)
        if law.shape[1]:
            write(state.sheet.law, rows, law)
        defocus, drift = self._draw_defocus(streams, rows), start_drift(config.drift, streams, rows)
        compiled.begin(state, streams, rows, sites, (defocus, drift.velocity_ang_per_s))
        state.energy_kev.index_fill_(0, rows, config.probe.energy_kev)
        state.beam_shift_ang.index_fill_(0, rows, 0.0)
        state.blanked.index_fill_(0, rows, True)
        self._check_room(sites[1])

    def _check_room(self, there: Tensor) -> None:
        if (fewest := int(there.sum(1).amin())) < self._fewest:
            raise ConfigError(
                f"instrument.specimen: only {fewest} of {self._fewest} dopants found room; "
                "make separation_ang smaller, or window_ang larger."
            )

    def _scan(self, scan: Scan) -> Reading:
        config, state, rows = self.config, self._now, scan.rows
        check_region(scan.region)
        if self._compiled is not None:
            return self._scan_compiled(self._compiled, scan)
        seconds = frame_time_s(scan.shape, scan.dwell_s, config.detector.flyback_s) + config.overheads.scan_s
        knots, drift = self._advance(rows, (seconds / _FRAME_KNOTS).unsqueeze(1).expand(-1, _FRAME_KNOTS))
        size = scan.region[:, 2:] * scan.fov_ang.unsqueeze(1)
        middle = (scan.region[:, :2] + 0.5 * scan.region[:, 2:] - 0.5) * scan.fov_ang.unsqueeze(1)
        beam_s = scan.dwell_s * (scan.shape[0] * scan.shape[1])
        current = torch.full_like(beam_s, config.current_pa)
        electrons = current * beam_s * ELECTRONS_PER_PC
        dose = electrons / size.prod(1)
        centre = middle - knots.mean(1)
        frame = Frame(centre, size, dose, beam_s, seconds, current)
        self._disturb(rows, frame)
        self._haze.after_frame(state, rows, frame)
        sheet = state.sheet
        cell, seen = take(sheet.cell_ang, rows), take(state.seen_ang, rows)
        view = View(cell, scan.fov_ang, scan.region, dose, drift.offset_ang, seen)
        near = take_rows(sheet.near, rows)
        data = config.finder.find(near, self._haze.in_sight(state, rows), view, self._streams, rows)
        if "haadf" in scan.channels:
            data["images"] = self._picture(scan, knots)
        write(state.fov_ang, rows, scan.fov_ang)
        write(state.seen_ang, rows, drift.offset_ang)
        self._spend(rows, seconds, electrons, drift)
        calibration = {
            "fov_ang": scan.fov_ang,
            "region": scan.region,
            "pixel_dwell_s": scan.dwell_s,
            "electrons_per_pixel": electrons / (scan.shape[0] * scan.shape[1]),
            **self._detector_calibration(electrons),
        }
        return Reading("Scan", rows, seconds, electrons, dose, data, calibration)

    def _scan_compiled(self, compiled: CompiledSheet, scan: Scan) -> Reading:
        before = self._atoms(scan.rows)
        reading, knots = compiled.scan(self._now, self._streams, scan)
        self._mend(scan.rows, before)
        if "haadf" not in scan.channels:
            return reading
        return changed(reading, data={**reading.data, "images": self._picture(scan, knots)})

    def _picture(self, scan: Scan, knots: Tensor) -> Tensor:
        """Counts (n, 1, H, W) of the sheet as the frame leaves it."""
        config, state, rows, height = self.config, self._now, scan.rows, scan.shape[0]
        places = raster(scan, take(state.drift.distortion, rows), -displacement_of_rows(knots, height))
        if config.detector.line_jitter_ang > 0.0:
            jitter = line_jitter_ang(self._streams, rows, height, config.detector)
            places = changed(places, shift_ang=places.shift_ang + jitter)
        fraction = Pictures.frame(take(state.series, rows), take(state.sheet.cell_ang, rows), places)
        current = torch.full_like(scan.dwell_s, config.current_pa)
        mean = expected_electrons(fraction, current, scan.dwell_s, config.detector)
        return detect(mean, self._streams, rows, config.detector).unsqueeze(1)

    def _happen(self, rows: Tensor, event: Event) -> None:
        """Let events happen on `rows` (n,), and mend the pictures of the sheet."""
        state = self._now
        if self._pictures is None or not bool((event.kind >= 0).any()):
            self.kinetics.apply(state.sheet, rows, event)
            return
        sites = self._pictures.touched(state.sheet, rows, event)
        before = self._pictures.weights(state.sheet, rows, sites)
        self.kinetics.apply(state.sheet, rows, event)
        change = self._pictures.weights(state.sheet, rows, sites) - before
        mended = self._pictures.change(state.sheet, rows, sites, change, take(state.transfer, rows))
        write_sum(state.series, rows, mended)

    def _atoms(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """Elements at the sites of `rows` (n,) and which are there, for `_mend`; None where there are no pictures."""
        sheet = self._now.sheet
        return (sheet.atomic_number[rows], sheet.present[rows]) if self._pictures else None

    def _mend(self, rows: Tensor, before: tuple[Tensor, Tensor] | None) -> None:
        """Mend the pictures of `rows` (n,) where atoms have changed since."""
        state = self._now
        if self._pictures is not None and before is not None:
            self._pictures.mend(state.series, state.sheet, rows, before, state.transfer)

    def _disturb(self, rows: Tensor, frame: Frame) -> None:
        """What a frame does to the sheet, event after event."""
        after = torch.full((len(rows),), -1.0, device=self.device)
        for _ in range(_FRAME_PASSES):
            event, after = self.kinetics.next_in_frame(self._now.sheet, rows, frame, after, self._streams)
            self._happen(rows, event)
            more = rows_where(event.kind != NOTHING)
            if len(more) == 0:
                return
            rows, after, frame = take(rows, more), take(after, more), take_rows(frame, more)

    def _dwell(self, dwell: Dwell) -> Reading:
        config, state, rows = self.config, self._now, dwell.rows
        if self._compiled is not None:
            atoms = self._atoms(rows)
            reading = self._compiled.dwell(state, self._streams, dwell, _SAMPLES)
            self._mend(rows, atoms)
            return reading
        samples = samples_of(dwell, _SAMPLES)
        sample_s = dwell.time_s / samples
        knot_s = dwell.time_s / _DWELL_KNOTS
        knots, drift = self._advance(rows, knot_s.unsqueeze(1).expand(-1, _DWELL_KNOTS))
        knots = straight(knots, samples)
        parked, before = take(state.place, rows), take_rows(state.drift, rows)
        wanted = (parked - 0.5) * take(state.fov_ang, rows).unsqueeze(1)
        path = wanted.unsqueeze(1) - 0.5 * (knots[:, 1:] + knots[:, :-1])  # (n, J, 2)
        current = torch.full_like(sample_s, config.current_pa)
        beam = Beam(path, sample_s.unsqueeze(1).expand(-1, samples), take(state.density, rows), current)
        counts, used = self._live(dwell, beam, samples)
        if dwell.stop is not None:
            drift = drift_at(used, knots, before, drift)
            counts = torch.where(torch.arange(samples, device=self.device) < used.unsqueeze(1), counts, torch.nan)
        self._haze.after_dwell(state, rows, beam, used)
        seconds = sample_s * used
        electrons = current * seconds * ELECTRONS_PER_PC
        self._spend(rows, seconds, electrons, drift)
        calibration = {
            "sample_s": sample_s,
            "electrons_per_sample": current * sample_s * ELECTRONS_PER_PC,
            **self._detector_calibration(electrons),
        }
        areal = electrons * take(state.density[:, 0], rows)  # where the probe is brightest
        data = {"place": parked.clone(), **({"trace": counts} if dwell.trace else {})}
        return Reading("Dwell", rows, seconds, electrons, areal, data, calibration)

    def _live(self, dwell: Dwell, beam: Beam, samples: int) -> tuple[Tensor, Tensor]:
        """Counts (n, J) while the sheet changes under the beam, and after how many samples (n,) the rule stops it.

        Pass by pass: draw the trace of the sheet as it is, find the next event; if it comes before the rule stops the
        dwell, let it happen and draw the rest of the trace anew.
        """
        rows = dwell.rows
        here = every_row(len(rows), self.device)
        begin = beginning(len(rows), self.device)
        counts = self._trace(rows, beam)
        used = torch.full_like(rows, samples)
        sheet, streams = self._now.sheet, self._streams
        while len(here):
            event = self.kinetics.next_event(sheet, take(rows, here), take_rows(beam, here), begin, streams)
            if dwell.stop is not None:
                write(used, here, samples_until(take(counts, here), dwell.stop))
            more = rows_where((event.kind != NOTHING) & (event.segment < take(used, here)))
            here, begin = take(here, more), take_rows(event, more)
            if len(here) == 0:
                break
            struck = take(rows, here)
            self._happen(struck, begin)
            later = torch.arange(samples, device=self.device) > begin.segment.unsqueeze(1)
            again = self._trace(struck, take_rows(beam, here))
            write(counts, here, torch.where(later, again, take(counts, here)))
        return counts, used

    def _trace(self, rows: Tensor, beam: Beam) -> Tensor:
        """ADF counts (n, J): an even sheet of carbon, and on it the dopants as the probe sees them."""
        config, state, sheet = self.config, self._now, self._now.sheet
        place, number = take(sheet.near.dopant_ang, rows), take(sheet.near.atomic_number, rows)  # (n, D, 2), (n, D)
        cell = take(sheet.cell_ang, rows).view(-1, 1, 1, 2)
        away = nearest_image(beam.path_ang.unsqueeze(2) - place.unsqueeze(1), cell)
        distance = torch.linalg.vector_norm(away, dim=-1)  # (n, J, D)
        weight = take(state.weight_ang2, rows)
        carbon = weight[:, CARBON].unsqueeze(1)
        excess = (weight.gather(1, number) - carbon) * take(sheet.there, rows)
        extra = (density_at(take(state.signal, rows), distance) * excess.unsqueeze(1)).sum(2)
        fraction = ATOMS_PER_ANG2 * carbon + extra + self._haze.in_trace(state, rows, beam)
        mean = expected_electrons(fraction, beam.current_pa, beam.part_s[:, 0], config.detector)
        return detect(mean, self._streams, rows, config.detector)

    def _set(self, control: Set) -> Reading:
        data = {control.name: control.value}
        if control.name == "energy_kev":
            return self._pass_time(control, self._set_energy(control.rows, control.value), data)
        self._shift_beam(control.rows, control.value, int(control.name == "beam_shift_y_ang"))
        return self._pass_time(control, torch.full_like(control.value, self.config.overheads.set_s), data)

    def _shift_beam(self, rows: Tensor, value_ang: Tensor, axis: int) -> None:
        """The same as a move of the sample, but one that the software knows of."""
        state = self._now
        step = value_ang - state.beam_shift_ang[rows, axis]
        for buffer, sign in ((state.beam_shift_ang, 1.0), (state.drift.position_ang, -1.0), (state.seen_ang, -1.0)):
            buffer[rows, axis] += sign * step

    def _set_energy(self, rows: Tensor, energy_kev: Tensor) -> Tensor:
        """Probe, signal and rates of another energy, and the time (n,) that it takes: none where it is the same."""
        state, number = self._now, self._beams.number(energy_kev)
        change = number != state.sheet.energy[rows]
        state.density[rows], state.signal[rows] = self._beams.densities(number, state.defocus_ang[rows])
        state.weight_ang2[rows] = self._beams.weight_ang2[number]
        state.energy_kev[rows] = energy_kev
        self.kinetics.set_energy(state.sheet, rows, number)
        return change * self.config.overheads.energy_s

    def _wait(self, wait: Wait) -> Reading:
        """Let the sample drift, and the sheet heal."""
        seconds = wait.time_s
        zero, one = torch.zeros_like(seconds), torch.ones(len(seconds), 2, device=self.device)
        self._disturb(wait.rows, Frame(0.0 * one, one, zero, zero, seconds, zero))
        return self._pass_time(wait, seconds)

    def _read(self, read: Read) -> Reading:
        name, _, axis = read.name.partition("_shift_")
        value = self._now.beam_shift_ang[:, "xy".index(axis[0])] if axis else getattr(self._now, name)
        value = value[read.rows].float()
        return no_dose(read, torch.zeros(len(read.rows), device=self.device), {"value": value})

    def _drift(self, rows: Tensor, seconds: Tensor) -> None:
        if self._compiled is None:
            super()._drift(rows, seconds)
        else:
            self._compiled.pass_time(self._now, self._streams, rows, seconds)

    def _spend(self, rows: Tensor, seconds: Tensor, electrons: Tensor, drift: DriftState) -> None:
        super()._spend(rows, seconds, electrons, drift)
        self._haze.after_time(self._now, rows, seconds)
