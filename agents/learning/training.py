"""A PPO training run in a folder: progress on the screen, curve, TensorBoard, checkpoints, resumed after a kill.

The folder holds `policy.safetensors` and `policy.json` (the policy so far), `checkpoint.safetensors` (to go on from),
`curve.csv`, `curve.png` and `tensorboard/`.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import torch
from gymnasium.vector import AutoresetMode

from agents.learning.actor_critic import NetworkPolicy, value_of
from agents.learning.checkpoint import read_checkpoint, write_checkpoint
from agents.learning.curve import draw_curve, read_curve, write_curve
from agents.learning.extra import PPO, BaseCallback, configure
from agents.learning.map_network import MapSettings
from agents.learning.network import NetworkSettings
from agents.learning.progress import Bar
from agents.learning.run import Run, Training
from agents.learning.vec_env import VectorAdapter
from stem_gym.core.errors import ConfigError
from stem_gym.core.streams import row_seeds

_CURVE = (
    "return",
    "length",
    "targets_served",
    "success",
    "useful_share",
    "seconds",
    "pointing_error_pm",
    "best_share",
    "area_under_best",
)


def train_network(
    run: Run,
    network: NetworkSettings | MapSettings,
    warm_start: Callable[[Any], Mapping[str, Any]] | None,
    resume: bool,
) -> None:
    """Train until the steps or minutes are over. Ctrl-C keeps what was done and is raised again.

    `warm_start` teaches a new run's network before, and tells how. Raises RecordError for a folder that can not be
    written.
    """
    _check_minibatch(run.training)
    torch.set_num_threads(run.training.threads)
    _keep_memory()
    run.make_folder()
    env = gymnasium.make_vec(
        run.id, num_envs=run.training.rows, autoreset_mode=AutoresetMode.SAME_STEP, **run.overrides
    )
    try:
        learner = _learner(run, env, network)
        progress = read_checkpoint(run.folder, learner.policy.network, learner.policy.optimizer) if resume else None
        if progress is not None:
            learner.num_timesteps, run.spent_s, run.warm = (
                progress["steps"],
                progress["seconds"],
                progress["warm_start"] or {},
            )
            run.curve = [point for point in read_curve(run.folder) if point["steps"] <= progress["steps"]]
            run.critic_updates = progress["critic_updates_left"]
            # New worlds: those of the beginning were learned from.
            learner.set_random_seed(row_seeds(run.training.seed, progress["steps"] % 997 + 2)[-1] % 2**31)
        elif warm_start is not None:
            run.warm = warm_start(learner.policy.network)
            run.critic_updates = run.training.critic_updates
            _keep(run, learner)
        _learn(run, learner)
    finally:
        env.close()


def _keep_memory() -> None:
    """Let the C library keep freed memory: batches of pictures otherwise come back from the system page by page."""
    allocator = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if allocator is not None:
        for option, value in ((-1, 2**30), (-2, 2**26), (-3, 2**25)):  # trim threshold, top pad, mmap threshold
            allocator(option, value)


def _check_minibatch(training: Training) -> None:
    samples = training.rows * training.rollout
    if samples % training.minibatch:
        raise ConfigError(
            f"minibatch must divide rows × rollout = {samples}; given {training.minibatch}. "
            f"{max(n for n in range(1, training.minibatch + 1) if samples % n == 0)} would."
        )


def _learner(run: Run, env: gymnasium.vector.VectorEnv, network: NetworkSettings | MapSettings) -> Any:
    training = run.training
    adapter = VectorAdapter(env, gamma=training.gamma)
    learner = PPO(
        NetworkPolicy,
        adapter,
        learning_rate=training.learning_rate,
        n_steps=training.rollout,
        batch_size=training.minibatch,
        n_epochs=training.epochs,
        gamma=training.gamma,
        gae_lambda=training.gae_lambda,
        ent_coef=training.entropy,
        target_kl=training.target_kl,
        policy_kwargs={"network_settings": network, "critic_rate": training.critic_rate},
        seed=training.seed,
        device="cpu",
    )
    adapter.value_of = value_of(learner.policy)
    learner.set_logger(configure(str(run.folder / "tensorboard"), ["tensorboard"]))
    return learner


def _learn(run: Run, learner: Any) -> None:
    with Bar(run.training.steps, run.quiet) as bar:
        watch = _Watch(run, bar)
        try:
            if run.done(learner.num_timesteps) < 1.0:
                learner.learn(run.training.steps, callback=watch, reset_num_timesteps=False)
        finally:
            _keep(run, learner, final=True)


def _keep(run: Run, learner: Any, final: bool = False) -> None:
    """Write the checkpoint, the policy and the curve; the picture at the end alone."""
    progress = {
        "steps": learner.num_timesteps,
        "seconds": round(run.seconds, 1),
        "id": run.id,
        "warm_start": run.warm or None,
        "critic_updates_left": run.critic_updates,
    }
    write_checkpoint(run.folder, learner.policy.network, learner.policy.optimizer, progress)
    write_curve(run.folder, run.curve)
    facts = {"algorithm": "PPO (Stable-Baselines3)", **progress, **run.made_with}
    run.save_network(learner.policy.network, facts)
    if final and run.curve:
        draw_curve(run.curve, run.folder / "curve.png", f"PPO on {run.id}")


class _Watch(BaseCallback):
    """Collects episodes, sets the schedules, keeps checkpoints, and stops when the time is over."""

    def __init__(self, run: Run, bar: Bar) -> None:
        super().__init__()
        self._run, self._bar = run, bar
        self._episodes: list[dict[str, float]] = []
        self._kept: tuple[int, float] | None = None  # steps and time of the last checkpoint of this session
        self._waiting = set(range(run.training.rows))  # rows whose first episode has not ended

    def _on_training_start(self) -> None:
        # learn() counts `total_timesteps` on top of those done before; the end is the run's own.
        self.model._total_timesteps = self._run.training.steps

    def _on_step(self) -> bool:
        if self._run.started is None:
            self._run.started = time.monotonic()
        for row, info in enumerate(self.locals["infos"]):
            if info and row in self._waiting:
                self._waiting.discard(row)  # not counted: of the first episodes the short ones would end first
            elif info:
                self._episodes.append(
                    {"return": info["episode"]["r"], "length": info["episode"]["l"], **info["metrics"]}
                )
        return self._run.done(self.num_timesteps) < 1.0

    def _on_rollout_end(self) -> None:
        run, model = self._run, self.model
        left = 1.0 - run.done(self.num_timesteps)
        model.ent_coef = run.training.entropy * left
        rate = run.training.learning_rate * (0.1 + 0.9 * left)
        model.lr_schedule = lambda _: rate
        for name, parameter in model.policy.network.named_parameters():
            parameter.requires_grad_(run.critic_updates == 0 or name.startswith("critic"))
        run.critic_updates = max(0, run.critic_updates - 1)
        if len(self._episodes) >= 20:
            run.curve.append(self._point())
            for name, value in run.curve[-1].items():
                self.logger.record(f"episode/{name}", value)
            self._episodes.clear()
        self._bar.update(self.num_timesteps, run.curve[-1] if run.curve else {}, 1.0 - left)
        if self._is_due():
            _keep(run, model)
            self._kept = self.num_timesteps, time.monotonic()

    def _is_due(self) -> bool:
        """Whether so many steps or seconds have passed that a kill would cost more than a checkpoint does."""
        if self._kept is None:
            return True
        steps, seconds = self.num_timesteps - self._kept[0], time.monotonic() - self._kept[1]
        return steps >= self._run.training.checkpoint_steps or seconds >= self._run.training.checkpoint_seconds

    def _point(self) -> dict[str, float]:
        """Means over the episodes that ended since the last point."""
        point = {"steps": float(self.num_timesteps), "minutes": self._run.seconds / 60.0}
        for name in _CURVE:
            values = [
                episode[name] for episode in self._episodes if episode.get(name, float("nan")) == episode.get(name)
            ]
            if values:
                point[name] = sum(values) / len(values)
        return point
