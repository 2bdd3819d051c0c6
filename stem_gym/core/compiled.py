"""Compilation by numba where the extra is installed; without it, a call says what to install."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stem_gym.core.errors import missing_extra

__all__ = ["compiled", "compiled_exactly", "inlined", "require_numba"]

try:
    import numba
except ImportError:
    numba = None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in machine code, kept on disk between runs.

    Sums may be reordered (fastmath), so results differ between processors in the last digits.
    """
    return _compiled(function, cache=True, fastmath=True)


def compiled_exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `compiled`, each operation as it is written: what a row gives does not depend on the rows beside it.

    For code that allocates nothing: arrays are handed on without counting who refers to them, which on hundreds of
    small steps a row would take most of the time.
    """
    return _compiled(function, cache=True, fastmath=False, _nrt=False)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `compiled_exactly`, made part of its callers."""
    return _compiled(function, fastmath=False, _nrt=False, forceinline=True)


def require_numba(what: str) -> None:
    """Raises MissingExtraError where there is no numba."""
    if numba is None:
        raise missing_extra(what, "physics")


def _compiled(function: Callable[..., Any], **options: bool) -> Callable[..., Any]:
    if numba is not None:
        return numba.njit(error_model="numpy", **options)(function)

    def refuse(*_: Any) -> Any:
        return require_numba("Compiled physics")

    return refuse
