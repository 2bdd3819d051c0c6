"""Train the imaging surrogate: python -m stem_gym.surrogates.train_imaging --data DIR

DIR is a reference set of `stem_gym.datasets.abtem_images`, with the table of `stem_gym.datasets.single_atoms` in
DIR/single_atoms.npz. Writes the weights, the JSON and the Markdown model card; every figure in the card is measured
here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stem_gym.datasets.pictures import Picture, save_bundle
from stem_gym.simulator.optics import FWHM_PER_SIGMA
from stem_gym.surrogates.imaging import (
    CONDITIONS,
    FEATURES,
    USUAL_SOURCE_ANG,
    AtomTable,
    Features,
    ImagingSurrogate,
    features,
    grid_shape,
    table_from_arrays,
)
from stem_gym.surrogates.imaging_card import describe_training, held_out_scores, valid_range, write_card
from stem_gym.surrogates.imaging_network import CorrectionNetwork
from stem_gym.surrogates.imaging_reference import (
    INTERVAL_FACTOR,
    load_set,
    optics_of,
    reference_map,
    specimen_of,
)
from stem_gym.surrogates.surrogate import ModelCard, save_weights
from stem_gym.surrogates.training_progress import Progress

__all__ = ["Example", "calibrate", "train"]

CALIBRATION_FWHM_ANG = (0.0, 0.35, 0.7, 1.0)
_SPREAD_SHARE = 0.003
_SMALLEST_CONTRAST = 0.01


@dataclass(frozen=True)
class Example:
    """The network's inputs and abTEM's answer for the M settings of one picture."""

    seen: Features
    target: Tensor  # (M, ny, nx)
    pixel_ang: float

    @classmethod
    def of(cls, picture: Picture, table: AtomTable) -> Example:
        specimen, optics = specimen_of(picture), optics_of(picture)
        shape = grid_shape(specimen.cell_ang)
        pixel_ang = float(picture.specimen.cell_ang[0] / shape[1])
        return cls(features(specimen, optics, table, shape), reference_map(picture, shape), pixel_ang)

    def augmented(self, rows: Tensor, symmetry: int) -> Example:
        """Some rows under one of the eight symmetries of the square."""

        def turn(image: Tensor) -> Tensor:
            image = image[rows]
            image = image.transpose(-1, -2) if symmetry & 1 else image
            image = image.flip(-1) if symmetry & 2 else image
            return image.flip(-2) if symmetry & 4 else image

        seen = Features(turn(self.seen.base), turn(self.seen.scale), turn(self.seen.maps), self.seen.conditions[rows])
        return Example(seen, turn(self.target), self.pixel_ang)


def loss(surrogate: ImagingSurrogate, example: Example) -> Tensor:
    """1 − R² of each picture, sharp and blurred by the source, and the likelihood of the spread.

    The spread learns from errors that are held fixed, and shapes nothing but itself, so that it does not excuse large
    ones.
    """
    mean, log_spread = surrogate.correct(example.seen)
    level = example.seen.scale.mean((1, 2), keepdim=True)
    error = (mean - example.target) / level
    target = example.target / level
    log_relative = log_spread - torch.log(level)[:, None]
    total = torch.zeros(())
    for number, sigma_ang in enumerate((0.0, USUAL_SOURCE_ANG / FWHM_PER_SIGMA)):
        seen_error, seen_target = (_blur(image, sigma_ang / example.pixel_ang) for image in (error, target))
        contrast = seen_target.var((1, 2), keepdim=True) + (_SMALLEST_CONTRAST * target.mean((1, 2), keepdim=True)) ** 2
        total = total + (seen_error**2 / contrast).mean()
        square = seen_error.detach() ** 2 * torch.exp(-2 * log_relative[:, number])
        total = total + _SPREAD_SHARE * (0.5 * square + log_relative[:, number]).mean()
    return total


def _blur(image: Tensor, sigma_pixels: float) -> Tensor:
    if sigma_pixels == 0:
        return image
    fy, fx = torch.fft.fftfreq(image.shape[-2]), torch.fft.rfftfreq(image.shape[-1])
    damping = torch.exp(-2 * np.pi**2 * sigma_pixels**2 * (fy[:, None] ** 2 + fx[None] ** 2))
    return torch.fft.irfft2(torch.fft.rfft2(image) * damping, s=image.shape[-2:])


def train(
    surrogate: ImagingSurrogate,
    examples: list[Example],
    generator: np.random.Generator,
    report: Callable[[int, float], None],
    settings: dict[str, Any],
) -> None:
    """Fit the network in place by AdamW with a one-cycle rate.

    Its final weights are a running average over the last steps.
    """
    steps = settings["steps"]
    network = surrogate.network.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings["rate"], weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings["rate"], total_steps=steps, pct_start=0.1)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    order: list[int] = []
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(settings["pictures"]):
            order = order or generator.permutation(len(examples)).tolist()
            example = examples[order.pop()]
            rows = torch.from_numpy(generator.choice(len(example.target), settings["rows"], replace=False))
            value = loss(surrogate, example.augmented(rows, int(generator.integers(8)))) / settings["pictures"]
            value.backward()
            total += float(value.detach())
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        report(step, total)
    network.load_state_dict(average.module.state_dict())
    network.eval().requires_grad_(False)


def train_spread(
    surrogate: ImagingSurrogate,
    examples: list[Example],
    generator: np.random.Generator,
    steps: int,
    report: Callable[[int, float], None],
) -> None:
    """Fit the layers that tell the spread, and nothing else, on specimens the correction was not fitted to.

    There the errors are as large as they will be on new specimens.
    """
    layers = surrogate.network.spread.requires_grad_(True)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        optimizer.zero_grad()
        example = examples[int(generator.integers(len(examples)))]
        rows = torch.from_numpy(generator.choice(len(example.target), min(8, len(example.target)), replace=False))
        value = loss(surrogate, example.augmented(rows, int(generator.integers(8))))
        value.backward()
        optimizer.step()
        schedule.step()
        report(step, float(value.detach()))
    layers.requires_grad_(False)


def calibrate(surrogate: ImagingSurrogate, pictures: list[Picture]) -> list[float]:
    """Factors on the raw standard deviation, by source size, with which the 90 % interval covers 90 % of the pixels."""
    factors = []
    for fwhm in CALIBRATION_FWHM_ANG:
        ratios = []
        for picture in pictures:
            given = surrogate.estimate(specimen_of(picture), optics_of(picture, fwhm))
            reference = reference_map(picture, (given.mean.shape[-2], given.mean.shape[-1]), fwhm)
            ratios.append(((given.mean - reference).abs() / given.std).flatten())
        factors.append(float(np.quantile(torch.cat(ratios).numpy(), 0.90)) / INTERVAL_FACTOR)
    return factors


def new_surrogate(width: int, seed: int, table: AtomTable, card: ModelCard) -> ImagingSurrogate:
    """A surrogate with random first weights, which still says what the sum over atoms says."""
    # Nothing else in the package draws from torch's global stream; its state is put back.
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        network = CorrectionNetwork(FEATURES, CONDITIONS, width)
    settings: dict[str, Any] = {
        "width": width,
        "dilations": list(network.dilations),
        "calibration_fwhm_ang": list(CALIBRATION_FWHM_ANG),
        "calibration": [1.0] * len(CALIBRATION_FWHM_ANG),
    }
    return ImagingSurrogate(network, table, card, settings)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train, calibrate and judge the imaging surrogate.")
    shipped = Path(__file__).parent / "weights" / "imaging_haadf"
    parser.add_argument("--data", type=Path, required=True, help="folder of the reference set")
    parser.add_argument("--out", type=Path, default=shipped, help="where to write (default: the shipped weights)")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps (default 2400)")
    parser.add_argument("--spread-steps", type=int, default=300, help="steps for the spread alone (default 300)")
    parser.add_argument("--note", default="", help="a sentence for the model card about how the set was made")
    parser.add_argument("--pictures", type=int, default=4, help="specimens in a step (default 4)")
    parser.add_argument("--rows", type=int, default=4, help="settings of the optics of each specimen (default 4)")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate (default 3e-3)")
    parser.add_argument("--width", type=int, default=20, help="channels of the network (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first weights and of the order (default 0)")
    parser.add_argument("--start", type=Path, help="go on from these weights instead of random ones")
    parser.add_argument("--bundle", type=Path, help="also write the held-out pictures into one small file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    torch.set_num_threads(1)
    table = table_from_arrays(dict(np.load(given.data / "single_atoms.npz", allow_pickle=False)))
    trained, validation = load_set(given.data, "train"), load_set(given.data, "valid")
    examples = [Example.of(picture, table) for picture in trained.values()]
    card = ModelCard("imaging_haadf", "", "", {}, {}, valid_range([*trained.values(), *validation.values()]))
    surrogate = new_surrogate(given.width, given.seed, table, card)
    if given.start:
        surrogate.network.load_state_dict(ImagingSurrogate.load(given.start).network.state_dict())
    print(f"{len(examples)} training and {len(validation)} validation specimens", flush=True)
    train(surrogate, examples, np.random.default_rng(given.seed), Progress(given.steps), vars(given))
    unused = [Example.of(picture, table) for picture in validation.values()]
    print("spread, on the validation specimens", flush=True)
    train_spread(
        surrogate, unused, np.random.default_rng(given.seed + 1), given.spread_steps, Progress(given.spread_steps)
    )
    surrogate.settings["calibration"] = calibrate(surrogate, list(validation.values()))
    held_out = load_set(given.data, "held_out")
    if given.bundle:
        save_bundle(held_out, given.bundle)
    rows = held_out_scores(surrogate, held_out)
    card = write_card(given.out, card, describe_training(trained, validation, vars(given)), rows)
    tensors = {f"network.{name}": value for name, value in surrogate.network.state_dict().items()}
    tensors |= {f"table.{name}": value for name, value in vars(table).items()}
    save_weights(given.out, tensors, card, surrogate.settings)
    print(f"Wrote {given.out}.safetensors, .json and .md", flush=True)


if __name__ == "__main__":
    main()
