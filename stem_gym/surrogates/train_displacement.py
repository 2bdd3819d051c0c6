"""Train the displacement surrogate: python -m stem_gym.surrogates.train_displacement --data DIR

DIR holds recoil trajectories of `stem_gym.datasets.recoil_trajectories` and the thresholds of
`stem_gym.datasets.recoil_thresholds`. Writes the weights, the JSON and the Markdown model card; every figure in the
card is measured here, on trajectories that neither the fit nor the calibration has seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stem_gym.datasets.recoil_shards import OUTCOMES, SITES, Trajectories, load_shards
from stem_gym.datasets.recoil_thresholds import load_thresholds
from stem_gym.datasets.recoil_trajectories import ENERGY_SPAN_EV, LARGEST_TILT_DEG
from stem_gym.surrogates.displacement import DisplacementSurrogate
from stem_gym.surrogates.displacement_card import Recoils, compare_thresholds, held_out_scores, side_shares, write_card
from stem_gym.surrogates.displacement_network import OutcomeNetwork, recoil_features
from stem_gym.surrogates.surrogate import ModelCard, save_weights
from stem_gym.surrogates.training_progress import Progress

__all__ = ["best_temperature", "new_network", "train"]

NAME = "displacement"


def new_network(width: int, members: int, seed: int) -> OutcomeNetwork:
    """A network with random first weights."""
    # Nothing else in the package draws from torch's global stream; its state is put back.
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        return OutcomeNetwork(width, members)


def train(
    network: OutcomeNetwork,
    recoils: Recoils,
    generator: np.random.Generator,
    report: Callable[[int, float], None],
    settings: dict[str, Any],
) -> None:
    """Fit every member in place to the outcomes by AdamW with a one-cycle rate, each on its own order of the data.

    Its final weights are a running average over the last steps.
    """
    steps, batch = settings["steps"], min(settings["batch"], len(recoils.outcome))
    features = recoil_features(recoils.transfer_ev, recoils.direction, recoils.site)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings["rate"], weight_decay=settings["decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings["rate"], total_steps=steps, pct_start=0.1)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    for step in range(steps):
        optimizer.zero_grad()
        total = torch.zeros(())
        for member in network.members:
            rows = torch.from_numpy(generator.integers(len(features), size=batch))
            total = total + nn.functional.cross_entropy(member(features[rows]), recoils.outcome[rows])
        total.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        report(step, float(total.detach()) / len(network.members))
    network.load_state_dict(average.module.state_dict())
    network.eval().requires_grad_(False)


def best_temperature(logits: Tensor, outcome: Tensor) -> float:
    """The temperature with the least log loss of logits (n, outcomes) for outcomes (n,), by golden section."""
    low, high = np.log(0.3), np.log(5.0)
    ratio = (np.sqrt(5.0) - 1) / 2

    def loss(log_temperature: float) -> float:
        return float(nn.functional.cross_entropy(logits / float(np.exp(log_temperature)), outcome))

    while high - low > 1e-4:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(np.exp(0.5 * (low + high)))


def describe_training(
    trained: Trajectories, validation: Trajectories, made_with: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """What the surrogate was trained on."""
    return {
        "trajectories": len(trained),
        "validation_trajectories": len(validation),
        "outcomes": {name: int((trained.outcome == k).sum()) for k, name in enumerate(OUTCOMES)},
        "sites": {name: int((trained.site == s).sum()) for s, name in enumerate(SITES)},
        "silicon_on_the_other_side": side_shares(trained),
        "dynamics": made_with,
        "settings": {name: settings[name] for name in ("steps", "batch", "rate", "decay", "width", "members", "seed")},
        "note": settings["note"],
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train, calibrate and judge the displacement surrogate.")
    shipped = Path(__file__).parent / "weights" / NAME
    parser.add_argument("--data", type=Path, required=True, help="folder of the recoil trajectories and thresholds")
    parser.add_argument("--out", type=Path, default=shipped, help="where to write (default: the shipped weights)")
    parser.add_argument("--steps", type=int, default=40000, help="optimizer steps (default 40000)")
    parser.add_argument("--batch", type=int, default=512, help="recoils in a step, for each member (default 512)")
    parser.add_argument("--rate", type=float, default=5e-3, help="highest learning rate (default 5e-3)")
    parser.add_argument("--decay", type=float, default=0.01, help="weight decay (default 0.01)")
    parser.add_argument("--width", type=int, default=128, help="units of a layer (default 128)")
    parser.add_argument("--members", type=int, default=4, help="perceptrons that are averaged (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first weights and of the order (default 0)")
    parser.add_argument("--note", default="", help="a sentence for the model card about how the set was made")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    torch.set_num_threads(1)
    thresholds = load_thresholds(given.data)
    (trained, made_with), (validation, _), (held_out, _) = (
        load_shards(given.data, split) for split in ("train", "valid", "held_out")
    )
    print(f"{len(trained)} training, {len(validation)} validation, {len(held_out)} held-out trajectories", flush=True)
    network = new_network(given.width, given.members, given.seed)
    train(
        network, Recoils.of(trained), np.random.default_rng(given.seed), Progress(given.steps, every=500), vars(given)
    )
    unused = Recoils.of(validation)
    logits = network(recoil_features(unused.transfer_ev, unused.direction, unused.site))
    settings = {
        "width": given.width,
        "members": given.members,
        "temperature": best_temperature(logits, unused.outcome),
    }
    valid_range = {"transfer_ev": ENERGY_SPAN_EV, "tilt_deg": (0.0, LARGEST_TILT_DEG)}
    card = ModelCard(NAME, "", "", describe_training(trained, validation, made_with, vars(given)), {}, valid_range)
    surrogate = DisplacementSurrogate(network, card, settings)
    card.held_out.update(held_out_scores(surrogate, Recoils.of(held_out)))
    card = write_card(given.out, card, compare_thresholds(surrogate, thresholds))
    save_weights(given.out, network.state_dict(), card, settings)
    print(f"Wrote {given.out}.safetensors, .json and .md", flush=True)


if __name__ == "__main__":
    main()
