"""Every error the package raises on purpose: what was wrong, what was given, what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StemGymError(Exception):
    """Root of all errors raised on purpose; the command line turns it into one message and exit code 2."""


class ConfigError(StemGymError, ValueError):
    """A configuration key, value, unit or type that the variant does not take."""


class ActionError(StemGymError, ValueError):
    """An action of the wrong shape or type, outside the space, or not finite."""


class InstructionError(StemGymError, ValueError):
    """An instruction that can not be executed as given; nothing was sent and nothing was clipped."""


class CapabilityError(StemGymError):
    """The instrument lacks a verb, a detector or a control that was asked for."""


class InstrumentError(StemGymError, RuntimeError):
    """The instrument failed, was aborted, or did not do what its read-back should show."""


class PolicyError(StemGymError, ValueError):
    """A saved policy that is damaged, foreign, or made for another environment."""


class RecordError(StemGymError, ValueError):
    """A recording that can not be written or read."""


class DataError(StemGymError, ValueError):
    """Measured data that make no sense, or too little of them for what was asked."""


class ValidRangeError(StemGymError, ValueError):
    """A surrogate was asked outside the range that it was trained and tested in."""


class UnknownNameError(StemGymError, KeyError):
    """A name that nothing is registered under."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ConformanceError(StemGymError, AssertionError):
    """A part broke a rule of its contract: which rule, what was seen, what would be right."""

    def __init__(self, rule: str, seen: str, right: str) -> None:
        super().__init__(f"{rule}. Seen: {seen}. Right: {right}.")
        self.rule, self.seen, self.right = rule, seen, right

    def __reduce__(self) -> tuple[type[ConformanceError], tuple[str, str, str]]:
        return type(self), (self.rule, self.seen, self.right)


class MissingExtraError(StemGymError, ImportError):
    """A part was used whose optional dependencies are not installed."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A sentence with the nearest known name, or the list of known names when nothing is near."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"Known: {', '.join(names) if names else 'none'}."


def unknown_name(kind: str, given: str, known: Iterable[str]) -> UnknownNameError:
    """The error for a name nobody knows, e.g. ``unknown_name("agent", "pp0", agents)``."""
    return UnknownNameError(f"Unknown {kind} {given!r}. {did_you_mean(given, known)}")


def missing_extra(what: str, extra: str) -> MissingExtraError:
    """The error for a missing optional dependency; says what to install."""
    return MissingExtraError(f'{what} needs the extra {extra!r}. Install it with: pip install "stem-gym[{extra}]"')
