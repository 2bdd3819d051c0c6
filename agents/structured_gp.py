"""Structured Gaussian process: the value follows brightness and edges of the image, and what is left over the place.

For those who know what the physics should depend on. The mean is linear in the intensity, its local mean and its
steepness; its coefficients are integrated out, so that few measurements do not fix them too surely.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from agents.engine.acquisition import Belief
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

    def predict(self, scene: Scene, rows: Tensor) -> Belief:
        return self.model.believe(scene.image, scene.value, scene.measured, scene.wanted, rows)

    def forget(self, rows: Tensor) -> None:
        self.model.forget(rows)

    def _describe(self, image: Tensor) -> Cells:
        columns = intensity_and_gradient(image, self.settings.blur)
        bent = (columns[..., 1:2].square() - 1.0) / 2.0
        return Cells(self.field.places().expand(len(image), -1, -1), basis=torch.cat((columns, bent), dim=2))


POLICY = StructuredGP
