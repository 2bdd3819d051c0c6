"""Deep kernel learning: a small network reads what surrounds a cell, a Gaussian process learns what it means.

The structure that is seen in the image foretells the spectrum; the network and the process learn how from the few
spectra that were measured, and say how sure they are. See agents/engine/deep_kernel.py for the model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agents.engine.acquisition import Belief
from agents.engine.patch_model import PatchSettings, patch_model
from agents.engine.search_field import Scene
from agents.engine.search_policy import SearchPolicy
from agents.policy import Face


class Settings(PatchSettings):
    """What can be chosen."""


class DeepKernelAgent(SearchPolicy):
    """Believes what the deep kernel model of each field says."""

    name = "dkl"
    Settings = Settings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        self.model = patch_model(self.field, settings, self.streams)

    def predict(self, scene: Scene, rows: Tensor) -> Belief:
        return self.model.believe(scene.image, scene.value, scene.measured, scene.wanted, rows)

    def forget(self, rows: Tensor) -> None:
        self.model.forget(rows)


POLICY = DeepKernelAgent
