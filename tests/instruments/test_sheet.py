"""The sheet under the beam: traces that tell of a jump, drift that moves the flux, and a finder with honest errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stem_gym.core.conformance import check_instrument
from stem_gym.core.errors import CapabilityError, ConfigError, InstructionError
from stem_gym.core.instructions import ATOMS, FULL_FRAME, Dwell, Park, Read, Reading, Scan, Set, TraceRule, Wait
from stem_gym.core.periodic import nearest_image
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.instruments import make
from stem_gym.instruments.sheet import SheetMicroscope
from stem_gym.simulator.damage import displacement_cross_section
from stem_gym.simulator.event_rates import PUBLISHED
from stem_gym.simulator.flux import density_at
from stem_gym.simulator.sheet import look

FOV_ANG = 25.0
ELECTRONS_PER_PA_S = 6.241509e6
STILL = {"speed_ang_per_s": 0.0}
EXACT = {"position_sd_ang": 0.0, "shift_sd_ang": 0.0, "bond_sd_ang": 0.0}
NEVER = {"jumps": {"kind": "map", "peak_per_s": {"low": 0.0, "high": 0.0}}, "damage": None}
OFTEN = {"jumps": {"kind": "cross_section", "exchange_ev": 12.9, "exchange_far_ev": 12.9}, "damage": None}  # 1 /s


def silicon(count: int = 1, **more: Any) -> dict[str, Any]:
    """A recipe with so many Si."""
    return {"kind": "graphene", "cell_ang": 30.0, "dopants": [
        {"element": "Si", "count_min": count, "count_max": count, "window_ang": 12.0}], **more}  # fmt: skip


def settings(**changes: Any) -> dict[str, Any]:
    """Still and exact, unless told otherwise."""
    detector = {"saturation": 1e9}
    base = {"kind": "sheet", "fov_ang": FOV_ANG, "specimen": silicon(), "drift": STILL, "finder": EXACT}
    return base | {"detector": detector, "overheads": {"scan_s": 0.05}} | changes


def column(rows: int = 1, seed: int = 0, **changes: Any) -> SheetMicroscope:
    """A sheet microscope that has been reset."""
    instrument = make("sheet", settings(**changes), rows, torch.device("cpu"))
    streams = Streams(row_seeds(seed, rows))
    streams.next_episode(torch.arange(rows))
    instrument.reset(streams, torch.arange(rows))
    return instrument


def every(instrument: SheetMicroscope) -> Tensor:
    return torch.arange(instrument.rows)


def scan(
    instrument: SheetMicroscope, region: tuple[float, ...] = FULL_FRAME, seconds: float = 2.0, fov_ang: float = FOV_ANG
) -> Reading:
    """A frame of 64 × 64 pixels that takes this beam time."""
    rows = every(instrument)
    one = torch.ones(len(rows))
    where = torch.tensor(region).repeat(len(rows), 1)
    return instrument.execute(Scan(rows, one * fov_ang, (64, 64), one * seconds / 4096, where, (ATOMS,)))


def dwell(instrument: SheetMicroscope, place: Tensor, time_s: float, **more: Any) -> Reading:
    """Park at `place` (B, 2) and dwell."""
    rows = every(instrument)
    instrument.execute(Park(rows, place[:, 0], place[:, 1]))
    return instrument.execute(Dwell(rows, torch.full((len(rows),), time_s), **{"trace": 16} | more))


def true_place(instrument: SheetMicroscope, offset_ang: Tensor | float = 0.0) -> Tensor:
    """(B, D, 2) where the dopants are in fractions of the frame, moved by an offset in Å, from truth."""
    truth = instrument.truth()
    place = truth["dopant_xy_ang"] + offset_ang - truth["frame_centre_ang"].unsqueeze(1)
    return nearest_image(place, truth["cell_ang"].unsqueeze(1)) / truth["fov_ang"][:, None, None] + 0.5


def towards(instrument: SheetMicroscope, neighbour: int = 0) -> Tensor:
    """(B, 2) in fractions of the frame: a neighbour of the first dopant."""
    bond = look(instrument._now.sheet, every(instrument)).bond_ang[:, :1, neighbour]
    return true_place(instrument, bond)[:, 0]


def test_the_contract_holds():
    for rows in (1, 3):
        check_instrument(column(rows, drift={"speed_ang_per_s": 0.3}, finder={}, specimen=silicon(2)))
    check_instrument(column(2, kinetics={"contamination": {}}, pictures=True))
    check_instrument(column(2, energies_kev=(80.0, 100.0)))
    check_instrument(column(2, kinetics={"healing_per_s": 0.1, "capture_per_s": 0.1}, free_slots=2))


# What a frame tells


def test_atoms_are_told_where_they_are_neither_flipped_nor_transposed():
    """Against an independent account: the lattice itself, and where the frame lies, eight drifted rows."""
    instrument = column(8, specimen=silicon(3, separation_ang=3.0), drift={"speed_ang_per_s": 0.6}, kinetics=NEVER)
    for _ in range(2):
        reading = scan(instrument)
    sheet, offset = instrument._now.sheet, instrument._now.drift.offset_ang
    assert offset.abs().max() > 1.0
    for row in range(8):
        foreign = sheet.xy_ang[row, (sheet.atomic_number[row] == 14) & sheet.present[row]]
        expected = nearest_image(foreign + offset[row], sheet.cell_ang[row]) / FOV_ANG + 0.5
        seen = reading.data[ATOMS][row]
        assert (seen[:-1, 0] <= seen[1:, 0]).all(), "sorted along x"
        nearest = torch.cdist(seen, expected)
        assert nearest.amin(1).max() < 1e-5 and nearest.amin(0).max() < 1e-5


def test_bonds_lead_to_carbon_and_belong_to_their_atoms():
    instrument = column(8, specimen=silicon(3), kinetics=NEVER)
    reading = scan(instrument)
    sheet = instrument._now.sheet
    ends = (reading.data[ATOMS].unsqueeze(2) - 0.5) * FOV_ANG + reading.data["bonds_ang"]  # (B, D, 3, 2)
    away = ends.flatten(1, 2).unsqueeze(2) - sheet.xy_ang.unsqueeze(1)
    away = nearest_image(away, sheet.cell_ang[:, None, None]).norm(dim=-1)
    nearest = away.argmin(2)
    assert away.amin(2).max() < 1e-3
    assert sheet.atomic_number.gather(1, nearest).eq(6).all()
    assert torch.allclose(reading.data["bonds_ang"].norm(dim=-1), torch.tensor(1.42), atol=0.05)


def test_a_part_of_a_frame_shows_what_is_inside_it():
    instrument = column(40, specimen=silicon(3), kinetics=NEVER)
    place = true_place(instrument)
    reading = scan(instrument, (0.3, 0.5, 0.4, 0.5))
    inside = ((place > torch.tensor([0.3, 0.5])) & (place < torch.tensor([0.7, 1.0]))).all(-1)
    assert torch.equal(reading.data[ATOMS].isfinite().all(-1).sum(1), inside.sum(1))
    assert 0 < inside.sum() < inside.numel()


def test_the_shift_is_what_the_sample_moved_since_the_last_frame():
    instrument = column(4, drift={"speed_ang_per_s": 0.5}, kinetics=NEVER)
    offsets, shifts = [torch.zeros(4, 2)], []
    for wait_s in (0.0, 3.0, 1.0):
        instrument.execute(Wait(every(instrument), torch.full((4,), wait_s)))
        shifts.append(scan(instrument).data["shift_ang"])
        offsets.append(instrument._now.drift.offset_ang.clone())
    for shift, before, after in zip(shifts, offsets[:-1], offsets[1:], strict=True):
        assert torch.allclose(shift, after - before, atol=1e-5) and shift.abs().max() > 0.1


@pytest.mark.parametrize(("seconds", "blur"), [(2.0, 1.0), (0.5, 2.0), (8.0, 0.5)])
def test_the_errors_of_the_finder_fall_with_the_root_of_the_dose(seconds, blur):
    """0.05, 0.03 and 0.02 Å at 40 pA, 2 s, 25 Å: a quarter of the dose doubles them."""
    finder = {"position_sd_ang": 0.05, "shift_sd_ang": 0.03, "bond_sd_ang": 0.02}
    instrument = column(1500, finder=finder, kinetics=NEVER)
    truth = true_place(instrument)
    reading = scan(instrument, seconds=seconds)
    errors = {
        0.05: (reading.data[ATOMS] - truth) * FOV_ANG,
        0.03: reading.data["shift_ang"],
        0.02: reading.data["bonds_ang"] - look(instrument._now.sheet, every(instrument)).bond_ang,
    }
    for sd, error in errors.items():
        assert float(error.std()) == pytest.approx(sd * blur, rel=0.06)
        assert float(error.mean()) == pytest.approx(0.0, abs=4.0 * sd * blur / error.numel() ** 0.5)


def test_atoms_are_missed_and_seen_where_none_are_as_often_as_it_says():
    instrument = column(4000, finder=EXACT | {"missed": 0.1, "spurious": 0.2}, kinetics=NEVER)
    truth, seen = true_place(instrument), scan(instrument).data[ATOMS]
    missed = seen.isnan().all(-1)
    wrong = (seen - truth).norm(dim=-1) * FOV_ANG > 0.01
    assert float(missed.float().mean()) == pytest.approx(0.1, abs=0.015)
    assert float(wrong.float().mean()) == pytest.approx(0.9 * 0.2, abs=0.02)
    assert seen[wrong].mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.035), "anywhere in the frame"


# Dwells


def test_the_trace_rises_when_silicon_jumps_under_the_beam():
    """The beam on a neighbour: before the jump carbon and the tail of Si, afterwards Si itself."""
    instrument = column(200, kinetics=OFTEN)
    trace = dwell(instrument, towards(instrument), 4.0).data["trace"]
    jumped = instrument.truth()["jumps"] > 0
    assert float(jumped.float().mean()) > 0.9
    once = instrument.truth()["jumps"] == 1
    rise = trace[once, -1] / trace[once, 0] - 1.0
    late = trace[once, 0] < trace[once].mean(1)  # those whose first sample was before the jump
    assert late.sum() > 50 and (rise[late] > 0.13).all()
    quiet = column(50, kinetics=NEVER)
    still = dwell(quiet, towards(quiet), 4.0).data["trace"]
    assert (still / still.mean(1, keepdim=True) - 1.0).abs().max() < 0.04


def test_the_rule_stops_the_dwell_and_only_the_time_used_is_spent():
    instrument = column(100, kinetics=OFTEN)
    before = instrument.execute(Read(every(instrument), "clock_s")).data["value"]
    reading = dwell(instrument, towards(instrument), 16.0, stop=TraceRule(0.13, 0.04, 1, 1))
    used = reading.data["trace"].isfinite().sum(1)
    assert (used < 16).sum() > 80, "a second each: most jump well before the end"
    assert torch.allclose(reading.seconds, used.float())
    assert torch.allclose(reading.electrons, 40.0 * ELECTRONS_PER_PA_S * reading.seconds, rtol=1e-5)
    clock = instrument.execute(Read(every(instrument), "clock_s")).data["value"]
    assert torch.allclose(clock - before, reading.seconds, atol=1e-4)
    last = reading.data["trace"].gather(1, (used - 1).unsqueeze(1)).squeeze(1)
    stopped = used < 16
    assert (last[stopped] >= 1.13 * reading.data["trace"][stopped, 0]).all()
    at_the_beam = (true_place(instrument)[:, 0] - reading.data["place"]).norm(dim=1) * FOV_ANG < 0.1
    assert at_the_beam[stopped].float().mean() > 0.95, "stopped in time, silicon is where the beam is"
    assert instrument.truth()["jumps"][stopped].float().mean() < 1.3


def test_a_fall_stops_a_beam_that_drifts_off():
    instrument = column(50, kinetics=NEVER, drift={"speed_ang_per_s": 0.5})
    reading = dwell(instrument, true_place(instrument)[:, 0], 16.0, stop=TraceRule(None, 0.2, 1, 1))
    assert (reading.seconds < 16.0).float().mean() > 0.8
    assert (instrument.execute(Read(every(instrument), "clock_s")).data["value"] == reading.seconds).all()


def test_drift_moves_the_flux():
    """Parked on a neighbour of a sample that flees at 20 Å/s nothing jumps; standing still it does."""
    for speed, least, most in ((0.0, 0.9, 1.0), (20.0, 0.0, 0.35)):
        instrument = column(200, kinetics=OFTEN, drift={"speed_ang_per_s": speed, "correlation_s": 1e4})
        place = true_place(instrument)[:, 0]
        bond = look(instrument._now.sheet, every(instrument)).bond_ang[:, 0, 0]
        dwell(instrument, place + bond / FOV_ANG, 4.0)
        assert least <= float((instrument.truth()["jumps"] > 0).float().mean()) <= most, speed


def test_a_beam_that_leads_a_drifting_sample_hits_it():
    """The frame's middle is where truth says: place = middle of the frame − drift of the dwell."""
    instrument = column(300, kinetics=OFTEN, drift={"speed_ang_per_s": 0.5, "correlation_s": 1e4})
    scan(instrument)
    lead = instrument._now.drift.velocity_ang_per_s * 1.0 / FOV_ANG
    dwell(instrument, towards(instrument) + lead, 2.0, trace=64)
    led = float((instrument.truth()["jumps"] > 0).float().mean())
    other = column(300, kinetics=OFTEN, drift={"speed_ang_per_s": 0.5, "correlation_s": 1e4})
    scan(other)
    dwell(other, towards(other) - 2.0 * lead, 2.0, trace=64)
    assert led > 0.7 > 1.5 * float((other.truth()["jumps"] > 0).float().mean())


