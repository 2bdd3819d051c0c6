"""Strict configuration: what is refused and how, what is merged, and that every value counts in the hash."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import Field

from stem_gym import instruments, tasks
from stem_gym.core.config import Config, Variant, config_hash, merge, parse, read_yaml
from stem_gym.core.errors import ConfigError
from stem_gym.envs.registration import variant_files
from stem_gym.envs.variants import LoadedVariant, build, load_variant

IDS = sorted(variant_files())


class Inner(Config):
    width_ang: float = Field(default=1.0, gt=0)
    """a width"""


class Outer(Config):
    steps: int = Field(gt=0)
    """a number"""
    names: tuple[str, ...] = ()
    """names"""
    inner: Inner = Inner()
    """a part"""


BAD = [
    ({"steps": 3, "stps": 4}, r"demo.yaml: unknown key 'stps'. Did you mean 'steps'\?"),
    ({"steps": 3, "inner": {"widht_ang": 2.0}}, r"unknown key 'inner.widht_ang'. Did you mean 'width_ang'\?"),
    ({}, "demo.yaml: the key 'steps' is missing"),
    ({"steps": 1.5}, "steps: .*integer.*given 1.5"),
    ({"steps": True}, "steps: .*integer.*given true"),
    ({"steps": 0}, "steps: .*greater than 0; given 0"),
    ({"steps": 3, "inner": {"width_ang": "1e-4"}}, r'width_ang: .*given "1e-4" \(text; YAML reads 1e-4 as text'),
    ({"steps": 3, "inner": {"width_ang": "60keV"}}, r'given "60keV" \(write the number alone; the unit is in the key'),
    ({"steps": 3, "inner": {"width_ang": "wide"}}, r'given "wide"\.$'),
    ({"steps": 3, "inner": {"width_ang": math.nan}}, "width_ang: .*finite"),
    ({"steps": 3, "inner": {"width_ang": math.inf}}, "width_ang: .*finite"),
    ({"steps": 3, "names": "ab"}, "names: .*given"),
    ({"steps": 3, "inner": {1, 2}}, "demo.yaml: not plain data"),
]


@pytest.mark.parametrize(("data", "message"), BAD, ids=lambda x: str(x)[:40] if isinstance(x, dict) else "")
def test_bad_data_is_refused_with_file_key_and_what_is_right(data, message):
    with pytest.raises(ConfigError, match=message):
        parse(Outer, data, "demo.yaml")


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse(Outer, {"stepz": 1, "inner": {"width_ang": -1.0}}, "demo.yaml")
    assert all(word in str(caught.value) for word in ("stepz", "'steps' is missing", "greater than 0"))


def test_good_data_is_read_and_frozen():
    config = parse(Outer, {"steps": 3, "names": ["a", "b"], "inner": {"width_ang": 2}}, "demo.yaml")
    assert config.names == ("a", "b") and config.inner.width_ang == 2.0
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 4


class Listed(Config):
    parts: tuple[Inner, ...] = Field(min_length=1)
    """parts"""


def test_what_was_made_in_python_is_read_as_from_a_file():
    made = parse(Listed, {"parts": [Inner(width_ang=2.0)]}, "demo.yaml")
    assert made == parse(Listed, {"parts": [{"width_ang": 2.0}]}, "demo.yaml") and made.parts[0].width_ang == 2.0
    assert config_hash({"parts": [Inner(width_ang=2.0)]}) == config_hash({"parts": [{"width_ang": 2.0}]})
    with pytest.raises(ConfigError, match="not plain data: Object of type object"):
        parse(Listed, {"parts": [object()]}, "demo.yaml")


def test_a_wrong_item_is_told_without_saying_that_the_list_is_empty():
    with pytest.raises(ConfigError, match=r"^demo.yaml: parts.0.width_ang: [^\n]*greater than 0; given -1.0\.$"):
        parse(Listed, {"parts": [{"width_ang": -1.0}]}, "demo.yaml")
    with pytest.raises(ConfigError, match="parts: .*at least 1 item"):
        parse(Listed, {"parts": []}, "demo.yaml")


def test_a_whole_number_is_taken_in_any_form():
    config = parse(Outer, {"steps": 1e5}, "demo.yaml")
    assert config.steps == 100_000 and isinstance(config.steps, int)


def test_merge_goes_in_depth_and_replaces_another_kind():
    base = {"a": {"kind": "x", "p": 1, "q": 2}, "b": [1, 2], "c": 3}
    assert merge(base, {"a": {"q": 5}, "b": [9]}) == {"a": {"kind": "x", "p": 1, "q": 5}, "b": [9], "c": 3}
    assert merge(base, {"a": {"kind": "y", "r": 1}})["a"] == {"kind": "y", "r": 1}
    assert base["a"] == {"kind": "x", "p": 1, "q": 2}, "the base is not changed"


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Path and value of everything that is no mapping or list."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    if items is None:
        yield path, data
        return
    for key, value in items:
        yield from leaves(value, (*path, key))


def replaced(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of `data` with another value at `path`, where there may have been none."""
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = replaced(copy[path[0]] if len(path) > 1 else None, path[1:], value)
    return copy


