"""`stem-gym search` and `stem-gym explain`: a search at the terminal, recorded, and asked about afterwards."""

from __future__ import annotations

import io
import json

import pytest

from stem_gym import cli
from tests.agents.recorded import ID

SMALL = [
    "--set", "task.measurements=6", "--set", "task.mode=optimise", "--set", "instrument.shape=[8,9]",
    "--with", "first_places=3", "--with", "members=1", "--with", "patch=3", "--with", "patch_features=3",
    "--with", 'training={"fresh_steps":3,"warm_steps":1}',
]  # fmt: skip


def run(capsys, *words: object) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def test_a_search_is_recorded_and_explained(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    folder, picture = tmp_path / "log", tmp_path / "why.png"
    code, out, _ = run(capsys, "search", "dkl", ID, "--record", folder, "--seed", 3, "--json", *SMALL)
    (figures,) = json.loads(out)["runs"][0]["episodes"]
    assert code == cli.OK and figures["measurements"] == 6 and 0 <= figures["best_share"] <= 1
    code, out, _ = run(capsys, "explain", folder, "--out", picture, "--json")
    told = json.loads(out)
    assert code == cli.OK and picture.read_bytes()[:4] == b"\x89PNG"
    assert (told["agent"], told["step"], told["steps"], told["finished"]) == ("dkl", 5, 6, True)
    assert 0 <= told["x"] < 9 and 0 <= told["y"] < 8 and told["deviation"] > 0 and told["what_if"] == []
    other = tmp_path / "otherwise.png"
    assert run(capsys, "explain", folder, "--out", other, "--acquisition", "random_choice")[0] == cli.OK
    assert other.read_bytes() != picture.read_bytes(), "what would have been chosen is marked"
    code, text, _ = run(capsys, "explain", folder, "--step", 1)
    assert code == cli.OK and "at random: first places" in text and "step 1 of 6" in text


def test_a_person_at_the_terminal_is_asked_and_recorded(capsys, tmp_path, monkeypatch):
    typed = "\n".join(["p 8 7", "", "", "", "p 0 99", "a maximum_variance", "", "", ""]) + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    code, out, _ = run(capsys, "search", "dkl", ID, "--record", tmp_path, "--ask", *SMALL)
    assert code == cli.OK
    assert "Step 0: measure x" in out and "y from 0 to 7; given 0 99" in in_one_line(out)
    told = json.loads(run(capsys, "explain", tmp_path, "--step", 0, "--json")[1])
    assert (told["x"], told["y"], told["said"]) == (8, 7, [{"say": "pin", "cell": 71}])
    told = json.loads(run(capsys, "explain", tmp_path, "--step", 3, "--json")[1])
    assert told["acquisition"] == "maximum_variance" and told["said"][0]["say"] == "prefer"
    code, text, _ = run(capsys, "explain", tmp_path, "--step", 3, "--acquisition", "expected_improvement")
    assert "A person said: say prefer" in text and "If acquisition expected_improvement:" in text
    words = ("--step", 3, "--measured", 4, 4, 1e6, "--scalarizer", "mn_edge", "--acquisition", "random_choice")
    cases = json.loads(run(capsys, "explain", tmp_path, "--json", *words)[1])["what_if"]
    assert [case["if"] for case in cases] == ["acquisition random_choice", "wanted mn_edge", "measured x 4, y 4"]
    assert not cases[1]["changed"] and all(0 <= case["x"] < 9 and 0 <= case["y"] < 8 for case in cases)


def test_a_person_who_leaves_keeps_what_was_recorded(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    code, out, _ = run(capsys, "search", "dkl", ID, "--record", tmp_path, "--ask", *SMALL)
    assert code == cli.STOPPED and f"What was recorded is in {tmp_path}" in "".join(out.splitlines())
    told = json.loads(run(capsys, "explain", tmp_path, "--json")[1])
    assert told["steps"] == 3 and not told["finished"]


BAD_INPUT = [
    (["search", "dkk", ID], "Unknown agent 'dkk'. Did you mean 'dkl'"),
    (["search", "uniform", ID], "'uniform' can not be supervised"),
    (["search", "dkl", "stem_gym/AtomTargeting-v0"], "'dkl' needs a task of kind 'spectrum_search'"),
    (["search", "dkl", "CartPole-v1"], "is no environment of stem_gym"),
    (["search", "dkl", ID, "--with", "first_place=3"], "unknown key 'first_place'. Did you mean 'first_places'"),
    (["explain", "no/such/folder"], "is no log of decisions"),
]


@pytest.mark.parametrize(("words", "said"), BAD_INPUT)
def test_bad_input_is_refused_in_a_sentence(capsys, words, said):
    code, _, err = run(capsys, *words)
    assert code == cli.BAD_INPUT and said in in_one_line(err)


def test_a_wrong_question_is_refused_in_a_sentence(capsys, tmp_path):
    run(capsys, "search", "dkl", ID, "--record", tmp_path, "--json", *SMALL)
    for words, said in (
        (["--step", 9], "has the steps 0 to 5 of row 0; asked for step 9"),
        (["--row", 2], "asked for row 2"),
        (["--acquisition", "thomson"], "Did you mean 'thompson'"),
        (["--scalarizer", "mn_egde"], "Did you mean 'mn_edge'"),
        (["--measured", 1, 2, 3], "needs --step and three finite numbers"),
        (["--step", 2, "--measured", 1, 2, "nan"], "needs --step and three finite numbers"),
        (["--step", 2, "--measured", 1.7, 2, 3], "whole numbers of a cell; given [1.7, 2.0]"),
        (["--step", 2, "--measured", 9, 0, 3], "x from 0 to 8 and y from 0 to 7; given 9, 0"),
    ):
        code, _, err = run(capsys, "explain", tmp_path, *words)
        assert code == cli.BAD_INPUT and said in in_one_line(err), words
    code, _, err = run(capsys, "search", "dkl", ID, "--record", tmp_path, *SMALL)
    assert code == cli.BAD_INPUT and "holds a log of decisions already" in in_one_line(err)
