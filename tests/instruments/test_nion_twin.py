"""The same specimen in process and through Nion Swift's scan threads: the same geometry, counts, dose and time."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("nion.usim_device", reason="needs the extra nion")

from stem_gym.core.conformance import check_instrument
from stem_gym.core.errors import CapabilityError, InstructionError, InstrumentError
from stem_gym.core.instructions import (
    FULL_FRAME,
    Dwell,
    Instruction,
    MoveStage,
    Park,
    Read,
    Reading,
    Scan,
    Set,
    TraceRule,
    Wait,
)
from stem_gym.core.instrument import Instrument
from stem_gym.core.streams import Streams
from stem_gym.core.units import ELECTRONS_PER_PC
from stem_gym.instruments import simulated
from stem_gym.instruments.adapters.nion import make
from stem_gym.instruments.adapters.nion.instrument import NionInstrument
from stem_gym.instruments.recorder import Provenance, Recorder, read_recording

pytestmark = pytest.mark.xdist_group("nion")  # one instrument in a process

ROW = torch.tensor([0])
FOV_ANG, CURRENT_PA = 24.0, 40.0
CPU = torch.device("cpu")
SPECIMEN = {
    "kind": "graphene",
    "cell_ang": 30.0,
    "dopants": [{"element": "Si", "count_min": 3, "count_max": 3, "window_ang": 18.0}],
    "separation_ang": 4.0,
}
# Everything that moves and distorts is on, so that nothing can be equal by being absent.
LIVELY = {
    "specimen": SPECIMEN,
    "fov_ang": FOV_ANG,
    "current_pa": CURRENT_PA,
    "overheads": {"scan_s": 0.05, "park_s": 0.02, "stage_s": 1.0, "set_s": 0.1},
    "probe": {"defocus_sd_ang": 5.0, "focal_spread_ang": 10.0},
    "drift": {"speed_ang_per_s": 0.3, "correlation_s": 20.0, "diffusion_ang2_per_s": 0.002, "settling_fraction": 0.1},
    "detector": {
        "line_jitter_ang": 0.03,
        "flyback_s": 60e-6,
        "dark_electrons_per_s": 200.0,
        "gain": 3.0,
        "offset": 7.0,
    },
}
STILL = {"specimen": SPECIMEN, "fov_ang": FOV_ANG, "current_pa": CURRENT_PA, "drift": {"speed_ang_per_s": 0.0}}


def one(value: float) -> torch.Tensor:
    return torch.tensor([value])


def scan(region=FULL_FRAME, shape=(64, 64), fov_ang=FOV_ANG, dwell_s=1e-5) -> Scan:
    return Scan(ROW, one(fov_ang), shape, one(dwell_s), torch.tensor([region]))


def park(x: float, y: float) -> Park:
    return Park(ROW, one(x), one(y))


def start(instrument: Instrument, seed: int) -> None:
    streams = Streams([seed])
    streams.next_episode(ROW)
    instrument.reset(streams, ROW)


def run(instrument: Instrument, program: list[Instruction], seed: int) -> list[Reading]:
    start(instrument, seed)
    return [instrument.execute(instruction) for instruction in program]


@pytest.fixture
def lively() -> Iterator[NionInstrument]:
    instrument = make(LIVELY, 1, CPU)
    yield instrument
    instrument.close()


@pytest.fixture
def still() -> Iterator[NionInstrument]:
    instrument = make(STILL, 1, CPU)
    yield instrument
    instrument.close()


PROGRAM = [
    scan(),
    scan((0.1, 0.3, 0.4, 0.4), dwell_s=3e-5),
    park(0.58, 0.31),
    Dwell(ROW, one(0.7), 16),
    Dwell(ROW, one(0.3)),
    scan((0.25, 0.5, 0.5, 0.25), shape=(16, 32)),
    Set(ROW, "defocus_ang", one(37.0)),
    Set(ROW, "beam_shift_x_ang", one(2.0)),
    Set(ROW, "current_pa", one(55.0)),
    MoveStage(ROW, one(3.0), one(-1.0)),
    Wait(ROW, one(2.0)),
    scan(),
    park(0.2, 0.7),
    Dwell(ROW, one(1.0), 7),
    scan(fov_ang=18.0),
    Dwell(ROW, one(1.0), 7),  # still parked, in a smaller frame
]


@pytest.mark.parametrize("seed", [5, 6])
def test_a_program_through_nion_is_the_program_in_process(lively, seed):
    """With the same random numbers every count, second and electron agrees, and so does the sample afterwards."""
    ours, through_nion = simulated.make(LIVELY, 1, CPU), lively
    for mine, theirs in zip(run(ours, PROGRAM, seed), run(through_nion, PROGRAM, seed), strict=True):
        assert mine.data.keys() == theirs.data.keys() and mine.calibration.keys() == theirs.calibration.keys()
        for name, data in mine.data.items():
            assert torch.equal(data, theirs.data[name]), (mine.verb, name)
        for name, value in mine.calibration.items():  # float32 of the same float64
            torch.testing.assert_close(value, theirs.calibration[name], rtol=1e-6, atol=0.0)
        assert float(theirs.seconds) == pytest.approx(float(mine.seconds), rel=1e-6)
        assert float(theirs.electrons) == pytest.approx(float(mine.electrons), rel=1e-6)
        assert float(theirs.electrons_per_ang2) == pytest.approx(float(mine.electrons_per_ang2), rel=1e-5)
    for name, known in ours.truth().items():
        assert torch.equal(known, through_nion.truth()[name]), name


def test_it_keeps_every_rule_for_instruments(lively):
    check_instrument(lively)


def test_a_recorded_episode_through_nion_comes_back(lively, tmp_path):
    recorder = Recorder(lively, tmp_path, Provenance(seeds=(5,)))
    answered = run(recorder, PROGRAM, 5)
    path = recorder.path
    recorder.close()
    recording = read_recording(path)
    assert recording.complete and [reading.verb for reading in recording.readings] == [r.verb for r in answered]
    assert torch.equal(recording.readings[0].data["images"], answered[0].data["images"])
    assert '"fov_nm": 2.4' in recording.readings[0].metadata["nion"]  # Nion's own words, verbatim
    moved = recording.records[10]  # after the reset and nine instructions
    stage = [moved.details[when]["stage_x_ang"][0] for when in ("before", "after")]
    assert moved.details["kind"] == "instruction" and stage == pytest.approx([0.0, 3.0])


def test_counts_with_other_random_numbers_agree_statistically(still):
    """Chi-square of the difference of two independent Poisson frames of one still specimen, over 4096 pixels."""
    ours = simulated.make(STILL, 1, CPU)
    start(ours, 8)
    start(still, 8)
    still.execute(scan())  # so that the frames that are compared have random numbers of their own
    mine, theirs = (instrument.execute(scan(dwell_s=2e-4)).data["images"].double() for instrument in (ours, still))
    assert not torch.equal(mine, theirs)
    lit = (mine + theirs) >= 20.0  # where a count is nearly normal
    square, count = ((mine - theirs) ** 2 / (mine + theirs))[lit], int(lit.sum())
    assert count > 1000
    assert float(square.sum()) == pytest.approx(count, abs=5.0 * (2.0 * count) ** 0.5)  # five standard deviations


def silicon_places(nion: NionInstrument, fov_ang: float = FOV_ANG) -> list[tuple[float, float]]:
    """(x, y) of the dopants inside the frame, in its fractions, from truth alone."""
    truth = nion.truth()
    atoms = truth["atom_xy_ang"][0][(truth["atomic_number"][0] == 14) & truth["present"][0]]
    cell = truth["cell_ang"][0]
    beside = atoms - truth["frame_centre_ang"][0]
    beside = beside - cell * torch.round(beside / cell)
    places = beside / fov_ang + 0.5
    return [(float(x), float(y)) for x, y in places if 0.05 < x < 0.95 and 0.05 < y < 0.95]


def brightness(image: torch.Tensor, x: float, y: float) -> float:
    """Rank of the pixel at a place among all pixels, 1 for the brightest."""
    height, width = image.shape
    return float((image <= image[int(y * height), int(x * width)]).float().mean())


def test_atoms_are_where_truth_says_and_nowhere_mirrored(still):
    """The dopants make an asymmetric pattern; a flip or a transpose would put dark pixels at their places."""
    start(still, 11)
    image = still.execute(scan(dwell_s=1e-4)).data["images"][0, 0]
    places = silicon_places(still)
    assert len(places) == 3
    assert min(brightness(image, x, y) for x, y in places) > 0.98
    for wrong in (image.flip(0), image.flip(1), image.T, image.flip(0).flip(1)):
        assert min(brightness(wrong, x, y) for x, y in places) < 0.9


@pytest.mark.parametrize("shape", [(48, 48), (24, 48)], ids=["square", "flat"])
def test_a_sub_frame_shows_its_own_part(still, shape):
    start(still, 11)
    still.execute(scan())
    for x, y in silicon_places(still):
        width, height = 0.25, 0.25 * shape[0] / shape[1]
        left, top = min(max(x - 0.3 * width, 0.0), 1 - width), min(max(y - 0.6 * height, 0.0), 1 - height)
        image = still.execute(scan((left, top, width, height), shape, dwell_s=2e-4)).data["images"][0, 0]
        inside = ((x - left) / width, (y - top) / height)
        assert brightness(image, *inside) > 0.98
        assert float(still.truth()["fov_ang"]) == FOV_ANG


def test_a_dwell_doses_the_targeted_place_and_no_other(still):
    start(still, 11)
    still.execute(scan(dwell_s=1e-6))
    for x, y in silicon_places(still):
        before = still.truth()["dose_map"].clone()
        still.execute(park(x, y))
        reading = still.execute(Dwell(ROW, one(1.0), 10))
        truth = still.truth()
        wanted = truth["frame_centre_ang"] + (torch.tensor([[x, y]]) - 0.5) * FOV_ANG
        cell = truth["cell_ang"]
        off = truth["probe_path_ang"] - wanted.unsqueeze(1)
        assert float((off - cell * torch.round(off / cell)).abs().max()) < 1e-3  # nothing drifts here; float32
        added = (truth["dose_map"] - before)[0]
        assert int((added > 0).sum()) <= 4  # a point is spread over the pixels of the dose map next to it
        area = float(cell.prod()) / added.numel()
        assert float(added.sum()) * area == pytest.approx(float(reading.electrons), rel=0.01)
        assert float(reading.electrons) == pytest.approx(CURRENT_PA * ELECTRONS_PER_PC, rel=1e-6)


def test_a_dwell_on_silicon_is_brighter_than_beside_it(still):
    start(still, 11)
    still.execute(scan())
    x, y = silicon_places(still)[0]
    mean = {}
    for name, place in {"on": (x, y), "beside": (x + 3.0 / FOV_ANG, y)}.items():
        still.execute(park(*place))
        mean[name] = float(still.execute(Dwell(ROW, one(0.5), 10)).data["trace"].mean())
    assert mean["on"] > 1.5 * mean["beside"]


def test_a_blanked_frame_sees_nothing_and_doses_nothing(lively):
    start(lively, 1)
    lively.execute(scan())
    dose = lively.truth()["dose_map"].clone()
    parameters = lively._session.scan.get_current_frame_parameters()
    frame = lively._session.scan.record_immediate(parameters)[0]
    assert np.all(frame.data == 7.0)  # the detector's offset
    assert torch.equal(lively.truth()["dose_map"], dose)


def test_a_dwell_stops_on_its_trace(lively):
    start(lively, 1)
    lively.execute(scan())
    lively.execute(park(0.5, 0.5))
    always = TraceRule(
        rise=-1.0, baseline_samples=3, window_samples=2
    )  # any signal has "risen" to none of the baseline
    reading = lively.execute(Dwell(ROW, one(1.6), 16, always))
    recorded = int(torch.isfinite(reading.data["trace"]).sum())
    assert recorded == 4 and reading.data["trace"].shape == (1, 16)  # the first pair that ends beyond the baseline
    assert float(reading.seconds) == pytest.approx(0.4, rel=1e-5)
    never = TraceRule(rise=1e6)
    assert bool(torch.isfinite(lively.execute(Dwell(ROW, one(1.6), 16, never)).data["trace"]).all())


def test_a_fault_in_nions_thread_reaches_the_caller(lively, monkeypatch):
    start(lively, 1)

    def fail(_: Instruction) -> Reading:
        raise InstrumentError("the field emission gun is off")

    monkeypatch.setattr(lively._sample.microscope, "execute", fail)
    with pytest.raises(InstrumentError, match="gun is off"):
        lively.execute(scan())
    monkeypatch.undo()
    assert lively.execute(scan()).data["images"].shape == (1, 1, 64, 64)


def test_controls_read_back_what_the_new_specimen_came_with(lively):
    start(lively, 3)
    drawn = float(lively.execute(Read(ROW, "defocus_ang")).data["value"])
    assert drawn == pytest.approx(float(lively._sample.microscope.execute(Read(ROW, "defocus_ang")).data["value"]))
    assert drawn != 0.0
    lively.execute(MoveStage(ROW, one(5.0), one(0.0)))
    start(lively, 4)
    assert float(lively.execute(Read(ROW, "stage_x_ang")).data["value"]) == 0.0


def test_values_that_the_simulated_column_does_not_take_are_refused(lively):
    start(lively, 3)
    with pytest.raises(InstructionError, match="within"):
        lively.execute(Set(ROW, "defocus_ang", one(600.0)))
    assert not lively._session.stem.SetVal("C10", 6e-8)  # and so does the column behind
    assert not lively._session.stem.SetVal("Nonsense", 1.0)


def test_an_episode_through_nion_is_the_episode_in_process():
    """The whole environment, task and budget included, on real scan threads."""
    episodes = {}
    for kind in ("simulated", "nion"):
        env = gymnasium.make("stem_gym/AtomTargeting-v0", **({} if kind == "simulated" else {"instrument": "nion"}))
        action = np.random.default_rng(0)
        observation, info = env.reset(seed=3)
        seen = [observation]
        for _ in range(10):
            observation, reward, *_, info = env.step(action.uniform(-1, 1, env.action_space.shape).astype(np.float32))
            seen.append({**observation, "reward": np.float32(reward), "electrons": np.float32(info["electrons"])})
        env.close()
        episodes[kind] = seen
    for mine, theirs in zip(episodes["simulated"], episodes["nion"], strict=True):
        for name, value in mine.items():
            np.testing.assert_allclose(theirs[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_two_rows_are_refused():
    with pytest.raises(CapabilityError, match="one row"):
        gymnasium.make_vec("stem_gym/AtomTargeting-v0", num_envs=2, instrument="nion")


REALTIME = {**STILL, "nion": {"realtime": True, "settle_s": 0.0}}


def test_the_stopwatch_and_the_sample_agree_on_the_dose():
    """In real time nobody tells the adapter what was spent: its clock and current against the sample's dose map."""
    nion = make(REALTIME, 1, CPU)
    try:
        start(nion, 11)
        frame, part = scan(dwell_s=5e-5), scan((0.2, 0.2, 0.5, 0.5), dwell_s=5e-5)
        program = [frame, park(0.4, 0.6), Dwell(ROW, one(0.6), 12), part]
        readings = [nion.execute(instruction) for instruction in program]
        truth = nion.truth()
        area = float(truth["cell_ang"].prod()) / truth["dose_map"][0].numel()
        delivered = float(truth["dose_map"].sum()) * area
        booked = sum(float(reading.electrons) for reading in readings)
        assert booked == pytest.approx(delivered, rel=0.02)
        asked_s = 2 * 64 * 64 * 5e-5 + 0.6
        assert CURRENT_PA * ELECTRONS_PER_PC * asked_s <= delivered * 1.0001
        clock_s = float(nion._sample.microscope.execute(Read(ROW, "clock_s")).data["value"])
        assert sum(float(reading.seconds) for reading in readings) == pytest.approx(clock_s, rel=0.2)
    finally:
        nion.close()
