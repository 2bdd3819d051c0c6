"""What was decided is read back as it was; a log survives a kill; what is damaged or foreign is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from agents.engine.acquisition import Thompson
from agents.engine.decision_log import DecisionLog, DecisionWriter
from agents.engine.supervision import run_supervised
from agents.engine.verdicts import Prefer, Veto
from stem_gym.core.errors import RecordError
from tests.agents.recorded import Script, quick_agent, search_env

VETO, THOMPSON = Veto((5, 17)), Prefer(Thompson())


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A folder, the moments that a script saw, and the figures."""
    folder, env = tmp_path_factory.mktemp("log") / "run", search_env()
    script = Script({1: [VETO], 5: [THOMPSON]})
    (figures,) = run_supervised(quick_agent(env), env, script, folder, seed=4)
    return folder, script.moments, figures


@pytest.fixture
def folder(played, tmp_path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(played[0], tmp_path / "run"))


def name(number: int) -> str:
    return f"row000_decision{number:05d}.npz"


def test_what_was_decided_and_said_is_read_back(played):
    folder, moments, figures = played
    log = DecisionLog.read(folder)
    entries = log.row(0)
    assert len(entries) == len(moments) == 9 + 2
    for entry, moment in zip(entries, moments, strict=True):
        assert (entry.step, entry.acquisition, entry.cause) == (moment.step, moment.acquisition, moment.cause)
        for key in ("mean", "deviation", "acquisition", "chosen", "seeding", "embedding"):
            np.testing.assert_array_equal(getattr(entry.decision, key), getattr(moment.decision, key), key)
        for key, value in moment.observation.items():
            assert entry.observation[key].dtype == value.dtype
            np.testing.assert_array_equal(entry.observation[key], value, key)
    assert [entry.cause for entry in entries if entry.cause] == [VETO, THOMPSON]
    assert log.ends[0].figures["best_value"] == figures["best_value"]
    assert log.ends[0].observation["measured"].sum() == 9 == entries[-1].observation["measured"].sum() + 1
    assert (log.agent, log.supervised, log.left_out) == ("dkl", True, "")
    assert [entry.step for entry in log.upto(1)] == [0, 1, 1]


def test_what_did_not_change_is_written_once(played):
    stored = [set(np.load(path, allow_pickle=False).files) for path in sorted(played[0].glob("row000_d*.npz"))]
    assert "seen.image" in stored[0] and all("seen.image" not in files for files in stored[1:])
    again = stored[7]  # decided again at step 5, by another acquisition function: the belief is the same
    assert "decided.acquisition" in again and not {"decided.mean", "decided.embedding", "seen.value"} & again


def test_a_log_can_be_read_after_a_kill_at_any_moment(played, tmp_path):
    """The files appear in the order of their names, each whole; a draft may be left."""
    files = sorted(played[0].glob("row000_*.npz"))
    for count in range(len(files) + 1):
        cut = tmp_path / str(count)
        shutil.copytree(played[0], cut, ignore=shutil.ignore_patterns("row*"))
        for path in files[:count]:
            shutil.copy(path, cut)
        (cut / f".{name(count)}.123").write_bytes(b"PK half a file")
        log = DecisionLog.read(cut)
        assert len(log.rows[0]) == min(count, 11) and (log.ends[0] is not None) == (count == len(files))


def test_a_torn_last_file_is_left_out_and_said(folder):
    (folder / "row000_end.npz").unlink()
    torn = folder / name(10)
    whole = torn.read_bytes()
    for left in (0, 3, len(whole) // 2, len(whole) - 1):
        torn.write_bytes(whole[:left])
        log = DecisionLog.read(folder)
        assert len(log.row(0)) == 10
        assert name(10) in log.left_out and "torn" in log.left_out
    torn.write_bytes(bytes(len(whole)))  # what some file systems leave after a power cut
    assert name(10) in DecisionLog.read(folder).left_out


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def flip(path: Path) -> None:
    """Change a byte in the middle of the compressed data."""
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(bytes(data))


def resave(path: Path, **changes: object) -> None:
    with np.load(path) as stored:
        arrays = {key: stored[key] for key in stored.files}
    told = json.loads(arrays.pop("told").tobytes())
    told |= changes.pop("told", {})
    text = np.frombuffer(json.dumps(told).encode(), dtype=np.uint8)
    np.savez_compressed(path, **(arrays | {"told": text} | changes))


DAMAGE = {
    "cut in the middle": (lambda f: cut(f / name(4)), f"{name(4)} is damaged"),
    "a flipped byte": (lambda f: flip(f / name(8)), name(8)),
    "a file is gone": (lambda f: (f / name(2)).unlink(), "lacks decision 2 of row 0"),
    "the last is gone": (lambda f: (f / name(10)).unlink(), "ends 11 decisions of row 0; the log has 10"),
    "of another log": (lambda f: resave(f / name(3), told={"log": "0123456789ab"}), "row 0 of the log 0123456"),
    "of another place": (lambda f: shutil.copy(f / name(3), f / name(4)), "it is decision 3.*right would be 4"),
    "no file of a log": (lambda f: np.savez(f / name(3), x=np.zeros(3)), f"{name(3)} is no file of this log"),
    "code inside": (
        lambda f: resave(f / name(3), action=np.array([{"x": 1}], dtype=object)), f"{name(3)} is damaged.*allow_pickle",
    ),
    "another size": (lambda f: resave(f / name(3), **{"decided.mean": np.zeros((1, 3, 3))}), "right would be 3"),
    "an unknown verdict": (lambda f: resave(f / name(3), told={"cause": {"say": "maybe"}}), "Unknown verdict 'maybe'"),
    "a header changed": (
        lambda f: (f / "log.json").write_text((f / "log.json").read_text().replace("edge", "egde")), "belongs to row 0",
    ),
    "another format": (lambda f: (f / "log.json").write_text('{"format": "x"}'), "its format is 'x'"),
    "no header": (lambda f: (f / "log.json").unlink(), "is no log of decisions"),
    "a header that is none": (lambda f: (f / "log.json").write_text("[1"), "damaged or no header"),
    "no grid": (
        lambda f: (f / "log.json").write_text((f / "log.json").read_text().replace('"grid"', '"gird"')), "task.grid",
    ),
    "no agent": (lambda f: shutil.rmtree(f / "policy"), "has no agent that can be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_and_named(folder, case):
    damage, said = DAMAGE[case]
    damage(folder)
    with pytest.raises(RecordError, match=said):
        DecisionLog.read(folder)


def test_a_log_is_never_written_over(folder, tmp_path):
    policy = quick_agent(search_env())
    with pytest.raises(RecordError, match="holds a log of decisions already"):
        DecisionWriter(folder, policy, [1])
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="Can not write"):
        DecisionWriter(tmp_path / "file", policy, [1])


def test_a_row_or_step_that_is_not_there_is_refused(played):
    log = DecisionLog.read(played[0])
    with pytest.raises(RecordError, match=r"rows 0 to 0; asked for row 1"):
        log.row(1)
    with pytest.raises(RecordError, match=r"steps 0 to 8 of row 0; asked for step 9"):
        log.upto(9)
