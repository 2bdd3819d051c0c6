"""Spectrum search: the image is known, spectra cost time and dose; find where the wanted spectral feature is.

This file is longer than 400 lines because a task is one file: its settings, its state, its manual and its rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from pydantic import Field
from torch import Tensor

from stem_gym.core.config import Config
from stem_gym.core.errors import ActionError, ConfigError, did_you_mean
from stem_gym.core.instructions import FULL_FRAME, Acquire, Instruction, Park, Reading, Scan
from stem_gym.core.instrument import Capabilities, Limits
from stem_gym.core.scalarizers import NamedScalarizer
from stem_gym.core.task import Marks, Needs, Observation, Score, Task

SHARES = (0.90, 0.95, 0.99)  # of the map's range, of which it is told how many measurements they took
_TOPS = (0.99, 0.95)  # the best 1 % and 5 % of all cells
_LARGEST = 1e30  # of what an observation may hold; an endless space is refused by Gymnasium's checker
_TRUE_NUMBERS = 2**24  # of noise-free spectra that are looked at at once
_LEARN_REACH = 0.06  # of the plain interpolation that `learn` is judged with: part of the field's side, …
_LEARN_CONTRAST = 0.15  # … and of the image's full scale
_LEARN_PRIOR = 1e-3  # weight of the mean of all values, for cells far from any measurement
_HOT_SHARE, _HOT_BY = 1e-3, 1.5  # so few pixels that outshine the next so much are no part of the image
_ROUNDING = 1e-6  # relative, by which an exposure may pass the instrument's limits: single precision
_TINY = 1e-12


class Switch(Config):
    """A change of what is wanted, in the middle of an episode; the observation tells it at once."""

    after: int = Field(ge=1)
    """measurements after which it comes"""
    to: str
    """name of the scalarizer that is wanted from then on"""


class SpectrumSearchConfig(Config):
    """Settings of the task; what they mean to the agent is in the docstring of SpectrumSearch."""

    kind: Literal["spectrum_search"] = "spectrum_search"
    """this task"""
    mode: Literal["optimise", "discover", "learn"]
    """find the best place; find all above a level; or learn the whole map"""
    detector: str
    """what the spectra are measured with: eels, eds or diffraction"""
    grid: tuple[int, int] | None = None
    """cells (rows, columns) of image and maps; the instrument's own if absent"""
    actions: Literal["cell", "place"] = "cell"
    """a number of a cell, or any place in the field"""
    exposures_s: tuple[float, ...] = Field(min_length=1, max_length=16)
    """exposures to choose from; in place mode the shortest and the longest"""
    measurements: int = Field(ge=1, le=10_000)
    """places that can be measured; the episode ends with the last, or where no cell is left to measure"""
    remeasure: bool = True
    """whether a measured cell may be measured again; its spectra are then added up"""
    scalarizers: tuple[NamedScalarizer, ...] = Field(min_length=1, max_length=16)
    """what can be wanted of a spectrum; the first is wanted at the start"""
    switches: tuple[Switch, ...] = ()
    """changes of what is wanted"""
    level_share: float = Field(default=0.5, gt=0, lt=1)
    """what `discover` looks for: cells above this part of the map's range"""
    goal_share: float = Field(default=0.95, gt=0, le=1)
    """success: this part of the range reached, of the cells found, or of the map explained"""
    spectrum_channels: int = Field(default=128, ge=2, le=4096)
    """most channels of the spectrum in the observation; more are averaged"""
    fov_ang: float | None = Field(default=None, gt=0, le=1e6)
    """width of the field; the instrument's own if absent"""
    frame_dwell_s: float = Field(gt=0)
    """dwell per pixel of the image at the start"""
    image_full_scale: float | None = Field(default=None, gt=0)
    """collected fraction that is drawn as white; if absent the brightest pixel, hot ones aside: at most a thousandth of
    the pixels, or one, that outshine all others by half"""
    time_weight: float = Field(ge=0)
    """reward lost per hour"""
    dose_weight: float = Field(default=0.0, ge=0)
    """reward lost per 10¹² electrons"""
    scores_from: Literal["truth", "perception"] = "truth"
    """what the reward is made of where both are known; an instrument without truth always gives perception"""


