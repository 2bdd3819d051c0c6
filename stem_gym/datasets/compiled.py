"""Compilation by numba where the extra is installed; without it, a call says what to install."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stem_gym.core.errors import missing_extra

__all__ = ["compiled"]

try:
    import numba
except ImportError:
    numba = None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in machine code, kept on disk between runs.

    Sums may be reordered (fastmath), so results differ between processors in the last digits.
    """
    if numba is not None:
        return numba.njit(cache=True, fastmath=True, error_model="numpy")(function)

    def refuse(*_: Any) -> Any:
        raise missing_extra("Molecular dynamics", "physics")

    return refuse
