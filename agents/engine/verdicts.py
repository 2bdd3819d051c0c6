"""What a person may say about a decision of a searching agent, as small frozen values that a log can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

from agents.engine.acquisition import Acquisition
from agents.engine.search_policy import SearchPolicy
from stem_gym.core.config import Config, parse
from stem_gym.core.errors import ConfigError, RecordError, unknown_name

_KINDS: dict[str, type[Config]] = {
    kind.model_fields["kind"].default: kind for kind in get_args(get_args(Acquisition)[0])
}


@dataclass(frozen=True)
class Approve:
    """Measure there."""


@dataclass(frozen=True)
class Veto:
    """Never measure these cells (y·W + x) in this episode; decide again."""

    cells: tuple[int, ...]


@dataclass(frozen=True)
class Pin:
    """Measure this cell (y·W + x) before all others."""

    cell: int


@dataclass(frozen=True)
class Prefer:
    """Decide with this acquisition function from now on."""

    acquisition: Acquisition


@dataclass(frozen=True)
class Want:
    """Another scalarizer, by its name in the task, is wanted from now on."""

    scalarizer: str


Verdict: TypeAlias = Approve | Veto | Pin | Prefer | Want


def acquisition_names() -> list[str]:
    """Kinds of all acquisition functions."""
    return sorted(_KINDS)


def acquisition_named(kind: str, **settings: Any) -> Acquisition:
    """An acquisition function by its kind. Raises UnknownNameError or ConfigError that says what there is."""
    if kind not in _KINDS:
        raise unknown_name("acquisition function", kind, _KINDS)
    found: Any = parse(_KINDS[kind], settings, f"settings of the acquisition function {kind!r}")
    return found


def is_acquisition(value: Any) -> bool:
    """Whether `value` is one of the acquisition functions."""
    return isinstance(value, tuple(_KINDS.values()))


def apply(verdict: Veto | Pin | Prefer, policy: SearchPolicy, row: int) -> None:
    """Set the policy's masks and acquisition function; the last word about a cell counts."""
    if isinstance(verdict, Prefer):
        policy.acquisition = verdict.acquisition
        return
    cells = [verdict.cell] if isinstance(verdict, Pin) else list(verdict.cells)
    policy.forbidden[row, cells] = isinstance(verdict, Veto)
    policy.pinned[row, cells] = isinstance(verdict, Pin)


def verdict_as_data(verdict: Verdict | None) -> dict[str, Any] | None:
    """A verdict as plain data; None stays None."""
    if verdict is None:
        return None
    said = {"say": type(verdict).__name__.lower()}
    match verdict:
        case Veto(cells):
            return {**said, "cells": [int(cell) for cell in cells]}
        case Pin(cell):
            return {**said, "cell": int(cell)}
        case Prefer(acquisition):
            return {**said, "acquisition": acquisition.model_dump(mode="json")}
        case Want(scalarizer):
            return {**said, "scalarizer": scalarizer}
    return {**said}


def verdict_from_data(data: Mapping[str, Any] | None) -> Verdict | None:
    """What `verdict_as_data` gave. Raises RecordError for anything else."""
    if data is None:
        return None
    try:
        match data["say"]:
            case "approve":
                return Approve()
            case "veto":
                return Veto(tuple(int(cell) for cell in data["cells"]))
            case "pin":
                return Pin(int(data["cell"]))
            case "prefer":
                return Prefer(acquisition_named(**data["acquisition"]))
            case "want":
                return Want(str(data["scalarizer"]))
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise RecordError(f"A verdict can not be read: {error!r}; given {data!r:.80}.") from error
    raise RecordError(f"Unknown verdict {data['say']!r}; known: approve, veto, pin, prefer, want.")
