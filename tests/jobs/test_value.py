"""The worth of steps that were recorded: the same as of the episode when it was played."""

from __future__ import annotations

import json
import shutil

import gymnasium
import numpy as np
import pytest
import torch

from agents.engine.step_values import live, step_values
from agents.policy import face_of
from stem_gym import cli
from stem_gym.core.errors import RecordError
from stem_gym.core.experiments import protocol_of
from stem_gym.core.streams import row_seeds
from stem_gym.instruments.recorder import Provenance, Recorder
from stem_gym.jobs.recorded_campaign import recorded_campaign

ID = "stem_gym/HypothesisDiscrimination-{}-v0"


class Everything:
    """Each enabling action between experiments here and there, then a declaration."""

    def __init__(self, env):
        protocol = protocol_of(face_of(env).task)
        designs, count = protocol.designs(), len(protocol.kinds)
        picked = designs[torch.randint(0, len(designs), (count, 1), generator=torch.Generator().manual_seed(0))]
        self._script = []
        for number in range(count - 1):
            site = torch.tensor([number % protocol.sites])
            self._script.append(protocol.experiments(picked[number], site))
            if number:
                self._script.append(protocol.enabling(protocol.kinds[number], 1))
                self._script.append(protocol.experiments(picked[number], site))
        even = torch.full((1, len(protocol.answers)), 1.0 / len(protocol.answers), dtype=torch.float64)
        self._script.append(protocol.declarations(even))

    def reset(self, rows, seeds):
        self._next = iter(self._script)

    def act(self, observation):
        return next(self._next).numpy()


def recorded(level, folder, seed=3):
    """An episode as it was lived, and its file."""
    env = gymnasium.make_vec(ID.format(level), num_envs=1, autoreset_mode="Disabled")
    batch = env.unwrapped.batch
    batch.instrument = Recorder(batch.instrument, folder, Provenance(config=env.unwrapped.config))
    lived = live(Everything(env), env, row_seeds(seed, 1)[0])
    face = face_of(env)
    env.close()
    return face, lived, folder / "episode_00000.h5"


@pytest.mark.parametrize("level", ["easy", "drift", "site", "damage", "coarsening", "belief"])
def test_a_recorded_episode_is_worth_what_it_was_when_it_was_played(level, tmp_path):
    face, lived, path = recorded(level, tmp_path)
    found = recorded_campaign(path)
    declared = len(lived.actions) - 1
    assert len(found.actions) == declared
    for key in ("measurements", "present"):
        for told, seen in zip(found.observations, lived.observations, strict=False):
            np.testing.assert_allclose(told[key], seen[key], atol=2e-5)
    np.testing.assert_allclose(found.seconds, lived.seconds[:-1], rtol=1e-6)
    again = type(lived)(found.observations, found.actions, found.seconds)
    played, told = (step_values(face, one, particles=512) for one in (lived, again))
    assert [one.action for one in told] == [one.action for one in played][:declared]
    assert {one.action for one in told} == set(protocol_of(face.task).kinds) - {"declare"}
    for one, other in zip(told, played, strict=False):
        assert one.design == pytest.approx(other.design, rel=1e-5)
        assert one.information_nats == pytest.approx(other.information_nats, abs=0.05)


def test_the_command_tells_of_a_recording(tmp_path, capsys):
    _, lived, path = recorded("drift", tmp_path / "record")
    assert cli.main(["value", str(path), "--out", str(tmp_path / "out"), "--json"]) == cli.OK
    told = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in (tmp_path / "out" / "values.jsonl").read_text().splitlines()]
    assert lines == told["steps"] and len(lines) == len(lived.actions) - 1
    assert told["recording"] == str(path) and (tmp_path / "out" / "values.png").stat().st_size > 10_000


def test_an_episode_that_was_cut_short_is_told_as_far_as_it_went(tmp_path):
    """A copy of the file while the episode runs is what a kill would leave."""
    env = gymnasium.make_vec(ID.format("easy"), num_envs=1, autoreset_mode="Disabled")
    batch = env.unwrapped.batch
    batch.instrument = Recorder(batch.instrument, tmp_path, Provenance(config=env.unwrapped.config))
    env.reset(seed=[1])
    protocol_action = np.zeros(env.action_space.shape, np.float32)
    protocol_action[:, 0] = 1.0
    env.step(protocol_action)
    env.step(protocol_action)
    shutil.copy(tmp_path / "episode_00000.h5", tmp_path / "cut.h5")
    env.close()
    assert len(recorded_campaign(tmp_path / "cut.h5").actions) == 2


@pytest.mark.parametrize(
    ("id", "rows", "says"),
    [
        (ID.format("image"), 1, "pictures"),
        (ID.format("easy"), 2, "several rows"),
        ("stem_gym/BeamFabrication-lorentzian-v0", 1, "no choice between laws"),
    ],
)
def test_what_can_not_be_told_is_refused(id, rows, says, tmp_path):
    env = gymnasium.make_vec(id, num_envs=rows, autoreset_mode="Disabled")
    batch = env.unwrapped.batch
    batch.instrument = Recorder(batch.instrument, tmp_path, Provenance(config=env.unwrapped.config))
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape, np.float32)
    action[:, 0] = 0.5
    env.step(action)
    env.close()
    with pytest.raises(RecordError, match=says):
        recorded_campaign(tmp_path / "episode_00000.h5")


def test_a_recording_without_a_step_is_refused(tmp_path):
    env = gymnasium.make_vec(ID.format("easy"), num_envs=1, autoreset_mode="Disabled")
    batch = env.unwrapped.batch
    batch.instrument = Recorder(batch.instrument, tmp_path, Provenance(config=env.unwrapped.config))
    env.reset(seed=0)
    env.close()
    with pytest.raises(RecordError, match="no whole experiment"):
        recorded_campaign(tmp_path / "episode_00000.h5")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["value", "eig"], "no recording 'eig'"),
        (["value", "eig", "--with", "claim=0.9"], "name an environment id"),
    ],
)
def test_a_command_without_an_id_says_what_would_be_right(words, says, tmp_path, capsys):
    assert cli.main([*words, "--out", str(tmp_path)]) != cli.OK
    assert says in capsys.readouterr().err