# Ledger


@pytest.mark.parametrize(("name", "axis"), [("beam_shift_x_ang", 0), ("beam_shift_y_ang", 1)])
def test_the_beam_shift_moves_the_view_and_is_no_drift(name, axis):
    """By 3 Å on one axis: atoms are seen 3 Å back, the shift since the last frame is the sample's own, none."""
    instrument = column(4, kinetics=NEVER)
    before, centre = scan(instrument), instrument.truth()["frame_centre_ang"].clone()
    for value in (1.0, 3.0):
        reading = instrument.execute(Set(every(instrument), name, torch.full((4,), value)))
    after = scan(instrument)
    moved = torch.zeros(2)
    moved[axis] = 3.0
    assert torch.allclose((after.data[ATOMS] - before.data[ATOMS]) * FOV_ANG, -moved.expand(4, 1, 2), atol=1e-4)
    assert torch.allclose(instrument.truth()["frame_centre_ang"] - centre, moved.expand(4, 2), atol=1e-5)
    assert after.data["shift_ang"].abs().max() < 1e-5
    assert reading.seconds.tolist() == pytest.approx([0.1] * 4) and reading.electrons.sum() == 0.0
    assert instrument.execute(Read(every(instrument), name)).data["value"].tolist() == [3.0] * 4


