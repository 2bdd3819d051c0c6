"""Fits of a law to what was measured, in many worlds at once: how near can one law come to another?

Parameters are the standard normal numbers from which a law's priors make them, so that every one has the same scale and
the prior is a sum of squares. Levenberg and Marquardt's method (Marquardt, J. SIAM 11, 431, 1963) from several starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stem_gym.core.errors import DataError
from stem_gym.simulator.laws import BoundLaw

_CANDIDATES = 4096  # points of the prior of which the best are starts: no slope leads a threshold past an experiment
_STARTS, _FINALISTS = 6, 2
_HEATS, _STEPS = 6, 30  # steps of all starts; most steps of those that are then best
_CONVERGED = 1e-4  # part of the objective that a step must gain for another one
_DAMPING, _LOOSEN, _TIGHTEN = 1e-2, 0.3, 4.0
_LEAST_DAMPING, _MOST_DAMPING = 1e-9, 1e9


@dataclass(frozen=True)
class LawFit:
    """The best of a law in W worlds."""

    z: Tensor  # (W, P) standard normal numbers of the parameters
    chi2: Tensor  # (W,) a measurement
    log_evidence: Tensor  # (W,) Laplace's, but for what depends on the deviations alone


@dataclass(frozen=True)
class _Data:
    law: BoundLaw
    design: Tensor  # (E, D)
    value: Tensor  # (W, E)
    scale: Tensor  # (W, E) one over the standard deviation, times the root of how often an experiment counts

    def residual(self, z: Tensor) -> Tensor:
        """(W, S, E) of z (W, S, P)."""
        return (self.law.mean(z.unsqueeze(-2), self.design) - self.value.unsqueeze(1)) * self.scale.unsqueeze(1)

    def objective(self, z: Tensor) -> Tensor:
        """χ² + |z|², (W, S)."""
        return self.residual(z).square().sum(-1) + z.square().sum(-1)


def fit_law(law: BoundLaw, design: Tensor, value: Tensor, sd: Tensor, experiments: float) -> LawFit:
    """The parameters with the least χ² + |z|²: the most probable ones after some experiments.

    `design` (E, D) holds the experiments, the same in each world; `value` and `sd` (W, E) what they gave and its
    standard deviation. They count as `experiments` measurements that are spread evenly over them: as E where each was
    done once. Raises DataError for shapes that do not fit and for what is no value or deviation.
    """
    _check(design, value, sd, experiments)
    data = _Data(law, design.double(), value.double(), (experiments / len(design)) ** 0.5 / sd.double())
    z = _improved(data, _starts(data), _HEATS)
    z = _chosen(z, data.objective(z), _FINALISTS)
    z = _improved(data, z, _STEPS)
    z = _chosen(z, data.objective(z), 1)
    _, curvature = _slopes(data, z)
    log_evidence = -0.5 * (data.objective(z) + torch.linalg.slogdet(curvature).logabsdet)
    chi2 = data.residual(z).square().sum(-1) / experiments
    return LawFit(z.squeeze(1), chi2.squeeze(1), log_evidence.squeeze(1))


def _starts(data: _Data) -> Tensor:
    """The best points of the prior in each world, (W, S, P)."""
    engine = torch.quasirandom.SobolEngine(len(data.law.parameters), scramble=True, seed=0)
    z = torch.special.ndtri(engine.draw(_CANDIDATES, dtype=torch.float64).clamp(1e-4, 1.0 - 1e-4))  # (N, P)
    mean = data.law.mean(z.unsqueeze(1), data.design)  # (N, E)
    weight = data.scale.square()
    # Σ weight (mean − value)² over E, multiplied out: no tensor (W, N, E). What all points share is left out.
    square = weight @ mean.square().T - 2.0 * (weight * data.value) @ mean.T
    return z[(square + z.square().sum(1)).topk(_STARTS, dim=1, largest=False).indices]


def _improved(data: _Data, z: Tensor, steps: int) -> Tensor:
    """z (W, S, P) after some steps, fewer where none gains anything any more."""
    objective, damping = data.objective(z), torch.full_like(z[..., 0], _DAMPING)
    for _ in range(steps):
        gradient, curvature = _slopes(data, z)
        damped = curvature + torch.diag_embed(curvature.diagonal(dim1=-2, dim2=-1) * damping.unsqueeze(-1))
        proposed = z - torch.linalg.solve(damped, gradient)
        after = data.objective(proposed)
        better = after < objective  # not where it is NaN
        going = ~better & (damping < 1.0) | (better & (objective - after > _CONVERGED * (1.0 + objective)))
        z = torch.where(better.unsqueeze(-1), proposed, z)
        objective = torch.where(better, after, objective)
        damping = (damping * torch.where(better, _LOOSEN, _TIGHTEN)).clamp(_LEAST_DAMPING, _MOST_DAMPING)
        if not bool(going.any()):
            break
    return z


def _slopes(data: _Data, z: Tensor) -> tuple[Tensor, Tensor]:
    """Half of the objective's gradient (W, S, P) and of Gauss and Newton's curvature (W, S, P, P)."""
    z = z.detach().requires_grad_()
    residual = data.residual(z)
    # Jᵀu is linear in u: its slopes along u are the columns of J, one pass for each of few parameters, none for each
    # of many experiments.
    u = torch.zeros_like(residual, requires_grad=True)
    (pulled,) = torch.autograd.grad(residual, z, u, create_graph=True)  # (W, S, P)
    columns = [torch.autograd.grad(part.sum(), u, retain_graph=True)[0] for part in pulled.unbind(-1)]
    jacobian, z, residual = torch.stack(columns, dim=-1), z.detach(), residual.detach()  # (W, S, E, P)
    curvature = jacobian.transpose(-1, -2) @ jacobian + torch.eye(z.shape[-1], dtype=z.dtype)
    return (jacobian.transpose(-1, -2) @ residual.unsqueeze(-1)).squeeze(-1) + z, curvature


def _chosen(z: Tensor, objective: Tensor, count: int) -> Tensor:
    """The best `count` of z (W, S, P)."""
    best = objective.topk(count, dim=1, largest=False).indices
    return z.gather(1, best.unsqueeze(-1).expand(-1, -1, z.shape[-1]))


def _check(design: Tensor, value: Tensor, sd: Tensor, experiments: float) -> None:
    if design.dim() != 2 or value.dim() != 2 or value.shape != sd.shape or value.shape[1] != len(design):
        raise DataError(
            "A fit takes experiments (E, D), and values and deviations (W, E); given "
            f"{tuple(design.shape)}, {tuple(value.shape)} and {tuple(sd.shape)}."
        )
    if not experiments > 0.0:
        raise DataError(f"A fit takes a positive number of experiments; given {experiments:g}.")
    if not bool((torch.isfinite(value) & torch.isfinite(sd) & (sd > 0.0)).all()):
        raise DataError("A fit takes finite values and finite, positive deviations.")
