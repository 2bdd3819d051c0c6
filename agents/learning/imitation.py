"""A warm start for atom targeting: the network imitates a script that remembers nothing, in states it gets into itself.

The script is a pure function of the observation, so that it can label any state (dataset aggregation: Ross, Gordon and
Bagnell, AISTATS 2011). It looks at an old frame again, goes from a full frame to a small one around a spot that was not
served, and dwells on the spot of a fresh small frame. It does not estimate the drift: learning has to better it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from pydantic import Field
from torch import Tensor

from agents.engine.sight import Field as TaskField
from agents.engine.sight import brightest_spots, centroids, field_of, fractions_of
from agents.learning.network import PointingNetwork
from agents.policy import Array, face_of
from stem_gym.core.config import Config
from stem_gym.core.streams import Streams, row_seeds

_STALE_S = 0.02  # a frame older than this has to be taken anew
_SMALL_ANG = 9.0  # a frame smaller than this is one to dwell from


class Imitation(Config):
    """The warm start."""

    rounds: int = Field(8, ge=1)
    """times that states are gathered and learned from"""
    steps: int = Field(48, ge=1)
    """steps of every row in a round"""
    passes: int = Field(4, ge=1)
    """times that all states so far are used in a round"""
    learning_rate: float = Field(1e-3, gt=0)
    """of the imitation at the start; falls linearly to a tenth"""
    served: float = Field(1.03, gt=0)
    """share of the wanted electrons after which the script leaves a site"""
    dwell_s: float = Field(1.2, gt=0)
    """longest dwell of the script"""
    side_ang: float = Field(6.0, gt=0)
    """side of its small frames"""
    spread: tuple[float, ...] = (0.3, 0.01, 0.01, 0.25, 0.2)
    """standard deviation of the imitation and of the exploration that starts from it, for each number of the action"""


class Script:
    """Actions (B, 5) for observations (B, …), and which of their numbers matter."""

    def __init__(self, field: TaskField, settings: Imitation) -> None:
        self.field, self.settings = field, settings

    def __call__(self, seen: Mapping[str, Array]) -> tuple[Array, Array]:
        field, settings = self.field, self.settings
        region, fov = seen["region"].astype(np.float64), field.fov_ang
        small = region[:, 2] * fov < _SMALL_ANG
        fresh = 10.0 * seen["frame"][:, 1] < _STALE_S
        spot, shown = self._best_spot(seen, region, small)
        share, home = self._site_at(seen, seen["probe"].astype(np.float64))
        begun = (share > 0.0) & (share < settings.served)
        dwell = fresh & small & shown
        closer = fresh & ~small & shown
        again = ~fresh & begun  # the same site once more
        centre = np.where(closer[:, None], spot, np.where(again[:, None], home, 0.5))
        side = np.where(closer | again, settings.side_ang, fov)
        slow = np.where(closer | again, 8e-6, 3e-5)
        missing = np.where(begun, settings.served - share, settings.served)
        seconds = np.minimum(settings.dwell_s, 4.0 * missing + 0.05)
        action = np.where(dwell[:, None], field.stay(spot, seconds), field.scan(centre, side, slow))
        matters = np.ones_like(action)
        matters[dwell, 3] = 0.0
        matters[~(dwell | closer | again), 1:3] = 0.0  # a full frame has no place
        return action, matters

    def _best_spot(self, seen: Mapping[str, Array], region: Array, small: Array) -> tuple[Array, Array]:
        """The unserved spot next to the probe (full frame) or the brightest (small one), and whether there is one."""
        field = self.field
        image = fractions_of(seen, field)
        size = image.shape[2]
        pixels, height = brightest_spots(image, field.probe_sigma_ang * size / field.fov_ang, field.targets)
        fine, fine_height = brightest_spots(image, field.probe_sigma_ang * size / self.settings.side_ang, 1)
        fine, _ = centroids(image, fine, field.probe_sigma_ang * size / (region[:, 2] * field.fov_ang))
        full = region[:, None, :2] + (pixels + 0.5) / size * region[:, None, 2:]
        near = region[:, :2] + (fine[:, 0] + 0.5) / size * region[:, 2:]
        sites = seen["delivered"].astype(np.float64)
        served = sites[:, None, :, 2] >= self.settings.served  # (B, 1, N)
        away = np.linalg.norm(full[:, :, None] - sites[:, None, :, :2], axis=-1) * field.fov_ang
        away = np.where(served, away, 1e3).min(2)
        bright = height > 0.5 * field.accepted_fraction
        # As many spots as were served are those; their marks stay behind when the sample drifts, so the nearest count.
        order = np.where(bright, away, 1e6).argsort(1).argsort(1)
        free = bright & (order >= served.sum(2))
        near_probe = np.linalg.norm(full - seen["probe"][:, None], axis=-1)
        chosen = np.where(free, near_probe, np.where(bright, 1e3 - away, 1e6)).argmin(1)
        rows = np.arange(len(chosen))
        spot = np.where(small[:, None], near, full[rows, chosen])
        shown = np.where(small, fine_height[:, 0] > 0.5 * field.accepted_fraction, bright.any(1))
        return spot, shown

    def _site_at(self, seen: Mapping[str, Array], place: Array) -> tuple[Array, Array]:
        """Share given to the site of the last dwell, 0 where there is none, and its place."""
        sites = seen["delivered"].astype(np.float64)
        away = np.linalg.norm(sites[:, :, :2] - place[:, None], axis=-1) * self.field.fov_ang
        away = np.where(sites[:, :, 2] > 0.0, away, 1e3)
        rows, nearest = np.arange(len(sites)), away.argmin(1)
        close = away[rows, nearest] < 1.5
        return np.where(close, sites[rows, nearest, 2], 0.0), sites[rows, nearest, :2]


def imitate(
    network: PointingNetwork,
    id: str,
    settings: Imitation,
    rows: int,
    seed: int,
    overrides: Mapping[str, Any],
) -> float:
    """Teach `network` the script, in place; gives the last round's loss."""
    env = gymnasium.make_vec(id, num_envs=rows, autoreset_mode=AutoresetMode.SAME_STEP, **overrides)
    streams = Streams(row_seeds(seed, rows))
    streams.next_episode(torch.arange(rows))
    script = Script(field_of(face_of(env), "the warm start"), settings)
    spread = torch.tensor(settings.spread)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    gathered: dict[str, list[Tensor]] = {}
    loss = float("nan")
    observation, _ = env.reset(seed=seed)
    for round_ in range(settings.rounds):
        for _ in range(settings.steps):
            wanted, matters = script(observation)
            _gather(gathered, {**observation, "-wanted": wanted, "-matters": matters})
            with torch.no_grad():
                own = network({key: torch.as_tensor(value) for key, value in observation.items()})[0]
            led = streams.uniform(torch.arange(rows)) < 0.5**round_  # the script leads at first, then the network
            noise = spread * streams.normal(torch.arange(rows), (len(spread),))
            action = torch.where(led.unsqueeze(1), torch.as_tensor(wanted), own) + noise
            observation = env.step(action.clamp(-1.0, 1.0).numpy())[0]
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1.0 - 0.9 * round_ / settings.rounds)
        loss = _learn(network, optimizer, gathered, settings, streams)
    env.close()
    with torch.no_grad():
        network.log_std.copy_(spread.log())
    return loss


