"""Values given as text on the command line: `budget.steps=50` becomes {"budget": {"steps": 50}}."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import yaml

from stem_gym.core.errors import ConfigError


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """The nested mapping of `key.path=value` texts; the configuration's own models check keys, types and ranges later.

    Values are read as JSON (1e-4 is a number there), else as YAML. Raises ConfigError for a text without `=` or a key
    given twice.
    """
    result: dict[str, Any] = {}
    for text in texts:
        path, sign, value = text.partition("=")
        keys = path.strip().split(".")
        if not sign or not all(keys):
            raise ConfigError(f"An override must read KEY.PATH=VALUE, such as budget.steps=50; given {text!r}.")
        _place(result, keys, _value(value), text)
    return result


def _place(target: dict[str, Any], keys: list[str], value: Any, text: str) -> None:
    for key in keys[:-1]:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise ConfigError(f"The override {text!r} goes below {key!r}, which another override made a value.")
    if keys[-1] in target:
        raise ConfigError(f"The override {text!r} gives {'.'.join(keys)!r} a second time.")
    target[keys[-1]] = value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is no value: {error}") from error
