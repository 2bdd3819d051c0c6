"""What an agent may know of a spectrum search: the field, what was measured in it, and how it says where to measure.

Fields are (B, H, W); cells are counted row by row, cell = y·W + x. Places are fractions (x, y) of the field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from agents.policy import Array, Face, Observation, as_array
from stem_gym.core.errors import PolicyError

KIND = "spectrum_search"
_NEEDED = ("grid", "actions", "exposures_s", "mode", "level_share", "measurements", "remeasure")
_SEEN = ("image", "value", "measured", "probe", "spectrum", "scalarizer")
_PLACE_NUMBERS = 3  # x, y, exposure


@dataclass(frozen=True)
class Scene:
    """What the observations of n rows show."""

    image: Tensor  # (n, H, W) float32, 0 … 1
    value: Tensor  # (n, C) float32, what is wanted, at measured cells
    measured: Tensor  # (n, C) bool
    last_cell: Tensor  # (n,) int64 of the last place
    spectrum: Tensor  # (n, S) float32, at the last place
    wanted: Tensor  # (n,) int64 which scalarizer

    def of(self, rows: Tensor) -> Scene:
        """The rows (m,)."""
        return Scene(**{name: value[rows] for name, value in vars(self).items()})


@dataclass(frozen=True)
class SearchField:
    """The public numbers of a spectrum search, and the way from cells to its actions."""

    height: int
    width: int
    mode: str
    level_share: float
    measurements: int
    exposures_s: tuple[float, ...]
    space: spaces.Space[Any]

    @property
    def cells(self) -> int:
        return self.height * self.width

    def scene(self, observation: Observation) -> Scene:
        """The observation of B rows. Raises PolicyError for maps of another size than the field's."""
        seen = {key: torch.as_tensor(np.array(as_array(observation[key]))) for key in _SEEN}
        rows = len(seen["image"])
        for key in ("image", "value", "measured"):
            if tuple(seen[key].shape) != (rows, self.height, self.width):
                raise PolicyError(
                    f"The {key!r} of an observation should be (rows, {self.height}, {self.width}); "
                    f"it is {tuple(seen[key].shape)}."
                )
        size = torch.tensor([self.width, self.height])
        at = torch.minimum((seen["probe"] * size).floor().long().clamp(min=0), size - 1)
        return Scene(
            image=seen["image"].float() / 255.0,
            value=seen["value"].float().flatten(1),
            measured=seen["measured"].flatten(1) > 0,
            last_cell=at[:, 1] * self.width + at[:, 0],
            spectrum=seen["spectrum"].float(),
            wanted=seen["scalarizer"].argmax(dim=1),
        )

    def places(self) -> Tensor:
        """Centres of the cells (C, 2) as (x, y), in lengths of the longer side."""
        y, x = torch.meshgrid(torch.arange(self.height), torch.arange(self.width), indexing="ij")
        return (torch.stack((x, y), dim=-1).reshape(-1, 2) + 0.5) / max(self.height, self.width)

    def exposure(self, share: float) -> int:
        """The number of the exposure nearest to `share` of the logarithmic way from the shortest to the longest."""
        times = np.log(np.array(self.exposures_s))
        wanted = times.min() + share * (times.max() - times.min())
        return int(np.abs(times - wanted).argmin())

    def action(self, cells: Tensor, exposure_share: float) -> Array:
        """Actions (B, …) that measure at `cells` (B,), with the exposure at `exposure_share` of the logarithmic way."""
        index = cells.numpy()
        if isinstance(self.space, spaces.Discrete):
            return np.asarray(index + self.space.start, dtype=self.space.dtype)
        if isinstance(self.space, spaces.MultiDiscrete):
            columns = np.column_stack((index, np.full(len(index), self.exposure(exposure_share))))
            return np.asarray(columns + self.space.start, dtype=self.space.dtype)
        x, y = (index % self.width + 0.5) / self.width, (index // self.width + 0.5) / self.height
        part = np.column_stack((x, y, np.full(len(index), exposure_share)))
        return (2.0 * part - 1.0).clip(-1.0, 1.0).astype(np.float32)


def is_search(face: Face) -> bool:
    """Whether the face is that of a spectrum search."""
    return face.task.get("kind") == KIND


def search_field_of(face: Face, agent: str) -> SearchField:
    """The field of a spectrum-search face. Raises PolicyError where task, observation or action is another one."""
    missing = [key for key in _NEEDED if face.task.get(key) is None]
    if not is_search(face) or missing:
        told = f"a task that says {', '.join(missing)}" if is_search(face) else f"a task of kind {KIND!r}"
        raise PolicyError(f"The agent {agent!r} needs {told}; {face.id} is none. It serves the spectrum-search ids.")
    space = face.observation_space
    unseen = set(_SEEN) - set(space.keys() if isinstance(space, spaces.Dict) else ())
    if unseen:
        raise PolicyError(
            f"The agent {agent!r} needs an observation with {', '.join(sorted(unseen))}; that of {face.id} is {space}."
        )
    task = face.task
    height, width = (int(side) for side in task["grid"])
    field = SearchField(
        height=height,
        width=width,
        mode=str(task["mode"]),
        level_share=float(task["level_share"]),
        measurements=int(task["measurements"]),
        exposures_s=tuple(float(time) for time in task["exposures_s"]),
        space=face.action_space,
    )
    _check_actions(field, agent, face.id)
    return field


def _check_actions(field: SearchField, agent: str, id: str) -> None:
    space, times = field.space, len(field.exposures_s)
    fits = (
        (isinstance(space, spaces.Discrete) and space.n == field.cells)
        or (isinstance(space, spaces.MultiDiscrete) and space.nvec.tolist() == [field.cells, times])
        or (isinstance(space, spaces.Box) and space.shape == (_PLACE_NUMBERS,))
    )
    if not fits:
        raise PolicyError(
            f"The agent {agent!r} needs Discrete({field.cells}), MultiDiscrete([{field.cells}, {times}]) or a Box of "
            f"(x, y, exposure) to measure a field of {field.width} × {field.height}; {id} has {space}."
        )
