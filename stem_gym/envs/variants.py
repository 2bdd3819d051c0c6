"""From a variant's YAML and overrides to a BatchEnv."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stem_gym import instruments, tasks
from stem_gym.core.config import Variant, config_hash, merge, parse, read_yaml
from stem_gym.core.errors import ConfigError
from stem_gym.core.instrument import Instrument
from stem_gym.core.task import Task
from stem_gym.envs.batch import BatchEnv
from stem_gym.envs.registration import unknown_id, variant_files

FUSED_FROM_ROWS = 64  # from so many rows on, compiling the noise pays for its start


@dataclass(frozen=True)
class LoadedVariant:
    """A checked variant with the plain data it was made of."""

    variant: Variant
    data: Mapping[str, Any]
    source: str
    own_instrument: str  # the kind in the file, whatever the overrides say

    @property
    def hash(self) -> str:
        """Hash of the merged configuration."""
        return config_hash(self.data)


def load_variant(name: str | Path, overrides: Mapping[str, Any] | None = None) -> LoadedVariant:
    """The variant of an id or of a YAML file, with overrides of its sections `task`, `instrument`, `budget` merged in.

    Raises UnknownNameError for an unknown id, ConfigError for keys, types or values that do not fit.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else variant_files().get(str(name))
    if path is None:
        raise unknown_id(str(name))
    own = read_yaml(path)
    data = merge(own, overrides or {})
    source = f"{path.parent.name}/{path.name}" + (" with overrides" if overrides else "")
    variant, section = parse(Variant, data, source), own.get("instrument")
    return LoadedVariant(variant, data, source, str(section.get("kind")) if isinstance(section, Mapping) else "")


def build(loaded: LoadedVariant, rows: int, device: str = "cpu", fused: bool | None = None) -> BatchEnv:
    """The batch of episodes that a variant describes."""
    if not isinstance(rows, int | np.integer) or rows < 1:
        raise ConfigError(f"An environment needs at least one row; given {rows!r}.")
    variant = loaded.variant
    where = _device(device)
    kind, settings = _kind(variant.task, "task", loaded.source)
    task_type = tasks.task_class(kind)
    task = task_type(parse(task_type.Config, settings, f"{loaded.source}, task"))
    instrument_kind, instrument_settings = _kind(variant.instrument, "instrument", loaded.source)
    adapter = instrument_settings.pop("adapter", instrument_kind)
    try:
        instrument = instruments.make(adapter, instrument_settings, rows, where)
    except ConfigError as error:
        raise ConfigError(f"{loaded.source}, {error}{_kind_hint(loaded, instrument_kind)}") from error
    try:
        task = _fitted(task, instrument, loaded.source)
        return BatchEnv(task, instrument, variant.budget, rows >= FUSED_FROM_ROWS if fused is None else fused)
    except BaseException:
        instrument.close()  # a session with a real instrument must not outlive the env that was refused
        raise


def _fitted(task: Task[Any], instrument: Instrument, source: str) -> Task[Any]:
    try:
        return task.fitted(instrument.capabilities)
    except ConfigError as error:
        raise ConfigError(f"{source}, task: {error}") from error


def _device(name: str) -> torch.device:
    """The device, tried out. Raises ConfigError for one that does not exist or can not be used."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"The device {name!r} can not be used ({first}). Try 'cpu', or 'cuda' on a GPU.") from error


def instrument_override(instrument: str | Mapping[str, Any]) -> dict[str, Any]:
    """`instrument="nion"` keeps the variant's settings and lets another instrument execute them."""
    if isinstance(instrument, Mapping):
        return dict(instrument)
    if not isinstance(instrument, str):
        raise ConfigError(f"instrument must be a name such as 'nion', or a mapping; given {instrument!r}.")
    return {"adapter": instrument}


def _kind_hint(loaded: LoadedVariant, kind: str) -> str:
    """What may have been meant where an override named another kind, which takes none of the variant's settings."""
    if kind == loaded.own_instrument:
        return ""
    return (
        f" The settings of {loaded.own_instrument!r} are not those of {kind!r}; to keep them and let {kind!r} execute, "
        f"name it with --instrument {kind} (in Python instrument={kind!r})."
    )


def _kind(section: Mapping[str, Any], name: str, source: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(section.get("kind"), str):
        raise ConfigError(f"{source}: the section {name!r} must name its kind; it has {sorted(section)}.")
    return section["kind"], dict(section)
