"""Train the atom finder on simulated frames: python -m stem_gym.surrogates.train_atom_finder

Frames are made while it trains, no two alike, under randomised conditions. Writes the weights, the JSON and the
Markdown model card; every figure in the card is measured here, on worlds of other seeds.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stem_gym.core.streams import Streams, row_seeds
from stem_gym.surrogates.atom_finder import Kind, NetworkFinder, find_atoms, network_input
from stem_gym.surrogates.atom_finder_card import VALID_RANGE, write_card
from stem_gym.surrogates.atom_finder_frames import Frames, draw_conditions, simulate_frames
from stem_gym.surrogates.atom_finder_network import KINDS, MULTIPLE, AtomFinderNetwork, Maps
from stem_gym.surrogates.atom_finder_scores import Counts, judge
from stem_gym.surrogates.regrid import Canvas, on_canvas
from stem_gym.surrogates.surrogate import ModelCard, UncertaintyWarning, save_weights
from stem_gym.surrogates.training_progress import Progress

__all__ = ["Targets", "calibrate", "loss", "targets_of", "train"]

_HEAT_SIGMA = 1.0  # canvas pixels
_HEAT_REACH = 3
_KIND_WEIGHTS = (2.0, 0.5, 4.0, 4.0)  # in the order of Kind: the rare ones matter most
_SPREAD_WEIGHT, _WEIGHT_WEIGHT = 0.3, 0.3
_HEAVIER, _HEAVIER_WEIGHT = 0.7, 30.0  # log weights of what is no neighbour of carbon, one atom in fifty
_FIRST_THRESHOLDS = (0.3, 0.3, 0.3, 0.3)
_THRESHOLDS = tuple(round(0.1 + 0.05 * i, 2) for i in range(15))


@dataclass(frozen=True)
class Targets:
    """What the network should answer."""

    heat: Tensor  # (B, KINDS, h, w) 1 at the pixel of an atom, falling off as a Gaussian around it
    offset: Tensor  # (B, 2, h, w) pixels to the atom, where `near`
    log_weight: Tensor  # (B, h, w)
    near: Tensor  # (B, h, w) within a pixel of an atom or a vacancy
    atom: Tensor  # (B, h, w) within a pixel of an atom


def targets_of(frames: Frames, canvas: Canvas) -> Targets:
    """The answer that is right for frames on a canvas."""
    batch, height, width = canvas.image.shape
    xy = canvas.from_frame(frames.xy)
    size = torch.tensor([width, height])
    centre = torch.minimum(torch.round(xy).clamp(min=0), size - 1)  # (B, K, 2)
    heat = torch.zeros(batch, KINDS * height * width)
    flat = torch.zeros(batch, 4, height * width + 1)  # offset x and y, log weight, near; the last place is a bin
    steps = torch.arange(-_HEAT_REACH, _HEAT_REACH + 1)
    atom = torch.zeros(batch, height * width + 1)
    for dy in steps:
        for dx in steps:
            at = centre + torch.stack((dx, dy))
            there = frames.present & ((at >= 0) & (at < size)).all(-1)
            value = torch.exp(-0.5 * (at - xy).square().sum(-1) / _HEAT_SIGMA**2) * there
            value = torch.where((dx == 0) & (dy == 0) & there, 1.0, value)
            pixel = (at[..., 1] * width + at[..., 0]).long()
            index = torch.where(there, frames.kind * height * width + pixel, 0)
            heat.scatter_reduce_(1, index, value, "amax")
            if max(abs(int(dx)), abs(int(dy))) <= 1:
                place = torch.where(there, pixel, height * width)
                weight = torch.log(frames.weight.clamp(min=1e-3))
                told = torch.stack((*(xy - at).unbind(-1), weight, torch.ones_like(weight)), dim=1)
                flat.scatter_(2, place[:, None].expand(-1, 4, -1), told)
                atom.scatter_(1, place, (frames.kind != int(Kind.VACANCY)).float())
    maps = flat[:, :, :-1].reshape(batch, 4, height, width)
    inside = canvas.mask > 0.0
    near = (maps[:, 3] > 0.0) & inside
    is_atom = near & (atom[:, :-1].reshape(batch, height, width) > 0.0)
    return Targets(heat.reshape(batch, KINDS, height, width), maps[:, :2], maps[:, 2], near, is_atom)


def loss(answer: Maps, targets: Targets, mask: Tensor) -> Tensor:
    """Focal loss of the scores, likelihood of the places, absolute error of the weights.

    The focal loss is that of Law & Deng (ECCV 2018, eq. 1) with α = 2, β = 4; places are Laplace distributed.
    """
    log_yes, log_no = nn.functional.logsigmoid(answer.score), nn.functional.logsigmoid(-answer.score)
    yes = torch.exp(log_yes)
    hit = targets.heat == 1.0
    focal = torch.where(hit, (1 - yes) ** 2 * log_yes, (1 - targets.heat) ** 4 * yes**2 * log_no)
    focal = focal * torch.tensor(_KIND_WEIGHTS)[:, None, None] * mask[:, None]
    total = -focal.sum() / hit.sum().clamp(min=1)
    error = (answer.offset - targets.offset).abs().mean(1)[targets.near]
    spread = answer.log_spread[targets.near]
    total = total + _SPREAD_WEIGHT * (error * torch.exp(-spread) + spread).mean()
    wrong = (answer.log_weight - targets.log_weight).abs()[targets.atom]
    matters = torch.where(targets.log_weight[targets.atom] > _HEAVIER, _HEAVIER_WEIGHT, 1.0)
    return total + _WEIGHT_WEIGHT * (wrong * matters).sum() / matters.sum().clamp(min=1.0)


def fresh_frames(rng: np.random.Generator, streams: Streams) -> Frames:
    """A batch under newly drawn conditions."""
    streams.next_episode(torch.arange(len(streams)))
    return simulate_frames(draw_conditions(rng, len(streams)), streams)


def train(
    network: AtomFinderNetwork,
    rng: np.random.Generator,
    streams: Streams,
    given: dict[str, Any],
    report: Callable[[int, float], None],
) -> None:
    """Fit the network in place by AdamW with a one-cycle rate; its last weights are a running average."""
    steps = given["steps"]
    network.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=given["rate"], weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, given["rate"], total_steps=steps, pct_start=0.1)
    averaging = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=averaging, use_buffers=True)
    for step in range(steps):
        frames = fresh_frames(rng, streams)
        canvas = on_canvas(frames.fraction, frames.pixel_ang, MULTIPLE)
        seen = network_input(canvas, frames.electrons_per_pixel / frames.pixel_ang**2)
        answer = network(seen.contiguous(memory_format=torch.channels_last))
        value = loss(answer, targets_of(frames, canvas), canvas.mask)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        report(step, float(value.detach()))
    network.load_state_dict(average.module.state_dict())


def tested_rows(finder: NetworkFinder, frames: Frames) -> Frames:
    """The frames that lie in the finder's valid range, which is narrower than what it is trained on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncertaintyWarning)
        inside = find_atoms(frames.fraction, frames.pixel_ang, frames.electrons_per_pixel, finder).inside
    return frames.rows(inside.nonzero().flatten())


