"""Structured Gaussian process: the value follows brightness and edges of the image, and what is left over the place.

For those who know what the physics should depend on. The mean is linear in the intensity, its local mean and its
steepness; its coefficients are integrated out, so that few measurements do not fix them too surely. Where the law is
wrong (the rarest phase is no brighter than vacuum, say) it promises nothing at the best places, and expected
improvement would climb the law's own plateau for ever; so a search that gets nowhere also looks where least is known.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from agents.engine.acquisition import Belief, ExpectedImprovement, MaximumVariance
from agents.engine.deep_kernel import Cells, KernelPlan
from agents.engine.field_model import FieldModel, Training
from agents.engine.patch_features import intensity_and_gradient
from agents.engine.search_field import Scene
from agents.engine.search_policy import SearchPolicy, SearchSettings
from agents.policy import Face
from stem_gym.core.errors import PolicyError

_TERMS = 4  # intensity, its local mean, its steepness, and the local mean squared


class Settings(SearchSettings):
    """What can be chosen."""

    blur: int = Field(3, ge=1, le=31)
    """pixels over which intensity is averaged before its gradient is taken; odd, or one more is taken"""
    robust: bool = True
    """give measurements that do not belong more noise, so that a spike does not draw the search"""
    patience: int = Field(8, ge=1)
    """measurements that may pass without a best that is better by more than noise; from then on expected improvement
    chooses every second place, and the largest deviation the others"""
    training: Training = Training()
    """how much is learned after each measurement"""


class StructuredGP(SearchPolicy):
    """Believes in a linear law of the image plus a smooth rest."""

    name = "structured_gp"
    Settings = Settings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        side = min(self.field.height, self.field.width)
        if settings.blur >= side:
            raise PolicyError(
                f"blur must be less than the image's shorter side of {side} pixels; given {settings.blur}."
            )
        rate = settings.training.learning_rate
        grid = (self.field.height, self.field.width)
        plan = KernelPlan(basis=_TERMS, members=1, learning_rate=rate, robust=settings.robust, grid=grid)
        self.model = FieldModel(plan, settings.training, self.streams, self._describe)
        self._noise = torch.zeros(face.rows)  # of a measurement, as last believed
        self._best = torch.full((face.rows,), -torch.inf)  # that was better than the one before by more than noise
        self._best_at = torch.zeros(face.rows, dtype=torch.int64)  # measurements when it was found
        self._wanted = torch.zeros(face.rows, dtype=torch.int64)
        self._idle = torch.zeros(face.rows, dtype=torch.int64)  # measurements since

    def notice(self, scene: Scene) -> None:
        count = scene.measured.sum(dim=1)
        best = torch.where(scene.measured, scene.value, -torch.inf).amax(dim=1)
        risen = (best > self._best + self._noise) | (scene.wanted != self._wanted)
        self._best = torch.where(risen, best, self._best)
        self._best_at = torch.where(risen, count, self._best_at)
        self._wanted, self._idle = scene.wanted, count - self._best_at

    def predict(self, scene: Scene, rows: Tensor) -> Belief:
        belief = self.model.believe(scene.image, scene.value, scene.measured, scene.wanted, rows)
        self._noise[rows] = belief.noise
        return belief

    def forget(self, rows: Tensor) -> None:
        self.model.forget(rows)
        self._noise[rows], self._best[rows], self._best_at[rows] = 0.0, -torch.inf, 0

    def _scores(self, seeding: Tensor) -> Tensor:
        score, over = super()._scores(seeding), self._idle - self.settings.patience
        looks = (over >= 0) & (over % 2 == 0) & ~seeding
        if self._belief is not None and isinstance(self.acquisition, ExpectedImprovement):
            score[looks] = MaximumVariance().score(self._belief, None)[looks[~seeding]].double()
        return score

    def _describe(self, image: Tensor) -> Cells:
        columns = intensity_and_gradient(image, self.settings.blur)
        bent = (columns[..., 1:2].square() - 1.0) / 2.0
        return Cells(self.field.places().expand(len(image), -1, -1), basis=torch.cat((columns, bent), dim=2))


POLICY = StructuredGP
