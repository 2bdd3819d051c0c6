"""The adapter on Nion Swift's own simulated microscope: the traps that Nion leaves open, each shown and each closed."""

from __future__ import annotations

import _thread
import contextlib
import copy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nion.usim_device", reason="needs the extra nion")

from nion.utils import Geometry

from stem_gym.core.errors import CapabilityError, InstructionError, InstrumentError
from stem_gym.core.instructions import (
    FULL_FRAME,
    Acquire,
    Blank,
    Dwell,
    MoveStage,
    Park,
    Read,
    Scan,
    Set,
    Wait,
)
from stem_gym.core.streams import Streams
from stem_gym.core.units import ELECTRONS_PER_PC
from stem_gym.instruments.adapters.nion import beam, make
from stem_gym.instruments.adapters.nion.instrument import NionInstrument
from stem_gym.instruments.adapters.nion.session import NionSession, UsimDevices

pytestmark = pytest.mark.xdist_group("nion")  # one instrument in a process

ROW = torch.tensor([0])
FOV_ANG = 1000.0  # uSim's flakes are tens of nanometres wide


def one(value: float) -> torch.Tensor:
    return torch.tensor([value])


def scan(region=FULL_FRAME, shape=(64, 64), fov_ang=FOV_ANG, dwell_s=1e-6) -> Scan:
    return Scan(ROW, one(fov_ang), shape, one(dwell_s), torch.tensor([region]))


def park(x: float, y: float) -> Park:
    return Park(ROW, one(x), one(y))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Nion Swift is started: it holds what Nion's own start would delete."""
    folder = tmp_path_factory.mktemp("nion")
    (folder / "test_data").mkdir()
    (folder / "test_data" / "mine.txt").write_text("kept")
    return folder


@pytest.fixture(scope="module")
def usim(folder: Path) -> Iterator[NionInstrument]:
    with contextlib.chdir(folder):
        instrument = make({"nion": {"source": "usim", "settle_s": 0.02, "settle_limit_s": 0.5}}, 1, torch.device("cpu"))
    yield instrument
    instrument.close()


@pytest.fixture
def nion(usim) -> NionInstrument:
    usim.reset(Streams([0]), ROW)
    for name, value in (("current_pa", 200.0), ("defocus_ang", 0.0), ("beam_shift_x_ang", 0.0)):
        usim.execute(Set(ROW, name, one(value)))
    usim._session.stem.SetVal2D("stage_position_m", Geometry.FloatPoint())
    return usim


@pytest.fixture
def sent(nion, monkeypatch) -> list[Any]:
    """Everything that moves or exposes, in order."""
    log: list[Any] = []
    for owner, names in ((nion._session.stem, ("SetVal", "SetVal2D")), (nion._session.scan, ("record_immediate",))):
        for name in names:
            original = getattr(owner, name)
            monkeypatch.setattr(
                owner, name, lambda *a, _n=name, _o=original, **k: (log.append((_n, *a)), _o(*a, **k))[1]
            )
    return log


def places_of_exposures(nion: NionInstrument, monkeypatch) -> list[tuple[float, float]]:
    """(x, y) in Å from the middle of the frame, of every exposure that the camera makes from now on."""
    places: list[tuple[float, float]] = []
    simulator = nion._session.camera.camera.simulator
    original = simulator.get_frame_data

    def watched(area, binning, exposure_s, context, place):
        places.append(
            (round((place.x - 0.5) * context.fov_nm * 10, 3), round((place.y - 0.5) * context.fov_nm * 10, 3))
        )
        return original(area, binning, exposure_s, context, place)

    monkeypatch.setattr(simulator, "get_frame_data", watched)
    return places


# Starting and stopping


def test_a_second_instrument_is_refused(nion):
    with pytest.raises(InstrumentError, match="one instrument in a process"):
        NionSession(UsimDevices)


def test_starting_deletes_nothing(usim, folder):
    assert (folder / "test_data" / "mine.txt").read_text() == "kept"