def _gather(gathered: dict[str, list[Tensor]], step: Mapping[str, Array]) -> None:
    for key, value in step.items():
        gathered.setdefault(key, []).append(torch.as_tensor(value).clone())


def _learn(
    network: PointingNetwork,
    optimizer: torch.optim.Optimizer,
    gathered: Mapping[str, list[Tensor]],
    settings: Imitation,
    streams: Streams,
) -> float:
    """Some passes over all states; gives the mean loss of the last."""
    data = {key: torch.cat(values) for key, values in gathered.items()}
    spread, count = torch.tensor(settings.spread), len(data["-wanted"])
    total, batches = 0.0, 0
    for pass_ in range(settings.passes):
        order = streams.uniform(torch.zeros(1, dtype=torch.int64), (count,))[0].argsort()
        for index in order.split(256):
            part = {key: value[index] for key, value in data.items()}
            mean, _ = network({key: value for key, value in part.items() if not key.startswith("-")})
            miss = (mean - part["-wanted"]) / spread * part["-matters"]
            loss = _missed(miss).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            if pass_ == settings.passes - 1:
                total, batches = total + float(loss.detach()), batches + 1
    return total / max(1, batches)


def _missed(miss: Tensor) -> Tensor:
    """Squared for small misses, linear for large ones: two spots that look alike must not pull to their middle."""
    return torch.nn.functional.huber_loss(miss, torch.zeros_like(miss), reduction="none", delta=2.0)
