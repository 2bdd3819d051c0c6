"""What the fabrication agents see of a step, in the followed atom's own frame, and how they say what they want."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from agents.engine.honeycomb import BOND_ANG, BONDS_ANG, lattice_angle, turned
from agents.policy import Array, Face, Observation, as_array
from stem_gym.core.errors import PolicyError

_NEEDED = (
    "dopants",
    "fov_ang",
    "pixels",
    "pixel_dwell_s",
    "reach_ang",
    "dwell_min_s",
    "dwell_max_s",
    "dwells_s",
    "aim_bonds",
    "skip_frames",
    "trace",
    "stop",
)
_SCALE_ANG = 10.0  # the observation's unit of length
_SAME_ANG = 0.5 * BOND_ANG  # an atom so near to a goal has it


@dataclass(frozen=True)
class Scene:
    """What an observation shows, in the followed atom's own frame (bonds at 0°, 120°, 240°), in Å."""

    angle: Array  # (B,) of that frame
    bonds_ang: Array  # (B, 3, 2) as given, not turned
    goal_ang: Array  # (B, 2)
    atoms_ang: Array  # (B, D, 2)
    goals_ang: Array  # (B, D, 2)
    known: Array  # (B,) bool, whether anything was found yet

    @property
    def taken(self) -> Array:
        """(B, D, D) bool, whether atom i has goal j."""
        away: Array = np.linalg.norm(self.atoms_ang[:, :, None] - self.goals_ang[:, None], axis=-1)
        return np.asarray(away < _SAME_ANG)

    @property
    def occupied(self) -> Array:
        """(B, 3) bool, whether the neighbour at BONDS_ANG[j] is another dopant, with which no place is changed."""
        away: Array = np.linalg.norm(self.atoms_ang[:, :, None] - BONDS_ANG, axis=-1)  # (B, D, 3)
        return np.asarray((away < _SAME_ANG).any(axis=1))


@dataclass(frozen=True)
class Workplace:
    """The public numbers of a fabrication task, and the way from beam places and seconds to its actions."""

    dopants: int
    fov_ang: float
    pixels: int
    pixel_dwell_s: float
    reach_ang: float
    dwell_min_s: float
    dwell_max_s: float
    dwells_s: tuple[float, ...]
    aim_bonds: float
    skip_frames: bool
    trace: int
    stops: bool
    energies: int  # beam energies to choose from; 0 where there is no choice

    @property
    def radius_ang(self) -> float:
        """What two places in the frame can lie apart, and a little more."""
        return 1.5 * self.fov_ang

    @property
    def frame_s(self) -> float:
        """Exposure of a frame."""
        return self.pixels**2 * self.pixel_dwell_s

    def scene(self, observation: Observation) -> Scene:
        """The observation of B rows in the atom's own frame."""
        seen = {key: as_array(observation[key]).astype(np.float64) for key in ("bonds", "goal", "atoms", "goals")}
        angle = lattice_angle(seen["bonds"])
        goal, atoms, goals = (turned(_SCALE_ANG * seen[key], -angle) for key in ("goal", "atoms", "goals"))
        known = (np.abs(seen["bonds"]).max(axis=(1, 2)) > 0.1) & (np.abs(seen["goals"]).max(axis=(1, 2)) > 0.0)
        return Scene(angle, BOND_ANG * seen["bonds"], goal, atoms, goals, known)

    def action(self, scene: Scene, beam_ang: Array, dwell_s: Array, frame: Array | bool = True) -> Array:
        """Actions (B, …): the beam at `beam_ang` (B, 2) in the atom's own frame for `dwell_s` (B,), then a frame.

        A place out of reach is drawn in along its direction; discrete actions name the neighbour and the dwell that
        come nearest. The beam energy stays the first of those allowed.
        """
        place = turned(beam_ang, scene.angle)
        if self.dwells_s:
            ahead = (scene.bonds_ang * place[:, None]).sum(axis=-1)  # (B, 3)
            dwell = np.abs(np.log(np.array(self.dwells_s) / dwell_s[:, None])).argmin(axis=1)
            skipped = self.skip_frames & ~np.broadcast_to(frame, (len(dwell),))
            dwell = dwell + len(self.dwells_s) * skipped
            return np.asarray(ahead.argmax(axis=1) + 3 * dwell, dtype=np.int64)
        part = place / self.reach_ang
        columns = [part / np.abs(part).max(axis=1, keepdims=True).clip(min=1.0)]
        if self.dwell_min_s < self.dwell_max_s:
            share = np.log(dwell_s / self.dwell_min_s) / np.log(self.dwell_max_s / self.dwell_min_s)
            columns.append(2.0 * share[:, None] - 1.0)
        if self.energies:
            columns.append(np.full((len(part), 1), -1.0))
        if self.skip_frames:
            columns.append(np.where(np.broadcast_to(frame, (len(part),)), 1.0, -1.0)[:, None])
        return np.concatenate(columns, axis=1).clip(-1.0, 1.0).astype(np.float32)

    def short_ang(self, scene: Scene, beam_ang: Array) -> Array:
        """How far (B,) from `beam_ang` (B, 2) `action` puts the beam, because the place is out of reach."""
        part = turned(beam_ang, scene.angle) / self.reach_ang
        kept: Array = 1.0 / np.abs(part).max(axis=1).clip(min=1.0)
        return (1.0 - kept) * np.linalg.norm(beam_ang, axis=1)

    def look_again(self, scene: Scene) -> tuple[Array, Array]:
        """A step that does least: the beam as far off as it goes, (B, 2) Å, for the shortest dwell (B,)."""
        away = turned(np.full((len(scene.angle), 2), self.reach_ang), -scene.angle)
        return away, np.full(len(away), self.dwell_min_s)

    def clipped_s(self, dwell_s: float) -> float:
        """The nearest dwell that the task allows."""
        return min(max(dwell_s, self.dwell_min_s), self.dwell_max_s)


def workplace_of(face: Face, agent: str) -> Workplace:
    """The workplace of a beam-fabrication face. Raises PolicyError where the task or its observation is another one."""
    missing = [key for key in _NEEDED if key not in face.task]
    if missing:
        raise PolicyError(
            f"The agent {agent!r} needs a task that says {', '.join(missing)}; {face.id} does not. "
            "It serves the beam-fabrication ids."
        )
    space = face.observation_space
    unseen = {"goal", "bonds", "atoms", "goals"} - set(space.keys() if isinstance(space, spaces.Dict) else ())
    if unseen:
        raise PolicyError(
            f"The agent {agent!r} needs an observation of perceived atoms with {', '.join(sorted(unseen))}; "
            f"that of {face.id} is {space}."
        )
    task: dict[str, Any] = {key: face.task[key] for key in _NEEDED}
    stops = task.pop("stop") is not None
    energies = len(face.task.get("energies_kev", ()))
    return Workplace(**task | {"dwells_s": tuple(task["dwells_s"])}, stops=stops, energies=energies)
