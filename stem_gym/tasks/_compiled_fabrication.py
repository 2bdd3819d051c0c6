"""Beam fabrication in machine code: what `beam_fabrication` does in every step of rows that are under way.

That file is the reference, and what a GPU runs; here are loops over rows in its place, in double precision. What
happens seldom (episodes that begin, controls that are set) and pictures are left to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from stem_gym.core.batch import changed, names_every, rows_where, take, take_rows
from stem_gym.core.compiled import compiled_exactly as compiled
from stem_gym.core.compiled import inlined
from stem_gym.core.instructions import Dwell, Instruction, Park, Reading
from stem_gym.core.task import Observation, Score
from stem_gym.tasks.beam_fabrication import (
    BOND_ANG,
    FAR_ANG,
    SCALE_ANG,
    TERMS,
    BeamFabrication,
    BeamFabricationConfig,
    State,
    cell_numbers,
)

_METRICS = ("goal_s", "discount", "score_perceived", "score_truth", "jumps", "lost_atoms", "lost_dopant", "broken")
_TRUTH = ("dopant_xy_ang", "dopant_there", "cell_ang", "jumps", "lost_atoms")
_PLANNED = ("atom_ang", "goal_ang", "bond_ang", "shift_ang", "drift_ang_per_s", "clock_s", "frame_s")
_JUDGED = (
    *("atom_ang", "goal_ang", "begun", "origin_ang", "left_seen_ang", "left_true_ang", "lost_atoms", "goal_s"),
    *("clock_s", "score_truth", "score_perceived"),
)


class CompiledFabrication(BeamFabrication):
    """The same task, many times faster on few rows; `instrument.compiled` asks for it."""

    def __init__(self, config: BeamFabricationConfig) -> None:
        super().__init__(config)
        self._dwells_s = np.array(config.dwells_s, np.float32)

    def plan(self, state: State, action: Tensor, rows: Tensor) -> Sequence[Instruction]:
        """As the reference."""
        config = self.config
        mine, action = take_rows(state, rows), take(action, rows)
        instructions: list[Instruction] = []
        limit_ang = 0.5 * config.fov_ang - config.recentre_ang if config.recentre_ang is not None else math.inf
        n = rows.shape[0]
        place, dwell_s = np.empty((2, n), np.float32), np.empty(n, np.float32)
        wanted, energy = np.empty(n, np.bool_), np.empty(n, np.int64)
        actions = action.numpy()
        if actions.ndim == 1:
            actions = actions[:, None].astype(np.float32)
        lengths = config.fov_ang, config.reach_ang, config.dwell_min_s, config.dwell_max_s, config.aim_bonds
        settings = (*lengths, self._has_time, config.skip_frames, len(config.energies_kev))
        asked, told = (self._dwells_s, np.ascontiguousarray(actions)), (place, dwell_s, wanted, energy)
        if not plan(settings, limit_ang, asked, _arrays(mine, *_PLANNED), told):
            mine, instructions = self._recentre(mine, rows)
            plan(settings, math.inf, asked, _arrays(mine, *_PLANNED), told)
        if config.energies_kev:
            number = torch.from_numpy(energy)
            other = rows_where(number != mine.energy)
            instructions += self._set_energy(rows[other], number[other])
        x, y = torch.from_numpy(place).unbind()
        instructions += [Park(rows, x, y), Dwell(rows, torch.from_numpy(dwell_s), self.config.trace, self._rule)]
        if config.skip_frames:
            rows = take(rows, rows_where(torch.from_numpy(wanted)))
        return [*instructions, self._scan(rows)] if len(rows) else instructions

    def score(self, state: State, readings: Sequence[Reading], truth: Mapping[str, Tensor]) -> tuple[State, Score]:
        """As the reference; an instrument without truth is left to it."""
        if not truth:
            return super().score(state, readings, truth)
        config, n = self.config, state.clock_s.shape[0]
        seconds = np.zeros(n, np.float32)
        for reading in readings:
            if names_every(reading.rows, n):
                seconds += reading.seconds.numpy()
            else:
                seconds[reading.rows.numpy()] += reading.seconds.numpy()
        if not state.known.numpy().all():
            state = self._look_up(state, truth)
        told, flags = np.empty((22, n), np.float32), np.empty((2, n), np.bool_)
        weights = (config.progress_weight / BOND_ANG, config.success_weight, -config.time_weight, -config.damage_weight)
        settings = (*weights, config.fov_ang, config.discount_s, float(config.vacancies_max), float(config.dopants))
        known = tuple(truth[name].contiguous().numpy() for name in _TRUTH)
        judge(settings, seconds, _arrays(state, *_JUDGED), known, told, flags)
        values = torch.from_numpy(told).unbind()
        by_truth = config.scores_from == "truth"
        success, success_seen, left_true, left_seen = values[8:12]
        metrics = {
            **dict(zip(TERMS, values[:4] if by_truth else values[4:8], strict=True)),
            "success": success,
            "success_perceived": success_seen,
            "distance_ang": left_true,
            "distance_perceived_ang": left_seen,
            **dict(zip(_METRICS, values[12:20], strict=True)),
        }
        state = changed(
            state,
            left_seen_ang=left_seen,
            left_true_ang=left_true,
            **{name: metrics[name] for name in ("lost_atoms", "goal_s", "score_truth", "score_perceived")},
        )
        ended_true, ended_seen = torch.from_numpy(flags).unbind()
        reward, ended = (values[20], ended_true) if by_truth else (values[21], ended_seen)
        return state, Score(reward, ended, metrics)

    def _see_frame(self, state: State, reading: Reading) -> State:
        if self.config.image_full_scale is not None or not state.begun.numpy().all():
            return super()._see_frame(state, reading)
        names = ("atom_ang", "bond_ang", "shift_ang", "drift_ang_per_s")
        fresh = [getattr(state, name).numpy().copy() for name in names]
        astray = np.empty(state.astray.shape, np.bool_)
        found = tuple(reading.data[name].numpy() for name in ("atoms", "bonds_ang", "shift_ang"))
        distance = np.empty((astray.shape[1], found[0].shape[1]))
        look(self.config.fov_ang, found, _arrays(state, "astray", "clock_s", "frame_s"), (*fresh, astray), distance)
        seen = {name: torch.from_numpy(part) for name, part in zip(names, fresh, strict=True)}
        return changed(state, **seen, astray=torch.from_numpy(astray), frame_s=state.clock_s)

    def _goals(self, atom_ang: Tensor, bond_ang: Tensor, chance: Tensor) -> Tensor:
        if self._pattern is not None:
            return super()._goals(atom_ang, bond_ang, chance)
        cells = tuple(numbers.squeeze(1).numpy() for numbers in cell_numbers(self._cells_aside, atom_ang.device))
        given = tuple(part.contiguous().numpy() for part in (atom_ang, bond_ang, chance))
        goals = np.empty((len(atom_ang), 1, 2), np.float32)
        space = np.empty(2 * len(cells[0]), np.int64)
        limits = np.float32(0.5 * self.config.fov_ang), np.float32(self.config.goal_ang**2)
        draw_goals(*limits, cells, given, space, goals)
        return torch.from_numpy(goals)

    def _tell_trace(self, reading: Reading) -> Tensor:
        counts = reading.data["trace"].float().contiguous().numpy()
        told = np.empty((len(counts), 4), np.float32)
        trace(counts, reading.seconds.numpy(), self.config.dwell_max_s, told)
        return torch.from_numpy(told)

    def _observation(self, state: State) -> Observation:
        if self.config.image_full_scale is not None or self.config.energies_kev:
            return super()._observation(state)
        n, atoms = state.atom_ang.shape[:2]
        shapes = {"goal": (2,), "bonds": (3, 2), "atoms": (atoms, 2), "goals": (atoms, 2), "trace": (4,), "frame": (3,)}
        told = {name: np.empty((n, *shape), np.float32) for name, shape in shapes.items()}
        given = _arrays(
            state, "atom_ang", "goal_ang", "bond_ang", "begun", "trace", "drift_ang_per_s", "clock_s", "frame_s"
        )
        observe(given, tuple(told.values()))
        return {name: torch.from_numpy(part) for name, part in told.items()}


def _arrays(state: State, *names: str) -> tuple[ndarray, ...]:
    """Fields of a state as numpy sees them, in the one form that the machine code is made for."""
    return tuple(getattr(state, name).contiguous().numpy() for name in names)


@inlined
def _pair(atoms: ndarray, goals: ndarray, row: int) -> Any:
    """The followed atom and its goal: the nearest pair of a free atom and a free goal."""
    count = atoms.shape[1]
    best, least = 0, math.inf
    if count == 1:
        return 0, 0
    for index in range(count * count):
        atom, goal = index // count, index % count
        distance, taken = _apart(atoms, goals, row, atom, goal), False
        for k in range(count):
            taken = taken or _apart(atoms, goals, row, atom, k) < 0.5 * BOND_ANG
            taken = taken or _apart(atoms, goals, row, k, goal) < 0.5 * BOND_ANG
        if taken:
            distance += FAR_ANG
        if distance < least:
            best, least = index, distance
    return best // count, best % count


@inlined
def _apart(atoms: ndarray, goals: ndarray, row: int, atom: int, goal: int) -> float:
    x, y = goals[row, goal, 0] - atoms[row, atom, 0], goals[row, goal, 1] - atoms[row, atom, 1]
    return math.sqrt(x * x + y * y)


@inlined
def _between(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


@compiled
def plan(settings: Any, limit_ang: float, asked: Any, given: Any, told: Any) -> bool:
    """Where and how long each row dwells, whether a frame follows, and at which energy: `BeamFabrication._meaning`.

    False, and nothing is planned, where any atom is farther than the limit from the middle of its frame.
    """
    fov_ang, reach_ang, least_s, most_s, aim, has_time, skips, energies = settings
    dwells_s, actions = asked
    atoms, goals, bonds, shift, drift, clock_s, frame_s = given
    place, dwell_s, wanted, energy = told
    for row in range(actions.shape[0]):
        for atom in range(atoms.shape[1]):
            for axis in range(2):
                if abs(atoms[row, atom, axis] + shift[row, axis]) > limit_ang:
                    return False
    for row in range(actions.shape[0]):
        atom, _ = _pair(atoms, goals, row)
        wanted[row], energy[row] = True, 0
        if dwells_s.shape[0]:
            number = int(actions[row, 0])
            rest = number // (3 * dwells_s.shape[0])
            x, y = aim * bonds[row, atom, number % 3, 0], aim * bonds[row, atom, number % 3, 1]
            dwell_s[row] = dwells_s[number // 3 % dwells_s.shape[0]]
            if skips:
                wanted[row], rest = rest % 2 == 0, rest // 2
            energy[row] = rest
        else:
            x, y = reach_ang * actions[row, 0], reach_ang * actions[row, 1]
            part = _between(0.5 * (actions[row, 2] + 1.0), 0.0, 1.0) if has_time else 0.0
            dwell_s[row] = least_s * (most_s / least_s) ** part
            if skips:
                wanted[row] = actions[row, actions.shape[1] - 1] >= 0.0
            if energies:
                which = int(0.5 * (actions[row, 3 if has_time else 2] + 1.0) * energies)
                energy[row] = min(max(which, 0), energies - 1)
        lead_s = clock_s[row] - frame_s[row] + 0.5 * dwell_s[row]
        x += atoms[row, atom, 0] + shift[row, 0] + drift[row, 0] * lead_s
        y += atoms[row, atom, 1] + shift[row, 1] + drift[row, 1] * lead_s
        place[0, row], place[1, row] = _between(x / fov_ang + 0.5, 0.0, 1.0), _between(y / fov_ang + 0.5, 0.0, 1.0)
    return True


@compiled
def look(fov_ang: float, found: Any, given: Any, told: Any, distance: ndarray) -> None:
    """Every found place goes to the known atom that it is nearest to: `beam_fabrication._track`, with the drift."""
    places, their_bonds, steps = found
    astray, clock_s, frame_s = given
    atoms, bonds, shift, drift, missing = told
    known, seen = distance.shape
    for row in range(places.shape[0]):
        since_s = max(clock_s[row] - frame_s[row], 1e-3)
        for axis in range(2):
            shift[row, axis] += steps[row, axis]
            drift[row, axis] = steps[row, axis] / since_s
        for atom in range(known):
            missing[row, atom] = True
            for place in range(seen):
                x = (places[row, place, 0] - 0.5) * fov_ang - shift[row, 0] - atoms[row, atom, 0]
                y = (places[row, place, 1] - 0.5) * fov_ang - shift[row, 1] - atoms[row, atom, 1]
                away = math.sqrt(x * x + y * y)
                distance[atom, place] = FAR_ANG if math.isnan(away) else away
        for _ in range(known):
            best, least = 0, math.inf
            for index in range(known * seen):
                if distance[index // seen, index % seen] < least:
                    best, least = index, distance[index // seen, index % seen]
            atom, place = best // seen, best % seen
            if least < (0.5 * FAR_ANG if astray[row, atom] else 2.5 * BOND_ANG):
                missing[row, atom] = False
                for axis in range(2):
                    atoms[row, atom, axis] = (places[row, place, axis] - 0.5) * fov_ang - shift[row, axis]
                    for k in range(3):
                        bonds[row, atom, k, axis] = their_bonds[row, place, k, axis]
            for other in range(seen):
                distance[atom, other] = 2.0 * FAR_ANG
            for other in range(known):
                distance[other, place] = 2.0 * FAR_ANG


@compiled
def draw_goals(room_ang: Any, farthest: Any, cells: Any, given: Any, allowed: ndarray, told: ndarray) -> None:
    """A site of the first frame for each row, by its chance: `BeamFabrication._goals`, bit for bit.

    `farthest` is the square of the largest distance from the atom; `allowed` has space for the numbers of all sites.
    """
    atoms, bonds, chance = given
    nearest, sites = np.float32((0.5 * BOND_ANG) ** 2), 2 * cells[0].shape[0]
    for row in range(atoms.shape[0]):
        x, y, bond = atoms[row, 0, 0], atoms[row, 0, 1], bonds[row, 0, 0]
        ax, ay = bond[0] - bonds[row, 0, 1, 0], bond[1] - bonds[row, 0, 1, 1]
        bx, by = bonds[row, 0, 1, 0] - bonds[row, 0, 2, 0], bonds[row, 0, 1, 1] - bonds[row, 0, 2, 1]
        count = 0
        for site in range(sites):
            u, v = _site(site, (x, y), (ax, ay), (bx, by), bond, cells)
            square = (u - x) * (u - x) + (v - y) * (v - y)
            if max(abs(u), abs(v)) < room_ang and nearest < square <= farthest:
                allowed[count] = site
                count += 1
        pick = int(chance[row, 0] * np.float32(count))
        site = allowed[pick] if pick < count else sites - 1
        told[row, 0, 0], told[row, 0, 1] = _site(site, (x, y), (ax, ay), (bx, by), bond, cells)


@inlined
def _site(site: int, first: Any, right: Any, down: Any, bond: ndarray, cells: Any) -> Any:
    """Where a site is: those of the sublattice of `first` come first, then those of the other."""
    along, across = cells
    k = site if site < along.shape[0] else site - along.shape[0]
    u, v = first[0] + along[k] * right[0] + across[k] * down[0], first[1] + along[k] * right[1] + across[k] * down[1]
    return (u, v) if site < along.shape[0] else (u + bond[0], v + bond[1])


@compiled
def trace(counts: ndarray, seconds: ndarray, longest_s: float, told: ndarray) -> None:
    """A dwell in four numbers: `BeamFabrication._tell_trace`."""
    samples = counts.shape[1]
    for row in range(counts.shape[0]):
        used, highest = 0, -math.inf
        for sample in range(samples):
            known = not math.isnan(counts[row, sample])
            used += known
            highest = max(highest, counts[row, sample] if known else 0.0)
        first, late = max(counts[row, 0], 1.0), max(used // 4, 1)
        total, number = 0.0, 0
        for sample in range(max(used - late, 0), samples):
            if not math.isnan(counts[row, sample]):
                total += counts[row, sample]
                number += 1
        told[row, 0], told[row, 1] = total / max(number, 1) / first - 1.0, highest / first - 1.0
        told[row, 2], told[row, 3] = used / samples, seconds[row] / longest_s


@compiled
def observe(given: Any, told: Any) -> None:
    """What the agent sees: `BeamFabrication._observation`."""
    atoms, goals, bonds, begun, traces, drift, clock_s, frame_s = given
    goal, near, places, aims, last, frame = told
    for row in range(atoms.shape[0]):
        atom, target = _pair(atoms, goals, row)
        frame[row, 0] = _between((clock_s[row] - frame_s[row]) / 10.0, 0.0, 5.0)
        for axis in range(2):
            here = atoms[row, atom, axis]
            for k in range(atoms.shape[1]):
                places[row, k, axis], aims[row, k, axis] = 0.0, 0.0
                if begun[row]:
                    places[row, k, axis] = _between((atoms[row, k, axis] - here) / SCALE_ANG, -10.0, 10.0)
                    aims[row, k, axis] = _between((goals[row, k, axis] - here) / SCALE_ANG, -10.0, 10.0)
            goal[row, axis] = aims[row, target, axis]
            for k in range(3):
                near[row, k, axis] = _between(bonds[row, atom, k, axis] / BOND_ANG, -2.0, 2.0)
            frame[row, 1 + axis] = _between(drift[row, axis], -5.0, 5.0)
        for k in range(4):
            last[row, k] = _between(traces[row, k], -1.0, 10.0)


@compiled
def judge(settings: Any, seconds: ndarray, given: Any, truth: Any, told: ndarray, flags: ndarray) -> None:
    """`BeamFabrication.score`, by truth and by perception: terms (4 each), distances, metrics, rewards and ends."""
    nearer_weight, success_weight, time_weight, damage_weight, fov_ang, discount_s, most_lost, dopants = settings
    atoms, goals, begun, origin, left_seen, left_true, lost_before, goal_s, clock_s, score_true, score_seen = given
    xy, there, cell, jumps, lost_atoms = truth
    for row in range(atoms.shape[0]):
        far_seen, far_true, reached_seen, reached, present = 0.0, 0.0, begun[row], begun[row], 0
        for k in range(there.shape[1]):
            present += there[row, k]
        for goal in range(goals.shape[1]):
            seen, true = math.inf, FAR_ANG
            for atom in range(atoms.shape[1]):
                seen = min(seen, _apart(atoms, goals, row, atom, goal))
            for atom in range(xy.shape[1]):
                if there[row, atom]:
                    x, y = (
                        (goals[row, goal, 0] + origin[row, 0] - xy[row, atom, 0]),
                        (goals[row, goal, 1] + origin[row, 1] - xy[row, atom, 1]),
                    )
                    x -= cell[row, 0] * np.rint(x / cell[row, 0])
                    y -= cell[row, 1] * np.rint(y / cell[row, 1])
                    true = min(true, math.sqrt(x * x + y * y))
            far_seen, far_true = far_seen + seen, far_true + min(true, 2.0 * fov_ang)
            reached_seen, reached = reached_seen and seen < 0.5 * BOND_ANG, reached and true < 0.5 * BOND_ANG
        minutes, lost, gone = seconds[row] / 60.0, float(lost_atoms[row]), present < dopants
        nearer = left_true[row] - far_true if left_true[row] > 0.0 and not gone else 0.0
        nearer_seen = left_seen[row] - far_seen if left_seen[row] > 0.0 else 0.0
        told[0, row], told[4, row] = nearer_weight * nearer, nearer_weight * nearer_seen
        told[1, row], told[5, row] = success_weight * reached, success_weight * reached_seen
        told[2, row] = told[6, row] = time_weight * minutes
        told[3, row], told[7, row] = damage_weight * (lost - lost_before[row] + gone), 0.0
        told[8, row], told[9, row], told[10, row], told[11, row] = reached, reached_seen, far_true, far_seen
        told[20, row] = told[0, row] + told[1, row] + told[2, row] + told[3, row]
        told[21, row] = told[4, row] + told[5, row] + told[6, row]
        told[12, row] = clock_s[row] if reached and math.isnan(goal_s[row]) else goal_s[row]
        told[13, row] = math.exp(-60.0 * minutes / discount_s)
        told[14, row], told[15, row] = score_seen[row] + told[21, row], score_true[row] + told[20, row]
        told[16, row], told[17, row], told[18, row] = jumps[row], lost, gone
        told[19, row] = lost > most_lost
        flags[0, row], flags[1, row] = reached or gone or lost > most_lost, reached_seen
