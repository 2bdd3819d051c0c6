"""The law "none of these": any smooth response to the design, as a Gaussian process beside the laws of a set.

Values in units of the noise (`information.evened`) have noise of one deviation, so that the marginal likelihood of a
history is closed. The process lies around what the set's priors expect of each design on average, with their spread,
and is averaged over a few length scales and amplitudes. Sites are taken as fresh; measurements at one site share its
factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stem_gym.core.errors import ConfigError
from stem_gym.core.experiments import Experiment, History
from stem_gym.simulator.laws import bind_set
from stem_gym.surrogates.information import evened, unevened

_LENGTHS = (0.35, 0.7, 1.4)  # of the coordinates from −1 to 1
_AMPLITUDES = (0.5, 1.0)  # in units of the spread of the priors
_SAMPLES = 512  # of each law's prior
_HALF_LOG_TAU = 0.5 * math.log(2.0 * math.pi)
_JITTER = 1e-5


@dataclass(frozen=True)
class _Fit:
    """Solved histories of H hyperparameters in B rows."""

    log_evidence: Tensor  # (H, B) of values in units of the noise
    root: Tensor  # (H, B, T, T) Cholesky factors
    solved: Tensor  # (H, B, T)


class GaussianLaw:
    """Evidence and forecasts of "none of these", which has the probability `prior` before anything was measured."""

    def __init__(self, experiment: Experiment, prior: float = 0.2) -> None:
        if not 0.0 < prior < 1.0:
            raise ConfigError(f"The prior of 'none' must lie between 0 and 1; given {prior:g}.")
        self.experiment, self.prior = experiment, prior
        laws = experiment.law_set
        self._axes = laws.axes
        engine = torch.quasirandom.SobolEngine(8, scramble=True, seed=1)
        z = torch.special.ndtri(engine.draw(_SAMPLES, dtype=torch.float64).clamp(1e-6, 1.0 - 1e-6)).float()
        self._prior_values = [(law, law.values(z[:, None, : len(law.parameters)])) for law in bind_set(laws).values()]
        length, amplitude = torch.meshgrid(torch.tensor(_LENGTHS), torch.tensor(_AMPLITUDES), indexing="ij")
        self._length, self._amplitude = length.flatten(), amplitude.flatten()  # (H,)
        sites, noise = experiment.sites, experiment.noise
        per_factor = 1.0 / noise.absolute if laws.logarithmic else 1.0 / max(noise.relative, 1e-3)
        self._shared = (sites.factor * per_factor) ** 2 if sites else 0.0

    def log_evidence(self, history: History, used: Tensor) -> Tensor:
        """Logarithm (B,) of the probability density of the first `used` (B,) measurements."""
        fit = self._fit(history, used)
        there = self._there(history, used)
        noise = self.experiment.noise
        slope = -0.5 * torch.log(noise.absolute**2 + (noise.relative * history.value).square())  # of `evened`
        mean = torch.logsumexp(fit.log_evidence, dim=0) - math.log(len(self._length))
        return mean + (slope * there).sum(1)

    def forecast(self, history: History, used: Tensor, design: Tensor, draws: int) -> Tensor:
        """Values (B, S, E) that are equally likely, of experiments (E, D) at fresh sites."""
        fit = self._fit(history, used)
        there = self._there(history, used)
        x, other = self._coordinates(history.design), self._coordinates(design)
        mean, spread = self._expected(design)
        _, spread_seen = self._expected(history.design)
        cross = self._kernel(x, other.expand(len(x), -1, -1), spread_seen, spread.expand(len(x), -1))
        cross = cross * there.unsqueeze(2)  # (H, B, T, E)
        half = torch.linalg.solve_triangular(fit.root, cross, upper=False)
        variance = ((self._amplitude[:, None, None] * spread).square() + self._shared - half.square().sum(2)).clamp(
            1e-6
        )
        at = mean + torch.einsum("hbte,hbt->hbe", cross, fit.solved)
        weight = torch.softmax(fit.log_evidence, dim=0).unsqueeze(2)
        centre = (weight * at).sum(0)
        whole = (weight * (variance + (at - centre).square())).sum(0)
        quantile = torch.special.ndtri((torch.arange(draws, dtype=torch.float64) + 0.5) / draws).float()
        even = centre.unsqueeze(1) + quantile[:, None] * whole.sqrt().unsqueeze(1)
        return unevened(even, self.experiment.noise)

    def _fit(self, history: History, used: Tensor) -> _Fit:
        there = self._there(history, used)
        x = self._coordinates(history.design)
        mean, spread = self._expected(history.design)
        rest = (evened(history.value, self.experiment.noise) - mean) * there
        kernel = self._kernel(x, x, spread, spread)
        if self._shared > 0.0:
            same = (history.site.unsqueeze(2) == history.site.unsqueeze(1)).float()
            free = ~history.calibrated
            kernel = kernel + self._shared * same * (free.unsqueeze(2) & free.unsqueeze(1))
        pair = there.unsqueeze(2) * there.unsqueeze(1)
        own = torch.where(there > 0.0, history.noise_factor.square(), torch.ones_like(rest))
        covariance = kernel * pair + torch.diag_embed(own + _JITTER)
        root = torch.linalg.cholesky(covariance.double()).float()
        solved = torch.cholesky_solve(rest.expand(len(root), -1, -1).unsqueeze(3), root).squeeze(3)
        log = -0.5 * (rest * solved).sum(2) - (root.diagonal(dim1=2, dim2=3).log() * there).sum(2)
        return _Fit(log - _HALF_LOG_TAU * there.sum(1), root, solved)

    def _there(self, history: History, used: Tensor) -> Tensor:
        number = torch.arange(history.done.shape[1]).unsqueeze(0)
        return (history.done & (number < used.unsqueeze(1))).float()

    def _coordinates(self, design: Tensor) -> Tensor:
        return torch.stack([axis.coordinate(design[..., i]) for i, axis in enumerate(self._axes)], dim=-1)

    def _expected(self, design: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread (…) of the priors' predictions for experiments (…, D), in units of the noise."""
        flat = design.reshape(-1, design.shape[-1])
        said = [evened(law.of(values, flat), self.experiment.noise) for law, values in self._prior_values]
        every = torch.cat(said)  # (L S, n)
        shape = design.shape[:-1]
        return every.mean(0).reshape(shape), every.std(0).clamp(min=1.0).reshape(shape)

    def _kernel(self, x: Tensor, other: Tensor, spread: Tensor, other_spread: Tensor) -> Tensor:
        """Covariances (H, B, n, m) of points (B, n, D) and (B, m, D): squared exponential, with the priors' spread."""
        square = (x.unsqueeze(2) - other.unsqueeze(1)).square().sum(3)
        bell = torch.exp(-0.5 * square / self._length[:, None, None, None].square())
        scale = spread.unsqueeze(2) * other_spread.unsqueeze(1)
        return self._amplitude[:, None, None, None].square() * scale * bell
