"""The whole path in under ten minutes on two cores: compare agents, train one, run one on Nion Swift, draw it all.

Each part stands alone: where one can not run (a missing extra, say), its message is shown and the others go on.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
from rich.console import Console
from rich.rule import Rule

from stem_gym.core.errors import ConfigError, StemGymError
from stem_gym.jobs import bench, deploy, outcome, pictures, train
from stem_gym.jobs.progress import Progress
from stem_gym.jobs.roster import agents_package, policy_for

ID = "stem_gym/AtomTargeting-v0"
AGENTS = ("uniform", "raster", "lock_on", "ppo")
PANELS = {
    "success": "Success",
    "targets_served": "Targets served",
    "useful_share": "Useful share of electrons",
    "return": "Return",
}
_CHECKPOINT = "checkpoint.safetensors"
_TRAINED = ("curve.csv", "curve.png", "policy.json", "policy.safetensors", _CHECKPOINT)  # what a training writes
_STRIP = 6  # frames of the recording that are drawn
_FILM_FPS = 3  # steps of an episode that are shown in a second


@dataclass(frozen=True)
class Settings:
    """What can be chosen."""

    out: Path
    minutes: float
    episodes: int


@dataclass(frozen=True)
class Result:
    """What the demo made, and what could not run."""

    made: dict[str, str]  # file → what it is
    skipped: dict[str, str]  # part → why
    seconds: float


class _Demo:
    """The parts in order, and what they leave behind."""

    def __init__(self, settings: Settings, screen: Console) -> None:
        self.settings, self.screen = settings, screen
        self.folder = outcome.make_folder(settings.out)
        self.made: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.outcomes: list[outcome.Outcome] = []

    def part(self, title: str, work: Callable[[], None]) -> None:
        """One part under its heading; a StemGymError ends the part, not the demo."""
        self.screen.print(Rule(title, align="left"))
        try:
            work()
        except StemGymError as error:
            self.skipped[title] = str(error)
            self.screen.print(f"skipped: {error}", style="yellow", markup=False)

    def keep(self, path: Path, what: str) -> None:
        self.made[str(path)] = what

    def compare(self) -> None:
        """Agents in the same worlds."""
        plan = bench.Plan([ID], usable_agents(ID), self.settings.episodes, seed=0)
        with Progress(self.screen) as progress:
            bench.bench(plan, self.folder / "bench", progress.episodes, self.outcomes)
        self.screen.print(outcome.table(self.outcomes), "")
        self.keep(self.folder / "bench", "every episode of the comparison, JSON and CSV")
        self.keep(pictures.comparison(self.outcomes, PANELS, self.folder / "comparison.png"), "the agents compared")

    def learn(self) -> None:
        """PPO from nothing, for a few minutes."""
        folder = self.folder / "training"
        clear_training(folder)  # each demo learns from nothing
        train.train(train.Training("ppo", ID, folder, using={"minutes": self.settings.minutes}))
        points = train.curve_of(folder)
        values = [value for _, value in points]
        self.screen.print(f"return while learning: {pictures.spark(values)}")
        self.screen.print(train.rise(points))
        levels = {found.agent: outcome.summarise(found)["return"] for found in self.outcomes if found.agent != "ppo"}
        labels = (
            f"PPO from nothing, {self.settings.minutes:g} minutes",
            "environment steps",
            "mean return of an episode",
        )
        self.keep(pictures.curve(points, levels, labels, self.folder / "learning_curve.png"), "the learning curve")
        self.keep(folder, "checkpoint, TensorBoard log and the policy of this training")

    def run_on_nion(self) -> None:
        """The best of the policies on Nion Swift: our specimen behind its real scan threads."""
        folder = self.folder / "nion"
        policy = self._best()
        job = deploy.Deployment(policy, ID, "nion", episodes=1, seed=1, record=folder)
        with Progress(self.screen) as progress:
            done = deploy.deploy(job, progress.steps)
        self.screen.print(outcome.episode_table(done), "")
        images = recorded_frames(sorted(folder.glob("*.h5"))[-1], _STRIP)
        title = f"{policy} on Nion Swift: frames of the recording"
        self.keep(
            pictures.frames(images, title, self.folder / "nion_frames.png"), "frames that came back from Nion Swift"
        )
        self.keep(folder, "the recording: every instruction, reading and cost (HDF5)")

    def film(self) -> None:
        """One episode as a video, drawn by the environment."""
        for name in dict.fromkeys(("lock_on", self._best())):
            path = video(ID, name, self.folder, seed=1)
            self.keep(path, f"an episode of {name}: frame, probe, dwells, dose, ledger")

    def _best(self) -> str:
        """The shipped PPO policy where there is one, else the classical expert."""
        return "ppo" if agents_package().shipped("ppo", ID) is not None else "lock_on"


def demo(settings: Settings, screen: Console) -> Result:
    """Everything; ends by printing what was made and what to try next."""
    started = time.monotonic()
    run = _Demo(settings, screen)
    check_training(run.folder / "training")
    run.part(f"1/4  {settings.episodes} episodes of each agent on {ID}", run.compare)
    run.part(f"2/4  PPO learns from nothing for {settings.minutes:g} minutes", run.learn)
    run.part("3/4  A policy on Nion Swift", run.run_on_nion)
    run.part("4/4  A video of an episode", run.film)
    result = Result(run.made, run.skipped, time.monotonic() - started)
    _farewell(result, screen)
    return result


def check_training(folder: Path) -> None:
    """Raises ConfigError for a folder that holds something else than a training: nobody's work is overwritten."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _CHECKPOINT).is_file():
        raise ConfigError(
            f"The demo would train in {folder}, which holds something else: it has no {_CHECKPOINT}. "
            "Name another folder with --out."
        )


