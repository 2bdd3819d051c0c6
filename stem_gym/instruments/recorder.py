"""A recorder around any instrument: one append-only HDF5 file per episode, hash-chained, readable after a kill.

Layout: `/records/000000` to `/records/000031`, `/records/more/000032` and so on, a page of 32 in the one before; places
that are laid out but not yet used are empty. Each record holds `record` (JSON text: the instruction asked, the
reading or the refusal, the controls read back before and after, wall and monotonic time), its arrays, and the
attributes `hash` and `previous`. A record's hash is SHA-256 over the hash before it, its text and its arrays; the first
one follows the hash of the root attributes, so nothing can be changed, dropped from the middle or swapped unseen.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from stem_gym.core.errors import CapabilityError, InstructionError, RecordError
from stem_gym.core.instructions import Instruction, Read, Reading
from stem_gym.core.instrument import Capabilities, Instrument
from stem_gym.core.streams import Streams
from stem_gym.core.wire import instruction_from_json, instruction_to_json, reading_from_json, reading_to_json

FORMAT = "stem_gym recording"
FORMAT_VERSION = 2
# "latest" would leave a file that can not be opened after a kill; up to v108 every flushed record stays readable.
_LIBVER = ("earliest", "v108")
_FILTERS = {"compression": "gzip", "compression_opts": 4, "shuffle": True, "fletcher32": True}
# HDF5 moves the names of a group's members when the group grows: a kill between two writes would lose all of them. So
# records fill places that were laid out and flushed a page ahead; nothing that leads to older ones is written again.
_PAGE, _MORE = 32, "more"
# What h5py raises for a file that is damaged or that a kill tore; most are no OSError.
_FAULTS = (OSError, RuntimeError, KeyError, AttributeError, ValueError, TypeError)
_READ_AS = "read_as"  # attribute of an array that is stored as integers: the type it was given in
_VERSIONED = ("stem-gym", "torch", "numpy", "h5py", "gymnasium")


@dataclass(frozen=True)
class Provenance:
    """What made the episode; goes into the file's root attributes."""

    policy: str = ""
    policy_hash: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)  # JSON-ready
    config_hash: str = ""
    envelope: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = ()


class Recorder(Instrument):
    """The wrapped instrument, with every instruction and answer written down before the answer is passed on.

    `state` names the controls that are read back before and after each instruction (default: all readable ones).
    A reset of every row begins a new file `episode_00000.h5`, …; a reset of some rows is a record in the running one.
    Raises RecordError where `directory` can not be written, before anything is sent to the instrument; when writing
    fails later, the instrument is aborted (made safe) first.
    """

    def __init__(
        self,
        instrument: Instrument,
        directory: str | os.PathLike[str],
        provenance: Provenance | None = None,
        state: Sequence[str] | None = None,
    ) -> None:
        self.instrument = instrument
        self.capabilities: Capabilities = instrument.capabilities
        self.rows = instrument.rows
        self.device = instrument.device
        self.directory = Path(directory)
        self.provenance = provenance or Provenance()
        can_read = "Read" in self.capabilities.verbs
        self._state = tuple(sorted(self.capabilities.readable) if state is None else state) if can_read else ()
        self._writer: _Writer | None = None
        _check_writable(self.directory)

    @property
    def path(self) -> Path | None:
        """The file of the running episode."""
        return self._writer.path if self._writer else None

    def reset(self, streams: Streams, rows: Tensor, options: Mapping[str, Any] | None = None) -> None:
        record = {"kind": "reset", "rows": rows.tolist(), "options": _plain(options or {})}
        if self._writer is None or len(rows) == self.rows:
            self._end_episode()
            self._writer = _Writer(_next_path(self.directory), self._root_attributes(streams))
        self.instrument.reset(streams, rows, options)
        self._append(record | {"state": self._read_back(rows)})

    def execute(self, instruction: Instruction) -> Reading:
        if self._writer is None:
            raise RecordError("Nothing is being recorded yet: call reset() before execute().")
        record: dict[str, Any] = {"kind": "instruction", "instruction": instruction_to_json(instruction)}
        record |= {"begun": _now(), "before": self._read_back(instruction.rows)}
        try:
            reading = self.instrument.execute(instruction)
        except BaseException as error:
            refused = isinstance(error, InstructionError | CapabilityError)
            record["kind"] = "refusal" if refused else "fault"
            self._append(record | {"error": type(error).__name__, "message": str(error)})
            raise
        arrays: dict[str, np.ndarray] = {}
        record |= {"after": self._read_back(instruction.rows), "reading": reading_to_json(reading, arrays)}
        self._append(record, arrays)
        return reading

    def truth(self) -> Mapping[str, Tensor]:
        return self.instrument.truth()

    def abort(self) -> None:
        self.instrument.abort()  # safe first, then written down
        self._append({"kind": "abort"})

    def close(self) -> None:
        try:
            self.instrument.close()
        finally:
            self._end_episode()

    def snapshot(self) -> Any:
        return self.instrument.snapshot()

    def restore(self, snapshot: Any, streams: Streams) -> None:
        self.instrument.restore(snapshot, streams)
        self._append({"kind": "restore"})

    def _end_episode(self) -> None:
        if self._writer is not None:
            self._append({"kind": "end"})
            self._writer.close()
            self._writer = None

    def _append(self, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        if self._writer is None:
            return
        try:
            self._writer.append(dict(record) | {"ended": _now()}, arrays or {})
        except (OSError, ValueError, RuntimeError) as error:
            self.instrument.abort()
            raise RecordError(f"The record could not be written to {self._writer.path}: {error}.") from error

    def _read_back(self, rows: Tensor) -> dict[str, Any]:
        """The controls' values, (n,) each; a control that can not be read says why."""
        values: dict[str, Any] = {}
        for name in self._state:
            try:
                values[name] = self.instrument.execute(Read(rows, name)).data["value"].tolist()
            except Exception as error:
                values[name] = f"{type(error).__name__}: {error}"
        return values

    def _root_attributes(self, streams: Streams) -> dict[str, Any]:
        provenance, state = self.provenance, streams.snapshot()
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "created": datetime.now(UTC).isoformat(),
            "instrument": type(self.instrument).__name__,
            "verbs": json.dumps(sorted(self.capabilities.verbs)),
            "policy": provenance.policy,
            "policy_hash": provenance.policy_hash,
            "config": json.dumps(_plain(provenance.config), sort_keys=True),
            "config_hash": provenance.config_hash,
            "envelope": json.dumps(_plain(provenance.envelope), sort_keys=True),
            "seeds": json.dumps([int(seed) for seed in provenance.seeds]),
            "streams": json.dumps({"key": state[:, :2].tolist(), "episode": state[:, 2].tolist()}),
            "versions": json.dumps(_versions(), sort_keys=True),
        }


