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
from stem_gym.simulator.jump_chain import (
    BEHIND,
    BEYOND,
    PARAMETERS,
    STAYED,
    Transitions,
    check_transitions,
    places_around,
)
from stem_gym.simulator.jump_fit import fit, join, log_likelihood
from stem_gym.simulator.jumps import JumpMap
from stem_gym.simulator.kinetics import Beam, Frame, Kinetics, KineticsModel
from stem_gym.simulator.sheet import NOTHING, beginning, look
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
    """Transitions of the kinetics itself, beam anywhere within 2.4 Å; and when the first jump came (s, or inf)."""
    rows, device = torch.arange(count), torch.device("cpu")
    streams = Streams(row_seeds(seed, count), device)
    recipe = GrapheneRecipe(cell_ang=20.0, dopants=(Dopant(element="Si", count_min=1, count_max=1, window_ang=8.0),))
    specimen, neighbours = recipe.build_bonded(streams, rows, device)
    model = KineticsModel(jumps=law or map_of(), damage=None)
    kinetics = Kinetics(model, 60.0, ("Si",), 1.0, device)
    sheet = kinetics.sheet(specimen, neighbours, 1, streams, rows)
    before = look(sheet, rows)
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
    moved = look(sheet, rows).dopant_ang[:, 0] - before.dopant_ang[:, 0]
    moved = moved - sheet.cell_ang * torch.round(moved / sheet.cell_ang)
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
    frame = Frame(0.5 * sheet.cell_ang[rows], sheet.cell_ang[rows], 0 * one, frame_s * one, frame_s * one, 60.0 * one)
    after = -one
    while len(rows):
        event, after = kinetics.next_in_frame(sheet, rows, frame, after, streams)
        kinetics.apply(sheet, rows, event)
        more = (event.kind != NOTHING).nonzero().squeeze(1)
        rows, after, frame = rows[more], after[more], take_rows(frame, more)


def test_hidden_rates_lie_in_their_intervals():
    """Of 6 × 4 intervals at 90 %, binomial with p = 0.9 gives 17 to 24 with probability above 0.99."""
    inside, ratios = 0, []
    for seed in range(6):
        transitions, _ = simulate(seed, 250)
        found = fit(transitions, REFERENCE_PA, {"floor_per_s": HIDDEN["floor_per_s"]})
        ends = found.intervals(0.9)
        inside += sum(ends[name][0] <= HIDDEN[name] <= ends[name][1] for name in found.free)
        ratios.append(found.likelihood_ratio(HIDDEN))
    assert 17 <= inside <= 24
    # Chi-squared with 4 degrees of freedom: the mean of 6 lies in 1.5 to 8 with probability above 0.99.
    assert 1.5 < sum(ratios) / 6 < 8.0


def test_ignoring_censored_dwells_would_bias():
    transitions, _ = simulate(1, 400)
    fixed = {name: HIDDEN[name] for name in PARAMETERS if name != "peak_per_s"}
    whole = fit(transitions, REFERENCE_PA, fixed)
    jumped = fit(take_rows(transitions, (transitions.end != STAYED).nonzero().squeeze(1)), REFERENCE_PA, fixed)
    low, high = whole.interval("peak_per_s", 0.99)
    assert low < HIDDEN["peak_per_s"] < high
    assert jumped.interval("peak_per_s", 0.99)[0] > 1.5 * HIDDEN["peak_per_s"]


def test_known_moments_say_more_and_the_same():
    transitions, first_s = simulate(2, 400, longest_s=15.0, frame_s=1e-6, parts=8)
    part = (first_s / transitions.part_s[:, 0]).floor().clamp(0, 7).long()
    timed = first_s.isfinite() & (transitions.end != STAYED)
    window = torch.where(timed[:, None], torch.stack((part, part + 1), 1), -1)
    fixed = {name: HIDDEN[name] for name in PARAMETERS if name != "peak_per_s"}
    open_, known = (fit(t, REFERENCE_PA, fixed) for t in (transitions, replace(transitions, window=window)))
    assert known.sd("peak_per_s") < open_.sd("peak_per_s")
    for found in (open_, known):
        low, high = found.interval("peak_per_s", 0.99)
        assert low < HIDDEN["peak_per_s"] < high


def one(end: int, seconds: float, window: tuple[int, int] = (-1, -1), parts: int = 1) -> Transitions:
    turn = torch.tensor([0.0, 2.0, 4.0]) * math.pi / 3.0
    bonds = 1.42 * torch.stack((turn.cos(), turn.sin()), 1).double().unsqueeze(0)
    return Transitions(
        torch.tensor([[1.2, 0.3]]).double().expand(1, parts, 2).clone(),
        torch.full((1, parts), seconds / parts).double(),
        bonds, torch.tensor([end]), torch.tensor([window]), torch.zeros(1).double(), torch.ones(1).double(),
        torch.full((1,), REFERENCE_PA).double(),
    )  # fmt: skip


TURN = torch.tensor([0.0, 2.0, 4.0]) * math.pi / 3.0
UNIT = torch.stack((TURN.cos(), TURN.sin()), 1).double()
BEAM = torch.tensor([1.2, 0.3]).double()


