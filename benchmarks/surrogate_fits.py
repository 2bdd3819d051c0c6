"""What a decision of `dkl` costs: one, a fresh fit, and 32 episodes side by side, beside BoTorch and GPyTorch.

    python benchmarks/surrogate_fits.py                    # minutes; stores results/surrogate_fits.json
    python benchmarks/surrogate_fits.py --quick --out /tmp # half a minute

CPU seconds of one thread, the least of several runs: other programs on the machine only ever add to them. The same
field of 64 × 64 cells, the same measurements, a posterior over all 4,096 cells. BoTorch's SingleTaskGP sees the place;
GPyTorch's deep kernel sees what ours sees, through a network of the same size, and takes 200 steps of Adam.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import botorch
import gpytorch
import numpy as np
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from rich.console import Console
from rich.table import Table
from torch import Tensor

import stem_gym
from agents.engine.deep_kernel import Cells, KernelPlan
from agents.engine.field_model import FieldModel, Training
from agents.engine.patch_features import patches_of, principal_features
from benchmarks.throughput import machine
from stem_gym.core.streams import Streams, row_seeds

SIDE, PATCH, FEATURES = 64, 7, 6
EPISODES = 32
ONE_BY_ONE = 8  # whole episodes that are timed one after the other; the time is scaled to EPISODES
FIRST, LAST = 10, 50  # measurements before the first belief of an episode, and at its end
GPYTORCH_STEPS = 200


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one run of each instead of several")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    runs = 1 if given.quick else 5
    results: dict[str, Any] = {
        "versions": {
            "stem_gym": stem_gym.__version__,
            "torch": torch.__version__,
            "botorch": botorch.__version__,
            "gpytorch": gpytorch.__version__,
        },
        "machine": machine(),
        "one_field": {str(count): one_field(count, runs) for count in (50, 100, 200)},
        "side_by_side": {str(count): side_by_side(count, max(1, runs // 2)) for count in (20, 50, 100)},
        "whole_episodes": whole_episodes(),
    }
    report(results)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / ("surrogate_fits-quick.json" if given.quick else "surrogate_fits.json")
    path.write_text(json.dumps(results, indent=2) + "\n")
    Console().print(f"\nStored {path}")


class Fields:
    """Rows of one made-up field each, with `count` of their cells measured."""

    def __init__(self, rows: int, count: int) -> None:
        rng = np.random.default_rng(0)
        smooth = torch.from_numpy(rng.standard_normal((rows, 1, SIDE, SIDE))).float()
        for _ in range(4):
            smooth = torch.nn.functional.avg_pool2d(smooth, 5, stride=1, padding=2)
        self.image = smooth[:, 0] / smooth.std()
        self.value = (self.image.sin() + self.image.roll(2, dims=2) ** 2).flatten(1)
        self.order = torch.from_numpy(np.stack([rng.permutation(SIDE * SIDE) for _ in range(rows)]))
        self.count = count
        y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        self.places = (torch.stack((x, y), dim=-1).reshape(1, -1, 2) + 0.5) / SIDE

    def describe(self, image: Tensor) -> Cells:
        """What the kernel sees."""
        return Cells(self.places.expand(len(image), -1, -1), principal_features(patches_of(image, PATCH), FEATURES))

    def measured(self, count: int) -> Tensor:
        """The first `count` cells of every row's order."""
        mask = torch.zeros(self.value.shape, dtype=torch.bool)
        return mask.scatter(1, self.order[:, :count], True)


class Ours:
    """The model of some rows of the fields, as the agent holds it."""

    def __init__(self, fields: Fields, rows: Tensor) -> None:
        self.fields, self.rows, self.count = fields, rows, fields.count - 1
        training = Training(fresh_every=10_000)
        self.model = FieldModel(
            KernelPlan(patch_features=FEATURES, grid=(SIDE, SIDE)),
            training,
            Streams(row_seeds(0, len(rows))),
            fields.describe,
        )
        self.fresh()
        self.next()  # the features of the image are made once an episode

    def fresh(self) -> None:
        """A fit from fresh parameters, and the posterior."""
        self.model.forget(torch.arange(len(self.rows)))
        self._ask()

    def next(self) -> None:
        """One more measurement: a few steps more, and the posterior."""
        self.count += 1
        self._ask()

    def _ask(self) -> None:
        f, rows = self.fields, self.rows
        everyone, wanted = torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.int64)
        self.model.believe(f.image[rows], f.value[rows], f.measured(self.count)[rows], wanted, everyone)


def one_field(count: int, runs: int) -> dict[str, float]:
    """Seconds with `count` cells measured."""
    fields = Fields(1, count)
    ours = Ours(fields, torch.arange(1))
    cells = fields.order[0, :count]
    value = fields.value[0, cells].double()
    value = ((value - value.mean()) / value.std())[:, None]
    features = principal_features(patches_of(fields.image, PATCH), FEATURES)
    return {
        "decision_s": least(ours.next, runs),
        "fresh_fit_s": least(ours.fresh, runs),
        "botorch_single_task_s": least(lambda: single_task(fields.places[0].double(), cells, value), runs),
        "gpytorch_deep_kernel_s": least(lambda: deep_kernel(features[0].double(), cells, value), min(runs, 2)),
    }


