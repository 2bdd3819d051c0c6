"""Train the spectrum surrogate on simulated specimens: python -m stem_gym.surrogates.train_im2spec

Writes the weights, the JSON and the Markdown model card; every figure in the card is measured here, on specimens of
other seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stem_gym.simulator.spectral_specimen import SpectralSpecimen
from stem_gym.surrogates.im2spec import Im2Spec, Im2SpecNetwork, sites_of
from stem_gym.surrogates.im2spec_card import VALID_RANGE, best_factor, held_out_scores, write_card
from stem_gym.surrogates.im2spec_head import LEARNED, NOISES, Sites, evidence
from stem_gym.surrogates.im2spec_lessons import MEASURED, Lesson, draw_lesson
from stem_gym.surrogates.im2spec_modes import Modes, find_modes, without_spikes
from stem_gym.surrogates.im2spec_network import standardised
from stem_gym.surrogates.im2spec_specimens import build_specimens
from stem_gym.surrogates.surrogate import ModelCard, save_weights
from stem_gym.surrogates.training_progress import Progress

__all__ = ["lesson_loss", "train"]

NAME = "im2spec"
_SPLITS = 3  # specimens to train on, to calibrate with, to judge by
_LEAST_VARIANCE = 1e-3  # of the measured coefficients; nothing is gained by being surer


def lesson_loss(network: Im2SpecNetwork, lesson: Lesson, modes: int) -> Tensor:
    """How unlikely the true coefficients are under what is predicted, and how far off they are.

    The likeliest kernel of those with learned features (from another nothing could be learned) and the likeliest noise
    level of each mode are taken. The derivative goes through the posterior of the Gaussian process by its Cholesky
    factor (that of an eigendecomposition is not stable).
    """
    shape = lesson.image.shape[1], lesson.image.shape[2]
    everywhere = sites_of(network.encoder(standardised(lesson.image)), shape)
    measured, asked = everywhere.at(lesson.cell), everywhere.at(lesson.asked)
    weight = torch.ones_like(lesson.cell, dtype=torch.float32)
    basis = find_modes(without_spikes(lesson.spectra, weight), weight, modes)
    truth = basis.coefficients_of(lesson.truth)
    with torch.no_grad():
        found = evidence(network.kernel, measured, basis.coefficients, weight, LEARNED)
        noise = torch.tensor(NOISES)[found.noise.argmax(-1)]  # (B, K)
    mean, amplitude, share_left = _posterior(network, measured, asked, basis, found.kernel, noise)
    untold = (amplitude * noise - basis.own_noise).clamp(min=0.0) + basis.hidden
    variance = amplitude[:, None] * share_left + untold[:, None]
    size = (basis.coefficients.square().mean(1) + basis.hidden).clamp(min=1e-20)[:, None]  # (B, 1, K)
    share = truth.var(1, correction=0).sqrt()
    share = share / share.sum(1, keepdim=True).clamp(min=1e-20)
    variance = variance / size + _LEAST_VARIANCE
    surprise = 0.5 * (truth - mean).square() / size / variance + 0.5 * variance.log()
    error = (truth - mean).square().sum((1, 2)) / truth.square().sum((1, 2)).clamp(min=1e-20)
    return (surprise.clamp(max=20.0).mean(1) * share).sum(1).mean() + error.clamp(max=2.0).mean()


def _posterior(
    network: Im2SpecNetwork, measured: Sites, asked: Sites, basis: Modes, kernel: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For the kernels (B,) and noises (B, K): mean (B, Q, K) of the coefficients at the cells asked, variance (B, K) of
    the smooth function, and the share of it (B, Q, K) that is left there."""
    own = network.kernel(measured, measured, kernel)[:, None]  # (B, 1, n, n)
    cross = network.kernel(measured, asked, kernel)[:, None]  # (B, 1, n, Q)
    count = own.shape[-1]
    factor = torch.linalg.cholesky(own + (noise[..., None, None] + 1e-5) * torch.eye(count))
    value = basis.coefficients.mT[..., None]  # (B, K, n, 1)
    half = torch.linalg.solve_triangular(factor, value, upper=False)
    along = torch.linalg.solve_triangular(factor, cross.expand(-1, noise.shape[1], -1, -1), upper=False)
    amplitude = (half.square().sum((2, 3)) + 2.0 * value.square().mean((2, 3))) / (count + 2.0)
    mean = (along.mT @ half)[..., 0]
    own = network.kernel.own(asked, kernel)[:, None]
    return mean.mT, amplitude, (own - along.square().sum(2)).clamp(min=0.0).mT