def by_hand(beam: torch.Tensor, bond: torch.Tensor) -> torch.Tensor:
    """The map's three rates, per second, of a beam seen from the dopant."""
    along, across = bond @ beam, bond[:, 0] * beam[1] - bond[:, 1] * beam[0]
    square = ((along - 1.1 * 1.42) / 0.45) ** 2 + (across / (0.45 * 1.25)) ** 2
    return 0.004 + 0.25 * torch.exp(-0.5 * square)


def test_two_jumps_go_over_the_other_sublattice():
    """Bonds point the other way there: the chance of both jumps is r₁ r₂ t² / 2 for a short time."""
    seconds, first = 1e-2, by_hand(BEAM, UNIT)
    for index, (neighbour, over) in enumerate(BEHIND):
        second = by_hand(BEAM - 1.42 * UNIT[neighbour], -UNIT)
        chance = log_likelihood(vector(), one(3 + index, seconds), REFERENCE_PA).exp()
        assert float(chance) == pytest.approx(float(0.5 * first[neighbour] * second[over]) * seconds**2, rel=1e-2)


def test_a_short_dwell_has_closed_form_probabilities():
    """Rates by hand; one jump within a time so short that a second one is not seen."""
    seconds, rate = 1e-4, by_hand(BEAM, UNIT)
    for neighbour in range(3):
        chance = log_likelihood(vector(), one(neighbour, seconds), REFERENCE_PA).exp()
        assert float(chance) == pytest.approx(float(rate[neighbour]) * seconds, rel=1e-3)
    stayed = log_likelihood(vector(), one(STAYED, seconds), REFERENCE_PA)
    assert float(stayed) == pytest.approx(-float(rate.sum()) * seconds, rel=1e-3)


def test_probabilities_of_all_ends_add_up_to_one():
    total = sum(log_likelihood(vector(peak_per_s=1.0), one(end, 20.0), REFERENCE_PA).exp() for end in range(-1, 10))
    assert float(total) == pytest.approx(1.0, abs=1e-9)
    parts = [log_likelihood(vector(), one(0, 9.0, (k, k + 1), 3), REFERENCE_PA).exp() for k in range(3)]
    assert float(sum(parts)) == pytest.approx(
        float(log_likelihood(vector(), one(0, 9.0), REFERENCE_PA).exp()), abs=1e-9
    )
    back = [log_likelihood(vector(), one(STAYED, 9.0, (k, k + 1), 3), REFERENCE_PA).exp() for k in range(3)]
    never = math.exp(-9.0 * float(by_hand(BEAM, UNIT).sum()))
    stayed = log_likelihood(vector(), one(STAYED, 9.0), REFERENCE_PA).exp()
    assert float(sum(back)) + never == pytest.approx(float(stayed), abs=1e-9)


def test_the_gradient_is_that_of_finite_differences():
    transitions = join([one(0, 3.0), one(STAYED, 9.0, parts=3), one(1, 6.0, (1, 2), 3), one(BEYOND, 20.0)])
    leaf = vector().requires_grad_(True)
    torch.autograd.gradcheck(lambda values: log_likelihood(values, transitions, REFERENCE_PA), leaf)


def test_the_written_section_loads_and_gives_the_rates_back():
    transitions, _ = simulate(3, 300)
    found = fit(transitions, REFERENCE_PA, {"floor_per_s": 0.0, "anisotropy": 1.0})
    law = JumpMap.model_validate(yaml.safe_load(yaml.safe_dump(found.as_config())))
    drawn = law.parameters(Streams([0], torch.device("cpu")), torch.arange(1))[0]
    right = [found.estimate[name] * (1.42 if name == "centre_bonds" else 1.0) for name in PARAMETERS]
    assert drawn.tolist() == pytest.approx(right, rel=1e-5)
    wide = JumpMap.model_validate(found.as_config(2.0))
    assert wide.peak_per_s.low < found.estimate["peak_per_s"] < wide.peak_per_s.high and wide.peak_per_s.logarithmic


def test_data_without_sense_are_refused():
    good, _ = simulate(4, 60)
    for change, message in [
        ({"part_s": -good.part_s}, "part_s must not be negative"),
        ({"current_pa": 0.0 * good.current_pa}, "current_pa must be positive"),
        ({"bond_ang": 5.0 * good.bond_ang}, "bond_ang must be"),
        ({"end": good.end + 20}, "end must be"),
        ({"to_beam_ang": good.to_beam_ang * torch.nan}, "to_beam_ang must be finite"),
        ({"window": good.window + 3}, "window must be"),
        ({"end": good.end.float()}, "end must be .* int64"),
    ]:
        with pytest.raises(DataError, match=message):
            check_transitions(replace(good, **change))
    with pytest.raises(DataError, match="too few for a rate map"):
        fit(take_rows(good, torch.arange(5)))
    with pytest.raises(UnknownNameError, match="anisotropy"):
        fit(good, fixed={"anisotrophy": 1.0})
    with pytest.raises(DataError, match="do not tell"):
        fit(join([one(0, 3.0)] * 30))
