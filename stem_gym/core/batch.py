"""Rows of batch-first tensors, and of frozen dataclasses of them: pick some, or give some new values.

Most of the time the rows are all rows. Whoever makes such a list takes it from `every_row`, which the functions here
know again, and then nothing is copied: what they give may be the very tensor that they were given.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")


_FEW = 64  # numbers that Python compares sooner than torch starts
_EVERY = "_names_every_row_of"  # attribute of a list of rows that is 0, 1, … up to this number
_FIELDS: dict[type, tuple[str, ...]] = {}  # names of the fields of dataclasses met


def ends(values: Tensor) -> tuple[float, float]:
    """The least and the largest of some numbers, both NaN where any of them is; at least one number."""
    count = values.numel()
    if count == 1:
        value = float(values.item())
        return value, value
    if count > _FEW or not values.is_cpu:
        low, high = values.aminmax()
        return float(low), float(high)
    numbers = values.tolist() if values.dim() == 1 else values.flatten().tolist()
    if any(number != number for number in numbers):
        return math.nan, math.nan
    return float(min(numbers)), float(max(numbers))


@functools.lru_cache(maxsize=1024)
@torch.inference_mode(False)
def number(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A number as a tensor without dimensions, for tensors of this dtype on any device. Not to be written to.

    The same results as with the number itself, of which torch makes and converts a tensor each time: on a few rows that
    takes longer than the operation.
    """
    return torch.tensor(value, dtype=dtype)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def filled(value: float, rows: int, device: torch.device) -> Tensor:
    """The same number for each of so many rows, (rows,). Not to be written to."""
    return torch.full((rows,), value, device=device)


@functools.lru_cache(maxsize=1024)
@torch.inference_mode(False)
def every_row(count: int, device: torch.device) -> Tensor:
    """The numbers (count,) of all rows, in their order. Not to be written to."""
    rows = torch.arange(count, device=device)
    setattr(rows, _EVERY, count)
    return rows


def rows_where(mask: Tensor) -> Tensor:
    """The rows (n,) at which a mask (B,) holds, in their order."""
    rows = mask.nonzero().squeeze(1)
    return every_row(mask.shape[0], mask.device) if rows.shape[0] == mask.shape[0] else rows


def names_every(rows: Tensor, count: int) -> bool:
    """Whether `rows` is known to be all of `count` rows in their order."""
    return getattr(rows, _EVERY, -1) == count


def take(whole: Tensor, rows: Tensor) -> Tensor:
    """The named rows (n, …) of `whole` (B, …); itself where they are all."""
    return whole if names_every(rows, whole.shape[0]) else whole.index_select(0, rows)


def put(whole: Tensor, rows: Tensor, fresh: Tensor) -> Tensor:
    """`whole` (B, …) with `fresh` (n, …) at the named rows; `fresh` itself where they are all."""
    return fresh if names_every(rows, whole.shape[0]) else whole.index_copy(0, rows, fresh)


def add(whole: Tensor, rows: Tensor, more: Tensor) -> Tensor:
    """`whole` (B, …) with `more` (n, …) added at the named rows, in the precision of `whole`."""
    if names_every(rows, whole.shape[0]):
        return whole + more
    return whole.index_add(0, rows, more.to(whole.dtype))


def write(whole: Tensor, rows: Tensor, fresh: Tensor) -> None:
    """Overwrite the named rows of `whole` (B, …) in place: for buffers that their owner never hands out to keep."""
    if names_every(rows, whole.shape[0]):
        whole.copy_(fresh)
    else:
        whole.index_copy_(0, rows, fresh)


def write_sum(whole: Tensor, rows: Tensor, more: Tensor) -> None:
    """As `add`, in place."""
    if names_every(rows, whole.shape[0]):
        whole.add_(more)
    else:
        whole.index_add_(0, rows, more.to(whole.dtype))


def take_rows(state: State, rows: Tensor) -> State:
    """The named rows of every tensor in `state` (nested dataclasses included); itself where they are all."""
    if names_every(rows, _count(state)):
        return state
    return _map(state, lambda tensor: take(tensor, rows))


def put_rows(state: State, rows: Tensor, fresh: State) -> State:
    """`state` with its rows `rows` replaced by those of `fresh`, itself where they are all; neither is changed."""
    if names_every(rows, _count(state)):
        return fresh
    changes: dict[str, Any] = {}
    for name in _names(state):
        old, new = getattr(state, name), getattr(fresh, name)
        if isinstance(old, Tensor):
            changes[name] = put(old, rows, new)
        elif dataclasses.is_dataclass(old):
            changes[name] = put_rows(old, rows, new)
    return changed(state, **changes)


def clone_rows(state: State) -> State:
    """A deep copy of every tensor."""
    return _map(state, Tensor.clone)


def write_rows(state: State, rows: Tensor, fresh: State) -> None:
    """Overwrite the rows `rows` of `state` in place: for buffers that their owner never hands out to keep."""
    for name in _names(state):
        old, new = getattr(state, name), getattr(fresh, name)
        if isinstance(old, Tensor):
            write(old, rows, new)
        elif dataclasses.is_dataclass(old):
            write_rows(old, rows, new)


def changed(state: State, **changes: Any) -> State:
    """`dataclasses.replace` for plain dataclasses, ten times faster. Raises TypeError for a name that is no field."""
    if not changes.keys() <= vars(state).keys():
        raise TypeError(f"{type(state).__name__} has no {sorted(changes.keys() - vars(state).keys())}.")
    fresh: State = object.__new__(type(state))
    vars(fresh).update(vars(state), **changes)
    return fresh


def _names(state: Any) -> tuple[str, ...]:
    kind = type(state)
    if kind not in _FIELDS:
        _FIELDS[kind] = tuple(field.name for field in dataclasses.fields(kind))
    return _FIELDS[kind]


def _count(state: Any) -> int:
    """How many rows a state has; -1 where it has no tensor."""
    for name in _names(state):
        value = getattr(state, name)
        if isinstance(value, Tensor):
            return value.shape[0]
        if dataclasses.is_dataclass(value):
            return _count(value)
    return -1


def _map(state: State, change: Callable[[Tensor], Tensor]) -> State:
    changes: dict[str, Any] = {}
    for name in _names(state):
        value = getattr(state, name)
        if isinstance(value, Tensor):
            changes[name] = change(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes[name] = _map(value, change)
    return changed(state, **changes)