def test_after_a_beam_shift_the_beam_is_where_the_frame_says():
    """The trace on the atom, parked by the new frame's account, is as bright as before."""
    instrument = column(4, kinetics=NEVER)
    bright = dwell(instrument, true_place(instrument)[:, 0], 1.0).data["trace"].mean(1)
    instrument.execute(Set(every(instrument), "beam_shift_x_ang", torch.full((4,), 4.0)))
    seen = scan(instrument).data[ATOMS][:, 0]
    again = dwell(instrument, seen, 1.0).data["trace"].mean(1)
    assert torch.allclose(again, bright, rtol=0.02)


def exchanges(instrument: SheetMicroscope, seconds: float) -> Tensor:
    """(B,) jumps in a dwell beside a neighbour."""
    before = instrument.truth()["jumps"].clone()
    dwell(instrument, towards(instrument), seconds)
    return instrument.truth()["jumps"] - before


def test_the_rates_follow_the_energy_row_by_row():
    """PHYSICS: the exchange cross section is 0.124 barn at 60 keV, and 1.05 at 65 keV by the same formula."""
    rows = 1500
    instrument = column(rows, energies_kev=(65.0,))
    half = torch.arange(0, rows, 2)
    reading = instrument.execute(Set(half, "energy_kev", torch.full((len(half),), 65.0)))
    assert reading.seconds.tolist() == [30.0] * len(half) and reading.data["energy_kev"].tolist() == [65.0] * len(half)
    low = torch.arange(1, rows, 2)
    barn = [float(displacement_cross_section(energy, 6, 12.011, 13.5, 3.17e5)) for energy in (65.0, 60.0)]
    jumped = exchanges(instrument, 0.3) > 0
    shares = [float(jumped[which].float().mean()) for which in (half, low)]
    density = [float(instrument._now.density[which, 0].mean()) for which in (half, low)]
    for share, sigma, peak in zip(shares, barn, density, strict=True):
        expected = 1.0 - math.exp(-1e-8 * sigma * peak * 40.0 * ELECTRONS_PER_PA_S * 0.3)
        assert abs(share - expected) < 4.0 * math.sqrt(expected * (1.0 - expected) / (rows / 2)) + 0.01
    assert density[0] > 1.01 * density[1], "a faster electron has a sharper probe"
    again = instrument.execute(Set(every(instrument), "energy_kev", torch.full((rows,), 65.0)))
    assert torch.equal(again.seconds > 0.0, torch.arange(rows) % 2 == 1), "whoever is there already waits for nothing"
    instrument.execute(Set(every(instrument), "energy_kev", torch.full((rows,), 60.0)))
    assert instrument._now.sheet.barn[:, 0].unique().numel() == 3, "and back: exchange, ejection, nothing"
    fresh = column(1)
    assert torch.allclose(instrument._now.sheet.barn[:1], fresh._now.sheet.barn)


