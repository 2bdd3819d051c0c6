"""Instructions and readings as JSON: every verb comes back as it went, and nothing else is taken."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from stem_gym.core.conformance.examples import Examples
from stem_gym.core.errors import RecordError, UnknownNameError
from stem_gym.core.instructions import VERBS, Dwell, Reading, TraceRule, no_dose, verb
from stem_gym.core.instrument import Capabilities, Limits
from stem_gym.core.wire import (
    INLINE_ELEMENTS,
    instruction_from_json,
    instruction_to_json,
    reading_from_json,
    reading_to_json,
)

EVERYTHING = Capabilities(
    frozenset(VERBS), frozenset({"haadf", "eels"}), {"defocus_ang": Limits(-100.0, 100.0)}, frozenset({"clock_s"})
)
ROWS = torch.tensor([0, 2, 5])


def same(one: object, other: object) -> bool:
    """Equal to the last bit, types included; NaN equals NaN."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.allclose(one, other, 0, 0, True)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if dataclasses.is_dataclass(one):
        return type(one) is type(other) and same(vars(one), vars(other))
    return type(one) is type(other) and one == other


def through(message: dict) -> dict:
    return json.loads(json.dumps(message))


@pytest.mark.parametrize("name", VERBS)
def test_every_instruction_comes_back(name):
    instruction = Examples(EVERYTHING).of(name, ROWS)
    assert verb(instruction) == name
    assert same(instruction_from_json(through(instruction_to_json(instruction))), instruction)


@pytest.mark.parametrize("name", VERBS)
def test_every_field_is_required_or_has_a_default(name):
    message = instruction_to_json(Examples(EVERYTHING).of(name, ROWS))
    for field in dataclasses.fields(VERBS[name]):
        rest = {key: value for key, value in message.items() if key != field.name}
        if field.default is dataclasses.MISSING:
            with pytest.raises(RecordError, match=f"{name} lacks the field.*{field.name}"):
                instruction_from_json(rest)
        else:
            assert same(getattr(instruction_from_json(rest), field.name), field.default)


def test_a_trace_rule_comes_back():
    dwell = Dwell(ROWS, torch.rand(3), 16, TraceRule(rise=0.15, fall=None, baseline_samples=3))
    assert same(instruction_from_json(through(instruction_to_json(dwell))), dwell)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("size", [1, INLINE_ELEMENTS, INLINE_ELEMENTS + 1])
def test_a_reading_comes_back_with_arrays_apart(dtype, size):
    pattern = (torch.arange(size) % 5).to(dtype).reshape(1, size)
    reading = Reading(
        "Scan", torch.tensor([3]), torch.tensor([0.1]), torch.tensor([1.0 / 3.0]), torch.tensor([1e-30]),
        {"images": pattern, "trace": torch.tensor([[1.0, math.nan]])}, {"fov_ang": torch.tensor([20.0])}, {"a": "b"},
    )  # fmt: skip
    arrays: dict[str, np.ndarray] = {}
    message = through(reading_to_json(reading, arrays))
    assert set(arrays) == ({"data.images"} if size > INLINE_ELEMENTS else set())
    assert same(reading_from_json(message, arrays), reading)
    assert same(reading_from_json(through(reading_to_json(reading))), reading), "without arrays apart, all is inline"


def test_what_is_foreign_is_refused():
    wait = instruction_to_json(Examples(EVERYTHING).of("Wait", ROWS))
    with pytest.raises(UnknownNameError, match="Unknown verb 'Wiat'. Did you mean 'Wait'"):
        instruction_from_json({**wait, "verb": "Wiat"})
    with pytest.raises(UnknownNameError, match="verb"):
        instruction_from_json({"rows": wait["rows"]})
    with pytest.raises(RecordError, match="has no field.*speed"):
        instruction_from_json({**wait, "speed": 3})
    with pytest.raises(RecordError, match="Unknown tensor type 'object'"):
        instruction_from_json({**wait, "time_s": {"tensor": [1], "dtype": "object", "shape": [1]}})
    with pytest.raises(RecordError, match="Not a value of this format"):
        instruction_from_json({**wait, "time_s": {"pickle": "gASVAAAA"}})
    reading = reading_to_json(no_dose(Examples(EVERYTHING).of("Wait", ROWS), torch.ones(3)))
    with pytest.raises(RecordError, match="array 'gone' is missing"):
        reading_from_json({**reading, "seconds": {"array": "gone"}})
