"""Rows of tensors: the quick way for all rows gives what the way for some rows gives, and is never taken for others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from stem_gym.core.batch import (
    add,
    changed,
    clone_rows,
    ends,
    every_row,
    names_every,
    number,
    put,
    put_rows,
    rows_where,
    take,
    take_rows,
    write,
    write_rows,
    write_sum,
)

CPU = torch.device("cpu")
B = 5
LISTS = {
    "all, known": every_row(B, CPU),
    "all": torch.arange(B),
    "all, in another order": torch.tensor([3, 0, 4, 1, 2]),
    "some": torch.tensor([4, 1]),
    "the first three, known as all of three": every_row(3, CPU),
    "none": torch.zeros(0, dtype=torch.int64),
}
ROWS = pytest.mark.parametrize("rows", LISTS.values(), ids=LISTS.keys())


@dataclass(frozen=True)
class Inner:
    place: Tensor  # (B, 2)


@dataclass(frozen=True)
class Outer:
    clock_s: Tensor  # (B,)
    inner: Inner
    name: str = "kept"


def whole() -> Tensor:
    return torch.arange(2.0 * B).reshape(B, 2)


def outer(start: float, rows: int = B) -> Outer:
    return Outer(start + torch.arange(float(rows)), Inner(start + torch.arange(2.0 * rows).reshape(rows, 2)))


@ROWS
def test_every_way_to_use_rows_does_what_a_loop_over_them_does(rows):
    more = 100.0 + torch.arange(2.0 * len(rows)).reshape(-1, 2)
    fresh, summed = whole(), whole().double()
    for index, row in enumerate(rows.tolist()):
        fresh[row] = more[index]
        summed[row] += more[index]
    before = whole()
    assert torch.equal(
        take(before, rows), torch.stack([before[row] for row in rows.tolist()] or [before[0]])[: len(rows)]
    )
    assert torch.equal(put(before, rows, more), fresh)
    assert torch.equal(add(before.double(), rows, more), summed)
    assert torch.equal(before, whole()), "no argument is changed"
    buffer, total = whole(), whole().double()
    write(buffer, rows, more)
    write_sum(total, rows, more)
    assert torch.equal(buffer, fresh) and torch.equal(total, summed)
    buffer.zero_()
    assert not (more == 0.0).any(), "what was written in place shares no memory with its source"


@ROWS
def test_states_are_taken_put_and_written_field_by_field(rows):
    state, fresh = outer(0.0), outer(100.0, len(rows))
    some = take_rows(state, rows)
    assert torch.equal(some.clock_s, state.clock_s[rows]) and torch.equal(some.inner.place, state.inner.place[rows])
    merged, buffers = put_rows(state, rows, fresh), clone_rows(state)
    assert torch.equal(state.clock_s, outer(0.0).clock_s), "no argument is changed"
    write_rows(buffers, rows, fresh)
    for made in (merged, buffers):
        assert torch.equal(made.clock_s, state.clock_s.index_copy(0, rows, fresh.clock_s))
        assert torch.equal(made.inner.place, state.inner.place.index_copy(0, rows, fresh.inner.place))
        assert made.name == "kept"
    assert buffers.clock_s is not fresh.clock_s


def test_only_the_very_list_is_known_to_be_all_rows():
    """What is made of it may be in another order, and is not known again."""
    rows = every_row(B, CPU)
    assert names_every(rows, B) and not names_every(rows, B + 1)
    for other in (rows.flip(0), rows[torch.arange(B)], rows.clone(), rows + 0, torch.arange(B)):
        assert not names_every(other, B)
    assert take(whole(), rows.flip(0))[0].tolist() == [8.0, 9.0]


def test_where_a_mask_holds_everywhere_all_rows_are_known():
    mask = torch.ones(B, dtype=torch.bool)
    assert names_every(rows_where(mask), B)
    mask[2] = False
    assert rows_where(mask).tolist() == [0, 1, 3, 4] and not names_every(rows_where(mask), B - 1)
    assert rows_where(~mask).tolist() == [2] and len(rows_where(mask & ~mask)) == 0


def test_a_changed_state_is_a_replaced_one():
    state = outer(0.0)
    time = torch.ones(B)
    made, expected = changed(state, clock_s=time), replace(state, clock_s=time)
    assert type(made) is Outer and vars(made).keys() == vars(expected).keys()
    assert made.clock_s is time and made.inner is state.inner and state.clock_s is not time
    with pytest.raises(TypeError, match="clock"):
        changed(state, clock=time)


def test_the_numbers_of_all_rows_serve_gradients():
    """They are kept from one caller to the next, who may have been in inference mode."""
    with torch.inference_mode():
        rows = every_row(977, CPU)
    values = torch.ones(2000, requires_grad=True)
    values.index_select(0, rows).sum().backward()
    assert float(values.grad.sum()) == 977.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_kept_as_a_tensor_computes_as_the_number_does(dtype):
    values = torch.rand(1000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for value in (1 / 3, 1e9, 60.0, 6.241509074e6):
        kept = number(value, dtype)
        pairs = [(values * kept, values * value), (values / kept, values / value), (kept - values, value - values)]
        for ours, plain in [*pairs, (values + kept, values + value), (values >= kept / value, values >= 1.0)]:
            assert ours.dtype == plain.dtype and torch.equal(ours, plain)
    with torch.inference_mode():
        number(0.123)
    assert not number(0.123).is_inference()


@pytest.mark.parametrize("count", [1, 2, 64, 65])
def test_the_ends_of_numbers_are_nan_where_one_is(count):
    values = torch.linspace(-1.0, 3.0, count)
    assert ends(values) == (float(values.min()), float(values.max()))
    assert ends(values.reshape(count, 1)) == ends(values)
    values[-1] = torch.nan
    low, high = ends(values)
    assert low != low and high != high
