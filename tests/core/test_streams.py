"""Random numbers: the generator's published vectors, the laws they follow, and that rows own their streams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from stem_gym.core.batch import every_row
from stem_gym.core.errors import ConfigError
from stem_gym.core.streams import Streams, philox, poisson_quantile, row_seeds

ONES = 0xFFFFFFFF
# Known-answer vectors of Philox 4x32-10, from the Random123 distribution that came with Salmon et al., SC'11.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# Draws are fixed by their seeds, so these tests can not flicker; a wrong law has p of 1e-10 or less with these sizes.
LEAST_P = 1e-3


def everything(streams: Streams) -> torch.Tensor:
    return torch.arange(len(streams), device=streams.device)


def fresh(seeds: list[int], fused: bool = False) -> Streams:
    streams = Streams(seeds, fused=fused)
    streams.next_episode(everything(streams))
    return streams


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
@pytest.mark.parametrize("array", [torch.tensor, np.array], ids=["torch", "numpy"])
def test_philox_gives_its_published_vectors(array, counter, key, expected):
    words = philox([array([word]) for word in counter], [array([word]) for word in key])
    assert tuple(int(word[0]) for word in words) == expected


@pytest.mark.parametrize("rows", [1, 40], ids=["numpy path", "torch path"])
def test_uniforms_are_uniform_inside_the_open_interval(rows):
    draws = fresh(row_seeds(3, rows)).uniform(torch.arange(rows), (40_000 // rows,)).flatten().numpy()
    assert draws.dtype == np.float32
    assert draws.min() > 0.0 and draws.max() < 1.0
    assert scipy.stats.kstest(draws, "uniform").pvalue > LEAST_P


def test_normals_are_normal_and_pairs_are_uncorrelated():
    draws = fresh([11]).normal(torch.tensor([0]), (2, 20_000))[0].double().numpy()
    assert scipy.stats.kstest(draws.flatten(), "norm").pvalue > LEAST_P
    # Box and Muller makes halves from common radii: correlation and that of squares must vanish to 5 standard errors.
    assert abs(np.corrcoef(draws)[0, 1]) < 5.0 / 20_000**0.5
    assert abs(np.corrcoef(draws**2)[0, 1]) < 5.0 / 20_000**0.5
    assert fresh([11]).normal(torch.tensor([0]), (5,)).shape == (1, 5), "odd numbers of them too"


@pytest.mark.parametrize("rows", [1, 20], ids=["numpy path", "torch path"])
@pytest.mark.parametrize("rate", [0.02, 0.5, 3.0, 9.9, 10.1, 40.0, 1e3, 1e5])
def test_poisson_counts_follow_their_law(rate, rows):
    size = 40_000
    counts = fresh(row_seeds(7, rows)).poisson(torch.arange(rows), torch.full((rows, size // rows), rate)).flatten()
    counts = counts.double().numpy()
    assert (counts == np.floor(counts)).all() and counts.min() >= 0
    law = scipy.stats.poisson(rate)
    edges = np.unique(law.ppf(np.linspace(0.02, 0.98, 30)))
    expected = np.diff(np.concatenate(([0.0], law.cdf(edges), [1.0]))) * size
    kept = expected > 5.0  # the rule of thumb for chi-square
    observed = np.histogram(counts, np.concatenate(([-np.inf], edges + 0.5, [np.inf])))[0]
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    assert scipy.stats.chi2.sf(statistic, max(1, kept.sum() - 1)) > LEAST_P
    # Five standard errors, plus what the quantile's expansion leaves (Giles, 2016: well below 0.01 counts).
    assert abs(counts.mean() - rate) < 5.0 * (rate / size) ** 0.5 + 0.01


def test_a_rate_of_zero_gives_no_counts():
    assert not fresh([1]).poisson(torch.tensor([0]), torch.zeros(1, 1000)).any()


def test_numpy_and_torch_give_the_same_counts():
    uniform = (torch.arange(1 << 15).float() + 0.5) / (1 << 15)
    for rate in (0.001, 0.7, 9.99, 10.0, 10.01, 33.3, 5e4):
        rates = torch.full_like(uniform, rate)
        by_numpy = poisson_quantile(uniform.numpy(), rates.numpy(), np)
        assert np.array_equal(poisson_quantile(uniform, rates).numpy(), by_numpy)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # as torch loads its compiler
def test_compiled_and_eager_counts_are_the_same_bits():
    rates = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(1)) * 30.0
    rows = torch.arange(2)
    assert torch.equal(fresh([1, 2], fused=True).poisson(rows, rates), fresh([1, 2]).poisson(rows, rates))


@pytest.mark.parametrize("draw", ["uniform", "normal", "poisson"])
def test_a_row_draws_the_same_whatever_its_neighbours(draw):
    """Twenty rows take torch's path and one takes numpy's: their bits must agree as well."""
    seeds = row_seeds(5, 20)
    together, alone = fresh(seeds), fresh([seeds[13]])

    def draws(streams: Streams, rows: torch.Tensor) -> torch.Tensor:
        if draw == "poisson":
            return streams.poisson(rows, torch.full((len(rows), 50), 4.0))
        return getattr(streams, draw)(rows, (50,))

    draws(together, torch.arange(5))  # others have drawn before
    first = draws(together, torch.arange(20))[13]
    assert torch.equal(first, draws(alone, torch.tensor([0]))[0])
    draws(together, torch.tensor([2, 4]))
    second = draws(together, torch.tensor([19, 13, 0]))[1]
    assert torch.equal(second, draws(alone, torch.tensor([0]))[0])
    assert not torch.equal(first, second)


def test_episodes_and_draws_have_numbers_of_their_own():
    streams = fresh([8])
    row = torch.tensor([0])
    seen = []
    for _ in range(3):
        seen += [streams.uniform(row, (64,)) for _ in range(3)]
        streams.next_episode(row)
    values = torch.cat(seen).flatten()
    assert len(values.unique()) > 0.99 * len(values), "no block of numbers comes twice"


def test_a_snapshot_brings_the_same_numbers_back():
    streams = fresh([1, 2])
    rows = everything(streams)
    streams.uniform(rows)
    kept = streams.snapshot()
    first = streams.normal(rows, (7,))
    streams.next_episode(rows)
    streams.seed(rows[:1], [99])
    streams.restore(kept)
    assert torch.equal(streams.normal(rows, (7,)), first)


def test_reseeding_a_row_leaves_the_other_alone():
    one, other = fresh([1, 2]), fresh([1, 2])
    one.seed(torch.tensor([0]), [77])
    one.next_episode(torch.tensor([0]))
    rows = everything(one)
    a, b = one.uniform(rows, (9,)), other.uniform(rows, (9,))
    assert torch.equal(a[1], b[1]) and not torch.equal(a[0], b[0])


def test_row_seeds_do_not_depend_on_the_number_of_rows():
    assert row_seeds(42, 500)[:7] == row_seeds(42, 7)


def test_neighbouring_seeds_share_no_row():
    every = [seed for start in range(100) for seed in row_seeds(start, 64)]
    assert len(set(every)) == len(every)
    assert all(0 <= seed < 2**63 for seed in every)


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="non-negative integer; given -3"):
        row_seeds(-3, 2)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_numbers_drawn_ahead_are_those_of_single_draws(rows):
    """All rows of a small batch draw ahead; a list of the same rows that is not known to be all of them does not."""
    ahead, single = fresh(row_seeds(5, rows)), fresh(row_seeds(5, rows))
    all_rows, listed = every_row(rows, torch.device("cpu")), everything(single)
    counts = np.random.default_rng(0).integers(0, 150, 60).tolist()  # some too many to be drawn ahead
    kept: tuple[Any, Any] | None = None
    for step, count in enumerate(counts):
        assert torch.equal(ahead.uniform(all_rows, (count,)), single.uniform(listed, (count,))), step
        if step % 5 == 2:  # one row goes on alone
            assert torch.equal(ahead.normal(listed[-1:], (3,)), single.normal(listed[-1:], (3,)))
        if step == 20:
            ahead.next_episode(all_rows)
            single.next_episode(listed)
        if step == 30:
            kept = ahead.snapshot(), single.snapshot()
        if step == 33 and kept:
            ahead.restore(kept[0])
            single.restore(kept[1])
        if step == 40:
            for streams in (ahead, single):
                streams.seed(listed[:1], [99])
                streams.next_episode(listed[:1])