def test_it_keeps_every_rule_for_instruments(folder):
    """The public conformance check, in a process of its own: it closes the instrument."""
    code = (
        "import torch; from stem_gym.core.conformance import check_instrument; "
        "from stem_gym.instruments.adapters.nion import make; "
        "check_instrument(make({'nion': {'source': 'usim'}}, 1, torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# Trap 1: record_immediate does not move the frame that the probe position refers to


def test_nion_alone_leaves_the_reference_frame_behind(nion):
    session = nion._session
    nion.execute(scan())
    other = session.scan.get_frame_parameters(0)
    other.pixel_size, other.fov_nm, other.pixel_time_us = (64, 64), 40.0, 1.0
    session.scan.record_immediate(other)
    assert session.stem.scan_context.fov_nm == FOV_ANG / 10


def test_places_refer_to_the_last_full_scan(nion, monkeypatch):
    places = places_of_exposures(nion, monkeypatch)
    nion.execute(scan())
    nion.execute(scan(fov_ang=400.0))
    nion.execute(scan((0.5, 0.0, 0.25, 0.25), fov_ang=400.0))  # a sub-frame moves no reference
    nion.execute(park(0.75, 0.1))
    nion.execute(Acquire(ROW, "eels", one(0.01)))
    assert places == [(100.0, -160.0)]  # (0.75 − 0.5) · 400 Å, (0.1 − 0.5) · 400 Å


def test_parking_sets_its_frame_again_when_someone_else_scanned(nion, monkeypatch):
    places = places_of_exposures(nion, monkeypatch)
    nion.execute(scan())
    other = copy.copy(nion._session.scan.get_current_frame_parameters())
    other.fov_nm = 7.0
    nion._session.scan.set_current_frame_parameters(other)
    nion.execute(park(0.75, 0.5))
    nion.execute(Acquire(ROW, "eels", one(0.01)))
    assert places == [(250.0, 0.0)]


# Trap 2: a playing camera hands out the spectrum of the place before


def test_nion_alone_gives_the_old_places_spectrum(nion, monkeypatch):
    places = places_of_exposures(nion, monkeypatch)
    stem, camera = nion._session.stem, nion._session.camera
    nion.execute(scan())
    stem.probe_position = Geometry.FloatPoint(y=0.5, x=0.25)
    parameters = camera.get_frame_parameters(0)
    parameters.exposure_ms = 100
    camera.start_playing(parameters)
    camera.get_next_xdatas_to_finish(5)
    stem.probe_position = Geometry.FloatPoint(y=0.5, x=0.75)
    camera.get_next_xdatas_to_finish(5)
    running = list(places)
    camera.abort_playing(sync_timeout=5)
    assert (-250.0, 0.0) in running[1:]  # what was handed out after the move had begun before it


def test_a_spectrum_is_one_exposure_of_the_new_place(nion, monkeypatch):
    places = places_of_exposures(nion, monkeypatch)
    nion.execute(scan())
    wanted = [(0.25, 0.5), (0.75, 0.5), (0.5, 0.25)] * 3
    for place in wanted:
        nion.execute(park(*place))
        reading = nion.execute(Acquire(ROW, "eels", one(0.01)))
        assert reading.data["spectrum"].shape == (1, 512)
    assert places == [((x - 0.5) * FOV_ANG, (y - 0.5) * FOV_ANG) for x, y in wanted]  # one each: no hidden dose
    assert not nion._session.camera.is_playing


def test_a_camera_that_someone_left_playing_is_stopped(nion):
    camera = nion._session.camera
    nion.execute(scan())
    nion.execute(park(0.5, 0.5))
    camera.start_playing(camera.get_frame_parameters(0))
    nion.execute(Acquire(ROW, "eels", one(0.01)))
    assert not camera.is_playing


def test_spectra_differ_between_flake_and_vacuum(nion):
    image = nion.execute(scan()).data["images"][0, 0]
    smooth = torch.nn.functional.avg_pool2d(image[None, None], 9, 1, 4)[0, 0]

    def loss_share(index: int) -> float:
        y, x = divmod(index, 64)
        nion.execute(park((x + 0.5) / 64, (y + 0.5) / 64))
        reading = nion.execute(Acquire(ROW, "eels", one(0.02)))
        energy = reading.calibration["energy_offset_ev"] + reading.calibration["energy_per_channel_ev"] * torch.arange(
            512
        )
        spectrum = reading.data["spectrum"][0]
        return float(spectrum[energy > 5.0].sum() / spectrum.sum())

    assert loss_share(int(smooth.argmax())) > 1e-4 > abs(loss_share(int(smooth.argmin())))


# Trap 3: aborted records can come back looking complete


@pytest.fixture
def abort_after(nion, monkeypatch) -> Callable[[float], None]:
    """Abort so many seconds after the beam has opened the next time."""

    def arrange(delay_s: float) -> None:
        original = nion._meter.beam

        def beam(is_open: bool) -> None:
            if is_open:
                threading.Timer(delay_s, nion.abort).start()
            original(is_open)

        monkeypatch.setattr(nion._meter, "beam", beam)

    return arrange


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.02, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09])
def test_an_aborted_frame_is_never_returned(nion, abort_after, after_s):
    abort_after(after_s)
    with pytest.raises(InstrumentError, match="Aborted"):
        nion.execute(scan(dwell_s=2e-4))  # 0.8 s
    assert nion._meter.end(1.0)[0] < 0.7  # it did not go on to its end
    assert nion._column.read("blanked") == 1.0


