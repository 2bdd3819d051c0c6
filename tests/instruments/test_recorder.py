"""The recorder: what goes in comes out, nothing can be changed unseen, and a kill loses nothing that was flushed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from stem_gym.core.conformance import check_instrument
from stem_gym.core.errors import InstructionError, InstrumentError, RecordError
from stem_gym.core.instructions import FULL_FRAME, Dwell, Instruction, Park, Read, Reading, Scan, no_dose, verb
from stem_gym.core.instrument import Capabilities, Instrument, Limits, check_instruction
from stem_gym.core.streams import Streams
from stem_gym.instruments import simulated
from stem_gym.instruments.recorder import FORMAT, FORMAT_VERSION, Provenance, Recorder, _Writer, read_recording


class Bench(Instrument):
    """Answers with numbers that can be told apart: counts, fractions, and one control that follows the clock."""

    def __init__(self, rows: int = 1) -> None:
        self.rows, self.device = rows, torch.device("cpu")
        self.capabilities = Capabilities(
            verbs=frozenset({"Scan", "Park", "Dwell", "Read"}),
            detectors=frozenset({"haadf"}),
            readable=frozenset({"clock_s"}),
            limits={"Dwell.time_s": Limits(0.0, 10.0)},
        )
        self.clock_s, self.aborted, self.closed = 0.0, 0, 0

    def reset(self, streams, rows, options=None) -> None:
        self.clock_s = 0.0

    def execute(self, instruction: Instruction) -> Reading:
        check_instruction(instruction, self.capabilities, self.rows)
        n = len(instruction.rows)
        if isinstance(instruction, Read):
            return no_dose(instruction, torch.zeros(n), {"value": torch.full((n,), self.clock_s)})
        if isinstance(instruction, Dwell) and float(instruction.time_s[0]) == 9.0:
            raise InstrumentError("the detector tripped")
        self.clock_s += 1.0
        data = {}
        if isinstance(instruction, Scan):
            counts = torch.arange(n * 4096, dtype=torch.float32).reshape(n, 1, 64, 64) % 251
            data = {"images": counts, "fractions": torch.linspace(-1, 1, 100 * n).reshape(n, 100)}
        one = torch.ones(n)
        metadata = {"vendor": "bench, model 1"}
        return Reading(
            verb(instruction), instruction.rows, one, 40 * one, 2 * one, data, {"pixel_ang": 0.5 * one}, metadata
        )

    def abort(self) -> None:
        self.aborted += 1

    def close(self) -> None:
        self.closed += 1


REPO = Path(__file__).resolve().parents[2]
ROW = torch.tensor([0])


def scan(rows: torch.Tensor = ROW) -> Scan:
    n = len(rows)
    return Scan(rows, torch.full((n,), 30.0), (64, 64), torch.full((n,), 1e-5), torch.tensor([FULL_FRAME] * n))


def dwell(time_s: float) -> Dwell:
    return Dwell(ROW, torch.tensor([time_s]), trace=4)


def record_episode(folder: Path, **settings) -> tuple[Path, list[Instruction], list[Reading]]:
    recorder = Recorder(Bench(), folder, Provenance(policy_hash="abc", config={"a": 1}, seeds=(7,)), **settings)
    recorder.reset(Streams([7]), ROW, {"specimen": "graphene"})
    asked = [scan(), Park(ROW, torch.tensor([0.25]), torch.tensor([0.75])), dwell(2.0)]
    answered = [recorder.execute(instruction) for instruction in asked]
    path = recorder.path
    recorder.close()
    assert path is not None
    return path, asked, answered


def assert_same(one: object, other: object) -> None:
    """Equal field by field, tensors with their type and every bit."""
    assert type(one) is type(other)
    for key, value in vars(one).items():
        twin = getattr(other, key)
        pairs = [(value[k], twin[k]) for k in value] if isinstance(value, dict) else [(value, twin)]
        for a, b in pairs:
            assert (torch.equal(a, b) and a.dtype == b.dtype) if isinstance(a, torch.Tensor) else a == b, key


def test_what_was_asked_and_answered_comes_back(tmp_path):
    path, asked, answered = record_episode(tmp_path)
    recording = read_recording(path)
    kept = [record for record in recording.records if record.kind == "instruction"]
    assert recording.complete and len(kept) == 3
    for record, instruction, reading in zip(kept, asked, answered, strict=True):
        assert_same(record.instruction, instruction)
        assert_same(record.reading, reading)
    assert_same(recording.readings[0], answered[0])


def test_root_attributes_say_what_made_the_episode(tmp_path):
    attributes = read_recording(record_episode(tmp_path)[0]).attributes
    assert attributes["policy_hash"] == "abc" and attributes["config"] == '{"a": 1}' and attributes["seeds"] == "[7]"
    assert attributes["instrument"] == "Bench" and '"torch"' in attributes["versions"]


def test_state_is_read_back_before_and_after(tmp_path):
    records = read_recording(record_episode(tmp_path)[0]).records
    assert records[0].kind == "reset" and records[0].details["options"] == {"specimen": "graphene"}
    states = [
        (r.details["before"]["clock_s"], r.details["after"]["clock_s"]) for r in records if r.kind == "instruction"
    ]
    assert states == [
        ([0.0], [1.0]),
        ([1.0], [2.0]),
        ([2.0], [3.0]),
    ]  # every instruction moves the bench's clock by 1 s


def test_times_only_go_forward(tmp_path):
    times = [r.details["ended"]["monotonic_s"] for r in read_recording(record_episode(tmp_path)[0]).records]
    assert times == sorted(times)


def test_refusals_and_faults_are_raised_and_written(tmp_path):
    recorder = Recorder(Bench(), tmp_path)
    recorder.reset(Streams([1]), ROW)
    with pytest.raises(InstructionError):
        recorder.execute(dwell(11.0))
    with pytest.raises(InstrumentError, match="tripped"):
        recorder.execute(dwell(9.0))
    recorder.abort()
    path = recorder.path
    recorder.close()
    records = read_recording(path).records
    assert [r.kind for r in records] == ["reset", "refusal", "fault", "abort", "end"]
    assert float(records[1].instruction.time_s) == 11.0 and "tripped" in records[2].details["message"]


def test_counts_are_stored_as_whole_numbers(tmp_path):
    path, _, answered = record_episode(tmp_path)
    with h5py.File(path) as file:
        images = file["records/000001/data.images"]
        assert images.dtype == np.uint8 and images.compression == "gzip" and images.shuffle and images.fletcher32
        assert file["records/000001/data.fractions"].dtype == np.float32
        assert (
            images.id.get_storage_size() < answered[0].data["images"].nbytes / 4
        )  # four bytes a count to one, then gzip


def test_one_file_per_episode_and_none_is_overwritten(tmp_path):
    recorder = Recorder(Bench(rows=2), tmp_path)
    streams = Streams([1, 2])
    recorder.reset(streams, torch.arange(2))
    recorder.reset(streams, torch.tensor([1]))  # one row of two: the same file goes on
    recorder.reset(streams, torch.arange(2))
    recorder.close()
    record_episode(tmp_path)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["episode_00000.h5", "episode_00001.h5", "episode_00002.h5"]
    assert [r.kind for r in read_recording(tmp_path / files[0]).records] == ["reset", "reset", "end"]


def change_a_count(file: h5py.File) -> None:
    file["records/000001/data.images"][0, 0, 0, 0] += 1


def change_an_instruction(file: h5py.File) -> None:
    text = file["records/000002/record"].asstr()[()]
    file["records/000002/record"][()] = text.replace("0.25", "0.35")


def drop_a_record(file: h5py.File) -> None:
    del file["records/000002"]


def drop_the_last_hash(file: h5py.File) -> None:
    del file["records/000002"].attrs["hash"]  # only the very last record may lack one


def change_the_policy(file: h5py.File) -> None:
    file.attrs["policy_hash"] = "xyz"


@pytest.mark.parametrize(
    "forge", [change_a_count, change_an_instruction, drop_a_record, drop_the_last_hash, change_the_policy]
)
def test_no_change_goes_unseen(tmp_path, forge):
    path, _, _ = record_episode(tmp_path)
    read_recording(path)
    with h5py.File(path, "r+") as file:
        forge(file)
    with pytest.raises(RecordError, match="chain breaks"):
        read_recording(path)


@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_a_truncated_or_foreign_file_is_refused(tmp_path, keep):
    path, _, _ = record_episode(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RecordError, match="can not be read"):
        read_recording(path)


def test_a_file_of_another_format_is_refused(tmp_path):
    h5py.File(tmp_path / "other.h5", "w").close()
    with pytest.raises(RecordError, match="no stem_gym recording"):
        read_recording(tmp_path / "other.h5")


def test_a_place_that_can_not_be_written_is_refused_before_anything_moves(tmp_path):
    (tmp_path / "file").write_text("in the way")
    bench = Bench()
    with pytest.raises(RecordError, match="Choose a folder"):
        Recorder(bench, tmp_path / "file" / "runs")
    assert bench.clock_s == 0.0


def test_execute_before_reset_is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"call reset\(\)"):
        Recorder(Bench(), tmp_path).execute(scan())


def test_a_failing_disk_makes_the_instrument_safe(tmp_path, monkeypatch):
    bench = Bench()
    recorder = Recorder(bench, tmp_path)
    recorder.reset(Streams([1]), ROW)

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(h5py.Group, "create_dataset", full)
    with pytest.raises(RecordError, match="no space left"):
        recorder.execute(dwell(1.0))
    assert bench.aborted == 1


SIMULATED = {
    "specimen": {"kind": "graphene", "cell_ang": 12.0},
    "fov_ang": 10.0,
    "drift": {"speed_ang_per_s": 0.3, "diffusion_ang2_per_s": 0.01},
}


def test_a_recorded_instrument_keeps_every_rule_for_instruments(tmp_path):
    check_instrument(Recorder(simulated.make(SIMULATED, 3, torch.device("cpu")), tmp_path))


def test_recording_changes_nothing_of_what_is_recorded(tmp_path):
    seen = []
    for wrap in (lambda bare: bare, lambda bare: Recorder(bare, tmp_path)):
        instrument = wrap(simulated.make(SIMULATED, 2, torch.device("cpu")))
        rows = torch.arange(2)
        streams = Streams([3, 4])
        streams.next_episode(rows)
        instrument.reset(streams, rows)
        readings = [instrument.execute(scan(rows)) for _ in range(3)]
        seen.append(torch.stack([reading.data["images"] for reading in readings]))
        instrument.close()
    assert torch.equal(*seen)


def tear_the_last_record(file: h5py.File) -> None:
    del file["records/000004"]
    file["records/000004"] = h5py.SoftLink("/nowhere")


def tear_a_middle_record(file: h5py.File) -> None:
    del file["records/000002"]
    file["records/000002"] = h5py.SoftLink("/nowhere")


def test_a_torn_record_is_left_out_at_the_end_and_refused_before_it(tmp_path):
    path, _, _ = record_episode(tmp_path)
    with h5py.File(path, "r+") as file:
        tear_the_last_record(file)
    recording = read_recording(path)
    assert len(recording.records) == 4 and not recording.complete
    with h5py.File(path, "r+") as file:
        tear_a_middle_record(file)
    with pytest.raises(RecordError, match="chain breaks at record 2"):
        read_recording(path)


def test_whatever_hdf5_finds_wrong_is_a_record_error(tmp_path, monkeypatch):
    path, _, _ = record_episode(tmp_path)
    for fault in (AttributeError("no id"), RuntimeError("Link iteration failed"), KeyError("addr overflow")):

        def fail(*_: object, fault: Exception = fault) -> None:
            raise fault

        monkeypatch.setattr(h5py.AttributeManager, "__iter__", fail)
        with pytest.raises(RecordError, match="can not be read"):
            read_recording(path)


def test_an_episode_of_many_records_comes_back_in_order(tmp_path):
    recorder = Recorder(Bench(), tmp_path)
    recorder.reset(Streams([1]), ROW)
    for k in range(100):
        recorder.execute(dwell(0.01 * (k + 1)))
    path = recorder.path
    recorder.close()
    recording = read_recording(path)
    times_s = [float(r.instruction.time_s) for r in recording.records if r.kind == "instruction"]
    assert recording.complete and times_s == pytest.approx([0.01 * (k + 1) for k in range(100)])


def half_written(before: bytes, after: bytes) -> Iterator[bytes]:
    """Files that a kill may leave between two flushes: one change in place alone, and each of them missing.

    What was added at the end is there or still zero.
    """
    old, new = (np.frombuffer(data, np.uint8)[: len(before)] for data in (before, after))
    changed = np.flatnonzero(old != new)
    runs = np.split(changed, np.flatnonzero(np.diff(changed) > 16) + 1)
    for tail in (after[len(before) :], bytes(len(after) - len(before))):
        for base, other in ((old, new), (new, old)):
            for run in runs:
                mixed = base.copy()
                mixed[run] = other[run]
                yield mixed.tobytes() + tail


def test_a_half_written_record_takes_no_other_with_it(tmp_path):
    path, images = tmp_path / "a.h5", np.arange(64.0, dtype=np.float32).reshape(1, 8, 8)
    writer = _Writer(path, {"format": FORMAT, "format_version": FORMAT_VERSION})
    for flushed in range(36):
        before = path.read_bytes()
        writer.append({"kind": "abort", "pad": "x" * 300}, {"images": images})
        if flushed in (3, 10, 32):  # where a plain group would move its names, and where a page ends
            for data in half_written(before, path.read_bytes()):
                (tmp_path / "mixed.h5").write_bytes(data)
                assert len(read_recording(tmp_path / "mixed.h5").records) >= flushed


KILLS = """
import mmap, os, random, signal, sys, time
from pathlib import Path
import numpy as np
from stem_gym.instruments.recorder import FORMAT, FORMAT_VERSION, _Writer

