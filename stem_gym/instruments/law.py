"""An instrument whose sample obeys one of several laws, drawn with its parameters for each episode.

Pulses, waits and controls act on the site where the probe is parked; what a measurement gives is the law's value there,
times the site's factor, with noise that grows until it is tuned. Numbers alone: thousands of rows run side by side.

Truth of a row: a law, its parameters, the factors of its sites, and when it was last tuned. A value at a site after a
pulse is what the law says; where sites remember, the largest of what it said since the site was fresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from stem_gym.core.batch import take, write, write_sum
from stem_gym.core.config import Config as Settings
from stem_gym.core.config import parse
from stem_gym.core.errors import ConfigError
from stem_gym.core.experiments import Enabling, Experiment
from stem_gym.core.hypotheses import NONE, Axis, LawSpec
from stem_gym.core.instructions import (
    Acquire,
    Blank,
    Instruction,
    Park,
    Pulse,
    Read,
    Reading,
    Scan,
    Set,
    Wait,
    no_dose,
    verb,
)
from stem_gym.core.instrument import Capabilities, Instrument, Limits
from stem_gym.core.streams import Streams
from stem_gym.core.units import ANG_PER_NM, ELECTRONS_PER_PC
from stem_gym.instruments.refereed import Refereed, RefereeSettings
from stem_gym.instruments.simulation import Simulation
from stem_gym.simulator.domain_pictures import PHASE, DomainPicture, domain_pictures
from stem_gym.simulator.laws import bind, bind_set, check_law

NOISE_FACTOR = "noise_factor"  # what can be read: by how much the noise has grown since tuning
_ONCE = Limits.one_of((1.0,))  # of a control that stands for a routine
_TIMES = Limits(1e-9, 1e7)


class Outside(Settings):
    """Truths that no law of the set describes."""

    share: float = Field(gt=0, le=1)
    """of the episodes"""
    laws: dict[str, LawSpec | None]
    """from which they are drawn evenly; null takes one of the variant's own away"""


class Config(Settings):
    """A sample that obeys a law."""

    kind: Literal["law"] = "law"
    """this instrument"""
    experiment: Experiment
    """laws, noise, sites and costs; the same section as the task's"""
    misdescribed: bool = False
    """whether the task may be told otherwise, to see what a wrong description costs"""
    outside: Outside | None = None
    """null: the truth is always in the set"""
    picture: DomainPicture | None = None
    """pictures of the domain by Scan with the channel "phase", instead of its size; null: numbers alone"""
    referee: RefereeSettings | None = None
    """gives the detector "belief"; null: what to believe is for the agent to work out"""
    current_pa: float = Field(50.0, gt=0, le=10000)
    """beam current during measurements"""
    dose_area_nm2: float = Field(1.0e6, gt=0)
    """area over which a measurement spreads its electrons"""


@dataclass
class _Rows:
    """Everything that belongs to a row."""

    law: Tensor  # (B,) int64, inside ones first
    parameters: Tensor  # (B, P) of all laws, one after the other
    factor: Tensor  # (B, K) logarithm
    value: Tensor  # (B, K) what is at a site, without its factor
    fresh: Tensor  # (B, K) bool
    calibrated: Tensor  # (B, K) bool
    control: Tensor  # (B, D) axes that are set; others are not used
    site: Tensor  # (B,) int64
    place: Tensor  # (B, 2)
    untuned_s: Tensor  # (B,)


def make(settings: Mapping[str, Any], rows: int, device: torch.device) -> Instrument:
    """An instrument from the `instrument` section of a variant."""
    config = parse(Config, settings, "instrument")
    made = LawInstrument(config, rows, device)
    return made if config.referee is None else Refereed(made, config.experiment, config.referee)