def test_a_frame_that_ended_too_early_is_no_frame(nion, monkeypatch):
    whole = nion._session.scan.record_immediate(_parameters(nion))
    monkeypatch.setattr(nion._session.scan, "record_immediate", lambda *_, **__: whole)
    with pytest.raises(InstrumentError, match="it needed"):
        nion.execute(scan(dwell_s=1e-4))


def test_no_frame_is_an_error(nion, monkeypatch):
    monkeypatch.setattr(nion._session.scan, "record_immediate", lambda *_, **__: [])
    with pytest.raises(InstrumentError, match="no frame"):
        nion.execute(scan())


def test_a_hung_exposure_is_given_up(nion, monkeypatch):
    stopped = threading.Event()
    monkeypatch.setattr(beam, "GRACE_S", 0.05)
    monkeypatch.setattr(nion._session.scan, "abort_recording", stopped.set)
    monkeypatch.setattr(nion._session.scan, "record_immediate", lambda *_, **__: stopped.wait(5) and [])
    with pytest.raises(InstrumentError, match="hung"):
        nion.execute(scan())
    assert nion._column.read("blanked") == 1.0


def test_aborting_while_nothing_runs_stops_nothing_later(nion):
    nion.abort()
    assert nion.execute(scan()).data["images"].shape == (1, 1, 64, 64)


@pytest.mark.parametrize("instruction", [Acquire(ROW, "eels", one(0.5)), Dwell(ROW, one(5.0))])
def test_other_exposures_can_be_aborted(nion, abort_after, instruction):
    nion.execute(scan())
    nion.execute(park(0.5, 0.5))
    abort_after(0.05)
    with pytest.raises(InstrumentError, match="Aborted"):
        nion.execute(instruction)


