"""What every step of a campaign brought: information about the law, value, and cost.

Information is by how many nats the referee's posterior over the answers became sharper or blunter; its sum is what the
episode told. Value is by how much the expected score of declaring at once has changed: what the step is worth to an
agent that may stop. Both follow from what was observed alone, so that they can be told of an episode on an instrument.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.policy import Array, Face, Observation, Policy, as_array
from stem_gym.core.errors import PolicyError, missing_extra
from stem_gym.core.experiments import DECLARE, protocol_of
from stem_gym.surrogates.gaussian_law import GaussianLaw
from stem_gym.surrogates.referee import Referee

NONE = 0.2  # how probable "none of these" is held before anything was measured
_COLOURS = ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c", "#1864ab", "#868e96")
_UNITS = {"_e_ang2_s": "e/Å²s", "_kev": "keV", "_nm": "nm", "_v": "V", "_s": "s", "_k": "K"}  # by the end of a name
_INK = "#1f2933"


@dataclass(frozen=True)
class Lived:
    """An episode of one row, as an agent lived it."""

    observations: Sequence[Observation]  # one more than actions; each entry (1, …)
    actions: Sequence[Array]  # each (1, n)
    seconds: Sequence[float]  # microscope time after each observation


@dataclass(frozen=True)
class StepValue:
    """What one step brought."""

    step: int
    action: str  # its kind
    design: Mapping[str, float]  # of an experiment
    site: int  # of an experiment; 0 where there is one alone
    declared: Mapping[str, float]  # probabilities of the answers, of a declaration
    seconds: float
    information_nats: float
    value: float
    cost: float  # reward lost to its time
    probability: Mapping[str, float]  # of the answers after it
    chi2: float  # χ² a measurement of the best description by any law; well above 1 says that none is right


def live(policy: Policy, env: Any, seed: int) -> Lived:
    """One episode of a policy in a vector env of one row without autoreset."""
    observation, info = env.reset(seed=[seed])
    policy.reset([0], [seed])
    observations, actions, seconds = [observation], [], [float(as_array(info["seconds"])[0])]
    over = False
    while not over:
        actions.append(policy.act(observation))
        observation, _, terminated, truncated, info = env.step(actions[-1])
        observations.append(observation)
        seconds.append(float(as_array(info["seconds"])[0]))
        over = bool(as_array(terminated)[0] or as_array(truncated)[0])
    return Lived(observations, actions, seconds)


def step_values(face: Face, lived: Lived, particles: int = 16384, none: float | None = NONE) -> list[StepValue]:
    """What each step brought, by a referee that holds "none of these" for as probable as `none` beforehand.

    Raises PolicyError for an episode whose measurements are not told as numbers.
    """
    if "experiment" not in face.task:
        raise PolicyError(f"{face.id} asks for no choice between laws; its steps have no such value.")
    if lived.observations and "image" in lived.observations[0]:
        raise PolicyError(
            f"{face.id} shows pictures instead of values; what steps are worth is told where values are told, as on "
            "stem_gym/HypothesisDiscrimination-v0."
        )
    protocol, task = protocol_of(face.task), face.task
    open_set = None if none is None else GaussianLaw(protocol.experiment, none)
    referee = Referee(protocol.experiment, 1, particles, none=open_set)
    found: list[StepValue] = []
    before = referee.probability[0].double()
    for step, action in enumerate(lived.actions):
        seen = torch.as_tensor(as_array(lived.observations[step + 1]["measurements"]))
        referee.update(protocol.history(seen))
        after = referee.probability[0].double()
        wish = protocol.wish(torch.as_tensor(action))
        kind = protocol.kinds[int(wish.kind)]
        design = {axis.name: float(wish.design[0, i]) for i, axis in enumerate(protocol.axes)}
        spent_s = lived.seconds[step + 1] - lived.seconds[step]
        found.append(
            StepValue(
                step=step,
                action=kind,
                design=design if int(wish.kind) == 0 else {},
                site=int(wish.site[0]) if int(wish.kind) == 0 else 0,
                declared=_named(protocol.answers, wish.probability[0]) if kind == DECLARE else {},
                seconds=spent_s,
                information_nats=float(entropy(before) - entropy(after)),
                value=expected_score(after, task["log_weight"]) - expected_score(before, task["log_weight"]),
                cost=task["cost_weight"] * spent_s / task["horizon_s"],
                probability=_named(protocol.answers, after),
                chi2=float(referee.chi2[0]),
            )
        )
        before = after
    return found


def _named(answers: Sequence[str], probability: Tensor) -> dict[str, float]:
    """Probabilities (A,) by the names of the answers."""
    return dict(zip(answers, probability.tolist(), strict=True))


def entropy(probability: Tensor) -> Tensor:
    """Entropy in nats of probabilities (A,)."""
    return -torch.special.xlogy(probability, probability).sum()


def expected_score(probability: Tensor, log_weight: float) -> float:
    """What declaring probabilities (A,) is expected to earn, if they are right: the task's score without its offset."""
    return float(probability.square().sum() - log_weight * entropy(probability))