def test_the_signal_follows_the_energy():
    """Rutherford: heavier atoms scatter less at a higher energy; the trace is that of a column made at that energy."""
    never = NEVER | {"jumps": NEVER["jumps"] | {"valid_kev": {"low": 60.0, "high": 80.0}}}
    instrument = column(1, energies_kev=(80.0,), kinetics=never)
    instrument.execute(Set(every(instrument), "energy_kev", torch.tensor([80.0])))
    other = column(1, probe={"energy_kev": 80.0}, kinetics=NEVER)
    traces = [dwell(one, true_place(one)[:, 0], 1.0).data["trace"].mean() for one in (instrument, other, column(1))]
    assert float(traces[0]) == pytest.approx(float(traces[1]), rel=0.01)
    assert float(traces[0]) < 0.8 * float(traces[2])


def test_an_energy_that_is_not_aligned_is_refused():
    instrument = column(2, energies_kev=(65.0, 55.0))
    with pytest.raises(InstructionError, match="one of 60, 65, 55; given .*58"):
        instrument.execute(Set(every(instrument), "energy_kev", torch.tensor([60.0, 58.0])))
    with pytest.raises(InstructionError, match="55, 65"):
        instrument.execute(Set(every(instrument), "energy_kev", torch.tensor([60.0, 80.0])))
    with pytest.raises(CapabilityError, match="energy_kev"):
        column(1).execute(Set(torch.tensor([0]), "energy_kev", torch.tensor([60.0])))


