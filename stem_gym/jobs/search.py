"""Search a field with an agent that explains itself: recorded, supervised, and explained afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium

from stem_gym.core.errors import ConfigError
from stem_gym.jobs.bench import hash_of
from stem_gym.jobs.outcome import Outcome
from stem_gym.jobs.roster import agents_package, check_id

Watch = Callable[[int, Mapping[str, Any]], None]  # steps done, info of the last one


@dataclass(frozen=True)
class Search:
    """What to search, and with whom."""

    agent: str
    id: str
    record: Path | None = None
    ask: bool = False
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the agent
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of the environment


def search(job: Search, watch: Watch | None = None, say: Callable[[str], None] = print) -> Outcome:
    """One episode. With `ask`, a person at the terminal is asked before every measurement; `say` writes to them.

    Raises StemGymError subclasses before anything is measured; on a KeyboardInterrupt what was recorded is kept.
    """
    agents = agents_package()
    from agents.engine.console_hook import console_hook
    from agents.engine.supervision import run_supervised

    env = gymnasium.make(check_id(job.id), **job.overrides)
    try:
        policy = agents.make(job.agent, env, **job.settings)
        hook = (lambda moment: console_hook(moment, lambda prompt: _read(prompt, say), say)) if job.ask else None
        figures = run_supervised(policy, env, hook, job.record, job.seed, watch)
        settings = {"seed": job.seed, **policy.settings.model_dump(mode="json")}
        return Outcome(job.id, job.agent, hash_of(env), figures, settings, complete=True)
    finally:
        env.close()


def _read(prompt: str, say: Callable[[str], None]) -> str:
    """A line from standard input; the prompt goes where all else goes that is meant for people."""
    say(prompt)
    return input()


@dataclass(frozen=True)
class Question:
    """What is asked of a log."""

    folder: Path
    step: int | None = None
    row: int = 0
    out: Path | None = None
    acquisition: str | None = None  # what if this had been the acquisition function
    scalarizer: str | None = None  # what if this had been wanted
    measured: Sequence[float] = ()  # what if (x, y) had been measured at that step, with this value


def explain(question: Question) -> dict[str, Any]:
    """Why a recorded decision was made, as plain data; draws it where `out` is given.

    Raises RecordError for a damaged or foreign log and for a step that it does not have.
    """
    agents_package()
    from agents.engine.decision_log import DecisionLog

    log = DecisionLog.read(question.folder)
    entry = log.upto(question.step, question.row)[-1]
    decision, width = entry.decision, entry.observation["measured"].shape[1]
    chosen = int(decision.chosen[0])
    wanted = log.task["scalarizers"][int(entry.observation["scalarizer"].argmax())]["name"]
    told: dict[str, Any] = {
        "id": log.id, "agent": log.agent, "step": entry.step, "steps": log.row(question.row)[-1].step + 1,
        "finished": log.ends[question.row] is not None, "wanted": wanted, "acquisition": entry.acquisition.kind,
        "x": chosen % width, "y": chosen // width, "at_random": bool(decision.seeding[0]),
    }  # fmt: skip
    if not told["at_random"]:
        maps = {"expected": decision.mean, "deviation": decision.deviation, "score": decision.acquisition}
        told |= {name: float(values.ravel()[chosen]) for name, values in maps.items()}
    told |= {"said": _said(log, entry.step, question.row), "left_out": log.left_out, "what_if": _what_if(log, question)}
    if question.out is not None:
        from agents.engine.decision_plots import draw_decision

        otherwise = {case["if"]: case["y"] * width + case["x"] for case in told["what_if"]}
        draw_decision(log, question.out, question.step, question.row, otherwise)
    return told


def _said(log: Any, step: int, row: int) -> list[dict[str, Any]]:
    """All that a person said about the decisions of a step."""
    from agents.engine.verdicts import verdict_as_data

    return [verdict_as_data(entry.cause) or {} for entry in log.row(row) if entry.step == step and entry.cause]


def _what_if(log: Any, question: Question) -> list[dict[str, Any]]:
    from agents.engine import counterfactual
    from agents.engine.verdicts import acquisition_named

    step, row, found = question.step, question.row, {}
    if question.acquisition is not None:
        acquisition = acquisition_named(question.acquisition)
        found[f"acquisition {question.acquisition}"] = counterfactual.what_if_acquisition(log, acquisition, step, row)
    if question.scalarizer is not None:
        found[f"wanted {question.scalarizer}"] = counterfactual.what_if_wanted(log, question.scalarizer, step, row)
    if question.measured:
        if len(question.measured) != 3 or step is None or not all(map(math.isfinite, question.measured)):
            raise ConfigError("A measurement elsewhere needs --step and three finite numbers: x, y and the value.")
        if any(side != int(side) for side in question.measured[:2]):
            raise ConfigError(f"x and y are the whole numbers of a cell; given {list(question.measured[:2])}.")
        (x, y), value = map(int, question.measured[:2]), float(question.measured[2])
        height, width = log.task["grid"]
        if not (0 <= x < width and 0 <= y < height):
            raise ConfigError(f"The field has x from 0 to {width - 1} and y from 0 to {height - 1}; given {x}, {y}.")
        again = counterfactual.what_if_measured(log, step, y * width + x, value, row=row)
        found[f"measured x {x}, y {y}"] = again
    width = log.task["grid"][1]
    return [
        {
            "if": name,
            "changed": case.changed,
            "x": int(case.decision.chosen[0]) % width,
            "y": int(case.decision.chosen[0]) // width,
            "note": case.note,
        }
        for name, case in found.items()
    ]


def sentences(told: Mapping[str, Any]) -> list[str]:
    """What `explain` found, for people."""
    lines = [f"{told['agent']} on {told['id']}: step {told['step']} of {told['steps']}"]
    place = f"cell x {told['x']}, y {told['y']}"
    if told["at_random"]:
        lines.append(f"Chose {place}, at random: first places.")
    else:
        lines.append(
            f"Chose {place}: {told['wanted']} expected to be {told['expected']:.4g}, a measurement of it to deviate by "
            f"{told['deviation']:.2g}; {told['acquisition']} {told['score']:.3g}."
        )
    lines += [f"A person said: {', '.join(f'{k} {v}' for k, v in said.items())}" for said in told["said"]]
    for case in told["what_if"]:
        choice = (
            f"cell x {case['x']}, y {case['y']} would be next" if case["changed"] else "the same place would be next"
        )
        lines.append(f"If {case['if']}: {choice}. {case['note']}".rstrip())
    return [*lines, told["left_out"]] if told["left_out"] else lines
