"""The spectra that a policy was shown in the running episodes, row by row: where, what, and how long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.policy import Array, as_array

__all__ = ["SpectraSeen"]


class SpectraSeen:
    """Spectra of B rows, at most `most` of each; beyond that the oldest is forgotten."""

    def __init__(self, rows: int, grid: tuple[int, int], channels: int, most: int) -> None:
        self.grid = grid
        self.cell = torch.zeros(rows, most, dtype=torch.int64)
        self.spectra = torch.zeros(rows, most, channels)
        self.exposure_s = torch.zeros(rows, most)  # 0: no spectrum
        self._next = torch.zeros(rows, dtype=torch.int64)
        self._left: Array = np.full((rows, 3), np.nan)  # of the budget when a row was last looked at

    @property
    def count(self) -> Tensor:
        """(B,) spectra of each row."""
        return (self.exposure_s > 0).sum(1)

    def forget(self, rows: Array) -> None:
        """Begin new episodes in these rows."""
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        self.exposure_s[index], self._next[index] = 0.0, 0
        self._left[index.numpy()] = np.nan

    def take_in(self, observation: Mapping[str, Any], exposure_s: Array) -> Array:
        """Keep the last spectra of an observation, `exposure_s` (B,) long, where they are new: (B,) bool, which are.

        A spectrum is new where the budget has changed since, and its cell is told as measured. A cell that was
        measured before has the sum of its spectra in the observation, so that it replaces what was kept.
        """
        left = as_array(observation["budget"])
        cell = self._cells(as_array(observation["probe"]))
        measured = as_array(observation["measured"]).reshape(len(cell), -1)[np.arange(len(cell)), cell] > 0
        new: Array = measured & (left != self._left).any(axis=1)
        self._left = left.copy()
        rows = torch.as_tensor(np.flatnonzero(new))
        if len(rows):
            where = torch.as_tensor(cell)[rows]
            again = (self.cell[rows] == where[:, None]) & (self.exposure_s[rows] > 0)
            slot = torch.where(again.any(1), again.int().argmax(1), self._next[rows] % self.cell.shape[1])
            before = torch.where(again.any(1), self.exposure_s[rows, slot], 0.0)
            self.cell[rows, slot] = where
            self.spectra[rows, slot] = torch.as_tensor(as_array(observation["spectrum"]), dtype=torch.float32)[rows]
            self.exposure_s[rows, slot] = before + torch.as_tensor(exposure_s, dtype=torch.float32)[rows]
            self._next[rows] += (~again.any(1)).long()
        return new

    def _cells(self, probe: Array) -> Array:
        """(B,) cell y·W + x that the places (B, 2) lie in."""
        height, width = self.grid
        x, y = (np.floor(probe * (width, height)).astype(np.int64)).T
        cell: Array = y.clip(0, height - 1) * width + x.clip(0, width - 1)
        return cell
