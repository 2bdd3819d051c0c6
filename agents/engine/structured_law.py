"""Structured Gaussian processes: a law with uncertain parameters plus a smooth process for what the law leaves over.

Ziatdinov et al., arXiv 2112.06649. Parameters of the law, amplitude and length scale are particles from their priors,
weighed by the exact marginal likelihood of the measurements; values are in units of the noise, which is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stem_gym.core.experiments import History, Protocol
from stem_gym.surrogates.information import evened
from stem_gym.surrogates.referee import prior_particles

_AMPLITUDE, _AMPLITUDE_SPREAD = 3.0, 0.7  # of the process, in deviations of the noise; log-normal
_LENGTH, _LENGTH_SPREAD = 0.7, 0.5  # in coordinates from −1 to 1; log-normal
_JITTER = 1e-4


class StructuredLaws:
    """Every law of a protocol as a structured process, for B rows."""

    def __init__(self, protocol: Protocol, particles: int, kept: int) -> None:
        self.protocol, self.kept = protocol, kept
        self._laws, z = prior_particles(protocol.experiment, particles, extra=2)  # (L, N, P + 2)
        self._z = z[..., :-2]
        self._amplitude = _AMPLITUDE * torch.exp(_AMPLITUDE_SPREAD * z[..., -2])  # (L, N)
        self._length = _LENGTH * torch.exp(_LENGTH_SPREAD * z[..., -1])
        self.count = len(self._laws)

    def variance(self, law: int, history: History, design: Tensor) -> Tensor:
        """Predictive variance (B, E) of a law's process for experiments (E, D), without noise."""
        noise = self.protocol.experiment.noise
        there = history.done.float()
        x, other = self._coordinates(history.design), self._coordinates(design)
        rest = (evened(history.value, noise).unsqueeze(1) - self._mean(law, history.design)) * there.unsqueeze(1)
        kernel = self._kernel(law, x, x)  # (B, N, T, T)
        pair = there.unsqueeze(2) * there.unsqueeze(1)
        own = torch.where(history.done, history.noise_factor.square(), torch.ones_like(there)) + _JITTER
        root = torch.linalg.cholesky(kernel * pair.unsqueeze(1) + torch.diag_embed(own).unsqueeze(1))
        half = torch.linalg.solve_triangular(root, rest.unsqueeze(3), upper=False).squeeze(3)
        log = -0.5 * half.square().sum(2) - (root.diagonal(dim1=2, dim2=3).log() * there.unsqueeze(1)).sum(2)
        weight, index = torch.softmax(log, dim=1).topk(self.kept, dim=1)  # (B, M)
        weight = weight / weight.sum(1, keepdim=True)
        rows = torch.arange(len(x)).unsqueeze(1)
        cross = self._kernel(law, x, other.expand(len(x), -1, -1), index) * there[:, None, :, None]  # (B, M, T, E)
        solved = torch.linalg.solve_triangular(root[rows, index], cross, upper=False)
        variance = self._amplitude[law][index].square().unsqueeze(2) - solved.square().sum(2)
        mean = self._mean(law, design.expand(len(x), -1, -1), index)
        mean = mean + (solved * half[rows, index].unsqueeze(3)).sum(2)
        centre = (weight.unsqueeze(2) * mean).sum(1, keepdim=True)
        return (weight.unsqueeze(2) * (variance.clamp(min=0.0) + (mean - centre).square())).sum(1)

    def _mean(self, law: int, design: Tensor, index: Tensor | None = None) -> Tensor:
        """What the law says (B, N, T) of experiments (B, T, D), of all particles or those of an index (B, M)."""
        z = self._z[law].unsqueeze(0) if index is None else self._z[law][index]
        bound = self._laws[law]
        said = bound.mean(z[..., : len(bound.parameters)].unsqueeze(2), design.unsqueeze(1))
        return evened(said, self.protocol.experiment.noise)

    def _kernel(self, law: int, x: Tensor, other: Tensor, index: Tensor | None = None) -> Tensor:
        """Covariances (B, N, n, m) of points (B, n, D) and (B, m, D): squared exponential."""
        amplitude, length = (
            part[law].unsqueeze(0) if index is None else part[law][index] for part in (self._amplitude, self._length)
        )
        square = (x.unsqueeze(2) - other.unsqueeze(1)).square().sum(3).unsqueeze(1)
        return amplitude.square()[..., None, None] * torch.exp(-0.5 * square / length.square()[..., None, None])

    def _coordinates(self, design: Tensor) -> Tensor:
        return torch.stack([axis.coordinate(design[..., i]) for i, axis in enumerate(self.protocol.axes)], dim=-1)
