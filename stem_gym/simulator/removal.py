"""Atoms that the beam takes out of the specimen: each electron per area removes with a given cross section."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field, field_validator
from torch import Tensor

from stem_gym.core.config import Config
from stem_gym.core.elements import atomic_number_of
from stem_gym.core.errors import ConfigError
from stem_gym.core.streams import Streams
from stem_gym.core.units import ANG2_PER_BARN
from stem_gym.simulator.specimens import Specimen


class RemovalModel(Config):
    """A first-order loss: P(survives) = exp(−cross section × dose)."""

    element: str
    """symbol of the atoms that can be lost"""
    cross_section_barn: float = Field(gt=0, le=1e9)
    """removal cross section; the dose that leaves 1/e of the atoms is 1e8 / this, in e/Å²"""
    atoms_max: int = Field(8, ge=1, le=256)
    """how many such atoms a row can have"""

    @field_validator("element")
    @classmethod
    def _known(cls, element: str) -> str:
        atomic_number_of(element)
        return element


@dataclass(frozen=True)
class Fragile:
    """The atoms of each row that can be lost."""

    site: Tensor  # (B, V) int64, index into the specimen's atoms
    there: Tensor  # (B, V) bool, false for padding


def fragile_atoms(specimen: Specimen, model: RemovalModel | None) -> Fragile:
    """Where the atoms of the model's element are; V = 0 without a model. Raises ConfigError for too many."""
    rows = specimen.atomic_number.shape[0]
    if model is None:
        none = specimen.atomic_number.new_zeros((rows, 0))
        return Fragile(none, none.bool())
    wanted = specimen.present & (specimen.atomic_number == atomic_number_of(model.element))
    most = int(wanted.sum(1).max()) if rows else 0
    if most > model.atoms_max:
        raise ConfigError(
            f"A specimen has {most} atoms of {model.element} that the beam can remove; removal.atoms_max is "
            f"{model.atoms_max}. Raise it (to at most 256) or use fewer."
        )
    there, site = torch.topk(wanted.to(torch.float32), min(model.atoms_max, wanted.shape[1]), dim=1)
    return Fragile(site, there > 0.5)


def lost_atoms(model: RemovalModel, dose_e_per_ang2: Tensor, streams: Streams, rows: Tensor) -> Tensor:
    """Which of the fragile atoms (n, V) the dose (n, V) takes away: bool."""
    survives = torch.exp(-model.cross_section_barn * ANG2_PER_BARN * dose_e_per_ang2)
    return streams.uniform(rows, tuple(dose_e_per_ang2.shape[1:])) > survives
