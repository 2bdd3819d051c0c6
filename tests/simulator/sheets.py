"""Doped sheets, beams and frames for the tests of the kinetics, and the loops that run them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stem_gym.core.batch import clone_rows, take_rows
from stem_gym.core.periodic import nearest_image
from stem_gym.core.streams import Streams
from stem_gym.simulator.event_rates import KineticsModel
from stem_gym.simulator.flux import FluxTable, density_at, highest_lattice_sum
from stem_gym.simulator.jumps import BOND_ANG
from stem_gym.simulator.kinetics import Beam, Frame, Kinetics
from stem_gym.simulator.optics import Optics
from stem_gym.simulator.sheet import NOTHING, REFUSED, Event, Sheet, beginning, look
from stem_gym.simulator.specimens import Dopant, GrapheneRecipe

CPU = torch.device("cpu")
ELECTRONS_PER_PA_S = 6.241509e6
FLUX = FluxTable.of(Optics.of(1), 0.0, 0.0018**0.5)


class World:
    """Sheets with one dopant each (or as told), a probe that stands still, and the streams that drive them."""

    def __init__(
        self,
        rows: int,
        model: KineticsModel | None = None,
        energy_kev: float = 60.0,
        seeds: range | None = None,
        **recipe: Any,
    ) -> None:
        dopants = recipe.pop("dopants", (Dopant(element="Si", window_ang=12.0),))
        slots = recipe.pop("slots", sum(dopant.count_max for dopant in dopants) or 1)
        elements = tuple(dopant.element for dopant in dopants) or ("Si",)
        bound = highest_lattice_sum(FLUX.density, BOND_ANG)
        self.kinetics = Kinetics(model or KineticsModel(), energy_kev, elements, bound, CPU)
        self.rows = torch.arange(rows)
        self.streams = Streams(seeds or range(rows))
        self.streams.next_episode(self.rows)
        specimen, neighbours = GrapheneRecipe(dopants=dopants, **recipe).build_bonded(self.streams, self.rows, CPU)
        self.sheet: Sheet = self.kinetics.sheet(specimen, neighbours, slots, self.streams, self.rows)

    def dopant_ang(self, slot: int = 0) -> Tensor:
        """(B, 2) where the dopant of a slot is."""
        return look(self.sheet, self.rows).dopant_ang[:, slot].clone()

    def neighbour_ang(self, which: int = 0, slot: int = 0) -> Tensor:
        """(B, 2) where a neighbour of the dopant is."""
        return self.dopant_ang(slot) + look(self.sheet, self.rows).bond_ang[:, slot, which]

    def densities(self, place_ang: Tensor) -> Tensor:
        """(B, K) per electron at every lattice site, with the beam at (B, 2)."""
        away = nearest_image(self.sheet.xy_ang - place_ang.unsqueeze(1), self.sheet.cell_ang.unsqueeze(1))
        return density_at(FLUX.density.expand(len(self.rows), -1), away.norm(dim=-1))

    def beam(self, place_ang: Tensor, parts_s: list[float], current_pa: float = 40.0) -> Beam:
        """Held still at (B, 2) for these times."""
        n = len(place_ang)
        return Beam(
            place_ang.unsqueeze(1).expand(-1, len(parts_s), -1),
            torch.tensor(parts_s).expand(n, -1),
            FLUX.density.expand(n, -1),
            torch.full((n,), current_pa),
        )

    def frame(self, seconds: float = 2.0, side_ang: float = 20.0, current_pa: float = 40.0) -> Frame:
        """An evenly scanned frame about the origin."""
        one = torch.ones(len(self.rows))
        dose = one * (current_pa * ELECTRONS_PER_PA_S * seconds / side_ang**2)
        pair = torch.ones(len(self.rows), 2)
        return Frame(0.0 * pair, side_ang * pair, dose, one * seconds, one * seconds, one * current_pa)

    def first(self, beam: Beam) -> tuple[Event, Tensor]:
        """The first event of each row that is not refused, and when (B,) it comes; infinity for none."""
        rows, begin = self.rows, beginning(len(self.rows), CPU)
        found = clone_rows(begin)
        while len(rows):
            event = self.kinetics.next_event(self.sheet, rows, take_rows(beam, rows), begin, self.streams)
            for name, value in vars(event).items():
                getattr(found, name)[rows] = value
            again = (event.kind == REFUSED).nonzero().squeeze(1)
            rows, begin = rows[again], take_rows(event, again)
        start = torch.cumsum(beam.part_s, dim=1) - beam.part_s
        at = start.gather(1, found.segment[:, None]) + found.share[:, None] * beam.part_s.gather(
            1, found.segment[:, None]
        )
        return found, torch.where(found.kind == NOTHING, torch.inf, at.squeeze(1))

    def dwell(self, beam: Beam) -> list[Event]:
        """All events of a dwell, which happen."""
        rows, begin, events = self.rows, beginning(len(self.rows), CPU), []
        while len(rows):
            event = self.kinetics.next_event(self.sheet, rows, take_rows(beam, rows), begin, self.streams)
            self.kinetics.apply(self.sheet, rows, event)
            events.append(event)
            more = (event.kind != NOTHING).nonzero().squeeze(1)
            rows, begin = rows[more], take_rows(event, more)
        return events

    def take_frame(self, frame: Frame) -> list[Event]:
        """All events of a frame, which happen."""
        rows, after, events = self.rows, torch.full((len(self.rows),), -1.0), []
        while len(rows):
            event, after = self.kinetics.next_in_frame(self.sheet, rows, frame, after, self.streams)
            self.kinetics.apply(self.sheet, rows, event)
            events.append(event)
            more = (event.kind != NOTHING).nonzero().squeeze(1)
            rows, after, frame = rows[more], after[more], take_rows(frame, more)
        return events

    def happen(self, kind: int, site: Tensor | None = None, neighbour: int = 0, slot: int = 0) -> None:
        """Let one event happen on every row."""
        zero = torch.zeros_like(self.rows)
        where = zero if site is None else site
        event = Event(zero + kind, zero + slot, zero + neighbour, where, zero, zero.float())
        self.kinetics.apply(self.sheet, self.rows, event)

    def far_site(self) -> Tensor:
        """(B,) the lattice site that is farthest from all dopants."""
        site = look(self.sheet, self.rows).dopant_ang
        away = nearest_image(self.sheet.xy_ang.unsqueeze(2) - site.unsqueeze(1), self.sheet.cell_ang[:, None, None])
        away = away.norm(dim=-1).amin(2)
        return torch.where(self.sheet.atomic_number > 0, away, -1.0).argmax(1)


def buffers(sheet: Sheet) -> dict[str, Tensor]:
    """Every buffer of a sheet by name; what is kept of the surroundings must be what a look finds."""
    rows = torch.arange(len(sheet.cell_ang))
    for name, value in vars(look(sheet, rows)).items():
        assert torch.equal(value, getattr(sheet.near, name)), name
    return {name: value for name, value in vars(sheet).items() if isinstance(value, Tensor)}


def count(events: list[Event], kind: int) -> int:
    """How many events of one kind there were."""
    return sum(int((event.kind == kind).sum()) for event in events)
