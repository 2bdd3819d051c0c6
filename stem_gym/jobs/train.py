"""Train: an agent that learns, in a folder that can be stopped, killed and resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from stem_gym.core.errors import ConfigError
from stem_gym.jobs.pictures import spark
from stem_gym.jobs.roster import agents_package, check_id

Point = tuple[float, float]  # environment steps, mean return


@dataclass(frozen=True)
class Training:
    """What to train where."""

    agent: str
    id: str
    folder: Path
    resume: bool = False
    using: Mapping[str, Any] = field(default_factory=dict)  # training settings; below "network": those of the network
    overrides: Mapping[str, Any] = field(default_factory=dict)
    quiet: bool = False


def train(job: Training) -> Path:
    """Train, or go on; gives the folder of the saved policy. Ctrl-C keeps what was done and is raised again.

    Raises StemGymError subclasses before the work begins: unknown names and settings, a folder that can not be written
    or that holds a run already while `resume` is not asked for.
    """
    agents = agents_package()
    check_id(job.id)
    if job.resume and not has_checkpoint(job.folder):
        raise ConfigError(
            f"The folder {job.folder} holds no checkpoint; leave --resume out to start, or name the folder of the run "
            "with --out."
        )
    if not job.resume and has_checkpoint(job.folder):
        raise ConfigError(
            f"The folder {job.folder} holds a training run already. Go on with --resume, or name another with --out."
        )
    using = dict(job.using)
    settings = {"network": using.pop("network")} if "network" in using else {}
    options = {"settings": settings, "resume": job.resume, "quiet": job.quiet, "overrides": dict(job.overrides)}
    if clash := sorted(using.keys() & {*options, "out"}):
        raise ConfigError(f"{', '.join(clash)} is no setting of the training; it has an option of its own.")
    agents.train(job.agent, job.id, out=job.folder, **options, **using)
    return job.folder


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a training in the folder to go on with."""
    return any(folder.glob("checkpoint.*"))


def kept(folder: Path) -> str:
    """A sentence on what a stopped training leaves."""
    if not has_checkpoint(folder):
        return "Nothing was learned yet."
    return f"What was learned so far is in {folder}; go on with --resume."


def curve_of(folder: Path) -> list[Point]:
    """The learning curve that a training keeps in its folder; empty where there is none yet."""
    agents_package()
    points = import_module("agents.learning.curve").read_curve(folder)
    return [(point["steps"], point["return"]) for point in points if "return" in point]


def rise(points: Sequence[Point]) -> str:
    """A sentence on what the curve did between its first and its last tenth."""
    if len(points) < 2:
        return "The training was too short for a learning curve."
    part = max(1, len(points) // 10)
    first = sum(value for _, value in points[:part]) / part
    last = sum(value for _, value in points[-part:]) / part
    verb = "rose" if last > first else "did not rise"
    return (
        f"The mean return {verb}: {first:.3g} in the first tenth, {last:.3g} in the last, {points[-1][0]:,.0f} steps."
    )


def tell(screen: Console, folder: Path) -> None:
    """The curve as text, and where things are."""
    points = curve_of(folder)
    if points:
        screen.print(f"return  {spark([value for _, value in points])}")
        screen.print(rise(points))
    screen.print(f"The policy, its curve and its checkpoint are in {folder}", soft_wrap=True)
