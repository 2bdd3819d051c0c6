"""An even grid over the field, walked to and fro: the raster of a spectrum search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from agents.engine.search_field import search_field_of
from agents.policy import Array, Face, Observation


class GridRaster:
    """As many evenly spaced cells as can be measured; where more can, those between them, then the rest."""

    def __init__(self, face: Face, exposure_share: float) -> None:
        self.field = search_field_of(face, "raster")
        self._exposure_share = exposure_share
        self._order = walk(self.field.height, self.field.width, self.field.measurements)
        self._step = np.zeros(face.rows, dtype=np.int64)

    def reset(self, rows: Sequence[int] | Array) -> None:
        """Begin again at the first cell."""
        self._step[np.asarray(rows, dtype=np.int64)] = 0

    def act(self, observation: Observation) -> Array:
        """Actions (B, …)."""
        cells = torch.from_numpy(self._order[self._step % len(self._order)])
        self._step += 1
        return self.field.action(cells, self._exposure_share)


def walk(height: int, width: int, count: int) -> Array:
    """All cells (H·W,): first a grid of at most `count`, as square as can be, walked to and fro, then the rest."""
    count = min(count, height * width)
    options = [(rows, min(width, count // rows)) for rows in range(1, min(height, count) + 1)]
    # The largest gap tells how square the grid is; of equal ones, more points are better.
    rows, columns = min(options, key=lambda n: (max(height / n[0], width / n[1]), -n[0] * n[1]))
    every = [_serpentine(height, width, rows, columns, shift) for shift in (0.5, 0.0)]
    every.append(_serpentine(height, width, height, width, 0.5))
    order = np.concatenate(every)
    _, first = np.unique(order, return_index=True)
    return np.asarray(order[np.sort(first)])


def _serpentine(height: int, width: int, rows: int, columns: int, shift: float) -> Array:
    """Cells of an even grid of rows × columns, every other row backwards."""
    y = np.floor((np.arange(rows) + shift) * height / rows).astype(np.int64)
    x = np.floor((np.arange(columns) + shift) * width / columns).astype(np.int64)
    cells = y[:, None] * width + x
    cells[1::2] = cells[1::2, ::-1]
    return cells.ravel()
