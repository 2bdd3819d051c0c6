"""A sheet in machine code: the buffers of a column, handed to `simulator.compiled_sheet`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stem_gym.core.compiled import require_numba
from stem_gym.core.elements import atomic_number_of
from stem_gym.core.errors import ConfigError
from stem_gym.core.instructions import ATOMS, Dwell, Reading, Scan
from stem_gym.core.streams import Streams
from stem_gym.instruments.sheet_beams import Beams
from stem_gym.instruments.sheet_haze import ATOMS_PER_ANG2
from stem_gym.instruments.sheet_rows import SheetRows
from stem_gym.simulator import compiled_sheet as machine
from stem_gym.simulator.exposure import samples_of
from stem_gym.simulator.jumps import CrossSectionJumps, JumpMap
from stem_gym.simulator.kinetics import Kinetics
from stem_gym.simulator.microscope import SheetColumn


class CompiledSheet:
    """Begins the rows of a column, and executes Dwell and Scan on them, in place.

    `begins` tells whether it can make the sheets: those with edges, vacancies, blobs or pictures are the reference's.
    Raises ConfigError for what only torch code can do.
    """

    def __init__(self, config: SheetColumn, beams: Beams, kinetics: Kinetics, slots: int) -> None:
        require_numba("instrument.compiled")
        asked_too = {
            f"the device {kinetics.device}": kinetics.device.type != "cpu",
            "instrument.kinetics.contamination": config.kinetics.contamination is not None,
        }
        if beyond := [name for name, asked in asked_too.items() if asked]:
            raise ConfigError(
                f"instrument.compiled is for clean sheets on a CPU; leave it out, or change {', '.join(beyond)}."
            )
        self._config, self._physics = config, _physics(config, beams, kinetics)
        recipe = config.specimen
        whole = recipe.edge_probability == 0.0 and recipe.vacancies_max == recipe.contamination.blobs_max == 0
        self.begins = whole and not config.pictures
        self._slots, self._room = slots, machine.room(slots, samples=8)
        self._fresh = _fresh(config, kinetics)
        self._state: SheetRows | None = None
        self._address = torch.zeros(0)
        self._rows: Any = None
        self._calibration: dict[str, Tensor] | None = None

    def lay(self, state: SheetRows, streams: Streams, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Lay fresh sheets, and draw the sides that dopants are on; sites (n, D) of these, and which there are."""
        n, sites = rows.shape[0], self._fresh.places_ang.shape[1]
        foreign = np.empty((n, sites), np.float32)
        space = np.empty(sites + 8), np.empty(sites, np.bool_), np.empty(sites, np.bool_)
        machine.lay(self._buffers(state, streams), _plain(rows), self._fresh, foreign, space)
        there, site = torch.topk(torch.from_numpy(foreign), self._slots, dim=1)
        return site, there > 0.5

    def begin(
        self, state: SheetRows, streams: Streams, rows: Tensor, sites: tuple[Tensor, Tensor], drawn: Sequence[Tensor]
    ) -> None:
        """Everything else that the physics of fresh sheets begins with; drawn are defocus (n,) and velocity (n, 2)."""
        given = tuple(part.numpy() for part in sites), tuple(_plain(part) for part in drawn)
        machine.begin(self._physics, self._buffers(state, streams), _plain(rows), self._fresh, *given)

    def dwell(self, state: SheetRows, streams: Streams, dwell: Dwell, least: int) -> Reading:
        """The reading of a dwell; without a trace it has `least` samples."""
        rows, rule, samples = dwell.rows, dwell.stop, samples_of(dwell, least)
        n = rows.shape[0]
        counts, told = np.empty((n, samples), np.float32), np.empty((5, n), np.float32)
        limits, windows = (math.nan, math.nan), (1, 1)
        if rule is not None:
            rise, fall = (math.nan if part is None else part for part in (rule.rise, rule.fall))
            limits, windows = (rise, fall), (rule.baseline_samples, rule.window_samples)
        dwells = machine.Dwells(_plain(dwell.time_s), *limits, rule is not None, *windows, counts, told)
        machine.dwell(self._physics, self._buffers(state, streams), _plain(rows), dwells, self._room_for(samples))
        seconds, electrons, dose, sample_s, per_sample = torch.from_numpy(told).unbind()
        data = {"place": state.place.index_select(0, rows)}
        if dwell.trace:
            data["trace"] = torch.from_numpy(counts)
        calibration = {"sample_s": sample_s, "electrons_per_sample": per_sample, **self._detector(n)}
        return Reading("Dwell", rows, seconds, electrons, dose, data, calibration)

    def scan(self, state: SheetRows, streams: Streams, scan: Scan) -> tuple[Reading, Tensor]:
        """The reading of a frame that is looked at by the finder, and the displacements (n, 5, 2) in it."""
        config, rows = self._config, scan.rows
        n = rows.shape[0]
        places, bonds = np.empty((n, self._slots, 2), np.float32), np.empty((n, self._slots, 3, 2), np.float32)
        shift, knots = np.empty((n, 2), np.float32), np.empty((n, 5, 2), np.float32)
        told = np.empty((4, n), np.float32)
        fov_ang, region, dwell_s = _plain(scan.fov_ang), _plain(scan.region), _plain(scan.dwell_s)
        costs = config.detector.flyback_s, config.overheads.scan_s
        frames = machine.Frames(fov_ang, region, dwell_s, *scan.shape, *costs, places, bonds, shift, knots, told)
        machine.frame(self._physics, self._buffers(state, streams), _plain(rows), frames, self._room_for(1))
        seconds, electrons, dose, per_pixel = torch.from_numpy(told).unbind()
        found = {ATOMS: places, "bonds_ang": bonds, "shift_ang": shift}
        calibration = {
            "fov_ang": scan.fov_ang,
            "region": scan.region,
            "pixel_dwell_s": scan.dwell_s,
            "electrons_per_pixel": per_pixel,
            **self._detector(n),
        }
        data = {name: torch.from_numpy(part) for name, part in found.items()}
        return Reading("Scan", rows, seconds, electrons, dose, data, calibration), torch.from_numpy(knots)

    def pass_time(self, state: SheetRows, streams: Streams, rows: Tensor, seconds: Tensor) -> None:
        """Let `rows` (n,) drift for some seconds (n,) without a beam."""
        buffers = self._buffers(state, streams)
        machine.pass_time(self._physics, buffers, _plain(rows), _plain(seconds), self._room_for(1))

    def _room_for(self, samples: int) -> machine.Room:
        if len(self._room.counts) < samples:
            self._room = machine.room(self._slots, samples)
        return self._room

    def _detector(self, n: int) -> dict[str, Tensor]:
        """The detector's part of a calibration; what was asked for last is kept."""
        if self._calibration is None or self._calibration["counts_offset"].shape[0] != n:
            gain, offset = self._config.detector.gain, self._config.detector.offset
            told = {"counts_per_electron": gain, "counts_offset": offset}
            self._calibration = {name: torch.full((n,), value) for name, value in told.items()}
        return self._calibration

    def _buffers(self, state: SheetRows, streams: Streams) -> Any:
        """The buffers as numpy sees them; looked up anew when a restore has brought others."""
        if state is not self._state or streams.address is not self._address:
            first = self._state is None
            self._state, self._address = state, streams.address
            sheet, near, drift = state.sheet, state.sheet.near, state.drift
            other = {
                "address": streams.address,
                "near_number": near.atomic_number,
                "near_barn": near.barn,
                "energy": sheet.energy,
            }
            owners = (sheet, near, drift, state)
            self._rows = machine.Rows(
                *(
                    (
                        other[name] if name in other else next(getattr(o, name) for o in owners if hasattr(o, name))
                    ).numpy()
                    for name in machine.Rows._fields
                )
            )
            if first and self.begins:  # else this would be compiled when an episode ends, in the middle of a run
                none = torch.zeros(0, dtype=torch.int64)
                sites = self.lay(state, streams, none)
                self.begin(state, streams, none, sites, (torch.zeros(0), torch.zeros(0, 2)))
        return self._rows