def clear_training(folder: Path) -> None:
    """Remove what an earlier training wrote, and nothing else; the checkpoint, by which it is known, at the end."""
    check_training(folder)
    for path in [*folder.glob("tensorboard/events.out.tfevents.*"), *(folder / name for name in _TRAINED)]:
        path.unlink(missing_ok=True)


def usable_agents(id: str) -> list[str]:
    """Those of AGENTS that can act on `id` without being trained first."""
    env = gymnasium.make_vec(id, num_envs=1, autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED)
    try:
        return [name for name in AGENTS if _usable(name, env)]
    finally:
        env.close()


def _usable(name: str, env: Any) -> bool:
    try:
        policy_for(name, env)
    except StemGymError:
        return False
    return True


def recorded_frames(path: Path, most: int) -> list[tuple[str, Any]]:
    """Up to `most` scanned frames of a recording, spread over the episode, with the time and field of each."""
    from stem_gym.core.instructions import Scan
    from stem_gym.instruments.recorder import read_recording

    clock_s, found = 0.0, []
    for record in read_recording(path).records:
        if record.reading is None:
            continue
        clock_s += float(record.reading.seconds[0])
        if isinstance(record.instruction, Scan):
            side_ang = float(record.instruction.fov_ang[0] * record.instruction.region[0, 2])
            found.append((f"{clock_s:.1f} s, {side_ang:.1f} Å", record.reading.data["images"][0, 0].numpy()))
    if not found:
        raise StemGymError(f"The recording {path} holds no scanned frame.")
    wanted = min(most, len(found))
    return [found[round(i * (len(found) - 1) / max(1, wanted - 1))] for i in range(wanted)]


def video(id: str, agent: str, folder: Path, seed: int) -> Path:
    """An episode of an agent in the world `seed`, as an MP4 in `folder`."""
    from stem_gym.core.errors import missing_extra

    try:
        import moviepy  # noqa: F401 – what Gymnasium writes videos with
    except ImportError as error:
        raise missing_extra("Writing a video", "viz") from error
    env = gymnasium.make(id, render_mode="rgb_array")
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        where = str(Path(draft) / "video")
        film = gymnasium.wrappers.RecordVideo(env, where, lambda number: True, fps=_FILM_FPS, disable_logger=True)
        try:
            deploy.play(film, policy_for(agent, env), 0, seed)
        finally:
            film.close()
        return next(Path(where).glob("*.mp4")).rename(folder / f"episode_{agent}.mp4")


def _farewell(result: Result, screen: Console) -> None:
    screen.print(Rule(f"Made in {result.seconds / 60:.1f} minutes", align="left"))
    width = max(map(len, result.made), default=0)
    for path, what in result.made.items():
        screen.print(f"  {path:<{width}}  {what}", soft_wrap=True)
    for part, why in result.skipped.items():
        screen.print(f"  not made: {part}: {why}", style="yellow", soft_wrap=True, markup=False)
    screen.print(
        "Try next:\n"
        f"  .venv/bin/stem-gym show {ID}\n"
        f"  .venv/bin/stem-gym bench {ID} --agents raster,lock_on --episodes 50 --out runs/bench\n"
        f"  .venv/bin/stem-gym train ppo {ID} --out runs/ppo\n"
        f"  .venv/bin/stem-gym deploy runs/ppo {ID} --instrument nion --record runs/nion",
        soft_wrap=True,
    )