def write_values(values: Sequence[StepValue], path: Path) -> Path:
    """One line of JSON a step."""
    path.write_text("".join(json.dumps(asdict(value)) + "\n" for value in values))
    return path


def draw_values(values: Sequence[StepValue], path: Path, title: str) -> Path:
    """Probabilities, information and value along an episode (PNG, PDF or SVG by the ending of `path`)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("Drawing", "viz") from error
    width = max(7.0, 0.36 * len(values))
    figure = Figure(figsize=(width, 6.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(3, 1, sharex=True, height_ratios=(1.3, 1.0, 1.0))
    steps = np.arange(len(values))
    for number, answer in enumerate(values[0].probability):
        shares = [value.probability[answer] for value in values]
        axes[0].plot(steps, shares, color=_COLOURS[number % len(_COLOURS)], marker="o", ms=3, lw=1.4, label=answer)
    axes[0].set(ylabel="probability", ylim=(-0.03, 1.03), title="a  What the referee believes after each step")
    axes[0].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    told = [value.information_nats for value in values]
    axes[1].bar(steps, told, color=["#0b7285" if one >= 0.0 else "#c2255c" for one in told], width=0.7)
    axes[1].set(ylabel="nats", title=f"b  Information of the step: {sum(told):.2f} nats in all")
    worth, cost = [value.value for value in values], [value.cost for value in values]
    axes[2].bar(steps - 0.18, worth, color="#2b8a3e", width=0.36, label="value")
    axes[2].bar(steps + 0.18, [-one for one in cost], color="#adb5bd", width=0.36, label="cost")
    axes[2].set(ylabel="score", title=f"c  Value {sum(worth):+.2f} and cost {-sum(cost):+.2f} of the steps")
    axes[2].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[2].set_xticks(steps, [_label(value) for value in values], fontsize=6.5, rotation=90)
    for axis in axes:
        axis.axhline(0.0, color="#cbd2d9", lw=0.6, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set(fontsize=8.5, ha="left", x=0.0, color=_INK)
        axis.tick_params(axis="y", labelsize=7)
    figure.suptitle(title, fontsize=9, x=0.005, ha="left")
    figure.savefig(path)
    return path


def _label(value: StepValue) -> str:
    """What was done, in a few words."""
    if not value.design:
        return value.action
    parts = [with_unit(name, number) for name, number in value.design.items()]
    return ", ".join([*parts, f"site {value.site + 1}"] if value.site else parts)


def with_unit(name: str, number: float) -> str:
    """A number with the unit that its name ends in: bias_v, energy_kev, dose_rate_e_ang2_s."""
    unit = next((unit for end, unit in _UNITS.items() if name.endswith(end)), "")
    return f"{number:.3g} {unit}".strip()
