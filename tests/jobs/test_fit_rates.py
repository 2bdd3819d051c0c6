"""From a recorded run to rates that the simulator loads; recordings of the wrong form are refused."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import pytest
import yaml

from stem_gym import cli
from stem_gym.core.errors import ConfigError
from stem_gym.instruments.recorder import Recorder
from stem_gym.jobs.fit_rates import read_rates

ID = "stem_gym/BeamFabrication-randomised-v0"
HIDDEN = {"peak_per_s": 0.4, "centre_bonds": 1.1, "width_ang": 0.5, "anisotropy": 1.0, "floor_per_s": 0.0}
RANGES = {name: {"low": value, "high": value, "logarithmic": False} for name, value in HIDDEN.items()}


def record(folder: Path, id: str, steps: int, **overrides: object) -> None:
    env = gymnasium.make_vec(id, num_envs=8, **overrides)
    env.unwrapped.batch.instrument = Recorder(env.unwrapped.batch.instrument, folder, state=())
    env.action_space.seed(1)
    env.reset(seed=1)
    for _ in range(steps):
        env.step(env.action_space.sample())
    env.close()


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    record(folder, ID, 40, instrument={"kinetics": {"jumps": RANGES}})
    return folder


def test_a_recorded_run_gives_its_rates_back(recordings, tmp_path, capsys):
    out = tmp_path / "rates.yaml"
    words = ["fit-rates", str(recordings), "--out", str(out), "--reference-pa", "40", "--level", "0.99", "--json"]
    code = cli.main([*words, "--fix", "floor_per_s=0", "--fix", "anisotropy=1"])
    found = json.loads(capsys.readouterr().out)
    assert code == cli.OK and found["jumps"] >= 10
    for name in ("peak_per_s", "centre_bonds", "width_ang"):
        low, high = found["intervals"][name]
        assert low < HIDDEN[name] < high
    assert read_rates(out).peak_per_s.low == found["estimate"]["peak_per_s"]
    env = gymnasium.make(ID, **yaml.safe_load(out.read_text()))
    env.reset(seed=0)
    law = env.unwrapped.batch.instrument.snapshot().sheet.law[0]
    assert float(law[0]) == pytest.approx(found["estimate"]["peak_per_s"], rel=1e-5)
    env.close()


def test_a_map_says_for_which_energy_it_was_fitted(recordings, tmp_path, capsys):
    out = tmp_path / "rates.yaml"
    words = ["fit-rates", str(recordings), "--out", str(out), "--reference-pa", "40", "--energy-kev", "60"]
    assert cli.main([*words, "--fix", "floor_per_s=0", "--fix", "anisotropy=1"]) == cli.OK
    assert (read_rates(out).valid_kev.low, read_rates(out).valid_kev.high) == (60.0, 60.0)
    rates = yaml.safe_load(out.read_text())
    gymnasium.make(ID, **rates).close()
    rates["instrument"]["probe"] = {"energy_kev": 80.0}
    with pytest.raises(ConfigError, match="60 to 60 keV"):
        gymnasium.make(ID, **rates)
    assert cli.main([*words[:-1], "6"]) == cli.BAD_INPUT
    assert "20 and 300 keV" in capsys.readouterr().err


def test_recordings_in_which_the_energy_changes_are_refused(tmp_path, capsys):
    record(tmp_path, "stem_gym/BeamFabrication-energies-v0", 4)
    assert cli.main(["fit-rates", str(tmp_path)]) == cli.BAD_INPUT
    assert "one. Give recordings" in " ".join(capsys.readouterr().err.split())


def test_wrong_input_is_refused(tmp_path, capsys):
    record(tmp_path / "images", "stem_gym/AtomTargeting-v0", 1)
    (tmp_path / "no.h5").write_text("no")
    (tmp_path / "empty").mkdir()
    for given, message in [
        (tmp_path / "images", "no dopant before and after"),
        (tmp_path / "no.h5", "can not be read as a recording"),
        (tmp_path / "empty", "holds no recordings"),
    ]:
        assert cli.main(["fit-rates", str(given)]) == cli.BAD_INPUT
        assert message in " ".join(capsys.readouterr().err.split())
    (tmp_path / "other.yaml").write_text("instrument: {kinetics: {damage: null}}")
    with pytest.raises(ConfigError, match="no file of rates"):
        read_rates(tmp_path / "other.yaml")
