"""The command line: what it prints, what it refuses and how, and what it keeps when it is stopped."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest

import stem_gym  # noqa: F401 – registers the ids
from stem_gym import cli
from stem_gym.core.errors import ActionError, CapabilityError, ConfigError, StemGymError
from stem_gym.envs import registration
from stem_gym.envs.registration import variant_files
from stem_gym.jobs import check

REPO = Path(__file__).resolve().parent.parent
ID = "stem_gym/AtomTargeting-v0"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, standard output, error stream of one command, run in this process."""
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def test_list_names_every_variant_and_agent(capsys):
    code, out, _ = run(capsys, "list", "--json")
    found = json.loads(out)
    assert code == cli.OK
    assert found["environments"].keys() == variant_files().keys()
    assert all(found["environments"].values()), "every variant has a sentence"
    assert {"uniform", "raster", "lock_on", "ppo"} <= found["agents"].keys()
    assert {"simulated", "nion"} <= found["instruments"].keys()
    code, table, _ = run(capsys, "list")
    assert code == cli.OK and all(id in table for id in variant_files())


def test_show_tells_values_with_their_units(capsys):
    code, out, _ = run(capsys, "show", ID, "--json", "--set", "budget.steps=50", "--set", "task.radius_ang=4e-1")
    found = json.loads(out)
    assert code == cli.OK
    assert found["config"]["budget.steps"] == 50
    assert found["config"]["task.radius_ang"] == 0.4
    assert found["units"]["task.radius_ang"] == "Å"
    assert found["units"]["instrument.drift.speed_ang_per_s"] == "Å/s"
    contract = json.loads((REPO / "agents/weights/ppo/AtomTargeting-v0/policy.json").read_text())
    assert found["observation_space"] == contract["observation_space"], "data, in the form of a policy's contract"
    assert found["action_space"]["Box"]["shape"] == [5] and found["action_space"] == contract["action_space"]
    assert len(found["config_hash"]) == 12
    code, table, _ = run(capsys, "show", ID)
    assert code == cli.OK and "radius_ang" in table and "Å" in table