@dataclass(frozen=True)
class Record:
    """One entry of a recording. `instruction` and `reading` are None where the kind has none."""

    kind: str  # reset, instruction, refusal, fault, abort, restore, end
    instruction: Instruction | None
    reading: Reading | None
    details: Mapping[str, Any]  # the record's JSON: times, state before and after, error message
    hash: str


@dataclass(frozen=True)
class Recording:
    """A whole episode as it was recorded. `complete` is False where the writer did not come to its end."""

    attributes: Mapping[str, Any]
    records: tuple[Record, ...]
    complete: bool

    @property
    def readings(self) -> list[Reading]:
        return [record.reading for record in self.records if record.reading is not None]


def read_recording(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Recording:
    """The instructions and readings of one file, its hash chain verified. A last record that a kill tore is left out.

    Raises RecordError for a file that is missing, foreign or damaged, or whose chain does not hold; says where.
    """
    try:
        with h5py.File(path, "r") as file:
            return _read(file, device)
    except RecordError:
        raise
    except _FAULTS as error:
        raise RecordError(f"{path} can not be read as a recording: {error}.") from error


def _read(file: h5py.File, device: torch.device | str) -> Recording:
    attributes = dict(file.attrs)
    if attributes.get("format") != FORMAT or attributes.get("format_version") != FORMAT_VERSION:
        raise RecordError(
            f"{file.filename} is no {FORMAT} of version {FORMAT_VERSION}; it says "
            f"{attributes.get('format')!r}, version {attributes.get('format_version')!r}."
        )
    before, records, groups = _root_hash(attributes), [], _groups(file)
    for index, group in enumerate(groups):
        try:
            text, arrays, types, given = _contents(group)
            right, trouble = _record_hash(before, text, arrays), ""
        except _FAULTS as error:
            given, right, trouble = "", "", f": {error}"
        if given != right or not given:
            if not any(map(_holds_something, groups[index + 1 :])):
                break  # the end, or a last record that a kill tore
            raise RecordError(
                f"{file.filename}: the hash chain breaks at record {index}; it was changed or is gone{trouble}."
            )
        records.append(_parse(text, {key: array.astype(types[key]) for key, array in arrays.items()}, right, device))
        before = right
    return Recording(attributes, tuple(records), bool(records) and records[-1].kind == "end")


def _groups(file: h5py.File) -> list[h5py.Group | None]:
    """The places of all records, page after page; None where one can not be opened."""
    groups: list[h5py.Group | None] = []
    page = _opened(file, "records")
    while page is not None:
        groups += [_opened(page, _name(len(groups) + i)) for i in range(_PAGE)]
        page = _opened(page, _MORE)
    return groups


def _opened(parent: h5py.Group, name: str) -> h5py.Group | None:
    try:
        return parent[name]
    except _FAULTS:
        return None


def _holds_something(group: h5py.Group | None) -> bool:
    try:
        return group is not None and "hash" in group.attrs
    except _FAULTS:
        return False


def _name(index: int) -> str:
    return f"{index:06d}"


def _contents(group: h5py.Group | None) -> tuple[str, dict[str, np.ndarray], dict[str, str], str]:
    """Text, arrays as they are stored, the type that each was given in, and the hash. Raises one of _FAULTS."""
    if group is None:
        raise KeyError("it can not be opened")
    sets = {name: group[name] for name in group if name != "record"}
    types = {name: str(dataset.attrs[_READ_AS]) for name, dataset in sets.items()}
    arrays = {name: dataset[()] for name, dataset in sets.items()}
    return group["record"].asstr()[()], arrays, types, str(group.attrs["hash"])


def _parse(text: str, arrays: Mapping[str, np.ndarray], digest: str, device: torch.device | str) -> Record:
    details = json.loads(text)
    asked, answer = details.pop("instruction", None), details.pop("reading", None)
    instruction = instruction_from_json(asked, device) if asked else None
    reading = reading_from_json(answer, arrays, device) if answer else None
    return Record(details["kind"], instruction, reading, details, digest)


class _Writer:
    """One open file; every append is flushed before it returns."""

    def __init__(self, path: Path, attributes: Mapping[str, Any]) -> None:
        self.path = path
        self._lock = threading.Lock()  # abort() may write from another thread
        self._count = 0
        try:
            self._file = h5py.File(path, "x", libver=_LIBVER)
            self._file.attrs.update(attributes)
            self._page = _lay_out(self._file.create_group("records"), 0)
            self._file.flush()
        except (OSError, RuntimeError, ValueError) as error:
            raise RecordError(f"The recording {path} can not be made: {error}.") from error
        self._last_hash = _root_hash(dict(self._file.attrs))

    def append(self, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        text = json.dumps(record, sort_keys=True)
        with self._lock:
            if self._count and self._count % _PAGE == 0:
                self._page = _lay_out(self._page[_MORE], self._count)
                self._file.flush()
            group = self._page[_name(self._count)]
            group.create_dataset("record", data=text, dtype=h5py.string_dtype())
            stored = {name: _compact(array) for name, array in arrays.items()}
            for name, array in stored.items():
                dataset = group.create_dataset(name, data=array, chunks=array.shape, **_FILTERS)
                dataset.attrs[_READ_AS] = str(arrays[name].dtype)
            digest = _record_hash(self._last_hash, text, stored)
            group.attrs["previous"], group.attrs["hash"] = self._last_hash, digest
            self._file.flush()
            self._last_hash, self._count = digest, self._count + 1

    def close(self) -> None:
        with self._lock:
            self._file.close()


def _lay_out(page: h5py.Group, first: int) -> h5py.Group:
    """The page with the empty places of its records and of the page after it."""
    for name in (*(_name(first + i) for i in range(_PAGE)), _MORE):
        page.create_group(name)
    return page


def _compact(array: np.ndarray) -> np.ndarray:
    """Counts come as floats: whole numbers are stored as the smallest integers that hold them; they compress well."""
    if not np.issubdtype(array.dtype, np.floating) or array.size == 0:
        return array
    low, high = float(array.min()), float(array.max())
    whole = low >= -(2.0**31) and high < 2.0**31 and bool(np.all(array == np.rint(array)))
    if not whole or bool(np.any(np.signbit(array) & (array == 0))):
        return array
    kinds = (np.uint8, np.uint16, np.uint32) if low >= 0 else (np.int8, np.int16, np.int32)
    return array.astype(next(kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max))


def _record_hash(before: str, text: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(before.encode())
    digest.update(text.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _root_hash(attributes: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps({k: str(v) for k, v in attributes.items()}, sort_keys=True).encode()).hexdigest()


def _check_writable(directory: Path) -> None:
    probe = directory / f".probe-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise RecordError(f"Can not record into {directory}: {error}. Choose a folder that can be written.") from error


def _next_path(directory: Path) -> Path:
    taken = [int(m[1]) for p in directory.glob("episode_*.h5") if (m := re.fullmatch(r"episode_(\d+)\.h5", p.name))]
    return directory / f"episode_{max(taken, default=-1) + 1:05d}.h5"


def _now() -> dict[str, Any]:
    return {"wall": datetime.now(UTC).isoformat(), "monotonic_s": time.monotonic()}


def _plain(value: Any) -> Any:
    """`value` as plain JSON; what JSON does not know becomes its text."""
    return json.loads(json.dumps(value, default=str))


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
