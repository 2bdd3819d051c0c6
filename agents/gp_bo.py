"""Bayesian optimisation over the place alone, by BoTorch's SingleTaskGP: what the field uses where no image helps.

It looks at where spectra were measured and at nothing else. Needs the extra "agents". The hyperparameters are found
for one field at a time: BoTorch's optimiser would otherwise end the search of one row when its neighbours end theirs,
and a row's decisions would hang on them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from agents.engine.acquisition import Belief
from agents.engine.search_field import Scene
from agents.engine.search_policy import SearchPolicy, SearchSettings
from agents.policy import Face
from stem_gym.core.errors import missing_extra

_CHUNK = 512  # candidates at once: BoTorch makes their whole covariance


class Settings(SearchSettings):
    """What can be chosen."""

    refit_every: int = Field(5, ge=1)
    """measurements from one search for hyperparameters to the next"""


class PlaceGP(SearchPolicy):
    """Believes that what is near is alike."""

    name = "gp_bo"
    Settings = Settings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        self._gp = _botorch()
        self._places = self.field.places().double()
        self._fitted: dict[int, tuple[int, int, dict[str, Any]]] = {}  # row: measurements, scalarizer, parameters

    def predict(self, scene: Scene, rows: Tensor) -> Belief:
        told = []
        for i, row in enumerate(rows.tolist()):  # one at a time; why is said at the top
            seen = scene.measured[i]
            told.append(self._posterior(self._places[seen], scene.value[i, seen].double(), row, int(scene.wanted[i])))
        means, deviations, noises = zip(*told, strict=True)
        mean, measured = torch.stack(means).float(), scene.measured
        return Belief(
            mean=mean,
            deviation=torch.stack(deviations).float(),
            noise=torch.stack(noises).float(),
            best=torch.where(measured, mean, -torch.inf).amax(dim=1),
            lowest=torch.where(measured, mean, torch.inf).amin(dim=1),
        )

    def forget(self, rows: Tensor) -> None:
        for row in rows.tolist():
            self._fitted.pop(row, None)

    def _posterior(self, places: Tensor, value: Tensor, row: int, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and deviation (C,) without noise, and the noise (), of one field in the value's unit."""
        unit = self._gp.Standardize(m=1)
        model = self._gp.SingleTaskGP(places, value[:, None], outcome_transform=unit)
        count, before, state = self._fitted.get(row, (-1, -1, {}))
        if count < 0 or before != wanted or not count <= len(value) < count + self.settings.refit_every:
            with torch.random.fork_rng(devices=[]):  # a search that fails is tried again from random parameters
                torch.manual_seed(0)
                self._gp.fit_gpytorch_mll(self._gp.ExactMarginalLogLikelihood(model.likelihood, model))
            learned = {name: part.state_dict() for name, part in _learned_parts(model).items()}
            self._fitted[row] = (len(value), wanted, learned)
        else:
            for name, part in _learned_parts(model).items():
                part.load_state_dict(state[name])
        model.eval()
        with torch.no_grad():
            parts = [model.posterior(some) for some in self._places.split(_CHUNK)]
            mean = torch.cat([part.mean[:, 0] for part in parts])
            deviation = torch.cat([part.variance[:, 0] for part in parts]).clamp(min=1e-12).sqrt()
        noise = model.likelihood.noise.detach().sqrt()[0] * unit.stdvs.reshape(())
        return mean, deviation, noise


def _learned_parts(model: Any) -> dict[str, Any]:
    """What hyperparameters belong to; the unit of the values is that of the values at hand."""
    return {"kernel": model.covar_module, "mean": model.mean_module, "likelihood": model.likelihood}


def _botorch() -> Any:
    """The names of BoTorch and GPyTorch that are used. Raises MissingExtraError without the extra."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # their own use of torch
            return _imported()
    except ImportError as error:
        raise missing_extra("The agent 'gp_bo'", "agents") from error


def _imported() -> Any:
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from gpytorch.mlls import ExactMarginalLogLikelihood

    names = (fit_gpytorch_mll, SingleTaskGP, Standardize, ExactMarginalLogLikelihood)
    return type("BoTorch", (), {name.__name__: staticmethod(name) for name in names})


POLICY = PlaceGP
