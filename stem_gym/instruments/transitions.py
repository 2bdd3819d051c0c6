"""From recordings to transitions: what an operator's log tells about jumps, by perceived atoms alone.

A look is a scan whose channel is "atoms". Between two looks of a row every dwell and scan is an exposure; the sample
moves evenly by the shift that the second look reports. An atom of the first look that stands on a lattice site near its
old place in the second makes a transition. What could be read in two ways makes none: an atom that is not found again,
that another one is near to, or that stands on no site. Whether an atom is missed has nothing to do with whether it
jumped, so leaving these out does not shift the rates.

Where a trace rule stopped a dwell and the atom is found elsewhere, it jumped just before the stop. A rule that did not
stop, and a dwell without one, leave the moment open: the likelihood then sums over it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stem_gym.core.errors import RecordError
from stem_gym.core.instructions import ATOMS, Dwell, MoveStage, Reading, Scan, Set
from stem_gym.core.units import ELECTRONS_PER_PC
from stem_gym.instruments.recorder import Record, Recording, read_recording
from stem_gym.simulator.jump_chain import BEYOND, STAYED, Transitions, join, places_around
from stem_gym.simulator.jumps import BOND_ANG

_MATCH_ANG = 0.5  # from a site, at most
_ALONE_ANG = 4.0 * BOND_ANG  # to the next atom, at least
_PARTS = 8  # of a dwell without a trace


@dataclass(frozen=True)
class _Look:
    """What one row's frame showed."""

    atom_ang: Tensor  # (D, 2) from the middle of the frame; those found
    bond_ang: Tensor  # (D, 3, 2)
    shift_ang: Tensor  # (2,) since the look before


@dataclass
class _Row:
    """One row since its last look."""

    look: _Look | None = None
    fov_ang: float = 0.0
    elapsed_s: float = 0.0
    places_ang: list[Tensor] = field(default_factory=list)  # (2,) of each part, in the frame
    middles_s: list[float] = field(default_factory=list)  # after the last look
    parts_s: list[float] = field(default_factory=list)
    window: tuple[int, int] = (-1, -1)  # the parts that hold the first jump, if there was one
    frame_s: float = 0.0
    frame_s_per_ang2: float = 0.0
    charge_pc: float = 0.0
    found: list[Transitions] = field(default_factory=list)

    def forget(self) -> None:
        """Nothing is known any more, until the next look."""
        self.look = None

    def begin(self, look: _Look, fov_ang: float) -> None:
        """A new look: what was before it is done with."""
        self.look, self.fov_ang, self.elapsed_s = look, fov_ang, 0.0
        self.places_ang, self.middles_s, self.parts_s, self.window = [], [], [], (-1, -1)
        self.frame_s = self.frame_s_per_ang2 = self.charge_pc = 0.0


def transitions_of(recording: Recording) -> Transitions:
    """All transitions of one recorded episode, of all its rows. It may be cut short, but must hold frames with atoms.

    Raises RecordError for a recording without scans of "atoms", without dwells, or without a single transition, and for
    one in which the beam energy changes: its jumps have more than one rate map.
    """
    _check_one_energy(recording)
    rows: dict[int, _Row] = {}
    for record in recording.records:
        _take_in(rows, record)
    found = [one for row in rows.values() for one in row.found]
    if found:
        return join(found)
    readings = recording.readings
    looks = sum(ATOMS in reading.data for reading in readings)
    dwells = sum(reading.verb == "Dwell" for reading in readings)
    raise RecordError(
        f"The recording shows no dopant before and after an exposure: {looks} scans of 'atoms', {dwells} dwells. Give "
        "episodes of an instrument that answers Scan with the channel 'atoms', with Park and Dwell between scans."
    )


def _check_one_energy(recording: Recording) -> None:
    asked = [one.instruction for one in recording.records if isinstance(one.instruction, Set)]
    energies = {value for one in asked if one.name == "energy_kev" for value in one.value.tolist()}
    if len(energies) > 1:
        raise RecordError(
            f"The recording sets the beam energies {', '.join(f'{value:g}' for value in sorted(energies))} keV; a rate "
            "map holds for one. Give recordings in which it stays as it is."
        )


def read_transitions(path: str | os.PathLike[str]) -> Transitions:
    """The transitions of a file. Raises RecordError, which names it."""
    try:
        return transitions_of(read_recording(path))
    except RecordError as error:
        raise error if str(path) in str(error) else RecordError(f"{path}: {error}") from error


def _take_in(rows: dict[int, _Row], record: Record) -> None:
    if record.kind == "reset":
        for number in record.details.get("rows", ()):
            rows.setdefault(int(number), _Row()).forget()
    if record.kind in ("fault", "abort", "restore"):
        for row in rows.values():
            row.forget()
    reading, asked = record.reading, record.instruction
    if record.kind != "instruction" or reading is None or asked is None:
        return
    for index, number in enumerate(reading.rows.tolist()):
        row = rows.setdefault(int(number), _Row())
        if isinstance(asked, MoveStage | Set):
            row.forget()
        elif isinstance(asked, Scan):
            _take_scan(row, asked, reading, index)
        else:
            if isinstance(asked, Dwell) and row.look is not None:
                _take_dwell(row, asked, reading, index)
            row.elapsed_s += float(reading.seconds[index])


