"""Histories of experiments for the tests of the referee and of what experiments tell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stem_gym.core.config import parse
from stem_gym.core.experiments import Experiment, History, Protocol
from stem_gym.simulator.laws import bind, bind_set

NOISE = {"absolute": 8.0, "relative": 0.08}


def domain_growth(**changes: Any) -> Experiment:
    return parse(Experiment, {"laws": "domain_growth", "noise": NOISE, "measure_s": 16.0, **changes}, "test")


def drawn(rows: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def history_of(design: Tensor, value: Tensor) -> History:
    """Measurements (B, T) of experiments (B, T, D) at fresh sites, in tune."""
    one = torch.ones_like(value)
    return History(one > 0, design, one.long() * 0, value, one, one > 0, one < 0)


def first(history: History, count: int) -> History:
    """The same with the first `count` measurements alone."""
    done = history.done & (torch.arange(history.done.shape[1]) < count)
    return History(done, *list(vars(history).values())[1:])


def simulated(
    experiment: Experiment, rows: int, measurements: int, seed: int = 0, spec: Any = None
) -> tuple[History, Tensor]:
    """Random experiments of worlds from the priors, and the true laws (B,); `spec` is another truth of all rows."""
    protocol, generator = Protocol(experiment), torch.Generator().manual_seed(seed)
    designs = protocol.designs()
    design = designs[torch.randint(0, len(designs), (rows, measurements), generator=generator)]
    laws = list(bind_set(experiment.law_set).values()) if spec is None else [bind("truth", spec, protocol.axes)]
    width = max(len(law.parameters) for law in laws)
    z = torch.randn(rows, 1, width, generator=generator)
    said = torch.stack([law.mean(z[..., : len(law.parameters)], design) for law in laws], dim=1)  # (B, L, T)
    true = torch.randint(0, len(laws), (rows,), generator=generator)
    value = said[torch.arange(rows), true]
    noise = torch.randn(rows, measurements, generator=generator)
    return history_of(design, value + experiment.noise_sd(value, torch.ones(1)) * noise), true
