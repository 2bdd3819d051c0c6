"""Agents by name, settings, entry points, and what holds for every agent that ships."""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import agents
from agents.engine import roster
from agents.policy import Face, Policy
from agents.uniform import Uniform
from stem_gym.core.errors import CapabilityError, ConfigError, PolicyError, UnknownNameError

ID = "stem_gym/AtomTargeting-v0"


@pytest.fixture(scope="module")
def env():
    made = gymnasium.make_vec(ID, num_envs=3, autoreset_mode=AutoresetMode.DISABLED)
    yield made
    made.close()


def settings_for(name: str) -> dict:
    """An agent without a shipped policy for the id is tried untrained."""
    untrained = name == "ppo" and agents.shipped("ppo", ID) is None
    return {"weights": "fresh"} if untrained else {}


@functools.cache
def id_for(name: str) -> str:
    """The first id, ours for atom targeting before all others, that the agent does not refuse."""
    for id in (ID, *sorted(id for id in gymnasium.registry if id.startswith("stem_gym/"))):
        made = gymnasium.make_vec(id, num_envs=1, autoreset_mode=AutoresetMode.DISABLED)
        try:
            agents.make(name, made, **settings_for(name))
            return id
        except PolicyError:
            continue
        finally:
            made.close()
    raise AssertionError(f"{name} serves no id")


@pytest.fixture
def home(name):
    """Three rows of an id that the agent serves."""
    made = gymnasium.make_vec(id_for(name), num_envs=3, autoreset_mode=AutoresetMode.DISABLED)
    yield made
    made.close()


def test_the_four_agents_are_found_by_their_files():
    assert {"uniform", "raster", "lock_on", "ppo"} <= set(agents.names())
    assert "policy" not in agents.names() and agents.list_agents() == agents.names()


@pytest.mark.parametrize("name", roster.names())
def test_every_agent_keeps_the_rules_of_a_policy(name, home):
    """Shape, type, bounds, determinism, rows apart, no global random numbers, saved copy alike."""
    agents.check_policy(agents.make(name, home, **settings_for(name)), home)


@pytest.mark.parametrize("name", roster.names())
def test_every_agent_says_what_it_is_and_explains_its_settings(name):
    assert len(agents.describe()[name]) > 20
    fields = roster.policy_class(name).Settings.model_fields
    assert [key for key, field in fields.items() if not field.description] == []


@pytest.mark.parametrize("name", roster.names())
def test_every_agent_runs_one_row_as_it_runs_many(name, home):
    """Row 1 of three acts as the only row of a policy in the same world."""
    one = gymnasium.make_vec(id_for(name), num_envs=1, autoreset_mode=AutoresetMode.DISABLED)
    many, single = (agents.make(name, face, **settings_for(name)) for face in (home, one))
    observations = home.reset(seed=[11, 12, 13])[0], one.reset(seed=[12])[0]
    many.reset([0, 1, 2], [11, 12, 13])
    single.reset([0], [12])
    for _ in range(3):
        actions = many.act(observations[0]), single.act(observations[1])
        np.testing.assert_allclose(actions[0][1], actions[1][0], atol=1e-5)  # sums of other batch shapes round apart
        actions[1][0] = actions[0][1]  # so that the two worlds stay the same
        observations = home.step(actions[0])[0], one.step(actions[1])[0]
    one.close()


def test_an_unknown_agent_names_the_nearest(env):
    with pytest.raises(UnknownNameError, match="Did you mean 'lock_on'"):
        agents.make("lockon", env)


def test_an_unknown_setting_names_the_nearest(env):
    with pytest.raises(ConfigError, match="Did you mean 'margin'"):
        agents.make("lock_on", env, margn=0.1)


def test_an_ill_typed_setting_is_refused(env):
    with pytest.raises(ConfigError, match=r"seed.*integer"):
        agents.make("uniform", env, seed="7")


def test_an_agent_of_another_distribution_is_found(monkeypatch, env):
    class Third(Uniform):
        name = "third"

    monkeypatch.setitem(sys.modules, "their_agent", SimpleNamespace(POLICY=Third, __name__="their_agent"))
    entry = SimpleNamespace(name="third", value="their_agent")
    monkeypatch.setattr(roster.metadata, "entry_points", lambda group: [entry] if group == "stem_gym.agents" else [])
    assert "third" in agents.names()
    agents.check_policy(agents.make("third", env), env)


def test_a_module_without_a_policy_is_refused(monkeypatch, env):
    monkeypatch.setitem(sys.modules, "their_agent", SimpleNamespace(__name__="their_agent"))
    entry = SimpleNamespace(name="third", value="their_agent")
    monkeypatch.setattr(roster.metadata, "entry_points", lambda group: [entry])
    with pytest.raises(PolicyError, match="POLICY"):
        agents.make("third", env)


def test_an_agent_that_learns_nothing_can_not_be_trained(tmp_path):
    with pytest.raises(CapabilityError, match=r"'uniform' learns nothing.*ppo"):
        agents.train("uniform", ID, out=tmp_path)


@pytest.mark.parametrize("name", ["raster", "lock_on"])
def test_an_agent_for_atoms_refuses_another_task(name):
    face = Face("other/Task-v0", 1, gymnasium.spaces.Dict({}), gymnasium.spaces.Box(-1, 1, (5,)), {"kind": "other"})
    with pytest.raises(PolicyError, match="targets"):
        agents.make(name, face)


class _Broken(Uniform):
    """Breaks one rule, named by `rule`."""

    rule = ""

    def act(self, observation):
        action = super().act(observation)
        if self.rule == "outside":
            action[1] = 2.0
        if self.rule == "type":
            return action.astype(np.float64)
        if self.rule == "global":
            action[0, 0] = np.random.rand()  # noqa: NPY002 – the broken rule
        if self.rule == "changes":
            observation["image"][:] = 0
        if self.rule == "forgets not":
            self.count = getattr(self, "count", 0) + 1
            action[0, 0] = 1.0 / self.count
        if self.rule == "mixes rows":
            action[1:, 0] = 0.1 * (self.face.rows - self.count_resets % 7)
        return action

    count_resets = 0

    def reset(self, rows, seeds=None):
        super().reset(rows, seeds)
        self.count_resets = 0 if len(rows) == self.face.rows else self.count_resets + 1


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        ("outside", "outside"),
        ("type", "float32"),
        ("global", "global random"),
        ("changes", "changed the observation"),
        ("forgets not", "kept something over reset"),
        ("mixes rows", "Resetting row 0"),
    ],
)
def test_check_policy_sees_each_broken_rule(rule, complaint, env, monkeypatch):
    broken = type("Broken", (_Broken,), {"rule": rule})
    policy = broken(agents.face_of(env), Uniform.Settings())
    monkeypatch.setattr(roster, "policy_class", lambda name: broken)
    with pytest.raises(PolicyError, match=complaint):
        agents.check_policy(policy, env)


def test_check_policy_wants_the_env_that_the_policy_is_for(env):
    other = gymnasium.make_vec(ID, num_envs=2, autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(PolicyError, match=r"3 rows .* 2"):
        agents.check_policy(agents.make("uniform", env), other)
    other.close()


def test_a_policy_is_abstract():
    with pytest.raises(TypeError):
        Policy(None, None)
