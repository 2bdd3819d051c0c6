"""Deep kernel learning: a small network reads what surrounds a cell, a Gaussian process learns what it means.

The structure that is seen in the image foretells the spectrum; the network and the process learn how from the few
spectra that were measured, and say how sure they are. See agents/engine/deep_kernel.py for the model.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from agents.engine.acquisition import Belief
from agents.engine.deep_kernel import Cells, KernelPlan
from agents.engine.field_model import FieldModel, Training
from agents.engine.patch_features import check_side, patches_of, principal_features
from agents.engine.search_field import Scene
from agents.engine.search_policy import SearchPolicy, SearchSettings
from agents.policy import Face


class Settings(SearchSettings):
    """What can be chosen."""

    patch: int = Field(7, ge=2, le=32)
    """side of the patch around a cell, in pixels of the image"""
    patch_features: int = Field(6, ge=1, le=64)
    """principal components of the patches that the network reads"""
    hidden: int = Field(16, ge=1, le=256)
    """hidden units of the network"""
    embedding: int = Field(2, ge=1, le=8)
    """numbers that the network makes of a patch"""
    members: int = Field(3, ge=1, le=10)
    """networks, each of which learns without a part of the measurements; that part tells how far to trust it"""
    robust: bool = True
    """give measurements that do not belong more noise, so that a spike does not draw the search"""
    training: Training = Training()
    """how much is learned after each measurement"""


class DeepKernelAgent(SearchPolicy):
    """Believes what the deep kernel model of each field says."""

    name = "dkl"
    Settings = Settings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        check_side(settings.patch, self.field.height, self.field.width)
        plan = plan_of(settings)
        self.model = FieldModel(plan, settings.training, self.streams, self._describe)

    def predict(self, scene: Scene, rows: Tensor) -> Belief:
        return self.model.believe(scene.image, scene.value, scene.measured, scene.wanted, rows)

    def forget(self, rows: Tensor) -> None:
        self.model.forget(rows)

    def _describe(self, image: Tensor) -> Cells:
        patches = patches_of(image, self.settings.patch)
        features = principal_features(patches, self.settings.patch_features)
        return Cells(self.field.places().expand(len(image), -1, -1), patches=features)


def plan_of(settings: Settings) -> KernelPlan:
    """The kernel that the settings ask for."""
    return KernelPlan(
        patch_features=min(settings.patch_features, settings.patch**2),
        hidden=settings.hidden,
        embedding=settings.embedding,
        members=settings.members,
        learning_rate=settings.training.learning_rate,
        robust=settings.robust,
    )


POLICY = DeepKernelAgent
