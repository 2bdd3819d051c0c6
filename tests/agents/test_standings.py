"""Who wins: a sensible script must win its task, and the shipped policy must beat the two simple agents.

All agents meet the same 24 worlds. The gaps are many standard errors wide: return of uniform about −4, of raster −2,
of the shipped policy above 1.5, of lock_on above 2.5, each with a standard error below 0.4 (the README of the weights).
"""

from __future__ import annotations

import json
import math

import gymnasium
import pytest
from gymnasium.vector import AutoresetMode

import agents

ID = "stem_gym/AtomTargeting-v0"
EPISODES = 24


def means(name, id=ID, episodes=EPISODES):
    env = gymnasium.make_vec(id, num_envs=episodes, autoreset_mode=AutoresetMode.DISABLED, fused=False)
    results = agents.evaluate(agents.make(name, env), id, episodes, seed=21, env=env)
    env.close()
    return {key: sum(float(row[key]) for row in results) / episodes for key in results[0]}


@pytest.fixture(scope="module")
def standing():
    return {name: means(name) for name in ("uniform", "raster", "lock_on", "ppo")}


def test_lock_on_serves_nine_tenths_of_the_targets(standing):
    assert standing["lock_on"]["targets_served"] / 3.0 >= 0.9
    assert standing["lock_on"]["success"] >= 0.9


def test_lock_on_beats_raster_on_the_useful_share(standing):
    assert standing["lock_on"]["useful_share"] > standing["raster"]["useful_share"] + 0.3


def test_lock_on_points_to_a_fraction_of_the_radius(standing):
    """The radius is 50 pm; a good operator's script stays within half of it."""
    assert standing["lock_on"]["pointing_error_pm"] < 25.0


@pytest.mark.parametrize("other", ["uniform", "raster"])
def test_the_shipped_ppo_beats_the_simple_agents(standing, other):
    for figure in ("return", "targets_served", "useful_share"):
        assert standing["ppo"][figure] > standing[other][figure], figure


def test_the_order_of_returns_is_as_told(standing):
    returns = [standing[name]["return"] for name in ("uniform", "raster", "ppo", "lock_on")]
    assert returns == sorted(returns)


@pytest.mark.parametrize("variant", ["lowdose", "manydopants"])
def test_lock_on_wins_the_variants_too(variant):
    id = f"stem_gym/AtomTargeting-{variant}-v0"
    assert means("lock_on", id, episodes=12)["success"] >= 0.9


@pytest.mark.parametrize(("name", "folder"), agents.shipped_policies(), ids=lambda value: getattr(value, "name", value))
def test_every_shipped_policy_is_whole(name, folder):
    """Loads for its own id, is small, and says how it was made and how well it does."""
    contract = json.loads((folder / "policy.json").read_text())
    env = gymnasium.make_vec(contract["id"], num_envs=1)
    agents.load(folder, env)
    assert contract["agent"] == name and agents.shipped(name, contract["id"]) == folder
    assert (folder / "policy.safetensors").stat().st_size < 4e6
    assert (folder / "curve.csv").exists() and (folder / "curve.png").exists()
    page = (folder / "README.md").read_text()
    assert f"stem-gym train {name} {contract['id']}" in page
    assert "`uniform`" in page and any(
        f"`{script}`" in page for script in ("lock_on", "greedy", "raster", "random_designs")
    )
    told = json.loads((folder / "evaluation.json").read_text())["mean_and_standard_error"][name]
    assert all(math.isfinite(value) for pair in told.values() for value in pair)
    env.close()
