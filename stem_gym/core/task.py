"""The contract of a task: what is wanted, in terms of instructions and readings. It knows no physics and no vendor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from gymnasium import spaces
from pydantic import BaseModel
from torch import Tensor

from stem_gym.core.errors import ConfigError
from stem_gym.core.instructions import Instruction, Reading
from stem_gym.core.instrument import Capabilities

State = TypeVar("State")
Observation = dict[str, Tensor]


@dataclass(frozen=True)
class Needs:
    """What a task asks of its instrument."""

    verbs: frozenset[str]
    detectors: frozenset[str] = frozenset()
    dopants: int = 0  # atoms to work with in each specimen
    controls: frozenset[str] = frozenset()  # names that it sets


@dataclass(frozen=True)
class Score:
    """One step's outcome. Every reward term is also a metric, so that `info` shows what the reward was made of."""

    reward: Tensor  # (B,) float32
    terminated: Tensor  # (B,) bool
    metrics: Mapping[str, Tensor]  # each (B,); of the step where the name says so, else of the episode so far


@dataclass(frozen=True)
class Marks:
    """What a picture of the episode shows beside the frame; places in fractions of the reference frame."""

    probe: Tensor  # (B, 2)
    dwells: Tensor  # (B, D, 2), NaN where none
    targets: Tensor  # (B, N, 2), NaN where unknown
    frame: Tensor  # (B, H, W) last frame, 0…1
    region: Tensor  # (B, 4) left, top, width, height of that frame
    beside: Tensor | None = None  # (B, h, w) a map to be shown beside the frame, 0…1, NaN where nothing is known
    beside_title: str = ""


class Task(ABC, Generic[State]):
    """Pure: the configuration is on `self`, the episode in a state that is passed and never changed in place.

    One step of the batch: `plan(state, action)` gives instructions (each names the rows it is for), the instrument
    answers each with a reading, `observe` makes the next state and observation of them, `score` judges: from truth
    where a simulator knows it, else from what was perceived; in simulation both are reported.
    """

    Config: ClassVar[type[BaseModel]]
    needs: Needs
    config: Any  # what `Config` read
    chances: ClassVar[int] = 0  # uniform numbers that an episode is begun with, for what the task itself draws
    observation_space: spaces.Dict  # of one row; BatchEnv adds "budget"
    action_space: spaces.Space[Any]

    @abstractmethod
    def __init__(self, config: Any) -> None: ...

    def fitted(self, capabilities: Capabilities) -> Task[State]:
        """This task on an instrument, of which it may have to know the grid or the channels of a detector.

        Raises ConfigError where the two do not fit.
        """
        return self

    def particulars(self) -> Mapping[str, str]:
        """What the numbers of this variant stand for, beyond the manual and the settings: name → text for people."""
        return {}

    @abstractmethod
    def start(self, rows: int, device: torch.device) -> State:
        """The state of `rows` episodes that have not begun."""

    def take_chance(self, state: State, chance: Tensor) -> State:
        """The state of fresh episodes with their `chances` uniforms (rows, chances)."""
        return state

    def tell(self, state: State, wishes: Mapping[str, Any]) -> State:
        """The state after a person asked for something else in mid-episode. Raises ConfigError for unknown wishes."""
        raise ConfigError(f"{type(self).__name__} takes no wishes in mid-episode; given {sorted(wishes)}.")

    @abstractmethod
    def opening(self, state: State, rows: Tensor) -> Sequence[Instruction]:
        """Instructions that begin an episode (the operator's first look), for the global row numbers `rows`."""

    def decided(self, state: State, action: Tensor, rows: Tensor) -> State:
        """The state after `rows` (n,) decided on actions (B, …), for what no instruction carries, such as a claim."""
        return state

    def closes(self, action: Tensor) -> Tensor:
        """Which of some actions (B, …) end an episode by themselves, (B,) bool."""
        return torch.zeros(len(action), dtype=torch.bool, device=action.device)

    @abstractmethod
    def plan(self, state: State, action: Tensor, rows: Tensor) -> Sequence[Instruction]:
        """The instructions of one step for `rows` (n,), given actions (B, …) inside the action space."""

    @abstractmethod
    def observe(self, state: State, readings: Sequence[Reading]) -> tuple[State, Observation]:
        """Take the readings in; gives the new state and the observation (B, …) of every row."""

    @abstractmethod
    def score(self, state: State, readings: Sequence[Reading], truth: Mapping[str, Tensor]) -> tuple[State, Score]:
        """Judge the step from truth where there is some, and from perception where not."""

    @abstractmethod
    def marks(self, state: State, truth: Mapping[str, Tensor]) -> Marks:
        """What to draw."""