MAP = {"kind": "map", "valid_kev": {"low": 58.0, "high": 66.0}}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kinetics": {"jumps": {"kind": "map"}}}, "do not say for which they hold"),
        ({"kinetics": {"jumps": {"kind": "lorentzian"}}}, "The toy's rates"),
        ({"kinetics": {"jumps": MAP}, "energies_kev": (55.0, 65.0)}, "holds for 58 to 66 keV.*given 55 keV"),
        ({"kinetics": {"jumps": MAP}, "probe": {"energy_kev": 80.0}, "energies_kev": ()}, "58 to 66"),
        ({"specimen": {"kind": "graphene", "dopants": [{"element": "P", "count_min": 1, "count_max": 1}]},
          "energies_kev": (80.0,)}, "57 to 63 keV"),
        ({"pictures": True}, "made for one beam energy"),
        ({"kinetics": {"outcomes": "surrogate"}, "energies_kev": (300.0,)}, "300"),
    ],
)  # fmt: skip
def test_energies_that_the_rates_do_not_cover_are_refused_with_the_range(changes, why):
    with pytest.raises(ConfigError, match=why):
        column(1, **{"energies_kev": (65.0,)} | changes)


def test_a_map_that_says_so_holds_at_its_energies():
    instrument = column(1, energies_kev=(65.0,), kinetics={"jumps": MAP})
    assert instrument.execute(Set(every(instrument), "energy_kev", torch.tensor([65.0]))).seconds.tolist() == [30.0]


