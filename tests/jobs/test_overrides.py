"""Overrides on the command line: text in, plain typed data out."""

from __future__ import annotations

import pytest

from stem_gym.core.errors import ConfigError
from stem_gym.jobs.overrides import parse_overrides


def test_paths_nest_and_values_are_typed():
    given = [
        "budget.steps=50",
        "budget.seconds=1e1",
        "task.element=Si",
        "task.on=true",
        "a.b.c=[1, 2]",
        "x=1e-4",
        "n=null",
    ]
    assert parse_overrides(given) == {
        "budget": {"steps": 50, "seconds": 10.0},
        "task": {"element": "Si", "on": True},
        "a": {"b": {"c": [1, 2]}},
        "x": 1e-4,  # YAML 1.1 would read text here
        "n": None,
    }


@pytest.mark.parametrize("text", ["budget.steps", "=3", "budget..steps=3", ".a=1"])
def test_a_text_that_is_no_override_says_what_would_be(text):
    with pytest.raises(ConfigError, match=r"KEY\.PATH=VALUE.*given"):
        parse_overrides([text])


def test_contradictions_are_refused():
    with pytest.raises(ConfigError, match="second time"):
        parse_overrides(["a.b=1", "a.b=2"])
    with pytest.raises(ConfigError, match="made a value"):
        parse_overrides(["a=1", "a.b=2"])


def test_a_value_runs_no_code():
    with pytest.raises(ConfigError, match="is no value"):
        parse_overrides(["a=!!python/object/apply:os.getcwd []"])
