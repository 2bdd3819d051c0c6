"""Kinetics: waiting times, rates by hand, knock-out by thinning, frames, and rows that keep to themselves.

Doses are large, so that a few thousand rows are statistics enough; no tolerance is below three standard errors.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from stem_gym.core.errors import ConfigError
from stem_gym.core.periodic import nearest_image
from stem_gym.simulator.event_rates import KineticsModel, PublishedRates, velocity_variance
from stem_gym.simulator.jumps import CrossSectionJumps, JumpMap, LorentzianJumps, exactly
from stem_gym.simulator.sheet import (
    CAPTURE,
    EJECTION,
    EXCHANGE,
    HEALING,
    KNOCK_OUT,
    NOTHING,
    REPLACEMENT,
    REVERSAL,
    ROTATION,
)
from stem_gym.simulator.specimens import Dopant
from tests.simulator.sheets import ELECTRONS_PER_PA_S, World, buffers, count

BARN = 1e-8
EVEN = CrossSectionJumps(exchange_ev=13.5, exchange_far_ev=13.5)  # the same on both sides of the sheet
PER_S = 40.0 * ELECTRONS_PER_PA_S * BARN  # barn times density to rate, at 40 pA
DOSE = 40.0 * ELECTRONS_PER_PA_S * 2.0 / 400.0  # of a frame of 2 s and 20 Å


def exponential(times_s: Tensor, rate_per_s: float | Tensor) -> float:
    """The p value of times that should be exponential."""
    return float(stats.kstest((times_s * rate_per_s).double().numpy(), "expon").pvalue)


def test_waiting_times_are_exponential_at_the_rate_made_by_hand():
    """The beam stands on a neighbour: σ · flux there, and at the two others, √3 bonds away."""
    world = World(3000, KineticsModel(jumps=EVEN))
    place = world.neighbour_ang(1)
    at = [world.densities(place).gather(1, world.sheet.neighbours[world.rows, world.sheet.dopant[:, 0], i][:, None])
          for i in range(3)]  # fmt: skip
    rate = 0.1237 * PER_S * torch.cat(at, dim=1).sum(1)
    assert float(rate.mean()) == pytest.approx(0.243, rel=0.02), "0.787 /Å² on the carbon, 0.001 on each of the others"
    event, when = world.first(world.beam(place, [400.0]))
    assert (event.kind == EXCHANGE).all() and float((event.neighbour == 1).float().mean()) > 0.99
    assert exponential(when, rate) > 0.01
    assert exponential(when, 1.06 * rate) < 0.01, "the test would see six in a hundred"


def test_it_does_not_matter_into_which_parts_a_dwell_is_cut():
    world = World(3000, KineticsModel(jumps=EVEN))
    place = world.neighbour_ang()
    rate = 0.1237 * PER_S * world.densities(place).amax(1)
    _, when = world.first(world.beam(place, [0.3, 2.0, 0.01, 0.7, 4.0, 1.0, 60.0, 300.0]))
    assert exponential(when, 1.005 * rate) > 0.01


def test_a_moving_beam_integrates_its_rate():
    """Half of the time on the neighbour, then far away: what has not happened by then does not happen."""
    world = World(4000, KineticsModel(jumps=EVEN))
    beam = world.beam(world.neighbour_ang(), [3.0, 1000.0])
    away = beam.path_ang.clone()
    away[:, 1] += torch.tensor([9.0, 9.0])
    event, when = world.first(type(beam)(away, beam.part_s, beam.density, beam.current_pa))
    happened = event.kind == EXCHANGE
    chance = 1.0 - math.exp(-3.0 * 0.243)
    assert float(happened.float().mean()) == pytest.approx(chance, abs=3 * (chance * (1 - chance) / 4000) ** 0.5)
    assert (when[happened] < 3.0).all()


def test_no_current_no_event():
    world = World(200, energy_kev=100.0)
    event, _ = world.first(world.beam(world.neighbour_ang(), [1e5], current_pa=0.0))
    assert (event.kind == NOTHING).all()
    assert all((event.kind == NOTHING).all() for event in world.take_frame(world.frame(1e5, current_pa=0.0)))


def test_many_events_in_one_dwell():
    """A map that is all floor: a chain of constant rate, three neighbours of 0.4 /s for 5 s: 6 jumps, as Poisson."""
    floor = JumpMap(peak_per_s=exactly(0.0), floor_per_s=exactly(0.4), reference_pa=40.0)
    world = World(1500, KineticsModel(jumps=floor, damage=None))
    events = world.dwell(world.beam(world.dopant_ang(), [1.0, 2.5, 1.5]))
    jumps = world.sheet.jumps.double()
    assert count(events, EXCHANGE) == int(jumps.sum())
    assert float(jumps.mean()) == pytest.approx(6.0, abs=3 * (6.0 / 1500) ** 0.5)
    assert float(jumps.var()) == pytest.approx(6.0, rel=0.12)
    start = World(1500, KineticsModel(jumps=floor, damage=None)).dopant_ang()
    far = (world.dopant_ang() - start).norm(dim=1)
    assert float((far < 0.1).double().mean()) < 0.35, "and walked away"


def test_rates_are_made_anew_after_each_event():
    """The beam on a neighbour draws the dopant under itself, where it stays: one jump, and hardly another."""
    world = World(1000, KineticsModel(jumps=EVEN))
    place = world.neighbour_ang()
    world.dwell(world.beam(place, [25.0]))
    there = (world.dopant_ang() - place).norm(dim=1) < 0.1
    assert float(there.float().mean()) > 0.6
    assert float(world.sheet.jumps.double().mean()) < 2.0, "0.24 /s for 25 s would be six"


def test_the_lorentzian_law_reaches_the_rates():
    """On the dopant: 1/17 per second to each neighbour, whatever the current."""
    world = World(3000, KineticsModel(jumps=LorentzianJumps(), damage=None))
    event, when = world.first(world.beam(world.dopant_ang(), [500.0], current_pa=1.0))
    assert exponential(when, 3.0 / 17.0) > 0.01
    assert torch.bincount(event.neighbour, minlength=3).tolist() == pytest.approx([1000] * 3, abs=80)


# Energies and isotopes


@pytest.mark.parametrize(
    ("energy_kev", "exchange", "ejection", "pristine", "edge"),
    [(60.0, 0.124, 3e-7, 1e-17, 4e-13), (80.0, 13.4, 0.39, 4.1e-6, 1e-3), (100.0, 16.7, 9.2, 0.345, 2.1)],
)
def test_cross_sections_at_the_energies_that_were_published(energy_kev, exchange, ejection, pristine, edge):
    """Natural carbon, ⟨v²⟩ = 3.17e5 m²/s²; the figures are rounded, and those of the perfect sheet are for 12C."""
    kinetics = World(1, KineticsModel(jumps=EVEN), energy_kev).kinetics
    sections = kinetics.sections
    assert (sections.exchange_far_barn, sections.exchange_barn) == pytest.approx((exchange, exchange), rel=0.01)
    assert kinetics.sections.ejection_barn == pytest.approx(ejection, rel=0.05)
    assert kinetics.sections.pristine_barn == pytest.approx(pristine, rel=0.16 if energy_kev < 70 else 0.06)
    assert kinetics.sections.edge_barn == pytest.approx(edge, rel=0.06)


def test_heavier_carbon_is_safer_and_heat_is_not():
    barn = {
        (isotope, t): World(1, KineticsModel(carbon=isotope, temperature_k=t), 80.0).kinetics.sections.pristine_barn
        for isotope in ("12C", "13C") for t in (300.0, 600.0)
    }  # fmt: skip
    assert barn["13C", 300.0] < 0.3 * barn["12C", 300.0]
    assert barn["12C", 600.0] > 3.0 * barn["12C", 300.0]


def test_the_velocities_are_those_of_an_oscillator():
    """The published value at 300 K; k T / M when hot; and ħω / 2M, which heat does not change, when cold."""
    assert velocity_variance("12C", 300.0) == pytest.approx(3.17e5)
    assert velocity_variance("13C", 300.0) == pytest.approx(2.86e5)
    thermal = 1.380649e-23 / (12.0 * 1.66054e-27)
    assert velocity_variance("12C", 1e5) == pytest.approx(1e5 * thermal, rel=1e-3)
    assert velocity_variance("12C", 3.0) == pytest.approx(velocity_variance("12C", 30.0), rel=1e-4)
    assert velocity_variance("12C", 3.0) > 100.0 * 3.0 * thermal


def test_the_two_sides_have_rates_of_their_own():
    """A raised dopant has the lower threshold; after a jump it is on the other side."""
    model = KineticsModel(jumps=CrossSectionJumps(exchange_ev=13.5, exchange_far_ev=15.0))
    world = World(4000, model)
    near, far = world.kinetics.sections.exchange_barn, world.kinetics.sections.exchange_far_barn
    assert far < 0.5 * near
    raised = world.sheet.raised[:, 0].clone()
    assert 0.4 < float(raised.float().mean()) < 0.6
    place = world.neighbour_ang()
    rate = PER_S * world.densities(place).amax(1) * torch.where(raised, near, far)
    _, when = world.first(world.beam(place, [4000.0]))
    assert exponential(when, 1.003 * rate) > 0.01
    world.happen(EXCHANGE)
    assert torch.equal(world.sheet.raised[:, 0], ~raised)


# Knock-out


def pristine_world(rows: int, **more: Any) -> World:
    return World(rows, KineticsModel(jumps=EVEN), 100.0, dopants=(), cell_ang=20.0, **more)


def test_knock_out_by_thinning_has_the_rate_of_every_atom_added_up():
    world = pristine_world(3000)
    place = torch.rand(3000, 2, generator=torch.Generator().manual_seed(1)) * 6.0
    each = 0.3363 * world.densities(place)  # (B, K)
    event, when = world.first(world.beam(place, [30.0, 30000.0]))
    assert (event.kind == KNOCK_OUT).all()
    assert exponential(when, PER_S * each.sum(1)) > 0.01
    assert exponential(when, 1.08 * PER_S * each.sum(1)) < 0.01
    share = each / each.sum(1, keepdim=True)
    rank = (share.argsort(dim=1, descending=True).argsort(dim=1)).gather(1, event.site[:, None]).squeeze(1)
    expected = share.sort(dim=1, descending=True).values.mean(0)[:3]
    seen = torch.bincount(rank, minlength=3)[:3] / 3000
    assert seen.tolist() == pytest.approx(expected.tolist(), abs=0.03), "and takes the atoms in proportion"


def test_carbon_beside_a_vacancy_leaves_more_easily():
    world = pristine_world(1000)
    hole = world.far_site()
    world.happen(KNOCK_OUT, site=hole)
    place = world.sheet.xy_ang[world.rows, hole]
    density = world.densities(place) * world.sheet.present
    barn = torch.full_like(density, 0.3363).scatter(1, world.sheet.neighbours[world.rows, hole], 2.1375)
    event, when = world.first(world.beam(place, [3000.0]))
    assert exponential(when, PER_S * (barn * density).sum(1)) > 0.01
    beside_it = (world.sheet.neighbours[world.rows, hole] == event.site[:, None]).any(1)
    expected = (barn * density).gather(1, world.sheet.neighbours[world.rows, hole]).sum(1) / (barn * density).sum(1)
    assert float(beside_it.float().mean()) == pytest.approx(float(expected.mean()), abs=0.04)


def test_carbon_beside_a_dopant_is_ejected_and_not_knocked_out():
    """On a neighbour at 100 keV: 16.65 barn of exchange and 9.2 of ejection, three atoms away 0.336 of knock-out."""
    world = World(4000, KineticsModel(jumps=EVEN), 100.0)
    place = world.neighbour_ang()
    event, _ = world.first(world.beam(place, [1000.0]))
    shares = [float((event.kind == kind).float().mean()) for kind in (EXCHANGE, EJECTION, KNOCK_OUT)]
    density = world.densities(place)
    around = world.sheet.neighbours[world.rows, world.sheet.dopant[:, 0]]
    assert not ((around == event.site[:, None]).any(1) & (event.kind == KNOCK_OUT)).any()
    own = density.gather(1, world.sheet.neighbours[world.rows, world.sheet.dopant[:, 0]]).sum(1)
    others = density.sum(1) - own - density.gather(1, world.sheet.dopant).squeeze(1)
    weights = torch.stack((16.651 * own, 9.198 * own, 0.3363 * others)).mean(1)
    assert shares == pytest.approx((weights / weights.sum()).tolist(), abs=0.024)


def test_without_damage_nothing_is_lost():
    for element, seconds in {"Si": 20.0, "P": 2.0}.items():
        world = World(300, KineticsModel(jumps=EVEN, damage=None), dopants=(Dopant(element=element, window_ang=12.0),))
        kinetics = world.kinetics
        assert kinetics.sections.ejection_barn == kinetics.sections.pristine_barn == kinetics.sections.edge_barn == 0.0
        world.dwell(world.beam(world.neighbour_ang(), [seconds]))
        assert world.sheet.lost.eq(0).all() and world.sheet.jumps.any()


# Frames


def test_a_frame_jumps_silicon_as_often_as_its_dose_says():
    """20 Å, 2 s, 40 pA at 60 keV: half a per cent. Thirty times the current, so that 4,000 rows can tell."""
    assert 1.0 - math.exp(-3.0 * 0.1237 * BARN * DOSE) == pytest.approx(0.005, abs=0.0005)
    world = World(4000, KineticsModel(jumps=EVEN))
    world.take_frame(world.frame(current_pa=1200.0))
    chance = 1.0 - math.exp(-30.0 * 3.0 * 0.1237 * BARN * DOSE)
    seen = float((world.sheet.jumps > 0).float().mean())
    assert seen == pytest.approx(chance, abs=3 * (chance * (1 - chance) / 4000) ** 0.5)


def test_a_frame_does_nothing_outside_itself():
    world = World(300, KineticsModel(jumps=EVEN))
    frame = world.frame(1e4, side_ang=4.0)
    frame.centre_ang[:] = world.dopant_ang() + 7.0
    world.take_frame(frame)
    assert world.sheet.jumps.eq(0).all()


def test_a_frame_knocks_out_what_is_inside_at_the_rate_of_its_dose():
    world = pristine_world(2000)
    half = world.frame(side_ang=10.0, current_pa=30.0)
    inside = nearest_image(world.sheet.xy_ang, world.sheet.cell_ang.unsqueeze(1)).abs().amax(-1) <= 5.0
    expected = 0.3363 * BARN * half.dose_e_per_ang2 * (inside & world.sheet.present).sum(1)
    assert 0.1 < float(expected.mean()) < 1.0
    events = world.take_frame(half)
    lost = world.sheet.lost.double()
    # Few enough that the dearer carbon at the edges of the first vacancies adds little.
    first = 1.0 - torch.exp(-expected.double())
    seen = float((lost > 0).double().mean())
    assert seen == pytest.approx(float(first.mean()), abs=3 * 0.5 / 2000**0.5)
    struck = torch.cat([event.site[event.kind == KNOCK_OUT] for event in events[:1]])
    hit = (events[0].kind == KNOCK_OUT).nonzero().squeeze(1)
    assert inside[hit, struck].all()


def test_the_beam_passes_a_neighbour_once():
    """So much dose that every neighbour passed is a jump: the slow axis pushes the dopant before it to the edge."""
    world = World(300, KineticsModel(jumps=EVEN))
    world.take_frame(world.frame(1e5))
    x, y = nearest_image(world.dopant_ang(), world.sheet.cell_ang).unbind(1)
    assert ((y > 10.0 - 1.5) | (x.abs() > 10.0 - 1.5)).all()
    assert float((y > 10.0 - 1.5).float().mean()) > 0.5
    assert world.sheet.jumps.max() < 40


# Healing and capture, with the beam on elsewhere and with no beam at all


@pytest.mark.parametrize("with_beam", [False, True])
def test_vacancies_heal_and_catch_at_their_rates(with_beam):
    model = KineticsModel(healing_per_s=0.05, capture_per_s=0.15, damage=None)
    world = World(2000, model, slots=2)
    place = world.dopant_ang() + 8.0
    for _ in range(2):
        world.happen(KNOCK_OUT, site=torch.where(world.sheet.present, world.densities(place), -1.0).argmax(1))
    if with_beam:
        events = world.dwell(world.beam(place, [1.0, 1.0]))
    else:
        events = world.take_frame(world.frame(2.0, current_pa=0.0))
    first = events[0].kind
    chance = 1.0 - math.exp(-2.0 * 2.0 * 0.2)
    assert float((first >= HEALING).float().mean()) == pytest.approx(chance, abs=3 * 0.5 / 2000**0.5)
    caught = float((first == CAPTURE).sum() / (first >= HEALING).sum())
    assert caught == pytest.approx(0.75, abs=0.045)


def test_without_a_free_slot_nothing_is_caught():
    world = World(300, KineticsModel(capture_per_s=5.0, damage=None))
    world.happen(KNOCK_OUT, site=world.far_site())
    assert all((event.kind == NOTHING).all() for event in world.take_frame(world.frame(10.0, current_pa=0.0)))


# Other dopants


def of(element: str, rows: int = 3000) -> World:
    return World(rows, dopants=(Dopant(element=element, window_ang=12.0),))


def test_phosphorus_does_what_was_published_about_it():
    """Shares of the first event as of 0.05, 0.01, 11.2 and 0.07 barn; a turned bond turns back, and nothing else."""
    world = of("P", 4000)
    place = world.neighbour_ang()
    event, when = world.first(world.beam(place, [50.0]))
    total = 0.05 + 0.01 + 11.2 + 0.07
    shares = [float((event.kind == kind).float().mean()) for kind in (EXCHANGE, EJECTION, ROTATION, REPLACEMENT)]
    assert shares == pytest.approx([part / total for part in (0.05, 0.01, 11.2, 0.07)], abs=0.005)
    assert exponential(when[:3000], 1.003 * PER_S * total * world.densities(place).amax(1)[:3000]) > 0.01
    world.happen(ROTATION)
    event, when = world.first(world.beam(place, [50.0]))
    assert (event.kind == REVERSAL).all() and (event.neighbour == 0).all()
    assert exponential(when[:3000], PER_S * 200.0 * world.densities(place).amax(1)[:3000]) > 0.01


def test_nitrogen_turns_and_turns_back():
    world = of("N", 500)
    place = world.neighbour_ang()
    event, _ = world.first(world.beam(place, [500.0]))
    assert (event.kind == ROTATION).all()
    world.happen(ROTATION)
    event, when = world.first(world.beam(place, [500.0]))
    assert (event.kind == REVERSAL).all()
    assert exponential(when, PER_S * 22.0 * world.densities(place).amax(1)) > 0.01
    assert world.sheet.jumps.eq(0).all()


@pytest.mark.parametrize("damage", [True, False])
@pytest.mark.parametrize("element", ["P", "N", "Al"])
def test_energies_that_the_published_rates_do_not_cover_are_refused(element, damage):
    model = KineticsModel() if damage else KineticsModel(damage=None)
    dopants = (Dopant(element=element, window_ang=12.0),)
    World(1, model, 62.0, dopants=dopants)
    with pytest.raises(ConfigError, match=rf"rates of {element} are for 60 keV; the beam has 80 keV.*57 to 63 keV"):
        World(1, model, 80.0, dopants=dopants)


def test_a_dopant_without_rates_is_refused_until_they_are_given():
    dopants = (Dopant(element="Sn", window_ang=12.0),)
    with pytest.raises(ConfigError, match=r"No rates are known for Sn .*kinetics.rates.Sn"):
        World(1, dopants=dopants)
    given = KineticsModel(rates={"Sn": PublishedRates(energy_kev=80.0, exchange_barn=2.0)})
    world = World(500, given, 80.0, dopants=dopants)
    event, _ = world.first(world.beam(world.neighbour_ang(), [100.0]))
    assert (event.kind == EXCHANGE).all()


def test_rates_of_what_is_no_element_are_refused():
    with pytest.raises(ConfigError, match="Unknown element 'Xx'"):
        World(1, KineticsModel(rates={"Xx": PublishedRates()}))


# Rows


def test_rows_do_not_depend_on_their_neighbours():
    """100 keV, healing, several events: rows 2 and 5 alone do what they do among eight."""
    model = KineticsModel(healing_per_s=0.2, capture_per_s=0.2)

    def play(world: World) -> World:
        for _ in range(3):
            world.dwell(world.beam(world.neighbour_ang(2), [0.1, 0.2]))
            world.take_frame(world.frame(2.0))
        return world

    among = play(World(8, model, 100.0, slots=3))
    alone = play(World(1, model, 100.0, slots=3, seeds=range(5, 6)))
    assert among.sheet.jumps.sum() + among.sheet.lost.sum() > 16
    expected = buffers(among.sheet)
    for name, value in buffers(alone.sheet).items():
        assert torch.equal(value[0], expected[name][5]), name
