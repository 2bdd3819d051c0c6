"""How far measurements were from what had been believed of their cells, and deviations that are calibrated by it.

For models of which it is not known what they would have said without a measurement: what they said before it is. Places
that were chosen are no fair sample, as what is alike to them was known best: surprises widen a deviation, and their
absence does not make it smaller.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from agents.engine.acquisition import Belief
from agents.engine.leave_one_out import calibration_by_value
from agents.engine.search_field import Scene


class Surprises:
    """The last beliefs of B rows with C cells, and the surprises of each episode about what is wanted now."""

    def __init__(self, rows: int, cells: int) -> None:
        self._mean, self._deviation = torch.zeros(2, rows, cells)  # of a measurement, as last believed
        self._measured = torch.ones(rows, cells, dtype=torch.bool)  # what that belief had seen; nothing is new to none
        self._away = torch.full((rows, cells), torch.nan)  # deviations from the belief before, where there was one
        self._at = torch.zeros(rows, cells)  # what was believed there
        self._wanted = torch.zeros(rows, dtype=torch.int64)

    def forget(self, rows: Tensor) -> None:
        """Start the rows (n,) afresh."""
        self._measured[rows] = True
        self._away[rows] = torch.nan

    def calibrated(self, belief: Belief, scene: Scene, rows: Tensor) -> Belief:
        """The belief about the fields `rows` (n,), with what is to be expected of a measurement."""
        away, at = self._away[rows], self._at[rows]
        new = scene.measured & ~self._measured[rows]
        away = torch.where(new, (scene.value - self._mean[rows]) / self._deviation[rows], away)
        at = torch.where(new, self._mean[rows], at)
        away[scene.wanted != self._wanted[rows]] = torch.nan  # they were about another quantity
        plain = belief.measured_deviation()
        self._mean[rows], self._deviation[rows], self._measured[rows] = belief.mean, plain, scene.measured
        self._away[rows], self._at[rows], self._wanted[rows] = away, at, scene.wanted
        there = away.isfinite()
        order = (~there).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(1, int(there.sum(dim=1).max()))]
        away, at, there = (part.gather(1, order) for part in (away.nan_to_num(), at, there))
        wider = calibration_by_value(away, there, at, belief.mean, fair_sample=False).clamp(min=1.0)
        return replace(belief, spread=wider * plain)
