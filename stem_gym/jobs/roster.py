"""The package `agents`, when it is ours: another public distribution uses the same top-level name."""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium

from stem_gym.core.errors import CapabilityError, UnknownNameError
from stem_gym.envs.registration import is_ours, unknown_id

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


def check_id(id: str) -> str:
    """The id, if it is one of ours. Raises UnknownNameError that names the nearest one."""
    if is_ours(id):
        return id
    if id in gymnasium.registry:
        known = ", ".join(sorted(filter(is_ours, gymnasium.registry)))
        raise UnknownNameError(
            f"{id!r} is no environment of stem_gym, only one of Gymnasium's registry. Known: {known}."
        )
    raise unknown_id(id)


def policy_for(name: str, env: Any) -> Any:
    """The policy that a name on the command line means: the folder of a saved one, or an agent.

    Raises UnknownNameError for a name nobody knows, PolicyError for an agent that must be trained first.
    """
    agents = agents_package()
    if Path(name).is_dir() or "/" in name or name.endswith((".safetensors", ".json")):
        return agents.load(name, env)
    return agents.make(name, env)


def _owner() -> str:
    owners = sorted(set(metadata.packages_distributions().get("agents", [])) - {"stem-gym", "stem_gym"})
    return f"that of {', '.join(repr(name) for name in owners)}" if owners else "a folder or file of that name"
