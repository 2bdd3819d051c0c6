"""`check_instruction`: what is right passes, and every way of being wrong is refused with the right error."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from stem_gym.core.conformance.examples import Examples, tensor_fields
from stem_gym.core.errors import CapabilityError, InstructionError
from stem_gym.core.instructions import VERBS, Dwell, Read, Scan, TraceRule
from stem_gym.core.instrument import Capabilities, Limits, check_instruction

ROWS = torch.arange(3)
FIELDS = {f"{name}.{field}": Limits(-50.0, 50.0) for name in VERBS for field in tensor_fields(name)}
LIMITED = Capabilities(
    frozenset(VERBS), frozenset({"haadf"}), {"defocus_ang": Limits(-100.0, 100.0)}, frozenset({"clock_s"}), FIELDS
)
UNLIMITED = replace(LIMITED, limits={}, settable={"defocus_ang": Limits(-math.inf, math.inf)})


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("has", [LIMITED, UNLIMITED], ids=["limited", "unlimited"])
def test_the_example_of_every_verb_passes(name, has):
    check_instruction(Examples(has).of(name, ROWS), has, rows=3)
    check_instruction(Examples(has).of(name, ROWS[2:]), has, rows=3)
    check_instruction(Examples(has).of(name, ROWS[:0]), has, rows=3)


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("has", [LIMITED, UNLIMITED], ids=["limited", "unlimited"])
def test_everything_that_must_be_refused_is(name, rows, has):
    cases = list(Examples(has).refusals(name, torch.arange(rows), rows))
    assert len(cases) >= 4
    for case in cases:
        with pytest.raises(case.error):
            check_instruction(case.instruction, has, rows)
            pytest.fail(f"{name} was taken: {case.why}")


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_that_is_lacking_is_named(name):
    lacks = replace(LIMITED, verbs=LIMITED.verbs - {name})
    with pytest.raises(CapabilityError, match=f"no verb {name}; it has"):
        check_instruction(Examples(LIMITED).of(name, ROWS), lacks, rows=3)


def test_the_ends_of_a_range_belong_to_it():
    for time_s in (-50.0, 50.0):
        check_instruction(Dwell(ROWS[:1], torch.tensor([time_s])), LIMITED, rows=3)
    tiny = replace(LIMITED, limits={"Dwell.time_s": Limits(1e-8, 0.1)})  # neither end is a number of single precision
    check_instruction(Dwell(ROWS[:2], torch.tensor([1e-8, 0.1])), tiny, rows=3)
    with pytest.raises(InstructionError, match=r"Dwell.time_s must be finite and within \[-50, 50\]; given 0 to 50.5"):
        check_instruction(Dwell(ROWS[:2], torch.tensor([0.0, 50.5])), LIMITED, rows=3)


@pytest.mark.parametrize("shape", [(0, 4), (4, -1), (4,), (4, 4, 4), (4.0, 4.0), (True, 4)], ids=str)
def test_a_frame_has_two_whole_positive_sides(shape):
    scan = Examples(LIMITED).of("Scan", ROWS)
    assert isinstance(scan, Scan)
    with pytest.raises(InstructionError, match="Scan.shape must be"):
        check_instruction(replace(scan, shape=shape), LIMITED, rows=3)


@pytest.mark.parametrize("averaged", [{"baseline_samples": 0}, {"window_samples": 9}, {"baseline_samples": 9}], ids=str)
def test_a_trace_rule_must_fit_its_trace(averaged):
    rule = TraceRule(fall=0.1, **averaged)
    with pytest.raises(InstructionError, match="Dwell.stop must average"):
        check_instruction(Dwell(ROWS, torch.ones(3), 8, rule), LIMITED, rows=3)


def test_a_trace_rule_has_finite_fractions():
    for rule in (TraceRule(rise=math.nan), TraceRule(fall=math.inf)):
        with pytest.raises(InstructionError, match="Dwell.stop must rise or fall by finite fractions"):
            check_instruction(Dwell(ROWS, torch.ones(3), 8, rule), LIMITED, rows=3)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("Scan", "region", torch.ones(3, 3)),
        ("Scan", "fov_ang", torch.ones(3, 1)),
        ("Scan", "dwell_s", 1.0),
        ("Dwell", "time_s", torch.ones(3, dtype=torch.bool)),
        ("Blank", "on", torch.ones(3, dtype=torch.int64)),
    ],
)
def test_a_value_of_the_wrong_shape_or_kind_is_refused_by_name(name, field, value):
    wrong = replace(Examples(LIMITED).of(name, ROWS), **{field: value})
    with pytest.raises(InstructionError, match=f"{name}.{field} must be a tensor"):
        check_instruction(wrong, LIMITED, rows=3)


def test_the_near_names_are_told():
    with pytest.raises(CapabilityError, match="'defocus' can not be read; readable: .*clock_s.*defocus_ang"):
        check_instruction(Read(ROWS, "defocus"), LIMITED, rows=3)
