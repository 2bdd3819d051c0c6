"""Recoil dynamics: conserved quantities, known outcomes, labels, sampling, and files that survive a killed run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stem_gym.core.errors import ConfigError, RecordError, UnknownNameError
from stem_gym.datasets import recoil_thresholds, recoil_trajectories
from stem_gym.datasets.recoil_dynamics import EV_PER_U_ANG2_FS2, Flight, System, energy_ev, fly, quench
from stem_gym.datasets.recoil_outcomes import Recoil, Result, label, run_recoil, tilted
from stem_gym.datasets.recoil_shards import (
    OUTCOMES,
    SITES,
    Trajectories,
    load_shard,
    load_shards,
    save_shard,
    shard_path,
    split_of,
)
from stem_gym.datasets.recoil_sheets import Sheet, lattice_constant_ang, sheet_of
from stem_gym.datasets.recoil_thresholds import find_thresholds, first_lasting, load_thresholds
from stem_gym.datasets.recoil_trajectories import ENERGY_SPAN_EV, draw, make_shard, thermal_start

ALONG = tilted(0.0, 0.0)


def kicked(sheet: Sheet, transfer_ev: float, direction: np.ndarray = ALONG) -> np.ndarray:
    velocity = np.zeros_like(sheet.system.positions_ang)
    velocity[sheet.struck] = sheet.velocity(transfer_ev, direction)
    return velocity


def kinetic_ev(system: System, velocity: np.ndarray) -> float:
    return float(0.5 * EV_PER_U_ANG2_FS2 * (system.mass_u[:, None] * velocity**2).sum())


# --- dynamics ---


def test_a_flight_conserves_energy_and_momentum() -> None:
    sheet = sheet_of("silicon_ahead")
    velocity = kicked(sheet, 18.0, tilted(0.3, 0.7))
    assert kinetic_ev(sheet.system, velocity) == pytest.approx(18.0)
    flight = fly(sheet.system, velocity, sheet.struck, 200.0)
    before = energy_ev(sheet.system) + 18.0
    after = energy_ev(flight.system) + kinetic_ev(flight.system, flight.velocity_ang_fs)
    assert after == pytest.approx(before, abs=0.005)  # velocity Verlet at 0.2 fs: 0.001 eV seen
    assert flight.energy_ev == pytest.approx(energy_ev(flight.system), abs=1e-6)
    momentum = sheet.system.mass_u @ velocity
    assert sheet.system.mass_u @ flight.velocity_ang_fs == pytest.approx(momentum, abs=1e-9)


def test_the_error_of_a_flight_falls_with_the_square_of_the_step() -> None:
    sheet = sheet_of("pristine")
    velocity = kicked(sheet, 15.0)
    fine = fly(sheet.system, velocity, sheet.struck, 40.0, 0.05).system.positions_ang
    errors = [
        np.abs(fly(sheet.system, velocity, sheet.struck, 40.0, step).system.positions_ang - fine).max()
        for step in (0.4, 0.8)
    ]
    assert errors[1] / errors[0] == pytest.approx(4.0, rel=0.15)  # order two, seen against a step that is not zero


def test_a_flight_backwards_returns_to_its_start() -> None:
    sheet = sheet_of("silicon_behind")
    there = fly(sheet.system, kicked(sheet, 14.0), sheet.struck, 60.0)
    back = fly(there.system, -there.velocity_ang_fs, sheet.struck, 60.0)
    assert np.abs(back.system.positions_ang - sheet.system.positions_ang).max() < 1e-6


def test_a_quench_ends_where_forces_vanish() -> None:
    sheet = sheet_of("silicon_ahead")
    rng = np.random.default_rng(0)
    disturbed = sheet.system.moved(sheet.system.positions_ang + rng.normal(0, 0.05, (96, 3)))
    cooled, left = quench(disturbed, 0.005, 5000)
    assert left < 0.005
    assert energy_ev(cooled) == pytest.approx(energy_ev(sheet.system), abs=0.02)


# --- sheets ---


def test_the_lattice_constant_is_where_the_energy_is_least() -> None:
    sheet = sheet_of("pristine").system
    scaled = [
        System(s * sheet.cell_ang, s * sheet.positions_ang, sheet.atomic_number, sheet.mass_u) for s in (0.999, 1.001)
    ]
    assert all(energy_ev(system) > energy_ev(sheet) for system in scaled)
    assert 2.5 < lattice_constant_ang() < 2.65


def test_silicon_stands_out_of_the_sheet_and_has_three_neighbours() -> None:
    ahead, behind = sheet_of("silicon_ahead"), sheet_of("silicon_behind")
    assert np.abs(ahead.system.positions_ang * [1, 1, -1] - behind.system.positions_ang).max() < 1e-9
    positions = ahead.system.positions_ang
    distance = np.sort(np.linalg.norm(positions - positions[ahead.partner], axis=1))
    assert distance[1:4] == pytest.approx(1.82, abs=0.02) and distance[4] > 2.5
    assert 1.0 < positions[ahead.partner, 2] - positions[:, 2].mean() < 1.6
    towards = (positions[ahead.partner] - positions[ahead.struck])[:2]
    assert towards / np.linalg.norm(towards) == pytest.approx(ahead.towards, abs=0.01)  # its copies pull


def test_a_vacancy_is_one_atom_less_next_to_the_struck_one() -> None:
    vacancy, pristine = sheet_of("vacancy"), sheet_of("pristine")
    assert len(vacancy.system.mass_u) == len(pristine.system.mass_u) - 1
    hole = vacancy.system.positions_ang[vacancy.struck, :2] + 1.498 * vacancy.towards
    assert np.linalg.norm(vacancy.system.positions_ang[:, :2] - hole, axis=1).min() > 1.3


def test_an_unknown_site_is_told() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'pristine'"):
        sheet_of("pristin")


# --- outcomes ---


@pytest.mark.parametrize(
    ("site", "transfer_ev", "outcome"),
    [
        ("silicon_ahead", 12.0, "nothing"),
        ("silicon_ahead", 16.0, "exchange"),
        ("silicon_ahead", 22.5, "ejected"),
        ("pristine", 20.0, "nothing"),
        ("pristine", 23.0, "ejected"),
        ("vacancy", 18.0, "nothing"),
        ("vacancy", 23.0, "ejected"),
    ],
)
def test_known_outcomes_along_the_beam(site: str, transfer_ev: float, outcome: str) -> None:
    """EDIP: exchange of C beside Si from about 14, ejection from about 21 eV; pristine C out at 21.4 eV."""
    assert OUTCOMES[run_recoil(Recoil(site, transfer_ev, ALONG)).outcome] == outcome


def test_after_an_exchange_the_silicon_is_on_the_other_side() -> None:
    assert run_recoil(Recoil("silicon_ahead", 16.0, ALONG)).silicon_side == -1


def test_mirrored_recoils_end_alike() -> None:
    for site, transfer_ev, azimuth in (("silicon_ahead", 15.0, 0.6), ("vacancy", 21.0, 1.2)):
        one, other = (run_recoil(Recoil(site, transfer_ev, tilted(0.15, a))) for a in (azimuth, -azimuth))
        assert one == other


def rest(sheet: Sheet) -> Flight:
    return Flight(sheet.system, np.zeros_like(sheet.system.positions_ang), 500.0, False, 0.0)


def moved(flight: Flight, atom: int, step: np.ndarray) -> Flight:
    positions = flight.system.positions_ang.copy()
    positions[atom] += step
    return replace(flight, system=flight.system.moved(positions))


def test_labels_of_made_up_ends() -> None:
    sheet = sheet_of("silicon_ahead")
    still = rest(sheet)
    assert label(sheet, still) == (OUTCOMES.index("nothing"), 1)
    drifted = replace(still, system=sheet.system.moved(sheet.system.positions_ang + np.array([0.9, 0.9, 4.0])))
    assert label(sheet, drifted) == (OUTCOMES.index("nothing"), 1)
    assert label(sheet, replace(still, escaped=True)) == (OUTCOMES.index("ejected"), 1)
    step = sheet.system.positions_ang[sheet.partner] - sheet.system.positions_ang[sheet.struck]
    swapped = moved(moved(still, sheet.struck, step * [1, 1, 0]), sheet.partner, -step * [1, 1, 0] - [0, 0, 2.0])
    assert label(sheet, swapped) == (OUTCOMES.index("exchange"), -1)
    adatom = moved(still, 0, np.array([0.0, 0.0, 4.0]))
    assert label(sheet, adatom)[0] == OUTCOMES.index("other")


# --- thresholds ---


def test_a_threshold_needs_two_steps_that_agree() -> None:
    def happens(energy: float) -> bool:
        return energy > 14.13 or 11.9 < energy < 12.1

    assert first_lasting(happens, (10.0, 20.0), 0.5, 0.05) == pytest.approx(14.13, abs=0.05)
    assert first_lasting(lambda _: False, (10.0, 20.0), 0.5, 0.05) is None
    with pytest.raises(ConfigError, match="span of energies"):
        first_lasting(happens, (20.0, 10.0), 0.5, 0.05)


def test_the_threshold_of_a_pristine_atom_along_the_beam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recoil_thresholds, "SPAN_EV", (20.0, 23.0))
    found = {t.event: t.transfer_ev for t in find_thresholds("pristine", 0.0, 0.0)}
    assert set(found) == {"displaced", "ejected"}
    assert found["ejected"] == pytest.approx(21.4, abs=0.2)  # an independent run of the same potential in LAMMPS


def test_thresholds_that_are_not_there_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"stem_gym\.datasets\.recoil_thresholds"):
        load_thresholds(tmp_path)


# --- sampling ---


def test_weights_turn_the_draws_into_uniform_ones() -> None:
    _, transfer, direction, weight = draw(np.random.default_rng(0), 40_000)
    assert np.linalg.norm(direction, axis=1) == pytest.approx(1.0)
    assert weight.mean() == pytest.approx(1.0, abs=0.02)  # the density integrates to one
    assert np.average(transfer, weights=weight) == pytest.approx(sum(ENERGY_SPAN_EV) / 2, abs=0.2)
    assert np.average(direction[:, 2], weights=weight) == pytest.approx(0.75, abs=0.005)  # (1 + cos 60°) / 2
    assert (np.degrees(np.arccos(direction[:, 2])) < 30).mean() > 0.7


def test_a_thermal_start_keeps_its_energy_and_its_centre() -> None:
    sheet = sheet_of("pristine")
    system, velocity = thermal_start(sheet, 3.17e5, np.random.default_rng(0))
    mass, given = system.mass_u, 3.17e5 * 1e-10  # Å²/fs²
    total = energy_ev(system) - energy_ev(sheet.system) + kinetic_ev(system, velocity)
    degrees = 3 * len(mass)
    assert total == pytest.approx(degrees * 12.0 * given * EV_PER_U_ANG2_FS2, rel=0.25)  # √(2/288) is 8 %
    assert np.abs(mass @ velocity).max() < 1e-9
    assert kinetic_ev(system, velocity) == pytest.approx(0.5 * total, rel=0.35)


def test_a_shard_is_its_seed_and_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recoil_trajectories, "run_recoil", lambda recoil, start: Result(0, 1, recoil.transfer_ev))
    first, again, other = make_shard(3, 4, 8), make_shard(3, 4, 8), make_shard(3, 6, 8)
    assert np.array_equal(first.time_fs, again.time_fs) and np.array_equal(first.direction, again.direction)
    assert not np.intersect1d(first.transfer_ev, other.transfer_ev).size
    assert not np.intersect1d(first.transfer_ev, make_shard(4, 4, 8).transfer_ev).size


def test_every_second_shard_for_training_closes_in_on_the_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_at_19_ev(recoil: Recoil, start: object) -> Result:
        return Result(OUTCOMES.index("ejected" if recoil.transfer_ev > 19.0 else "nothing"), 0, 500.0)

    monkeypatch.setattr(recoil_trajectories, "run_recoil", break_at_19_ev)
    drawn, closing = make_shard(0, 2, 640), make_shard(0, 3, 640)
    assert (closing.weight == 0.0).all() and (drawn.weight > 0.0).all()
    low, high = np.array(recoil_trajectories._WINDOWS_EV)[closing.site].T
    assert (closing.transfer_ev > low).all() and (closing.transfer_ev < high).all(), "each site has its window"
    for one in range(0, 640, 8):
        assert np.ptp(closing.direction[one : one + 8], axis=0).max() == 0.0, "eight energies of one direction"
        assert np.abs(closing.transfer_ev[one : one + 8] - 19.0).min() < 1.0
    narrow = [(shard.direction[:, 2] > np.cos(np.radians(3.0))).mean() for shard in (drawn, closing)]
    assert narrow[0] == pytest.approx(0.1, abs=0.05) and narrow[1] > 0.25


# --- files ---


def some(count: int = 4) -> Trajectories:
    rng = np.random.default_rng(0)
    site, transfer, direction, weight = draw(rng, count)
    zeros = np.zeros(count, dtype=np.int8)
    return Trajectories(site.astype(np.int8), transfer, direction, weight, zeros, zeros, np.full(count, 500.0))


def test_a_shard_is_read_as_written_and_never_rewritten(tmp_path: Path) -> None:
    path = shard_path(tmp_path, 0)
    assert save_shard(path, some(), {"seed": 0})
    content = path.read_bytes()
    assert not save_shard(path, some(5), {"seed": 1})
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ["recoil-00000.npz"]
    found, settings = load_shard(path)
    assert settings == {"seed": 0}
    assert all(np.array_equal(getattr(found, name), value) for name, value in vars(some()).items())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x80\x04\x95"])
def test_a_damaged_shard_is_told(tmp_path: Path, content: bytes) -> None:
    shard_path(tmp_path, 0).write_bytes(content)
    with pytest.raises(RecordError, match="make it again"):
        load_shard(shard_path(tmp_path, 0))


def test_shards_of_a_split_and_of_one_kind(tmp_path: Path) -> None:
    assert [split_of(n) for n in range(10)] == ["train"] * 6 + ["valid"] * 2 + ["held_out"] * 2
    with pytest.raises(RecordError, match=r"stem_gym\.datasets\.recoil_trajectories"):
        load_shards(tmp_path, "train")
    for number in (0, 1, 8):
        save_shard(shard_path(tmp_path, number), some(), {"seed": 0})
    assert len(load_shards(tmp_path, "train")[0]) == 8 and len(load_shards(tmp_path, "held_out")[0]) == 4
    save_shard(shard_path(tmp_path, 2), some(), {"seed": 1})
    with pytest.raises(RecordError, match="was made with"):
        load_shards(tmp_path, "train")


def test_a_killed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[int] = []

    def make(seed: int, number: int, count: int, variance: float) -> Trajectories:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(number)
        return some(count)

    monkeypatch.setattr(recoil_trajectories, "make_shard", make)
    arguments = f"--out {tmp_path} --shards 4 --trajectories 3".split()
    with pytest.raises(KeyboardInterrupt):
        recoil_trajectories.main(arguments)
    (tmp_path / "recoil-00002.4711.tmp").write_bytes(b"half a file")  # what a killed process leaves behind
    monkeypatch.setattr(recoil_trajectories, "make_shard", lambda s, n, c, v: made.append(n) or some(c))
    recoil_trajectories.main(arguments)
    assert made == [0, 1, 2, 3]
    assert re.search(r"2/2 shard 3: nothing 3, .* trajectories a core-minute, 0\.0 min left", capsys.readouterr().out)
    with pytest.raises(RecordError, match="Use another folder"):
        recoil_trajectories.main([*arguments, "--seed", "1"])
    with pytest.raises(ConfigError, match="at least 1"):
        recoil_trajectories.main(f"--out {tmp_path} --shards 0".split())


def test_the_command_runs_real_recoils(tmp_path: Path) -> None:
    recoil_trajectories.main(f"--out {tmp_path} --shards 1 --trajectories 6 --velocity-variance-m2-s2 3e5".split())
    found, settings = load_shard(shard_path(tmp_path, 0))
    assert len(found) == 6 and settings["velocity_variance_m2_s2"] == 3e5
    with_silicon = np.char.startswith(np.array(SITES)[found.site], "silicon")
    assert np.array_equal(found.silicon_side != 0, with_silicon)
