"""The rules of the spectrum search, by hand on a field of eight by six cells whose spectra have two peaks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from stem_gym.core.config import Budget, parse
from stem_gym.core.errors import ActionError, CapabilityError, ConfigError
from stem_gym.core.instrument import Limits
from stem_gym.envs.batch import BatchEnv
from stem_gym.tasks.spectrum_search import SpectrumSearch, SpectrumSearchConfig
from tests.tasks.toy_field import Toy

GRID = (6, 8)
LOW = {"kind": "band_integral", "window": {"low_ev": 10.0, "high_ev": 30.0}}
HIGH = {"kind": "band_integral", "window": {"low_ev": 35.0, "high_ev": 55.0}}
BASE: dict[str, Any] = {
    "mode": "optimise",
    "detector": "eels",
    "exposures_s": [0.5],
    "measurements": 20,
    "scalarizers": [{"name": "low", "measure": LOW}, {"name": "high", "measure": HIGH}],
    "fov_ang": 100.0,
    "frame_dwell_s": 1e-5,
    "time_weight": 0.0,
}
RICH = Budget(steps=100, seconds=1e9, electrons=1e18)


def field(rows: int = 1) -> torch.Tensor:
    """The first peak grows along the cells, the second falls; every row is a little brighter than the last."""
    cells = torch.arange(48.0)
    one = torch.stack((cells + 1.0, 50.0 - cells), dim=1)
    return torch.stack([one * (1.0 + row) for row in range(rows)])


def env_of(rows: int = 1, knows: bool = True, budget: Budget = RICH, **changes: Any) -> BatchEnv:
    toy = Toy(field(rows), GRID, knows)
    task = SpectrumSearch(parse(SpectrumSearchConfig, BASE | changes, "test")).fitted(toy.capabilities)
    env = BatchEnv(task, toy, budget)
    env.reset(torch.arange(rows), seeds=list(range(rows)))
    return env


def measure(env: BatchEnv, *cells: int) -> Any:
    return env.step(torch.tensor(cells))


def test_a_measured_value_is_the_band_of_the_rate_in_its_own_cell() -> None:
    """Cell 9 is column 1 of row 1; a Gaussian of height h and sd 3 eV holds 3·√(2π)·h in channels of 1 eV."""
    step = measure(env_of(), 9)
    value = step.observation["value"][0]
    assert value[1, 1] == pytest.approx(10.0 * 3.0 * np.sqrt(2.0 * np.pi), rel=1e-3)
    assert step.observation["measured"][0].nonzero().tolist() == [[1, 1]] == value.nonzero().tolist()
    assert step.observation["probe"][0].tolist() == pytest.approx([1.5 / 8, 1.5 / 6])
    assert step.observation["last_value"][0, 0] == value[1, 1]
    assert step.observation["spectrum"][0, 20] == pytest.approx(10.0, rel=1e-3)


def test_the_reward_of_optimise_adds_up_to_the_share_of_the_range_that_was_reached() -> None:
    env = env_of()
    first, worse, better = (measure(env, cell) for cell in (20, 5, 46))
    shares = [(cell + 1.0 - 1.0) / 47.0 for cell in (20, 46)]
    assert first.reward[0] == pytest.approx(shares[0], rel=1e-3)
    assert worse.reward[0] == pytest.approx(0.0, abs=1e-6)
    assert (first.reward + worse.reward + better.reward)[0] == pytest.approx(shares[1], rel=1e-3)
    assert better.metrics["simple_regret"][0] == pytest.approx(1.0 - shares[1], rel=1e-2)
    assert better.metrics["success"][0] == 1.0 and worse.metrics["success"][0] == 0.0
    assert better.metrics["measurements_to_95"][0] == 3 and better.metrics["measurements_to_99"][0].isnan()
    assert better.metrics["area_under_best"][0] == pytest.approx((2 * shares[0] + shares[1]) / 3, rel=1e-3)


def test_perception_counts_a_new_maximum_by_its_part_of_the_range_seen() -> None:
    env = env_of(knows=False)
    rewards = [float(measure(env, cell).reward[0]) for cell in (10, 20, 15, 40)]
    assert rewards == pytest.approx([0.0, 1.0, 0.0, 20.0 / 30.0], rel=1e-3)
    assert "best_share" not in measure(env, 3).metrics


@pytest.mark.parametrize("mode", ["optimise", "discover", "learn"])
@pytest.mark.parametrize("knows", [True, False])
def test_measuring_the_best_again_is_worth_nothing(mode: str, knows: bool) -> None:
    env = env_of(knows=knows, mode=mode, measurements=48)
    first = [float(measure(env, cell).reward[0]) for cell in (10, 20, 47)]
    assert first[-1] > 0.01
    assert [float(measure(env, 47).reward[0]) for _ in range(3)] == pytest.approx([0.0] * 3, abs=1e-6)


def test_discover_counts_the_cells_above_the_level() -> None:
    """With the level at the middle of the range the upper 24 of the 48 cells are sought."""
    env = env_of(mode="discover", level_share=0.5)
    rewards = [float(measure(env, cell).reward[0]) for cell in (47, 24, 3, 47)]
    assert rewards == pytest.approx([1 / 24, 1 / 24, 0.0, 0.0], abs=1e-6)
    assert measure(env, 30).metrics["found_level_share"][0] == pytest.approx(3 / 24)


def test_learn_counts_how_well_the_map_is_known_and_ends_near_one() -> None:
    env = env_of(mode="learn", measurements=48)
    start = measure(env, 0).metrics["rmse"][0]
    for cell in range(1, 48):
        last = measure(env, cell)
    assert start > 0.4 and last.metrics["rmse"][0] < 0.1
    assert last.metrics["score_truth"][0] == pytest.approx(1.0 - float(last.metrics["rmse"][0]), abs=1e-4)


def test_the_tops_are_counted_on_the_noise_free_map() -> None:
    """The best 5 % of 48 cells begin at rank 46: the three cells 45, 46, 47."""
    env = env_of()
    assert measure(env, 46).metrics["found_top5_share"][0] == pytest.approx(1 / 3)
    assert measure(env, 10).metrics["found_top5_share"][0] == pytest.approx(1 / 3)
    assert measure(env, 45).metrics["found_top5_share"][0] == pytest.approx(2 / 3)


def test_a_cell_measured_again_costs_again_and_adds_up_in_its_slot() -> None:
    env = env_of(rows=1)
    first = measure(env, 7)
    again = measure(env, 7)
    assert again.observation["value"][0, 0, 7] == pytest.approx(float(first.observation["value"][0, 0, 7]), rel=1e-5)
    assert again.metrics["seconds"][0] - first.metrics["seconds"][0] == pytest.approx(0.5)
    assert env._state.used[0] == 1 and env._state.taken[0] == 2 and env._state.exposure_s[0, 0] == 1.0


def test_measuring_again_is_refused_where_the_task_says_so() -> None:
    env = env_of(remeasure=False, rows=2)
    measure(env, 7, 9)
    with pytest.raises(ActionError, match=r"Cell 9 \(x 1, y 1\) of row 1 was measured before"):
        measure(env, 8, 9)
    measure(env, 8, 10)  # nothing was lost


def test_an_episode_without_measuring_again_ends_where_no_cell_is_left() -> None:
    once, again = env_of(remeasure=False, measurements=60), env_of(measurements=60)
    ends = [(bool(measure(once, cell).terminated[0]), bool(measure(again, cell).terminated[0])) for cell in range(48)]
    assert ends == [(False, False)] * 47 + [(True, False)]


def test_another_scalarizer_in_mid_episode_is_told_and_looks_at_the_same_spectra() -> None:
    env = env_of(switches=[{"after": 2, "to": "high"}])
    before = measure(env, 10)
    after = measure(env, 40)
    assert before.observation["scalarizer"].tolist() == [[1.0, 0.0]]
    assert after.observation["scalarizer"].tolist() == [[0.0, 1.0]]
    ratio = after.observation["value"][0, 1, 2] / after.observation["value"][0, 5, 0]
    assert ratio == pytest.approx((50 - 10) / (50 - 40), rel=1e-3)
    assert after.metrics["best_share"][0] == pytest.approx((50 - 10 - 3) / 47, abs=1e-3)
    assert after.metrics["measurements_to_90"][0].isnan()
    assert measure(env, 0).metrics["measurements_to_90"][0] == 3


def test_a_person_can_ask_for_another_scalarizer() -> None:
    env = env_of()
    measure(env, 3)
    observation = env.tell({"scalarizer": "high"})
    assert observation["scalarizer"].tolist() == [[0.0, 1.0]] and observation["budget"].shape == (1, 3)
    assert observation["value"][0, 0, 3] == pytest.approx(47 * 3.0 * np.sqrt(2.0 * np.pi), rel=1e-3)
    for wish in ({"scalarizer": "hihg"}, {"scalariser": "high"}, {}):
        with pytest.raises(ConfigError, match="Unknown"):
            env.tell(wish)


def test_exposures_and_places_are_chosen_as_documented() -> None:
    env = env_of(exposures_s=[0.1, 0.4])
    assert env.action_space.shape == (2,)
    seconds = [float(env.step(torch.tensor([[cell, level]])).metrics["seconds"][0]) for cell, level in ((1, 0), (2, 1))]
    assert np.diff(seconds) == pytest.approx([0.4])
    place = env_of(actions="place", exposures_s=[0.1, 0.4])
    step = place.step(torch.tensor([[2 * 0.99 - 1, 2 * 0.51 - 1, 0.0]]))
    assert step.observation["measured"][0].nonzero().tolist() == [[3, 7]]
    assert step.metrics["seconds"][0] == pytest.approx(1.0 + 0.2)


def test_rows_keep_their_own_maps_and_the_episode_ends_with_the_last_slot() -> None:
    env = env_of(rows=2, measurements=3)
    ends = [measure(env, a, b).terminated.tolist() for a, b in ((1, 5), (2, 5), (3, 6))]
    assert ends == [[False, False], [False, False], [True, False]]
    both = env._state.value[:, 0, 0]
    assert both[1] / both[0] == pytest.approx(2.0 * 6.0 / 2.0, rel=1e-3)


def test_the_spectrum_in_the_observation_is_averaged_without_loss() -> None:
    step = measure(env_of(spectrum_channels=20), 9)
    assert step.observation["spectrum"].shape == (1, 20)
    full = measure(env_of(), 9).observation["spectrum"]
    assert step.observation["spectrum"].mean() == pytest.approx(float(full.mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scalarizers": [{"name": "a", "measure": LOW}, {"name": "a", "measure": HIGH}]}, "name of its own"),
        ({"switches": [{"after": 2, "to": "hihg"}]}, "Did you mean 'high'"),
        ({"exposures_s": [0.0]}, "positive"),
        ({"exposures_s": [-1.0]}, "positive"),
        ({"actions": "place"}, "shortest and the longest"),
        ({"grid": [5, 5]}, r"instrument's grid is \(6, 8\)"),
        (
            {"scalarizers": [{"name": "a", "measure": LOW | {"window": {"low_ev": 50.0, "high_ev": 90.0}}}]},
            "0 to 63 eV",
        ),
        ({"scalarizers": [{"name": "a", "measure": {"kind": "band_integrl"}}]}, "band_integral"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        env_of(**changes)


@pytest.mark.parametrize("exposures_s", [[0.005], [0.02, 0.3]])
def test_exposures_that_the_instrument_does_not_take_are_refused_at_once(exposures_s: list[float]) -> None:
    can = Toy(field(), GRID).capabilities
    limited = replace(can, limits={"Acquire.exposure_s": Limits(0.01, 0.1)})
    task = SpectrumSearch(parse(SpectrumSearchConfig, BASE | {"exposures_s": exposures_s}, "test"))
    with pytest.raises(ConfigError, match=r"takes 0.01 to 0.1 s; given \[0.0"):
        task.fitted(limited)
    longest = SpectrumSearch(parse(SpectrumSearchConfig, BASE | {"exposures_s": [0.1 * (1.0 + 1e-8)]}, "test"))
    assert longest.fitted(limited).action_space.n == 48, "single precision is no reason to refuse"


def test_an_instrument_without_the_detector_is_refused_by_name() -> None:
    with pytest.raises(CapabilityError, match="eds"):
        env_of(detector="eds")


def test_no_truth_in_the_observation() -> None:
    """What is observed does not change with what only a simulator knows."""
    one, other = env_of(), env_of(knows=False)
    for cell in (4, 40):
        seen, blind = measure(one, cell).observation, measure(other, cell).observation
        assert seen.keys() == blind.keys() and all(torch.equal(seen[key], blind[key]) for key in seen)


def test_noise_over_vacuum_does_not_win_on_flakes() -> None:
    """One noisy spectrum of every cell of the id's own fields: no ratio over vacuum is half as high as at edges."""
    env = gymnasium.make_vec("stem_gym/SpectrumSearch-flakes-v0", num_envs=6, fused=False)
    env.reset(seed=0)
    batch: Any = env.unwrapped.batch  # type: ignore[attr-defined]
    truth, exposure_s = batch.instrument.truth(), batch.task.config.exposures_s[0]
    rate = (truth["loadings"] @ truth["components"]) * truth["electrons_per_s"][:, None, None]
    noise = torch.Generator().manual_seed(1)
    read = batch.instrument.config.camera.read_noise * torch.randn(rate.shape, generator=noise)
    counts = (torch.poisson(rate * exposure_s, generator=noise) + read) / exposure_s
    vacuum = (truth["loadings"][..., :3].sum(-1) == 0.0) & (truth["loadings"][..., 3] < 0.05)
    assert vacuum.float().mean() > 0.05
    ratio, axis = batch.task.config.scalarizers[0].measure, batch.instrument.capabilities.axes["eels"]
    value = ratio(counts, axis)
    best = value.topk(40, dim=1)  # the best hundredth of the cells
    assert not vacuum.gather(1, best.indices).any()
    assert value[vacuum].max() < 0.5 * best.values.min()
    env.close()
