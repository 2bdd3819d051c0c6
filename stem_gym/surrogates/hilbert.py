"""Points in the order of a Hilbert curve: neighbours along it are neighbours in space.

Even steps along points in that order take some of every region: a few of many that stand for all of them better than as
many at random do (Gerber, Chopin and Whiteley, Ann. Stat. 47, 2236, 2019).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

MOST_DIMENSIONS = 5
_BITS = 15  # of a place on the curve: such short ones are sorted by their digits, ten times as fast as by comparing


def curve_order(points: Tensor, reach: float = 3.0) -> Tensor:
    """Indices (…, N) that put points (…, N, D) in the order of a curve through all of [−reach, reach]^D.

    Of more than five dimensions the first five count. Points in one cell of the curve keep their order, and those
    outside are taken for the nearest ones inside. Sorted on the CPU.
    """
    used = min(points.shape[-1], MOST_DIMENSIONS)
    bits = _BITS // used
    side = 2**bits
    cell = ((points[..., :used] + reach) * (side / (2.0 * reach))).clamp_(0, side - 1).int()
    index = cell[..., 0]
    for dimension in range(1, used):
        index = index * side + cell[..., dimension]
    place = curve_places(used, bits)[index.cpu().numpy()]
    return torch.from_numpy(np.argsort(place, axis=-1, kind="stable")).to(points.device)


@functools.cache
def curve_places(dimensions: int, bits: int) -> np.ndarray:
    """Place on the curve of every cell of a cube with 2^bits cells a side, the last coordinate fastest, as int16.

    The transposed form of J. Skilling, AIP Conf. Proc. 707, 381 (2004), for all cells at once.
    """
    side = 2**bits
    x = list(np.indices((side,) * dimensions).reshape(dimensions, -1))
    for bit in reversed(range(1, bits)):
        high, low = 1 << bit, (1 << bit) - 1
        for i in range(dimensions):
            inverted = (x[i] & high) > 0
            swapped = np.where(inverted, 0, (x[0] ^ x[i]) & low)
            x[i] = x[i] ^ swapped
            x[0] = x[0] ^ np.where(inverted, low, swapped)
    for i in range(1, dimensions):
        x[i] ^= x[i - 1]
    turned = np.zeros_like(x[0])
    for bit in reversed(range(1, bits)):
        turned ^= np.where(x[-1] & (1 << bit), (1 << bit) - 1, 0)
    place = np.zeros_like(x[0])
    for bit in reversed(range(bits)):
        for one in x:
            place = place << 1 | (one ^ turned) >> bit & 1
    return place.astype(np.int16)