NULL_IS_OFF = {"rise", "fall", "image_full_scale", "growth_s"}  # null switches these off

BY_NAME = {"enabling", "laws", "priors"}


def rebuild(data: dict[str, Any]) -> None:
    """Everything that is checked before a variant runs, without making its instrument."""
    loaded = LoadedVariant(parse(Variant, data, "demo.yaml"), data, "demo.yaml", "simulated")
    task = tasks.task_class(data["task"]["kind"])
    settings = parse(task.Config, loaded.variant.task, "demo.yaml, task")
    task(settings)
    module = __import__(instruments.instrument_modules()[data["instrument"]["kind"]], fromlist=["Config"])
    parse(module.Config, loaded.variant.instrument, "demo.yaml, instrument")


@pytest.mark.parametrize("id", IDS)
def test_the_hash_changes_with_every_value(id):
    data = read_yaml(variant_files()[id])
    hashes = {config_hash(data)}
    found = list(leaves(data))
    for path, value in found:
        other = value + 1 if isinstance(value, (int, float)) else f"{value}x"
        hashes.add(config_hash(replaced(data, path, other)))
    assert len(hashes) == len(found) + 1
    assert load_variant(id).hash == config_hash(data)


@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize("spoilt", ["1e-4", math.nan, math.inf, None, [1.0], {"value": 1.0}], ids=str)
def test_every_number_of_every_variant_must_be_one(id, spoilt):
    data = read_yaml(variant_files()[id])
    for path, value in leaves(data):
        if spoilt is None and path[-1] in NULL_IS_OFF:
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            with pytest.raises(ConfigError, match=str(path[-1])):
                rebuild(replaced(data, path, spoilt))
                pytest.fail(f"{'.'.join(map(str, path))} = {spoilt} was taken")


@pytest.mark.parametrize("id", IDS)
def test_an_unknown_key_is_refused_at_every_level(id):
    data = read_yaml(variant_files()[id])
    levels = {path[:depth] for path, _ in leaves(data) for depth in range(len(path))}
    for level in sorted(levels, key=str):
        if level and isinstance(level[-1], str) and isinstance(dict_at(data, level), list):
            continue
        if level and level[-1] == "settle_s":
            continue  # held against the axes when it is used: tests/core/test_experiments.py
        named = level and level[-1] in BY_NAME  # keys are names of one's own there, and the value must fit
        with pytest.raises(ConfigError, match="nonsense_ang" if named else "unknown key.*nonsense_ang"):
            rebuild(replaced(data, (*level, "nonsense_ang"), 1.0))


def dict_at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def test_overrides_are_checked_like_the_file():
    with pytest.raises(ConfigError, match=r"atom_targeting/default.yaml with overrides.*unknown key 'budget.step'"):
        load_variant("stem_gym/AtomTargeting-v0", {"budget": {"step": 3}})
    with pytest.raises(ConfigError, match="must name its kind"):
        build(load_variant("stem_gym/AtomTargeting-v0", {"task": {"kind": 3}}), rows=1)


@pytest.mark.parametrize("text", ["a: {false: 1}", "on: 1", "a: [{1: 2}]"])
def test_a_key_that_yaml_reads_as_something_else_is_refused(text, tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError, match=r"odd\.yaml: a key must be text; given (False|True|1) \((bool|int)\)"):
        read_yaml(path)
