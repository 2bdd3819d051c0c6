"""The kernel model of B fields over an episode: when it is fitted afresh, when it goes on, and in which unit it speaks.

After each new measurement the parameters go on from where they were for a few steps; every so many measurements, and
when what is wanted changes, they start afresh. What a row does depends on that row alone; rows that do the same are
computed together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from agents.engine.acquisition import Belief
from agents.engine.deep_kernel import Cells, KernelPlan, Learned, Points, fit, pick, predict, start
from stem_gym.core.config import Config
from stem_gym.core.streams import Streams

_MANY = 100  # measurements beyond which each takes fewer steps
_OUTLYING = 0.1  # part of the plain deviation below which the spread of the middle half is not believed
_NORMAL_QUARTILES = 1.349


class Training(Config):
    """How much a kernel model learns."""

    fresh_steps: int = Field(100, ge=1)
    """steps of Adam of a fit from fresh parameters"""
    warm_steps: int = Field(20, ge=0)
    """steps after each further measurement; beyond 100 measurements fewer, as one more then tells less"""
    fresh_every: int = Field(10, ge=1)
    """measurements from one fresh fit to the next"""
    learning_rate: float = Field(0.03, gt=0)
    """step of Adam"""


class FieldModel:
    """Parameters and schedule of every row; `describe` makes what the kernel sees of images (n, H, W)."""

    def __init__(
        self, plan: KernelPlan, training: Training, streams: Streams, describe: Callable[[Tensor], Cells]
    ) -> None:
        rows = len(streams)
        self.plan, self.training, self._streams, self._describe = plan, training, streams, describe
        self._image: Tensor | None = None  # (B, H, W) that the cells were made of
        self._cells: Cells | None = None
        self._fold: Tensor | None = None  # (B, C)
        self._learned = start(plan, torch.zeros(rows, plan.members, plan.parameters))
        self._wanted = torch.zeros(rows, dtype=torch.int64)
        self._count = torch.zeros(rows, dtype=torch.int64)  # measurements at the last fit
        self._fresh_at = torch.full((rows,), -1)  # measurements at the last fresh fit; −1: none yet

    def forget(self, rows: Tensor) -> None:
        """Start the rows (n,) afresh."""
        self._fresh_at[rows] = -1
        if self._image is not None:
            self._image[rows] = torch.nan

    def believe(self, image: Tensor, value: Tensor, measured: Tensor, wanted: Tensor, rows: Tensor) -> Belief:
        """The posterior of the fields `rows` (n,), learned from value and measured (n, C); every row has some.

        `wanted` (n,) tells which quantity the values are; the parameters start afresh when it changes.
        """
        cells = self._cells_of(image, measured.shape[1], rows)
        fold = self._folds(measured.shape[1], rows)
        points, middle, spread = standardised(measured, value, fold)
        count = measured.sum(dim=1)
        self._learn(cells, points, count, wanted, rows)
        found = predict(self.plan, pick(self._learned, rows), cells, points)
        mean = middle[:, None] + spread[:, None] * found.mean
        return Belief(
            mean=mean,
            deviation=spread[:, None] * found.deviation,
            noise=spread * found.noise,
            spread=spread[:, None] * found.spread,
            best=torch.where(measured, mean, -torch.inf).amax(dim=1),
            lowest=torch.where(measured, mean, torch.inf).amin(dim=1),
            embedding=found.embedding,
        )

    def _learn(self, cells: Cells, points: Points, count: Tensor, wanted: Tensor, rows: Tensor) -> None:
        """Fresh fits and warm ones, each for all rows that take as many steps."""
        begun, last = self._fresh_at[rows], self._count[rows]
        fresh = (begun < 0) | (count >= begun + self.training.fresh_every) | (count < last)
        fresh = fresh | (wanted != self._wanted[rows])
        anew = rows[fresh]
        if len(anew):
            self._keep(anew, start(self.plan, self._streams.normal(anew, (self.plan.members, self.plan.parameters))))
        goes_on = (self.training.warm_steps * (_MANY / count.clamp(min=_MANY))).ceil().long() * (count > last)
        steps = torch.where(fresh, self.training.fresh_steps, goes_on)
        for kind in (2 * steps + fresh).unique().tolist():  # not a row each: rows that do the same are fitted together
            where = (2 * steps + fresh == kind).nonzero()[:, 0]
            if kind < 2:
                continue
            width = int(count[where].max())
            known = Points(*(part[where, :width] for part in vars(points).values()))
            self._keep(rows[where], fit(self.plan, pick(self._learned, rows[where]), cells.of(where), known, kind // 2))
        self._fresh_at[rows] = torch.where(fresh, count, begun)
        self._count[rows], self._wanted[rows] = count, wanted

    def _keep(self, rows: Tensor, learned: Learned) -> None:
        """Put what the rows (n,) have learned where it is kept."""
        for name, kept in vars(self._learned).items():
            kept[rows] = getattr(learned, name)

    def _cells_of(self, image: Tensor, cells: int, rows: Tensor) -> Cells:
        """What the kernel sees, made anew where an image is another one than before."""
        if self._image is None or self._cells is None:
            made = self._describe(image)
            self._image = torch.full((len(self._count), *image.shape[1:]), torch.nan)
            self._cells = made.each(lambda x: x.new_zeros(len(self._count), *x.shape[1:]))
        new = (self._image[rows] != image).flatten(1).any(dim=1).nonzero()[:, 0]
        if len(new):
            made, whose = self._describe(image[new]), rows[new]
            self._image[whose] = image[new]
            for name, part in vars(self._cells).items():
                if part is not None:
                    part[whose] = getattr(made, name)
        return self._cells.of(rows)

    def _folds(self, cells: int, rows: Tensor) -> Tensor:
        """Which member does not learn from a cell: the same for an episode, drawn with a row's first belief."""
        if self._fold is None:
            self._fold = torch.zeros(len(self._count), cells, dtype=torch.int64)
        first = rows[self._fresh_at[rows] < 0]
        if len(first):
            share = self._streams.uniform(first, (cells,))
            self._fold[first] = (share * self.plan.members).long().clamp(max=self.plan.members - 1)
        return self._fold[rows]


def standardised(measured: Tensor, value: Tensor, fold: Tensor) -> tuple[Points, Tensor, Tensor]:
    """The measured cells of n fields, packed and with robust mean 0 and deviation 1; middle and spread (n,) float32.

    Median and spread of the middle half, unless that is far below the plain deviation: a few wild values are no unit,
    nor is a spread of nearly nothing where most values are alike.
    """
    row, cell = measured.nonzero(as_tuple=True)
    slot = (measured.cumsum(dim=1) - 1)[row, cell]
    shape = (len(measured), int(measured.sum(dim=1).max()))
    index, valid = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    index[row, slot], valid[row, slot] = cell, True
    values = torch.where(valid, value.double().gather(1, index), torch.nan)
    low, middle, high = values.nanquantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=1)
    plain = (values - middle[:, None]).square().nanmean(dim=1).sqrt()
    spread = torch.maximum((high - low) / _NORMAL_QUARTILES, _OUTLYING * plain)
    spread = torch.where(spread > 0, spread, 1.0)
    scaled = torch.where(valid, (values - middle[:, None]) / spread[:, None], 0.0)
    return Points(index, valid, scaled, fold.gather(1, index)), middle.float(), spread.float()
