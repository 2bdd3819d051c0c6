"""What each step of an episode between laws was worth: played or recorded, written down and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
from gymnasium.vector import AutoresetMode

from stem_gym.core.streams import row_seeds
from stem_gym.jobs.outcome import make_folder
from stem_gym.jobs.recorded_campaign import recorded_campaign
from stem_gym.jobs.roster import agents_package, check_id, policy_for

if TYPE_CHECKING:
    from agents.engine.step_values import StepValue


@dataclass(frozen=True)
class ValueJob:
    """Whose episode, in which world."""

    agent: str
    id: str
    out: Path
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the agent
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of the environment


def value(job: ValueJob) -> dict[str, Any]:
    """Play one episode, write `values.jsonl` and `values.png` into the folder, and tell the steps as plain data.

    Raises StemGymError subclasses for a task without laws and for a folder that can not be written.
    """
    agents = agents_package()
    from agents.engine import step_values
    from agents.policy import face_of

    folder = make_folder(job.out)
    env = gymnasium.make_vec(check_id(job.id), num_envs=1, autoreset_mode=AutoresetMode.DISABLED, **job.overrides)
    try:
        policy = agents.make(job.agent, env, **job.settings) if job.settings else policy_for(job.agent, env)
        lived = step_values.live(policy, env, row_seeds(job.seed, 1)[0])
        values = step_values.step_values(face_of(env), lived)
    finally:
        env.close()
    return {"id": job.id, "agent": job.agent, "seed": job.seed} | _kept(
        values, folder, f"{job.agent} on {job.id}, world {job.seed}"
    )


def value_of_recording(path: Path, out: Path) -> dict[str, Any]:
    """The same of an episode that `stem-gym deploy … --record` wrote.

    Raises RecordError for a file that holds no such episode.
    """
    agents_package()
    from agents.engine import step_values
    from agents.policy import Face

    campaign = recorded_campaign(path)
    task, folder = campaign.task, make_folder(out)
    face = Face(campaign.id, 1, task.observation_space, task.action_space, task.config.model_dump(mode="json"))
    lived = step_values.Lived(campaign.observations, campaign.actions, campaign.seconds)
    values = step_values.step_values(face, lived)
    return {"id": campaign.id, "recording": str(path)} | _kept(values, folder, f"{path.name}, {campaign.id}")


def _kept(values: Sequence[StepValue], folder: Path, title: str) -> dict[str, Any]:
    """Write and draw the values; the steps as plain data, and where they are."""
    from agents.engine import step_values

    written = step_values.write_values(values, folder / "values.jsonl")
    judge = f"{title}\nthe referee holds none of these for {step_values.NONE:.0%} probable at first"
    drawn = step_values.draw_values(values, folder / "values.png", judge)
    return {"steps": [asdict(one) for one in values], "written": str(written), "drawn": str(drawn)}


def sentences(told: Mapping[str, Any]) -> list[str]:
    """What was found, for people."""
    from agents.engine.step_values import NONE, with_unit

    whose = told["recording"] if "recording" in told else f"{told['agent']} on {told['id']}, world {told['seed']}"
    lines = [f"{whose}, by a referee that held none of these for {NONE:.0%} probable at first:"]
    for step in told["steps"]:
        what = [f"{name} {with_unit(name, number)}" for name, number in step["design"].items()]
        what += [f"site {step['site'] + 1}"] if step["site"] else []
        what += [f"{answer} {share:.2f}" for answer, share in step["declared"].items() if share >= 0.005]
        lines.append(
            f"{step['step']:3d}  {' '.join([step['action'], ', '.join(what)]).rstrip()}: "
            f"{step['information_nats']:+.3f} nats, value {step['value']:+.3f}, cost {step['cost']:.3f}"
        )
    last = told["steps"][-1]
    best = max(last["probability"], key=last["probability"].__getitem__)
    return [
        *lines,
        f"In the end {best} has {last['probability'][best]:.1%}; χ² a measurement {last['chi2']:.2f}. "
        f"Written to {told['written']}, drawn to {told['drawn']}.",
    ]
