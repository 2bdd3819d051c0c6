"""PPO for campaigns of experiments, in a folder as other runs: what to do is reinforced, what to believe is taught.

Kinds, experiments and sites are picked at random from the network's logits and reinforced with clipped ratios and
generalised advantages (Schulman et al., arXiv 1707.06347 and 1506.02438). The probabilities of the answers are no
choice: they are taught the true answer of every simulated world by the logarithmic score, at every step of the same
episodes, so that what is declared is a posterior for the very experiments that the policy does. Stable-Baselines3 has
no place for such a second lesson, hence this loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from agents.learning.checkpoint import read_checkpoint, write_checkpoint
from agents.learning.curve import draw_curve, read_curve, write_curve
from agents.learning.history_network import HistoryNetwork, Picked, entropy, log_probability, sampled
from agents.learning.progress import Bar
from agents.learning.run import Run
from stem_gym.core.errors import CapabilityError
from stem_gym.core.streams import Streams, row_seeds

ANSWER = "true_answer"  # of a simulated world, in `info`
_CLIP = 0.2
_VALUE_WEIGHT, _LESSON_WEIGHT = 0.5, 1.0
_LARGEST_GRADIENT = 1.0
_EPISODES_A_POINT = 400  # of the learning curve, at least
_POINTS = 200  # of the curve, at most
_CURVE = ("success", "claim_right", "log_score", "score_with_costs", "experiments", "enabling", "seconds")


@dataclass(frozen=True)
class Rollout:
    """Steps (S) of rows (B), flattened to (S·B, …)."""

    observation: Mapping[str, Tensor]
    picked: Picked
    log_probability: Tensor
    advantage: Tensor
    wanted: Tensor  # value
    answer: Tensor  # int64


def train_history(run: Run, network: HistoryNetwork, resume: bool) -> None:
    """Train the network in place until the steps or minutes are over. Ctrl-C keeps what was done and is raised again.

    Raises CapabilityError for an environment that does not know the true answers.
    """
    torch.set_num_threads(run.training.threads)
    run.make_folder()
    optimizer = torch.optim.Adam(network.parameters(), lr=run.training.learning_rate, eps=1e-5)
    progress = read_checkpoint(run.folder, network, optimizer) if resume else None
    steps = 0
    if progress is not None:
        steps, run.spent_s = progress["steps"], progress["seconds"]
        run.curve = [point for point in read_curve(run.folder) if point["steps"] <= steps]
    env = gymnasium.make_vec(
        run.id, num_envs=run.training.rows, autoreset_mode=AutoresetMode.SAME_STEP, **run.overrides
    )
    try:
        _Learner(run, network, optimizer, env, steps).learn()
    finally:
        env.close()


class _Learner:
    """The loop: gather, learn, keep."""

    def __init__(self, run: Run, network: HistoryNetwork, optimizer: Any, env: Any, steps: int) -> None:
        self._run, self._network, self._optimizer, self._env, self._steps = run, network, optimizer, env, steps
        rows = run.training.rows
        # A resumed run sees new worlds: those of the beginning were learned from.
        seeds = row_seeds(run.training.seed, rows + steps % 997 + 1)[-rows:]
        self._streams, self._rows = Streams(seeds), torch.arange(rows)
        self._streams.next_episode(self._rows)
        self._episodes: list[dict[str, float]] = []
        self._next_point = 0.0  # share of the run
        self._return, self._length = torch.zeros(rows), torch.zeros(rows)
        observation, info = env.reset(seed=seeds)
        self._seen, self._answer = _tensors(observation), self._answers(info)

    def learn(self) -> None:
        run = self._run
        run.started = kept = time.monotonic()
        with Bar(run.training.steps, run.quiet) as bar:
            try:
                while (done := run.done(self._steps)) < 1.0:
                    rollout = self._gather()
                    self._improve(rollout, 1.0 - done)
                    self._note()
                    bar.update(self._steps, run.curve[-1] if run.curve else {}, done)
                    if time.monotonic() - kept > run.training.checkpoint_seconds:
                        self._keep()
                        kept = time.monotonic()
            finally:
                self._keep(final=True)

    @torch.no_grad()
    def _gather(self) -> Rollout:
        training, gamma = self._run.training, self._run.training.gamma
        seen: list[Mapping[str, Tensor]] = []
        kept: dict[str, list[Tensor]] = {
            key: [] for key in ("kind", "design", "site", "log", "value", "reward", "over", "answer")
        }
        for _ in range(training.rollout):
            choice = self._network(self._seen)
            picked = sampled(choice, self._streams.uniform(self._rows, (3,)))
            seen.append(self._seen)
            before = self._answer
            action = self._network.action(picked, choice.answer)
            observation, reward, terminated, _, info = self._env.step(action.numpy())
            reward, over = torch.as_tensor(reward).float(), torch.as_tensor(terminated)
            self._seen, self._answer = _tensors(observation), self._answers(info)
            self._count(reward, over, info)
            row = (picked.kind, picked.design, picked.site, log_probability(choice, picked), choice.value)
            for key, value in zip(kept, (*row, reward, over, before), strict=True):
                kept[key].append(value)
        self._steps += training.rows * training.rollout
        stacked = {key: torch.stack(values) for key, values in kept.items()}
        going = (~stacked["over"]).float()
        value = torch.cat((stacked["value"], self._network(self._seen).value.unsqueeze(0)))
        surprise = stacked["reward"] + gamma * going * value[1:] - value[:-1]
        advantage, later = torch.zeros_like(surprise), torch.zeros(training.rows)
        for step in reversed(range(training.rollout)):
            later = surprise[step] + gamma * training.gae_lambda * going[step] * later
            advantage[step] = later
        flat = {key: values.flatten(0, 1) for key, values in stacked.items()}
        return Rollout(
            {key: torch.cat([part[key] for part in seen]) for key in seen[0]},
            Picked(flat["kind"], flat["design"], flat["site"]),
            flat["log"],
            advantage.flatten(),
            (advantage + value[:-1]).flatten(),
            flat["answer"],
        )

    def _improve(self, rollout: Rollout, left: float) -> None:
        """Some passes over the rollout; rates fall linearly with what is `left` of the run."""
        training, samples = self._run.training, len(rollout.advantage)
        reinforced = float(1.0 - left >= training.lessons)
        for group in self._optimizer.param_groups:
            group["lr"] = training.learning_rate * (0.1 + 0.9 * left)
        scale = rollout.advantage.std().clamp(min=1e-6)
        advantage = (rollout.advantage - rollout.advantage.mean()) / scale
        for _ in range(training.epochs):
            order = self._streams.uniform(self._rows[:1], (samples,))[0].argsort()
            for index in order.split(training.minibatch):
                part = {key: value[index] for key, value in rollout.observation.items()}
                picked = Picked(*(column[index] for column in vars(rollout.picked).values()))
                choice = self._network(part)
                ratio = (log_probability(choice, picked) - rollout.log_probability[index]).exp()
                gain = torch.minimum(
                    ratio * advantage[index], ratio.clamp(1.0 - _CLIP, 1.0 + _CLIP) * advantage[index]
                ).mean()
                missed = (choice.value - rollout.wanted[index]).square().mean()
                lesson = torch.nn.functional.cross_entropy(choice.answer, rollout.answer[index])
                spread = training.entropy * left * entropy(choice).mean()
                loss = _VALUE_WEIGHT * missed + _LESSON_WEIGHT * lesson - reinforced * (gain + spread)
                self._optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self._network.parameters(), _LARGEST_GRADIENT)
                self._optimizer.step()
            if training.target_kl is not None and self._moved(rollout) > training.target_kl:
                break

    @torch.no_grad()
    def _moved(self, rollout: Rollout) -> float:
        """How far the policy is from the one that gathered, on a part of what it saw."""
        part = {key: value[:2048] for key, value in rollout.observation.items()}
        picked = Picked(*(column[:2048] for column in vars(rollout.picked).values()))
        log_ratio = log_probability(self._network(part), picked) - rollout.log_probability[:2048]
        return float((log_ratio.exp() - 1.0 - log_ratio).mean())

    def _count(self, reward: Tensor, over: Tensor, info: Mapping[str, Any]) -> None:
        self._return += reward
        self._length += 1
        if not bool(over.any()):
            return
        ended = over.nonzero().squeeze(1)
        final = info["final_info"]
        metrics = {name: torch.as_tensor(final[name]) for name in _CURVE if name in final}
        for row in ended.tolist():
            own = {name: float(value[row]) for name, value in metrics.items()}
            self._episodes.append({"return": float(self._return[row]), "length": float(self._length[row]), **own})
        self._return[ended], self._length[ended] = 0.0, 0.0

    def _note(self) -> None:
        """A point of the curve, of the episodes that ended since the last one."""
        done = self._run.done(self._steps)
        if len(self._episodes) < _EPISODES_A_POINT or done < self._next_point:
            return
        self._next_point = done + 1.0 / _POINTS
        point = {"steps": float(self._steps), "minutes": self._run.seconds / 60.0}
        for name in self._episodes[0]:
            values = [episode[name] for episode in self._episodes if episode[name] == episode[name]]
            if values:
                point[name] = sum(values) / len(values)
        self._run.curve.append(point)
        self._episodes.clear()

    def _keep(self, final: bool = False) -> None:
        run = self._run
        progress = {"steps": self._steps, "seconds": round(run.seconds, 1), "id": run.id}
        write_checkpoint(run.folder, self._network, self._optimizer, progress)
        write_curve(run.folder, run.curve)
        facts = {"algorithm": "PPO with a taught posterior", **progress, **run.made_with}
        run.save_network(self._network, facts)
        if final and run.curve:
            draw_curve(run.curve, run.folder / "curve.png", f"PPO on {run.id}")

    def _answers(self, info: Mapping[str, Any]) -> Tensor:
        if ANSWER not in info:
            raise CapabilityError(
                f"{self._run.id} does not know the true answer ({ANSWER!r} in info), so nothing can be taught; "
                "train on a simulated instrument."
            )
        return torch.as_tensor(info[ANSWER]).long()


def _tensors(observation: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: torch.as_tensor(value) for key, value in observation.items()}