class LawInstrument(Simulation[_Rows]):
    """Executes Park, Pulse, Wait, Set, Acquire, Read and Blank, as far as its experiments need them."""

    title = "The instrument that obeys a law"

    def __init__(self, config: Config, rows: int, device: torch.device | str = "cpu") -> None:
        super().__init__(rows, device)
        self.config = config
        experiment = config.experiment
        experiment.check()
        self._experiment, laws = experiment, experiment.law_set
        self._inside = list(bind_set(laws).values())
        self._outside = [bind(name, spec, laws.axes) for name, spec in _outside(config).items()]
        for one in self._outside:
            check_law(one, laws)
        self._laws = [*self._inside, *self._outside]
        self._axes = laws.axes
        self._sites = experiment.sites.count if experiment.sites else 1
        self.capabilities = _capabilities(config)
        self._handlers = {
            Park: self._park,
            Pulse: self._pulse,
            Wait: self._wait,
            Set: self._set,
            Acquire: self._acquire,
            Scan: self._scan,
            Read: self._read,
            Blank: lambda blank: no_dose(blank, torch.zeros(len(blank.rows), device=self.device)),
        }

    def _book(self, reading: Reading) -> None:
        """Time makes the noise grow."""
        if self._experiment.noise.growth_s is not None:
            write_sum(self._now.untuned_s, reading.rows, reading.seconds)

    def truth(self) -> Mapping[str, Tensor]:
        """`answer` (B,) int64, which of the set's answers is true; `law` (B,), of all laws; `site_factor` (B, K)."""
        state = self._now
        return {
            "answer": state.law.clamp(max=len(self._inside)),
            "law": state.law,
            "site_factor": state.factor,
        }

    def _fresh(self, streams: Streams, rows: Tensor) -> _Rows:
        count, sites, device = len(rows), self._sites, self.device
        drawn = streams.uniform(rows, (3,))
        # In double precision: single differs in its last digit with the size of the batch.
        normal = streams.normal(rows, (sum(len(one.parameters) for one in self._laws) + sites,)).double()
        inside, outside = len(self._inside), len(self._outside)
        law = (drawn[:, 0] * inside).long().clamp(max=inside - 1)
        if self.config.outside is not None:
            other = inside + (drawn[:, 0] * outside).long().clamp(max=outside - 1)
            law = torch.where(drawn[:, 1] < self.config.outside.share, other, law)
        columns = []
        for one, z in zip(
            self._laws, normal.split([len(one.parameters) for one in self._laws] + [sites], 1)[:-1], strict=True
        ):
            columns += list(one.values(z).values())
        first_s, last_s = self._experiment.noise.untuned_s
        spread = self._experiment.sites.factor if self._experiment.sites else 0.0
        controls = [float(axis.grid()[0]) for axis in self._axes]
        double = torch.float64
        return _Rows(
            law=law,
            parameters=torch.stack(columns, dim=1),
            factor=spread * normal[:, -sites:],
            value=torch.zeros(count, sites, dtype=double, device=device),
            fresh=torch.ones(count, sites, dtype=torch.bool, device=device),
            calibrated=torch.zeros(count, sites, dtype=torch.bool, device=device),
            control=torch.tensor(controls, device=device).expand(count, -1),
            site=torch.zeros(count, dtype=torch.int64, device=device),
            place=torch.full((count, 2), 0.5, device=device),
            untuned_s=first_s + (last_s - first_s) * drawn[:, 2].double(),
        )

    def _park(self, park: Park) -> Reading:
        state, rows = self._now, park.rows
        place = torch.stack((park.x, park.y), dim=1)
        write(state.place, rows, place)
        if self._experiment.sites is None:  # wherever it is, nothing was done there
            write(state.fresh, rows, torch.ones(len(rows), 1, dtype=torch.bool, device=self.device))
            write(state.value, rows, torch.zeros(len(rows), 1, dtype=torch.float64, device=self.device))
            return no_dose(park, torch.zeros(len(rows), device=self.device), {"place": place})
        site = (park.x * self._sites).long().clamp(max=self._sites - 1)
        moved = (site != take(state.site, rows)).float()
        write(state.site, rows, site)
        return no_dose(park, moved * self._experiment.sites.move_s, {"place": place})

    def _pulse(self, pulse: Pulse) -> Reading:
        self._act(pulse.rows, {"Pulse.bias_v": pulse.bias_v, "Pulse.time_s": pulse.time_s})
        return no_dose(pulse, pulse.time_s)

    def _wait(self, wait: Wait) -> Reading:
        if any(axis.does == "Wait.time_s" for axis in self._axes):
            self._act(wait.rows, {"Wait.time_s": wait.time_s})
        return no_dose(wait, wait.time_s)

    def _set(self, instruction: Set) -> Reading:
        state, rows, name = self._now, instruction.rows, instruction.name
        answer = {name: instruction.value}
        routine = self._experiment.enabling.get(name)
        if routine is not None:
            self._do(routine, rows)
            return no_dose(instruction, torch.full((len(rows),), routine.seconds, device=self.device), answer)
        column = [axis.name for axis in self._axes].index(name)
        before = take(state.control, rows)
        changed = (instruction.value - before[:, column]).abs() > 1e-5 * instruction.value.abs()
        now = before.clone()
        now[:, column] = instruction.value
        write(state.control, rows, now)
        return no_dose(instruction, changed * self._experiment.settle_s.get(name, 0.0), answer)

    def _do(self, routine: Enabling, rows: Tensor) -> None:
        """What is seen of it afterwards; a routine ends tuned, whatever time it took."""
        state = self._now
        if routine.does == "tune":
            start_s = torch.full((len(rows),), -routine.seconds, dtype=torch.float64, device=self.device)
            write(state.untuned_s, rows, start_s)
            return
        here = torch.nn.functional.one_hot(take(state.site, rows), self._sites).bool()
        if routine.does == "erase":
            write(state.fresh, rows, take(state.fresh, rows) | here)
            write(state.value, rows, take(state.value, rows).masked_fill(here, 0.0))
        else:
            write(state.calibrated, rows, take(state.calibrated, rows) | here)

    def _acquire(self, acquire: Acquire) -> Reading:
        measured, calibration = self._measured(acquire.rows)
        return self._reading(acquire, acquire.exposure_s, {acquire.detector: measured.float()}, calibration)

    def _scan(self, scan: Scan) -> Reading:
        """A picture of the domain in contrast, 0 outside and 1 inside; the scatter of its size is a measurement's."""
        picture = self.config.picture or DomainPicture()
        rows, (height, width) = scan.rows, scan.shape
        radius_nm, calibration = self._measured(rows)
        drawn = self._streams.normal(rows, (2 + height * width,)).double()
        fov_nm, middle_nm = scan.fov_ang.double() / ANG_PER_NM, picture.jitter_nm * drawn[:, :2]
        contrast = domain_pictures(radius_nm.clamp(min=0.0), middle_nm, fov_nm, scan.shape, picture)
        images = contrast + picture.noise * drawn[:, 2:].reshape(contrast.shape)
        electrons = self.config.current_pa * ELECTRONS_PER_PC * scan.dwell_s
        calibration |= {
            "electrons_per_pixel": electrons,
            "counts_per_electron": 1.0 / electrons,
            "counts_offset": torch.zeros_like(electrons),
        }
        return self._reading(
            scan, scan.dwell_s * (height * width), {"images": images.float().unsqueeze(1)}, calibration
        )

    def _measured(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What a measurement at the present site of `rows` gives (n,), and what its noise is like."""
        state, experiment = self._now, self._experiment
        if all(axis.does == "Set" for axis in self._axes):
            self._act(rows, {})  # nothing else acts: the sample shows what the controls do to it
        site = take(state.site, rows).unsqueeze(1)
        bare = take(state.value, rows).gather(1, site).squeeze(1)
        factor = take(state.factor, rows).gather(1, site).squeeze(1)
        factor = torch.where(take(state.calibrated, rows).gather(1, site).squeeze(1), torch.zeros_like(factor), factor)
        value = bare + factor if experiment.law_set.logarithmic else bare * torch.exp(factor)
        noise_factor = self._noise_factor(rows)
        measured = value + experiment.noise_sd(value, noise_factor) * self._streams.normal(rows, (1,)).squeeze(1)
        told = noise_factor.float()
        return measured, {
            NOISE_FACTOR: told,
            "noise_absolute": torch.full_like(told, experiment.noise.absolute),
            "noise_relative": torch.full_like(told, experiment.noise.relative),
        }

    def _reading(
        self, instruction: Instruction, seconds: Tensor, data: dict[str, Tensor], calibration: dict[str, Tensor]
    ) -> Reading:
        electrons = self.config.current_pa * ELECTRONS_PER_PC * seconds
        return Reading(
            verb(instruction),
            instruction.rows,
            seconds,
            electrons,
            electrons / (100.0 * self.config.dose_area_nm2),
            data=data | {"place": take(self._now.place, instruction.rows).clone()},
            calibration=calibration,
        )

    def _read(self, read: Read) -> Reading:
        state, rows = self._now, read.rows
        if read.name == NOISE_FACTOR:
            value = self._noise_factor(rows).float()
        elif read.name in self._experiment.enabling:
            value = torch.ones(len(rows), device=self.device)  # the only value that it takes
        else:
            value = take(state.control, rows)[:, [axis.name for axis in self._axes].index(read.name)].clone()
        return no_dose(read, torch.zeros(len(rows), device=self.device), {"value": value})

    def _noise_factor(self, rows: Tensor) -> Tensor:
        growth_s, untuned_s = self._experiment.noise.growth_s, take(self._now.untuned_s, rows)
        return torch.ones_like(untuned_s) if growth_s is None else torch.exp(untuned_s / growth_s)

    def _act(self, rows: Tensor, given: Mapping[str, Tensor]) -> None:
        """Let the law say what is at the site of each row after `given`, with the controls as they are."""
        state = self._now
        control = take(state.control, rows)
        axes = {axis.name: given.get(axis.does, control[:, i]).double() for i, axis in enumerate(self._axes)}
        index = take(state.law, rows)
        parameters = take(state.parameters, rows)
        said = []
        first = 0
        for one in self._laws:
            own = {name: parameters[:, first + i] for i, name in enumerate(one.parameters)}
            said.append(one.law(axes, **own))
            first += len(one.parameters)
        value = torch.stack(said, dim=1).gather(1, index.unsqueeze(1))  # (n, 1)
        site = take(state.site, rows).unsqueeze(1)
        here, fresh = take(state.value, rows), take(state.fresh, rows)
        if self._experiment.sites and self._experiment.sites.remembers:
            before = here.gather(1, site)
            value = torch.where(fresh.gather(1, site), value, torch.maximum(before, value))
        write(state.value, rows, here.scatter(1, site, value))
        write(state.fresh, rows, fresh.scatter(1, site, torch.zeros_like(site, dtype=torch.bool)))


def _outside(config: Config) -> dict[str, LawSpec]:
    if config.outside is None:
        return {}
    laws = {name: spec for name, spec in config.outside.laws.items() if spec is not None}
    if not laws:
        raise ConfigError("outside.laws: there is none left to draw from; name one, or leave `outside` out.")
    if taken := sorted(laws.keys() & {*config.experiment.law_set.laws, NONE}):
        raise ConfigError(f"outside.laws: {', '.join(taken)} is a name of the set; nothing outside may be called so.")
    return laws


def _capabilities(config: Config) -> Capabilities:
    experiment = config.experiment
    axes = experiment.law_set.axes
    done = {axis.does.partition(".")[0] for axis in axes}
    shown = config.picture is not None
    if shown and experiment.law_set.quantity != "radius_nm":
        raise ConfigError(f"picture: domains have a radius_nm; {experiment.law_set.name} measures another quantity.")
    verbs = (
        {"Park", "Wait", "Scan" if shown else "Acquire", "Read", "Blank"}
        | done
        | ({"Set"} if experiment.enabling else set())
    )
    settable = {axis.name: _limits(axis) for axis in axes if axis.does == "Set"}
    limits: dict[str, Limits] = {axis.does: _limits(axis) for axis in axes if axis.does != "Set"}
    return Capabilities(
        verbs=frozenset(verbs),
        detectors=frozenset({PHASE if shown else experiment.law_set.quantity}),
        settable={**settable, **dict.fromkeys(experiment.enabling, _ONCE)},
        readable=frozenset({NOISE_FACTOR}),
        limits={
            "Park.x": Limits(0.0, 1.0),
            "Park.y": Limits(0.0, 1.0),
            "Wait.time_s": _TIMES,
            "Acquire.exposure_s": _TIMES,
            "Scan.dwell_s": Limits(1e-6, 10.0),
            "Scan.region": Limits(0.0, 1.0),
            "Scan.fov_ang": Limits(100.0, 1e6),
            **limits,
        },
        simulated=True,
        told={} if config.misdescribed else {"experiment": experiment.model_dump(mode="json")},
    )


def _limits(axis: Axis) -> Limits:
    if axis.values:
        return Limits.one_of(axis.values)
    return Limits(*axis.ends())
