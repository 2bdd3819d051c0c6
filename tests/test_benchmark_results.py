"""What the stored figures must show: a benchmark that was measured anew and shows it no longer turns this red."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from stem_gym.core.hypotheses import read_law_set
from stem_gym.simulator import laws

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"


def rows(file, *keys, under="rows"):
    return {tuple(row[key] for key in keys): row for row in json.loads((RESULTS / file).read_text())[under]}


@pytest.fixture(scope="module")
def campaigns():
    return rows("hypotheses.json", "level", "agent", under="summary")


@pytest.fixture(scope="module")
def searches():
    return rows("spectrum_search.json", "field", "agent")


def test_every_agent_was_measured_on_every_level_with_at_least_200_episodes(campaigns):
    levels = {"std", "easy", "hard", "drift", "site", "open", "damage", "coarsening"}
    agents = {agent for _, agent in campaigns} - {"ppo"}
    assert not {(level, agent) for level in levels for agent in agents} - campaigns.keys()
    assert {("std", "ppo"), ("drift", "ppo"), ("site", "ppo")} <= campaigns.keys()
    assert min(row["episodes"] for row in campaigns.values()) >= 200


@pytest.mark.parametrize("agent", ["random_designs", "eig"])
def test_claims_at_95_percent_are_right_in_93_to_99_percent_of_1000_episodes(campaigns, agent):
    row = campaigns["std", agent]
    assert row["episodes"] >= 1000 and 0.93 <= row["claims_right"] / row["claims"] <= 0.99


def test_eig_needs_at_most_half_of_the_measurements_of_chance(campaigns):
    assert campaigns["std", "eig"]["median"] <= 0.5 * campaigns["std", "random_designs"]["median"]


def test_on_drift_ppo_earns_clearly_more_than_information_per_cost(campaigns):
    ppo, other = campaigns["drift", "ppo"], campaigns["drift", "eig_per_cost"]
    assert ppo["score"] - other["score"] > 3.0 * (ppo["score_error"] ** 2 + other["score_error"] ** 2) ** 0.5


@pytest.mark.parametrize("closed", ["eig", "eig_per_cost", "bma_variance", "random_designs"])
def test_an_open_set_is_confident_and_wrong_at_most_a_third_as_often(campaigns, closed):
    open_set = campaigns["open", "open_set"]["confident_wrong"]
    assert open_set <= campaigns["open", closed]["confident_wrong"] / 3.0


def test_dkl_finds_the_copper_edge_within_25_measurements_and_chance_does_not_within_60(searches):
    assert searches["cuzn_cu", "dkl"]["to_90"]["median"] <= 25
    assert searches["cuzn_cu", "uniform"]["to_90"]["median"] > 60
    assert min(row["episodes"] for row in searches.values()) >= 10


@pytest.mark.parametrize("field", ["v0", "flakes", "xrays", "edges", "cuzn_cu", "cuzn_zn", "fept_pt"])
def test_intervals_of_dkl_hold_what_they_promise_from_20_measurements_on(searches, field):
    looks = searches[field, "dkl"]["map"]
    assert looks.keys() == ({"20", "40"} if field == "edges" else {"20", "40", "60"}), "edges ends at 60 measurements"
    assert all(0.80 <= look["covered"][0] <= 0.97 for look in looks.values())


def test_side_by_side_whole_episodes_of_dkl_are_four_times_faster():
    fits = json.loads((RESULTS / "surrogate_fits.json").read_text())
    assert fits["whole_episodes"]["ratio"] >= 4.0
    assert fits["one_field"]["200"]["decision_s"] <= 0.15 and fits["one_field"]["200"]["fresh_fit_s"] <= 1.0


def test_beam_fabrication_in_machine_code_is_as_fast_as_asked():
    stored = json.loads((RESULTS / "throughput.json").read_text())["compiled"]
    speed = {(row["id"].removeprefix("stem_gym/BeamFabrication-"), row["rows"]): row["steps_per_s"] for row in stored}
    assert speed["v0", 1] >= 2_000 and speed["v0", 4096] >= 300_000
    assert speed["image-v0", 1] >= 500 and speed["image-v0", 256] >= 5_000


def test_the_page_tells_how_many_thresholds_the_surrogate_meets():
    found = json.loads((RESULTS / "recoil.json").read_text())["thresholds"]
    pairs = [(row["transfer_ev"], row["surrogate_ev"]) for row in found]
    met = sum(one is other or (None not in (one, other) and abs(one - other) <= 0.5) for one, other in pairs)
    page = (REPO / "docs" / "displacement-outcomes.md").read_text()
    assert f"{met} of the card's {len(found)} thresholds lie within 0.5 eV" in page and met >= 67


def test_a_decision_between_laws_takes_milliseconds():
    speed = rows("hypotheses_speed.json", "what")
    for draws in (64, 256, 512):
        assert speed[(f"decision by EIG, {draws} values",)]["one_ms"] <= 20.0
        assert speed[(f"decision by the bound, {draws} values",)]["one_ms"] <= 3.0
    for name in ("EIG", "the bound"):  # with as many values as agents look at
        row = speed[(f"decision by {name}, 64 values",)]
        assert row["one_ms"] >= 5.0 * row["together_ms"]


def test_the_pages_on_the_referee_tell_its_measured_errors():
    found = json.loads((RESULTS / "hypotheses_errors.json").read_text())
    pages = (REPO / "docs" / "decisions").glob("*.md")
    told = " ".join(page.read_text().replace("\n", " ") for page in pages)
    many, *fewer = ({key: f"{value:.3f}" for key, value in row.items()} for row in found["beliefs"])
    assert f"are {many['mean']} (at most {many['most']}) from their mean" in told
    best, *others = fewer
    assert f"was {best['mean']} on average ({best['in_95_percent']} in 95 % of cases, {best['most']} at most)" in told
    for row in others:
        assert f"{row['mean']} ({row['in_95_percent']}, {row['most']}) with" in told
    error = {(row["picked"], row["values"]): row for row in found["forecasts"]}
    for values in (64, 128, 256, 512):
        curve, chance = error["curve", values], error["chance", values]
        first = f"{curve['first_error_nats']:.4f} | {chance['first_error_nats']:.4f}"
        line = f"| {values} | {first} | {curve['error_nats']:.4f} | {chance['error_nats']:.4f} |"
        assert line in told, line
    for few, more in ((64, 128), (128, 256), (256, 512)):
        assert error["curve", few]["error_nats"] < error["chance", more]["error_nats"]
    lost = error["curve", 64]
    assert f"{lost['lost_nats']:.4f} nats less" in told and f"first pulse {lost['first_lost_nats']:.3f}." in told


def test_the_laws_of_the_contributors_guide_run(tmp_path, monkeypatch):
    text = (REPO / "CONTRIBUTING.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "register" in block)
    (data,) = (block for block in re.findall(r"```yaml\n(.*?)```", text, re.S) if "laws:" in block)
    monkeypatch.setattr(laws, "_registered", {})
    exec(compile(code, "CONTRIBUTING.md", "exec"), {})  # noqa: S102 – our own guide
    path = tmp_path / "mine.yaml"
    path.write_text(data)
    assert yaml.safe_load(data)["laws"].keys() == laws.bind_set(read_law_set(str(path))).keys()
