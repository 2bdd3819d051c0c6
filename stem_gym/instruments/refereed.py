"""A referee beside an instrument: its detector "belief" tells how probable each law is after what was measured.

It knows instructions and readings alone, so that it sits on any instrument that measures the quantity of a law set. The
sample, its truth and its random numbers are as they are without it; the referee's own draws are a function of the row's
seed and episode.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from stem_gym.core.batch import clone_rows, put_rows
from stem_gym.core.config import Config
from stem_gym.core.errors import ConfigError, InstructionError
from stem_gym.core.experiments import Experiment, History
from stem_gym.core.instructions import Acquire, Instruction, Park, Pulse, Read, Reading, Set, Wait, no_dose
from stem_gym.core.instrument import Capabilities, Instrument, Limits, check_instruction
from stem_gym.core.streams import Streams
from stem_gym.surrogates.gaussian_law import GaussianLaw
from stem_gym.surrogates.referee import Referee

BELIEF = "belief"  # the detector
_NOISE_FACTOR = "noise_factor"  # of a measurement, in its calibration
_PLACES = 16  # of a history to begin with; doubled when one is full
_STEPS = 1e4  # of a probability: finer digits are the particles' chance, and differ with the number of rows


class RefereeSettings(Config):
    """A referee that watches the readings."""

    particles: int = Field(16384, ge=64)
    """of each law"""
    none: float | None = Field(None, gt=0, lt=1)
    """probability of "none of these" before anything was measured; null: it is ruled out"""


@dataclass
class _Book:
    """What the instructions and readings say of each row; D axes, K sites, T places for measurements."""

    history: History
    count: Tensor  # (B,) int64 measurements
    control: Tensor  # (B, D) axes that are set; others are not used
    site: Tensor  # (B,) int64
    design: Tensor  # (B, K, D) of the last experiment at a site
    acted: Tensor  # (B, K) bool, whether there was one since the site was fresh
    unseen: Tensor  # (B, K) bool, whether nothing was measured since
    fresh: Tensor  # (B, K) bool, before it
    calibrated: Tensor  # (B, K) bool


class Refereed(Instrument):
    """The wrapped instrument with the detector "belief": Acquire answers probabilities (n, A) of the answers.

    A belief costs the exposure that is asked for, which may be 0, and no electrons. Every experiment is a Pulse, a Wait
    or a Set, whatever the law set names, and a measurement. One that no experiment went before tells nothing of the
    laws and is left out. At a site that remembers, a second pulse without a measurement between is refused.

    Raises ConfigError on an instrument that does not measure the quantity.
    """

    def __init__(self, instrument: Instrument, experiment: Experiment, settings: RefereeSettings) -> None:
        self.instrument, self.rows, self.device = instrument, instrument.rows, instrument.device
        self._experiment, self._laws = experiment, experiment.law_set
        self.capabilities = _capabilities(instrument.capabilities, self._laws.quantity)
        self._sites = experiment.sites.count if experiment.sites else 1
        self._remembers = bool(experiment.sites and experiment.sites.remembers)
        none = None if settings.none is None else GaussianLaw(experiment, settings.none)
        self._referee = Referee(experiment, self.rows, settings.particles, none=none, dtype=torch.float64)
        self._book = self._blank(self.rows, _PLACES)

    @torch.inference_mode()
    def reset(self, streams: Streams, rows: Tensor, options: Mapping[str, Any] | None = None) -> None:
        """New episodes on `rows`, of which nothing is known."""
        self.instrument.reset(streams, rows, options)
        index = rows.cpu()
        key0, key1, episode = streams.snapshot().cpu()[index, :3].T.tolist()
        seeds = [(e << 64) | (a << 32) | b for a, b, e in zip(key0, key1, episode, strict=True)]
        self._referee.reset(index, seeds)
        fresh = self._blank(len(index), self._book.history.done.shape[1])
        for i, axis in enumerate(self._laws.axes):
            if axis.does == "Set":
                fresh.control[:, i] = self.instrument.execute(Read(rows, axis.name)).data["value"].cpu()
        self._book = put_rows(self._book, index, fresh)

    @torch.inference_mode()
    def execute(self, instruction: Instruction) -> Reading:
        """Do it, and write down what it says of the laws."""
        check_instruction(instruction, self.capabilities, self.rows)
        rows = instruction.rows.cpu()
        if isinstance(instruction, Acquire) and instruction.detector == BELIEF:
            self._referee.update(self._book.history)
            told = ((self._referee.probability[rows] * _STEPS).round() / _STEPS).float()
            return no_dose(instruction, instruction.exposure_s.clone(), {BELIEF: told.to(self.device)})
        if isinstance(instruction, Pulse):
            self._refuse_unseen(rows)
        reading = self.instrument.execute(instruction)
        self._write_down(rows, instruction, reading)
        return reading

    def truth(self) -> Mapping[str, Tensor]:
        return self.instrument.truth()

    def abort(self) -> None:
        self.instrument.abort()

    def close(self) -> None:
        self.instrument.close()

    def snapshot(self) -> tuple[Any, _Book, Referee]:
        """The instrument's own, with what was written down and believed."""
        return self.instrument.snapshot(), clone_rows(self._book), copy.deepcopy(self._referee)

    @torch.inference_mode()
    def restore(self, snapshot: tuple[Any, _Book, Referee], streams: Streams) -> None:
        inner, book, referee = snapshot
        self.instrument.restore(inner, streams)
        self._book, self._referee = clone_rows(book), copy.deepcopy(referee)

    def _blank(self, rows: int, places: int) -> _Book:
        axes, sites = len(self._laws.axes), self._sites
        no, least = torch.zeros(rows, sites, dtype=torch.bool), [float(axis.grid()[0]) for axis in self._laws.axes]
        whole, empty = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, places, dtype=torch.bool)
        control = torch.tensor(least).expand(rows, -1).clone()
        history = History(
            done=empty,
            design=control.unsqueeze(1).expand(-1, places, -1).clone(),
            site=empty.long(),
            value=empty.float(),
            noise_factor=1.0 + empty.float(),
            fresh=empty.clone(),
            calibrated=empty.clone(),
        )
        design = torch.zeros(rows, sites, axes)
        return _Book(history, whole, control, whole.clone(), design, no, no.clone(), ~no, no.clone())

    def _refuse_unseen(self, rows: Tensor) -> None:
        book = self._book
        if self._remembers and bool((unseen := book.unseen[rows, book.site[rows]]).any()):
            raise InstructionError(
                f"The site of rows {rows[unseen].tolist()[:8]} remembers a pulse that was not measured; measure "
                f"{self._laws.quantity} before the next pulse there, or erase it: a referee knows measurements alone."
            )

    def _write_down(self, rows: Tensor, instruction: Instruction, reading: Reading) -> None:
        if isinstance(instruction, Park):
            self._move(rows, instruction.x.cpu())
        elif isinstance(instruction, Pulse):
            self._act(rows, {"Pulse.bias_v": instruction.bias_v.cpu(), "Pulse.time_s": instruction.time_s.cpu()})
        elif isinstance(instruction, Wait) and any(axis.does == "Wait.time_s" for axis in self._laws.axes):
            self._act(rows, {"Wait.time_s": instruction.time_s.cpu()})
        elif isinstance(instruction, Set):
            self._set(rows, instruction)
        elif isinstance(instruction, Acquire):
            if all(axis.does == "Set" for axis in self._laws.axes):
                self._act(rows, {})
            self._measure(rows, reading)

    def _move(self, rows: Tensor, x: Tensor) -> None:
        book = self._book
        if self._experiment.sites is None:  # wherever it is, nothing was done there
            book.acted[rows] = book.unseen[rows] = False
            book.fresh[rows] = True
        book.site[rows] = (x * self._sites).long().clamp(max=self._sites - 1)

    def _act(self, rows: Tensor, given: Mapping[str, Tensor]) -> None:
        book, site = self._book, self._book.site[rows]
        columns = [given.get(axis.does, book.control[rows, i]) for i, axis in enumerate(self._laws.axes)]
        book.design[rows, site] = torch.stack(columns, dim=1)
        book.fresh[rows, site] = ~book.acted[rows, site]
        book.acted[rows, site] = book.unseen[rows, site] = True

    def _set(self, rows: Tensor, instruction: Set) -> None:
        book, site = self._book, self._book.site[rows]
        routine = self._experiment.enabling.get(instruction.name)
        if routine is None:
            names = [axis.name for axis in self._laws.axes]
            if instruction.name in names:
                book.control[rows, names.index(instruction.name)] = instruction.value.cpu()
        elif routine.does == "erase":
            book.acted[rows, site] = book.unseen[rows, site] = False
        elif routine.does == "calibrate":
            book.calibrated[rows, site] = True

    def _measure(self, rows: Tensor, reading: Reading) -> None:
        """Another measurement of the rows in which an experiment went before."""
        known = self._book.acted[rows, self._book.site[rows]]
        rows, value = rows[known], reading.data[self._laws.quantity].cpu()[known]
        if len(rows) == 0:
            return
        self._make_room(int(self._book.count[rows].max()) + 1)
        book, history = self._book, self._book.history
        site, place = book.site[rows], book.count[rows]
        history.done[rows, place] = True
        history.design[rows, place] = book.design[rows, site]
        history.site[rows, place] = site
        history.value[rows, place] = value
        history.noise_factor[rows, place] = reading.calibration[_NOISE_FACTOR].cpu()[known]
        history.fresh[rows, place] = book.fresh[rows, site]
        history.calibrated[rows, place] = book.calibrated[rows, site]
        book.count[rows] += 1
        book.fresh[rows, site] = book.unseen[rows, site] = False

    def _make_room(self, needed: int) -> None:
        """Twice the places, where there are fewer than are needed."""
        history = self._book.history
        if needed > history.done.shape[1]:
            more = self._blank(self.rows, history.done.shape[1]).history
            both = {name: torch.cat((value, getattr(more, name)), dim=1) for name, value in vars(history).items()}
            self._book.history = History(**both)


def _capabilities(has: Capabilities, quantity: str) -> Capabilities:
    if quantity not in has.detectors:
        raise ConfigError(
            f"A referee needs numbers of {quantity}, which the instrument does not measure; it has the detectors "
            f"{', '.join(sorted(has.detectors)) or 'none'}."
        )
    longest_s = has.limits.get("Acquire.exposure_s", Limits(0.0, math.inf)).high
    limits = {**has.limits, "Acquire.exposure_s": Limits(0.0, longest_s)}
    return replace(has, detectors=has.detectors | {BELIEF}, limits=limits)