def train(
    network: Im2SpecNetwork,
    rng: np.random.Generator,
    pools: Sequence[SpectralSpecimen],
    given: dict[str, Any],
    report: Callable[[int, float], None],
) -> None:
    """Fit the network in place by AdamW with a one-cycle rate; its last weights are a running average."""
    steps = given["steps"]
    network.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=given["rate"], weight_decay=1e-3)
    rise = max(0.1, 2 / steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, given["rate"], total_steps=steps, pct_start=rise)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    for step in range(steps):
        measured = round(float(np.exp(rng.uniform(np.log(MEASURED[0]), np.log(MEASURED[1])))))
        lesson = draw_lesson(rng, pools, given["rows"], measured, given["asked"])
        value = lesson_loss(network, lesson, given["modes"])
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        report(step, float(value.detach()))
    network.load_state_dict(average.module.state_dict())
    network.eval().requires_grad_(False)


def new_network(width: int, features: int, seed: int) -> Im2SpecNetwork:
    """A network with random first weights."""
    # Nothing else in the package draws from torch's global stream; its state is put back.
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        return Im2SpecNetwork(width, features)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train, calibrate and judge the spectrum surrogate.")
    shipped = Path(__file__).parent / "weights" / NAME
    parser.add_argument("--out", type=Path, default=shipped, help="where to write (default: the shipped weights)")
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps (default 700)")
    parser.add_argument("--rows", type=int, default=8, help="specimens in a step (default 8)")
    parser.add_argument("--asked", type=int, default=256, help="cells of each that are asked (default 256)")
    parser.add_argument("--rate", type=float, default=4e-3, help="highest learning rate (default 4e-3)")
    parser.add_argument("--width", type=int, default=16, help="channels of the encoder (default 16)")
    parser.add_argument("--features", type=int, default=8, help="features of a cell (default 8)")
    parser.add_argument("--modes", type=int, default=6, help="modes of the spectra (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, specimens and lessons (default 0)")
    parser.add_argument("--specimens", type=int, default=64, help="specimens of every recipe (default 64)")
    parser.add_argument("--start", type=Path, help="measure these weights and write their card, without training")
    parser.add_argument("--lessons", type=int, default=4, help="held-out lessons for each figure (default 4)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    torch.set_num_threads(1)
    pools = build_specimens(given.specimens, _SPLITS * given.seed)
    network, rng = new_network(given.width, given.features, given.seed), np.random.default_rng(given.seed)
    if given.start:
        network.load_state_dict(Im2Spec.load(given.start).network.state_dict())
    else:
        train(network, rng, list(pools.values()), vars(given), Progress(given.steps))
    settings: dict[str, Any] = {name: getattr(given, name) for name in ("width", "features", "modes")}
    surrogate = Im2Spec(network, ModelCard(NAME, "", "", {}, {}, VALID_RANGE), settings | {"std_factor": 1.0})
    unused = build_specimens(max(given.rows, given.specimens // 4), _SPLITS * given.seed + 1)
    surrogate.settings["std_factor"] = best_factor(surrogate, rng, unused, 2 * len(unused) * given.lessons)
    held_out = build_specimens(max(given.rows, given.specimens // 2), _SPLITS * given.seed + 2)
    training = {
        "lessons": given.steps,
        "specimens": given.specimens * len(pools),
        "recipes": list(pools),
        **{name: getattr(given, name) for name in ("rows", "asked", "rate", "seed")},
    }
    card = write_card(given.out, surrogate, held_out_scores(surrogate, held_out, given.lessons, given.seed), training)
    save_weights(given.out, network.state_dict(), card, surrogate.settings)
    print(f"Wrote {given.out}.safetensors, .json and .md", flush=True)


if __name__ == "__main__":
    main()
