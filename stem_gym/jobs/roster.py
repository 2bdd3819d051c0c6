"""The package `agents`, when it is ours: another public distribution uses the same top-level name."""

from __future__ import annotations

import importlib
from importlib import metadata
from types import ModuleType

from stem_gym.core.errors import CapabilityError

_OURS = ("make", "evaluate", "load", "names")


def agents_package() -> ModuleType:
    """Our `agents`. Raises CapabilityError that names the other distribution where that name leads elsewhere."""
    try:
        found = importlib.import_module("agents")
    except ModuleNotFoundError as error:
        if error.name != "agents":
            raise
        raise CapabilityError(
            "The package 'agents' of stem-gym is not installed. Reinstall: pip install stem-gym"
        ) from error
    missing = [name for name in _OURS if not hasattr(found, name)]
    if not missing:
        return found
    raise CapabilityError(
        f"The installed package 'agents' is not the one of stem-gym but {_owner()} ({found.__file__}). "
        "Both use that name: install stem-gym in an environment of its own, or uninstall the other."
    )


def _owner() -> str:
    owners = sorted(set(metadata.packages_distributions().get("agents", [])) - {"stem-gym", "stem_gym"})
    return f"that of {', '.join(repr(name) for name in owners)}" if owners else "a folder or file of that name"
