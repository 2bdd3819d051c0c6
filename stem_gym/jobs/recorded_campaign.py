"""A recorded campaign between laws, as an agent lived it: from the instructions and readings of one file.

A recording holds what the instrument was asked and what it answered, and no actions. They follow from the instructions:
an experiment ends with the measurement of the quantity, an enabling action is the setting of its own control, and a
declaration asks the instrument for nothing, so that it is not there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stem_gym.core.config import parse
from stem_gym.core.errors import RecordError
from stem_gym.core.instructions import Instruction, Park, Pulse, Reading, Set, Wait
from stem_gym.instruments.recorder import Recording, read_recording
from stem_gym.tasks.hypothesis_discrimination import HypothesisDiscrimination

KIND = "hypothesis_discrimination"


@dataclass
class Campaign:
    """What was done and seen in an episode of one row, and the task that it was done for."""

    id: str
    task: HypothesisDiscrimination
    observations: list[dict[str, Any]] = field(default_factory=list)  # one more than actions; each entry (1, …)
    actions: list[Any] = field(default_factory=list)  # each (1, n)
    seconds: list[float] = field(default_factory=list)  # microscope time after each observation


def recorded_campaign(path: Path) -> Campaign:
    """The episode in a file, which may be cut short.

    Raises RecordError for a file that is no recording, one of another task, of several rows or of pictures, and one
    that holds no whole step.
    """
    recording = read_recording(path)
    config = json.loads(str(recording.attributes["config"]))
    settings = dict(config.get("task", {}))
    if settings.pop("kind", None) != KIND:
        raise RecordError(f"{path} was recorded on {config.get('id')}, which asks for no choice between laws.")
    task = HypothesisDiscrimination(parse(HypothesisDiscrimination.Config, settings, f"{path}, task"))
    campaign, rows = Campaign(str(config["id"]), task), torch.zeros(1, dtype=torch.int64)
    state, total_s = task.start(1, rows.device), 0.0
    for action, readings in _steps(recording, task, path):
        if action is not None:
            state = task.decided(state, action, rows)
            campaign.actions.append(action.numpy())
        state, observation = task.observe(state, readings)
        total_s += sum(float(reading.seconds.sum()) for reading in readings)
        campaign.observations.append({name: value.numpy() for name, value in observation.items()})
        campaign.seconds.append(total_s)
    if not campaign.actions:
        raise RecordError(f"{path} holds no whole experiment; record one with `stem-gym deploy … --record`.")
    return campaign


def _steps(
    recording: Recording, task: HypothesisDiscrimination, path: Path
) -> list[tuple[Tensor | None, list[Reading]]]:
    """The opening, without an action, and each action with its readings."""
    protocol, experiment = task.protocol, task.config.experiment
    design = torch.stack([axis.grid()[0] for axis in protocol.axes])
    site = torch.zeros(1, dtype=torch.int64)
    steps: list[tuple[Tensor | None, list[Reading]]] = [(None, [])]
    pending: list[Reading] = []
    for record in recording.records:
        instruction, reading = record.instruction, record.reading
        if instruction is None or reading is None:
            continue
        if instruction.rows.tolist() != [0]:
            raise RecordError(f"{path} holds several rows; the steps of a campaign are told of one.")
        if reading.verb == "Scan":
            raise RecordError(f"{path}: its measurements are pictures, in which no value is told.")
        if isinstance(instruction, Park):
            site = (instruction.x * protocol.sites).long().clamp(0, protocol.sites - 1)
        if isinstance(instruction, Set) and instruction.name in experiment.enabling:
            steps.append((protocol.enabling(instruction.name, 1), [*pending, reading]))
            pending = []
            continue
        _note(instruction, protocol.axes, design)
        if reading.verb == "Acquire" and protocol.laws.quantity in reading.data:
            steps.append((protocol.experiments(design.unsqueeze(0), site), [*pending, reading]))
            pending = []
        elif pending or reading.verb in ("Park", "Set", "Pulse", "Wait"):
            pending.append(reading)
        else:  # the opening, and what a referee says after a step
            steps[-1][1].append(reading)
    return steps


def _note(instruction: Instruction, axes: Sequence[Any], design: Tensor) -> None:
    """Write what an instruction sets into the design (D,)."""
    for i, axis in enumerate(axes):
        if isinstance(instruction, Set) and axis.does == "Set" and axis.name == instruction.name:
            design[i] = instruction.value[0]
        verb, _, name = axis.does.partition(".")
        if isinstance(instruction, Pulse | Wait) and type(instruction).__name__ == verb:
            design[i] = getattr(instruction, name)[0]
