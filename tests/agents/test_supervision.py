"""A person's word is done, written down, and checked before it is done."""

from __future__ import annotations

import numpy as np
import pytest

import agents
from agents.engine.acquisition import ExpectedImprovement, MaximumVariance, UpperConfidenceBound
from agents.engine.console_hook import console_hook, sentence_of
from agents.engine.decision import Decision
from agents.engine.decision_log import DecisionLog
from agents.engine.supervision import Moment, check_verdict, run_supervised
from agents.engine.verdicts import Approve, Pin, Prefer, Veto, Want, apply
from stem_gym.core.errors import ActionError, PolicyError
from tests.agents.recorded import Script, quick_agent, search_env


def cells_of(log: DecisionLog, row: int = 0) -> list[int]:
    """The cells that were measured, in order: the last decision of every step."""
    last = {entry.step: int(entry.decision.chosen[0]) for entry in log.row(row)}
    return [last[step] for step in sorted(last)]


def test_without_a_hook_the_agent_does_what_it_does_alone(tmp_path):
    env = search_env()
    policy = quick_agent(env)
    (figures,) = run_supervised(policy, env, log=tmp_path / "log", seed=2)
    log = DecisionLog.read(tmp_path / "log")
    observation, _ = env.reset(seed=log.seeds[0])
    policy.reset([0], list(log.seeds))
    alone, over = [], False
    while not over:
        action = policy.act({key: value[None] for key, value in observation.items()})[0]
        alone.append(int(action))
        observation, _, over, _, info = env.step(action)
    assert cells_of(log) == alone
    assert figures["best_share"] == info["best_share"] and figures["measurements"] == 9
    assert not log.supervised


def test_what_the_person_says_is_done(tmp_path):
    env = search_env()
    policy = quick_agent(env)
    free = [lambda m: Veto((m.chosen,)), lambda m: Pin(int(np.flatnonzero(m.free)[-1]))]
    lines = {0: [Pin(17)], 2: free, 4: [Want("band")], 6: [Prefer(MaximumVariance()), Want("odd")]}
    script = Script(lines)
    run_supervised(policy, env, script, tmp_path, seed=7)
    at = {step: [m for m in script.moments if m.step == step] for step in range(9)}
    assert at[0][1].chosen == 17 and at[1][0].observation["measured"].ravel()[17] == 1
    vetoed = at[2][0].chosen
    assert at[2][1].chosen != vetoed and vetoed not in cells_of(DecisionLog.read(tmp_path))
    assert at[2][2].chosen == at[2][2].free.nonzero()[0][-1], "a pinned cell comes first"
    assert [m.wanted for m in at[4]] == ["edge", "band"]
    assert not np.array_equal(at[4][0].observation["value"], at[4][1].observation["value"])
    assert [m.acquisition.kind for m in at[6]] == ["expected_improvement", "maximum_variance", "maximum_variance"]
    decision, free_cells = at[6][1].decision, at[6][1].free
    assert at[6][1].chosen == np.where(free_cells, decision.acquisition.ravel(), -1).argmax()
    assert at[7][0].wanted == "odd"
    assert isinstance(policy.acquisition, ExpectedImprovement), "as it was before"


def test_the_last_word_about_a_cell_counts():
    policy = quick_agent(search_env())
    apply(Veto((5, 6)), policy, row=0)
    apply(Pin(5), policy, row=0)
    assert policy.forbidden[0].nonzero().flatten().tolist() == [6]
    assert policy.pinned[0].nonzero().flatten().tolist() == [5]
    apply(Veto((5,)), policy, row=0)
    assert policy.forbidden[0].nonzero().flatten().tolist() == [5, 6] and not policy.pinned.any()


def test_every_row_of_a_batch_is_recorded(tmp_path):
    env = search_env(rows=2)
    figures = run_supervised(quick_agent(env), env, log=tmp_path, seed=5)
    log = DecisionLog.read(tmp_path)
    assert [len(entries) for entries in log.rows] == [9, 9] and all(log.ends)
    assert cells_of(log, 0) != cells_of(log, 1)
    assert [end.figures["best_value"] for end in log.ends] == [row["best_value"] for row in figures]
    assert figures[0]["best_value"] != figures[1]["best_value"]


def test_who_can_not_be_supervised_is_refused():
    env = search_env(rows=2)
    with pytest.raises(PolicyError, match="'uniform' can not be supervised"):
        run_supervised(agents.make("uniform", env), env)
    with pytest.raises(PolicyError, match="A hook supervises one row; the policy has 2"):
        run_supervised(quick_agent(env), env, lambda moment: Approve())


