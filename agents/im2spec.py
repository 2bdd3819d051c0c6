"""im2spec: predicts whole spectra of all cells, and measures where what is wanted of them promises most.

Other searching agents learn a number from patches, and start anew when another number is wanted. This one learns the
spectra (`stem_gym.surrogates.im2spec`) and reads what is wanted off the predicted ones, so that a scalarizer that
changes in mid-episode needs neither another measurement nor another fit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor

from agents.engine.acquisition import Belief
from agents.engine.search_field import Scene
from agents.engine.search_policy import SearchPolicy, SearchSettings
from agents.engine.spectrum_model import SpectrumModel
from agents.engine.surprises import Surprises
from agents.policy import Array, Face, Observation


class Settings(SearchSettings):
    """What can be chosen."""

    memory: int = Field(256, ge=8, le=1024)
    """spectra that are kept of each row; beyond, the oldest is forgotten"""


class Im2Spec(SearchPolicy):
    """A spectrum for every cell, and from it the belief in what is wanted now."""

    name = "im2spec"
    Settings = Settings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        self.model = SpectrumModel(face, self.name, settings.memory)
        self.surprises = Surprises(face.rows, self.field.cells)
        times = self.field.exposures_s
        self._exposure_s = np.full(face.rows, times[self.field.exposure(settings.exposure_share)])
        self._observation: Observation = {}

    def act(self, observation: Observation) -> Array:
        self._observation = observation
        self.model.learn(observation, self._exposure_s)
        return super().act(observation)

    def predict(self, scene: Scene, rows: Tensor) -> Belief:
        told = self.model.wanted(self._observation)
        mean, deviation = told.mean[rows], told.deviation[rows]
        belief = Belief(
            mean=mean,
            deviation=deviation,
            noise=told.noise[rows],
            best=mean.masked_fill(~scene.measured, -np.inf).amax(1),
            lowest=mean.masked_fill(~scene.measured, np.inf).amin(1),
            embedding=self.model.features[rows],
        )
        return self.surprises.calibrated(belief, scene, rows)

    def forget(self, rows: Tensor) -> None:
        self.model.forget(rows.numpy())
        self.surprises.forget(rows)


POLICY = Im2Spec