draw = random.Random(5)
for number in range(50):
    flushed = mmap.mmap(-1, 8)  # shared with the child: how many records it has flushed
    child = os.fork()
    if child == 0:
        writer = _Writer(Path(sys.argv[1]) / f"{number}.h5", {"format": FORMAT, "format_version": FORMAT_VERSION})
        images = np.random.default_rng(number).poisson(5, (1, 1, 64, 64)).astype(np.float32)
        count = 0
        while True:
            writer.append({"kind": "abort", "pad": "x" * 500}, {"images": images})
            count += 1
            flushed[:] = count.to_bytes(8, "little")
    while not any(flushed[:]):
        time.sleep(0.001)
    time.sleep(draw.uniform(0.0, 0.12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(int.from_bytes(flushed[:], "little"), flush=True)
"""


def test_no_kill_at_any_moment_loses_a_flushed_record(tmp_path):
    """A writer that never pauses, killed fifty times in the middle of what it does."""
    done = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path)], cwd=REPO, capture_output=True, text=True)
    flushed = [int(line) for line in done.stdout.split()]
    assert len(flushed) == 50, done.stderr
    read = [len(read_recording(tmp_path / f"{number}.h5").records) for number in range(50)]
    assert all(found >= count for found, count in zip(read, flushed, strict=True)), (read, flushed)


ENDLESS = """
import sys, torch
from tests.instruments.test_recorder import Bench, ROW, Recorder, Streams, scan
recorder = Recorder(Bench(), sys.argv[1])
recorder.reset(Streams([1]), ROW)
while True:
    recorder.execute(scan())
    print("flushed", flush=True)
"""


def test_every_flushed_record_survives_a_kill(tmp_path):
    command = [sys.executable, "-c", ENDLESS, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(20):
            assert writer.stdout.readline() == "flushed\n"
        writer.send_signal(signal.SIGKILL)
        flushed = 20 + writer.stdout.read().count("flushed")
    recording = read_recording(tmp_path / "episode_00000.h5")
    assert not recording.complete
    assert len(recording.readings) >= flushed
    assert torch.equal(recording.readings[-1].data["images"], recording.readings[0].data["images"])