def test_an_interrupt_blanks_the_beam_and_stops_the_scan(nion):
    threading.Timer(0.1, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        nion.execute(scan(dwell_s=0.01))  # 41 s
    assert nion._column.read("blanked") == 1.0
    assert nion.execute(scan()).data["images"].shape == (1, 1, 64, 64)  # not behind the rest of the one before


def test_a_wait_can_be_aborted(nion):
    threading.Timer(0.1, nion.abort).start()
    with pytest.raises(InstrumentError, match="Aborted"):
        nion.execute(Wait(ROW, one(60.0)))


# Trap 4: unknown controls, limits, clipping


def test_nion_alone_is_silent_about_unknown_controls_and_clips(nion):
    stem = nion._session.stem
    assert stem.SetVal("Nonsense", 1.0) is False
    stem.probe_position = Geometry.FloatPoint(y=1.5, x=-0.2)
    assert (stem.probe_position.x, stem.probe_position.y) == (0.0, 1.0)


def test_a_control_that_was_not_taken_is_an_error(nion, monkeypatch):
    monkeypatch.setattr(nion._session.stem, "SetVal", lambda *_: False)
    with pytest.raises(CapabilityError, match="C10"):
        nion._column.set("defocus_ang", 50.0)


def test_a_set_that_the_column_did_not_follow_is_an_error(nion, monkeypatch):
    monkeypatch.setattr(nion._session.stem, "SetVal", lambda *_: True)  # says yes, does nothing
    with pytest.raises(InstrumentError, match="did not follow"):
        nion.execute(Set(ROW, "defocus_ang", one(50.0)))


def test_a_probe_that_was_clipped_is_an_error(nion, monkeypatch):
    nion.execute(scan())
    column = type(nion._session.stem)
    place = column.probe_position
    clipped = property(place.fget, lambda self, at: place.fset(self, Geometry.FloatPoint(y=min(at.y, 0.9), x=at.x)))
    monkeypatch.setattr(column, "probe_position", clipped)
    with pytest.raises(InstrumentError, match="was sent to"):
        nion.execute(park(0.5, 0.95))
    monkeypatch.undo()
    with pytest.raises(InstructionError, match="not parked"):
        nion.execute(Dwell(ROW, one(0.01)))


REFUSED = {
    "place outside the frame": park(1.5, 0.5),
    "place that is no number": park(float("nan"), 0.5),
    "value beyond its limits": Set(ROW, "current_pa", one(5000.0)),
    "control that is not allow-listed": Set(ROW, "energy_kev", one(80.0)),
    "control that nobody knows": Set(ROW, "stigmator", one(1.0)),
    "region that leaves the frame": scan((0.8, 0.0, 0.4, 0.4)),
    "empty region": scan((0.5, 0.5, 0.0, 0.0)),
    "pixels that are not square": scan(shape=(32, 64)),
    "unknown detector": Acquire(ROW, "eds", one(0.1)),
    "image channel as a camera": Acquire(ROW, "haadf", one(0.1)),
    "camera as an image channel": Scan(ROW, one(FOV_ANG), (8, 8), one(1e-6), torch.tensor([FULL_FRAME]), ("eels",)),
    "endless dwell": Dwell(ROW, one(1e6)),
    "a row that is not there": Blank(torch.tensor([1]), torch.tensor([True])),
    "a row named twice": Blank(torch.tensor([0, 0]), torch.tensor([True, True])),
    "spectrum before the probe is parked": Acquire(ROW, "eels", one(0.1)),
    "dwell before the probe is parked": Dwell(ROW, one(0.1)),
    "park before any frame": park(0.5, 0.5),
    "unreadable control": Read(ROW, "temperature_k"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_be_done_is_refused_and_nothing_is_sent(nion, sent, what):
    with pytest.raises((InstructionError, CapabilityError)):
        nion.execute(REFUSED[what])
    assert sent == []


# Trap 5: the blanker and the counts


def test_nion_alone_counts_the_same_whatever_the_blanker_and_the_current(nion):
    session = nion._session
    session.stem.SetVal("C_Blank", 0.0)
    bright = session.scan.record_immediate(_parameters(nion))[0].data.mean()
    session.stem.SetVal("BeamCurrent", 1e-12)
    session.stem.SetVal("C_Blank", 1.0)
    dark = session.scan.record_immediate(_parameters(nion))[0].data.mean()
    assert dark == pytest.approx(bright, rel=0.05)  # 200 pA open, then 1 pA blanked; 0.3 of noise in 64² pixels


def test_the_beam_is_open_inside_an_exposure_alone(nion, sent):
    nion.execute(scan())
    nion.execute(park(0.5, 0.5))
    nion.execute(Dwell(ROW, one(0.01)))
    nion.execute(Acquire(ROW, "eels", one(0.01)))
    nion.execute(Blank(ROW, torch.tensor([False])))
    moves = [
        (entry[2] if entry[0] == "SetVal" else "record") for entry in sent if entry[:2] != ("SetVal", "BeamCurrent")
    ]
    assert moves == [0.0, "record", 1.0, 0.0, "record", 1.0, 0.0, 1.0, 1.0]


def test_the_beam_is_blanked_when_an_exposure_fails(nion, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("scan unit lost")

    monkeypatch.setattr(nion._session.scan, "record_immediate", fail)
    with pytest.raises(RuntimeError, match="scan unit lost"):
        nion.execute(scan())
    assert nion._column.read("blanked") == 1.0


@pytest.mark.parametrize("stuck_at", [0.0, 1.0])
def test_a_stuck_blanker_is_noticed(nion, monkeypatch, stuck_at):
    stem = nion._session.stem
    original = stem.GetVal
    monkeypatch.setattr(stem, "GetVal", lambda name, *a: stuck_at if name == "C_Blank" else original(name, *a))
    with pytest.raises(InstrumentError, match="blanker"):
        nion.execute(scan())


@pytest.mark.parametrize("current_pa", [20.0, 80.0])
def test_electrons_are_the_current_for_as_long_as_the_beam_was_open(nion, current_pa):
    nion.execute(Set(ROW, "current_pa", one(current_pa)))
    nion.execute(scan())
    nion.execute(park(0.5, 0.5))
    reading = nion.execute(Dwell(ROW, one(0.5), 10))
    rate = current_pa * ELECTRONS_PER_PC
    # At least what was asked, at most all the time that passed: the stopwatch sees the start of Nion's threads as well.
    assert 0.5 * rate <= float(reading.electrons) <= float(reading.seconds) * rate * 1.001
    assert float(reading.seconds) == pytest.approx(0.5, abs=0.25)
    assert reading.data["trace"].shape == (1, 10)
    nothing = nion.execute(Wait(ROW, one(0.01)))
    assert float(nothing.electrons) == 0.0 and float(nothing.seconds) >= 0.01


# Trap 6: the stage


def test_nion_alone_moves_the_stage_the_other_way(nion):
    stem = nion._session.stem
    stem.change_stage_position(dx=1e-9, dy=2e-9)
    assert (stem.stage_position_m.x, stem.stage_position_m.y) == (-1e-9, -2e-9)


def test_the_sample_moves_by_what_was_asked(nion):
    before = nion.execute(scan()).data["images"][0, 0]
    nion.execute(MoveStage(ROW, one(156.25), one(-93.75)))  # 10 and −6 pixels of 15.6 Å
    after = nion.execute(scan()).data["images"][0, 0]
    assert float(nion.execute(Read(ROW, "stage_x_ang")).data["value"]) == pytest.approx(156.25)
    assert displacement(before, after) == (10, -6)


def test_a_slow_stage_is_waited_for(nion, monkeypatch):
    stem = nion._session.stem
    original = stem.SetVal2D

    def slow(name, point):
        threading.Timer(0.15, original, [name, point]).start()
        return True

    monkeypatch.setattr(stem, "SetVal2D", slow)
    reading = nion.execute(MoveStage(ROW, one(10.0), one(0.0)))
    assert float(reading.seconds) > 0.15
    assert float(nion.execute(Read(ROW, "stage_x_ang")).data["value"]) == pytest.approx(10.0)


def test_a_stage_that_does_not_arrive_is_an_error(nion, monkeypatch):
    monkeypatch.setattr(nion._session.stem, "SetVal2D", lambda *_: True)
    with pytest.raises(InstrumentError, match=r"sent to \(10.00, 0.00\) Å and is at \(0.00, 0.00\) Å"):
        nion.execute(MoveStage(ROW, one(10.0), one(0.0)))


# Units


@pytest.mark.parametrize(
    ("name", "value", "vendor", "theirs"),
    [
        ("defocus_ang", 120.0, "C10", -1.2e-8),  # underfocus is positive here, overfocus at Nion
        ("current_pa", 35.0, "BeamCurrent", 3.5e-11),
        ("beam_shift_x_ang", 4.0, "CSH.x", 4e-10),
        ("beam_shift_y_ang", -3.0, "CSH.y", -3e-10),
    ],
)
def test_controls_change_units_at_the_border(nion, name, value, vendor, theirs):
    nion.execute(Set(ROW, name, one(value)))
    assert nion._session.stem.GetVal(vendor) == pytest.approx(theirs)
    assert float(nion.execute(Read(ROW, name)).data["value"]) == pytest.approx(value)
    nion.execute(Set(ROW, name, one(1.0)))


def test_the_column_is_read_in_our_units(nion):
    read = {name: float(nion.execute(Read(ROW, name)).data["value"]) for name in ("energy_kev", "convergence_mrad")}
    assert read == {"energy_kev": 100.0, "convergence_mrad": 40.0}  # uSim's 100 kV and 40 mrad


def test_a_moved_beam_shows_what_lies_in_its_direction(nion):
    before = nion.execute(scan()).data["images"][0, 0]
    nion.execute(Set(ROW, "beam_shift_x_ang", one(156.25)))
    after = nion.execute(scan()).data["images"][0, 0]
    assert displacement(before, after) == (-10, 0)  # the beam went right, so in its frame the sample went left


def test_a_frame_comes_with_its_calibration_and_nions_own_words(nion):
    reading = nion.execute(scan((0.25, 0.5, 0.5, 0.25), shape=(32, 64), dwell_s=2e-6))
    assert reading.data["images"].shape == (1, 1, 32, 64)
    assert float(reading.calibration["electrons_per_pixel"]) == pytest.approx(200 * 2e-6 * ELECTRONS_PER_PC)
    assert float(reading.electrons_per_ang2) == pytest.approx(float(reading.electrons) / (500 * 250))
    assert "subscan_fractional_center" in reading.metadata["nion"]
    assert nion.truth() == {}


def test_two_channels_come_in_the_order_asked(nion):
    asked = Scan(ROW, one(FOV_ANG), (64, 64), one(1e-6), torch.tensor([FULL_FRAME]), ("haadf", "maadf"))
    assert nion.execute(asked).data["images"].shape == (1, 2, 64, 64)


def _parameters(nion: NionInstrument) -> Any:
    parameters = nion._session.scan.get_frame_parameters(0)
    parameters.pixel_size, parameters.fov_nm, parameters.pixel_time_us = (64, 64), FOV_ANG / 10, 1.0
    return parameters


def displacement(before: torch.Tensor, after: torch.Tensor) -> tuple[int, int]:
    """Whole pixels (x, y) by which the sample moved, from the best correlation of the middles of two frames."""

    def likeness(dx: int, dy: int) -> float:
        middle, moved = before[12:52, 12:52].flatten(), after[12 + dy : 52 + dy, 12 + dx : 52 + dx].flatten()
        return float(torch.corrcoef(torch.stack((middle, moved)))[0, 1])

    return max(((dx, dy) for dx in range(-12, 13) for dy in range(-12, 13)), key=lambda step: likeness(*step))