SOILED = {"layers_per_dose": 1e-9, "layers_per_s": 0.0, "pin_layers": 0.5, "buried_layers": 2.0}
CARBON_PER_ANG2 = 4.0 / (3.0 * math.sqrt(3.0) * 1.42**2)


def beside_all(instrument: SheetMicroscope) -> Tensor:
    """(B, 2) in fractions of the frame: the middle of the hexagon that is farthest from the dopant, about."""
    return torch.remainder(true_place(instrument)[:, 0] + 0.5 * 14.76 / FOV_ANG, 1.0)


def test_haze_brightens_the_trace_by_what_so_many_layers_of_carbon_scatter():
    """One layer everywhere, by time alone, doubles the signal of the bare sheet, and is seen in a frame alike."""
    instrument = column(2, kinetics=NEVER | {"contamination": SOILED | {"layers_per_dose": 0.0, "layers_per_s": 0.01}},
                        pictures=True)  # fmt: skip
    place = beside_all(instrument)

    def look_at_it() -> tuple[float, float]:
        rows, one = every(instrument), torch.ones(2)
        where = torch.tensor(FULL_FRAME).repeat(2, 1)
        frame = Scan(rows, one * FOV_ANG, (64, 64), one * 1e-5, where, (ATOMS, "haadf"))
        image = instrument.execute(frame).data["images"]
        return float(dwell(instrument, place, 0.1).data["trace"].sum()), float(image.mean())

    before = look_at_it()
    instrument.execute(Wait(every(instrument), torch.full((2,), 100.0)))
    after = look_at_it()
    assert after[0] / before[0] == pytest.approx(2.0, rel=0.05)
    sheet = instrument._now.sheet
    carbon = float(instrument._now.weight_ang2[0, 6])
    added = CARBON_PER_ANG2 * carbon * 40.0 * ELECTRONS_PER_PA_S * 1e-5
    assert (after[1] - before[1]) == pytest.approx(added, rel=0.1)
    assert torch.allclose(sheet.cover, torch.full_like(sheet.cover, 2.0), atol=0.01), "one layer in units of half a one"


def test_contamination_grows_with_the_dose_where_the_beam_was_and_nowhere_else():
    """By hand: flux of the probe at the nearest sites times the time that was used times the growth per dose."""
    instrument = column(3, kinetics=NEVER | {"contamination": SOILED})
    place = beside_all(instrument)
    dwell(instrument, place, 2.0)
    state = instrument._now
    on_sheet = (place - 0.5) * FOV_ANG + instrument.truth()["frame_centre_ang"]
    away = nearest_image(state.sheet.xy_ang - on_sheet.unsqueeze(1), state.sheet.cell_ang.unsqueeze(1)).norm(dim=-1)
    for row in range(3):
        flux = density_at(state.density[row : row + 1], away[row : row + 1])[0] * 40.0 * ELECTRONS_PER_PA_S
        assert torch.allclose(0.5 * state.sheet.cover[row], 1e-9 * flux * 2.0, rtol=1e-3, atol=1e-6)
    assert state.sheet.cover[away > 8.0].max() == 0.0
    assert state.sheet.cover.max() > 0.1


def test_a_frame_soils_its_own_area_by_its_own_dose():
    instrument = column(2, kinetics=NEVER | {"contamination": SOILED | {"layers_per_dose": 1e-6}})
    reading = scan(instrument, region=(0.0, 0.0, 0.5, 0.5))
    cover = 0.5 * instrument._now.sheet.cover
    dose = float(reading.electrons_per_ang2[0])
    assert sorted(cover.unique().tolist()) == pytest.approx([0.0, 1e-6 * dose], rel=1e-4)
    share = float((cover > 0).sum() / (instrument._now.sheet.atomic_number > 0).sum())
    assert share == pytest.approx(12.5**2 / 30.0**2, rel=0.25)


