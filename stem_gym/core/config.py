"""Strict configuration: frozen pydantic models read from YAML; errors name the file, the key and the nearest right key.

YAML is the only home of a variant's values. Overrides (from Python or the command line) are merged into it and checked
by the same models. `config_hash` of the merged configuration goes into every result and every saved policy.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stem_gym.core.errors import ConfigError, did_you_mean


class Config(BaseModel):
    """Base of every configuration: frozen, no unknown keys, no silent conversions, no NaN."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Budget(Config):
    """What an episode may spend; the first of the three that is spent ends it."""

    steps: int = Field(gt=0)
    """actions"""
    seconds: float = Field(gt=0)
    """microscope time"""
    electrons: float = Field(gt=0)
    """electrons on the sample, wherever they fell"""


class Variant(Config):
    """One environment id: the task, the instrument and the budget, each with its own settings."""

    id: str = Field(pattern=r"^[\w-]+/[A-Za-z]\w*(-[a-z0-9]+)*-v\d+$")
    """namespace/Name-variant-vN"""
    summary: str
    """one sentence for lists"""
    task: dict[str, Any]
    """`kind` names the file in stem_gym/tasks; the rest is that task's configuration"""
    instrument: dict[str, Any]
    """`kind` names the module of the instrument; the rest is that instrument's configuration"""
    budget: Budget


Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError for an unreadable file, bad YAML or anything but a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Can not read {path}: {getattr(error, 'strerror', None) or error}.") from error
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values; it holds {type(data).__name__}.")
    _check_keys(data, path)
    return data


def _check_keys(data: Any, path: Path) -> None:
    """Refuse keys that are no text: YAML 1.1 reads yes, no, on, off, true, false and numbers as something else."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        if isinstance(data, dict) and not isinstance(key, str):
            raise ConfigError(f"{path}: a key must be text; given {key!r} ({type(key).__name__}). Put it in quotes.")
        _check_keys(value, path)


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `override`, mapping by mapping; a mapping of another `kind` replaces the whole."""
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        same_kind = (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("kind", old.get("kind")) == old.get("kind")
        )
        merged[key] = merge(old, value) if same_kind else value  # type: ignore[arg-type]
    return merged


def first_difference(one: Any, other: Any) -> tuple[str, Any, Any] | None:
    """Where two pieces of plain data differ first, as a key path, and both values; None where they are alike."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return None if one == other else ("", one, other)
    for key in [*one, *(key for key in other if key not in one)]:
        if found := first_difference(one.get(key), other.get(key)):
            path, here, there = found
            return f"{key}.{path}".rstrip("."), here, there
    return None


def parse(model: type[Model], data: Mapping[str, Any], source: str) -> Model:
    """`data` as the model. Raises ConfigError that names the source, every wrong key and the nearest right one."""
    try:
        data = json.loads(json.dumps(data, default=_plain))  # what was made in Python is written as in a file
        return model.model_validate_json(json.dumps(data))  # JSON mode: lists become tuples, but text no numbers
    except ValidationError as error:
        faults = [item for item in error.errors() if not _follows(item, error.errors())]
        whole = [item["loc"] for item in faults if item["type"] == "int_type" and _is_whole(item["input"])]
        mended = functools.reduce(_as_integer, whole, data)
        if json.dumps(mended) != json.dumps(data):  # 1e5 for `steps` is a whole number, though it is read as 100000.0
            return parse(model, mended, source)
        lines = [_explain(model, item) for item in faults]
        raise ConfigError(f"{source}: " + "\n  ".join(lines)) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: not plain data: {error}.") from error


def config_hash(data: Mapping[str, Any] | BaseModel) -> str:
    """Twelve hexadecimal digits that change with any value of the configuration."""
    plain = data.model_dump(mode="json") if isinstance(data, BaseModel) else data
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=_plain).encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    """A model as plain data. Raises TypeError for anything else, as JSON wants it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _follows(fault: Any, faults: Sequence[Any]) -> bool:
    """Whether a list is too short only because its items are wrong, which is told by themselves."""
    depth = len(fault["loc"])
    inner = [other for other in faults if len(other["loc"]) > depth and other["loc"][:depth] == fault["loc"]]
    return fault["type"] == "too_short" and bool(inner)


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _as_integer(data: Any, path: tuple[Any, ...]) -> Any:
    """A copy with the number at `path` as an integer; parts of the path that name a union's member are no keys."""
    if not path:
        return int(data) if _is_whole(data) else data
    if isinstance(data, Mapping) and path[0] in data:
        return dict(data) | {path[0]: _as_integer(data[path[0]], path[1:])}
    if isinstance(data, list | tuple) and isinstance(path[0], int):
        return [_as_integer(item, path[1:]) if i == path[0] else item for i, item in enumerate(data)]
    return _as_integer(data, path[1:])


def _explain(model: type[BaseModel], error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    given = json.dumps(error["input"], default=str)[:60]
    if error["type"] == "extra_forbidden":
        return f"unknown key {where!r}. {did_you_mean(str(error['loc'][-1]), _known_keys(model, error['loc'][:-1]))}"
    if error["type"] == "missing":
        return f"the key {where!r} is missing."
    if error["type"] == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in error["ctx"]["expected_tags"].split(",")]
        return f"{where}: unknown kind {error['ctx']['tag']!r}. {did_you_mean(error['ctx']['tag'], tags)}"
    message = f"{where}: {error['msg'][:1].lower()}{error['msg'][1:]}; given {given}"
    if isinstance(error["input"], str) and error["type"] in {"float_type", "int_type"}:
        message += _text_hint(error["input"])
    return message + "."


def _text_hint(text: str) -> str:
    """What to write where a number was meant."""
    try:
        float(text)
    except ValueError:
        number_and_unit = re.fullmatch(r"\s*[-+]?[\d.]+(e[-+]?\d+)?\s*[^\W\d].*", text)
        return " (write the number alone; the unit is in the key's name)" if number_and_unit else ""
    return " (text; YAML reads 1e-4 as text, write 1.0e-4)"


def _known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Field names of the model that `path` leads to; union members are told apart by trying each."""
    models = [model]
    for part in path:
        inner = [
            found for m in models if part in m.model_fields for found in _models_in(m.model_fields[part].annotation)
        ]
        models = inner or models
        tagged = [
            m for m in models if "kind" in m.model_fields and part in typing.get_args(m.model_fields["kind"].annotation)
        ]
        models = tagged or models
    return [name for m in models for name in m.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [found for argument in typing.get_args(annotation) for found in _models_in(argument)]
