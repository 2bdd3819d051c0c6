"""Frozen dataclasses of batch-first tensors: pick rows of one, or give some of its rows new values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

from torch import Tensor

State = TypeVar("State")


_FEW = 64  # numbers that Python compares sooner than torch starts


def ends(values: Tensor) -> tuple[float, float]:
    """The least and the largest of some numbers, both NaN where any of them is; at least one number."""
    if values.numel() > _FEW or values.device.type != "cpu":
        low, high = values.aminmax()
        return float(low), float(high)
    numbers = values.flatten().tolist()
    if any(number != number for number in numbers):
        return math.nan, math.nan
    return float(min(numbers)), float(max(numbers))


def take_rows(state: State, rows: Tensor) -> State:
    """The named rows of every tensor in `state` (nested dataclasses included), as a new state of len(rows) rows."""
    return _map(state, lambda tensor: tensor.index_select(0, rows))


def put_rows(state: State, rows: Tensor, fresh: State) -> State:
    """`state` with its rows `rows` replaced by those of `fresh`; neither argument is changed."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(state):  # type: ignore[arg-type]
        old, new = getattr(state, field.name), getattr(fresh, field.name)
        if isinstance(old, Tensor):
            changes[field.name] = old.index_copy(0, rows, new)
        elif dataclasses.is_dataclass(old):
            changes[field.name] = put_rows(old, rows, new)
    return dataclasses.replace(state, **changes)  # type: ignore[type-var]


def clone_rows(state: State) -> State:
    """A deep copy of every tensor."""
    return _map(state, lambda tensor: tensor.clone())


def _map(state: State, change: Any) -> State:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(state):  # type: ignore[arg-type]
        value = getattr(state, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = change(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes[field.name] = _map(value, change)
    return dataclasses.replace(state, **changes)  # type: ignore[type-var]


def write_rows(state: State, rows: Tensor, fresh: State) -> None:
    """Overwrite the rows `rows` of `state` in place: for buffers that their owner never hands out to keep."""
    for field in dataclasses.fields(state):  # type: ignore[arg-type]
        old, new = getattr(state, field.name), getattr(fresh, field.name)
        if isinstance(old, Tensor):
            old.index_copy_(0, rows, new)
        elif dataclasses.is_dataclass(old):
            write_rows(old, rows, new)