@dataclass(frozen=True)
class State:
    """One episode a row: first what the operator knows, then the judge's book. M measurements, S scalarizers."""

    image: Tensor  # (B, H·W) uint8
    place: Tensor  # (B, 2) of the last measurement
    wanted: Tensor  # (B,) int64 which scalarizer
    used: Tensor  # (B,) int64 cells measured
    taken: Tensor  # (B,) int64 spectra taken
    last: Tensor  # (B,) int64 slot of the last measurement
    cell: Tensor  # (B, M) int64, the number of cells where none
    spectrum: Tensor  # (B, M, C) detected electrons
    exposure_s: Tensor  # (B, M)
    value: Tensor  # (B, M, S) of every scalarizer
    weight: Tensor  # (B, H·W) of the plain interpolation; empty but in mode "learn"
    weighted: Tensor  # (B, S, H·W) values times weights
    known: Tensor  # (B,) bool, whether the noise-free maps below were looked up
    true_map: Tensor  # (B, S, H·W) noise-free
    true_value: Tensor  # (B, M, S) noise-free, where the beam truly was; the best of a cell, −∞ where none
    true_range: Tensor  # (B, S, 2) its least and its most
    true_tops: Tensor  # (B, S, 3) where the best 1 % begin, the best 5 %, and what is above the level
    true_counts: Tensor  # (B, S, 3) cells that are there
    attained: Tensor  # (B,) what the mode counts, from truth
    covered: Tensor  # (B,) part of the field near a measurement; only in mode "learn"
    scored: Tensor  # (B,) int64 cells that were measured when it was scored last
    reached: Tensor  # (B, 3) measurements that took the best to each of SHARES; NaN until then
    area: Tensor  # (B,) sum of the best so far over measurements
    score_truth: Tensor  # (B,) summed reward
    score_perceived: Tensor  # (B,)


