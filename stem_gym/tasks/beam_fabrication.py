"""Beam fabrication: drive dopants through a sheet with the beam, and assemble them, without breaking it.

This file is longer than 400 lines because a task is one file: its settings, its state, its manual and its rules.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from gymnasium import spaces
from pydantic import Field
from torch import Tensor
from torch.linalg import vector_norm

from stem_gym.core.batch import add, changed, every_row, filled, put, put_rows, rows_where, take, take_rows
from stem_gym.core.config import Config
from stem_gym.core.errors import ConfigError
from stem_gym.core.instructions import ATOMS, Dwell, Instruction, Park, Reading, Scan, Set, TraceRule, full_frames
from stem_gym.core.instrument import Capabilities
from stem_gym.core.periodic import nearest_image
from stem_gym.core.task import Marks, Needs, Observation, Score, Task

BOND_ANG = 1.42  # of graphene; what "half a bond" is measured in
SCALE_ANG = 10.0  # lengths are told in this unit
FAR_ANG = 1e6
_RECENTRE_ANG = 3.0  # from an edge of the frame: the beam beside an atom is still inside it
_WORTH_ANG = 1.0  # a frame is recentred where that brings the atoms so much farther from its edge
TERMS = ("reward_progress", "reward_success", "reward_time", "reward_damage")
_BEAM_SHIFT = ("beam_shift_x_ang", "beam_shift_y_ang")

# Named patterns: sites (n, m, sublattice) of a honeycomb with lattice vectors between second neighbours.
PATTERNS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "dimer": ((0, 0, 0), (0, 0, 1)),
    "trimer": ((0, 0, 0), (0, 0, 1), (1, 0, 0)),
    "line4": ((0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)),
    "ring6": ((0, 0, 0), (0, 0, 1), (1, 0, 0), (0, -1, 1), (0, -1, 0), (-1, -1, 1)),
}


class Stop(Config):
    """When a dwell stops by itself, on the live dark-field signal."""

    rise: float | None = Field(default=0.13, gt=0)
    """relative rise that means: it jumped under the beam"""
    fall: float | None = Field(default=0.04, gt=0, lt=1)
    """relative fall that means: the beam drifted off"""


class BeamFabricationConfig(Config):
    """Settings of the task; what they mean to the agent is in the docstring of BeamFabrication."""

    kind: Literal["beam_fabrication"] = "beam_fabrication"
    """this task"""
    dopants: int = Field(ge=1, le=6)
    """how many atoms are to be brought to their sites"""
    pattern: str | tuple[tuple[int, int, int], ...] | None = None
    """a named pattern, or its sites (n, m, sublattice); null: one atom to a site drawn for the episode"""
    goal_ang: float = Field(default=50.0, gt=1.5)
    """farthest that a drawn site may be"""
    fov_ang: float = Field(gt=5, le=100)
    """side of a frame"""
    pixels: int = Field(default=64, ge=16, le=1024)
    """of a frame, along a side"""
    pixel_dwell_s: float = Field(gt=0)
    """of a frame"""
    reach_ang: float = Field(default=2.2, gt=0.5, le=10)
    """farthest that the beam is put from the followed atom, on each axis"""
    dwell_min_s: float = Field(gt=0)
    """shortest dwell"""
    dwell_max_s: float = Field(gt=0)
    """longest dwell; equal to the shortest where the agent has no choice"""
    dwells_s: tuple[float, ...] = ()
    """where given, actions are discrete: a neighbour and one of these dwells"""
    aim_bonds: float = Field(default=1.0, gt=0, le=2)
    """where a discrete action puts the beam, in bond lengths towards the neighbour"""
    image_full_scale: float | None = Field(default=None, gt=0)
    """collected fraction that is drawn as white; where given, the frame itself is observed as well"""
    skip_frames: bool = False
    """whether the agent may leave out the frame after a dwell"""
    trace: int = Field(default=8, ge=4, le=256)
    """samples of the dark-field signal of a dwell"""
    stop: Stop | None = None
    """rule that ends a dwell; null: none"""
    vacancies_max: int = Field(default=3, ge=0)
    """more carbon atoms knocked out than this, and the sheet counts as broken"""
    progress_weight: float = Field(ge=0)
    """reward per bond length nearer"""
    success_weight: float = Field(ge=0)
    """reward at the goal"""
    time_weight: float = Field(ge=0)
    """reward lost per minute"""
    damage_weight: float = Field(ge=0)
    """reward lost per carbon atom knocked out, and per dopant lost"""
    discount_s: float = Field(default=300.0, gt=0)
    """time over which future reward falls to 1/e, for learners that discount by microscope time: `discount` in info"""
    energies_kev: tuple[float, ...] = Field(default=(), exclude_if=lambda value: not value)
    """where given, an action also chooses the beam energy among these; an episode begins with the first"""
    recentre_ang: float | None = Field(default=_RECENTRE_ANG, ge=0, exclude_if=lambda value: value == _RECENTRE_ANG)
    """the beam shift follows the sample when an atom comes so near to an edge of the frame; null: never"""
    scores_from: Literal["truth", "perception"] = "truth"
    """what the reward is made of where both are known; an instrument without truth always gives perception"""


@dataclass(frozen=True)
class State:
    """One episode a row. Places are in Å from the middle of the first frame, moving with the sample."""

    chance: Tensor  # (B, 1) that draws the goal
    begun: Tensor  # (B,) bool, whether all atoms were seen and the goals are set
    atom_ang: Tensor  # (B, D, 2) as last seen
    bond_ang: Tensor  # (B, D, 3, 2) to their neighbours
    astray: Tensor  # (B, D) bool, whether the last frame did not show it
    goal_ang: Tensor  # (B, D, 2)
    energy: Tensor  # (B,) int64 which of the allowed ones; -1 where there is no choice
    shift_ang: Tensor  # (B, 2) of the sample in the frame since the first one, by drift and beam shift
    beam_shift_ang: Tensor  # (B, 2) as it was set
    drift_ang_per_s: Tensor  # (B, 2) between the last two frames
    clock_s: Tensor  # (B,)
    frame_s: Tensor  # (B,) when the last frame ended
    place: Tensor  # (B, 2) parked probe, fractions
    trace: Tensor  # (B, 4) last dwell in a few numbers
    image: Tensor  # (B, H, W) uint8 last frame; (B, 0) where frames are not observed
    origin_ang: Tensor  # (B, 2) middle of the first frame on the specimen, from truth
    known: Tensor  # (B,) bool, whether it was looked up
    left_seen_ang: Tensor  # (B,) sum of distances to the goals as perceived
    left_true_ang: Tensor  # (B,)
    lost_atoms: Tensor  # (B,) carbon knocked out
    goal_s: Tensor  # (B,) when the goal was reached, NaN before
    score_truth: Tensor  # (B,)
    score_perceived: Tensor  # (B,)


class BeamFabrication(Task[State]):
    """Bring dopants to their sites by parking the beam beside them; every electron may also break the sheet.

    A step parks the beam relative to the followed atom, opens it for a while, and takes a frame. The followed atom is
    the one nearest to a goal that is still free; drift since the last frame is led. Before an atom leaves the frame,
    the beam shift brings atoms and goals back to its middle, which costs the time of setting two controls.

    ## Action: `Box(-1, 1, (2 …))` or `Discrete(3 × dwells …)`

    | number | meaning |
    |---|---|
    | 0, 1 place | beam from the followed atom, in units of `reach_ang` (x, y) |
    | next: time | logarithmic from the shortest to the longest dwell; absent where they are equal |
    | next: energy | evenly from the first to the last of `energies_kev`; absent where there are none |
    | last: frame | ≥ 0: take a frame after the dwell; absent unless `skip_frames` |

    Discrete: neighbour + 3 × (dwell + dwells × (no frame + 2 × energy)); `no frame` is 1 where the frame is left out,
    and both it and the factor 2 are absent unless `skip_frames`. The beam goes `aim_bonds` towards the neighbour.
    Another energy than that of the step before is set first, and the column takes its time to settle.

    ## Observation: `Dict`

    | key | meaning |
    |---|---|
    | `goal` (2,) | from the followed atom to its goal, in 10 Å |
    | `bonds` (3, 2) | from the followed atom to its neighbours, in bond lengths, in the order that actions name them |
    | `atoms` (D, 2) | all atoms, from the followed one, in 10 Å |
    | `goals` (D, 2) | all goals, likewise |
    | `trace` (4,) | last dwell: last quarter / first − 1, highest / first − 1, part of the time used, time / longest |
    | `frame` (3,) | age of the frame / 10 s; drift x, y in Å/s |
    | `energy` (E,) | 1 for the energy of the beam, 0 for the others; only where there is a choice |
    | `image` (1, H, W) | uint8: the last frame (255 = `image_full_scale`); only where that is given |
    | `budget` (3,) | what is left of steps, seconds and electrons |

    ## Reward

    `progress_weight` × bond lengths nearer to the goals (summed over atoms) + `success_weight` at the goal
    − `time_weight` × minutes − `damage_weight` × (carbon atoms knocked out + dopants lost); each term is in `info`.

    ## Start and end

    A full frame is taken first, and paid for. One atom: the goal is drawn evenly over the lattice sites inside the
    first frame and within `goal_ang`. A pattern is laid about the middle of the atoms. The episode ends when every goal
    has an atom within half a bond, when an atom is lost, when the sheet is broken, or with the budget.

    Version 0: first release.
    """

    Config = BeamFabricationConfig
    chances: ClassVar[int] = 1

    def __init__(self, config: BeamFabricationConfig) -> None:
        self.config: BeamFabricationConfig = config
        self._pattern = _pattern(config)
        _check(config)
        self._channels = (ATOMS,) if config.image_full_scale is None else (ATOMS, "haadf")
        self._image_shape = (0,) if config.image_full_scale is None else (config.pixels, config.pixels)
        controls = frozenset((*_BEAM_SHIFT,) if config.recentre_ang is not None else ())
        controls |= {"energy_kev"} if config.energies_kev else set()
        verbs = frozenset({"Scan", "Park", "Dwell", *(("Set",) if controls else ())})
        self.needs = Needs(verbs, frozenset(self._channels), config.dopants, controls)
        farthest_ang = config.fov_ang * 2.0**0.5  # two places of a frame; rows of cells are one and a half bonds apart
        self._cells_aside = math.ceil(farthest_ang / (1.5 * BOND_ANG)) + 1
        self._has_time = config.dwell_min_s < config.dwell_max_s
        energies = len(config.energies_kev)
        numbers = 2 + int(self._has_time) + int(config.skip_frames) + int(energies > 0)
        self.action_space = (
            spaces.Discrete(3 * len(config.dwells_s) * (1 + config.skip_frames) * max(energies, 1))
            if config.dwells_s
            else spaces.Box(-1.0, 1.0, (numbers,), np.float32)
        )
        atoms = config.dopants
        self.observation_space = spaces.Dict(
            {
                "goal": spaces.Box(-10.0, 10.0, (2,), np.float32),
                "bonds": spaces.Box(-2.0, 2.0, (3, 2), np.float32),
                "atoms": spaces.Box(-10.0, 10.0, (atoms, 2), np.float32),
                "goals": spaces.Box(-10.0, 10.0, (atoms, 2), np.float32),
                "trace": spaces.Box(-1.0, 10.0, (4,), np.float32),
                "frame": spaces.Box(-5.0, 5.0, (3,), np.float32),
            }
        )
        if energies:
            chosen = spaces.Box(0.0, 1.0, (energies,), np.float32)
            self.observation_space = spaces.Dict({**self.observation_space.spaces, "energy": chosen})
        if config.image_full_scale is not None:
            image = spaces.Box(0, 255, (1, config.pixels, config.pixels), np.uint8)
            self.observation_space = spaces.Dict({**self.observation_space.spaces, "image": image})
        stop = config.stop
        self._rule = TraceRule(stop.rise, stop.fall, baseline_samples=1, window_samples=1) if stop else None

    def fitted(self, capabilities: Capabilities) -> BeamFabrication:
        """In machine code where the instrument is."""
        if not capabilities.compiled:
            return self
        from stem_gym.tasks._compiled_fabrication import CompiledFabrication  # numba is needed only there

        return CompiledFabrication(self.config)

    def start(self, rows: int, device: torch.device) -> State:
        """Nothing seen."""
        zero, pair = torch.zeros(rows, device=device), torch.zeros(rows, 2, device=device)
        atoms = torch.zeros(rows, self.config.dopants, 2, device=device)
        no = torch.zeros(rows, dtype=torch.bool, device=device)
        return State(
            chance=torch.zeros(rows, 1, device=device),
            begun=no,
            atom_ang=atoms,
            bond_ang=torch.zeros(rows, self.config.dopants, 3, 2, device=device),
            astray=torch.zeros(rows, self.config.dopants, dtype=torch.bool, device=device),
            goal_ang=atoms,
            energy=torch.full((rows,), len(self.config.energies_kev[:1]) - 1, device=device),
            shift_ang=pair,
            beam_shift_ang=pair,
            drift_ang_per_s=pair,
            clock_s=zero,
            frame_s=zero,
            place=pair + 0.5,
            trace=torch.zeros(rows, 4, device=device),
            image=torch.zeros(rows, *self._image_shape, dtype=torch.uint8, device=device),
            origin_ang=pair,
            known=no,
            left_seen_ang=zero,
            left_true_ang=zero,
            lost_atoms=zero,
            goal_s=zero + torch.nan,
            score_truth=zero,
            score_perceived=zero,
        )

    def take_chance(self, state: State, chance: Tensor) -> State:
        """The uniform (n, 1) that will draw the goal."""
        return changed(state, chance=chance)

    def opening(self, state: State, rows: Tensor) -> Sequence[Instruction]:
        """One full frame, at the first energy where there is a choice."""
        return [*self._set_energy(rows, torch.zeros_like(rows)), self._scan(rows)]

    def plan(self, state: State, action: Tensor, rows: Tensor) -> Sequence[Instruction]:
        """Recentre the frame where it is time to, park and dwell beside the followed atom; then a frame, if wanted."""
        config = self.config
        mine, action = take_rows(state, rows), take(action, rows)
        mine, instructions = self._recentre(mine, rows)
        followed, _ = self._follow(mine)
        offset, dwell_s, wanted, energy = self._meaning(action, _of(mine.bond_ang, followed))
        other = rows_where(energy != mine.energy) if self.config.energies_kev else energy[:0]
        instructions += self._set_energy(rows[other], energy[other])
        lead_s = (mine.clock_s - mine.frame_s + 0.5 * dwell_s).unsqueeze(1)
        middle = _of(mine.atom_ang, followed) + mine.shift_ang + mine.drift_ang_per_s * lead_s
        place = ((middle + offset) / config.fov_ang + 0.5).clamp(0.0, 1.0)
        instructions += [Park(rows, *place.unbind(1)), Dwell(rows, dwell_s, trace=config.trace, stop=self._rule)]
        framed = take(rows, rows_where(wanted))
        return [*instructions, self._scan(framed)] if len(framed) else instructions

    def observe(self, state: State, readings: Sequence[Reading]) -> tuple[State, Observation]:
        """The operator's view after the readings."""
        for reading in readings:
            rows, clock_s = reading.rows, add(state.clock_s, reading.rows, reading.seconds)
            if reading.verb == "Dwell":
                place, trace = put(state.place, rows, reading.data["place"]), self._tell_trace(reading)
                state = changed(state, clock_s=clock_s, place=place, trace=put(state.trace, rows, trace))
                continue
            state = changed(state, clock_s=clock_s)
            if reading.verb == "Scan":
                state = put_rows(state, rows, self._see_frame(take_rows(state, rows), reading))
            elif reading.verb == "Set":
                state = self._see_controls(state, rows, reading.data)
        return state, self._observation(state)

    def score(self, state: State, readings: Sequence[Reading], truth: Mapping[str, Tensor]) -> tuple[State, Score]:
        """Reward, end and metrics, from truth where there is some and from perception where not."""
        config = self.config
        by_truth = bool(truth) and config.scores_from == "truth"
        minutes = _seconds(readings, state.clock_s) / 60.0
        seen_ang = self._distances(state, state.atom_ang, state.goal_ang, None)
        reached_seen = state.begun & (seen_ang < 0.5 * BOND_ANG).all(1)
        left_seen = seen_ang.sum(1)
        nearer_seen = (state.left_seen_ang - left_seen).masked_fill(~(state.left_seen_ang > 0.0), 0.0)
        lost = torch.zeros_like(state.lost_atoms)
        gone = torch.zeros_like(state.begun)
        reached, nearer, left_true = reached_seen, nearer_seen, left_seen
        if truth:
            state = self._look_up(state, truth)
            true_ang = self._true_distances(state, truth)
            reached = state.begun & (true_ang < 0.5 * BOND_ANG).all(1)
            left_true = true_ang.clamp(max=2.0 * config.fov_ang).sum(1)
            lost = truth["lost_atoms"].float()
            gone = truth["dopant_there"].sum(1) < config.dopants
            counts = (state.left_true_ang > 0.0) & ~gone
            nearer = (state.left_true_ang - left_true).masked_fill(~counts, 0.0)
        damage = (lost - state.lost_atoms) + gone.float()
        success, success_seen = reached.float(), reached_seen.float()
        told = (nearer, success, minutes, damage), (nearer_seen, success_seen, minutes, torch.zeros_like(minutes))
        terms = torch.stack([part for parts in told for part in parts]).view(2, 4, -1) * self._weights(minutes.device)
        rewards = terms.sum(1)
        state = changed(
            state,
            left_seen_ang=left_seen,
            left_true_ang=left_true,
            lost_atoms=lost,
            goal_s=torch.where(reached & state.goal_s.isnan(), state.clock_s, state.goal_s),
            score_truth=state.score_truth + rewards[0],
            score_perceived=state.score_perceived + rewards[1],
        )
        broken = lost > config.vacancies_max
        metrics = {
            **dict(zip(TERMS, terms[0 if by_truth else 1], strict=True)),
            "success": success,
            "success_perceived": success_seen,
            "distance_ang": left_true if truth else left_seen,
            "distance_perceived_ang": left_seen,
            "goal_s": state.goal_s,
            "discount": torch.exp(-60.0 * minutes / config.discount_s),
            "score_perceived": state.score_perceived,
        }
        if truth:
            metrics |= {
                "score_truth": state.score_truth,
                "jumps": truth["jumps"].float(),
                "lost_atoms": lost,
                "lost_dopant": gone.float(),
                "broken": broken.float(),
            }
        ended = reached | gone | broken if by_truth else reached_seen
        return state, Score(rewards[0] if by_truth else rewards[1], ended, metrics)

    def marks(self, state: State, truth: Mapping[str, Tensor]) -> Marks:
        """Probe and goals, on the frame or on a sketch of what the software found in it."""
        fov, shift = self.config.fov_ang, state.shift_ang.unsqueeze(1)
        goals = torch.where(state.begun[:, None, None], (state.goal_ang + shift) / fov + 0.5, torch.nan)
        frame = state.image.float() / 255.0 if state.image.dim() == 3 else self._sketch(state)
        region = full_frames(len(goals), goals.device)
        return Marks(state.place, state.place.unsqueeze(1), goals, frame, region)

    def _sketch(self, state: State) -> Tensor:
        """Found atoms as bright spots on a faint lattice, (B, H, W) from 0 to 1."""
        config, shift = self.config, state.shift_ang.unsqueeze(1)
        cells, along = _cells(state.atom_ang[:, 0], state.bond_ang[:, 0], self._cells_aside)
        places = torch.cat((cells, cells + along, state.atom_ang), dim=1) + shift  # (B, N, 2)
        weight = torch.full(places.shape[:2], 0.25, device=places.device)
        weight[:, -config.dopants :] = 1.0
        pixel_ang = config.fov_ang / config.pixels
        centre = (torch.arange(config.pixels, device=places.device) + 0.5) * pixel_ang - 0.5 * config.fov_ang
        spots = torch.exp(-0.5 * ((centre - places.unsqueeze(-1)) / (0.3 * BOND_ANG)).square())  # (B, N, 2, pixels)
        drawn = torch.bmm((spots[:, :, 1] * weight.unsqueeze(2)).transpose(1, 2), spots[:, :, 0])
        return drawn.clamp(max=1.0) * state.begun[:, None, None]

    def _recentre(self, state: State, rows: Tensor) -> tuple[State, list[Instruction]]:
        """The state after, and the instructions for, bringing atoms and goals of `rows` (n,) to the frame's middle."""
        margin_ang = self.config.recentre_ang
        atoms = state.atom_ang + state.shift_ang.unsqueeze(1)  # (n, D, 2) in the frame
        out = atoms.flatten(1).abs().amax(1)
        if margin_ang is None or not bool((near := out > 0.5 * self.config.fov_ang - margin_ang).any()):
            return state, []
        close = rows_where(near & state.begun)
        atoms, out = take(atoms, close), take(out, close)
        both = torch.cat((atoms, take(state.goal_ang, close) + take(state.shift_ang, close).unsqueeze(1)), dim=1)
        middle = 0.5 * (both.amin(1) + both.amax(1))
        due = rows_where((atoms - middle.unsqueeze(1)).flatten(1).abs().amax(1) < out - _WORTH_ANG)
        if len(due) == 0:
            return state, []
        which, step = take(close, due), take(middle, due)
        beam_shift = state.beam_shift_ang.index_add(0, which, step)
        state = changed(state, shift_ang=state.shift_ang.index_add(0, which, -step), beam_shift_ang=beam_shift)
        each = take(beam_shift, which).unbind(1)
        return state, [Set(take(rows, which), name, value) for name, value in zip(_BEAM_SHIFT, each, strict=True)]

    def _see_controls(self, state: State, rows: Tensor, data: Mapping[str, Tensor]) -> State:
        """The state after a control of `rows` (n,) was set, as the instrument reads it back."""
        shift, beam_shift, energy = state.shift_ang, state.beam_shift_ang, state.energy
        for axis, name in enumerate(_BEAM_SHIFT):
            if name in data:
                one = torch.eye(2, device=shift.device)[axis]
                step = one * (data[name].unsqueeze(1) - take(beam_shift, rows))
                shift, beam_shift = add(shift, rows, -step), add(beam_shift, rows, step)
        if "energy_kev" in data:
            allowed = torch.tensor(self.config.energies_kev, device=shift.device)
            energy = put(energy, rows, (data["energy_kev"].unsqueeze(1) - allowed).abs().argmin(1))
        return changed(state, shift_ang=shift, beam_shift_ang=beam_shift, energy=energy)

    def _set_energy(self, rows: Tensor, energy: Tensor) -> list[Instruction]:
        """Set the allowed energies with these numbers (n,), on rows that there may be none of."""
        if len(rows) == 0 or not self.config.energies_kev:
            return []
        allowed = torch.tensor(self.config.energies_kev, device=rows.device)
        return [Set(rows, "energy_kev", allowed[energy])]

    def _scan(self, rows: Tensor) -> Scan:
        config = self.config
        n, device = rows.shape[0], rows.device
        side, dwell_s = (filled(value, n, device) for value in (config.fov_ang, config.pixel_dwell_s))
        return Scan(rows, side, (config.pixels, config.pixels), dwell_s, full_frames(n, device), self._channels)

    def _meaning(self, action: Tensor, bond_ang: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Beam from the followed atom (n, 2) Å, dwell (n,) s, whether a frame is wanted (n,), which energy (n,)."""
        config, n = self.config, len(action)
        wanted = torch.ones(n, dtype=torch.bool, device=action.device)
        energy = torch.zeros(n, dtype=torch.int64, device=action.device)
        if config.dwells_s:
            dwells_s = torch.tensor(config.dwells_s, device=action.device)
            dwell, rest = action // 3 % len(dwells_s), action // (3 * len(dwells_s))
            if config.skip_frames:
                wanted, rest = rest % 2 == 0, rest // 2
            return config.aim_bonds * _of(bond_ang, action % 3), dwells_s[dwell], wanted, rest
        if config.skip_frames:
            wanted = action[:, -1] >= 0.0
        if count := len(config.energies_kev):
            which = 0.5 * (action[:, 2 + int(self._has_time)] + 1.0) * count
            energy = which.long().clamp(0, count - 1)
        part = (0.5 * (action[:, 2] + 1.0)).clamp(0.0, 1.0) if self._has_time else torch.zeros_like(action[:, 0])
        dwell_s = config.dwell_min_s * (config.dwell_max_s / config.dwell_min_s) ** part
        return config.reach_ang * action[:, :2], dwell_s, wanted, energy

    def _follow(self, state: State) -> tuple[Tensor, Tensor]:
        """The followed atom (B,) and its goal (B,): the nearest pair of a free atom and a free goal."""
        if self.config.dopants == 1:
            only = torch.zeros(len(state.clock_s), dtype=torch.int64, device=state.clock_s.device)
            return only, only
        distance = (state.atom_ang.unsqueeze(2) - state.goal_ang.unsqueeze(1)).norm(dim=-1)  # (B, atoms, goals)
        there = distance < 0.5 * BOND_ANG
        taken = there.any(2).unsqueeze(2) | there.any(1).unsqueeze(1)
        best = (distance + FAR_ANG * taken).flatten(1).argmin(1)
        return best // self.config.dopants, best % self.config.dopants

    def _see_frame(self, state: State, reading: Reading) -> State:
        """The state of n rows after a frame: every found place goes to the known atom that it is nearest to."""
        config = self.config
        found = (reading.data[ATOMS] - 0.5) * config.fov_ang  # (n, D', 2), NaN where none
        bonds = reading.data["bonds_ang"]
        if found.shape[1] < config.dopants:
            raise ConfigError(f"task.dopants is {config.dopants}; the instrument tells at most {found.shape[1]} atoms.")
        step, begun, goal = reading.data["shift_ang"], state.begun, state.goal_ang
        if waiting := not bool(begun.all()):
            first = ~begun & (state.frame_s <= 0.0)
            step = step.masked_fill(first.unsqueeze(1), 0.0)
        shift = state.shift_ang + step
        seen = found - shift.unsqueeze(1)
        atom, bond, astray = _track(state, seen, bonds)
        if waiting:
            leftmost, their_bonds = seen[:, : config.dopants], bonds[:, : config.dopants]
            fresh = ~begun & leftmost.isfinite().all(-1).all(1)
            atom = torch.where(fresh.view(-1, 1, 1), leftmost, atom)
            bond = torch.where(fresh.view(-1, 1, 1, 1), their_bonds, bond)
            if len(which := rows_where(fresh)):
                goal = put(goal, which, self._goals(take(atom, which), take(bond, which), take(state.chance, which)))
            astray, begun = astray & begun.unsqueeze(1), begun | fresh
        since_s = (state.clock_s - state.frame_s).clamp(min=1e-3).unsqueeze(1)
        return changed(
            state,
            begun=begun,
            atom_ang=atom,
            bond_ang=bond,
            astray=astray,
            goal_ang=goal,
            shift_ang=shift,
            drift_ang_per_s=step / since_s,
            frame_s=state.clock_s,
            image=_drawn(reading, config.image_full_scale) if config.image_full_scale else state.image,
        )

    def _goals(self, atom_ang: Tensor, bond_ang: Tensor, chance: Tensor) -> Tensor:
        """Goals (n, D, 2) on the lattice of the first atom."""
        config, first, bonds = self.config, atom_ang[:, 0], bond_ang[:, 0]
        room = 0.5 * config.fov_ang
        if self._pattern is None:
            x, y = (_sites(first, bonds, self._cells_aside, axis) for axis in (0, 1))
            square = (x - first[:, :1]).square() + (y - first[:, 1:]).square()
            allowed = (torch.maximum(x.abs(), y.abs()) < room) & (square <= config.goal_ang**2)
            allowed &= square > (0.5 * BOND_ANG) ** 2
            reached = torch.cumsum(allowed.float(), dim=1)
            pick = (reached <= chance * reached[:, -1:]).sum(1, keepdim=True).clamp(max=x.shape[1] - 1)
            return torch.stack((x.gather(1, pick), y.gather(1, pick)), dim=-1)
        cells, bond = _cells(first, bonds, self._cells_aside)
        pattern = torch.tensor(self._pattern, device=first.device, dtype=first.dtype)
        along, across = _vectors(bonds)
        offset = pattern[:, :1] * along + pattern[:, 1:2] * across + pattern[:, 2:] * bond  # (n, D, 2)
        places = cells.unsqueeze(2) + offset.unsqueeze(1)  # (n, C, D, 2)
        inside = (places.abs() < room - BOND_ANG).all(-1).all(2)
        away = (places.mean(2) - atom_ang.mean(1, keepdim=True)).norm(dim=-1)
        best = torch.where(inside, away, away + FAR_ANG).argmin(1)
        return _of(places, best)

    def _tell_trace(self, reading: Reading) -> Tensor:
        """The last dwell in four numbers (n, 4)."""
        trace = reading.data["trace"].float()
        samples = trace.shape[1]
        first = trace[:, 0].clamp(min=1.0)
        time = reading.seconds / self.config.dwell_max_s
        if not bool(trace[:, -1].isnan().any()):  # all of it is there
            last, used = trace[:, samples - max(samples // 4, 1) :].mean(1), torch.ones_like(time)
        else:
            count = trace.isfinite().sum(1)
            order = torch.arange(samples, device=trace.device)
            late = (order >= (count - (count // 4).clamp(min=1)).unsqueeze(1)) & trace.isfinite()
            trace = trace.nan_to_num()
            last, used = (trace * late).sum(1) / late.sum(1).clamp(min=1), count / samples
        return torch.stack((last / first - 1.0, trace.amax(1) / first - 1.0, used, time), dim=1)

    def _observation(self, state: State) -> Observation:
        followed, goal = self._follow(state)
        here = _of(state.atom_ang, followed)
        begun = state.begun.float().view(-1, 1)
        atoms, goals = ((places - here.unsqueeze(1)) / SCALE_ANG for places in (state.atom_ang, state.goal_ang))
        age = ((state.clock_s - state.frame_s) / 10.0).clamp(0.0, 5.0).unsqueeze(1)
        more = {"image": state.image.unsqueeze(1)} if state.image.dim() == 3 else {}
        if self.config.energies_kev:
            more["energy"] = torch.eye(len(self.config.energies_kev), device=here.device)[state.energy]
        return {
            **more,
            "goal": (_of(goals, goal) * begun).clamp(-10.0, 10.0),
            "bonds": (_of(state.bond_ang, followed) / BOND_ANG).clamp(-2.0, 2.0),
            "atoms": (atoms * begun.unsqueeze(2)).clamp(-10.0, 10.0),
            "goals": (goals * begun.unsqueeze(2)).clamp(-10.0, 10.0),
            "trace": state.trace.clamp(-1.0, 10.0),
            "frame": torch.cat((age, state.drift_ang_per_s.clamp(-5.0, 5.0)), dim=1),
        }

    def _distances(self, state: State, atom_ang: Tensor, goal_ang: Tensor, there: Tensor | None) -> Tensor:
        """(B, D) from each goal to its nearest atom that is there."""
        away = vector_norm(goal_ang.unsqueeze(2) - atom_ang.unsqueeze(1), dim=-1)
        return (away if there is None else torch.where(there.unsqueeze(1), away, FAR_ANG)).amin(2)

    def _look_up(self, state: State, truth: Mapping[str, Tensor]) -> State:
        """Where the first frame was on the specimen; once an episode, when the goals are set."""
        if bool(state.known.all()):
            return state
        fresh = (state.begun & ~state.known).unsqueeze(1)
        centre = truth["frame_centre_ang"] + state.shift_ang
        return changed(state, origin_ang=torch.where(fresh, centre, state.origin_ang), known=state.begun)

    def _true_distances(self, state: State, truth: Mapping[str, Tensor]) -> Tensor:
        goal = state.goal_ang + state.origin_ang.unsqueeze(1)
        delta = goal.unsqueeze(2) - truth["dopant_xy_ang"].unsqueeze(1)
        away = vector_norm(nearest_image(delta, truth["cell_ang"].view(-1, 1, 1, 2)), dim=-1)
        return away.masked_fill(~truth["dopant_there"].unsqueeze(1), FAR_ANG).amin(2)

    def _weights(self, device: torch.device) -> Tensor:
        """What the terms of the reward weigh, (4, 1)."""
        config = self.config
        nearer = config.progress_weight / BOND_ANG
        return _column((nearer, config.success_weight, -config.time_weight, -config.damage_weight), device)


@functools.cache
@torch.inference_mode(False)
def _column(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers (N, 1). Not to be written to."""
    return torch.tensor(values, device=device).unsqueeze(1)


def _track(state: State, seen_ang: Tensor, bonds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Atoms (n, D, 2) and bonds moved to the places (n, D', 2) seen nearest to them, and which (n, D) were not seen.

    Pairs in the order of distance. An atom that no place within two and a half bonds is left for stays where it was;
    if the next frame does not show it there either, it takes any place that is left.
    """
    atom_ang, bond_ang = state.atom_ang, state.bond_ang
    reach_ang = torch.where(state.astray, 0.5 * FAR_ANG, 2.5 * BOND_ANG)
    if atom_ang.shape[1] == seen_ang.shape[1] == 1:  # no choice
        near = vector_norm(atom_ang - seen_ang, dim=-1) < reach_ang  # false where nothing is seen
        turned = torch.where(near.view(-1, 1, 1, 1), bonds, bond_ang)
        return torch.where(near.unsqueeze(2), seen_ang, atom_ang), turned, ~near
    distance = vector_norm(atom_ang.unsqueeze(2) - seen_ang.unsqueeze(1), dim=-1).nan_to_num(nan=FAR_ANG)
    row = every_row(len(atom_ang), atom_ang.device)
    atom_ang, bond_ang, missing = atom_ang.clone(), bond_ang.clone(), torch.ones_like(state.astray)
    for _ in range(atom_ang.shape[1]):
        best = distance.flatten(1).argmin(1)
        atom, place = best // distance.shape[2], best % distance.shape[2]
        near = (distance[row, atom, place] < reach_ang[row, atom]).unsqueeze(1)
        missing[row, atom] &= ~near.squeeze(1)
        moved = torch.where(near, seen_ang[row, place], atom_ang[row, atom])
        turned = torch.where(near.unsqueeze(2), bonds[row, place], bond_ang[row, atom])
        atom_ang[row, atom], bond_ang[row, atom] = moved, turned
        distance[row, atom, :], distance[row, :, place] = 2.0 * FAR_ANG, 2.0 * FAR_ANG
    return atom_ang, bond_ang, missing


def _vectors(bond_ang: Tensor) -> tuple[Tensor, Tensor]:
    """Two lattice vectors (n, 1, 2) from three bonds (n, 3, 2)."""
    return bond_ang[:, :1] - bond_ang[:, 1:2], bond_ang[:, 1:2] - bond_ang[:, 2:]


def _cells(atom_ang: Tensor, bond_ang: Tensor, aside: int) -> tuple[Tensor, Tensor]:
    """Sites (n, C, 2) of an atom's own sublattice, and the bond (n, 1, 2) that leads from each to one of the other."""
    along, across = _vectors(bond_ang)
    n, m = cell_numbers(aside, atom_ang.device)
    return atom_ang.unsqueeze(1) + n * along + m * across, bond_ang[:, :1]


def _sites(atom_ang: Tensor, bond_ang: Tensor, aside: int, axis: int) -> Tensor:
    """One coordinate (n, 2 C) of the sites of an atom's own sublattice, then of the other."""
    along, across = (vector[..., axis] for vector in _vectors(bond_ang))  # (n, 1)
    n, m = (numbers.squeeze(1) for numbers in cell_numbers(aside, atom_ang.device))
    own = atom_ang[:, axis, None] + n * along + m * across
    return torch.cat((own, own + bond_ang[:, :1, axis]), dim=1)


@functools.cache
@torch.inference_mode(False)
def cell_numbers(aside: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The cells (C, 1) within `aside` rows of cells of the first; the vectors make 120°. Not to be written to."""
    order = torch.arange(-aside, aside + 1, device=device, dtype=torch.float32)
    n, m = (grid.flatten()[:, None] for grid in torch.meshgrid(order, order, indexing="ij"))
    near = (n * n + m * m - n * m <= 0.75 * aside**2).flatten()  # rows are √3/2 of the vectors apart
    return n[near], m[near]


def _drawn(reading: Reading, full_scale: float) -> Tensor:
    """The frame as the agent sees it, (n, H, W) uint8."""
    gain, offset, beam = (
        reading.calibration[key][:, None, None]
        for key in ("counts_per_electron", "counts_offset", "electrons_per_pixel")
    )
    fraction = (reading.data["images"][:, 0] - offset) / (gain * beam)
    return (fraction * (255.0 / full_scale)).round().clamp(0.0, 255.0).to(torch.uint8)


def _of(values: Tensor, index: Tensor) -> Tensor:
    """values (n, D, …) at index (n,): (n, …)."""
    if values.shape[1] == 1:
        return values.squeeze(1)
    return values[every_row(len(index), index.device), index]


def _seconds(readings: Sequence[Reading], like: Tensor) -> Tensor:
    """Seconds of the step, (B,)."""
    seconds = torch.zeros_like(like)
    for reading in readings:
        seconds = add(seconds, reading.rows, reading.seconds)
    return seconds


def _pattern(config: BeamFabricationConfig) -> tuple[tuple[int, int, int], ...] | None:
    if not isinstance(config.pattern, str):
        return config.pattern
    if config.pattern not in PATTERNS:
        raise ConfigError(f"Unknown pattern {config.pattern!r}; known: {', '.join(PATTERNS)}, or give its sites.")
    return PATTERNS[config.pattern]


def _check(config: BeamFabricationConfig) -> None:
    """Refuse settings that contradict each other."""
    sites = _pattern(config)
    if sites is None and config.dopants != 1:
        raise ConfigError(f"{config.dopants} dopants need a pattern: one of {', '.join(PATTERNS)}, or its sites.")
    if sites is not None and (len(sites) != config.dopants or len(set(sites)) != len(sites)):
        raise ConfigError(f"The pattern must have {config.dopants} different sites, one a dopant; given {sites}.")
    if sites is not None and any(sublattice not in (0, 1) for _, _, sublattice in sites):
        raise ConfigError(f"The third number of a site is its sublattice, 0 or 1; given {sites}.")
    if not config.dwell_min_s <= config.dwell_max_s:
        raise ConfigError(
            f"dwell_min_s must not exceed dwell_max_s; given {config.dwell_min_s:g} and {config.dwell_max_s:g}."
        )
    if any(not config.dwell_min_s <= dwell <= config.dwell_max_s for dwell in config.dwells_s):
        raise ConfigError(f"dwells_s must lie within dwell_min_s and dwell_max_s; given {config.dwells_s}.")
    if len(set(config.energies_kev)) != len(config.energies_kev) or any(
        not energy > 0 for energy in config.energies_kev
    ):
        raise ConfigError(f"energies_kev must be different positive numbers; given {config.energies_kev}.")
    if sites is not None and 2.5 * max(abs(n) + abs(m) + 1 for n, m, _ in sites) > 0.5 * config.fov_ang:
        raise ConfigError(f"The pattern does not fit into a field of {config.fov_ang:g} Å; given {sites}.")