def _plain(values: Tensor) -> np.ndarray:
    """As numpy sees them, in the one form that the machine code is made for."""
    if values.dtype not in (torch.float32, torch.int64):
        values = values.float()
    plain: np.ndarray = (values if values.is_contiguous() else values.contiguous()).numpy()
    return plain


def _fresh(config: SheetColumn, kinetics: Kinetics) -> machine.Fresh:
    made, (numbers, barn) = config.specimen.templates(), kinetics.known_elements
    kinds = [
        (atomic_number_of(kind.element), kind.count_min, kind.count_max, 0.5 * kind.window_ang)
        for kind in config.specimen.dopants
    ]
    return machine.Fresh(
        cells_ang=made.cell_ang.astype(np.float32),
        places_ang=made.xy_ang.astype(np.float32),
        elements=made.atomic_number.astype(np.int64),
        neighbours=made.neighbours.astype(np.int64),
        kinds=np.array(kinds, np.float64).reshape(-1, 4),
        separation_ang=config.specimen.separation_ang,
        numbers=numbers.numpy(),
        barn=barn.contiguous().numpy(),
        fov_ang=config.fov_ang,
    )


def _physics(config: SheetColumn, beams: Beams, kinetics: Kinetics) -> machine.Physics:
    jumps, drift, detector, finder, model = (
        config.kinetics.jumps, config.drift, config.detector, config.finder, config.kinetics
    )  # fmt: skip
    if isinstance(jumps, CrossSectionJumps):
        law, length = machine.CROSS_SECTION, 1.0
    elif isinstance(jumps, JumpMap):
        law, length = machine.MAP, jumps.reference_pa
    else:
        law, length = machine.LORENTZIAN, jumps.bond_ang
    ladder = beams.flux[0].defocus_ang
    return machine.Physics(
        away_barn=kinetics.away_barn.double().numpy(),
        silicon_barn=kinetics.silicon_barn.numpy().copy(),
        ladder_ang=torch.stack((ladder[0], ladder[:2].diff().sum())).numpy(),
        flux=torch.cat([table.density for table in beams.flux]).numpy(),
        signal=torch.cat([table.density for table in beams.signal]).numpy(),
        weight_ang2=beams.weight_ang2.numpy(),
        law=law,
        law_length=length,
        bound_per_ang2=kinetics.density_bound_per_ang2,
        healing_per_s=model.healing_per_s,
        capture_per_s=model.capture_per_s,
        atoms_per_ang2=ATOMS_PER_ANG2,
        current_pa=config.current_pa,
        drift_sigma=drift.speed_ang_per_s / math.sqrt(2.0),
        drift_tau_s=drift.correlation_s,
        diffusion_ang2_per_s=drift.diffusion_ang2_per_s,
        settling_s=drift.settling_s,
        gain=detector.gain,
        offset=detector.offset,
        read_noise=detector.read_noise,
        saturation=detector.saturation,
        dark_per_s=detector.dark_electrons_per_s,
        whole_counts=detector.gain % 1.0 == 0.0 and detector.offset % 1.0 == 0.0 and detector.read_noise == 0.0,
        position_sd_ang=finder.position_sd_ang,
        shift_sd_ang=finder.shift_sd_ang,
        bond_sd_ang=finder.bond_sd_ang,
        reference_dose=finder.reference_dose,
        missed=finder.missed,
        spurious=finder.spurious,
    )
