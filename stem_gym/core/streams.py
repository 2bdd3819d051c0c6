"""Row by row random numbers: every row of a batch owns a counter-based stream.

A draw is a pure function of (row key, episode, draw number, element), computed with Philox 4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC'11). So row i of a batch equals the single environment with that row's
seed, whatever the batch size, the neighbours, the order of partial resets or the sharding.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stem_gym.core.batch import every_row, names_every
from stem_gym.core.errors import ConfigError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LANES = np.array(_MULTIPLIERS, np.uint64)[:, None, None]
_HIGH = 1 if sys.byteorder == "little" else 0  # where a 64-bit word keeps its high half
_KEY_SCHEDULE = np.arange(_ROUNDS)[:, None, None] * np.array(_KEY_STEPS)[:, None]  # (rounds, 2, 1)
_FUSED_FROM_DRAWS = 1024  # a row; for fewer, such as the samples of a trace, compiling another kernel does not pay
_FUSED_FROM_NUMBERS = 8192  # in one draw; below, numpy's own start is quicker
_NUMPY_UP_TO_ROWS = 16  # beyond, torch's wider loops win over numpy's quicker start
_AHEAD = 32  # draws that so few rows compute at once, because numpy's start costs more than the numbers
_AHEAD_BLOCKS = 32  # of a draw; larger ones are computed alone
_SMALL_RATE = 10.0  # below: inversion of the Poisson law; above: its asymptotic quantile
_LARGEST_SMALL_COUNT = 32  # P(N > 32 | rate 10) = 1e-8, below the 2^-24 grid of the uniforms
_FAINT = 1e-30  # too little to change a cumulative probability of at least exp(−10), and no subnormal number
ERFINV_CENTRE = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
ERFINV_TAIL = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)


def row_seeds(seed: int, rows: int) -> list[int]:
    """Seeds of the rows of a batch that was seeded with one number; row i does not depend on `rows`.

    `gymnasium.make(id).reset(seed=row_seeds(s, n)[i])` is the same world as row i of `make_vec(id, n).reset(seed=s)`.
    """
    if seed < 0:
        raise ConfigError(f"A seed must be a non-negative integer; given {seed}.")
    children = np.random.SeedSequence(seed).spawn(rows)
    return [int(child.generate_state(1, np.uint64)[0] >> np.uint64(1)) for child in children]


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four uniform 32-bit words (in int64) for each counter of four words and key of two; broadcasts."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wraps in int64, which keeps all 64 bits
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _uniform_blocks(address: Tensor, blocks: int) -> Tensor:
    """Uniforms in (0, 1), never 0 or 1, (n, 4, blocks) float32; address (n, 4) int64 is key, episode and draw."""
    key0, key1, episode, draw = (address[:, column : column + 1] for column in range(4))
    block = torch.arange(blocks, device=address.device)[None, :]
    words = philox((block, draw, episode, torch.zeros_like(block)), (key0, key1))
    return ((torch.stack(words, dim=1) >> 9).to(torch.float32) + 0.5) * 2.0**-23


def _uniform(address: Tensor, count: int, fused: bool = False) -> Tensor:
    """The first `count` uniforms of each address, (n, count)."""
    blocks = (count + 3) // 4
    if not fused:
        return _uniform_blocks(address, blocks).flatten(1)[:, :count]
    # One and odd numbers of blocks would each be compiled anew; a block more changes none of the others.
    drawn = _compiled()[0](address, blocks + blocks % 2)
    return torch.as_tensor(drawn)[:, :, :blocks].flatten(1)[:, :count]


def _uniform_numpy(address: np.ndarray, blocks: int) -> np.ndarray:
    """The same numbers from numpy, which starts small operations faster, with both halves of a counter in one array."""
    even, odd = np.zeros((2, 2, len(address), blocks), np.uint32)
    even[0], even[1] = np.arange(blocks), address[:, 2:3]
    odd[0] = address[:, 3:4]
    keys = ((address[:, :2].T + _KEY_SCHEDULE) & _MASK).astype(np.uint32)  # (rounds, 2, n)
    for key in keys[..., None]:
        halves = (even * _LANES).view(np.uint32)  # of the 64-bit products: low, high, low, high, …
        even = halves[::-1, :, _HIGH::2] ^ odd ^ key
        odd = halves[::-1, :, 1 - _HIGH :: 2]
    words = np.stack((even[0], odd[0], even[1], odd[1]), axis=1)
    uniform: np.ndarray = ((words >> 9).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    return uniform


class _Ahead:
    """The next draws of a few rows, computed together: the numbers are those of single draws."""

    def __init__(self) -> None:
        self._episodes, self._draw = b"", np.zeros(0, np.int64)  # keys and episodes, and first draws (n,)
        self._uniform: np.ndarray = np.zeros((0, _AHEAD, 4, 0), np.float32)  # (n, draws, 4, blocks)

    def uniform(self, address: np.ndarray, blocks: int) -> np.ndarray:
        """As `_uniform_numpy` for these addresses (n, 4)."""
        if not self._holds(address, blocks):
            self._look(address, max(blocks, self._uniform.shape[3]))
        if len(address) == 1:
            return self._uniform[:, int(address[0, 3] - self._draw[0]), :, :blocks]
        return self._uniform[np.arange(len(address)), address[:, 3] - self._draw, :, :blocks]

    def _holds(self, address: np.ndarray, blocks: int) -> bool:
        if blocks > self._uniform.shape[3] or address[:, :3].tobytes() != self._episodes:
            return False
        return all(0 <= draw < _AHEAD for draw in (address[:, 3] - self._draw).tolist())

    def _look(self, address: np.ndarray, blocks: int) -> None:
        each = np.repeat(address, _AHEAD, axis=0)
        each[:, 3] += np.tile(np.arange(_AHEAD), len(address))
        self._episodes, self._draw = address[:, :3].tobytes(), address[:, 3]
        self._uniform = _uniform_numpy(each, blocks).reshape(-1, _AHEAD, 4, blocks)


def _box_muller(uniform: Any, xp: Any) -> Any:
    """Normals of as many uniforms (n, even)."""
    half = uniform.shape[1] // 2
    radius, angle = xp.sqrt(-2.0 * xp.log(uniform[:, :half])), (2.0 * math.pi) * uniform[:, half:]
    return xp.concatenate((radius * xp.cos(angle), radius * xp.sin(angle)), axis=1)


# The elementary functions below use IEEE additions, products and roots alone, so that torch, its compiled kernels and
# numpy give the same bits; the logarithms and exponentials of math libraries differ in the last place.


def _exp_minus(x: Any, xp: Any) -> Any:
    """exp(−x) for x in [0, 16] to 4e-6: Taylor series of exp(−x/16), squared four times."""
    y = x * (-1.0 / 16.0)
    value = xp.full_like(y, 1.0 / 40320.0)
    for factorial in (5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0):
        value *= y
        value += 1.0 / factorial
    for _ in range(4):
        value *= value
    return value


def _log(x: Any, xp: Any) -> Any:
    """ln x for normal positive float32 to 7e-7: exponent from the bits, atanh series for the mantissa."""
    bits = x.view(xp.int32) - 0x3F3504F3  # mantissa in [√½, √2)
    exponent = xp.asarray(bits >> 23, dtype=xp.float32)
    mantissa = ((bits & 0x007FFFFF) + 0x3F3504F3).view(xp.float32)
    z = (mantissa - 1.0) / (mantissa + 1.0)
    z2 = z * z
    series = xp.full_like(z2, 1.0 / 9.0)
    for odd in (7.0, 5.0, 3.0, 1.0):
        series *= z2
        series += 1.0 / odd
    return exponent * math.log(2.0) + 2.0 * (z * series)


def normal_quantile(uniform: Any, xp: Any = torch) -> Any:
    """The standard normal quantile to 2e-6 in float32 (M. Giles, "Approximating the erfinv function", 2010)."""
    x = 2.0 * uniform - 1.0
    w = -_log((1.0 - x) * (1.0 + x), xp)
    centre, tail = w - 2.5, xp.sqrt(xp.clip(w, 0.0, None)) - 3.0
    inner, outer = xp.full_like(x, ERFINV_CENTRE[0]), xp.full_like(x, ERFINV_TAIL[0])
    for at_centre, at_tail in zip(ERFINV_CENTRE[1:], ERFINV_TAIL[1:], strict=True):
        inner *= centre
        inner += at_centre
        outer *= tail
        outer += at_tail
    return (math.sqrt(2.0) * x) * xp.where(w < 5.0, inner, outer)


def poisson_quantile(uniform: Any, rate: Any, xp: Any = torch) -> Any:
    """The Poisson count whose cumulative probability first exceeds `uniform`; same shapes, float32."""
    return xp.where(rate > _SMALL_RATE, _large_counts(uniform, rate, xp), _small_counts(uniform, rate, xp))


def _poisson_numpy(uniform: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """The same counts from numpy, each by the law of its rate alone."""
    high = rate > _SMALL_RATE
    highs = int(np.count_nonzero(high))
    if highs == 0:
        return np.asarray(_small_counts(uniform, rate, np))
    if highs == rate.size:
        return np.asarray(_large_counts(uniform, rate, np))
    counts = np.empty_like(rate)
    for there, law in ((np.flatnonzero(high), _large_counts), (np.flatnonzero(~high), _small_counts)):
        counts.put(there, law(uniform.take(there), rate.take(there), np))
    return counts


def _small_counts(uniform: Any, rate: Any, xp: Any) -> Any:
    """Inversion of the cumulative probability, for rates to 10."""
    small = xp.clip(rate, None, _SMALL_RATE)
    term = _exp_minus(small, xp)
    cumulative = term + 0.0
    reach = uniform * (1.0 - 1e-5)  # keeps clear of the rounding of the cumulative sum, which ends near 1 − 4e-6
    count = xp.asarray(reach > cumulative, dtype=xp.float32)
    for k in range(1, _LARGEST_SMALL_COUNT):
        term *= small * (1.0 / k)
        if xp is not np:  # which stops before; subnormal terms would take most of the time
            term += _FAINT
        cumulative += term
        above = reach > cumulative
        if xp is np and not above.any():
            break
        count += above
    return count


def _large_counts(uniform: Any, rate: Any, xp: Any) -> Any:
    """The asymptotic expansion of the quantile in the normal quantile w, for rates above 10.

    M. B. Giles, "Algorithm 955: approximation of the inverse Poisson cumulative distribution function", ACM TOMS 42,
    7, 2016.
    """
    large = xp.clip(rate, _SMALL_RATE, None)
    root = xp.sqrt(large)
    w = normal_quantile(uniform, xp)
    w2 = w * w
    quantile = large + root * w + (2.0 + w2) * (1.0 / 6.0) - w * (2.0 + w2) / (72.0 * root)
    quantile = quantile + (-16.0 + w2 * (7.0 + 3.0 * w2)) / (810.0 * large)
    return xp.clip(xp.floor(quantile), 0.0, None)


@functools.cache
def _compiled() -> tuple[Any, Any]:
    """The uniform and the Poisson kernel; compiled apart, which is faster than one kernel of both."""
    return torch.compile(_uniform_blocks, dynamic=True), torch.compile(poisson_quantile, dynamic=True)


class Streams:
    """The random numbers of B rows. Draws of one row never move another row's stream.

    `fused` compiles the Poisson sampler with torch.compile (needs a C++ compiler and some seconds at first use): the
    same counts, several times faster.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", fused: bool = False) -> None:
        rows = len(seeds)
        self._address = torch.zeros(rows, 4, dtype=torch.int64, device=device)  # two key words, episode, draw
        self._one_draw = torch.tensor([0, 0, 0, 1], device=device)
        self._fused = fused
        self._ahead = _Ahead()
        self.seed(every_row(rows, torch.device(device)), seeds)

    def __len__(self) -> int:
        return len(self._address)

    @property
    def device(self) -> torch.device:
        return self._address.device

    @property
    def address(self) -> Tensor:
        """Two key words, episode and next draw of each row, (B, 4) int64. For code that draws by itself, in place."""
        return self._address

    def seed(self, rows: Tensor, seeds: Sequence[int]) -> None:
        """Give `rows` new keys; their episodes count from 0 again."""
        words = np.stack([np.random.SeedSequence(seed).generate_state(2, np.uint32) for seed in seeds])
        self._address[rows, :2] = torch.from_numpy(words.astype(np.int64)).to(self.device)
        self._address[rows, 2] = -1
        self._address[rows, 3] = 0

    def next_episode(self, rows: Tensor) -> None:
        """Move `rows` (n,) to their next episode: fresh numbers, still a function of the seed alone."""
        self._address[rows, 2] += 1
        self._address[rows, 3] = 0

    def uniform(self, rows: Tensor, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in (0, 1); (n, *shape) float32."""
        return self._draw_uniform(rows, math.prod(shape)).reshape(len(rows), *shape)

    def normal(self, rows: Tensor, shape: Sequence[int] = ()) -> Tensor:
        """Standard normal, by Box and Muller; (n, *shape) float32."""
        count = math.prod(shape)
        uniform = self._draw_uniform(rows, count + count % 2)
        if uniform.device.type == "cpu":
            return torch.from_numpy(_box_muller(uniform.numpy(), np)[:, :count]).reshape(len(rows), *shape)
        return torch.as_tensor(_box_muller(uniform, torch)[:, :count]).reshape(len(rows), *shape)

    def poisson(self, rows: Tensor, rate: Tensor) -> Tensor:
        """Poisson counts with mean `rate` (n, …), as float32 of the same shape."""
        per_row = math.prod(rate.shape[1:])
        if self._fused and len(rows) > 1 and per_row >= _FUSED_FROM_DRAWS:
            # One fresh dimension: with views or equal sizes the compiler would make a kernel for each.
            drawn = _uniform(self._next_address(rows), per_row, fused=True).flatten().clone()
            counts = _compiled()[1](drawn, rate.float().flatten().clone())
            return torch.as_tensor(counts).reshape(rate.shape)
        drawn = self._draw_uniform(rows, per_row).reshape(rate.shape)
        if drawn.device.type == "cpu" and len(rows) <= _NUMPY_UP_TO_ROWS:
            return torch.from_numpy(_poisson_numpy(drawn.numpy(), rate.detach().float().numpy()))
        if drawn.device.type == "cpu" and rate.numel() and float(rate.min()) > _SMALL_RATE:
            return torch.as_tensor(_large_counts(drawn, rate.float(), torch))  # the same, without the unused half
        return torch.as_tensor(poisson_quantile(drawn, rate.float()))

    def _draw_uniform(self, rows: Tensor, count: int) -> Tensor:
        address = self._next_address(rows)
        if self._fused and len(rows) * count >= _FUSED_FROM_NUMBERS:
            return _uniform(address, count, fused=True)
        if address.device.type != "cpu":
            return _uniform(address, count)
        blocks, few = (count + 3) // 4, len(rows) <= _NUMPY_UP_TO_ROWS and names_every(rows, len(self))
        draw = self._ahead.uniform if few and blocks <= _AHEAD_BLOCKS else _uniform_numpy
        return torch.from_numpy(draw(address.numpy(), blocks).reshape(len(rows), -1)[:, :count])

    def snapshot(self) -> Tensor:
        """A copy of where the streams stand, (B, 4) int64: enough to go on from here with the same numbers."""
        return self._address.clone()

    def restore(self, snapshot: Tensor) -> None:
        """Go back to a snapshot."""
        self._address = snapshot.clone()

    def _next_address(self, rows: Tensor) -> Tensor:
        """Where the next draw of `rows` (n,) is, (n, 4); moves their streams on."""
        if names_every(rows, len(self)):
            address = self._address.clone()
            self._address += self._one_draw
            return address
        address = self._address.index_select(0, rows)
        self._address.index_add_(0, rows, self._one_draw.expand(len(address), 4))
        return address
