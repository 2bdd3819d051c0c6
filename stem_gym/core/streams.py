"""Row by row random numbers: every row of a batch owns a counter-based stream.

A draw is a pure function of (row key, episode, draw number, element), computed with Philox 4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC'11). So row i of a batch equals the single environment with that row's
seed, whatever the batch size, the neighbours, the order of partial resets or the sharding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stem_gym.core.errors import ConfigError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_SMALL_RATE = 10.0  # below: inversion of the Poisson law; above: its asymptotic quantile
_LARGEST_SMALL_COUNT = 32  # P(N > 32 | rate 10) = 1e-8, below the 2^-24 grid of the uniforms
_ERFINV_CENTRE = (
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
_ERFINV_TAIL = (
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


def _uniform(address: Tensor, count: int) -> Tensor:
    """Uniforms in (0, 1), never 0 or 1; address (n, 4) int64 is key, episode and draw; gives (n, count) float32."""
    key0, key1, episode, draw = address.unsqueeze(-1).unbind(1)  # (n, 1) each
    block = torch.arange((count + 3) // 4, device=address.device).unsqueeze(0)
    words = philox((block, draw, episode, torch.zeros_like(block)), (key0, key1))
    bits = torch.cat(words, dim=1)[:, :count] >> 9
    return (bits.to(torch.float32) + 0.5) * 2.0**-23


def _normal(address: Tensor, count: int) -> Tensor:
    """Standard normals by Box and Muller; (n, count) float32."""
    half = (count + 1) // 2
    uniform = _uniform(address, 2 * half)
    radius = torch.sqrt(-2.0 * torch.log(uniform[:, :half]))
    angle = (2.0 * math.pi) * uniform[:, half:]
    return torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1)[:, :count]


# The elementary functions below use IEEE additions and products alone, so that the eager and the compiled sampler give
# the same bits; those of the math libraries differ in the last place between the two.


def _exp_minus(x: Tensor) -> Tensor:
    """exp(−x) for x in [0, 16] to 1e-6: Taylor series of exp(−x/16), squared four times."""
    y = x * (-1.0 / 16.0)
    value = torch.full_like(y, 1.0 / 40320.0)
    for factorial in (5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0):
        value = value * y + 1.0 / factorial
    for _ in range(4):
        value = value * value
    return value


def _log(x: Tensor) -> Tensor:
    """ln x for normal positive float32 to 2e-7: exponent from the bits, atanh series for the mantissa."""
    bits = x.view(torch.int32) - 0x3F3504F3  # mantissa in [√½, √2)
    exponent = (bits >> 23).to(torch.float32)
    mantissa = ((bits & 0x007FFFFF) + 0x3F3504F3).view(torch.float32)
    z = (mantissa - 1.0) / (mantissa + 1.0)
    z2 = z * z
    series = torch.full_like(z2, 1.0 / 9.0)
    for odd in (7.0, 5.0, 3.0, 1.0):
        series = series * z2 + 1.0 / odd
    return exponent * math.log(2.0) + 2.0 * (z * series)


def normal_quantile(uniform: Tensor) -> Tensor:
    """The standard normal quantile to 2e-6 in float32 (M. Giles, "Approximating the erfinv function", 2010)."""
    x = 2.0 * uniform - 1.0
    w = -_log((1.0 - x) * (1.0 + x))
    centre, tail = w - 2.5, torch.sqrt(w.clamp(min=0.0)) - 3.0
    inner = torch.full_like(x, _ERFINV_CENTRE[0])
    for coefficient in _ERFINV_CENTRE[1:]:
        inner = inner * centre + coefficient
    outer = torch.full_like(x, _ERFINV_TAIL[0])
    for coefficient in _ERFINV_TAIL[1:]:
        outer = outer * tail + coefficient
    return (math.sqrt(2.0) * x) * torch.where(w < 5.0, inner, outer)


def poisson_quantile(uniform: Tensor, rate: Tensor) -> Tensor:
    """The Poisson count whose cumulative probability first exceeds `uniform`; same shapes, float32.

    Inversion for rates to 10; above, the asymptotic expansion of the quantile in the normal quantile w (M. B. Giles,
    "Algorithm 955: approximation of the inverse Poisson cumulative distribution function", ACM TOMS 42, 7, 2016).
    """
    small = rate.clamp(max=_SMALL_RATE)
    term = _exp_minus(small)
    cumulative = term
    reach = uniform * (1.0 - 1e-5)  # keeps clear of the rounding of the cumulative sum, which ends near 1 − 4e-6
    count = (reach > cumulative).to(torch.float32)
    for k in range(1, _LARGEST_SMALL_COUNT):
        term = term * (small * (1.0 / k))
        cumulative = cumulative + term
        count = count + (reach > cumulative).to(torch.float32)
    large = rate.clamp(min=_SMALL_RATE)
    root = torch.sqrt(large)
    w = normal_quantile(uniform)
    w2 = w * w
    quantile = large + root * w + (2.0 + w2) * (1.0 / 6.0) - w * (2.0 + w2) / (72.0 * root)
    quantile = quantile + (-16.0 + w2 * (7.0 + 3.0 * w2)) / (810.0 * large)
    return torch.where(rate > _SMALL_RATE, torch.floor(quantile).clamp(min=0.0), count)


@functools.cache
def _kernels(fused: bool) -> tuple[Any, Any]:
    """The uniform and the Poisson kernel; compiled apart, which is faster than one kernel of both."""
    if not fused:
        return _uniform, poisson_quantile
    return torch.compile(_uniform, dynamic=True), torch.compile(poisson_quantile, dynamic=True)


@dataclass(frozen=True)
class StreamState:
    """Where the streams stand: enough to go on from here with the same numbers."""

    key: Tensor  # (B, 2) int64, 32-bit words
    episode: Tensor  # (B,) int64
    draw: Tensor  # (B,) int64


class Streams:
    """The random numbers of B rows. Draws of one row never move another row's stream.

    `fused` compiles the Poisson sampler with torch.compile (needs a C++ compiler and some seconds at first use): the
    same counts, several times faster.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", fused: bool = False) -> None:
        rows = len(seeds)
        self._state = StreamState(
            key=torch.zeros(rows, 2, dtype=torch.int64, device=device),
            episode=torch.zeros(rows, dtype=torch.int64, device=device),
            draw=torch.zeros(rows, dtype=torch.int64, device=device),
        )
        self._uniform_kernel, self._poisson_kernel = _kernels(fused)
        self.seed(torch.arange(rows, device=device), seeds)

    def __len__(self) -> int:
        return len(self._state.draw)

    @property
    def device(self) -> torch.device:
        return self._state.draw.device

    def seed(self, rows: Tensor, seeds: Sequence[int]) -> None:
        """Give `rows` new keys; their episodes count from 0 again."""
        words = np.stack([np.random.SeedSequence(seed).generate_state(2, np.uint32) for seed in seeds])
        self._state.key[rows] = torch.from_numpy(words.astype(np.int64)).to(self.device)
        self._state.episode[rows] = -1
        self._state.draw[rows] = 0

    def next_episode(self, rows: Tensor) -> None:
        """Move `rows` (n,) to their next episode: fresh numbers, still a function of the seed alone."""
        self._state.episode[rows] += 1
        self._state.draw[rows] = 0

    def uniform(self, rows: Tensor, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in (0, 1); (n, *shape) float32."""
        return _uniform(self._address(rows), math.prod(shape)).reshape(len(rows), *shape)

    def normal(self, rows: Tensor, shape: Sequence[int] = ()) -> Tensor:
        """Standard normal; (n, *shape) float32."""
        return _normal(self._address(rows), math.prod(shape)).reshape(len(rows), *shape)

    def poisson(self, rows: Tensor, rate: Tensor) -> Tensor:
        """Poisson counts with mean `rate` (n, …), as float32 of the same shape."""
        flat = rate.reshape(len(rows), -1).float()
        counts: Tensor = self._poisson_kernel(self._uniform_kernel(self._address(rows), flat.shape[1]), flat)
        return counts.reshape(rate.shape)

    def snapshot(self) -> StreamState:
        """A copy of where the streams stand."""
        state = self._state
        return StreamState(state.key.clone(), state.episode.clone(), state.draw.clone())

    def restore(self, state: StreamState) -> None:
        """Go back to a snapshot."""
        self._state = replace(state, key=state.key.clone(), episode=state.episode.clone(), draw=state.draw.clone())

    def _address(self, rows: Tensor) -> Tensor:
        state = self._state
        address = torch.stack((state.key[rows, 0], state.key[rows, 1], state.episode[rows], state.draw[rows]), dim=1)
        state.draw[rows] += 1
        return address
