"""Every YAML of `envs_configs` becomes a Gymnasium id; nothing here imports torch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gymnasium
import yaml

_FACES = "stem_gym.envs.faces"


def config_root() -> Path:
    """Where the variants are: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "envs_configs"
    return checkout if checkout.is_dir() else package / "_envs_configs"


@functools.cache
def variant_files() -> dict[str, Path]:
    """Id → YAML file of every variant that ships."""
    files = {}
    for path in sorted(config_root().glob("*/*.yaml")):
        with path.open(encoding="utf-8") as stream:
            files[_first_id(stream.read(), path)] = path
    return files


def _first_id(text: str, path: Path) -> str:
    data: Any = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 – both are safe loaders
    if not isinstance(data, dict) or not isinstance(data.get("id"), str):
        raise ValueError(f"{path} has no text under the key 'id'.")
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
