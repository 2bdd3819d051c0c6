"""The spectrum surrogate in running episodes: what rows were shown, what follows for all cells, what it is worth."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.engine.spectra_seen import SpectraSeen
from agents.policy import Array, Face, Observation, as_array
from stem_gym.core.config import parse
from stem_gym.core.errors import PolicyError
from stem_gym.core.scalarizers import AnyScalarizer, NamedScalarizer
from stem_gym.surrogates.im2spec import Im2Spec, SpectrumPosterior

__all__ = ["SpectrumModel", "Told"]


@dataclass(frozen=True)
class Told:
    """What is wanted, of all cells of B rows, in the unit of the scalarizer."""

    mean: Tensor  # (B, H·W)
    deviation: Tensor  # (B, H·W) without counting noise
    noise: Tensor  # (B,) deviation that counting noise adds to a measurement


class SpectrumModel:
    """Spectra of all cells of B rows; fitted anew when a row was shown a spectrum, and only then."""

    def __init__(self, face: Face, agent: str, memory: int) -> None:
        """`memory` spectra are kept for each row. Raises PolicyError where the task has no spectra to learn."""
        self.grid, self.measures = _grid_of(face, agent), _measures_of(face, agent)
        self.surrogate = Im2Spec.load()
        (channels,) = face.observation_space["spectrum"].shape  # type: ignore[index]
        cells = self.grid[0] * self.grid[1]
        self.seen = SpectraSeen(face.rows, self.grid, channels, memory)
        self.features = torch.zeros(face.rows, cells, int(self.surrogate.settings["features"]))
        self.posterior: SpectrumPosterior | None = None
        self.fits = 0
        self._fitted: Tensor = torch.zeros(0, dtype=torch.int64)  # rows of the posterior
        self._image: Array | None = None

    def forget(self, rows: Array) -> None:
        """Begin new episodes in these rows."""
        self.seen.forget(rows)

    def learn(self, observation: Observation, exposure_s: Array) -> None:
        """Take in the last spectra, `exposure_s` (B,) long, and fit where there are new ones."""
        new = self.seen.take_in(observation, exposure_s)
        image = as_array(observation["image"])
        changed = self._changed(image)
        if len(changed):
            self._image = image.copy()
            self.features[changed] = self.surrogate.encode(torch.as_tensor(image[changed]).float())
        held = (self.seen.count > 0).nonzero().flatten()
        if new.any() or len(changed) or not torch.equal(held, self._fitted):
            self._fit(held)

    def wanted(self, observation: Observation) -> Told:
        """What each row wants now. Rows without a spectrum know nothing: mean 0, deviation 1 everywhere.

        Where the observation averages channels, a sum over channels is that of the averaged ones.
        """
        rows, cells = self.features.shape[:2]
        told = Told(torch.zeros(rows, cells), torch.ones(rows, cells), torch.zeros(rows))
        if self.posterior is None:
            return told
        choice = as_array(observation["scalarizer"]).argmax(axis=1)[self._fitted.numpy()]
        axis = self._axis(observation)
        for number in np.unique(choice).tolist():
            part = torch.as_tensor(np.flatnonzero(choice == number))
            self.measures[number].check(axis)
            posterior, into = self.posterior.rows(part), self._fitted[part]
            value = functools.partial(
                self.measures[number].__call__, axis=axis, reference=posterior.modes.centre[:, None]
            )
            told.mean[into], told.deviation[into] = posterior.scalarized(value)
            told.noise[into] = posterior.noise_of(value)
        return told

    def _fit(self, rows: Tensor) -> None:
        self._fitted = rows
        if not len(rows):
            self.posterior = None
            return
        most = int((self.seen.exposure_s[rows] > 0).any(0).nonzero().max()) + 1  # slots beyond are empty in every row
        self.fits += 1
        self.posterior = self.surrogate.fit(
            self.features[rows],
            self.grid,
            self.seen.cell[rows, :most],
            self.seen.spectra[rows, :most],
            self.seen.exposure_s[rows, :most],
        )

    def _changed(self, image: Array) -> Array:
        """Numbers of the rows whose image is another one."""
        if self._image is None:
            return np.arange(len(image))
        return np.flatnonzero((image != self._image).reshape(len(image), -1).any(axis=1))

    def _axis(self, observation: Observation) -> Tensor:
        """(S,) energies of the channels in eV; the detector's, and so the same in all rows."""
        first, last = as_array(observation["axis"])[0].tolist()
        return torch.linspace(first, last, self.seen.spectra.shape[2])


def _grid_of(face: Face, agent: str) -> tuple[int, int]:
    if face.task.get("kind") != "spectrum_search" or face.task.get("detector") == "diffraction":
        raise PolicyError(
            f"The agent {agent!r} learns spectra along an energy axis; {face.id} has none. It serves the spectrum "
            "search ids whose detector is eels or eds."
        )
    height, width = face.task["grid"]
    return int(height), int(width)


def _measures_of(face: Face, agent: str) -> list[AnyScalarizer]:
    """What can be wanted, in the order of the observation's `scalarizer`."""
    named: list[Any] = list(face.task["scalarizers"])
    return [
        parse(NamedScalarizer, given, f"{face.id}, scalarizers, for the agent {agent!r}").measure for given in named
    ]
