"""What a recording tells about jumps, on a recording written by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from stem_gym.core.errors import RecordError
from stem_gym.core.instructions import ATOMS, FULL_FRAME, Dwell, Park, Reading, Scan, TraceRule
from stem_gym.core.units import ELECTRONS_PER_PC
from stem_gym.instruments.recorder import Record, Recording
from stem_gym.instruments.transitions import transitions_of
from stem_gym.simulator.jump_chain import BEYOND, STAYED

ROW = torch.tensor([0])
FOV_ANG = 20.0
TURN = torch.tensor([0.0, 2.0, 4.0]) * math.pi / 3.0
BONDS = 1.42 * torch.stack((TURN.cos(), TURN.sin()), 1)


def number(value: float) -> torch.Tensor:
    return torch.tensor([value])


def record(instruction, seconds: float, **data: torch.Tensor) -> Record:
    electrons = number(40.0 * ELECTRONS_PER_PC * (0.0 if isinstance(instruction, Park) else seconds))
    reading = Reading(type(instruction).__name__, ROW, number(seconds), electrons, electrons, data)
    return Record("instruction", instruction, reading, {}, "")


def look(places_ang: list[tuple[float, float]], shift_ang: tuple[float, float]) -> Record:
    scan = Scan(ROW, number(FOV_ANG), (10, 10), number(0.02), torch.tensor([FULL_FRAME]), (ATOMS,))
    atoms = torch.tensor([places_ang]) / FOV_ANG + 0.5
    bonds = BONDS.expand(1, len(places_ang), 3, 2)
    return record(scan, 2.0, atoms=atoms, bonds_ang=bonds, shift_ang=torch.tensor([shift_ang]))


def episode(end_ang: tuple[float, float], used: int = 8, rule: TraceRule | None = None) -> Recording:
    """An atom at (1, 2) Å; a beam at (2.4, 2) for up to 8 s; a drift of (0.6, 0) until the next frame."""
    trace = torch.full((1, 8), torch.nan)
    trace[:, :used] = 100.0
    place = torch.tensor([[2.4, 2.0]]) / FOV_ANG + 0.5
    records = (
        Record("reset", None, None, {"rows": [0]}, ""),
        look([(1.0, 2.0)], (0.0, 0.0)),
        record(Park(ROW, place[:, 0], place[:, 1]), 0.0),
        record(Dwell(ROW, number(8.0), 8, rule), float(used), place=place, trace=trace),
        look([end_ang], (0.6, 0.0)),
    )
    return Recording({}, records, True)


def test_beam_and_end_are_seen_from_the_moving_dopant():
    found = transitions_of(episode((1.6, 2.0)))
    assert found.end.tolist() == [STAYED] and found.window.tolist() == [[-1, -1]]
    # It drifts 0.6 Å in the 10 s between the ends of the frames; part k lies at k + 0.5 s.
    right = [1.4 - 0.06 * (part + 0.5) for part in range(8)]
    assert found.to_beam_ang[0, :, 0].tolist() == pytest.approx(right, abs=1e-5)
    assert found.to_beam_ang[0, :, 1].tolist() == pytest.approx([0.0] * 8, abs=1e-5)
    assert found.part_s.tolist() == [[1.0] * 8]
    assert float(found.frame_s[0]) == pytest.approx(2.0) and float(found.frame_ang2[0]) == pytest.approx(400.0)
    assert float(found.current_pa[0]) == pytest.approx(40.0)


def test_every_site_has_its_number():
    bond = BONDS.tolist()
    assert transitions_of(episode((1.6 + bond[1][0], 2.0 + bond[1][1]))).end.tolist() == [1]
    behind = BONDS[1] - BONDS[2]  # over neighbour 1 by its bond 2: the fourth of those behind
    assert transitions_of(episode((1.6 + float(behind[0]), 2.0 + float(behind[1])))).end.tolist() == [6]
    far = 2.0 * BONDS[0] - BONDS[1]
    assert transitions_of(episode((1.6 + float(far[0]), 2.0 + float(far[1])))).end.tolist() == [BEYOND]


def test_a_stopped_dwell_tells_when_it_jumped():
    rule = TraceRule(0.13, 0.04, baseline_samples=1, window_samples=1)
    assert transitions_of(episode((1.6 + 1.42, 2.0), used=5, rule=rule)).window.tolist() == [[3, 5]]
    assert transitions_of(episode((1.6, 2.0), used=5, rule=rule)).window.tolist() == [[-1, -1]]


def test_what_can_not_be_read_makes_no_transition():
    for end in ((1.6 + 0.7, 2.0), (9.0, 9.0), (torch.nan, torch.nan)):
        with pytest.raises(RecordError, match="2 scans of 'atoms', 1 dwells"):
            transitions_of(episode(end))
    whole = episode((1.6, 2.0))
    broken = (*whole.records[:3], Record("fault", None, None, {}, ""), *whole.records[3:])
    with pytest.raises(RecordError, match="no dopant"):
        transitions_of(replace(whole, records=broken))
