"""What events do to a sheet: atoms are conserved or accounted for, whatever happens."""

from __future__ import annotations

import pytest
import torch

from stem_gym.core.batch import clone_rows
from stem_gym.core.periodic import nearest_image
from stem_gym.simulator.event_rates import KineticsModel
from stem_gym.simulator.sheet import (
    CAPTURE,
    CARBON,
    EJECTION,
    EXCHANGE,
    HEALING,
    KNOCK_OUT,
    REPLACEMENT,
    REVERSAL,
    ROTATION,
    SILICON,
    look,
)
from stem_gym.simulator.specimens import Dopant
from tests.simulator.sheets import World, buffers, count

MANY = (Dopant(element="Si", count_min=3, count_max=3, window_ang=14.0),)


def books(world: World) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Carbon, dopants, holes and sites (B,), counted on the lattice; the list of dopants must agree with it."""
    sheet = world.sheet
    buffers(sheet)
    site = sheet.atomic_number > 0
    carbon = sheet.present & (sheet.atomic_number == CARBON)
    foreign = sheet.present & (sheet.atomic_number > CARBON)
    assert torch.equal(foreign.sum(1), sheet.there.sum(1))
    listed = torch.zeros_like(foreign).float().scatter_add(1, sheet.dopant, sheet.there.float())
    assert torch.equal(listed, foreign.float()), "each dopant is listed once, where it stands"
    return carbon.sum(1), sheet.there.sum(1), (site & ~sheet.present).sum(1), site.sum(1)


def shake(world: World, rounds: int, part_s: float) -> list:
    """Dwells at random places beside the dopants, and frames."""
    generator, events = torch.Generator().manual_seed(4), []
    for turn in range(rounds):
        place = world.dopant_ang(turn % world.sheet.dopant.shape[1])
        place = place + 3.0 * torch.rand(place.shape, generator=generator) - 1.5
        events += world.dwell(world.beam(place, [part_s, 2.0 * part_s]))
        events += world.take_frame(world.frame(20.0 * part_s))
    return events


def test_carbon_dopants_and_losses_are_all_the_sites_after_long_runs_at_100_kev():
    world = World(40, KineticsModel(), 100.0, dopants=MANY)
    _, dopants, holes, sites = books(world)
    assert dopants.eq(3).all() and holes.eq(0).all()
    events = shake(world, 4, 0.3)
    carbon, dopants, holes, _ = books(world)
    assert dopants.eq(3).all(), "silicon is not lost"
    assert torch.equal(carbon + dopants + world.sheet.lost, sites) and torch.equal(holes, world.sheet.lost)
    assert int(world.sheet.lost.sum()) == count(events, EJECTION) + count(events, KNOCK_OUT)
    assert count(events, EJECTION) > 50 and count(events, KNOCK_OUT) > 50 and count(events, EXCHANGE) > 100
    assert world.sheet.lost.max() > 8, "more than there are slots for"
    assert world.sheet.open.sum(1).max() == 8


def test_with_healing_and_capture_the_books_balance_as_well():
    model = KineticsModel(healing_per_s=0.2, capture_per_s=0.1, vacancies_max=64)
    world = World(60, model, 100.0, dopants=MANY, slots=6)
    _, _, _, sites = books(world)
    events = shake(world, 4, 0.1)
    carbon, dopants, holes, _ = books(world)
    assert torch.equal(carbon + dopants + holes, sites)
    assert torch.equal(holes, world.sheet.open.sum(1)), "every hole is listed"
    healed, caught = count(events, HEALING), count(events, CAPTURE)
    assert int(dopants.sum()) == 3 * 60 + caught
    assert int(holes.sum()) == int(world.sheet.lost.sum()) - healed - caught
    assert healed > 20 and caught > 20
    assert dopants.max() <= 6, "no more than there are slots for"


# One event after another


def test_an_exchange_swaps_two_atoms():
    world = World(20)
    before, carbon = clone_rows(world.sheet), world.sheet.neighbours[world.rows, world.sheet.dopant[:, 0], 2]
    world.happen(EXCHANGE, neighbour=2)
    sheet = world.sheet
    assert torch.equal(sheet.dopant[:, 0], carbon)
    assert sheet.atomic_number[world.rows, carbon].eq(SILICON).all()
    assert sheet.atomic_number[world.rows, before.dopant[:, 0]].eq(CARBON).all()
    assert torch.equal(sheet.raised, ~before.raised) and sheet.jumps.eq(1).all()
    changed = sheet.atomic_number != before.atomic_number
    assert changed.sum(1).eq(2).all() and torch.equal(sheet.present, before.present)


def test_fourfold_silicon_stays_where_it_is():
    """After the ejection of a neighbour it can lose others, and does not change places any more."""
    world = World(200)
    gone = world.sheet.neighbours[world.rows, world.sheet.dopant[:, 0], 1]
    world.happen(EJECTION, neighbour=1)
    assert (~world.sheet.present[world.rows, gone]).all() and world.sheet.lost.eq(1).all()
    assert torch.equal(world.sheet.vacancy[world.rows, world.sheet.open.float().argmax(1)], gone)
    allowed = look(world.sheet, world.rows).allowed[:, 0]  # (B, 3, 5)
    assert not allowed[..., [EXCHANGE, ROTATION, REPLACEMENT]].any()
    assert allowed[..., EJECTION].float().mean((0,)).tolist() == [1.0, 0.0, 1.0]
    world.dwell(world.beam(world.neighbour_ang(0), [30.0]))
    assert world.sheet.jumps.eq(0).all()
    world.happen(HEALING, site=gone)
    assert look(world.sheet, world.rows).allowed[:, 0, :, EXCHANGE].all(), "healed, it is threefold again"


def test_two_dopants_side_by_side_do_not_change_places():
    world = World(50, dopants=MANY)
    sheet = world.sheet
    first, second = sheet.dopant[:, 0], sheet.neighbours[world.rows, sheet.dopant[:, 0], 0]
    sheet.atomic_number[world.rows, sheet.dopant[:, 1]] = CARBON
    sheet.atomic_number[world.rows, second] = SILICON
    sheet.dopant[:, 1] = second
    allowed = look(sheet, world.rows).allowed
    assert not allowed[:, 0, 0].any() and allowed[:, 0, 1:, EXCHANGE].all()
    back = sheet.neighbours[world.rows, second] == first.unsqueeze(1)
    assert not allowed[:, 1][back].any()


def test_bonds_are_three_of_one_length_and_a_third_of_a_turn_apart():
    """Supercells strain the lattice by a little: three parts in a hundred."""
    bond = look(World(50).sheet, torch.arange(50)).bond_ang[:, 0]
    assert bond.norm(dim=-1).sub(1.42).abs().max() < 0.03 * 1.42
    angle = torch.acos((bond * bond.roll(1, dims=1)).sum(-1) / bond.norm(dim=-1) / bond.roll(1, dims=1).norm(dim=-1))
    assert angle.sub(2.0944).abs().max() < 0.06


def test_a_turned_bond_forbids_everything_but_turning_it_back():
    world = World(20, dopants=(Dopant(element="P", window_ang=12.0),))
    world.happen(ROTATION, neighbour=2)
    allowed = look(world.sheet, world.rows).allowed[:, 0]
    assert allowed.sum((1, 2)).eq(1).all() and allowed[:, 2, REVERSAL].all()
    world.happen(REVERSAL, neighbour=2)
    again = look(world.sheet, world.rows).allowed[:, 0]
    assert again[..., [EXCHANGE, EJECTION, ROTATION, REPLACEMENT]].all() and not again[..., REVERSAL].any()


def test_a_replaced_dopant_is_gone_and_its_site_is_carbon():
    world = World(20, dopants=(Dopant(element="P", window_ang=12.0),))
    site = world.sheet.dopant[:, 0].clone()
    world.happen(REPLACEMENT)
    carbon, dopants, holes, sites = books(world)
    assert dopants.eq(0).all() and holes.eq(0).all() and torch.equal(carbon, sites)
    assert world.sheet.atomic_number[world.rows, site].eq(CARBON).all() and world.sheet.present.sum(1).equal(sites)
    assert not look(world.sheet, world.rows).allowed.any()


def test_caught_silicon_jumps_as_silicon_does():
    world = World(20, KineticsModel(capture_per_s=1.0), dopants=(Dopant(element="N", window_ang=12.0),), slots=2)
    hole = world.far_site()
    world.happen(KNOCK_OUT, site=hole)
    world.happen(CAPTURE, site=hole)
    sheet = world.sheet
    assert sheet.there.all() and torch.equal(sheet.dopant[:, 1], hole)
    assert sheet.atomic_number[world.rows, hole].eq(SILICON).all() and not sheet.open.any()
    barn = look(sheet, world.rows).barn
    sections = world.kinetics.sections
    far, near = sections.exchange_far_barn, sections.exchange_barn
    expected = torch.where(sheet.raised[:, 1], near, far)
    assert torch.allclose(barn[:, 1, EXCHANGE], expected) and barn[:, 0, EXCHANGE].eq(0.0).all()


def test_rows_that_have_no_event_are_not_touched():
    world = World(6, KineticsModel(), 100.0)
    before = clone_rows(world.sheet)
    all_rows, world.rows = world.rows, torch.tensor([1, 4])
    world.happen(EJECTION, neighbour=1)
    world.rows = all_rows
    after = buffers(world.sheet)
    for name, value in buffers(before).items():
        assert torch.equal(value[[0, 2, 3, 5]], after[name][[0, 2, 3, 5]]), name
    assert world.sheet.lost.tolist() == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("element", ["Si", "P"])
def test_the_sheet_lists_the_specimens_dopants_and_holes(element):
    world = World(100, dopants=(Dopant(element=element, count_min=1, count_max=3, window_ang=14.0),), vacancies_max=2)
    _, dopants, holes, _ = books(world)
    assert sorted(set(dopants.tolist())) == [1, 2, 3] and sorted(set(holes.tolist())) == [0, 1, 2]
    assert torch.equal(world.sheet.open.sum(1), holes)
    place = nearest_image(look(world.sheet, world.rows).dopant_ang, world.sheet.cell_ang.unsqueeze(1))
    assert place[world.sheet.there].abs().max() < 7.0
