"""Training runs: they learn, keep what was done, go on after a kill, and say what is wrong before work begins."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import agents
from agents.engine.sight import field_of
from agents.learning import training
from agents.learning.checkpoint import FILE, read_checkpoint, write_checkpoint
from agents.learning.curve import draw_curve, read_curve, write_curve
from agents.learning.imitation import Imitation, Script, imitate
from agents.learning.network import NetworkSettings, PointingNetwork
from agents.learning.run import Training
from agents.learning.ship import command
from agents.policy import face_of
from stem_gym.core.errors import ConfigError, PolicyError, RecordError
from tests.agents.toys import TOY_ID, ToyVectorEnv
from tests.test_project import BLOCKER

REPO = Path(__file__).resolve().parents[2]
ATOMS = "stem_gym/AtomTargeting-v0"
SMALL = {"rows": 4, "rollout": 16, "minibatch": 32, "epochs": 2, "checkpoint_steps": 64}
TINY = {"network": {"hidden": 16}}


def train(out, steps, **options):
    return agents.train("ppo", TOY_ID, out=out, quiet=True, settings=TINY, steps=steps, **(SMALL | options))


def steps_done(folder):
    return json.loads((folder / "policy.json").read_text())["training"]["steps"]


def test_the_reward_rises(tmp_path):
    """The toy pays the first number of the action, so that the mean has to go up; from about 0 to well above."""
    policy = train(tmp_path, 2560, learning_rate=3e-3, rollout=32, minibatch=64, target_kl=None, epochs=4)
    curve = read_curve(tmp_path)
    assert curve[-1]["return"] > curve[0]["return"] + 0.5
    observation = ToyVectorEnv(1).reset()[0]
    assert replace_rows(policy, 1).act(observation)[0, 0] > 0.5


def replace_rows(policy, rows):
    policy.face = replace(policy.face, rows=rows)
    return policy


def test_a_run_leaves_everything_in_its_folder(tmp_path):
    train(tmp_path, 512)
    wanted = {"policy.safetensors", "policy.json", "checkpoint.safetensors", "curve.csv", "curve.png", "tensorboard"}
    assert wanted <= {path.name for path in tmp_path.iterdir()}
    assert list((tmp_path / "tensorboard").glob("events.*"))
    face = face_of(gymnasium.make_vec(TOY_ID, num_envs=2))
    assert agents.load(tmp_path, face).face.rows == 2
    training = json.loads((tmp_path / "policy.json").read_text())["training"]
    assert training["steps"] == 512 and training["settings"]["rollout"] == 16 and training["warm_start"] is None


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    first = train(tmp_path, 256).arrays()
    going_on = train(tmp_path, 512)
    assert steps_done(tmp_path) == 512
    assert [point["steps"] for point in read_curve(tmp_path)] == sorted(p["steps"] for p in read_curve(tmp_path))
    assert any(not np.array_equal(first[name], value) for name, value in going_on.arrays().items())
    again = train(tmp_path, 512)  # nothing left to do
    assert all(np.array_equal(again.arrays()[name], value) for name, value in going_on.arrays().items())


def test_a_fresh_start_forgets_the_checkpoint(tmp_path):
    train(tmp_path, 256)
    train(tmp_path, 128, resume=False)
    assert steps_done(tmp_path) == 128


def test_a_checkpoint_is_written_first_soon_then_by_steps_or_seconds(tmp_path, monkeypatch):
    """A clock that goes on by a second each time that it is looked at; rollouts of 4 × 16 = 64 steps."""
    seconds, kept = itertools.count(), []
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    monkeypatch.setattr(training, "_keep", lambda run, learner, final=False: kept.append(learner.num_timesteps))
    train(tmp_path / "a", 640, checkpoint_steps=256, checkpoint_seconds=1e9)
    assert kept == [64, 320, 576, 640]
    kept.clear()
    train(tmp_path / "b", 64 * 40, checkpoint_steps=10**9, checkpoint_seconds=10.0)
    assert kept[0] == 64 and 3 <= len(kept) <= 8, kept  # a look at the clock a rollout, and some for the curve


def test_minutes_end_a_run(tmp_path):
    train(tmp_path, 10**9, minutes=1e-4)
    assert steps_done(tmp_path) < 10_000


def test_a_checkpoint_restores_network_and_optimiser(tmp_path):
    env = ToyVectorEnv(1)
    spaces = env.single_observation_space, env.single_action_space, NetworkSettings(hidden=8)
    network, other = PointingNetwork(*spaces), PointingNetwork(*spaces)
    adam, other_adam = (torch.optim.Adam(item.parameters(), lr=1e-2) for item in (network, other))
    observation = {key: torch.as_tensor(value) for key, value in env.reset()[0].items()}
    for _ in range(3):
        adam.zero_grad()
        network(observation)[0].square().sum().backward()
        adam.step()
    write_checkpoint(tmp_path, network, adam, {"steps": 7})
    assert read_checkpoint(tmp_path, other, other_adam) == {"steps": 7}
    for item, optimizer in ((network, adam), (other, other_adam)):  # the next step is the same, moments included
        optimizer.zero_grad()
        item(observation)[0].square().sum().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert not list(tmp_path.glob(".*"))  # no draft is left


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    train(tmp_path, 128)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PolicyError, match="no readable checkpoint"):
        train(tmp_path, 256)
    save_file({"x": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(PolicyError, match="is no checkpoint"):
        train(tmp_path, 256)
    (tmp_path / FILE).write_bytes(whole)
    with pytest.raises(PolicyError, match="other settings"):
        agents.train("ppo", TOY_ID, out=tmp_path, quiet=True, settings={"network": {"hidden": 8}}, steps=256, **SMALL)


def test_a_folder_that_can_not_be_written_stops_the_run_before_it_begins(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="Can not write"):
        train(tmp_path / "file" / "run", 128)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"minibatch": 48}, "32 would"), ({"stepz": 3}, "Did you mean 'steps'"), ({"gamma": 1.5}, "gamma")],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        train(tmp_path, 128, **options)


_LONG_RUN = f"""
import sys
import agents, tests.agents.toys
agents.train("ppo", {TOY_ID!r}, out=sys.argv[1], quiet=True, settings={TINY!r}, steps=10**8, **{SMALL!r})
"""


def running(folder):
    """A training in a process of its own, once its first checkpoint is there."""
    process = subprocess.Popen(
        [sys.executable, "-c", _LONG_RUN, str(folder)], cwd=REPO, stderr=subprocess.PIPE, start_new_session=True
    )
    for _ in range(1200):
        if (folder / "policy.json").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_what_was_done_is_kept_and_gone_on_with(tmp_path, stop):
    process = running(tmp_path)
    os.kill(process.pid, stop)
    told = process.communicate(timeout=120)[1].decode()
    assert process.returncode != 0 and ("KeyboardInterrupt" in told) == (stop == signal.SIGINT)
    done = steps_done(tmp_path)
    assert done > 0
    train(tmp_path, done + 256)
    assert done < steps_done(tmp_path) <= done + 256 + 128


def test_without_the_extra_training_says_what_to_install(tmp_path):
    code = (
        BLOCKER
        + f"""
