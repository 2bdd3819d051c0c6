"""What every training run has: its settings, its folder, the time it took and its curve."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from stem_gym.core.config import Config
from stem_gym.core.errors import RecordError

SaveNetwork = Callable[[Any, Mapping[str, Any]], Any]


class Training(Config):
    """How to train."""

    steps: int = Field(3_000_000, gt=0)
    """environment steps, all rows together"""
    minutes: float | None = Field(None, gt=0)
    """stop after this much learning, if the steps are not done before; set-up and warm start not counted"""
    rows: int = Field(64, ge=1)
    """environments side by side"""
    rollout: int = Field(32, ge=1)
    """steps of each row between two updates"""
    minibatch: int = Field(256, ge=2)
    """samples of one gradient step"""
    epochs: int = Field(3, ge=1)
    """times that each sample is used"""
    learning_rate: float = Field(7e-4, gt=0)
    """at the start; falls linearly to a tenth"""
    critic_rate: float = Field(1.0, gt=0)
    """how many times faster the critic learns"""
    entropy: float = Field(2e-3, ge=0)
    """weight of the entropy at the start; falls linearly to nothing"""
    gamma: float = Field(0.985, gt=0, le=1)
    """discount of later rewards"""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """weight of longer advantage estimates"""
    target_kl: float | None = Field(0.03, gt=0)
    """an update ends when the policy has moved so far"""
    critic_updates: int = Field(12, ge=0)
    """after a warm start, first updates that teach the critic alone, lest a blind one spoil what was imitated"""
    lessons: float = Field(0.15, ge=0, lt=1)
    """share of a run of campaigns in which posterior and critic learn alone, from what an eager beginner does: who
    believes nothing yet would learn to declare at once"""
    checkpoint_steps: int = Field(50_000, gt=0)
    """steps between checkpoints; the first comes after the first rollout"""
    checkpoint_seconds: float = Field(30.0, gt=0)
    """seconds after which a checkpoint is written, though its steps are not done"""
    threads: int = Field(1, ge=1)
    """threads of torch"""
    seed: int = Field(0, ge=0)
    """worlds, first weights and exploration"""


@dataclass
class Run:
    """What a run keeps while it goes on."""

    id: str
    folder: Path
    training: Training
    save_network: SaveNetwork
    overrides: Mapping[str, Any] = field(default_factory=dict)
    quiet: bool = False
    spent_s: float = 0.0  # in earlier sessions of this run
    started: float | None = None  # the first step of this session: what is compiled before it is no learning
    curve: list[dict[str, float]] = field(default_factory=list)
    warm: Mapping[str, Any] = field(default_factory=dict)  # how the first weights came about
    critic_updates: int = 0  # still to come

    @property
    def seconds(self) -> float:
        return self.spent_s + (0.0 if self.started is None else time.monotonic() - self.started)

    @property
    def made_with(self) -> dict[str, Any]:
        """The settings, and what of the environment was changed, as plain data for the policy's contract."""
        changed = json.loads(json.dumps(dict(self.overrides), default=str))
        return {"settings": self.training.model_dump(mode="json")} | ({"overrides": changed} if changed else {})

    def done(self, steps: int) -> float:
        """Part of the run that is over, 0 to 1."""
        by_time = self.seconds / (60.0 * self.training.minutes) if self.training.minutes else 0.0
        return min(1.0, max(steps / self.training.steps, by_time))

    def make_folder(self) -> None:
        """Make the folder. Raises RecordError where it can not be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise RecordError(
                f"Can not write to the folder {self.folder}: {error.strerror or error}. "
                "Name a folder that you may write to."
            ) from error