def test_the_hash_changes_with_a_value_and_only_then(capsys):
    hashes = [
        json.loads(run(capsys, "show", ID, "--json", *extra)[1])["config_hash"]
        for extra in ([], [], ["--set", "budget.steps=95"])
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_bench_writes_what_it_shows(capsys, tmp_path):
    code, out, _ = run(
        capsys, "bench", ID, "--agents", "uniform", "--episodes", 2, "--seed", 3, "--out", tmp_path, "--json"
    )
    assert code == cli.OK
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert json.loads(out)["summary"] == stored["summary"]
    rows = list(csv.DictReader((tmp_path / "episodes.csv").read_text().splitlines()))
    assert len(rows) == 2
    assert {"success", "return", "seconds", "electrons", "measurements", "thinking_s"} <= rows[0].keys()
    assert stored["summary"][0]["config_hash"] == stored["runs"][0]["config_hash"]
    assert stored["versions"]["torch"]


def test_a_demand_that_is_not_met_fails_the_bench(capsys):
    code, out, _ = run(capsys, "bench", ID, "--agents", "uniform", "--episodes", 1, "--require", "uniform.success>=1.1")
    assert code == cli.FAILED
    assert "uniform.success is" in in_one_line(out)


def test_the_same_seed_is_the_same_episodes(capsys):
    """Two runs of one agent with one seed agree in everything but the clock on the wall."""
    first, second = (
        json.loads(run(capsys, "bench", ID, "--agents", "uniform", "--episodes", 2, "--json")[1])["runs"][0]["episodes"]
        for _ in range(2)
    )
    timeless = [[{k: v for k, v in row.items() if k != "thinking_s"} for row in rows] for rows in (first, second)]
    assert timeless[0] == timeless[1]


BAD_INPUT = [
    (["show", "stem_gym/AtomTargting-v0"], "Unknown environment id.*Did you mean 'stem_gym/AtomTargeting"),
    (["bench", "stem_gym/AtomTargting-v0"], "Unknown environment id.*Did you mean 'stem_gym/AtomTargeting"),
    (["check", "stem_gym/AtomTargting-v0"], "Unknown environment id.*Did you mean 'stem_gym/AtomTargeting"),
    (["deploy", "lock_on", "stem_gym/AtomTargting-v0"], "Unknown environment id.*Did you mean 'stem_gym/AtomTargeting"),
    (["train", "ppo", "stem_gym/AtomTargting-v0"], "Unknown environment id.*Did you mean 'stem_gym/AtomTargeting"),
    (["bench", "CartPole-v1", "--agents", "uniform"], "'CartPole-v1' is no environment of stem_gym.*Known: stem_gym/"),
    (["deploy", "lock_on", "CartPole-v1"], "'CartPole-v1' is no environment of stem_gym"),
    (["train", "ppo", "CartPole-v1"], "'CartPole-v1' is no environment of stem_gym"),
    (["check", "CartPole-v1"], "'CartPole-v1' is no environment of stem_gym"),
    (["bench", ID, "--agents", "lockon"], "Unknown agent 'lockon'. Did you mean 'lock_on'"),
    (["train", "pp0", ID], "Unknown agent 'pp0'. Did you mean 'ppo'"),
    (["train", "uniform", ID], "learns nothing.*ppo"),
    (["train", "ppo", ID, "--with", "stepz=3"], "'stepz'.*Did you mean"),
    (["train", "ppo", ID, "--with", "minibatch=100"], "minibatch must divide.*given 100"),
    (["train", "ppo", ID, "--set", "budget.step=3"], "unknown key 'budget.step'"),
    (["bench"], "at least one environment id"),
    (["bench", ID, "--require", "lock_on.success>0.9"], r"AGENT\.FIGURE>=NUMBER"),
    (["bench", ID, "--require", "lock_om.success>=0.9"], "names an agent that does not run. Did you mean 'lock_on'"),
    (["bench", ID, "--episodes", "0"], "at least one episode"),
    (["show", ID, "--set", "budget.steps"], r"KEY\.PATH=VALUE"),
    (["show", ID, "--set", "budget.step=3"], "unknown key 'budget.step'. Did you mean 'steps'"),
    (["show", ID, "--set", "budgets.steps=3"], "unknown key 'budgets'. Did you mean 'budget'"),
    (["show", ID, "--set", "budget.steps=1.5"], "budget.steps.*integer.*given 1.5"),
    (["show", ID, "--set", "budget.seconds=10s"], 'budget.seconds.*number.*given "10s"'),
    (["show", ID, "--set", "budget.seconds=-1"], "budget.seconds.*greater than 0.*given -1"),
    (["show", ID, "--set", "task.radius_nm=0.05"], "unknown key 'radius_nm'. Did you mean 'radius_ang'"),
    (["show", ID, "--set", "instrument.probe.energy_ev=6e4"], "'probe.energy_ev'. Did you mean 'energy_kev'"),
    (["show", ID, "--set", "instrument.probe.energy_kev=60keV"], "default.yaml.*instrument.*60keV.*number alone"),
    (["show", ID, "--set", "instrument.kind=nion"], "default.yaml.*'specimen' is missing.*--instrument nion"),
    (["train", "ppo", ID, "--with", "steps=1.5e0"], "steps: .*integer.*given 1.5"),
    (["train", "ppo", ID, "--resume", "--out", "absent"], "absent holds no checkpoint; leave --resume out to start"),
    (["deploy", "lock_on", ID, "--instrument", "nio"], "Unknown instrument 'nio'. Did you mean 'nion'"),
    (["deploy", "no/such/folder", ID], "No saved policy in no/such/folder"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), BAD_INPUT, ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else "")
def test_bad_input_gets_one_clear_message_and_exit_code_2(capsys, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert code == cli.BAD_INPUT, err
    assert "Traceback" not in err
    assert re.search(message, in_one_line(err)), err
    assert not any(tmp_path.iterdir()), "nothing is left of what was refused"


@pytest.mark.parametrize("words", [["bnch"], ["show", ID, "--jsn"], ["bench", ID, "--episodes", "many"], ["show"]])
def test_usage_errors_have_exit_code_2(capsys, words):
    code, out, err = run(capsys, *words)
    assert code == cli.BAD_INPUT
    assert "stem-gym" in out + err and "Traceback" not in err


def test_debug_shows_where_it_happened():
    with pytest.raises(StemGymError, match="Unknown environment id"):
        cli.main(["show", "nonsense", "--debug"])


def test_a_folder_that_can_not_be_written_is_refused_before_the_work(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    taken = tmp_path / "file" / "below"
    for words in (["bench", ID, "--agents", "uniform", "--out", taken], ["train", "ppo", ID, "--out", taken]):
        code, _, err = run(capsys, *words)
        assert code == cli.BAD_INPUT
        assert "Can not" in err and "below" in err and "Name a folder" in in_one_line(err), err
    code, _, err = run(capsys, "deploy", "uniform", ID, "--record", taken)
    assert code == cli.BAD_INPUT and "Can not record into" in err


def test_a_yaml_with_faults_is_refused_by_name(tmp_path):
    """Unknown, missing, ill-typed; text that YAML 1.1 does not read as a number; no mapping; no YAML; no file."""
    from stem_gym.envs.variants import load_variant

    text = variant_files()[ID].read_text()
    faults = {
        text.replace("budget:", "budgett:"): r"unknown key 'budgett'. Did you mean 'budget'",
        text.replace("  steps: 96\n", ""): r"'budget.steps' is missing",
        text.replace("seconds: 60.0", "seconds: 1e4"): r"budget.seconds.*write 1.0e-4",
        "- a list": "must hold a mapping",
        "a: [": "is not valid YAML",
    }
    for number, (broken, message) in enumerate(faults.items()):
        path = tmp_path / f"variant_{number}.yaml"
        path.write_text(broken)
        with pytest.raises(ConfigError, match=message) as caught:
            load_variant(path)
        assert f"variant_{number}.yaml" in str(caught.value)
    with pytest.raises(ConfigError, match="Can not read .*absent.yaml"):
        load_variant(tmp_path / "absent.yaml")


@pytest.fixture
def broken_folder(tmp_path, monkeypatch):
    """The variants that ship, one that is no YAML but tells its id, one without an id, and one with an unknown key."""
    shutil.copytree(registration.config_root(), tmp_path / "configs")
    text = variant_files()[ID].read_text()
    task = tmp_path / "configs" / "atom_targeting"
    (task / "torn.yaml").write_text(text.replace(ID, "stem_gym/AtomTargeting-torn-v0") + "budget: [")
    (task / "nameless.yaml").write_text("summary: none")
    (task / "misspelt.yaml").write_text(
        text.replace(ID, "stem_gym/AtomTargeting-odd-v0").replace("budget:", "budgett:")
    )
    monkeypatch.setattr(registration, "config_root", lambda: tmp_path / "configs")
    registration._found.cache_clear()
    registration.register_variants()
    yield task
    for id in ("stem_gym/AtomTargeting-torn-v0", "stem_gym/AtomTargeting-odd-v0"):
        gymnasium.registry.pop(id, None)
    registration._found.cache_clear()


def test_a_broken_yaml_is_named_and_hides_no_other(capsys, broken_folder, monkeypatch):
    code, out, err = run(capsys, "list", "--json")
    assert code == cli.BAD_INPUT and ID in json.loads(out)["environments"]
    assert "torn.yaml" in in_one_line(err) and "nameless.yaml has no text under the key 'id'" in in_one_line(err)
    code, _, err = run(capsys, "show", "stem_gym/AtomTargeting-torn-v0")
    assert code == cli.BAD_INPUT and "torn.yaml is not valid YAML" in in_one_line(err)
    code, _, err = run(capsys, "show", "stem_gym/Nameless-v0")
    assert code == cli.BAD_INPUT and "Unknown environment id" in err and "nameless.yaml" in in_one_line(err)
    assert run(capsys, "show", ID)[0] == cli.OK
    with pytest.raises(ConfigError, match=r"torn\.yaml is not valid YAML"):
        gymnasium.make("stem_gym/AtomTargeting-torn-v0")

    monkeypatch.setattr(check, "_checks", lambda id, overrides: iter(()))  # the configuration alone
    code, out, _ = run(capsys, "check", "--json")
    failed = {found["id"] for found in json.loads(out) if found["problem"]}
    assert code == cli.FAILED
    assert failed == {"atom_targeting/torn.yaml", "atom_targeting/nameless.yaml", "stem_gym/AtomTargeting-odd-v0"}


def test_the_import_survives_a_broken_yaml(tmp_path):
    """In a copy, since the import reads the folder beside the package."""
    for name in ("stem_gym", "envs_configs"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "envs_configs" / "atom_targeting" / "mine.yaml").write_text("id: [")
    (tmp_path / "envs_configs" / "atom_targeting" / "odd.yaml").write_text("id: not an id")
    (tmp_path / "envs_configs" / "atom_targeting" / "bytes.yaml").write_bytes(b"id: \xff\xfe")
    script = (
        "import gymnasium, stem_gym.envs.registration as r\n"
        f"print(len(r.broken_variants()), {ID!r} in gymnasium.registry)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout == "3 True\n", done.stderr


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a[:-1], "shape"),
        (lambda a: np.full_like(a, np.nan), "finite"),
        (lambda a: a + 10.0, "within"),
        (lambda a: "north", "array of numbers"),
    ],
    ids=["shape", "nan", "outside", "text"],
)
def test_an_unusable_action_says_what_would_be_usable(spoil, message):
    env = gymnasium.make(ID, disable_env_checker=True)
    env.reset(seed=1)
    with pytest.raises(ActionError, match=message):
        env.step(spoil(env.action_space.sample()))
    env.close()


def test_an_instrument_without_a_verb_is_refused_by_name():
    from stem_gym.envs.batch import BatchEnv
    from stem_gym.envs.variants import build, load_variant

    batch = build(load_variant(ID), rows=1)
    lame = batch.instrument
    lame.capabilities = replace(lame.capabilities, verbs=lame.capabilities.verbs - {"Dwell"})
    with pytest.raises(CapabilityError, match="needs the verb.*Dwell.*lacks; it has"):
        BatchEnv(batch.task, lame, batch.budget)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved policy of the default environment: a network that has learned nothing, which is beside the point here."""
    import agents

    env = gymnasium.make(ID, disable_env_checker=True)
    try:
        return agents.make("ppo", env, weights="fresh").save(tmp_path / "saved")
    finally:
        env.close()


def test_a_policy_for_another_environment_is_refused_and_both_are_named(capsys, saved):
    other = "stem_gym/AtomTargeting-mos2-v0"
    code, _, err = run(capsys, "deploy", saved, other)
    assert code == cli.BAD_INPUT
    assert f"was made for {ID}" in in_one_line(err) and other in err
    code, _, err = run(capsys, "deploy", saved, ID, "--set", "task.radius_ang=0.4")
    assert code == cli.BAD_INPUT and "made for the task with hash" in in_one_line(err)


def test_a_file_of_a_policy_is_told_from_its_folder(capsys, saved, monkeypatch):
    monkeypatch.chdir(saved)
    for name in (saved / "policy.safetensors", "policy.safetensors"):
        code, _, err = run(capsys, "deploy", name, ID)
        assert code == cli.BAD_INPUT and "is a file; name the folder" in in_one_line(err), err


def _cut(folder: Path) -> None:
    path = folder / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _other_arrays(folder: Path) -> None:
    (folder / "policy.safetensors").write_bytes(b"PK not a tensor in sight")


def _cut_contract(folder: Path) -> None:
    path = folder / "policy.json"
    path.write_text(path.read_text()[:200])


def _other_contract(folder: Path) -> None:
    (folder / "policy.json").write_text('{"format": "somebody else\'s 3"}')


def _pickle(folder: Path) -> None:
    """What a pickle would do when it is opened; here it is only bytes."""
    (folder / "policy.json").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "truncated or belongs to another policy"),
        (_other_arrays, "truncated or belongs to another policy"),
        (_cut_contract, "damaged or no policy's contract"),
        (_other_contract, "no policy's contract: its format is"),
        (_pickle, "damaged or no policy's contract"),
    ],
    ids=["cut", "other arrays", "cut contract", "other contract", "pickle"],
)
def test_a_damaged_or_foreign_policy_is_refused_by_name(capsys, saved, damage, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    damage(saved)
    code, _, err = run(capsys, "deploy", saved, ID)
    assert code == cli.BAD_INPUT
    assert message in in_one_line(err) and "saved" in err and "Traceback" not in err
    assert not (tmp_path / "ran").exists()


def test_a_foreign_package_of_the_same_name_is_told_apart(tmp_path):
    """Another public distribution installs a top-level package `agents`."""
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("class Agent: ...\n")
    info = tmp_path / "other_agents-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-agents\nVersion: 1.0\n")
    (info / "RECORD").write_text("agents/__init__.py,,\n")
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])}
    done = command("list", folder=tmp_path, env=path)
    assert done.returncode == cli.BAD_INPUT
    assert "other-agents" in done.stderr and "environment of its own" in in_one_line(done.stderr)


def test_a_missing_extra_is_named(tmp_path):
    from tests.test_project import BLOCKER

    script = BLOCKER + "from stem_gym.cli import main; sys.exit(main(sys.argv[1:]))"
    for words, extra in (
        (["deploy", "uniform", ID, "--instrument", "nion"], "stem-gym[nion]"),
        (["train", "ppo", ID, "--out", str(tmp_path)], "stem-gym[agents]"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=REPO, timeout=120
        )
        assert done.returncode == cli.BAD_INPUT, done.stderr
        assert extra in done.stderr and "Traceback" not in done.stderr


def test_a_reader_that_leaves_early_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m stem_gym.cli list --json | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=REPO,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr


def command(*words: str, folder: Path = REPO, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "stem_gym.cli", *words],
        capture_output=True, text=True, cwd=folder, timeout=120, env=os.environ | (env or {}),
    )  # fmt: skip
