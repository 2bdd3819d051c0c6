"""What was done is kept: Ctrl-C and SIGKILL during training and benchmarks, and a run that goes on afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stem_gym import cli

pytest.importorskip("stable_baselines3")

REPO = Path(__file__).resolve().parent.parent
ID = "stem_gym/AtomTargeting-v0"
# Small and endless: a checkpoint after every rollout of 4 rows × 16 steps.
SMALL = ["rows=4", "rollout=16", "minibatch=64", "checkpoint_steps=64", "epochs=1"]
DEADLINE_S = 120.0  # far beyond what any of this takes; only a hang meets it


def start(*words: object) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "stem_gym.cli", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO, env=environment,
    )  # fmt: skip


def train(folder: Path, *extra: str, steps: int = 10**9) -> subprocess.Popen[str]:
    settings = [word for setting in [*SMALL, f"steps={steps}"] for word in ("--with", setting)]
    return start("train", "ppo", ID, "--out", folder, *settings, *extra)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(int(DEADLINE_S / 0.05)):
        if condition():
            return
        if process.poll() is not None:
            pytest.fail(f"ended too early, code {process.returncode}: {process.communicate()[1]}")
        time.sleep(0.05)
    process.kill()
    process.communicate()
    pytest.fail("nothing happened in time")


def steps_in(folder: Path) -> int:
    return int(json.loads((folder / "policy.json").read_text())["training"]["steps"])


@pytest.mark.slow
def test_a_killed_training_goes_on_where_its_checkpoint_stands(tmp_path):
    killed = train(tmp_path)
    wait_for(lambda: (tmp_path / "policy.json").exists(), killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=DEADLINE_S)
    before = steps_in(tmp_path)
    assert before >= 64

    refused = train(tmp_path)
    _, err = refused.communicate(timeout=DEADLINE_S)
    assert refused.returncode == cli.BAD_INPUT
    assert "holds a training run already" in err and "--resume" in err, "a run is not overwritten by accident"
    assert steps_in(tmp_path) == before

    resumed = train(tmp_path, "--resume", "--json", steps=before + 128)
    out, err = resumed.communicate(timeout=DEADLINE_S)
    assert resumed.returncode == cli.OK, err
    assert json.loads(out)["policy"] == str(tmp_path)
    assert before + 128 <= steps_in(tmp_path) < before + 128 + 64  # only what was missing, in whole rollouts

    deployed = start("deploy", tmp_path, ID, "--json", "--set", "budget.steps=3")
    out, err = deployed.communicate(timeout=DEADLINE_S)
    assert deployed.returncode == cli.OK, err
    assert json.loads(out)["runs"][0]["episodes"][0]["measurements"] == 3


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_learned(tmp_path):
    process = train(tmp_path)
    wait_for(lambda: (tmp_path / "policy.json").exists(), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == cli.STOPPED, err
    assert "--resume" in out + err and "Traceback" not in out + err
    assert steps_in(tmp_path) >= 64


@pytest.mark.slow
def test_sigterm_keeps_what_was_learned_with_the_checkpoints_of_a_plain_run(tmp_path):
    """The first checkpoint comes after the first rollout, whatever the default interval."""
    settings = [w for setting in ("rows=4", "rollout=16", "minibatch=64", "epochs=1") for w in ("--with", setting)]
    process = start("train", "ppo", ID, "--out", tmp_path, *settings)
    wait_for(lambda: (tmp_path / "policy.json").exists(), process)
    assert steps_in(tmp_path) == 64
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == cli.TERMINATED, err
    assert "--resume" in out + err and "Traceback" not in out + err
    assert (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.slow
def test_ctrl_c_keeps_the_agents_that_a_benchmark_has_finished(tmp_path):
    """The second comparison, as long as the first, has hardly begun when the files of the first appear."""
    process = start("bench", ID, ID, "--agents", "uniform", "--out", tmp_path, "--episodes", 160)
    wait_for(lambda: (tmp_path / "bench.json").exists(), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == cli.STOPPED, err
    assert "1 of 2 comparisons are finished" in " ".join(out.split())
    runs = json.loads((tmp_path / "bench.json").read_text())["runs"]
    assert [run["complete"] for run in runs] in ([True], [True, False])