class SpectrumSearch(Task[State]):
    """Measure spectra one by one, where they tell most about what is wanted.

    ## Action

    | `actions` | space | meaning |
    |---|---|---|
    | cell | `Discrete(H·W)` | cell y·W + x of the grid, with the one exposure that is offered |
    | cell | `MultiDiscrete([H·W, E])` | the same, and which of the E exposures |
    | place | `Box(-1, 1, (3,))` | (a + 1)/2 is the place (x, y); the third is the exposure, logarithmic |

    ## Observation: `Dict`

    | key | meaning |
    |---|---|
    | `image` (H, W) | uint8, HAADF of the field |
    | `value` (H, W) | the scalarizer that is wanted now, of the spectra measured so far; 0 elsewhere |
    | `measured` (H, W) | uint8, 1 where a spectrum was measured |
    | `probe` (2,) | last place, fractions of the field |
    | `last_value` (1,) | scalarizer of the last spectrum |
    | `spectrum` (C,) | last spectrum, detected electrons per second and channel, averaged to at most so many channels |
    | `axis` (2,) | energies of its first and last channel in eV; angles in mrad for diffraction |
    | `scalarizer` (S,) | 1 for the scalarizer that is wanted now |
    | `budget` (3,) | what is left of steps, seconds and electrons |

    A cell that is measured again costs again, with new noise where the instrument has some; its spectra are added up.

    ## Reward

    What the mode counts, as far as this step raised it, − `time_weight` × hours − `dose_weight` × electrons / 10¹².
    *optimise* counts the best place so far, from 0 (the map's least) to 1 (its most), by the noise-free spectrum;
    *discover* the share of cells above `level_share` of the range that were measured; *learn* one minus the error of
    the map that the plainest interpolation makes of the measured values (RMSE / range). Without truth, *optimise*
    counts a new maximum by its part of the range seen, *discover* values above the level by the range seen, *learn*
    the part of the field near a measurement; a cell that is measured again counts nothing. Both are in `info` as
    `score_truth` and `score_perceived`.

    ## Start and end

    An image of the field is taken first, and paid for. The episode ends with `measurements` or with the budget; no
    success ends it, since nobody at a microscope is told that there is nothing better.

    Version 0: first release.
    """

    Config = SpectrumSearchConfig

    def __init__(self, config: SpectrumSearchConfig, axis: Tensor | None = None) -> None:
        self.config: SpectrumSearchConfig = config
        self.needs = Needs(frozenset({"Scan", "Park", "Acquire"}), frozenset({"haadf", config.detector}))
        self._compares = any(scalarizer.measure.compares for scalarizer in config.scalarizers)
        self._names = [scalarizer.name for scalarizer in config.scalarizers]
        _check(config, self._names)
        if axis is None or config.grid is None:
            return  # `fitted` makes the task that can be played
        for scalarizer in config.scalarizers:
            _check_scalarizer(scalarizer, axis)
        self._axis = axis
        self._cells = config.grid[0] * config.grid[1]
        self._channels = min(len(axis), config.spectrum_channels)
        self._average = _averaging(len(axis), self._channels)
        self._ends = torch.stack((axis.min(), axis.max())).float()
        self.action_space = self._actions()
        self.observation_space = self._observations()

    def fitted(self, capabilities: Capabilities) -> SpectrumSearch:
        """This task with the grid and the channels of an instrument."""
        config, axis = self.config, capabilities.axes.get(self.config.detector)
        grid = config.grid or capabilities.grid
        if grid is None:
            raise ConfigError("The instrument has no grid of its own: give the task's `grid` (rows, columns).")
        if capabilities.grid is not None and tuple(grid) != tuple(capabilities.grid):
            raise ConfigError(f"The instrument's grid is {capabilities.grid}; the task's is {grid}. Leave `grid` out.")
        _check_exposures(config.exposures_s, capabilities.limits.get("Acquire.exposure_s"))
        fov_ang = config.fov_ang or _only(capabilities.limits.get("Scan.fov_ang"))
        if fov_ang is None:
            raise ConfigError("The instrument has no field of its own: give the task's `fov_ang`.")
        if axis is None:  # the env refuses an instrument without the detector, and says which it has
            return self
        return SpectrumSearch(config.model_copy(update={"grid": tuple(grid), "fov_ang": fov_ang}), axis)

    def start(self, rows: int, device: torch.device) -> State:
        """Nothing seen, nothing measured."""
        config, cells, slots = self.config, self._cells, self.config.measurements
        zero, none = torch.zeros(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
        values = torch.zeros(rows, slots, len(self._names), device=device)
        maps = torch.zeros(rows, len(self._names), cells, device=device)
        learns = config.mode == "learn"
        return State(
            image=torch.zeros(rows, cells, dtype=torch.uint8, device=device),
            place=torch.full((rows, 2), 0.5, device=device),
            wanted=none,
            used=none,
            taken=none,
            last=none,
            cell=torch.full((rows, slots), cells, device=device),
            spectrum=torch.zeros(rows, slots, len(self._axis), device=device),
            exposure_s=torch.zeros(rows, slots, device=device),
            value=values,
            weight=torch.zeros(rows, cells if learns else 0, device=device),
            weighted=maps if learns else maps[:, :, :0],
            known=torch.zeros(rows, dtype=torch.bool, device=device),
            true_map=maps,
            true_value=torch.full_like(values, -torch.inf),
            true_range=maps[:, :, :2],
            true_tops=maps[:, :, :1].expand(-1, -1, 3),
            true_counts=maps[:, :, :1].expand(-1, -1, 3),
            attained=zero,
            covered=zero,
            scored=none,
            reached=torch.full((rows, len(SHARES)), torch.nan, device=device),
            area=zero,
            score_truth=zero,
            score_perceived=zero,
        )

    def opening(self, state: State, rows: Tensor) -> Sequence[Instruction]:
        """One image of the field."""
        config, n = self.config, len(rows)
        region = torch.tensor(FULL_FRAME, device=rows.device).repeat(n, 1)
        sides = (config.fov_ang or 0.0, config.frame_dwell_s)
        fov, dwell = (torch.full((n,), value, device=rows.device) for value in sides)
        return [Scan(rows, fov, self._grid, dwell, region)]

    def plan(self, state: State, action: Tensor, rows: Tensor) -> Sequence[Instruction]:
        """Park, then measure."""
        config, (height, width) = self.config, self._grid
        action = action.index_select(0, rows)
        if config.actions == "place":
            part = (0.5 * (action + 1.0)).clamp(0.0, 1.0)
            x, y = part[:, 0], part[:, 1]
            shortest, longest = config.exposures_s[0], config.exposures_s[-1]
            exposure_s = shortest * (longest / shortest) ** part[:, 2]
            cell = self._cell_of(x, y)
        else:
            cell = action if action.dim() == 1 else action[:, 0]
            x, y = (cell % width + 0.5) / width, (cell // width + 0.5) / height
            choices = torch.tensor(config.exposures_s, device=rows.device)
            exposure_s = choices[action[:, 1]] if action.dim() == 2 else choices.expand(len(cell))
        if not config.remeasure:
            self._refuse_again(state.cell.index_select(0, rows) == cell.unsqueeze(1), cell, rows)
        return [Park(rows, x.float(), y.float()), Acquire(rows, config.detector, exposure_s.float())]

    def observe(self, state: State, readings: Sequence[Reading]) -> tuple[State, Observation]:
        """The operator's view after the readings."""
        for reading in readings:
            if reading.verb == "Scan":
                state = self._see_image(state, reading)
            elif reading.verb == "Acquire":
                state = self._see_spectrum(state, reading)
        return state, self._observation(state)

    def score(self, state: State, readings: Sequence[Reading], truth: Mapping[str, Tensor]) -> tuple[State, Score]:
        """Reward, end and metrics, from truth where there is some and from perception where not."""
        config, for_truth = self.config, bool(truth)
        seconds, electrons, measured = _spent(readings, state)
        gain_seen, covered = self._gain_seen(state)
        gain_true, metrics = torch.zeros_like(gain_seen), {"best_value": self._seen(state)[2]}
        if for_truth:
            state = self._judge(self._look_up(state, truth), readings, truth)
            attained, shares = self._attained(state)
            gain_true = torch.where(measured, attained - state.attained, 0.0)
            state = self._milestones(replace(state, attained=attained), shares["best_share"], measured)
            metrics |= shares | self._told(state)
        terms = {
            "reward_found": torch.stack((torch.where(measured, gain_seen, 0.0), gain_true)),
            "reward_time": (-config.time_weight * seconds / 3600.0).expand(2, -1),
            "reward_dose": (-config.dose_weight * electrons / 1e12).expand(2, -1),
        }
        reward_seen, reward_true = torch.stack(tuple(terms.values())).sum(0).unbind(0)
        by_truth = for_truth and config.scores_from == "truth"
        seen = state.score_perceived + reward_seen
        state = replace(state, covered=covered, scored=state.used, score_perceived=seen)
        metrics |= {name: term[int(by_truth)] for name, term in terms.items()}
        metrics["score_perceived"] = state.score_perceived
        if for_truth:
            state = replace(state, score_truth=state.score_truth + reward_true)
            metrics["score_truth"] = state.score_truth
        reward = reward_true if by_truth else reward_seen
        places = config.measurements if config.remeasure else min(config.measurements, self._cells)
        return state, Score(reward, state.used >= places, metrics)

    def tell(self, state: State, wishes: Mapping[str, Any]) -> State:
        """Another scalarizer is wanted from now on: `scalarizer`, by name."""
        if set(wishes) != {"scalarizer"} or wishes["scalarizer"] not in self._names:
            given, key = (
                (wishes.get("scalarizer"), "name") if "scalarizer" in wishes else (next(iter(wishes), ""), "key")
            )
            known = self._names if key == "name" else ["scalarizer"]
            raise ConfigError(f"Unknown {key} of a wish {given!r}. {did_you_mean(str(given), known)}")
        return self._want(state, torch.full_like(state.wanted, self._names.index(wishes["scalarizer"])))

    def marks(self, state: State, truth: Mapping[str, Tensor]) -> Marks:
        """The image, the measured places and, in simulation, the best one; the values beside it."""
        height, width = self._grid
        centres = torch.stack(((state.cell % width + 0.5) / width, (state.cell // width + 0.5) / height), dim=-1)
        centres = torch.where((state.cell < self._cells).unsqueeze(-1), centres, torch.nan)
        best = _of_wanted(state.true_map, state.wanted).argmax(1, keepdim=True)
        target = torch.stack(((best % width + 0.5) / width, (best // width + 0.5) / height), dim=-1)
        target = torch.where(state.known[:, None, None], target, torch.nan)
        image = state.image.float().reshape(-1, height, width) / 255.0
        region = torch.tensor(FULL_FRAME, device=image.device).expand(len(image), 4)
        return Marks(state.place, centres, target, image, region, self._levels(state), "values measured, low to high")

    @property
    def _grid(self) -> tuple[int, int]:
        if self.config.grid is None:
            raise ConfigError("The task has no grid yet; an env fits it to its instrument.")
        return self.config.grid

    def _actions(self) -> spaces.Space[Any]:
        exposures = len(self.config.exposures_s)
        if self.config.actions == "place":
            return spaces.Box(-1.0, 1.0, (3,), np.float32)
        return spaces.Discrete(self._cells) if exposures == 1 else spaces.MultiDiscrete([self._cells, exposures])

    def _observations(self) -> spaces.Dict:
        wide: dict[str, Any] = {"low": -_LARGEST, "high": _LARGEST, "dtype": np.float32}
        return spaces.Dict(
            {
                "image": spaces.Box(0, 255, self._grid, np.uint8),
                "value": spaces.Box(shape=self._grid, **wide),
                "measured": spaces.Box(0, 1, self._grid, np.uint8),
                "probe": spaces.Box(0.0, 1.0, (2,), np.float32),
                "last_value": spaces.Box(shape=(1,), **wide),
                "spectrum": spaces.Box(shape=(self._channels,), **wide),
                "axis": spaces.Box(shape=(2,), **wide),
                "scalarizer": spaces.Box(0.0, 1.0, (len(self._names),), np.float32),
            }
        )

    def _cell_of(self, x: Tensor, y: Tensor) -> Tensor:
        height, width = self._grid
        column, line = (x * width).long().clamp(0, width - 1), (y * height).long().clamp(0, height - 1)
        return line * width + column

    def _refuse_again(self, same: Tensor, cell: Tensor, rows: Tensor) -> None:
        """Raises ActionError where a cell was measured before."""
        again = same.any(1)
        if bool(again.any()):
            row = int(again.nonzero()[0])
            number, width = int(cell[row]), self._grid[1]
            raise ActionError(
                f"Cell {number} (x {number % width}, y {number // width}) of row {int(rows[row])} was measured before; "
                "choose one where `measured` is 0, or set the task's `remeasure`."
            )

    def _see_image(self, state: State, reading: Reading) -> State:
        gain, offset, beam = (
            reading.calibration[key].reshape(-1, 1, 1)
            for key in ("counts_per_electron", "counts_offset", "electrons_per_pixel")
        )
        fraction = (reading.data["images"][:, 0] - offset) / (gain * beam)
        white = _brightest(fraction.flatten(1)).clamp(min=_TINY)[:, None, None]
        if self.config.image_full_scale is not None:
            white = torch.full_like(white, self.config.image_full_scale)
        image = (fraction * (255.0 / white)).round().clamp(0.0, 255.0).to(torch.uint8).flatten(1)
        return replace(state, image=state.image.index_copy(0, reading.rows, image))

    def _see_spectrum(self, state: State, reading: Reading) -> State:
        """Put the spectrum into its cell's slot, or add it to what was measured there before."""
        rows, place, exposure_s = reading.rows, reading.data["place"], reading.calibration["exposure_s"]
        counts = reading.data["spectrum"] if "spectrum" in reading.data else reading.data["pattern"].flatten(1)
        gain, offset = (reading.calibration[key].unsqueeze(1) for key in ("counts_per_electron", "counts_offset"))
        cell = self._cell_of(place[:, 0], place[:, 1])
        before = state.cell.index_select(0, rows) == cell.unsqueeze(1)
        again = before.any(1)
        slot = torch.where(again, before.float().argmax(1), state.used.index_select(0, rows))
        slot = slot.clamp(max=self.config.measurements - 1)
        at = (rows, slot)
        electrons = state.spectrum[at] + (counts - offset) / gain
        seconds = state.exposure_s[at] + exposure_s
        spectrum, total_s = state.spectrum.index_put(at, electrons), state.exposure_s.index_put(at, seconds)
        value = self.values(electrons / seconds.unsqueeze(1), self._mean_so_far(spectrum, total_s, rows))
        changed = replace(
            state,
            place=state.place.index_copy(0, rows, place),
            used=state.used.index_add(0, rows, (~again).long()),
            taken=state.taken.index_add(0, rows, torch.ones_like(rows)),
            last=state.last.index_copy(0, rows, slot),
            cell=state.cell.index_put(at, cell),
            spectrum=spectrum,
            exposure_s=total_s,
            value=state.value.index_put(at, value),
        )
        if self.config.mode == "learn":
            changed = self._interpolate(changed, state, rows, again)
        return self._switched(changed) if self.config.switches else changed

    def _mean_so_far(self, spectrum: Tensor, exposure_s: Tensor, rows: Tensor) -> Tensor | None:
        """Mean rate (n, C) of all that was measured, where a scalarizer compares with it."""
        if not self._compares:
            return None
        seconds = exposure_s.index_select(0, rows).sum(1, keepdim=True)
        return spectrum.index_select(0, rows).sum(1) / seconds

    def values(self, rate: Tensor, reference: Tensor | None) -> Tensor:
        """Every scalarizer of spectra (…, C): (…, S), finite."""
        axis = self._axis.to(rate.device)
        values = [scalarizer.measure(rate, axis, reference) for scalarizer in self.config.scalarizers]
        return torch.stack(values, dim=-1).nan_to_num(0.0).clamp(-_LARGEST, _LARGEST)

    def _switched(self, state: State) -> State:
        """What is wanted after so many measurements."""
        wanted = state.wanted
        for switch in self.config.switches:
            wanted = torch.where(state.taken == switch.after, self._names.index(switch.to), wanted)
        return self._want(state, wanted)

    def _want(self, state: State, wanted: Tensor) -> State:
        """Another scalarizer: what was reached of the old one counts no more."""
        new, state = wanted != state.wanted, replace(state, wanted=wanted)
        attained, shares = self._attained(state)
        return replace(
            state,
            attained=torch.where(new, attained, state.attained),
            reached=torch.where(new.unsqueeze(1), torch.nan, state.reached),
            area=torch.where(new, state.taken * shares["best_share"], state.area),
        )

    def _interpolate(self, state: State, before: State, rows: Tensor, again: Tensor) -> State:
        """Add the last measurement to the plain interpolation: Gaussian weights of distance and of brightness."""
        (height, width), image = self._grid, state.image.index_select(0, rows).float() / 255.0
        at = (rows, state.last.index_select(0, rows))
        cell = state.cell[at].unsqueeze(1)
        x = (torch.arange(width, device=rows.device) - cell % width) / (width * _LEARN_REACH)
        y = (torch.arange(height, device=rows.device) - cell // width) / (height * _LEARN_REACH)
        near = (-0.5 * y.square()).exp().unsqueeze(2) * (-0.5 * x.square()).exp().unsqueeze(1)  # (n, H, W)
        contrast = (image - image.gather(1, cell)) / _LEARN_CONTRAST
        weight = contrast.square_().mul_(-0.5).exp_().mul_(near.flatten(1))
        value = state.value[at] - torch.where(again.unsqueeze(1), before.value[at], 0.0)
        return replace(
            state,
            weight=state.weight.index_add(0, rows, weight * (~again).float().unsqueeze(1)),
            weighted=state.weighted.index_add(0, rows, value.unsqueeze(-1) * weight.unsqueeze(1)),
        )

    def _observation(self, state: State) -> Observation:
        height, width = self._grid
        rows = torch.arange(len(state.used), device=state.used.device)
        cells = torch.zeros(len(rows), self._cells + 1, device=state.used.device)  # the last takes the empty slots
        value = _of_wanted(state.value.transpose(1, 2), state.wanted)
        last = state.spectrum[rows, state.last] / state.exposure_s[rows, state.last].clamp(min=_TINY).unsqueeze(1)
        return {
            "image": state.image.reshape(-1, height, width).clone(),
            "value": cells.scatter(1, state.cell, value)[:, :-1].reshape(-1, height, width).contiguous(),
            "measured": cells.scatter(1, state.cell, 1.0)[:, :-1].reshape(-1, height, width).to(torch.uint8),
            "probe": state.place.clone(),
            "last_value": value[rows, state.last].unsqueeze(1),
            "spectrum": self._averaged(last).clamp(-_LARGEST, _LARGEST),
            "axis": self._ends.to(last.device).repeat(len(rows), 1),
            "scalarizer": torch.nn.functional.one_hot(state.wanted, len(self._names)).float(),
        }

    def _averaged(self, rate: Tensor) -> Tensor:
        """Spectra (B, C) in the channels of the observation."""
        return rate if rate.shape[1] == self._channels else rate @ self._average.to(rate.device)

    def _levels(self, state: State) -> Tensor:
        """The measured values (B, H, W) from little to much, a cell as wide as three; NaN elsewhere."""
        _, least, most, _ = self._seen(state)
        value = _of_wanted(state.value.transpose(1, 2), state.wanted)
        level = (value - least.unsqueeze(1)) / (most - least).clamp(min=_TINY).unsqueeze(1)
        cells = torch.full((len(value), self._cells + 1), -1.0, device=value.device)
        map = cells.scatter(1, state.cell, 0.3 + 0.7 * level)[:, :-1].reshape(-1, 1, *self._grid)
        wide = torch.nn.functional.max_pool2d(map, 3, stride=1, padding=1).squeeze(1)
        return torch.where(wide < 0.0, torch.nan, wide)

    def _look_up(self, state: State, truth: Mapping[str, Tensor]) -> State:
        """The noise-free maps of every scalarizer, once an episode."""
        fresh = (~state.known).nonzero().squeeze(1)
        if len(fresh) == 0:
            return state
        size = max(1, _TRUE_NUMBERS // (self._cells * len(self._axis)))
        maps = torch.cat([self.true_maps(truth, rows) for rows in fresh.split(size)])  # (n, S, H·W)
        low, high = maps.aminmax(dim=-1)
        level = low + self.config.level_share * (high - low)
        ranks = [max(1, round(top * self._cells)) for top in _TOPS]
        tops = torch.stack([*(maps.kthvalue(rank, dim=-1).values for rank in ranks), level], dim=-1)
        return replace(
            state,
            true_map=state.true_map.index_copy(0, fresh, maps),
            true_range=state.true_range.index_copy(0, fresh, torch.stack((low, high), dim=-1)),
            true_tops=state.true_tops.index_copy(0, fresh, tops),
            true_counts=state.true_counts.index_copy(
                0, fresh, (maps.unsqueeze(2) >= tops.unsqueeze(3)).sum(-1).float()
            ),
            known=torch.ones_like(state.known),
        )

    def true_maps(self, truth: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """Noise-free maps (n, S, H·W) of some rows."""
        loadings, components = truth["loadings"].index_select(0, rows), _components(truth, rows)
        if all(scalarizer.measure.linear for scalarizer in self.config.scalarizers):
            return (loadings @ self.values(components, None)).transpose(1, 2)
        rate = loadings @ components
        return self.values(rate, rate.mean(1, keepdim=True) if self._compares else None).transpose(1, 2)

    def _judge(self, state: State, readings: Sequence[Reading], truth: Mapping[str, Tensor]) -> State:
        """Book the noise-free values of what was measured."""
        true_value = state.true_value
        for reading in readings:
            if reading.verb == "Acquire":
                rows = reading.rows
                components = _components(truth, rows)
                acquired = truth["acquired"].index_select(0, rows)
                mean = truth["loadings"].index_select(0, rows).mean(1) if self._compares else acquired
                rate, reference = ((part.unsqueeze(2) * components).sum(1) for part in (acquired, mean))
                at = (rows, state.last.index_select(0, rows))
                best = torch.maximum(true_value[at], self.values(rate, reference))  # of those measured in this cell
                true_value = true_value.index_put(at, best)
        return replace(state, true_value=true_value)

    def _attained(self, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """What the mode counts, from 0 to 1, and all shares that are told."""
        measured = state.cell < self._cells  # (B, M)
        low, high = _of_wanted(state.true_range, state.wanted).unbind(-1)
        span = (high - low).clamp(min=_TINY)
        best = torch.where(measured, _of_wanted(state.true_value.transpose(1, 2), state.wanted), -torch.inf).amax(1)
        best_share = ((best - low) / span).clamp(0.0, 1.0)
        tops = _of_wanted(state.true_tops, state.wanted).unsqueeze(-1)  # (B, 3, 1)
        row, cell = torch.arange(len(best), device=best.device).unsqueeze(1), state.cell.clamp(max=self._cells - 1)
        here = torch.where(measured, state.true_map[row, state.wanted.unsqueeze(1), cell], -torch.inf)
        found = (here.unsqueeze(1) >= tops).sum(-1) / _of_wanted(state.true_counts, state.wanted).clamp(min=1.0)
        shares = {"best_share": best_share, "simple_regret": 1.0 - best_share}
        names = ("found_top1_share", "found_top5_share", "found_level_share")
        shares |= dict(zip(names, found.unbind(1), strict=True))
        if self.config.mode == "learn":
            weight = state.weight + _LEARN_PRIOR
            mean = _masked_mean(_of_wanted(state.value.transpose(1, 2), state.wanted), measured)
            predicted = (_of_wanted(state.weighted, state.wanted) + _LEARN_PRIOR * mean.unsqueeze(1)) / weight
            shares["rmse"] = (predicted - _of_wanted(state.true_map, state.wanted)).square().mean(1).sqrt() / span
            return (1.0 - shares["rmse"]).clamp(min=0.0) * (state.taken > 0), shares
        return best_share if self.config.mode == "optimise" else shares["found_level_share"], shares

    def _milestones(self, state: State, best_share: Tensor, measured: Tensor) -> State:
        """Note how many measurements the shares of the range took, and add to the area under the best so far."""
        aims = torch.tensor(SHARES, device=best_share.device)
        now = state.reached.isnan() & (best_share.unsqueeze(1) >= aims) & measured.unsqueeze(1)
        reached = torch.where(now, state.taken.unsqueeze(1).float(), state.reached)
        return replace(state, reached=reached, area=state.area + best_share * measured)

    def _told(self, state: State) -> dict[str, Tensor]:
        """The metrics of the judge's book."""
        told = {
            f"measurements_to_{100 * share:.0f}": reached
            for share, reached in zip(SHARES, state.reached.unbind(1), strict=True)
        }
        told["area_under_best"] = state.area / state.taken.clamp(min=1)
        told["success"] = (state.attained >= self.config.goal_share).float()
        return told

    def _seen(self, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the measured values: the last, the least, the most, and the most before the last; each (B,)."""
        value, measured = _of_wanted(state.value.transpose(1, 2), state.wanted), state.cell < self._cells
        slots = torch.arange(value.shape[1], device=value.device)
        earlier = measured & (slots != state.last.unsqueeze(1))
        least = torch.where(measured, value, torch.inf).amin(1)
        most, before = (torch.where(which, value, -torch.inf).amax(1) for which in (measured, earlier))
        some = state.taken > 0
        last = value.gather(1, state.last.unsqueeze(1)).squeeze(1)
        return last, torch.where(some, least, 0.0), torch.where(some, most, 0.0), before

    def _gain_seen(self, state: State) -> tuple[Tensor, Tensor]:
        """What the last measurement added by perception, and the part of the field that is covered; each (B,)."""
        last, least, most, before = self._seen(state)
        span = (most - least).clamp(min=_TINY)
        counts = (state.used > 1) & (state.used > state.scored)  # a first value has no range; a second look is no find
        if self.config.mode == "optimise":
            gain = torch.where(counts, (most - before).clamp(min=0.0) / span, 0.0)
        elif self.config.mode == "discover":
            above = last >= least + self.config.level_share * span
            gain = (above & counts).float() / self.config.measurements
        else:
            covered = (state.weight / (1.0 + state.weight)).mean(1)
            return covered - state.covered, covered
        return gain, state.covered


def _check(config: SpectrumSearchConfig, names: Sequence[str]) -> None:
    """Refuse settings that contradict each other."""
    if len(set(names)) < len(names):
        raise ConfigError(f"Every scalarizer needs a name of its own; given {list(names)}.")
    for switch in config.switches:
        if switch.to not in names:
            raise ConfigError(f"switches: unknown scalarizer {switch.to!r}. {did_you_mean(switch.to, names)}")
        if switch.after >= config.measurements:
            raise ConfigError(
                f"switches: after {switch.after} measurements nothing follows; the episode has {config.measurements}."
            )
    exposures = config.exposures_s
    if min(exposures) <= 0.0 or list(exposures) != sorted(set(exposures)):
        raise ConfigError(f"exposures_s must be positive and rise; given {list(exposures)}.")
    if config.actions == "place" and len(exposures) != 2:
        raise ConfigError(f"exposures_s of places are the shortest and the longest; given {list(exposures)}.")
    if config.grid is not None and min(config.grid) < 2:
        raise ConfigError(f"grid must have at least 2 rows and 2 columns; given {list(config.grid)}.")


def _check_exposures(exposures_s: Sequence[float], limits: Limits | None) -> None:
    """Refuse exposures that the instrument does not take."""
    if limits is None:
        return
    least, most = limits.low * (1.0 - _ROUNDING), limits.high * (1.0 + _ROUNDING)
    if not least <= min(exposures_s) <= max(exposures_s) <= most:
        raise ConfigError(
            f"exposures_s: the instrument takes {limits.low:g} to {limits.high:g} s; given {list(exposures_s)}."
        )


def _only(limits: Limits | None) -> float | None:
    """The one value that the limits leave, if they do."""
    return limits.high if limits is not None and limits.low == limits.high else None


def _check_scalarizer(scalarizer: NamedScalarizer, axis: Tensor) -> None:
    try:
        scalarizer.measure.check(axis)
    except ConfigError as error:
        raise ConfigError(f"scalarizer {scalarizer.name!r}: {error}") from error


def _components(truth: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """Components (n, K, C) in detected electrons per second."""
    per_s = truth["electrons_per_s"].index_select(0, rows)
    return truth["components"].index_select(0, rows) * per_s[:, None, None]


def _brightest(image: Tensor) -> Tensor:
    """The brightest of pixels (B, P), (B,); where some are hot, the next below these."""
    brightest = image.topk(1 + max(1, int(_HOT_SHARE * image.shape[1])), dim=1).values
    first, below = brightest[:, 0], brightest[:, -1]
    return torch.where((first > _HOT_BY * below) & (below > 0.0), below, first)


def _averaging(channels: int, fewer: int) -> Tensor:
    """Weights (C, S) that average C channels into S neighbouring groups, shared channels by their part."""
    edge = torch.linspace(0.0, channels, fewer + 1, dtype=torch.float64)
    low, high = torch.arange(channels, dtype=torch.float64), torch.arange(1, channels + 1, dtype=torch.float64)
    overlap = torch.minimum(high[:, None], edge[1:]) - torch.maximum(low[:, None], edge[:-1])
    return (overlap.clamp(min=0.0) * (fewer / channels)).float()


def _of_wanted(values: Tensor, wanted: Tensor) -> Tensor:
    """Of (B, S, …) the scalarizer that is wanted, (B, …)."""
    return values[torch.arange(len(wanted), device=wanted.device), wanted]


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean (B,) over those of (B, M) that count; 0 where none does."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def _spent(readings: Sequence[Reading], state: State) -> tuple[Tensor, Tensor, Tensor]:
    """Seconds and electrons of the step, and whether a spectrum was measured; each (B,)."""
    seconds, electrons = torch.zeros_like(state.area), torch.zeros_like(state.area)
    measured = torch.zeros_like(state.known)
    for reading in readings:
        seconds = seconds.index_add(0, reading.rows, reading.seconds)
        electrons = electrons.index_add(0, reading.rows, reading.electrons)
        if reading.verb == "Acquire":
            measured = measured.index_fill(0, reading.rows, True)
    return seconds, electrons, measured
