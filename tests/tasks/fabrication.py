"""Worlds, readings by hand and a sensible policy for the tests of beam fabrication."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stem_gym.core.config import parse
from stem_gym.core.instructions import Reading
from stem_gym.envs.batch import BatchEnv
from stem_gym.envs.variants import build, load_variant
from stem_gym.tasks.beam_fabrication import BeamFabrication, BeamFabricationConfig

ID = "stem_gym/BeamFabrication-v0"
CPU, ROW = torch.device("cpu"), torch.tensor([0])
BOND_ANG, FOV_ANG = 1.42, 25.0
TERMS = ("reward_progress", "reward_success", "reward_time", "reward_damage")
BONDS = [[BOND_ANG * math.cos(a), BOND_ANG * math.sin(a)] for a in (0.3, 0.3 + 2 * math.pi / 3, 0.3 - 2 * math.pi / 3)]


def task(**changes: Any) -> BeamFabrication:
    settings = load_variant(ID, {"task": changes}).variant.task
    return BeamFabrication(parse(BeamFabricationConfig, settings, "test"))


def batch(rows: int = 2, id: str = ID, **sections: Any) -> BatchEnv:
    return build(load_variant(id, sections), rows)


def start(env: BatchEnv, seed: int = 0) -> Any:
    return env.reset(torch.arange(env.rows), [seed + 100 * row for row in range(env.rows)])


# Readings by hand, of one row


def frame(
    atoms: list[tuple[float, float]], shift: tuple[float, float] = (0.0, 0.0), seconds: float = 2.0, flip: bool = False
) -> Reading:
    """A frame that shows atoms at places in Å from its middle; NaN is one that it does not show."""
    place, n = torch.tensor([atoms]) / FOV_ANG + 0.5, len(atoms)
    bonds = torch.tensor(BONDS).repeat(1, n, 1, 1) * (-1.0 if flip else 1.0)
    data = {"atoms": place, "bonds_ang": bonds, "shift_ang": torch.tensor([shift])}
    one = torch.ones(1)
    return Reading("Scan", ROW, one * seconds, one, one, data, {})


def dwelled(trace: list[float], seconds: float, place: tuple[float, float] = (0.5, 0.5)) -> Reading:
    one = torch.ones(1)
    return Reading("Dwell", ROW, one * seconds, one, one, {
        "place": torch.tensor([place]), "trace": torch.tensor([trace])}, {})  # fmt: skip


def world(
    atoms: list[tuple[float, float]], there: list[bool] | None = None, centre: tuple[float, float] = (9.0, 4.0),
    lost: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Truth: dopants at places in Å from the middle of the first frame, which lies at `centre` on the specimen."""
    return {
        "dopant_xy_ang": torch.remainder(torch.tensor([atoms]) + torch.tensor(centre), 30.0),
        "dopant_there": torch.tensor([there or [True] * len(atoms)]),
        "cell_ang": torch.tensor([[30.0, 30.0]]),
        "frame_centre_ang": torch.tensor([centre]),
        "fov_ang": torch.tensor([FOV_ANG]),
        "jumps": torch.tensor([0]),
        "lost_atoms": torch.tensor([lost]),
        "vacancies": torch.tensor([lost]),
    }


def opened(it: BeamFabrication, atoms: list[tuple[float, float]], chance: float = 0.5, **more: Any) -> Any:
    state = it.take_chance(it.start(1, CPU), torch.tensor([[chance]]))
    return it.observe(state, [frame(atoms, **more)])[0]


def pairs(it: Any, **changes: Any) -> Any:
    return it(dopants=2, pattern="dimer", **changes)


def greedy(env: BatchEnv) -> Tensor:
    """From the observation alone: the beam on the neighbour that is nearest to the goal, for 5 s."""
    seen, config, rows = env._observation, env.task.config, torch.arange(env.rows)
    bonds = BOND_ANG * seen["bonds"]
    pick = (bonds - 10.0 * seen["goal"].unsqueeze(1)).norm(dim=-1).argmin(1)
    if config.dwells_s:
        return pick + 3
    action = torch.zeros(env.rows, *env.action_space.shape)
    action[:, :2] = (bonds[rows, pick] / config.reach_ang).clamp(-1.0, 1.0)
    if config.dwell_min_s < config.dwell_max_s:
        action[:, 2] = 0.35
    return action
