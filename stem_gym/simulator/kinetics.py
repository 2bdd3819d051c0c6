"""What the beam does to a doped graphene sheet: exact stochastic simulation on the lattice, row by row, batched.

Electrons arrive nanoseconds apart, a struck atom settles in picoseconds, and events are seconds apart: impacts are
independent, and the waiting time to the next event follows from its rate (Gillespie, J. Phys. Chem. 81, 2340, 1977).
Rates are those of the moment: the beam moves over the drifting sheet, and after each event they are made anew.

Events, with the struck atom a carbon: beside a dopant it changes places with it, turns its bond, or leaves (the dopant
is then fourfold, and stays where it is); elsewhere it leaves, more easily beside a vacancy. Without the beam, vacancies
heal with a carbon adatom or catch a silicon one. Knock-out of carbon away from dopants is drawn from an upper bound of
its rate and accepted by the true one, which costs nothing where it is rare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from stem_gym.core.batch import changed, every_row, put, rows_where, take, take_rows, write_rows
from stem_gym.core.elements import atomic_number_of
from stem_gym.core.errors import ConfigError
from stem_gym.core.periodic import nearest_image
from stem_gym.core.streams import Streams
from stem_gym.core.units import ANG2_PER_BARN, ELECTRONS_PER_PC
from stem_gym.simulator.event_rates import ASSUMED_AS_SILICON, PUBLISHED, CrossSections, KineticsModel, from_thresholds
from stem_gym.simulator.flux import density_at
from stem_gym.simulator.jumps import Aim, FrameAim
from stem_gym.simulator.sheet import (
    BESIDE,
    CARBON,
    EXCHANGE,
    KNOCK_OUT,
    NOTHING,
    REFUSED,
    Beside,
    Event,
    Sheet,
    apply,
    look,
)
from stem_gym.simulator.specimens import Specimen


@dataclass(frozen=True)
class Beam:
    """A dwell of n rows in S parts."""

    path_ang: Tensor  # (n, S, 2) on the specimen
    part_s: Tensor  # (n, S)
    density: Tensor  # (n, R) table of the probe
    current_pa: Tensor  # (n,)


@dataclass(frozen=True)
class Frame:
    """An evenly scanned frame of n rows."""

    centre_ang: Tensor  # (n, 2) on the specimen
    size_ang: Tensor  # (n, 2)
    dose_e_per_ang2: Tensor  # (n,)
    beam_s: Tensor  # (n,) with the beam on
    seconds: Tensor  # (n,) altogether
    current_pa: Tensor  # (n,)


class Kinetics:
    """The events of one model at one beam energy, or at each of several; a sheet begins with the first.

    `density_bound_per_ang2` is the most that the probe's densities at all atoms add up to. Raises ConfigError for
    dopants without rates, and for an energy that the rates of a dopant or the law of the jumps do not cover. `sections`
    are those of the thresholds where none are given, else one for each energy.
    """

    def __init__(
        self,
        model: KineticsModel,
        energy_kev: float | Sequence[float],
        elements: tuple[str, ...],
        density_bound_per_ang2: float,
        device: torch.device,
        sections: Sequence[CrossSections] | None = None,
    ) -> None:
        self.model, self.device = model, device
        self.density_bound_per_ang2 = density_bound_per_ang2
        energies = (float(energy_kev),) if isinstance(energy_kev, int | float) else tuple(energy_kev)
        model.jumps.check_energies(energies)
        each = tuple(sections or (from_thresholds(model, energy) for energy in energies))
        self.sections = each[0]
        for symbol in model.rates:
            atomic_number_of(symbol)
        kinds = (*elements, "Si")  # the last for what a vacancy catches
        self._number = torch.tensor([atomic_number_of(element) for element in kinds], device=device)
        barn = [[self._sections(kind, *at) for kind in kinds] for at in zip(energies, each, strict=True)]
        self._barn = torch.tensor(barn, device=device)  # (E, kinds, 2, 5)
        away = [(one.pristine_barn, one.edge_barn) for one in each]
        self.away_barn = torch.tensor(away, device=device)  # (E, 2) of carbon away from dopants

    def _sections(self, element: str, energy_kev: float, sections: CrossSections) -> list[list[float]]:
        """Cross sections (2, 5) of the events beside a dopant, for the far and the near side."""
        known = {**PUBLISHED, **self.model.rates}
        if element in known:
            given = known[element]
            if abs(given.energy_kev - energy_kev) > 0.05 * given.energy_kev:
                raise ConfigError(
                    f"The rates of {element} are for {given.energy_kev:g} keV; the beam has {energy_kev:g} keV. "
                    f"Use {0.95 * given.energy_kev:g} to {1.05 * given.energy_kev:g} keV, or give rates at its energy."
                )
            ejection_barn = given.ejection_barn if self.model.damage else 0.0
            barn = [given.exchange_barn, ejection_barn, given.rotation_barn, given.reversal_barn]
            return [[*barn, given.replacement_barn]] * 2
        if element != "Si" and element not in ASSUMED_AS_SILICON:
            raise ConfigError(
                f"No rates are known for {element} in graphene; known: Si, {', '.join(sorted(known))}, "
                f"and {', '.join(sorted(ASSUMED_AS_SILICON))} by assumption. "
                f"Give kinetics.rates.{element}."
            )
        sides = (sections.exchange_far_barn, sections.exchange_barn)
        return [[exchange, sections.ejection_barn, 0.0, 0.0, 0.0] for exchange in sides]

    def sheet(self, specimen: Specimen, neighbours: Tensor, slots: int, streams: Streams, rows: Tensor) -> Sheet:
        """The sheets of fresh specimens on `rows` (n,), with room for `slots` dopants."""
        n = len(rows)
        foreign = specimen.present & (specimen.atomic_number != CARBON)
        there, site = torch.topk(foreign.float(), slots, dim=1)
        there = there > 0.5
        missing = ~specimen.present & (specimen.atomic_number > 0)
        empty = torch.zeros(n, self.model.vacancies_max, dtype=torch.int64, device=self.device)
        gone = empty.float()
        if bool(missing.any()):
            gone, empty = torch.topk(missing.float(), self.model.vacancies_max, dim=1)
            empty = empty * (gone > 0.5)  # the same for a row whatever the others lack
        number = specimen.atomic_number.gather(1, site)
        kind = (number.unsqueeze(-1) == self._number).float().argmax(-1)
        zero = torch.zeros(n, dtype=torch.int64, device=self.device)
        barn = self._barn[0, kind] * there[:, :, None, None]
        site_count = specimen.xy_ang.shape[1] if self.model.contamination else 0
        nothing = Beside(*(torch.zeros(0, device=self.device),) * 5)
        sheet = Sheet(
            cell_ang=specimen.cell_ang,
            xy_ang=specimen.xy_ang,
            neighbours=neighbours,
            atomic_number=specimen.atomic_number,
            present=specimen.present,
            dopant=site,
            there=there,
            raised=streams.uniform(rows, (slots,)) < 0.5,
            rotated=torch.zeros_like(site),
            vacancy=empty,
            open=gone > 0.5,
            law=self.model.jumps.parameters(streams, rows),
            barn=barn,
            energy=zero.clone(),
            cover=torch.zeros(n, site_count, device=self.device),
            jumps=zero,
            lost=zero.clone(),
            edged=missing.any(1),
            near=nothing,
        )
        return changed(sheet, near=look(sheet, every_row(n, self.device)))

    def next_event(self, sheet: Sheet, rows: Tensor, beam: Beam, begin: Event, streams: Streams) -> Event:
        """The first event of `rows` (n,) in a dwell after the moment of the event `begin`."""
        hazard = self._beside_in_dwell(sheet, rows, beam)  # (n, S, D, 3, 5) expected events in each part
        rates = torch.cat((self._knock_out_bound(sheet, rows, beam), self._thermal(sheet, rows)), dim=1)
        other = rates.unsqueeze(1) * beam.part_s.unsqueeze(-1)  # (n, S, 3)
        segment = torch.arange(hazard.shape[1], device=rows.device)
        left = (segment > begin.segment.unsqueeze(1)) + (segment == begin.segment.unsqueeze(1)) * (
            1.0 - begin.share.unsqueeze(1)
        )
        uniform = streams.uniform(rows, (3,))
        event = _first(torch.cat((hazard.flatten(2), other), dim=2) * left.unsqueeze(-1), begin, left, uniform)
        return self._settle(sheet, rows, event, uniform[:, 2], beam)

    def next_in_frame(
        self, sheet: Sheet, rows: Tensor, frame: Frame, after: Tensor, streams: Streams
    ) -> tuple[Event, Tensor]:
        """The first event of `rows` (n,) in a frame after the part `after` (n,) of it, and the part at which it comes.

        A neighbour gets its dose in one moment, when the scan passes it: whether something happens is drawn for each,
        and the first in time is what happens. The rest has a constant rate.
        """
        expected, when = self._beside_in_frame(sheet, rows, frame)  # (n, D, 3, 5), (n, D, 3)
        each = expected.flatten(1, 2)  # (n, 3 D, 5)
        count = each.shape[1]
        uniform = streams.uniform(rows, (count + 4,))
        hit = uniform[:, :count] < -torch.expm1(-each.sum(-1))
        when = when.flatten(1)
        when = when.masked_fill(~(hit & (when > after.unsqueeze(1))), math.inf)
        first, place = when.min(1)
        rest = self._rest_in_frame(sheet, rows, frame)  # (n, 3) knock-out, healing, capture
        wait = after.clamp(min=0.0) - torch.log(uniform[:, count]) / rest.sum(1).clamp(min=1e-30)
        rest_first = (wait < first) & (wait < 1.0)
        near = each[every_row(len(rows), rows.device), place]
        kind = _pick(near, uniform[:, count + 1]).masked_fill(first == math.inf, NOTHING)
        kind = torch.where(rest_first, KNOCK_OUT + _pick(rest, uniform[:, count + 2]), kind)
        zero = torch.zeros_like(kind)
        event = Event(kind, place // 3, place % 3, zero, zero, zero.float())
        return self._settle(sheet, rows, event, uniform[:, count + 3], frame), torch.minimum(first, wait)

    @property
    def known_elements(self) -> tuple[Tensor, Tensor]:
        """Atomic numbers (N,) whose events are known, and the cross sections (N, 2, 5) that a sheet begins with."""
        return self._number, self._barn[0]

    @property
    def silicon_barn(self) -> Tensor:
        """Cross sections (E, 2, 5) of silicon that a vacancy catches."""
        return self._barn[:, -1]

    def apply(self, sheet: Sheet, rows: Tensor, event: Event) -> None:
        """Change the buffers of `rows` (n,) as the events say."""
        apply(sheet, rows, event, self.silicon_barn)

    def set_energy(self, sheet: Sheet, rows: Tensor, energy: Tensor) -> None:
        """Give `rows` (n,) the rates of the energies with these numbers (n,); for good, or until the next change."""
        number = sheet.atomic_number[rows[:, None], sheet.dopant[rows]]
        kind = (number.unsqueeze(-1) == self._number).float().argmax(-1)
        sheet.energy[rows] = energy
        sheet.barn[rows] = self._barn[energy[:, None], kind] * sheet.there[rows][:, :, None, None]
        write_rows(sheet.near, rows, look(sheet, rows))

    def _beside_in_dwell(self, sheet: Sheet, rows: Tensor, beam: Beam) -> Tensor:
        near, cell = take_rows(sheet.near, rows), take(sheet.cell_ang, rows)
        away = nearest_image(beam.path_ang.unsqueeze(2) - near.dopant_ang.unsqueeze(1), cell.view(-1, 1, 1, 2))
        distance = vector_norm(away.unsqueeze(3) - near.bond_ang.unsqueeze(1), dim=-1)  # (n, S, D, 3)
        density = density_at(beam.density, distance)
        per_second = beam.current_pa * ELECTRONS_PER_PC
        aim = Aim(away, near.bond_ang, density, per_second, beam.current_pa)
        flux = ANG2_PER_BARN * density * per_second.view(-1, 1, 1, 1)
        barn = near.barn.unsqueeze(1).unsqueeze(3)  # (n, 1, D, 1, 5)
        jumps = self.model.jumps.rates(take(sheet.law, rows), aim, near.barn[..., EXCHANGE])
        events = torch.cat((jumps.unsqueeze(-1), flux.unsqueeze(-1) * barn[..., 1:]), dim=-1)
        return events * near.allowed.unsqueeze(1) * beam.part_s.view(*beam.part_s.shape, 1, 1, 1)

    def _beside_in_frame(self, sheet: Sheet, rows: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
        near, cell = take_rows(sheet.near, rows), take(sheet.cell_ang, rows).view(-1, 1, 1, 2)
        place = near.dopant_ang.unsqueeze(2) + near.bond_ang  # (n, D, 3, 2)
        part = nearest_image(place - frame.centre_ang.view(-1, 1, 1, 2), cell) / frame.size_ang.view(-1, 1, 1, 2) + 0.5
        inside = ((part >= 0.0) & (part < 1.0)).all(-1, keepdim=True)
        aim = FrameAim(near.barn[..., EXCHANGE], frame.beam_s, frame.size_ang.prod(1), frame.current_pa)
        jumps = self.model.jumps.frame_jumps(take(sheet.law, rows), frame.dose_e_per_ang2, aim)
        others = ANG2_PER_BARN * near.barn[..., 1:].unsqueeze(2) * frame.dose_e_per_ang2.view(-1, 1, 1, 1)
        events = torch.cat((jumps.view(*jumps.shape, 1, 1), others), dim=-1)
        return events * near.allowed * inside, part[..., 1]

    def _worst_barn(self, sheet: Sheet, rows: Tensor) -> Tensor:
        """(n,) the largest cross section of a carbon away from dopants; that of an edge only where there is one."""
        away = self.away_barn[take(sheet.energy, rows)]
        return torch.where(take(sheet.edged, rows), away.amax(1), away[:, 0])

    def _knock_out_bound(self, sheet: Sheet, rows: Tensor, beam: Beam) -> Tensor:
        flux = self.density_bound_per_ang2 * beam.current_pa * ELECTRONS_PER_PC
        return (ANG2_PER_BARN * self._worst_barn(sheet, rows) * flux).unsqueeze(1)

    def _rest_in_frame(self, sheet: Sheet, rows: Tensor, frame: Frame) -> Tensor:
        bound = ANG2_PER_BARN * sheet.present.shape[1] * self._worst_barn(sheet, rows) * frame.dose_e_per_ang2
        return torch.cat((bound.unsqueeze(1), self._thermal(sheet, rows) * frame.seconds.unsqueeze(1)), dim=1)

    def _thermal(self, sheet: Sheet, rows: Tensor) -> Tensor:
        """(n, 2) healing and capture per second; capture needs a free slot."""
        vacancies = take(sheet.open, rows).sum(1)
        room = (~take(sheet.there, rows)).any(1)
        return torch.stack((self.model.healing_per_s * vacancies, self.model.capture_per_s * vacancies * room), dim=1)

    def _settle(self, sheet: Sheet, rows: Tensor, event: Event, uniform: Tensor, where: Beam | Frame) -> Event:
        """The event with its site; a candidate for a knock-out becomes REFUSED where the true rate does not take it."""
        kind, site = event.kind, event.site
        away = rows_where(kind >= KNOCK_OUT)
        if len(away) == 0:
            return event
        row, chance = take(rows, away), take(uniform, away)
        filled, _ = _nth_true(take(sheet.open, row), chance)
        place = take(sheet.vacancy, row).gather(1, filled.unsqueeze(1)).squeeze(1)
        struck, accepted = self._struck(sheet, row, chance, take_rows(where, away), event, away)
        asked = take(kind, away)
        out = asked == KNOCK_OUT
        new_kind = torch.where(out & ~accepted, REFUSED, asked)
        return changed(
            event,
            kind=put(kind, away, new_kind),
            site=put(site, away, torch.where(out, struck, place)),
        )

    def _struck(
        self, sheet: Sheet, row: Tensor, chance: Tensor, where: Beam | Frame, event: Event, away: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which carbon (m,) a candidate knocks out, and whether it does: its true rate over the bound."""
        barn = self._barn_of_atoms(sheet, row)  # (m, K)
        cell = take(sheet.cell_ang, row).unsqueeze(1)
        if isinstance(where, Frame):
            part = nearest_image(take(sheet.xy_ang, row) - where.centre_ang.unsqueeze(1), cell)
            share = (part.abs() <= 0.5 * where.size_ang.unsqueeze(1)).all(-1) / barn.shape[1]
        else:
            segment = take(event.segment, away)
            beam = where.path_ang.gather(1, segment[:, None, None].expand(-1, 1, 2))
            distance = nearest_image(take(sheet.xy_ang, row) - beam, cell).norm(dim=-1)
            share = density_at(where.density, distance) / self.density_bound_per_ang2
        reached = torch.cumsum(share * barn, dim=1) / self._worst_barn(sheet, row).unsqueeze(1).clamp(min=1e-30)
        index = (reached <= chance.unsqueeze(1)).sum(1)
        return index.clamp(max=barn.shape[1] - 1), index < barn.shape[1]

    def _barn_of_atoms(self, sheet: Sheet, row: Tensor) -> Tensor:
        """Knock-on cross sections (m, K) of carbon that has no dopant beside it; zero for all else."""
        number, present, neighbours = (
            take(sheet.atomic_number, row),
            take(sheet.present, row),
            take(sheet.neighbours, row),
        )
        batch, sites = number.shape
        around = neighbours.flatten(1)
        there = present.gather(1, around).reshape(batch, sites, 3)
        foreign = (number.gather(1, around).reshape(batch, sites, 3) != CARBON) & there
        whole = there.all(-1) & (neighbours != torch.arange(sites, device=row.device)[:, None]).all(-1)
        carbon = present & (number == CARBON) & ~foreign.any(-1)
        pristine, edge = self.away_barn[sheet.energy[row]].unsqueeze(2).unbind(1)
        return torch.where(whole, pristine, edge) * carbon


