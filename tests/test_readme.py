"""The README tells the truth: its code runs, its commands run, and its tables name what is there."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from stem_gym import cli
from stem_gym.envs.registration import variant_files

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [
    shlex.split(line, comments=True) for language, code in BLOCKS if language == "bash" for line in code.splitlines()
]
COMMANDS = [words for words in SHELL if words]


def test_every_block_says_its_language():
    assert {language for language, _ in BLOCKS} <= {"python", "bash"}
    assert PYTHON and COMMANDS


def test_the_python_blocks_run(tmp_path, monkeypatch, capsys):
    """In order and in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for code in PYTHON:
        exec(compile(code, "README.md", "exec"), namespace)  # noqa: S102 – our own README
    assert "electrons" in capsys.readouterr().out


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] == "make"], ids=" ".join)
def test_the_make_targets_exist(words):
    done = subprocess.run([*words, "--dry-run"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader types all the commands."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.slow
@pytest.mark.xdist_group("nion")
@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] == "stem-gym"], ids=" ".join)
def test_the_commands_run(words, folder):
    """Each in a process of its own: Nion Swift allows one instrument per process. Later ones read what earlier left."""
    import sys

    if "nion" in words:
        pytest.importorskip("nion.instrumentation")
    done = subprocess.run(
        [sys.executable, "-m", "stem_gym.cli", *words[1:]], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == cli.OK, done.stdout + done.stderr


def test_no_other_commands_are_shown():
    assert {words[0] for words in COMMANDS} == {"make", "stem-gym"}


def test_the_table_names_every_id_with_its_sentence():
    from stem_gym.jobs.catalogue import environments

    rows = dict(re.findall(r"^\| `(stem_gym/\S+)` \| (.*?) \|$", README, re.M))
    assert rows == environments() and rows.keys() == variant_files().keys()


def test_the_figures_are_those_that_the_benchmarks_stored():
    from benchmarks import readme

    assert readme.with_results(README, readme.results()) == README, "run: python benchmarks/readme.py"


def test_links_and_paths_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (REPO / target).exists(), target
    tree = re.search(r"^    stem_gym/\n(.*?)\n\n", README, re.M | re.S).group(1)
    for line in tree.splitlines():
        name = line.split()[0].rstrip("/")
        folder = REPO / "stem_gym" if line.startswith("      ") else REPO
        assert (folder / name).exists(), line
