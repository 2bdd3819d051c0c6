"""Agents by name: files of this package, and modules that other distributions list under `stem_gym.agents`."""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from typing import Any

from agents.policy import Face, Policy, face_of
from stem_gym.core.config import parse
from stem_gym.core.errors import CapabilityError, PolicyError, unknown_name

GROUP = "stem_gym.agents"
_FOLDER = Path(__file__).resolve().parents[1]
_NO_AGENTS = {"__init__", "policy"}


def names() -> list[str]:
    """Names of all agents."""
    return sorted(_modules())


def describe() -> dict[str, str]:
    """Name → first line of the agent's own description; imports the agents."""
    return {name: (_module(name).__doc__ or "").strip().partition("\n")[0] for name in names()}


def make(name: str, env: Any, **settings: Any) -> Policy:
    """The agent `name` for `env` (an Env, a VectorEnv or a Face), with its settings.

    Raises UnknownNameError for an unknown agent and ConfigError for an unknown or ill-typed setting.
    """
    kind = policy_class(name)
    return kind(face_of(env), parse(kind.Settings, settings, f"settings of the agent {name!r}"))


def load(path: str | Path, env: Any) -> Policy:
    """A saved policy: a folder, or the name of a shipped one such as "ppo". Runs no code from the files.

    Raises PolicyError for a damaged or foreign folder, or a policy made for another environment.
    """
    from agents.engine.storage import load_policy

    face = face_of(env)
    folder = Path(path)
    if not folder.is_dir():
        folder = shipped(str(path), face.id) or folder
    return load_policy(folder, face)


def train(name: str, id: str, **options: Any) -> Policy:
    """Train the agent `name` on `id`; options are those of the agent's own `train`. Ends with the saved policy."""
    module = _module(name)
    if not hasattr(module, "train"):
        learners = [other for other in names() if hasattr(_module(other), "train")]
        raise CapabilityError(f"The agent {name!r} learns nothing; those that do: {', '.join(learners)}.")
    policy: Policy = module.train(id, **options)
    return policy


def policy_class(name: str) -> type[Policy]:
    """The policy class of an agent."""
    module = _module(name)
    kind = getattr(module, "POLICY", None)
    if not (isinstance(kind, type) and issubclass(kind, Policy)):
        raise PolicyError(f"The module {module.__name__} of the agent {name!r} has no Policy under the name POLICY.")
    return kind


def shipped(name: str, id: str) -> Path | None:
    """The folder of the policy `name` that ships for the environment `id`; None where none does."""
    folder = _FOLDER / "weights" / name / id.rpartition("/")[2]
    return folder if (folder / "policy.json").is_file() else None


def shipped_policies() -> list[tuple[str, Path]]:
    """(agent, folder) of every policy that ships."""
    return [(path.parent.parent.name, path.parent) for path in sorted(_FOLDER.glob("weights/*/*/policy.json"))]


def _modules() -> dict[str, str]:
    found = {path.stem: f"agents.{path.stem}" for path in _FOLDER.glob("*.py") if path.stem not in _NO_AGENTS}
    return {entry.name: entry.value for entry in metadata.entry_points(group=GROUP)} | found


def _module(name: str) -> Any:
    known = _modules()
    if name not in known:
        raise unknown_name("agent", name, known)
    return importlib.import_module(known[name])


__all__ = ["Face", "describe", "load", "make", "names", "policy_class", "shipped", "shipped_policies", "train"]
