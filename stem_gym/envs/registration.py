"""Every YAML of `envs_configs` becomes a Gymnasium id; nothing here imports torch."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import yaml

from stem_gym.core.errors import ConfigError, UnknownNameError, unknown_name

_FACES = "stem_gym.envs.faces"


def config_root() -> Path:
    """Where the variants are: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "envs_configs"
    return checkout if checkout.is_dir() else package / "_envs_configs"


@dataclass(frozen=True)
class _Found:
    """The variants in the folder, and the faults of those that can not be read."""

    files: dict[str, Path]  # id → file; also of a broken one whose id can be told, so that making it says what is wrong
    faults: dict[Path, ConfigError]


def variant_files() -> dict[str, Path]:
    """Id → YAML file of every variant."""
    return _found().files


def broken_variants() -> dict[Path, ConfigError]:
    """File → what is wrong with it, of those that can not be read; the others are registered all the same."""
    return _found().faults


def is_ours(id: str) -> bool:
    """Whether an environment of this package is registered under the id."""
    return id in gymnasium.registry and str(gymnasium.registry[id].entry_point).startswith(f"{_FACES}:")


def unknown_id(id: str) -> UnknownNameError:
    """The error for an id that nothing is registered under; names the files that could not be read as well."""
    told = [str(unknown_name("environment id", id, variant_files())), *map(str, broken_variants().values())]
    return UnknownNameError(" ".join(told))


@functools.cache
def _found() -> _Found:
    found = _Found({}, {})
    for path in sorted(config_root().glob("*/*.yaml")):
        name, fault = _id_in(path)
        if name in found.files:
            fault = ConfigError(f"{path} and {found.files[name]} have the same id {name!r}; an id belongs to one file.")
        elif name is not None:
            found.files[name] = path
        if fault is not None:
            found.faults[path] = fault
    return found


def _id_in(path: Path) -> tuple[str | None, ConfigError | None]:
    """The id of a variant and what is wrong with the file; of a broken one the id, if a line tells it."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        data: Any = yaml.load(text, Loader=loader)  # noqa: S506 – both are safe loaders
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        line = re.search(r"""^id:[ \t]*["']?([\w/-]+-v\d+)""", text, re.MULTILINE)
        return line[1] if line else None, ConfigError(f"Can not read the variant {path}: {error}")
    if not isinstance(data, dict) or not isinstance(data.get("id"), str):
        return None, ConfigError(f"{path} has no text under the key 'id'.")
    return data["id"], None


def register_variants() -> None:
    """Register every variant with Gymnasium, for `make` and for `make_vec`; a broken one stops no other."""
    for name, path in list(variant_files().items()):
        if name in gymnasium.registry:
            continue
        try:
            gymnasium.register(
                id=name,
                entry_point=f"{_FACES}:make_env",
                vector_entry_point=f"{_FACES}:make_vector_env",
                kwargs={"variant": name},
                disable_env_checker=False,
            )
        except gymnasium.error.Error as error:
            broken_variants()[path] = ConfigError(f"{path}: the id {name!r} can not be registered: {error}")