def test_a_dopant_under_contamination_jumps_less_and_is_seen_no_longer():
    """Half a layer, pin_layers: e times as rarely. Two and a half: buried."""
    rows = 1200
    soiled = {"jumps": OFTEN["jumps"], "damage": None, "contamination": SOILED | {
        "layers_per_s": 0.01, "layers_per_dose": 0.0}}  # fmt: skip
    clean, dirty = column(rows, kinetics=OFTEN), column(rows, kinetics=soiled)
    dirty.execute(Wait(every(dirty), torch.full((rows,), 50.0)))
    rates = []
    for one in (clean, dirty):
        share = float((exchanges(one, 0.3) > 0).float().mean())
        rates.append(-math.log(1.0 - share))
    assert rates[0] / rates[1] == pytest.approx(math.e, rel=0.25)
    assert scan(dirty).data[ATOMS].isfinite().all()
    dirty.execute(Wait(every(dirty), torch.full((rows,), 200.0)))
    assert scan(dirty).data[ATOMS].isnan().all(), "buried"


def test_a_clean_sheet_stays_clean():
    instrument = column(1)
    dwell(instrument, beside_all(instrument), 5.0)
    assert instrument._now.sheet.cover.shape == (1, 0)


def test_germanium_is_assumed_to_do_as_silicon_does_and_follows_the_energy():
    germanium = silicon() | {"dopants": [{"element": "Ge", "count_min": 1, "count_max": 1, "window_ang": 12.0}]}
    assert "Ge" not in PUBLISHED
    for energy in (60.0, 80.0):
        one, other = (column(2, specimen=kind, probe={"energy_kev": energy}) for kind in (germanium, silicon()))
        assert torch.equal(one._now.sheet.barn, other._now.sheet.barn) and one._now.sheet.barn.max() > 0.1
        assert one._now.sheet.near.atomic_number.eq(32).all()
    bright, dim = (dwell(one, true_place(one)[:, 0], 0.1).data["trace"].mean() for one in (one, other))
    assert bright > 2.5 * dim


def test_time_and_dose_are_booked():
    instrument = column(2)
    reading = scan(instrument, seconds=2.0)
    electrons = 40.0 * ELECTRONS_PER_PA_S * 2.0
    assert reading.seconds.tolist() == pytest.approx([2.05] * 2)
    assert reading.electrons.tolist() == pytest.approx([electrons] * 2, rel=1e-5)
    assert reading.electrons_per_ang2.tolist() == pytest.approx([electrons / 625.0] * 2, rel=1e-5)
    half = scan(instrument, (0.0, 0.0, 0.5, 0.5), seconds=2.0)
    assert half.electrons_per_ang2.tolist() == pytest.approx([4.0 * electrons / 625.0] * 2, rel=1e-5)
    parked = dwell(instrument, torch.full((2, 2), 0.5), 1.0)
    assert parked.electrons.tolist() == pytest.approx([electrons / 2.0] * 2, rel=1e-5)
    assert parked.electrons_per_ang2.tolist() == pytest.approx([0.787 * electrons / 2.0] * 2, rel=2e-3)
    assert instrument._now.electrons.tolist() == pytest.approx([2.5 * electrons] * 2, rel=1e-5)
    clock = instrument.execute(Read(every(instrument), "clock_s")).data["value"]
    assert clock.tolist() == pytest.approx([2.05 + 2.05 + 1.0] * 2)


def test_a_wait_heals_and_costs_no_dose():
    instrument = column(300, kinetics={"healing_per_s": 0.1}, specimen=silicon(vacancies_max=1))
    before = instrument.truth()["vacancies"].clone()
    reading = instrument.execute(Wait(every(instrument), torch.full((300,), 10.0)))
    left = instrument.truth()["vacancies"][before == 1].float().mean()
    assert float(left) == pytest.approx(0.368, abs=0.12) and reading.electrons.eq(0).all()
    assert instrument.truth()["lost_atoms"].eq(0).all() and instrument.truth()["jumps"].eq(0).all()


# Rows and snapshots


def play(instrument: SheetMicroscope) -> list[Tensor]:
    """Frames and dwells, and what they said."""
    readings = [scan(instrument)]
    for _ in range(2):
        readings += [dwell(instrument, towards(instrument), 3.0, stop=TraceRule(0.13, 0.04, 1, 1)), scan(instrument)]
    return [value for reading in readings for value in (*reading.data.values(), reading.seconds, reading.electrons)]


