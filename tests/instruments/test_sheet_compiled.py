"""The sheet in machine code against the reference in torch: the same events, and numbers that differ by rounding."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from stem_gym.core import compiled
from stem_gym.core.conformance import check_instrument
from stem_gym.core.errors import ConfigError, MissingExtraError
from stem_gym.core.instructions import ATOMS, Blank, Dwell, Park, Scan, Set, TraceRule, Wait
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.envs.registration import variant_files
from stem_gym.instruments import make
from stem_gym.instruments.sheet import SheetMicroscope
from stem_gym.tasks._compiled_fabrication import CompiledFabrication
from stem_gym.tasks.beam_fabrication import BeamFabrication

ROWS = 24
SETTINGS: dict[str, dict[str, Any]] = {
    "one silicon": {},
    "four silicon, wandering sample": {
        "specimen": {"count": 4, "separation_ang": 2.9},
        "drift": {"speed_ang_per_s": 0.5, "correlation_s": 5.0, "diffusion_ang2_per_s": 0.05},
    },
    "a map drawn for each row": {
        "kinetics": {"jumps": {"kind": "map", "peak_per_s": {"low": 0.1, "high": 2.0, "logarithmic": True},
                               "anisotropy": {"low": 0.7, "high": 1.4}, "floor_per_s": {"low": 0.0, "high": 0.02}}}
    },
    "the toy": {"kinetics": {"jumps": {"kind": "lorentzian"}, "damage": None}},
    "phosphorus turns its bonds": {
        "specimen": {"element": "P"},
        "kinetics": {"rates": {"P": {"exchange_barn": 0.1, "ejection_barn": 0.1, "rotation_barn": 11.2,
                                     "reversal_barn": 200.0, "replacement_barn": 0.07}}},
    },
    "a sheet that breaks, heals and catches silicon": {
        "probe": {"energy_kev": 120.0},
        "kinetics": {"healing_per_s": 0.02, "capture_per_s": 0.02},
        "free_slots": 2,
    },
    "a noisy detector, a careless finder": {
        "detector": {"gain": 0.3, "offset": 20.0, "read_noise": 3.0, "saturation": 3e5, "dark_electrons_per_s": 1e4},
        "finder": {"missed": 0.2, "spurious": 0.2},
        "specimen": {"count": 3},
    },
    "faint": {"current_pa": 0.001},
    "two energies": {"energies_kev": [80.0], "probe": {"energy_kev": 60.0}},
}  # fmt: skip


def column(rows: int, is_compiled: bool, seed: int = 3, **changes: Any) -> SheetMicroscope:
    """A sheet that has been reset; `specimen` takes what differs of its one kind of dopant, and `separation_ang`."""
    given = dict(changes)
    wish = {"element": "Si", "count": 1, "separation_ang": 4.0} | given.pop("specimen", {})
    dopant = {"element": wish["element"], "count_min": wish["count"], "count_max": wish["count"], "window_ang": 12.0}
    specimen = {"kind": "graphene", "cell_ang": 30.0, "dopants": [dopant], "separation_ang": wish["separation_ang"]}
    settings = {"kind": "sheet", "specimen": specimen, "drift": {"speed_ang_per_s": 0.1}, "compiled": is_compiled}
    instrument = make("sheet", settings | given, rows, torch.device("cpu"))
    streams = Streams(row_seeds(seed, rows))
    streams.next_episode(torch.arange(rows))
    instrument.reset(streams, torch.arange(rows))
    return instrument


def play(instrument: SheetMicroscope, steps: int, rows: Tensor | None = None, first: int = 0) -> list[Any]:
    """Readings of an operator who dwells beside the first dopant, with and without a rule, and looks again."""
    rows, readings = torch.arange(instrument.rows) if rows is None else rows, []
    one = torch.ones(len(rows))
    whole, part = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.2, 0.25, 0.6, 0.5])
    for step in range(first, first + steps):
        truth = instrument.truth()
        away = truth["dopant_xy_ang"][rows, 0] - truth["frame_centre_ang"][rows] + torch.tensor([0.9, 0.4])
        cell = truth["cell_ang"][rows]
        place = ((away - cell * torch.round(away / cell)) / 25.0 + 0.5).clamp(0.0, 1.0)
        rule = TraceRule(0.15, 0.1, 2, 2) if step % 3 == 0 else None
        region = (part if step % 4 == 1 else whole).expand(len(rows), 4)
        todo = [
            Park(rows, place[:, 0], place[:, 1]),
            Dwell(rows, one * (0.5 + step), trace=(8, 0, 5)[step % 3], stop=rule),
            Wait(rows, one * 2.0),
            Scan(rows, one * 25.0, (64, 64), one * 5e-4, region, (ATOMS,)),
        ]
        if instrument.config.energies_kev and step % 2:
            todo.insert(0, Set(rows, "energy_kev", one * (80.0 if step % 4 == 1 else 60.0)))
        readings += [instrument.execute(instruction) for instruction in todo]
    return readings


def buffers(state: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of nested dataclasses, by its path."""
    found: dict[str, Tensor] = {}
    for field in dataclasses.fields(state):
        value, path = getattr(state, field.name), f"{name}.{field.name}"
        found |= buffers(value, path) if dataclasses.is_dataclass(value) else {path: value}
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_things_happen(name):
    """Draw by draw: rows of both kinds go through the same events, and end in the same state."""
    reference, fast = (column(ROWS, kind, **SETTINGS[name]) for kind in (False, True))
    for expected, found in zip(play(reference, 12), play(fast, 12), strict=True):
        assert expected.verb == found.verb
        for part in ("seconds", "electrons", "electrons_per_ang2"):
            torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=2e-5, atol=0.0)
        for part in ("data", "calibration"):
            ours, theirs = getattr(found, part), getattr(expected, part)
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                count = key == "trace"  # a rate that differs by its rounding may round to another count
                tolerance = {"rtol": 1e-4, "atol": 1.5} if count else {"rtol": 2e-5, "atol": 2e-4}
                torch.testing.assert_close(ours[key], value, equal_nan=True, check_dtype=True, **tolerance)
    assert torch.equal(reference._streams.address, fast._streams.address)
    ours = buffers(fast._now)
    for key, value in buffers(reference._now).items():
        torch.testing.assert_close(ours[key], value, rtol=2e-5, atol=5e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_the_settings_above_make_everything_happen():
    """Otherwise agreement would say little."""
    sheet = column(ROWS, True, **SETTINGS["a sheet that breaks, heals and catches silicon"])
    play(sheet, 12)
    now = sheet._now.sheet
    assert now.lost.sum() > now.open.sum() > 0 and now.jumps.sum() > 0, "some are healed"
    assert (now.there.sum(1) > 1).any(), "and some have caught silicon"
    turned = column(ROWS, True, **SETTINGS["phosphorus turns its bonds"])
    play(turned, 12)
    assert turned._now.sheet.rotated.any() or (turned._now.sheet.jumps > 0).any()


def test_a_row_is_the_same_alone_and_among_others_to_the_last_bit():
    together = column(6, True, drift={"speed_ang_per_s": 0.4}, specimen={"count": 2})
    play(together, 8)
    settings = together.config.model_dump(mode="json") | {"kind": "sheet"}
    for row, seed in enumerate(row_seeds(3, 6)):
        alone = make("sheet", settings, 1, torch.device("cpu"))
        streams = Streams([seed])
        streams.next_episode(torch.zeros(1, dtype=torch.int64))
        alone.reset(streams, torch.zeros(1, dtype=torch.int64))
        play(alone, 8)
        mine = buffers(alone._now)
        for key, value in buffers(together._now).items():
            if "xy_ang" not in key and value.dtype.is_floating_point:
                assert torch.equal(value[row : row + 1], mine[key]), key


@pytest.mark.parametrize("separation_ang", [0.0, 4.0, 9.0])
def test_fresh_sheets_are_those_of_the_reference_to_the_last_bit(separation_ang):
    kinds = [
        {"element": "Si", "count_min": 1, "count_max": 4, "window_ang": 12.0},
        {"element": "P", "count_min": 0, "count_max": 3, "window_ang": 16.0},
    ]
    specimen = {"kind": "graphene", "cell_ang": 30.0, "dopants": kinds, "separation_ang": separation_ang}
    made = []
    for is_compiled in (False, True):
        settings = {"kind": "sheet", "specimen": specimen, "compiled": is_compiled}
        instrument, streams = make("sheet", settings, 100, torch.device("cpu")), Streams(row_seeds(8, 100))
        for _ in range(2):  # the first ones are the reference's in any case
            streams.next_episode(torch.arange(100))
            instrument.reset(streams, torch.arange(100))
        instrument.reset(streams, torch.tensor([60, 7]))
        made.append(instrument._now)
    found, expected = buffers(made[1]), buffers(made[0])
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert (found[".sheet.atomic_number"] == 15).any()


@pytest.mark.parametrize(
    "name",
    [
        "a sheet that breaks, heals and catches silicon",
        "two energies",
        "a map drawn for each row",
        "phosphorus turns its bonds",
    ],
)
def test_nothing_of_an_episode_is_left_in_the_next(name):
    """Rows that were played and begin again are, to the last bit, those of a reference that was not played."""
    change = SETTINGS[name] | {"probe": {"energy_kev": 60.0, "defocus_sd_ang": 5.0} | SETTINGS[name].get("probe", {})}
    reference, fast = (column(ROWS, kind, **change) for kind in (False, True))
    play(fast, 9)
    every = torch.arange(ROWS)
    fast.execute(Set(every, "beam_shift_x_ang", torch.ones(ROWS)))
    fast.execute(Blank(every, torch.zeros(ROWS, dtype=torch.bool)))
    now = fast._now
    assert (now.sheet.lost > 0).any() or (now.sheet.jumps > 0).any() or now.sheet.rotated.any()
    assert not now.blanked.any() and now.beam_shift_ang.any()
    if name.startswith("phosphorus"):
        assert now.sheet.rotated.any()
    for instrument in (reference, fast):
        streams = Streams(row_seeds(5, ROWS))
        streams.next_episode(torch.arange(ROWS))
        instrument.reset(streams, torch.arange(ROWS))
    found = buffers(fast._now)
    for key, value in buffers(reference._now).items():
        assert torch.equal(found[key], value), key


def test_pictures_are_mended_where_machine_code_has_changed_atoms():
    settings = {"pictures": True, "probe": {"energy_kev": 100.0, "defocus_sd_ang": 5.0}, "free_slots": 1}
    reference, fast = (column(8, kind, **settings) for kind in (False, True))
    began = fast._now.series.clone()
    for instrument in (reference, fast):
        play(instrument, 6)
    assert (fast._now.sheet.jumps > 0).any() and (fast._now.sheet.lost > 1).any()
    largest = began.abs().amax()
    assert (fast._now.series - began).abs().amax() > 1e-3 * largest
    assert (fast._now.series - reference._now.series).abs().amax() < 1e-5 * largest


def test_rows_that_are_not_named_are_not_touched():
    sheet = column(5, True, specimen={"count": 2})
    play(sheet, 2)
    before = {key: value.clone() for key, value in buffers(sheet._now).items()}
    streams = sheet._streams.address.clone()
    play(sheet, 3, torch.tensor([3, 1]))
    others = torch.tensor([0, 2, 4])
    for key, value in buffers(sheet._now).items():
        assert torch.equal(value[others], before[key][others]), key
    assert torch.equal(sheet._streams.address[others], streams[others])
    assert (sheet._now.clock_s[[1, 3]] > before[".clock_s"][[1, 3]]).all()


def test_a_restored_sheet_goes_on_alike():
    sheet = column(4, True)
    play(sheet, 2)
    kept, address = sheet.snapshot(), sheet._streams.snapshot()
    first = play(sheet, 3, first=2)
    sheet._streams.restore(address)
    sheet.restore(kept, sheet._streams)
    for before, after in zip(first, play(sheet, 3, first=2), strict=True):
        for key, value in before.data.items():
            assert torch.equal(value.nan_to_num(), after.data[key].nan_to_num()), key


VARIANTS = [(id, {}) for id in sorted(variant_files()) if "BeamFabrication" in id]
JUDGED_BY_EYE = ("stem_gym/BeamFabrication-trimer-v0", {"scores_from": "perception"})
NEVER_RECENTRED = ("stem_gym/BeamFabrication-energies-v0", {"recentre_ang": None, "skip_frames": True})


@pytest.mark.parametrize(("id", "task"), [*VARIANTS, JUDGED_BY_EYE, NEVER_RECENTRED])
def test_every_variant_plays_alike(id, task):
    played_alike(id, {}, task)


@pytest.mark.parametrize(("end", "instrument"), [
    ("lost_dopant", {"specimen": {"dopants": [{"element": "P", "window_ang": 12.0}]},
                     "kinetics": {"rates": {"P": {"exchange_barn": 0.1, "replacement_barn": 0.2}}}}),
    ("broken", {"probe": {"energy_kev": 110.0}}),
])  # fmt: skip
def test_a_loss_is_judged_alike(end, instrument):
    assert any(
        info[end].any() for info in played_alike("stem_gym/BeamFabrication-v0", instrument, {"vacancies_max": 1})
    )


def played_alike(id: str, instrument: dict[str, Any], task: dict[str, Any]) -> list[dict[str, Any]]:
    """Fifteen steps of the reference and of machine code agree in all that is told; what was told of every step."""
    envs = [
        gymnasium.make_vec(id, num_envs=8, instrument=instrument | {"compiled": kind}, task=task)
        for kind in (False, True)
    ]
    told = []
    envs[0].action_space.seed(0)
    seen = [env.reset(seed=11)[0] for env in envs]
    for _ in range(15):
        for key, value in seen[0].items():
            grey = key == "image"  # a rate that differs by its rounding may round to another count
            np.testing.assert_allclose(seen[1][key], value, rtol=1e-4, atol=1.0 if grey else 2e-3, err_msg=key)
            assert not grey or np.mean(seen[1][key] != value) < 0.002
        action = envs[0].action_space.sample()
        steps = [env.step(action) for env in envs]
        seen = [step[0] for step in steps]
        assert np.array_equal(steps[0][2], steps[1][2])
        infos = [step[4].get("final_info", step[4]) for step in steps]
        for key in ("jumps", "lost_atoms", "success"):
            assert np.array_equal(infos[0][key], infos[1][key]), key
        assert steps[0][4].keys() == steps[1][4].keys()
        for key, value in infos[0].items():
            if not key.startswith(("_", "final")):
                np.testing.assert_allclose(infos[1][key], value, rtol=1e-4, atol=2e-3, err_msg=key)
        np.testing.assert_allclose(steps[1][1], steps[0][1], atol=1e-3)
        told.append(infos[0])
    return told


def test_an_episode_is_the_same_alone_and_in_a_batch_to_the_last_bit():
    id, fast = "stem_gym/BeamFabrication-dimer-v0", {"compiled": True}
    many = gymnasium.make_vec(id, num_envs=5, instrument=fast)
    many.action_space.seed(1)
    together, _ = many.reset(seed=4)
    alone = [gymnasium.make(id, instrument=fast) for _ in range(5)]
    for row, env in enumerate(alone):
        seen, _ = env.reset(seed=row_seeds(4, 5)[row])
        assert all(np.array_equal(seen[key], together[key][row]) for key in seen)
    for _ in range(12):
        actions = many.action_space.sample()
        together, rewards, *_ = many.step(actions)
        for row, env in enumerate(alone):
            seen, reward, *_ = env.step(actions[row])
            assert all(np.array_equal(seen[key], together[key][row]) for key in seen)
            assert reward == rewards[row]


def test_the_task_runs_in_machine_code_where_its_instrument_does():
    kinds = [
        type(gymnasium.make("stem_gym/BeamFabrication-v0", instrument={"compiled": kind}).unwrapped.batch.task)
        for kind in (False, True)
    ]
    assert kinds == [BeamFabrication, CompiledFabrication]


def test_the_contract_holds():
    check_instrument(column(3, True, specimen={"count": 2}))


@pytest.mark.parametrize("change", [{"kinetics": {"contamination": {}}}])
def test_what_only_the_reference_can_do_is_refused(change):
    with pytest.raises(ConfigError, match=rf"clean sheets on a CPU.*{next(iter(change))}"):
        column(1, True, **change)


def test_without_numba_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(compiled, "numba", None)
    with pytest.raises(MissingExtraError, match=r"stem-gym\[physics\]"):
        compiled.inlined(lambda: 1)()
    with pytest.raises(MissingExtraError, match=r"stem-gym\[physics\]"):
        column(1, True)
