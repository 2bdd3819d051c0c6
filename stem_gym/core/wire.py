"""Instructions and readings as JSON, for logs, wires and other programs. Data only: reading it can not run code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stem_gym.core.errors import RecordError, unknown_name
from stem_gym.core.instructions import VERBS, Instruction, Reading, TraceRule, verb

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)
}
Arrays = MutableMapping[str, np.ndarray]
INLINE_ELEMENTS = 64  # longer tensors go into `arrays`, where one is given


def instruction_to_json(instruction: Instruction) -> dict[str, Any]:
    """A JSON-ready dictionary: the verb and every field."""
    fields = {f.name: _encode(getattr(instruction, f.name), f.name, None) for f in dataclasses.fields(instruction)}
    return {"verb": verb(instruction), **fields}


def instruction_from_json(message: Mapping[str, Any], device: torch.device | str = "cpu") -> Instruction:
    """The instruction that `instruction_to_json` wrote.

    Raises UnknownNameError for an unknown verb, RecordError for missing or unexpected fields.
    """
    name = message.get("verb")
    if name not in VERBS:
        raise unknown_name("verb", str(name), VERBS)
    kind = VERBS[name]
    given = {key: _decode(value, device, {}) for key, value in message.items() if key != "verb"}
    return kind(**_checked_fields(kind, given))


def reading_to_json(reading: Reading, arrays: Arrays | None = None) -> dict[str, Any]:
    """A JSON-ready dictionary; tensors longer than 64 elements go into `arrays` (name → array) where one is given."""
    return {f.name: _encode(getattr(reading, f.name), f.name, arrays) for f in dataclasses.fields(reading)}


def reading_from_json(
    message: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None, device: torch.device | str = "cpu"
) -> Reading:
    """The reading that `reading_to_json` wrote, with the same `arrays`."""
    given = {key: _decode(value, device, arrays or {}) for key, value in message.items()}
    return Reading(**_checked_fields(Reading, given))


def _checked_fields(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - given.keys()):
        raise RecordError(f"{kind.__name__} lacks the field(s) {', '.join(missing)}; given {sorted(given)}.")
    if extra := sorted(given.keys() - fields.keys()):
        raise RecordError(f"{kind.__name__} has no field(s) {', '.join(extra)}; it has {sorted(fields)}.")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _encode(value: Any, path: str, arrays: Arrays | None) -> Any:
    if isinstance(value, Tensor):
        array = value.detach().cpu().numpy()
        if arrays is not None and array.size > INLINE_ELEMENTS:
            arrays[path] = array
            return {"array": path}
        return {"tensor": array.tolist(), "dtype": str(value.dtype).removeprefix("torch."), "shape": list(array.shape)}
    if isinstance(value, Mapping):
        return {"items": {key: _encode(item, f"{path}.{key}", arrays) for key, item in value.items()}}
    if isinstance(value, TraceRule):
        return {"trace_rule": dataclasses.asdict(value)}
    if isinstance(value, tuple):
        return list(value)
    return value


def _decode(value: Any, device: torch.device | str, arrays: Mapping[str, np.ndarray]) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "tensor" in value:
        if value.get("dtype") not in _DTYPES:
            raise RecordError(f"Unknown tensor type {value.get('dtype')!r}; known: {', '.join(_DTYPES)}.")
        return torch.tensor(value["tensor"], dtype=_DTYPES[value["dtype"]], device=device).reshape(value["shape"])
    if "array" in value:
        if value["array"] not in arrays:
            raise RecordError(f"The array {value['array']!r} is missing; there are {sorted(arrays)}.")
        return torch.from_numpy(np.asarray(arrays[value["array"]]).copy()).to(device)
    if "items" in value:
        return {key: _decode(item, device, arrays) for key, item in value["items"].items()}
    if "trace_rule" in value:
        return TraceRule(**_checked_fields(TraceRule, dict(value["trace_rule"])))
    raise RecordError(f"Not a value of this format: {str(value)[:80]}.")