def _first(parts: Tensor, begin: Event, left: Tensor, uniform: Tensor) -> Event:
    """When and what comes first, from expected numbers (n, S, E) in what is `left` (n, S) of each part."""
    reached = torch.cumsum(parts.sum(-1), dim=1)
    threshold = -torch.log(uniform[:, 0])
    comes = reached[:, -1] > threshold
    segment = (reached <= threshold.unsqueeze(1)).sum(1).clamp(max=parts.shape[1] - 1)
    here = parts[every_row(len(segment), segment.device), segment]  # (n, E)
    done = reached.gather(1, segment.unsqueeze(1)).squeeze(1)
    within = 1.0 - (done - threshold) / here.sum(1).clamp(min=1e-30)
    start = begin.share.masked_fill(segment != begin.segment, 0.0)
    share = (start + left.gather(1, segment.unsqueeze(1)).squeeze(1) * within).clamp(0.0, 1.0)
    index = _pick(here, uniform[:, 1])
    beside_count = here.shape[1] - 3
    kind = torch.where(index < beside_count, index % BESIDE, index - beside_count + KNOCK_OUT)
    place = (index // BESIDE).clamp(max=beside_count // BESIDE - 1)
    zero = torch.zeros_like(segment)
    return Event(kind.masked_fill(~comes, NOTHING), place // 3, place % 3, zero, segment, share)


def _pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Indices (n,) drawn in proportion to weights (n, E) by uniforms (n,)."""
    reached = torch.cumsum(weights, dim=1)
    return (reached <= uniform.unsqueeze(1) * reached[:, -1:]).sum(1).clamp(max=weights.shape[1] - 1)


def _nth_true(mask: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A random true place (m,) of each row of mask (m, V), and whether there is one."""
    return _pick(mask.float(), uniform), mask.any(1)