import agents, tests.agents.toys
try:
    agents.train("ppo", {TOY_ID!r}, out={str(tmp_path)!r}, quiet=True, settings={TINY!r}, **{SMALL!r})
except ImportError as error:
    print(type(error).__name__, error)
"""
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=300)
    assert "MissingExtraError" in done.stdout and 'pip install "stem-gym[agents]"' in done.stdout, done.stderr


def test_a_curve_is_read_as_it_was_written(tmp_path):
    curve = [{"steps": 64.0, "return": -1.5}, {"steps": 128.0, "return": 0.25, "targets_served": 2.0}]
    write_curve(tmp_path, curve)
    assert read_curve(tmp_path) == curve and read_curve(tmp_path / "nowhere") == []
    assert draw_curve(curve, tmp_path / "curve.png", "a run").stat().st_size > 5_000


def test_the_script_of_the_warm_start_serves_the_targets():
    """It labels what the network imitates, so it has to be good by itself: nine tenths of the targets."""
    env = gymnasium.make_vec(ATOMS, num_envs=8, autoreset_mode="Disabled")
    script = Script(field_of(face_of(env), "test"), Imitation())
    observation, _ = env.reset(seed=4)
    served = np.zeros(8)
    for _ in range(60):
        observation, _, terminated, _, info = env.step(script(observation)[0].astype(np.float32))
        served = np.maximum(served, info["targets_served"])
        if terminated.any():
            observation, _ = env.reset(options={"reset_mask": terminated})
    assert served.mean() >= 2.7
    env.close()


def test_imitation_brings_the_network_nearer_to_the_script():
    env = gymnasium.make_vec(ATOMS, num_envs=2)
    face = face_of(env)
    torch.manual_seed(1)
    network = PointingNetwork(face.observation_space, face.action_space, NetworkSettings(hidden=32))
    short = Imitation(rounds=1, steps=4, passes=20)
    losses = [imitate(network, ATOMS, short, rows=8, seed=1, overrides={}) for _ in range(4)]
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(network.log_std.detach().exp(), short.spread, rtol=1e-5)


def test_the_page_of_a_policy_tells_its_command_with_all_that_was_changed():
    made = {"settings": Training(rows=8).model_dump(mode="json")}
    made["overrides"] = {"instrument": {"referee": {"particles": 512}}, "budget": {"steps": 9}}
    told = command({"agent": "ppo", "id": "stem_gym/X-v0", "settings": {}, "training": made})
    words = "--set instrument.referee.particles=512 --set budget.steps=9 --with rows=8"
    assert told == f"stem-gym train ppo stem_gym/X-v0 --out RUN {words}"
