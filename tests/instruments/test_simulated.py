"""The simulated microscope: geometry, dose, statistics, drift, stops, losses.

Frames are bright, so that noise is small.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stem_gym.core.conformance import check_instrument
from stem_gym.core.errors import CapabilityError, ConfigError, InstructionError
from stem_gym.core.instructions import (
    FULL_FRAME,
    Blank,
    Dwell,
    MoveStage,
    Park,
    Read,
    Reading,
    Scan,
    Set,
    TraceRule,
    Wait,
)
from stem_gym.core.periodic import nearest_image
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.core.units import ELECTRONS_PER_PC
from stem_gym.instruments import make
from stem_gym.instruments.simulated import SimulatedMicroscope
from stem_gym.simulator.dose import map_electrons
from stem_gym.simulator.exposure import samples_until

FOV_ANG = 24.0
STILL = {"speed_ang_per_s": 0.0, "diffusion_ang2_per_s": 0.0}
ONE_SI = {
    "kind": "graphene",
    "cell_ang": 30.0,
    "dopants": [{"element": "Si", "count_min": 1, "count_max": 1, "window_ang": 12.0}],
}
CURRENT_PA = 1000.0
PIXEL_DWELL_S = 1e-4  # 6e5 electrons a pixel, of which Si scatters some thousands: noise below 3 % at an atom


def microscope(rows: int = 1, seed: int = 0, **settings: Any) -> SimulatedMicroscope:
    """A still, bright microscope with one Si atom in graphene, reset; settings are merged over that."""
    base = {"kind": "simulated", "fov_ang": FOV_ANG, "current_pa": CURRENT_PA, "specimen": ONE_SI, "drift": STILL}
    instrument = make("simulated", base | settings, rows, torch.device("cpu"))
    streams = Streams(row_seeds(seed, rows))
    streams.next_episode(torch.arange(rows))
    instrument.reset(streams, torch.arange(rows))
    return instrument


def every(instrument: SimulatedMicroscope) -> Tensor:
    return torch.arange(instrument.rows)


def scan(
    instrument: SimulatedMicroscope,
    pixels: int | tuple[int, int] = 64,
    region: tuple[float, ...] = FULL_FRAME,
    dwell_s: float = PIXEL_DWELL_S,
    rows: Tensor | None = None,
) -> Reading:
    """A frame of FOV_ANG, or a part of it."""
    rows = every(instrument) if rows is None else rows
    n = len(rows)
    shape = (pixels, pixels) if isinstance(pixels, int) else pixels
    full = torch.full((n,), FOV_ANG), torch.full((n,), dwell_s), torch.tensor(region).repeat(n, 1)
    return instrument.execute(Scan(rows, full[0], shape, full[1], full[2]))


def dwell(instrument: SimulatedMicroscope, place: Tensor, time_s: float = 0.01, **more: Any) -> Reading:
    """Park at `place` (B, 2) and dwell."""
    instrument.execute(Park(every(instrument), place[:, 0], place[:, 1]))
    return instrument.execute(Dwell(every(instrument), torch.full((len(place),), time_s), **{"trace": 16} | more))


def fraction(reading: Reading) -> Tensor:
    """Collected fraction of the beam from the counts, by the reading's own calibration."""
    counts, key = (
        (reading.data["images"][:, 0], "electrons_per_pixel")
        if reading.verb == "Scan"
        else (reading.data["trace"], "electrons_per_sample")
    )
    shape = (-1,) + (1,) * (counts.dim() - 1)
    gain, offset, beam = (
        reading.calibration[name].reshape(shape) for name in ("counts_per_electron", "counts_offset", key)
    )
    return (counts - offset) / (gain * beam)


def silicon(instrument: SimulatedMicroscope) -> Tensor:
    """Where the Si atom of each row now is, (B, 2) in fractions of the frame, from truth."""
    truth = instrument.truth()
    site = (truth["atomic_number"] == 14).float().argmax(1)
    atom = truth["atom_xy_ang"][torch.arange(len(site)), site]
    return nearest_image(atom - truth["frame_centre_ang"], truth["cell_ang"]) / truth["fov_ang"][:, None] + 0.5


