"""How exact a referee is: beliefs by their number of particles, and forecasts by how many of these they look at.

python benchmarks/hypotheses_errors.py             # two minutes; stores results/hypotheses_errors.json

Beliefs: the largest error of a law's probability after each of up to 12 random pulses, against the mean of two referees
of 65,536 particles, and how far these two, which begin with the same particles, are from their mean. Forecasts, before
the first pulse and after each: the error of what experiments should tell, against what 4,096 of the 16,384 particles
say of it, for values picked along the curve and by chance, and how much less than the best experiment the one tells
that then seems best.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hypotheses_speed import PARTICLES, STD, campaigns
from stem_gym.core.config import parse
from stem_gym.core.experiments import Experiment, History, Protocol
from stem_gym.surrogates.information import expected_information
from stem_gym.surrogates.referee import Referee

RESULTS = Path(__file__).parent / "results"
FILE = "hypotheses_errors.json"
PULSES = 12
DRAWS = (64, 128, 256, 512)  # values that a forecast looks at
MANY = 65536  # particles of the referees that the others are held against


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=24, help="campaigns")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    given = parser.parse_args()
    experiment = parse(Experiment, STD, "benchmark")
    history = campaigns(experiment, given.rows, PULSES)
    found = {"rows": given.rows, "pulses": PULSES, "beliefs": beliefs(experiment, history)}
    found["forecasts"] = forecasts(experiment, history)
    for line in found["beliefs"] + found["forecasts"]:
        print(
            "  ".join(
                f"{name} {value:.3g}" if isinstance(value, float) else f"{value} {name}" for name, value in line.items()
            )
        )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / FILE).write_text(json.dumps(found, indent=1) + "\n")


def beliefs(experiment: Experiment, history: History) -> list[dict[str, Any]]:
    """Errors by the number of particles, the largest number first: those of the yardstick itself."""
    one, other = (believed(experiment, history, MANY, seed) for seed in (1, 2))
    right, found = 0.5 * (one + other), []
    for particles, told in ((MANY, one), *((n, believed(experiment, history, n, 3)) for n in (16384, 4096, 1024))):
        error = (told - right).abs().amax(2).flatten()
        row = {"mean": float(error.mean()), "in_95_percent": float(error.quantile(0.95)), "most": float(error.max())}
        found.append({"particles": particles, **row})
    return found


def believed(experiment: Experiment, history: History, particles: int, seed: int) -> Tensor:
    """Probabilities (B, T, L) after each of T pulses."""
    referee = Referee(experiment, len(history.done), particles, seed)
    told = []
    for count in range(1, PULSES + 1):
        referee.update(replace(history, done=history.done & (torch.arange(PULSES) < count)))
        told.append(referee.probability[:, :-1])
    return torch.stack(told, dim=1)


def forecasts(experiment: Experiment, history: History) -> list[dict[str, Any]]:
    """Errors of the expected information by the number of values and how they are picked."""
    referee, designs = Referee(experiment, len(history.done), PARTICLES), Protocol(experiment).designs()
    generator, factor = torch.Generator().manual_seed(0), torch.ones(len(history.done))
    errors: dict[tuple[str, int], list[Tensor]] = {(how, n): [] for how in ("curve", "chance") for n in DRAWS}
    lost: dict[tuple[str, int], list[Tensor]] = {look: [] for look in errors}
    for count in range(PULSES + 1):
        referee.update(replace(history, done=history.done & (torch.arange(PULSES) < count)))
        probability, whole = referee.probability[:, :-1], referee.forecast(designs, factor, max(DRAWS) * 8)
        right = expected_information(probability, whole)
        for how, draws in errors:
            chance = torch.rand(len(factor), whole.value.shape[2], generator=generator).argsort(1)[:, :draws]
            index = chance[:, None, :, None].expand(-1, whole.value.shape[1], -1, len(designs))
            look = replace(whole, value=whole.value.gather(2, index))
            look = referee.forecast(designs, factor, draws) if how == "curve" else look
            told = expected_information(probability, look)
            errors[how, draws].append((told - right).flatten())
            lost[how, draws].append(right.amax(1) - right.gather(1, told.argmax(1, keepdim=True)).squeeze(1))
    return [
        {
            "values": draws,
            "picked": how,
            "first_error_nats": float(errors[how, draws][0].square().mean().sqrt()),
            "error_nats": float(torch.cat(errors[how, draws][1:]).square().mean().sqrt()),
            "first_lost_nats": float(lost[how, draws][0].mean()),
            "lost_nats": float(torch.cat(lost[how, draws][1:]).mean()),
        }
        for how, draws in errors
    ]


if __name__ == "__main__":
    main()