def calibrate(finder: NetworkFinder, batches: list[Frames]) -> None:
    """Set the thresholds, each kind's where missed and false are fewest in all, and the factor of the uncertainty."""
    batches = [b for b in (tested_rows(finder, batch) for batch in batches) if len(b.pixel_ang)]
    counts = {kind: [Counts()] * len(_THRESHOLDS) for kind in Kind}
    finder.settings["thresholds"] = [_THRESHOLDS[0]] * KINDS
    for batch in batches:
        found = find_atoms(batch.fraction, batch.pixel_ang, batch.electrons_per_pixel, finder)
        for number, threshold in enumerate(_THRESHOLDS):
            surer = replace(found, present=found.present & (found.score > threshold))
            for kind in Kind:
                counts[kind][number] = counts[kind][number] + judge(batch, surer, kind)
    best = []
    for kind in Kind:
        wrong = [c.there - c.found + c.false for c in counts[kind]]
        fewest = [number for number, count in enumerate(wrong) if count == min(wrong)]
        best.append(_THRESHOLDS[fewest[len(fewest) // 2]])
    finder.settings["thresholds"] = best
    ratio = counts[Kind.CARBON][_THRESHOLDS.index(0.3)].std_ratio
    finder.settings["std_per_spread"] *= ratio if ratio > 0.0 else 1.0  # NaN where nothing was found


def new_network(width: int, seed: int) -> AtomFinderNetwork:
    """A network with random first weights."""
    # Nothing else in the package draws from torch's global stream; its state is put back.
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        return AtomFinderNetwork(width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train, calibrate and judge the atom finder.")
    shipped = Path(__file__).parent / "weights" / "atom_finder"
    parser.add_argument("--out", type=Path, default=shipped, help="where to write (default: the shipped weights)")
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps (default 2500)")
    parser.add_argument("--rows", type=int, default=16, help="frames in a step (default 16)")
    parser.add_argument("--rate", type=float, default=4e-3, help="highest learning rate (default 4e-3)")
    parser.add_argument("--width", type=int, default=16, help="channels of the finest scale (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, conditions and frames (default 0)")
    parser.add_argument("--frames", type=int, default=256, help="held-out frames for each figure (default 256)")
    parser.add_argument("--start", type=Path, help="go on from these weights instead of random ones")
    parser.add_argument("--judge-only", action="store_true", help="measure and write the card, without training")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    torch.set_num_threads(1)
    network = new_network(given.width, given.seed)
    runs: list[dict[str, Any]] = []
    if given.start:
        started = NetworkFinder.load(given.start)
        network.load_state_dict(started.network.state_dict())
        runs = list(started.card.training["runs"])
    if not given.judge_only:
        rng, streams = np.random.default_rng(given.seed), Streams(row_seeds(given.seed, given.rows))
        train(network, rng, streams, vars(given), Progress(given.steps))
        runs.append({name: getattr(given, name) for name in ("steps", "rows", "rate", "width", "seed")})
    card = ModelCard("atom_finder", "", "", {"runs": runs}, {}, VALID_RANGE)
    settings: dict[str, Any] = {"width": given.width, "thresholds": list(_FIRST_THRESHOLDS), "std_per_spread": 2**0.5}
    finder = NetworkFinder(network, card, settings)
    save_weights(given.out, network.state_dict(), card, settings)  # judging can be repeated, training is dear
    rng, streams = np.random.default_rng(given.seed + 1), Streams(row_seeds(given.seed + 1, given.rows))
    calibrate(finder, [fresh_frames(rng, streams) for _ in range(max(2, given.frames // given.rows))])
    card = write_card(given.out, finder, given.frames)
    save_weights(given.out, network.state_dict(), card, finder.settings)
    print(f"Wrote {given.out}.safetensors, .json and .md", flush=True)


if __name__ == "__main__":
    main()
