"""Rates from data: hidden maps are recovered within their intervals, and every case of the likelihood is right."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import yaml

from stem_gym.core.batch import take_rows
from stem_gym.core.errors import DataError, UnknownNameError
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.instruments.sheet import make
from stem_gym.simulator.jump_chain import BEYOND, PARAMETERS, STAYED, Transitions, check_transitions, places_around
from stem_gym.simulator.jump_fit import fit, join, log_likelihood
from stem_gym.simulator.jumps import JumpMap
from stem_gym.simulator.kinetics import Beam, Frame, Kinetics, KineticsModel
from stem_gym.simulator.sheet import NOTHING, beginning, beside
from stem_gym.simulator.specimens import Dopant, GrapheneRecipe

HIDDEN = {"peak_per_s": 0.25, "centre_bonds": 1.1, "width_ang": 0.45, "anisotropy": 1.25, "floor_per_s": 0.004}
REFERENCE_PA = 40.0


def section(**values: float) -> dict:
    ranges = {name: {"low": value, "high": value} for name, value in {**HIDDEN, **values}.items()}
    return {"kind": "map", "reference_pa": REFERENCE_PA, **ranges}


def map_of(**values: float) -> JumpMap:
    return JumpMap.model_validate(section(**values))


def vector(**values: float) -> torch.Tensor:
    return torch.tensor([{**HIDDEN, **values}[name] for name in PARAMETERS], dtype=torch.float64)


def simulate(
    seed: int, count: int, longest_s: float = 6.0, law: JumpMap | None = None, frame_s: float = 2.0, parts: int = 1
) -> tuple[Transitions, torch.Tensor]:
    """Transitions of the kinetics itself, beam anywhere within 2.4 Å; and when the first jump came (s, inf if never)."""
    rows, device = torch.arange(count), torch.device("cpu")
    streams = Streams(row_seeds(seed, count), device)
    recipe = GrapheneRecipe(cell_ang=20.0, dopants=(Dopant(element="Si", count_min=1, count_max=1, window_ang=8.0),))
    specimen, neighbours = recipe.build_bonded(streams, rows, device)
    model = KineticsModel(jumps=law or map_of(), damage=None)
    kinetics = Kinetics(model, 60.0, ("Si",), 1.0, device)
    sheet = kinetics.sheet(specimen, neighbours, 1, streams, rows)
    before = beside(sheet, rows)
    chance = streams.uniform(rows, (3,))
    to_beam = (chance[:, :2] - 0.5) * 4.8
    part_s = (0.5 * (longest_s / 0.5) ** chance[:, 2:] / parts).expand(-1, parts)
    current = torch.full((count,), 60.0)
    path = (before.dopant_ang[:, 0] + to_beam).unsqueeze(1).expand(-1, parts, -1)
    beam = Beam(path, part_s, torch.zeros(count, 10), current)
    event, first_s, here = beginning(count, device), torch.full((count,), torch.inf), rows
    while len(here):
        event = kinetics.next_event(sheet, here, take_rows(beam, here), event, streams)
        comes = event.kind != NOTHING
        when = (event.segment + event.share) * part_s[here, 0]
        first_s[here] = torch.where(comes & first_s[here].isinf(), when, first_s[here])
        kinetics.apply(sheet, here, event)
        here, event = here[comes], take_rows(event, comes.nonzero().squeeze(1))
    expose_frame(kinetics, sheet, rows, frame_s, streams)
    moved = beside(sheet, rows).dopant_ang[:, 0] - before.dopant_ang[:, 0]
    moved = moved - 20.0 * 0 - sheet.cell_ang * torch.round(moved / sheet.cell_ang)
    away = (moved.unsqueeze(1) - places_around(before.bond_ang[:, 0])).norm(dim=-1)
    end = torch.where(away.amin(1) < 0.3, away.argmin(1) - 1, BEYOND)
    return Transitions(
        to_beam.unsqueeze(1).expand(-1, parts, -1).clone(),
        part_s.clone(),
        before.bond_ang[:, 0],
        end,
        torch.full((count, 2), -1),
        torch.full((count,), frame_s),
        torch.full((count,), 400.0),
        current,
    ), first_s


def expose_frame(kinetics, sheet, rows, frame_s, streams) -> None:
    """A frame of the whole cell, event after event."""
    one = torch.ones(len(rows))
    frame = Frame(
        0.5 * sheet.cell_ang[rows], sheet.cell_ang[rows], 0 * one, frame_s * one, frame_s * one, 60.0 * one
    )
    after = -one
    while len(rows):
        event, after = kinetics.next_in_frame(sheet, rows, frame, after, streams)
        kinetics.apply(sheet, rows, event)
        more = (event.kind != NOTHING).nonzero().squeeze(1)
        rows, after, frame = rows[more], after[more], take_rows(frame, more)