def test_a_wrong_word_of_a_script_stops_the_run(tmp_path):
    env = search_env()
    with pytest.raises(ActionError, match="given cell 120"):
        run_supervised(quick_agent(env), env, lambda moment: Pin(120), tmp_path)
    assert len(DecisionLog.read(tmp_path).row(0)) == 1, "what was decided until then is kept"


def moment(forbidden=()) -> Moment:
    """Three rows of four cells; the first two cells are measured, the agent would take cell 6."""
    measured = np.zeros((3, 4), np.uint8)
    measured[0, :2] = 1
    maps = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    decision = Decision(maps, maps + 0.5, maps - 8, None, np.array([6]), np.array([False]))
    mask = np.isin(np.arange(12), forbidden)
    return Moment(2, {"measured": measured}, decision, UpperConfidenceBound(), ("edge", "band"), "edge", mask)


@pytest.mark.parametrize(
    ("verdict", "error", "said"),
    [
        (Pin(12), ActionError, "x from 0 to 3 and y from 0 to 2, cells 0 to 11; given cell 12"),
        (Pin(-1), ActionError, "given cell -1"),
        (Pin(1.5), ActionError, "given cell 1.5"),
        (Pin(True), ActionError, "given cell True"),
        (Pin(0), ActionError, "x 0, y 0 was measured already; the nearest that was not is x 0, y 1"),
        (Veto((6, 1)), ActionError, "x 1, y 0 was measured already; the nearest that was not is"),
        (Veto((6, 40)), ActionError, "given cell 40"),
        (Veto(()), ActionError, "at least one cell"),
        (Veto(tuple(range(2, 12))), ActionError, "would forbid the last"),
        (Want("bnad"), ActionError, "Did you mean 'band'"),
        (Prefer("thompson"), PolicyError, "takes an acquisition function"),
        (None, PolicyError, "A hook answers Approve, Veto, Pin, Prefer or Want; given None"),
    ],
)
def test_what_can_not_be_is_refused_with_what_can(verdict, error, said):
    with pytest.raises(error, match=said):
        check_verdict(verdict, moment())


def test_cells_forbidden_before_count_for_the_last_one():
    check_verdict(Veto((6,)), moment(forbidden=range(7, 12)))
    with pytest.raises(ActionError, match="forbid the last"):
        check_verdict(Veto((6,)), moment(forbidden=[2, 3, 4, 5, *range(7, 12)]))


def converse(*lines: str, of: Moment | None = None):
    """The verdict of a person who types these lines, and all that was written."""
    left, written = list(lines), []

    def read(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    verdict = console_hook(of or moment(), read, written.append)
    assert not left, "every line was read"
    return verdict, "\n".join(written)


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ("", Approve()),
        ("v", Veto((6,))),
        ("v 3 1", Veto((7,))),
        ("p 3 2", Pin(11)),
        (" s  band ", Want("band")),
        ("a maximum_variance", Prefer(MaximumVariance())),
        ("a upper_confidence_bound deviations=3", Prefer(UpperConfidenceBound(deviations=3.0))),
    ],
)
def test_a_line_at_the_terminal_is_a_verdict(line, verdict):
    found, written = converse(line)
    assert found == verdict
    assert "Step 2: measure x 2, y 1, where edge is expected to be 6 ± 6.5 (upper_confidence_bound -2)." in written


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("p 4 0", "x is a whole number from 0 to 3, y from 0 to 2; given 4 0"),
        ("p 1 0", "was measured already; the nearest that was not is"),
        ("p x y", "x is a whole number"),
        ("go", "Not understood: 'go'. Type ?"),
        ("s bnad", "Did you mean 'band'"),
        ("a thomson", "Did you mean 'thompson'"),
        ("a thompson width=3", "unknown key 'width'"),
        ("a upper_confidence_bound deviations=many", "NAME=NUMBER"),
        ("a upper_confidence_bound deviations=-1", "deviations"),
        ("?", "measure the cell X Y next"),
        ("?", "edge, band"),
        ("?", "level_set, maximum_variance"),
    ],
)
def test_the_terminal_asks_again(line, said):
    verdict, written = converse(line, "v")
    assert verdict == Veto((6,)) and said in written


def test_the_end_of_the_input_stops_like_ctrl_c():
    with pytest.raises(KeyboardInterrupt):
        converse()


def test_a_place_drawn_at_random_says_so():
    drawn = moment()
    drawn.decision.seeding[0] = True
    assert sentence_of(drawn) == "Step 2: measure x 2, y 1, drawn at random (first places)."