def _take_dwell(row: _Row, asked: Dwell, reading: Reading, index: int) -> None:
    """The parts of a dwell: the samples of its trace that were used."""
    seconds, samples = float(reading.seconds[index]), _PARTS
    if "trace" in reading.data:
        samples = int(reading.data["trace"][index].isfinite().sum())
    if seconds <= 0.0 or samples == 0:
        return
    sample_s, before = seconds / samples, len(row.parts_s)
    place = (reading.data["place"][index] - 0.5) * row.fov_ang
    row.places_ang += [place] * samples
    row.middles_s += [row.elapsed_s + (part + 0.5) * sample_s for part in range(samples)]
    row.parts_s += [sample_s] * samples
    row.charge_pc += float(reading.electrons[index]) / ELECTRONS_PER_PC
    stopped = asked.stop is not None and asked.trace > 0 and samples < asked.trace
    if stopped and asked.stop is not None and row.window == (-1, -1):
        late = before + samples - asked.stop.window_samples - 1
        row.window = max(before, late), before + samples


def _take_scan(row: _Row, asked: Scan, reading: Reading, index: int) -> None:
    beam_s = float(asked.dwell_s[index]) * asked.shape[0] * asked.shape[1]
    fov_ang = float(asked.fov_ang[index])
    area = fov_ang**2 * float(asked.region[index, 2] * asked.region[index, 3])
    row.frame_s += beam_s
    row.frame_s_per_ang2 += beam_s / area
    row.charge_pc += float(reading.electrons[index]) / ELECTRONS_PER_PC
    row.elapsed_s += float(reading.seconds[index])
    if ATOMS not in reading.data:
        return
    place = (reading.data[ATOMS][index] - 0.5) * fov_ang
    there = place.isfinite().all(-1)
    look = _Look(place[there], reading.data["bonds_ang"][index][there], reading.data["shift_ang"][index])
    if row.look is not None and row.elapsed_s > 0.0:
        row.found += _between(row, row.look, look)
    row.begin(look, fov_ang)


def _between(row: _Row, before: _Look, after: _Look) -> list[Transitions]:
    """The transitions of the atoms that are found in both looks."""
    found = []
    ends = after.atom_ang - after.shift_ang
    for atom, bond in zip(before.atom_ang, before.bond_ang, strict=True):
        end = _end_of(atom, bond, before.atom_ang, ends)
        if end is not None:
            found.append(_transition(row, atom, bond, end, after.shift_ang))
    return found


def _end_of(atom: Tensor, bond: Tensor, before: Tensor, after: Tensor) -> int | None:
    """On which site of its patch the atom is found again; None where that can be read in two ways, or in none."""
    if int(((before - atom).norm(dim=-1) < _ALONE_ANG).sum()) > 1 or not bool(bond.isfinite().all()):
        return None
    near = (after - atom)[(after - atom).norm(dim=-1) < _ALONE_ANG]
    if len(near) != 1:
        return None
    sites = _sites(bond)
    distance, site = (sites - near[0]).norm(dim=-1).min(0)
    return min(int(site) + STAYED, BEYOND) if float(distance) < _MATCH_ANG else None


def _sites(bond: Tensor) -> Tensor:
    """The ten sites (19, 2) of the patch, and after them the nine that are one jump beyond."""
    inner = places_around(bond.unsqueeze(0))[0]
    beyond = (inner[4:].unsqueeze(1) + bond).flatten(0, 1)  # each second neighbour's own three
    away = (beyond.unsqueeze(1) - inner[1:4]).norm(dim=-1).amin(1)
    return torch.cat((inner, beyond[away > 0.5 * BOND_ANG]))


def _transition(row: _Row, atom: Tensor, bond: Tensor, end: int, shift: Tensor) -> Transitions:
    """One transition of the exposures since the last look."""
    seconds = sum(row.parts_s) + row.frame_s
    middles = torch.tensor(row.middles_s or [0.0]).unsqueeze(1) / row.elapsed_s
    places = torch.stack(row.places_ang) if row.places_ang else atom.unsqueeze(0)
    moved = end != STAYED
    return Transitions(
        (places - atom - shift * middles).unsqueeze(0),
        torch.tensor([row.parts_s or [0.0]]),
        bond.unsqueeze(0),
        torch.tensor([end]),
        torch.tensor([row.window if moved else (-1, -1)]),
        torch.tensor([row.frame_s]),
        torch.tensor([row.frame_s / row.frame_s_per_ang2]),
        torch.tensor([row.charge_pc / seconds]),
    )