def test_a_row_does_not_depend_on_its_neighbours():
    changes = {"drift": {"speed_ang_per_s": 0.2}, "finder": {"missed": 0.1}, "specimen": silicon(2)}
    many = play(column(6, **changes))
    alone = make("sheet", settings(**changes), 1, torch.device("cpu"))
    streams = Streams(row_seeds(0, 6)[4:5])
    streams.next_episode(torch.arange(1))
    alone.reset(streams, torch.arange(1))
    for one, among in zip(play(alone), many, strict=True):
        assert torch.allclose(one[0], among[4], rtol=0.0, atol=0.0, equal_nan=True)


def test_a_snapshot_goes_on_as_it_did():
    instrument = column(3, drift={"speed_ang_per_s": 0.2}, kinetics=OFTEN)
    scan(instrument)
    kept, where = instrument.snapshot(), instrument._streams.snapshot()
    first = play(instrument)
    streams = Streams([0] * 3)
    streams.restore(where)
    instrument.restore(kept, streams)
    for one, other in zip(play(instrument), first, strict=True):
        assert torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


# Bad input


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"probe": {"astigmatism_ang": 5.0}}, "astigmatism_ang must be 0.*given 5"),
        ({"drift": {"scale_error": 0.01}}, "scale_error.*must be 0"),
        ({"drift": {"shear_error": 0.01}}, "shear_error.*must be 0"),
        ({"specimen": {"kind": "graphene"}}, "dopants is empty"),
        ({"specimen": silicon() | {"dopants": [{"element": "Sn"}]}}, "No rates are known for Sn"),
        ({"current_pa": -1.0}, "current_pa"),
        ({"finder": {"missed": 1.0}}, "missed"),
        ({"kinetics": {"jumps": {"kind": "map", "width_ang": {"low": 0.0, "high": 0.0}}}}, "width_ang must"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, why):
    with pytest.raises(ConfigError, match=why):
        column(**changes)


def test_a_sheet_that_can_not_hold_its_dopants_is_refused():
    crowded = silicon(6, separation_ang=10.0)
    with pytest.raises(ConfigError, match=r"only \d of 6 dopants found room"):
        column(4, specimen=crowded)


def test_instructions_that_make_no_sense_are_refused():
    instrument = column()
    with pytest.raises(CapabilityError, match="haadf"):
        instrument.execute(Scan(every(instrument), torch.ones(1) * 20, (8, 8), torch.ones(1) * 1e-4,
                                torch.tensor([FULL_FRAME])))  # fmt: skip
    with pytest.raises(InstructionError, match="inside"):
        scan(instrument, (0.6, 0.0, 0.5, 0.5))
    with pytest.raises(InstructionError, match="no reset options"):
        instrument.reset(instrument._streams, torch.tensor([0]), {"dopants": 3})
    fresh = make("sheet", settings(), 2, torch.device("cpu"))
    with pytest.raises(InstructionError, match="not reset yet"):
        fresh.truth()
    with pytest.raises(InstructionError, match="first reset must start all 2 rows"):
        fresh.reset(Streams([0, 1]), torch.tensor([1]))


def test_a_row_that_waits_for_nothing_draws_nothing_whoever_waits_beside_it():
    places = []
    for other_s in (0.0, 5.0):
        instrument = column(2, drift={"speed_ang_per_s": 0.3})
        rows = torch.arange(2)
        instrument.execute(Wait(rows, torch.tensor([0.0, other_s])))
        instrument.execute(Wait(rows, torch.tensor([2.0, 2.0])))
        places.append(instrument.truth()["frame_centre_ang"][0].clone())
    assert torch.equal(*places)


def test_what_was_not_seen_has_no_bonds():
    instrument = column(200, finder=EXACT | {"missed": 0.4}, kinetics=NEVER)
    data = scan(instrument).data
    missed = data["atoms"].isnan().any(-1)
    assert missed.any() and not missed.all()
    assert data["bonds_ang"][missed].isnan().all() and data["bonds_ang"][~missed].isfinite().all()
