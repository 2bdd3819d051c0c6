"""Which laws can be told apart: known cases, the published range against ours, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from stem_gym import cli
from stem_gym.core.errors import ConfigError, UnknownNameError
from stem_gym.core.hypotheses import law_set_files
from stem_gym.jobs.identify import TOLD_APART, IdentifyJob, identify

PUBLISHED = str(Path(__file__).parent / "published_range.yaml")
NOISE = {"noise_absolute": 8.0, "noise_relative": 0.08}
TWO = ("thermodynamic_1", "thermodynamic_2")


def pairs(found):
    return {(pair.truth, pair.rival): pair for pair in found.pairs}


def own_set(path: Path, change) -> str:
    data = yaml.safe_load(law_set_files()["domain_growth"].read_text())
    change(data["laws"])
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return str(path)


def test_the_published_range_can_not_tell_what_ours_can():
    """HYPOTHESES: the second law is about twice the first over the published range, and r0 absorbs it."""
    published = pairs(identify(IdentifyJob(PUBLISHED, experiments=20, **NOISE)))
    ours = pairs(identify(IdentifyJob("domain_growth", experiments=20, **NOISE)))
    for pair in (TWO, TWO[::-1]):
        assert published[pair].alike > 0.5 and published[pair].log_factor < TOLD_APART
        assert ours[pair].alike < 0.25 and ours[pair].log_factor > TOLD_APART
        assert ours[pair].chi2 > 3.0 * published[pair].chi2


def test_the_same_law_twice_can_not_be_told_apart(tmp_path):
    def twin(laws):
        laws["twin"] = laws["charge_injection"]

    found = identify(IdentifyJob(own_set(tmp_path / "twins.yaml", twin), experiments=500, worlds=8, **NOISE))
    for pair in (("twin", "charge_injection"), ("charge_injection", "twin")):
        assert pairs(found)[pair].alike == 1.0
        assert pairs(found)[pair].log_factor == pytest.approx(0.0, abs=1e-3)
        assert pairs(found)[pair].chi2 < 0.01
    assert (
        "twin can not be told from charge_injection: in 100% of the worlds 500 experiments"
        in found.sentences()[0] + (found.sentences()[1])
    )


def test_two_constants_by_hand(tmp_path):
    """Sizes of 10 and 20 nm, all but certain, under noise of 5 nm: χ² is 4 each time, and ten make 4 · 10 / 2."""
    tight = {"kind": "normal", "sd": 1e-4}
    law = {"law": "charge_injection"}
    path = own_set(tmp_path / "constants.yaml", lambda laws: laws.clear() or laws.update(
        {
            f"of_{size}": {**law, "priors": {
                "a_nm": {"kind": "lognormal", "median": float(size), "sigma": 1e-4},
                "alpha": {**tight, "mean": 0.0},
                "beta": {**tight, "mean": 0.0},
            }}
            for size in (10, 20)
        }
    ))  # fmt: skip
    for pair in identify(IdentifyJob(path, experiments=10, noise_absolute=5.0, worlds=4)).pairs:
        assert pair.chi2 == pytest.approx(4.0, rel=0.01)
        assert pair.log_factor == pytest.approx(20.0, rel=0.01)
        assert pair.alike == 0.0


def test_more_experiments_and_less_noise_tell_more():
    few, many, quiet = (
        pairs(identify(IdentifyJob("domain_growth", worlds=8, **job)))[TWO]
        for job in (
            {"experiments": 5},
            {"experiments": 50},
            {"experiments": 5, "noise_absolute": 1.0, "noise_relative": 0.01},
        )
    )
    assert few.log_factor < many.log_factor and few.log_factor < quiet.log_factor
    assert few.alike >= many.alike


def test_noise_and_number_come_from_the_environment_that_uses_the_set():
    found = identify(IdentifyJob("domain_growth", worlds=1))
    assert (found.experiments, found.noise_absolute, found.noise_relative) == (15, 8.0, 0.08)
    assert found.source == "of stem_gym/HypothesisDiscrimination-v0"
    hard = identify(IdentifyJob("stem_gym/HypothesisDiscrimination-hard-v0", worlds=1))
    assert (hard.experiments, hard.noise_absolute, hard.noise_relative) == (25, 15.0, 0.15)
    changed = identify(IdentifyJob("domain_growth", worlds=1, noise_relative=0.0))
    assert changed.noise_relative == 0.0 and changed.source.endswith("changed")


def test_every_set_that_ships_can_be_told_apart_on_the_whole():
    """No pair is alike in most worlds, at the noise and the number of experiments of the environment that uses it."""
    for name in law_set_files():
        assert max(pair.alike for pair in identify(IdentifyJob(name)).pairs) <= 0.5, name


def test_the_command_prints_a_table_and_words(capsys):
    assert cli.main(["identify", PUBLISHED, "--noise-absolute", "8", "--experiments", "20", "--worlds", "8"]) == cli.OK
    said = " ".join(capsys.readouterr().out.split())
    assert "thermodynamic_1" in said and "can not be told from" in said and "20 experiments" in said


def test_the_command_prints_json(capsys):
    assert cli.main(["identify", "damage", "--worlds", "2", "--json"]) == cli.OK
    found = json.loads(capsys.readouterr().out)
    assert len(found["pairs"]) == 12 and found["told_apart"] == pytest.approx(math.log(20.0))
    assert {"truth", "rival", "chi2", "log_factor", "alike"} == found["pairs"][0].keys()
    assert found["sentences"]


@pytest.mark.parametrize(
    ("job", "error", "words"),
    [
        (IdentifyJob("domain_grow"), UnknownNameError, "Did you mean 'domain_growth'"),
        (IdentifyJob("stem_gym/HypothesisDiscriminatio-v0"), UnknownNameError, "HypothesisDiscrimination"),
        (IdentifyJob("stem_gym/AtomTargeting-v0"), ConfigError, "no laws to tell apart.*atom_targeting"),
        (IdentifyJob(PUBLISHED), ConfigError, "--noise-absolute, in radius_nm"),
        (IdentifyJob(PUBLISHED, noise_absolute=1.0), ConfigError, "--experiments"),
        (IdentifyJob(PUBLISHED, experiments=5, noise_absolute=-1.0), ConfigError, "noise.absolute"),
        (IdentifyJob(PUBLISHED, experiments=5, noise_absolute=0.0), ConfigError, "one measurement would decide"),
        (IdentifyJob("damage", experiments=0), ConfigError, "at least one"),
        (IdentifyJob("damage", worlds=0), ConfigError, "at least one"),
    ],
)
def test_bad_input_is_named(job, error, words):
    with pytest.raises(error, match=words):
        identify(job)


def test_a_file_of_laws_that_is_wrong_is_refused_by_the_command(tmp_path, capsys):
    path = own_set(tmp_path / "one.yaml", lambda laws: [laws.pop(name) for name in list(laws)[1:]])
    assert cli.main(["identify", path, "--noise-absolute", "8", "--experiments", "5"]) == cli.BAD_INPUT
    assert "give at least two" in " ".join(capsys.readouterr().err.split())
