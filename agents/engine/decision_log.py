"""A log of decisions: a folder from which a search can be looked at, replayed and asked "what if".

`log.json` says what was searched, with which seeds; `policy/` holds the agent as a saved policy. Then there is one file
for each decision of each row, `row000_decision00012.npz`: the observation, the decision, and what the person said that
led to it (nothing, where a new observation did). `row000_end.npz` holds the last observation and the figures. A file is
written as soon as the agent has decided, whole and under another name first, so that a kill at any moment leaves a log
that can be read. An array that is the same as in the file before is not written again. Data, never code.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from agents.engine.acquisition import Acquisition
from agents.engine.decision import Decision
from agents.engine.storage import read_contract, save_policy, write_whole
from agents.engine.verdicts import Verdict, acquisition_named, verdict_as_data, verdict_from_data
from agents.policy import Array, Policy
from stem_gym.core.errors import RecordError, StemGymError

FORMAT = "stem_gym decisions 1"
HEADER, POLICY = "log.json", "policy"
_HEADER_KEYS = {"format": str, "id": str, "task": dict, "seeds": list, "supervised": bool}
_TOLD, _SEEN, _DECIDED = "told", "seen.", "decided."
_FILE = re.compile(r"row(\d{3,})_(?:decision(\d{5,})|end)\.npz")
_TORN = (OSError, zipfile.BadZipFile, zlib.error, EOFError)
_FAULTS = (*_TORN, KeyError, TypeError, ValueError, NotImplementedError, StemGymError)


@dataclass(frozen=True)
class Entry:
    """One decision of one row, and what it was made from."""

    step: int  # actions of the episode before it
    cause: Verdict | None  # what the person said; None: a new observation
    observation: Mapping[str, Array]  # of one row, (…)
    decision: Decision  # of one row, B = 1
    action: Array  # what would be done, (…)
    acquisition: Acquisition  # in force


@dataclass(frozen=True)
class End:
    """What a row looked like after its last action."""

    observation: Mapping[str, Array]  # of one row, (…)
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class DecisionLog:
    """A log that was read."""

    folder: Path
    id: str
    agent: str
    task: Mapping[str, Any]
    seeds: tuple[int, ...]  # of the worlds, one a row
    supervised: bool  # whether somebody was asked
    rows: tuple[tuple[Entry, ...], ...]
    ends: tuple[End | None, ...]  # None where the episode was cut off
    left_out: str = ""  # a sentence on the last file, if a kill or a full disk tore it

    @classmethod
    def read(cls, folder: str | Path) -> DecisionLog:
        """The log in `folder`. Raises RecordError for a missing, damaged or foreign one; says which file and why.

        A torn last file of a row that has no end is left out; `left_out` says so.
        """
        path = Path(folder)
        header, mark = _read_header(path)
        try:
            agent = str(read_contract(path / POLICY)["agent"])
        except StemGymError as error:
            raise RecordError(f"The log {path} has no agent that can be read: {error}") from error
        rows, ends, torn = [], [], []
        for row in range(len(header["seeds"])):
            reader = _RowReader(path, row, mark, tuple(header["task"]["grid"]))
            rows.append(reader.entries())
            ends.append(reader.end())
            torn += reader.torn
        return cls(
            path, header["id"], agent, header["task"], tuple(header["seeds"]), header["supervised"], tuple(rows),
            tuple(ends), f"Left out, because torn in writing: {', '.join(torn)}." if torn else "",
        )  # fmt: skip

    def row(self, row: int = 0) -> tuple[Entry, ...]:
        """The decisions of a row. Raises RecordError for a row that is not there or has none."""
        if not 0 <= row < len(self.rows):
            raise RecordError(f"The log {self.folder} has the rows 0 to {len(self.rows) - 1}; asked for row {row}.")
        if not self.rows[row]:
            raise RecordError(f"The log {self.folder} holds no decision of row {row}.")
        return self.rows[row]

    def upto(self, step: int | None, row: int = 0) -> tuple[Entry, ...]:
        """The decisions of a row to the last one of `step` (None: its last step). Raises RecordError where none is."""
        entries = self.row(row)
        last = entries[-1].step
        if step is None:
            return entries
        if not 0 <= step <= last:
            raise RecordError(f"The log {self.folder} has the steps 0 to {last} of row {row}; asked for step {step}.")
        return tuple(entry for entry in entries if entry.step <= step)


@dataclass
class DecisionWriter:
    """Writes a log. Raises RecordError where the folder holds one already or can not be written."""

    folder: Path
    policy: Policy
    seeds: Sequence[int]
    supervised: bool = False
    _mark: str = ""
    _count: dict[int, int] = field(default_factory=dict)  # row → files
    _last: dict[int, dict[str, Array]] = field(default_factory=dict)  # row → arrays of its last file

    def __post_init__(self) -> None:
        face = self.policy.face
        if (self.folder / HEADER).exists() or any(_FILE.fullmatch(path.name) for path in _listed(self.folder)):
            raise RecordError(f"{self.folder} holds a log of decisions already; name a folder of its own for this one.")
        header = {
            "format": FORMAT,
            "id": face.id,
            "task": dict(face.task),
            "seeds": [int(seed) for seed in self.seeds],
            "supervised": self.supervised,
        }
        data = (json.dumps(header, indent=1) + "\n").encode()
        self._mark = _mark_of(data)
        save_policy(self.policy, self.folder / POLICY, {})
        self._write(HEADER, data)

    def add(self, row: int, entry: Entry) -> None:
        """Write a decision."""
        number = self._count.get(row, 0)
        told = {
            "number": number,
            "step": entry.step,
            "cause": verdict_as_data(entry.cause),
            "acquisition": entry.acquisition.model_dump(mode="json"),
        }
        arrays = {_SEEN + key: np.asarray(value) for key, value in entry.observation.items()}
        parts = {part.name: getattr(entry.decision, part.name) for part in fields(Decision)}
        arrays |= {_DECIDED + name: np.asarray(value) for name, value in parts.items() if value is not None}
        self._store(row, f"row{row:03d}_decision{number:05d}.npz", told, arrays | {"action": np.asarray(entry.action)})
        self._count[row] = number + 1

    def end(self, row: int, end: End) -> None:
        """Write how a row ended."""
        arrays = {_SEEN + key: np.asarray(value) for key, value in end.observation.items()}
        told = {"decisions": self._count.get(row, 0), "figures": dict(end.figures)}
        self._store(row, f"row{row:03d}_end.npz", told, arrays)

    def _store(self, row: int, name: str, told: dict[str, Any], arrays: dict[str, Array]) -> None:
        before = self._last.get(row, {})
        new = {key: value for key, value in arrays.items() if not _same(value, before.get(key))}
        told |= {"log": self._mark, "row": row, "arrays": sorted(arrays)}
        buffer = io.BytesIO()
        text = np.frombuffer(json.dumps(told).encode(), dtype=np.uint8)
        np.savez_compressed(buffer, allow_pickle=False, **{_TOLD: text}, **new)
        self._write(name, buffer.getvalue())
        self._last[row] = {key: value.copy() for key, value in arrays.items()}

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_whole(self.folder / name, data)
        except OSError as error:
            raise RecordError(f"Can not write {self.folder / name}: {error.strerror or error}.") from error


class _RowReader:
    """The files of one row, in order; arrays that were not written again are those of the file before."""

    def __init__(self, folder: Path, row: int, mark: str, grid: tuple[int, int]) -> None:
        self._folder, self._row, self._mark, self._grid = folder, row, mark, grid
        self._arrays: dict[str, Array] = {}
        self.torn: list[str] = []
        names = [found for path in _listed(folder) if (found := _FILE.fullmatch(path.name)) and int(found[1]) == row]
        self._numbers = sorted(int(found[2]) for found in names if found[2] is not None)
        self._ended = any(found[2] is None for found in names)

    def entries(self) -> tuple[Entry, ...]:
        made = []
        for place, number in enumerate(self._numbers):
            name = f"row{self._row:03d}_decision{number:05d}.npz"
            if number != place:
                raise RecordError(f"The log {self._folder} lacks decision {place} of row {self._row}; it has {name}.")
            found = self._open(name, last=number == self._numbers[-1] and not self._ended)
            if found is not None:
                made.append(self._checked(name, lambda found=found, number=number: self._entry(found, number)))
        return tuple(made)

    def end(self) -> End | None:
        name = f"row{self._row:03d}_end.npz"
        found = self._open(name, last=True) if self._ended else None
        if found is None:
            return None
        told, arrays = found
        if told.get("decisions") != len(self._numbers):
            raise RecordError(
                f"{self._folder / name} ends {told.get('decisions')} decisions of row {self._row}; the log has "
                f"{len(self._numbers)}."
            )
        return End(_part(arrays, _SEEN), told["figures"])

    def _open(self, name: str, last: bool) -> tuple[dict[str, Any], dict[str, Array]] | None:
        """What a file tells, and its arrays; None for a torn last one."""
        try:
            if not zipfile.is_zipfile(self._folder / name):
                raise zipfile.BadZipFile("it is cut short, or no npz file")
            with np.load(self._folder / name, allow_pickle=False) as stored:
                new = {key: stored[key] for key in stored.files}
        except _FAULTS as error:
            if last and isinstance(error, _TORN):
                self.torn.append(name)
                return None
            raise RecordError(f"{self._folder / name} is damaged: {error}.") from error
        return self._checked(name, lambda: self._completed(new))

    def _completed(self, new: dict[str, Array]) -> tuple[dict[str, Any], dict[str, Array]]:
        told = json.loads(new.pop(_TOLD).tobytes())
        if told["log"] != self._mark or told["row"] != self._row:
            raise ValueError(f"it belongs to row {told['row']} of the log {told['log']}, not to this one, {self._mark}")
        whole = {**self._arrays, **new}
        self._arrays = {key: whole[key] for key in told["arrays"]}
        return told, self._arrays

    def _entry(self, found: tuple[dict[str, Any], dict[str, Array]], number: int) -> Entry:
        told, arrays = found
        parts: dict[str, Any] = {"embedding": None, **_part(arrays, _DECIDED)}
        decision = Decision(**parts)
        shape = (1, *self._grid)
        shapes = {name: getattr(decision, name).shape for name in ("mean", "deviation", "acquisition")}
        if told["number"] != number or set(shapes.values()) != {shape} or decision.chosen.shape != (1,):
            raise ValueError(f"it is decision {told['number']} with maps of {shapes}; right would be {number}, {shape}")
        return Entry(
            step=int(told["step"]),
            cause=verdict_from_data(told["cause"]),
            observation=_part(arrays, _SEEN),
            decision=decision,
            action=arrays["action"],
            acquisition=acquisition_named(**told["acquisition"]),
        )

    def _checked(self, name: str, read: Any) -> Any:
        try:
            return read()
        except _FAULTS as error:
            raise RecordError(f"{self._folder / name} is no file of this log: {error}.") from error


def decision_of_row(decision: Decision, row: int) -> Decision:
    """One row of a decision, B = 1."""
    parts: dict[str, Any] = {}
    for part in fields(Decision):
        value = getattr(decision, part.name)
        parts[part.name] = None if value is None else value[row : row + 1].copy()
    return Decision(**parts)


def _read_header(folder: Path) -> tuple[dict[str, Any], str]:
    """The header and the mark that every file of the log bears."""
    path = folder / HEADER
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(
            f"{folder} is no log of decisions: {HEADER} can not be read ({error.strerror or error}). Name a folder "
            "that was recorded by `stem-gym search … --record`."
        ) from None
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is damaged or no header of a log: {error}.") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        given = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise RecordError(f"{path} is no header of a log: its format is {given!r}, it should be {FORMAT!r}.")
    wrong = [key for key, kind in _HEADER_KEYS.items() if not isinstance(header.get(key), kind)]
    grid = header["task"].get("grid") if "task" not in wrong else None
    if wrong or not (isinstance(grid, list) and len(grid) == 2 and all(isinstance(side, int) for side in grid)):
        raise RecordError(f"{path} is damaged: {', '.join(wrong) or 'task.grid'} is missing or of the wrong type.")
    return header, _mark_of(data)


def _mark_of(header: bytes) -> str:
    return hashlib.sha256(header).hexdigest()[:12]


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _part(arrays: Mapping[str, Array], prefix: str) -> Mapping[str, Array]:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def _same(one: Array, other: Array | None) -> bool:
    """Equal in type, shape and every bit."""
    if other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.tobytes() == other.tobytes()
