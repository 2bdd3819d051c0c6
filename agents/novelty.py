"""Novelty: look for spectra unlike those seen, whatever the value; how unlike is foretold over the patches.

Every spectrum's novelty is its distance to the nearest others measured in the episode, in shape alone: spectra are
scaled to one length after a square root, which makes counting noise alike in all channels (the Hellinger distance).
A deep kernel model learns novelty from what surrounds a cell. Where something new was found, the next ones like it are
no longer new, and the search moves on.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from agents.engine.acquisition import Belief, UpperConfidenceBound
from agents.engine.patch_model import PatchSettings, patch_model
from agents.engine.search_field import Scene
from agents.engine.search_policy import SearchPolicy
from agents.policy import Face

_SPARE = 8  # spectra beyond the task's measurements that are kept


class Settings(PatchSettings):
    """What can be chosen: all that `dkl` takes, and what novelty is."""

    neighbours: int = Field(2, ge=1, le=20)
    """nearest spectra whose mean distance is a spectrum's novelty"""


class Novelty(SearchPolicy):
    """Believes in the distance to what was seen. `Decision.mean` is that distance, 0 … √2."""

    name = "novelty"
    Settings = Settings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        self.model = patch_model(self.field, settings, self.streams)
        if settings.acquisition is None:
            self.acquisition = UpperConfidenceBound()
        slots = min(self.field.measurements, self.field.cells) + _SPARE
        channels = int(face.observation_space["spectrum"].shape[0])  # type: ignore[index]
        self._spectra = torch.zeros(face.rows, slots, channels)
        self._cell = torch.full((face.rows, slots), -1)  # −1: an empty slot
        self._next = torch.zeros(face.rows, dtype=torch.int64)

    def notice(self, scene: Scene) -> None:
        """Keep the last spectrum of every row; of a cell measured again the newer one, of too many the newest."""
        rows = torch.arange(len(scene.image))
        again = self._cell == scene.last_cell[:, None]
        slot = torch.where(again.any(dim=1), again.to(torch.uint8).argmax(dim=1), self._next % self._cell.shape[1])
        seen = scene.measured[rows, scene.last_cell]
        rows, slot = rows[seen], slot[seen]
        self._next[rows] += (~again.any(dim=1)[seen]).long()
        self._spectra[rows, slot] = shape_of(scene.spectrum[seen])
        self._cell[rows, slot] = scene.last_cell[seen]

    def seeding(self, scene: Scene) -> Tensor:
        return (self._cell >= 0).sum(dim=1) < max(self.settings.first_places, self.settings.neighbours + 1)

    def predict(self, scene: Scene, rows: Tensor) -> Belief:
        kept, cell = self._cell[rows] >= 0, self._cell[rows]
        found = novelty(self._spectra[rows], kept, self.settings.neighbours)
        value, known = torch.zeros(scene.value.shape), torch.zeros_like(scene.measured)
        row, slot = kept.nonzero(as_tuple=True)
        value[row, cell[row, slot]], known[row, cell[row, slot]] = found[row, slot], True
        return self.model.believe(scene.image, value, known, torch.zeros_like(scene.wanted), rows)

    def forget(self, rows: Tensor) -> None:
        self.model.forget(rows)
        self._cell[rows], self._next[rows] = -1, 0


def shape_of(spectrum: Tensor) -> Tensor:
    """Spectra (n, S) after a square root, of length 1; one without a count is 0."""
    root = spectrum.clamp(min=0.0).sqrt()
    return root / root.norm(dim=1, keepdim=True).clamp(min=1e-12)


def novelty(shapes: Tensor, kept: Tensor, neighbours: int) -> Tensor:
    """Mean distance (n, M) of each shape (n, M, S) to its nearest `neighbours` others among the `kept` (n, M)."""
    away = torch.cdist(shapes, shapes, compute_mode="donot_use_mm_for_euclid_dist")
    alone = torch.eye(shapes.shape[1], dtype=torch.bool) | ~kept[:, None]
    return away.masked_fill(alone, torch.inf).topk(neighbours, dim=2, largest=False).values.mean(dim=2)


POLICY = Novelty
