"""Every YAML of `envs_configs` becomes a Gymnasium id; nothing here imports torch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gymnasium
import yaml

from stem_gym.core.errors import ConfigError

_FACES = "stem_gym.envs.faces"


def config_root() -> Path:
    """Where the variants are: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "envs_configs"
    return checkout if checkout.is_dir() else package / "_envs_configs"


@functools.cache
def variant_files() -> dict[str, Path]:
    """Id → YAML file of every variant that ships."""
    files: dict[str, Path] = {}
    for path in sorted(config_root().glob("*/*.yaml")):
        name = _id_in(path)
        if name in files:
            raise ConfigError(f"{path} and {files[name]} have the same id {name!r}; an id belongs to one file.")
        files[name] = path
    return files


def _id_in(path: Path) -> str:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        data: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506 – both are safe loaders
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"Can not read the variant {path}: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("id"), str):
        raise ConfigError(f"{path} has no text under the key 'id'.")
    return str(data["id"])


def register_variants() -> None:
    """Register every variant with Gymnasium, for `make` and for `make_vec`."""
    for name in variant_files():
        if name not in gymnasium.registry:
            gymnasium.register(
                id=name,
                entry_point=f"{_FACES}:make_env",
                vector_entry_point=f"{_FACES}:make_vector_env",
                kwargs={"variant": name},
                disable_env_checker=False,
            )
