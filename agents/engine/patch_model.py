"""The deep kernel model over the patches of a field's image, and the settings of the agents that use it."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from agents.engine.deep_kernel import Cells, KernelPlan
from agents.engine.field_model import FieldModel, Training
from agents.engine.patch_features import check_side, patches_of, principal_features
from agents.engine.search_field import SearchField
from agents.engine.search_policy import SearchSettings
from stem_gym.core.streams import Streams


class PatchSettings(SearchSettings):
    """What can be chosen of an agent that reads patches."""

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


def patch_model(field: SearchField, settings: PatchSettings, streams: Streams) -> FieldModel:
    """The model of the fields of all rows. Raises PolicyError for a patch that is larger than the image."""
    check_side(settings.patch, field.height, field.width)

    def describe(image: Tensor) -> Cells:
        patches = patches_of(image, settings.patch)
        return Cells(
            places=field.places().expand(len(image), -1, -1),
            patches=principal_features(patches, settings.patch_features),
        )

    plan = KernelPlan(
        patch_features=min(settings.patch_features, settings.patch**2),
        hidden=settings.hidden,
        embedding=settings.embedding,
        members=settings.members,
        learning_rate=settings.training.learning_rate,
        robust=settings.robust,
        grid=(field.height, field.width),
    )
    return FieldModel(plan, settings.training, streams, describe)