def side_by_side(count: int, runs: int) -> dict[str, float]:
    """Seconds of a decision for many episodes, together and one after the other."""
    fields = Fields(EPISODES, count)
    together = Ours(fields, torch.arange(EPISODES))
    apart = [Ours(fields, torch.tensor([row])) for row in range(EPISODES)]
    many = least(together.next, runs)
    single = least(lambda: next_of(apart), runs)
    return {"episodes": EPISODES, "together_s": many, "one_by_one_s": single, "ratio": single / many}


def whole_episodes() -> dict[str, float]:
    """Seconds of all beliefs of episodes of `LAST` measurements with the agent's schedule, fresh fits among them."""
    together = episode(torch.arange(EPISODES))
    apart = sum(episode(torch.tensor([row])) for row in range(ONE_BY_ONE)) * EPISODES / ONE_BY_ONE
    return {
        "episodes": EPISODES,
        "measurements": LAST,
        "together_s": together,
        "one_by_one_s": apart,
        "one_by_one_timed": ONE_BY_ONE,
        "ratio": apart / together,
    }


def episode(rows: Tensor) -> float:
    """CPU seconds of an episode of each of the rows, side by side."""
    fields = Fields(EPISODES, LAST)
    plan, streams = KernelPlan(patch_features=FEATURES, grid=(SIDE, SIDE)), Streams(row_seeds(0, len(rows)))
    model = FieldModel(plan, Training(), streams, fields.describe)
    everyone, wanted = torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.int64)
    start = time.process_time()
    for count in range(FIRST, LAST):
        model.believe(fields.image[rows], fields.value[rows], fields.measured(count)[rows], wanted, everyone)
    return time.process_time() - start


def next_of(apart: list[Ours]) -> None:
    """A decision of each, one after the other."""
    for one in apart:
        one.next()


def single_task(places: Tensor, cells: Tensor, value: Tensor) -> None:
    """BoTorch's fit and its posterior over all cells, in parts, as it makes their whole covariance."""
    model = SingleTaskGP(places[cells], value, outcome_transform=None)
    fit_gpytorch_mll(gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model))
    with torch.no_grad():
        for some in places.split(512):
            model.posterior(some).variance.sum()


class _Deep(gpytorch.models.ExactGP):
    """A network of our size into a Matérn kernel."""

    def __init__(self, x: Tensor, y: Tensor, likelihood: Any) -> None:
        super().__init__(x, y, likelihood)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(x.shape[1], 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)
        ).double()
        self.mean, self.kernel = gpytorch.means.ConstantMean(), gpytorch.kernels.MaternKernel(nu=2.5)
        self.scaled = gpytorch.kernels.ScaleKernel(self.kernel)

    def forward(self, x: Tensor) -> Any:
        seen = self.net(x)
        return gpytorch.distributions.MultivariateNormal(self.mean(seen), self.scaled(seen))


def deep_kernel(features: Tensor, cells: Tensor, value: Tensor) -> None:
    """GPyTorch's deep kernel learning: a fit by Adam and the posterior over all cells."""
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    model = _Deep(features[cells], value[:, 0], likelihood).double()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(GPYTORCH_STEPS):
        optimiser.zero_grad()
        loss = -mll(model(features[cells]), value[:, 0])
        loss.backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        for some in features.split(512):
            model(some).variance.sum()


def least(function: Callable[[], Any], runs: int) -> float:
    """The least CPU seconds of some runs."""
    taken = []
    for _ in range(runs):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return min(taken)


def report(results: dict[str, Any]) -> None:
    """The figures as tables."""
    console = Console()
    names = ("decision_s", "fresh_fit_s", "botorch_single_task_s", "gpytorch_deep_kernel_s")
    table = Table("measured", *names, title=f"Seconds with 4,096 candidates, one core of {results['machine']['cpu']}")
    for count, row in results["one_field"].items():
        table.add_row(count, *(f"{row[name]:.3f}" for name in names))
    console.print(table)
    table = Table("measured", "together_s", "one_by_one_s", "ratio", title=f"A decision of {EPISODES} episodes")
    for count, row in results["side_by_side"].items():
        table.add_row(count, f"{row['together_s']:.2f}", f"{row['one_by_one_s']:.2f}", f"{row['ratio']:.1f}")
    console.print(table)
    row = results["whole_episodes"]
    console.print(
        f"{row['episodes']} episodes of {row['measurements']} measurements: {row['together_s']:.1f} s side by side, "
        f"{row['one_by_one_s']:.1f} s one after the other ({row['one_by_one_timed']} timed and scaled): "
        f"{row['ratio']:.1f} times faster."
    )


if __name__ == "__main__":
    main()