def brightest(image: Tensor) -> Tensor:
    """Centre of the brightest spot of each image (B, H, W), as fractions (x, y): a 3 x 3 centroid of the peak pixel."""
    height, width = image.shape[1:]
    at = image.flatten(1).argmax(1)
    rows, columns = (at // width).clamp(1, height - 2), (at % width).clamp(1, width - 2)
    step = torch.arange(-1, 2)
    batch = torch.arange(len(image))[:, None, None]
    patch = image[batch, (rows[:, None] + step)[:, :, None], (columns[:, None] + step)[:, None, :]]
    patch = patch - patch.amin((1, 2), keepdim=True)
    total = patch.sum((1, 2))
    dy = (patch.sum(2) * step).sum(1) / total
    dx = (patch.sum(1) * step).sum(1) / total
    return torch.stack(((columns + 0.5 + dx) / width, (rows + 0.5 + dy) / height), dim=1)


def test_the_contract_holds():
    settings = {"removal": {"element": "Si", "cross_section_barn": 1.0}, "contamination_per_dose": 1e-9}
    for rows in (1, 3):
        check_instrument(microscope(rows, drift={"speed_ang_per_s": 0.3}, **settings))


# Geometry


def test_a_frame_is_neither_flipped_nor_transposed():
    """Eight atoms at unrelated places: any flip or transpose misses most of them by Ångströms."""
    instrument = microscope(rows=8)
    seen = brightest(fraction(scan(instrument)))
    # 3 x 3 pixels do not span the peak and neighbours pull at it: a quarter of a pixel of 0.375 Å.
    assert ((seen - silicon(instrument)).abs() * FOV_ANG).max() < 0.12


def test_a_frame_that_is_not_square_in_pixels_keeps_its_axes():
    instrument = microscope(rows=4, seed=2)
    seen = brightest(fraction(scan(instrument, pixels=(48, 96))))
    assert ((seen - silicon(instrument)).abs() * FOV_ANG).max() < 0.2


def test_a_dwell_sees_what_the_frame_shows_there():
    instrument = microscope(rows=2)
    image = fraction(scan(instrument, pixels=32))
    for row, column in ((3, 28), (17, 9), (30, 14)):  # y first, as the image is indexed
        place = torch.tensor([[(column + 0.5) / 32, (row + 0.5) / 32]]).repeat(2, 1)
        seen = fraction(dwell(instrument, place)).mean(1)
        electrons = CURRENT_PA * PIXEL_DWELL_S * ELECTRONS_PER_PC
        assert ((seen - image[:, row, column]).abs() < 6.0 * (image[:, row, column] / electrons).sqrt()).all()
    on_atom = fraction(dwell(instrument, silicon(instrument))).mean(1)
    assert (on_atom > 0.95 * image.amax((1, 2))).all(), "the brightest place is under the probe"


@pytest.mark.parametrize("region", [(0.25, 0.5, 0.5, 0.25), (0.0, 0.0, 0.25, 0.75), (0.5, 0.25, 0.5, 0.5)], ids=str)
def test_a_sub_frame_is_the_crop_of_the_full_frame(region):
    instrument = microscope(rows=2)
    left, top, width, height = (round(32 * part) for part in region)
    full = scan(instrument, pixels=32).data["images"][:, 0, top : top + height, left : left + width]
    part = scan(instrument, (height, width), region).data["images"][:, 0]
    # The difference of two Poisson counts has their sum as variance: chi-square to five standard deviations.
    chi2, freedom = float(((full - part) ** 2 / (full + part)).sum()), full.numel()
    assert abs(chi2 - freedom) < 5.0 * math.sqrt(2.0 * freedom)


def test_the_stage_moves_the_sample_and_the_beam_shift_the_frame():
    instrument = microscope(rows=4)
    before = brightest(fraction(scan(instrument)))
    three, one = torch.full((4,), 3.0), torch.full((4,), -1.0)
    instrument.execute(MoveStage(every(instrument), three, one))
    moved = brightest(fraction(scan(instrument)))
    assert torch.allclose((moved - before) * FOV_ANG, torch.tensor([3.0, -1.0]).expand(4, 2), atol=0.1)
    assert torch.allclose(moved, silicon(instrument), atol=0.12 / FOV_ANG)
    instrument.execute(Set(every(instrument), "beam_shift_x_ang", one * -2.0))
    instrument.execute(Set(every(instrument), "beam_shift_y_ang", one))
    shifted = brightest(fraction(scan(instrument)))
    assert torch.allclose((shifted - moved) * FOV_ANG, torch.tensor([-2.0, 1.0]).expand(4, 2), atol=0.1)
    assert (
        fraction(dwell(instrument, silicon(instrument))).mean(1) > 0.95 * fraction(scan(instrument)).amax((1, 2))
    ).all()


# Time and drift


def test_drift_moves_frame_and_dwell_alike():
    instrument = microscope(rows=6, drift={"speed_ang_per_s": 1.5, "correlation_s": 1e6})
    first = brightest(fraction(scan(instrument, dwell_s=1e-6 * 50)))
    centre = instrument.truth()["frame_centre_ang"].clone()
    instrument.execute(Wait(every(instrument), torch.full((6,), 1.0)))
    drifted = -(instrument.truth()["frame_centre_ang"] - centre)
    second = brightest(fraction(scan(instrument, dwell_s=1e-6 * 50)))
    assert drifted.norm(dim=1).max() > 1.0
    # Between the two frames the sample also moves while they are taken (0.2 s each at up to 3 Å/s).
    ahead = drifted * (1.0 + 0.2048 + 0.05)
    assert torch.allclose((second - first) * FOV_ANG, ahead, atol=0.25)
    on_it = fraction(dwell(instrument, silicon(instrument), time_s=1e-3)).mean(1)
    off_it = fraction(dwell(instrument, silicon(instrument) + 2.5 / FOV_ANG, time_s=1e-3)).mean(1)
    assert (on_it > 2.0 * off_it).all()


def test_every_row_of_a_frame_has_its_own_time():
    """A steady drift (vx, vy) shows the atom where it was when the beam came by: linear between the frame's ends."""
    instrument = microscope(rows=6, drift={"speed_ang_per_s": 1.0, "correlation_s": 1e6}, overheads={"scan_s": 0.0})
    scan(instrument, pixels=8, dwell_s=1e-7)
    start = silicon(instrument)
    seen = brightest(fraction(scan(instrument, dwell_s=2.4e-4)))  # a frame of one second
    end = silicon(instrument)
    when = seen[:, 1:]  # the row's number is its time
    assert ((seen - (start + when * (end - start))).abs() * FOV_ANG).max() < 0.15
    assert ((end - start).norm(dim=1) * FOV_ANG).max() > 0.8


def test_a_frame_takes_its_pixels_its_flyback_and_its_overhead():
    instrument = microscope(detector={"flyback_s": 1e-3}, overheads={"scan_s": 0.25})
    reading = scan(instrument, pixels=(10, 20), dwell_s=2e-4)
    assert float(reading.seconds) == pytest.approx(10 * (20 * 2e-4 + 1e-3) + 0.25)
    assert float(reading.electrons) == pytest.approx(CURRENT_PA * 200 * 2e-4 * 1e-12 / 1.602176634e-19)
    assert float(reading.electrons_per_ang2) == pytest.approx(float(reading.electrons) / FOV_ANG**2)
    clock = instrument.execute(Read(every(instrument), "clock_s")).data["value"]
    assert float(clock) == pytest.approx(float(reading.seconds))


# Dose and counts


def test_the_ledger_is_the_dose_map():
    """Frames, parts of frames and dwells, under drift, distortion and jitter, on different rows."""
    drift = {"speed_ang_per_s": 2.0, "diffusion_ang2_per_s": 0.1, "scale_error": 0.05, "shear_error": 0.05}
    instrument = microscope(rows=3, drift=drift, detector={"line_jitter_ang": 0.3})
    spent = torch.zeros(3, dtype=torch.float64)
    readings = [
        scan(instrument),
        scan(instrument, 16, (0.75, 0.0, 0.25, 0.5), rows=torch.tensor([0, 2])),
        dwell(instrument, torch.rand(3, 2, generator=torch.Generator().manual_seed(1)), time_s=0.7),
        dwell(instrument, torch.ones(3, 2), time_s=0.1, trace=0),
        scan(instrument, (5, 33), (0.1, 0.2, 0.3, 0.4), rows=torch.tensor([1, 2])),
    ]
    for reading in readings:
        spent.index_add_(0, reading.rows, reading.electrons.double())
    truth = instrument.truth()
    in_map = map_electrons(truth["dose_map"], truth["cell_ang"]).double()
    by_own_account = instrument.execute(Read(every(instrument), "electrons")).data["value"].double()
    # float32 sums of some thousand terms
    assert torch.allclose(in_map, spent, rtol=1e-5)
    assert torch.allclose(by_own_account, spent, rtol=1e-6)
    assert len(spent.unique()) == 3


def test_a_dwell_doses_the_parked_place():
    instrument = microscope(rows=4)
    scan(instrument, pixels=8, dwell_s=1e-8)
    dwell(instrument, silicon(instrument), time_s=1.0)
    truth = instrument.truth()
    bins = truth["dose_map"].shape[1]
    peak = truth["dose_map"].flatten(1).argmax(1)
    x, y = (peak % bins + 0.5) / bins * truth["cell_ang"][:, 0], (peak // bins + 0.5) / bins * truth["cell_ang"][:, 1]
    atom = truth["atom_xy_ang"][torch.arange(4), (truth["atomic_number"] == 14).float().argmax(1)]
    away = nearest_image(torch.stack((x, y), 1) - atom, truth["cell_ang"]).abs()
    assert away.max() < 0.51 * float(truth["cell_ang"].max()) / bins, "within half a bin"


def test_counts_of_a_frame_are_poisson():
    """The index of dispersion of 40 repeats of a still frame, over all pixels."""
    instrument = microscope()
    repeats = torch.stack([scan(instrument, 16, dwell_s=4e-6).data["images"][0, 0] for _ in range(40)])
    mean = repeats.mean(0)
    assert (mean > 1.0).all(), "enough counts for chi-square"
    statistic, freedom = float(((repeats - mean) ** 2 / mean).sum()), 39 * 256
    assert abs(statistic - freedom) < 5.0 * math.sqrt(2.0 * freedom)
    assert len(torch.unique(repeats.flatten(1), dim=0)) == 40, "no frame comes twice"


def test_gain_and_offset_are_undone_by_the_calibration():
    plain = fraction(scan(microscope(), 16))
    dressed = fraction(scan(microscope(detector={"gain": 3.0, "offset": 50.0}), 16))
    assert torch.allclose(dressed, plain, rtol=1e-5)


def test_contamination_rises_with_the_dose():
    rate = 1e-12
    instrument = microscope(contamination_per_dose=rate)
    before = fraction(scan(instrument, 16)).mean()
    dwell(instrument, torch.full((1, 2), 0.5), time_s=100.0)
    spent = instrument.execute(Read(every(instrument), "electrons")).data["value"]
    rise = fraction(scan(instrument, 16)).mean() - before
    expected = rate * float(spent) / float(instrument.truth()["cell_ang"].prod())
    assert float(rise) == pytest.approx(expected, rel=0.05)  # the noise of 256 bright pixels is near 1 %


# Controls


def test_defocus_blurs_without_losing_electrons():
    instrument = microscope(rows=2)
    sharp = fraction(scan(instrument))
    instrument.execute(Set(every(instrument), "defocus_ang", torch.full((2,), 150.0)))
    blurred = fraction(scan(instrument))
    assert (blurred.amax((1, 2)) < 0.6 * sharp.amax((1, 2))).all()
    assert torch.allclose(blurred.mean((1, 2)), sharp.mean((1, 2)), rtol=0.05)  # what leaves the frame at its edges
    instrument.execute(Set(torch.tensor([0]), "defocus_ang", torch.zeros(1)))
    again = fraction(scan(instrument)).amax((1, 2))
    assert again[0] > 0.9 * sharp[0].max() and again[1] < 0.6 * sharp[1].max(), "one row is set, its neighbour is not"


def test_the_current_sets_counts_and_dose():
    instrument = microscope()
    first = scan(instrument, 16)
    instrument.execute(Set(every(instrument), "current_pa", torch.tensor([250.0])))
    second = scan(instrument, 16)
    assert float(second.electrons) == pytest.approx(0.25 * float(first.electrons))
    assert float(second.data["images"].mean()) == pytest.approx(0.25 * float(first.data["images"].mean()), rel=0.02)
    assert torch.allclose(fraction(second).mean(), fraction(first).mean(), rtol=0.02)


def test_abort_blanks_and_blank_is_read_back():
    instrument = microscope(rows=2)
    instrument.execute(Blank(every(instrument), torch.tensor([False, True])))
    assert instrument.execute(Read(every(instrument), "blanked")).data["value"].tolist() == [0.0, 1.0]
    instrument.abort()
    assert instrument.execute(Read(every(instrument), "blanked")).data["value"].tolist() == [1.0, 1.0]


# Dwells that stop


def stop_by_hand(trace: list[float], rule: TraceRule) -> int:
    """Samples until the rule stops a whole trace, read off one by one."""
    baseline = sum(trace[: rule.baseline_samples]) / rule.baseline_samples
    for end in range(rule.baseline_samples + 1, len(trace) + 1):
        running = sum(trace[end - rule.window_samples : end]) / rule.window_samples
        if rule.fall is not None and running <= (1.0 - rule.fall) * baseline:
            return end
        if rule.rise is not None and running >= (1.0 + rule.rise) * baseline:
            return end
    return len(trace)


@pytest.mark.parametrize(
    "rule",
    [TraceRule(fall=0.5), TraceRule(rise=0.5), TraceRule(rise=0.4, fall=0.4, baseline_samples=2, window_samples=3)],
    ids=["fall", "rise", "either"],
)  # fmt: skip
def test_the_rule_is_tried_from_the_first_sample_after_the_baseline(rule):
    """Made-up traces, among them some that the very first window stops, the very last one, and none."""
    traces = [
        [10.0] * 4 + [0.0] * 4, [10.0] * 4 + [30.0] * 4, [10.0] * 8, [10.0] * 7 + [0.0], [10.0] * 7 + [99.0],
        [10.0, 0.0] * 4, [0.0] * 8, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 16.0, 1.0],
        [8.0, 8.0, 8.0, 0.0, 0.0, 8.0, 8.0, 8.0],
    ]  # fmt: skip
    used = samples_until(torch.tensor(traces), rule)
    assert used.tolist() == [stop_by_hand(trace, rule) for trace in traces]
    assert rule.baseline_samples + 1 in used and 8 in used


@pytest.mark.parametrize("kind", ["fall", "rise"])
def test_a_dwell_stops_when_its_trace_falls_or_rises(kind):
    """The atom drifts away from the probe, or comes to it; the same dwell without a rule shows the whole trace."""
    rule = TraceRule(**{kind: 0.3})
    runs = []
    for stop in (None, rule):
        instrument = microscope(rows=6, drift={"speed_ang_per_s": 1.0, "correlation_s": 1e6})
        scan(instrument, pixels=8, dwell_s=1e-7)
        here = silicon(instrument)
        instrument.execute(Wait(every(instrument), torch.ones(6)))
        velocity = silicon(instrument) - here  # fractions a second
        place = silicon(instrument) + (velocity if kind == "rise" else 0.0)
        before = silicon(instrument)
        reading = dwell(instrument, place, time_s=2.0, trace=32, stop=stop)
        runs.append((reading, silicon(instrument) - before, velocity))
    (whole, _, _), (stopped, moved, velocity) = runs
    used = torch.tensor([stop_by_hand(trace, rule) for trace in whole.data["trace"].tolist()])
    assert used.min() < 32 and len(used.unique()) > 1, "some stop early, at different times"
    recorded = torch.arange(32) < used[:, None]
    assert torch.equal(torch.isnan(stopped.data["trace"]), ~recorded)
    assert torch.equal(stopped.data["trace"][recorded], whole.data["trace"][recorded])
    assert torch.allclose(stopped.seconds, 2.0 * used / 32)
    assert torch.allclose(stopped.electrons, CURRENT_PA * ELECTRONS_PER_PC * 2.0 * used / 32)
    assert torch.allclose(moved, velocity * stopped.seconds[:, None], atol=1e-3), "drift, too, ran only so long"


# Losses


def test_frames_remove_atoms_at_the_rate_of_their_cross_section():
    rows, barn = 400, 25.0
    instrument = microscope(rows, removal={"element": "Si", "cross_section_barn": barn})
    there = instrument.truth()["present"].clone()
    dose = float(scan(instrument, pixels=16, dwell_s=1e-3).electrons_per_ang2[0])
    truth = instrument.truth()
    is_si = truth["atomic_number"] == 14
    lost = float((is_si & ~truth["present"]).any(1).float().mean())
    expected = 1.0 - math.exp(-barn * 1e-8 * dose)
    assert 0.2 < expected < 0.8
    assert abs(lost - expected) < 4.0 * math.sqrt(expected * (1.0 - expected) / rows)  # binomial, four sigma
    assert torch.equal(truth["present"][~is_si], there[~is_si]), "carbon is not fragile here"


def test_a_lost_atom_is_gone_from_the_image_and_nothing_else_is():
    instrument = microscope(rows=2, removal={"element": "Si", "cross_section_barn": 1e9})
    place, there = silicon(instrument), instrument.truth()["present"].clone()
    peak = fraction(dwell(instrument, place, time_s=1e-5)).mean(1)
    is_si = instrument.truth()["atomic_number"] == 14
    assert torch.equal(instrument.truth()["present"], there & ~is_si), "the Si atom, lost to one dwell"
    for defocus_ang in (80.0, 0.0):  # a control that makes the image anew does not bring it back
        instrument.execute(Set(every(instrument), "defocus_ang", torch.full((2,), defocus_ang)))
    image = scan(instrument, dwell_s=PIXEL_DWELL_S)
    other = microscope(rows=2)
    with_atom = scan(other, dwell_s=PIXEL_DWELL_S)
    centre = (torch.arange(64) + 0.5) / 64
    away = torch.hypot(centre[None, None, :] - place[:, :1, None], centre[None, :, None] - place[:, 1:, None]) * FOV_ANG
    near, far = away < 0.4, away > 6.0
    assert (fraction(image)[near].max() < 0.3 * peak.max()) and fraction(with_atom)[near].min() > 0.5 * peak.max()
    a, b = image.data["images"][:, 0][far], with_atom.data["images"][:, 0][far]
    chi2, freedom = float(((a - b) ** 2 / (a + b)).sum()), len(a)
    # The Si atom's far tails are in one of them: a hundredth of a count's variance more than chance.
    assert abs(chi2 - freedom) < 6.0 * math.sqrt(2.0 * freedom) + 0.02 * freedom


# Refusals that the contract's check does not know of


def test_what_does_not_fit_is_refused():
    instrument = microscope(rows=2)
    with pytest.raises(InstructionError, match="Scan.region is"):
        scan(instrument, region=(0.5, 0.5, 0.6, 0.2))
    with pytest.raises(InstructionError, match="Scan.region is"):
        scan(instrument, region=(0.5, 0.5, 0.0, 0.2))
    with pytest.raises(InstructionError, match=r"takes no reset options; given \['tilt'\]"):
        instrument.reset(Streams([0, 1]), every(instrument), {"tilt": 1})
    with pytest.raises(CapabilityError, match="allow-listed; settable: beam_shift_x_ang.*current_pa"):
        instrument.execute(Set(every(instrument), "high_tension_kv", torch.ones(2)))
    with pytest.raises(ConfigError, match="unknown key 'currrent_pa'. Did you mean 'current_pa'"):
        microscope(currrent_pa=3.0)
    fresh = make("simulated", {"kind": "simulated", "specimen": ONE_SI}, 2, torch.device("cpu"))
    with pytest.raises(InstructionError, match="was not reset yet"):
        fresh.execute(Wait(torch.arange(2), torch.ones(2)))
    with pytest.raises(InstructionError, match="first reset must start all 2 rows"):
        fresh.reset(Streams([0, 1]), torch.tensor([1]))


def test_a_row_that_waits_for_nothing_draws_nothing_whoever_waits_beside_it():
    places = []
    for other_s in (0.0, 5.0):
        instrument = microscope(2, drift={"speed_ang_per_s": 0.3})
        for seconds in ((0.0, other_s), (2.0, 2.0)):
            instrument.execute(Wait(every(instrument), torch.tensor(seconds)))
        places.append(instrument.truth()["frame_centre_ang"][0].clone())
    assert torch.equal(*places)
