"""What the command does, called as functions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from pydantic import Field
from rich.console import Console

from stem_gym.core.config import Config
from stem_gym.core.errors import CapabilityError, ConfigError, UnknownNameError
from stem_gym.jobs import bench, catalogue, check, demo, deploy, train
from stem_gym.jobs.outcome import Outcome

ID = "stem_gym/AtomTargeting-v0"


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("dwell_min_s", "s"),
        ("radius_ang", "Å"),
        ("speed_ang_per_s", "Å/s"),
        ("diffusion_ang2_per_s", "Å²/s"),
        ("energy_kev", "keV"),
        ("contamination_per_dose", "1/(e/Å²)"),
        ("electrons", "e"),
        ("targets", ""),
        ("kind", ""),
    ],
)
def test_a_unit_is_read_from_the_name(name, unit):
    assert catalogue.unit_of(name) == unit


class _Inner(Config):
    depth_ang: float = 2.0
    """how deep"""


class _Outer(Config):
    parts: tuple[_Inner, ...] = (_Inner(), _Inner(depth_ang=3.0))
    inner: _Inner = _Inner(depth_ang=1.0)
    count: int = Field(4, gt=0)
    """how many"""


def test_settings_come_own_first_then_by_section():
    found = [(s.path, s.value, s.unit, s.meaning) for s in catalogue.settings_of(_Outer(), "x.")]
    assert found == [
        ("x.count", 4, "", "how many"),
        ("x.parts.0.depth_ang", 2.0, "Å", "how deep"),
        ("x.parts.1.depth_ang", 3.0, "Å", "how deep"),
        ("x.inner.depth_ang", 1.0, "Å", "how deep"),
    ]


def test_a_description_is_read_without_running_the_module(tmp_path, monkeypatch):
    (tmp_path / "bomb_module.py").write_text('"""A harmless sentence.\n\nMore."""\nraise SystemExit("it ran")\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert catalogue.first_line("bomb_module") == "A harmless sentence."
    assert catalogue.first_line("no_such_module_at_all") == ""


def _outcome(values: list[float]) -> Outcome:
    return Outcome(ID, "lock_on", "", [{"success": bool(value > 0), "return": value} for value in values])


def test_demands_are_judged_by_the_mean():
    outcomes = [_outcome([1.0, 3.0])]
    assert bench.unmet(outcomes, [bench.demand_of("lock_on.return>=2")]) == []
    assert "is 2, at least 2.5 was demanded" in bench.unmet(outcomes, [bench.demand_of("lock_on.return>=2.5")])[0]
    at_least_0 = bench.demand_of("lock_on.return>=0")
    assert bench.unmet([_outcome([math.nan])], [at_least_0]), "a figure that does not exist meets nothing"
    for wrong in ("lock_on.return>2", "return>=2", "lock_on.return>=much"):
        with pytest.raises(ConfigError, match=r"AGENT\.FIGURE>=NUMBER"):
            bench.demand_of(wrong)


def test_a_wrong_demand_stops_a_benchmark_early():
    reports: list[str] = []

    def plan(*demands: str) -> bench.Plan:
        short = {"budget": {"steps": 3}}
        return bench.Plan([ID], ["uniform", "raster"], 1, 0, short, [bench.demand_of(text) for text in demands])

    def note(id: str, agent: str, done: int, total: int) -> None:
        reports.append(agent)

    with pytest.raises(ConfigError, match="names an agent that does not run. Did you mean 'raster'"):
        bench.bench(plan("rastr.return>=1"), report=note)
    assert reports == []
    with pytest.raises(ConfigError, match="names a figure that is not measured. Did you mean 'return'"):
        bench.bench(plan("raster.retrun>=1"), report=note)
    assert set(reports) == {"uniform"}, "found after the first agent"


def test_a_wrong_name_stops_a_benchmark_before_the_first_episode(tmp_path):
    reports: list[object] = []
    plan = bench.Plan([ID], ["uniform", "uniforn"], episodes=1, seed=0)
    with pytest.raises(UnknownNameError, match="Did you mean 'uniform'"):
        bench.bench(plan, tmp_path, lambda *words: reports.append(words))
    assert reports == [] and not (tmp_path / "bench.json").exists()


def test_a_stopped_benchmark_keeps_the_episodes_that_are_finished(tmp_path):
    """Stopped when the second agent has finished one episode or more of forty on 32 rows."""
    outcomes: list[Outcome] = []

    def stop(id: str, agent: str, done: int, total: int) -> None:
        if agent == "raster":
            raise KeyboardInterrupt

    plan = bench.Plan([ID], ["uniform", "raster"], episodes=40, seed=1, overrides={"budget": {"steps": 6}})
    with pytest.raises(KeyboardInterrupt):
        bench.bench(plan, tmp_path, stop, outcomes)
    assert [found.complete for found in outcomes] == [True, False]
    kept = json.loads((tmp_path / "bench.json").read_text())["runs"]
    assert [run["complete"] for run in kept] == [True, False]
    assert 0 < len(kept[1]["episodes"]) < 40 == len(kept[0]["episodes"])
    whole = bench.bench(bench.Plan([ID], ["raster"], 40, 1, {"budget": {"steps": 6}}))[0].episodes
    for number, episode in zip(kept[1]["worlds"], kept[1]["episodes"], strict=True):
        assert episode["return"] == pytest.approx(whole[number]["return"]), "each is the episode of its own world"


def test_a_stopped_deployment_keeps_the_episodes_that_are_finished():
    outcomes: list[Outcome] = []

    def stop(number: int, info: object) -> None:
        if number == 2:
            raise KeyboardInterrupt

    job = deploy.Deployment("uniform", ID, "simulated", episodes=4, overrides={"budget": {"steps": 3}})
    with pytest.raises(KeyboardInterrupt):
        deploy.deploy(job, stop, outcomes)
    assert len(outcomes) == 1 and len(outcomes[0].episodes) == 2 and not outcomes[0].complete


def test_a_deployment_plays_the_worlds_of_a_benchmark():
    """One row with its own loop and many rows in a batch: the same episodes."""
    batched = bench.bench(bench.Plan([ID], ["uniform"], episodes=2, seed=5))[0].episodes
    single = deploy.deploy(deploy.Deployment("uniform", ID, "simulated", episodes=2, seed=5)).episodes
    for one, other in zip(single, batched, strict=True):
        for name in ("return", "seconds", "electrons", "measurements"):
            # float32 sums over up to 96 steps in another order
            assert one[name] == pytest.approx(other[name], rel=1e-4), name


def test_a_deployment_names_its_instrument_once():
    job = deploy.Deployment("uniform", ID, "simulated", overrides={"instrument": {"kind": "simulated"}})
    with pytest.raises(ConfigError, match="named by --instrument"):
        deploy.deploy(job)


def test_the_hash_of_a_policy_changes_with_its_arrays():
    import agents

    env = gymnasium.make(ID, disable_env_checker=True)
    policy = agents.make("ppo", env, weights="fresh")
    before = deploy.hash_of_policy(policy)
    assert deploy.hash_of_policy(agents.make("ppo", env, weights="fresh")) == before
    arrays = policy.arrays()
    name = next(key for key, value in arrays.items() if value.size)
    policy.set_arrays({**arrays, name: arrays[name] + 1.0})
    assert deploy.hash_of_policy(policy) != before
    env.close()


def test_a_rising_curve_is_said_to_rise():
    assert "rose: 0 in the first tenth, 2 in the last" in train.rise([(0, 0.0), (10, 1.0), (20, 2.0)])
    assert "did not rise" in train.rise([(0, 1.0), (10, 0.0)])
    assert "too short" in train.rise([(0, 1.0)])


def test_a_stopped_training_says_what_it_leaves(tmp_path):
    assert train.kept(tmp_path) == "Nothing was learned yet."
    (tmp_path / "checkpoint.safetensors").write_text("")
    assert f"is in {tmp_path}; go on with --resume" in train.kept(tmp_path)


def test_training_refuses_what_learns_nothing_and_settings_with_an_option_of_their_own(tmp_path):
    with pytest.raises(CapabilityError, match=r"learns nothing.*ppo"):
        train.train(train.Training("uniform", ID, tmp_path / "a"))
    with pytest.raises(ConfigError, match="resume is no setting"):
        train.train(train.Training("ppo", ID, tmp_path / "b", using={"resume": True}))


def test_a_check_that_fails_is_a_finding_and_a_missing_extra_is_none():
    from stem_gym.core.errors import ConformanceError, missing_extra

    def broken() -> None:
        raise ConformanceError("rule", "seen", "right")

    def absent() -> None:
        raise missing_extra("Pictures", "viz")

    assert check._run(ID, "x", broken).problem.startswith("ConformanceError")
    assert 'pip install "stem-gym[viz]"' in check._run(ID, "x", absent).skipped
    assert check._run(ID, "x", lambda: None) == check.Finding(ID, "x")


def test_frames_of_a_recording_are_spread_over_the_episode(tmp_path):
    """Five scans of one second each: three of them are drawn, the first and the last among them."""
    from stem_gym.envs.variants import build, load_variant
    from stem_gym.instruments.recorder import Recorder

    batch = build(load_variant(ID), rows=1)
    recorder = Recorder(batch.instrument, tmp_path)
    batch.instrument = recorder
    rows = torch.zeros(1, dtype=torch.int64)
    batch.reset(rows, [1])
    for place in np.linspace(-0.5, 0.5, 4):
        batch.step(torch.tensor([[1.0, float(place), 0.0, -0.8, 0.0]]))
    batch.close()
    found = demo.recorded_frames(next(tmp_path.glob("*.h5")), most=3)
    assert [image.shape for _, image in found] == [(64, 64)] * 3
    sides = [caption.split(", ")[1] for caption, _ in found]
    assert sides == ["24.0 Å", "6.0 Å", "6.0 Å"]


def test_the_demo_removes_an_earlier_training_and_nothing_else(tmp_path):
    folder = tmp_path / "training"
    demo.clear_training(folder)  # none there: nothing to do
    (folder / "tensorboard").mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no checkpoint.safetensors.*another folder with --out"):
        demo.demo(demo.Settings(tmp_path, 1.0, 1), Console(quiet=True))
    written = [folder / name for name in ("checkpoint.safetensors", "policy.json", "policy.safetensors", "curve.csv")]
    for path in [*written, folder / "tensorboard" / "events.out.tfevents.1", folder / "tensorboard" / "notes.txt"]:
        path.write_text("")
    demo.clear_training(folder)
    assert sorted(path.name for path in folder.rglob("*")) == ["notes.txt", "tensorboard", "thesis.txt"]


@pytest.mark.slow
@pytest.mark.xdist_group("nion")
def test_the_demo_makes_what_it_says(tmp_path):
    """The whole path, small, in a process of its own: Nion Swift allows one instrument per process."""
    import subprocess
    import sys

    pytest.importorskip("nion.instrumentation")
    pytest.importorskip("stable_baselines3")
    command = [sys.executable, "-m", "stem_gym.cli", "demo", "--minutes", "0.05", "--episodes", "2", "--json"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["skipped"] == {}
    assert all(Path(path).exists() for path in result["made"])
    suffixes = {Path(path).suffix for path in result["made"]}
    assert {".png", ".mp4"} <= suffixes
    assert "Try next" in done.stderr
