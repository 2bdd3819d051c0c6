"""What if? An agent is built from a log, led through the recorded observations with one thing changed, and asked anew.

Without a change the replay makes the recorded choices: an agent's draws depend on the world's seed alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.engine.acquisition import Acquisition
from agents.engine.decision import Decision
from agents.engine.decision_log import POLICY, DecisionLog, Entry
from agents.engine.recorded_spectra import RecordedSpectra, recorded_spectra
from agents.engine.roster import policy_class
from agents.engine.search_policy import SearchPolicy
from agents.engine.storage import read_arrays, read_contract
from agents.engine.verdicts import Prefer, Want, apply
from agents.policy import Array, Face
from stem_gym.core.config import parse
from stem_gym.core.errors import PolicyError, RecordError, StemGymError, unknown_name
from stem_gym.core.scalarizers import AnyScalarizer, NamedScalarizer
from stem_gym.core.spaces import space_from_data

_MISSED = 1e-3  # of the recorded values; a recomputation that is further off says so


@dataclass(frozen=True)
class Counterfactual:
    """The decision that was recorded, and the one that would have been."""

    recorded: Decision  # of one row, B = 1
    decision: Decision  # of one row, B = 1
    note: str = ""  # what to keep in mind

    @property
    def changed(self) -> bool:
        """Whether another cell is chosen."""
        return int(self.recorded.chosen[0]) != int(self.decision.chosen[0])


class _Change:
    """What is different in a replay; here nothing."""

    def task(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        """The task that the agent is told."""
        return task

    def observation(self, entry: Entry) -> Mapping[str, Array]:
        """What the agent sees."""
        return entry.observation

    def acquisition(self, recorded: Acquisition) -> Acquisition:
        """What it decides with."""
        return recorded


def replay(log: DecisionLog, step: int | None = None, row: int = 0) -> Decision:
    """The decision of `step` (the last one if None) made again from the record: the recorded one, if all is well."""
    return _replayed(log, log.upto(step, row), row, _Change())


def what_if_acquisition(
    log: DecisionLog, acquisition: Acquisition, step: int | None = None, row: int = 0
) -> Counterfactual:
    """The decision of `step` with another acquisition function, from the same observations."""
    entries = log.upto(step, row)
    return Counterfactual(entries[-1].decision, _replayed(log, entries, row, _Acquired(acquisition)))


def what_if_wanted(
    log: DecisionLog, scalarizer: AnyScalarizer | str, step: int | None = None, row: int = 0
) -> Counterfactual:
    """The decision of `step`, if another scalarizer had been wanted from the start at the places that were measured.

    The scalarizer is a name of the task or one of one's own. Its values are computed from the recorded spectra; where
    the task's own can not be had from these to 0.1 %, because channels were averaged, `note` says how far they are off.
    Raises UnknownNameError for a name that the task does not have and ConfigError for channels that are not recorded.
    """
    entries = log.upto(step, row)
    named = [parse(NamedScalarizer, part, f"{log.folder}, scalarizers") for part in log.task["scalarizers"]]
    names = [part.name for part in named]
    if isinstance(scalarizer, str) and scalarizer not in names:
        raise unknown_name("scalarizer", scalarizer, names)
    place = names.index(scalarizer) if isinstance(scalarizer, str) else 0
    measure = named[place].measure if isinstance(scalarizer, str) else scalarizer
    spectra = recorded_spectra(entries, log.task)
    values = spectra.values(measure)
    change = _Wanted(spectra, values, place, None if isinstance(scalarizer, str) else measure)
    missed = spectra.missed_by([part.measure for part in named])
    note = ""
    if missed > _MISSED:
        note = (
            f"The spectra are recorded in {spectra.rate.shape[1]} channels; the task's own values come out of them "
            f"with an error of {100 * missed:.2g} %."
        )
    return Counterfactual(entries[-1].decision, _replayed(log, entries, row, change), note)


def what_if_measured(
    log: DecisionLog,
    step: int,
    cell: int,
    value: float | None = None,
    spectrum: Array | None = None,
    row: int = 0,
) -> Counterfactual:
    """The decision after `step`, if `cell` (y·W + x) had been measured in it instead of the recorded one.

    `value` is what is wanted there (noisy or noise-free, as the caller likes), `spectrum` (S,) detected electrons per
    second and channel; what is absent is taken from the record, where the cell was measured later on. Raises
    RecordError where the cell was measured before, or nothing is known of it, or the step has no decision after it.
    """
    entries = log.upto(step + 1, row)
    if entries[-1].step != step + 1:
        raise RecordError(f"The log {log.folder} has no decision after step {step} of row {row}.")
    now = next(entry for entry in entries if entry.step == step + 1)
    before = next(entry for entry in entries if entry.step == step)  # no place was measured between these two
    height, width = now.observation["measured"].shape
    if not 0 <= cell < height * width:
        raise RecordError(f"The field has the cells 0 to {height * width - 1}; given {cell}.")
    if before.observation["measured"].ravel()[cell]:
        raise RecordError(f"The cell x {cell % width}, y {cell // width} was measured before step {step}.")
    known = recorded_spectra(_all_seen(log, row), log.task)
    later = np.flatnonzero(known.cell == cell)
    wanted = int(now.observation["scalarizer"].argmax())
    if len(later) and spectrum is None:
        spectrum = known.rate[later[0]].numpy()
        if value is None and known.wanted[later[0]] == wanted:
            value = float(known.told[later[0]])
    if value is None and spectrum is not None:
        measure = parse(NamedScalarizer, log.task["scalarizers"][wanted], f"{log.folder}, scalarizers").measure
        rate = torch.as_tensor(np.asarray(spectrum), dtype=torch.float32)
        value = float(measure(rate, known.axis, known.reference[known.step <= now.step][-1]).nan_to_num(0.0))
    if value is None:
        raise RecordError(
            f"Nothing is recorded of the cell x {cell % width}, y {cell // width}: give value or spectrum."
        )
    change = _Elsewhere(step + 1, cell, float(value), spectrum, before.observation["measured"])
    try:
        decision = _replayed(log, entries, row, change)
    except (RuntimeError, ValueError, StemGymError) as error:
        if spectrum is None:
            raise _spectrum_needed(log) from error
        raise
    if spectrum is None and not decision.seeding[0] and not np.isfinite(decision.mean).all():
        raise _spectrum_needed(log)
    return Counterfactual(entries[-1].decision, decision)


def _spectrum_needed(log: DecisionLog) -> RecordError:
    return RecordError(f"The agent {log.agent!r} reads spectra: give the spectrum of the place as well as its value.")


def _all_seen(log: DecisionLog, row: int) -> Sequence[Entry]:
    """All decisions, and the end as if it had been one."""
    entries, end = log.row(row), log.ends[row]
    if end is None:
        return entries
    return (*entries, replace(entries[-1], step=entries[-1].step + 1, cause=None, observation=end.observation))


class _Acquired(_Change):
    """Another acquisition function, whatever was preferred."""

    def __init__(self, acquisition: Acquisition) -> None:
        self._acquisition = acquisition

    def acquisition(self, recorded: Acquisition) -> Acquisition:
        return self._acquisition


class _Wanted(_Change):
    """Other values of the same spectra. A scalarizer of one's own takes the place of the task's first one."""

    def __init__(self, spectra: RecordedSpectra, values: Tensor, place: int, own: AnyScalarizer | None) -> None:
        self._spectra, self._values, self._place, self._own = spectra, values, place, own

    def task(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._own is None:
            return task
        scalarizers = [dict(part) for part in task["scalarizers"]]
        scalarizers[self._place]["measure"] = self._own.model_dump(mode="json")
        return {**task, "scalarizers": scalarizers}

    def observation(self, entry: Entry) -> Mapping[str, Array]:
        seen = dict(entry.observation)
        known = self._spectra.step <= entry.step
        value = np.zeros(seen["value"].size, seen["value"].dtype)
        value[self._spectra.cell[known]] = self._values[torch.as_tensor(known)].numpy()
        seen["value"] = value.reshape(seen["value"].shape)
        if known.any():
            seen["last_value"] = self._values[torch.as_tensor(known)][-1:].numpy().astype(seen["last_value"].dtype)
        seen["scalarizer"] = np.eye(len(seen["scalarizer"]), dtype=seen["scalarizer"].dtype)[self._place]
        return seen


class _Elsewhere(_Change):
    """At the steps from `step` on, the last place is another one."""

    def __init__(self, step: int, cell: int, value: float, spectrum: Array | None, before: Array) -> None:
        self._step, self._cell, self._value, self._spectrum, self._before = step, cell, value, spectrum, before

    def observation(self, entry: Entry) -> Mapping[str, Array]:
        if entry.step < self._step:
            return entry.observation
        seen = {key: value.copy() for key, value in entry.observation.items()}
        height, width = seen["measured"].shape
        x, y = np.floor(seen["probe"] * (width, height)).astype(int).clip(0, (width - 1, height - 1))
        for key, value in (("measured", 1), ("value", self._value)):
            seen[key][y, x] *= self._before[y, x]  # what was known before stays known
            seen[key][self._cell // width, self._cell % width] = value
        seen["probe"][:] = (self._cell % width + 0.5) / width, (self._cell // width + 0.5) / height
        seen["last_value"][:] = self._value
        seen["spectrum"][:] = np.nan if self._spectrum is None else self._spectrum
        return seen


def _replayed(log: DecisionLog, entries: Sequence[Entry], row: int, change: _Change) -> Decision:
    policy = _policy_of(log, change.task(log.task))
    policy.reset([0], [log.seeds[row]])
    for entry in entries:
        policy.acquisition = change.acquisition(entry.acquisition)
        if entry.cause is None or isinstance(entry.cause, Want):
            policy.act({key: value[None] for key, value in change.observation(entry).items()})
            continue
        if not isinstance(entry.cause, Prefer):
            apply(entry.cause, policy, row=0)  # type: ignore[arg-type]
        policy.decide()
    decision = policy.explain()
    if decision is None:
        raise PolicyError(f"The agent {log.agent!r} did not explain its decision.")
    return decision


def _policy_of(log: DecisionLog, task: Mapping[str, Any]) -> SearchPolicy:
    """The agent as it was at the start. Raises PolicyError where the installed one is another one."""
    folder = log.folder / POLICY
    contract = read_contract(folder)
    seen, done = (space_from_data(contract[name]) for name in ("observation_space", "action_space"))
    kind = policy_class(contract["agent"])
    policy = kind(Face(log.id, 1, seen, done, task), parse(kind.Settings, contract["settings"], f"{folder}, settings"))
    policy.set_arrays(read_arrays(folder, contract))
    if not isinstance(policy, SearchPolicy):
        raise PolicyError(f"The agent {log.agent!r} of {log.folder} explains no decisions.")
    return policy
