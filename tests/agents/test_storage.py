"""Saved policies: what is checked before one acts, and what is said about a damaged or foreign one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.numpy import load_file, save_file

import agents
from agents.engine.storage import ARRAYS, CONTRACT
from agents.policy import face_of
from stem_gym.core.errors import PolicyError, RecordError
from stem_gym.core.spaces import space_as_data
from tests.agents.toys import TOY_ID, ToyVectorEnv


@pytest.fixture
def face():
    env = ToyVectorEnv(2)
    return replace(face_of(env), id=TOY_ID)


@pytest.fixture
def saved(face, tmp_path):
    policy = agents.make("ppo", face, weights="fresh", seed=3)
    return policy.save(tmp_path / "policy", {"steps": 12})


def observe(face):
    draw = np.random.default_rng(0)
    return {
        "image": draw.integers(0, 255, (2, 2, 8, 8), dtype=np.uint8),
        "region": np.tile(np.array([0.25, 0.25, 0.5, 0.5], np.float32), (2, 1)),
        "count": np.zeros((2, 1), np.float32),
    }


def test_a_loaded_policy_acts_like_the_saved_one(face, saved):
    made, other = (agents.make("ppo", face, weights="fresh", seed=seed) for seed in (3, 4))
    loaded = agents.load(saved, face)
    np.testing.assert_array_equal(loaded.act(observe(face)), made.act(observe(face)))
    assert not np.array_equal(loaded.act(observe(face)), other.act(observe(face)))
    np.testing.assert_array_equal(
        agents.make("ppo", face, weights=str(saved)).act(observe(face)), made.act(observe(face))
    )


def test_the_contract_says_all_that_a_deployer_checks(face, saved):
    contract = json.loads((saved / CONTRACT).read_text())
    assert contract["id"] == TOY_ID and contract["agent"] == "ppo" and contract["training"] == {"steps": 12}
    assert contract["task_hash"] == face.task_hash and len(contract["sha256"]) == 64
    assert contract["observation_space"]["Dict"]["image"]["Box"]["shape"] == [2, 8, 8]
    assert {"torch", "numpy", "gymnasium"} <= contract["versions"].keys()


def refused(saved, face, words):
    with pytest.raises(PolicyError, match=words):
        agents.load(saved, face)


def test_another_id_is_refused_and_both_are_named(face, saved):
    refused(saved, replace(face, id="stem_gym/Other-v0"), rf"(?s){TOY_ID}.*stem_gym/Other-v0")


def test_other_spaces_are_refused_and_the_difference_is_named(face, saved):
    parts = dict(face.observation_space.spaces) | {"count": spaces.Box(0.0, 1.0, (2,), np.float32)}
    refused(saved, replace(face, observation_space=spaces.Dict(parts)), r"'count' was .*\[1\].*\[2\]")
    refused(saved, replace(face, action_space=spaces.Box(-2.0, 1.0, (5,), np.float32)), "action space")


def test_another_task_is_refused(face, saved):
    refused(saved, replace(face, task={"kind": "toy", "radius_ang": 0.4}), face.task_hash)


def test_a_truncated_file_is_refused(face, saved):
    data = (saved / ARRAYS).read_bytes()
    (saved / ARRAYS).write_bytes(data[: len(data) // 2])
    refused(saved, face, "truncated or belongs to another policy")


def test_arrays_of_another_policy_are_refused(face, saved, tmp_path):
    other = agents.make("ppo", face, weights="fresh", seed=9).save(tmp_path / "other")
    (saved / ARRAYS).write_bytes((other / ARRAYS).read_bytes())
    refused(saved, face, "belongs to another policy")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"format": "zip"}', "\x80\x04."])
def test_a_foreign_contract_is_refused(face, saved, text):
    (saved / CONTRACT).write_text(text, encoding="latin-1")
    refused(saved, face, "contract")


@pytest.mark.parametrize(
    ("key", "value"),
    [("agent", ["x"]), ("agent", None), ("id", {}), ("settings", [1]), ("sha256", 3), ("observation_space", "Box")],
)
def test_a_contract_with_a_value_of_another_type_is_refused(face, saved, key, value):
    contract = json.loads((saved / CONTRACT).read_text())
    (saved / CONTRACT).write_text(json.dumps(contract | {key: value}))
    refused(saved, face, f"damaged or no policy's contract: '{key}' should be")


def test_a_contract_nested_beyond_reason_is_refused(face, saved):
    (saved / CONTRACT).write_text("[" * 100_000)
    refused(saved, face, "damaged or no policy's contract")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: np.where(np.arange(a.size).reshape(a.shape) == 0, np.nan, a).astype(a.dtype), "not finite"),
        (lambda a: a.astype(np.float64), "of type float64; the installed agent needs float32"),
    ],
    ids=["nan", "float64"],
)
def test_arrays_that_no_network_has_are_refused_though_the_checksum_fits(face, saved, spoil, words):
    arrays = load_file(saved / ARRAYS)
    name = next(key for key, value in arrays.items() if value.dtype == np.float32 and value.size > 1)
    save_file(arrays | {name: spoil(arrays[name])}, saved / ARRAYS)
    contract = json.loads((saved / CONTRACT).read_text())
    contract["sha256"] = hashlib.sha256((saved / ARRAYS).read_bytes()).hexdigest()
    (saved / CONTRACT).write_text(json.dumps(contract))
    refused(saved, face, words)


@pytest.mark.parametrize("file", [ARRAYS, CONTRACT])
def test_the_folder_is_asked_for_where_a_file_is_named(face, saved, file):
    refused(saved / file, face, "is a file; name the folder of the saved policy, here .*policy")


def test_a_pickle_is_never_opened(face, saved, tmp_path):
    """Arrays that are a pickle with the right checksum: refused by the format, without running what is inside."""
    trap = tmp_path / "trap"

    class Evil:
        def __reduce__(self):
            return (open, (str(trap), "w"))

    torch.save(Evil(), saved / ARRAYS)
    contract = json.loads((saved / CONTRACT).read_text())
    contract["sha256"] = hashlib.sha256((saved / ARRAYS).read_bytes()).hexdigest()
    (saved / CONTRACT).write_text(json.dumps(contract))
    refused(saved, face, "no safetensors")
    assert not trap.exists()


def test_missing_files_are_named(face, saved, tmp_path):
    refused(tmp_path / "nowhere", face, "no policy.json")
    (saved / ARRAYS).unlink()
    refused(saved, face, ARRAYS)


def test_settings_that_the_installed_agent_does_not_take(face, saved):
    contract = json.loads((saved / CONTRACT).read_text())
    contract["settings"]["depth"] = 3
    (saved / CONTRACT).write_text(json.dumps(contract))
    refused(saved, face, "depth")


def test_a_network_of_another_size_is_refused(face, saved):
    contract = json.loads((saved / CONTRACT).read_text())
    contract["settings"]["network"]["hidden"] = 64
    (saved / CONTRACT).write_text(json.dumps(contract))
    refused(saved, face, "shape")


def test_a_place_that_can_not_be_written(face, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="Can not write the policy"):
        agents.make("uniform", face).save(tmp_path / "file" / "policy")


def test_ppo_without_a_shipped_policy_says_how_to_get_one(face):
    with pytest.raises(PolicyError, match="stem-gym train ppo"):
        agents.make("ppo", face)


def test_a_policy_from_a_single_env_and_from_a_batch_have_one_contract():
    """Trained on a batch, run on one row: the face speaks of one row in both."""
    one = face_of(gymnasium.make("stem_gym/AtomTargeting-v0"))
    many = face_of(gymnasium.make_vec("stem_gym/AtomTargeting-v0", num_envs=2))
    assert (one.id, one.task_hash) == (many.id, many.task_hash) and one.rows == 1
    assert space_as_data(one.observation_space) == space_as_data(many.observation_space)
