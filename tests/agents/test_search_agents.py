"""Agents that search a field: their rules, their actions, what a person may change, and what they find."""

from __future__ import annotations

import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import agents
from agents.engine.acquisition import MaximumVariance
from agents.engine.raster_grid import walk
from agents.engine.search_field import search_field_of
from agents.novelty import novelty, shape_of
from agents.policy import Face
from stem_gym.core.errors import ConfigError, MissingExtraError, PolicyError
from tests.agents.search import CHANNELS, Fields, SearchEnv, blobs, play, search_face

SEARCHERS = ("dkl", "gp_bo", "novelty", "structured_gp")


def quick(name, first_places=3):
    """Settings with which an agent believes something soon and learns little."""
    if name in ("uniform", "raster"):
        return {}
    learns = name != "gp_bo"
    return {"first_places": first_places} | ({"training": {"fresh_steps": 12, "warm_steps": 4}} if learns else {})


def believing(name="dkl", rows=2, steps=14, face=None, **settings):
    """An agent after `steps` measurements, with its fields."""
    fields = blobs(rows, seed=4)
    policy = agents.make(name, face or search_face(rows=rows), **settings)
    play(policy, fields, steps)
    return policy, fields


@pytest.mark.parametrize("exposures_s", [(0.1,), (0.05, 0.1, 0.4)])
@pytest.mark.parametrize("name", (*SEARCHERS, "uniform", "raster"))
def test_every_searching_agent_keeps_the_rules_of_a_policy(name, exposures_s):
    env = SearchEnv(search_face(rows=3, exposures_s=exposures_s), blobs(3))
    agents.check_policy(agents.make(name, env, **quick(name, 2)), env)


@pytest.mark.parametrize("name", SEARCHERS)
def test_one_row_decides_as_it_does_among_many(name):
    """Beside a row that is further on; the same cells, and the same belief but for rounding."""
    many, few = blobs(3, seed=2), blobs(3, seed=2)
    one = type(few)(few.image[1:2], few.value[1:2], few.spectra[1:2])
    together = agents.make(name, search_face(rows=3), **quick(name))
    alone = agents.make(name, search_face(rows=1), **quick(name))
    together.reset([0, 1, 2], [5, 6, 7])
    alone.reset([0], [6])
    many.measured[0, ::40] = True
    for _ in range(7):
        chosen = many.measure(together.act(many.observe()))[1], one.measure(alone.act(one.observe()))[0]
        assert chosen[0] == chosen[1]
    told = together.explain(), alone.explain()
    np.testing.assert_allclose(told[0].mean[1], told[1].mean[0], atol=2e-3)
    np.testing.assert_allclose(told[0].deviation[1], told[1].deviation[0], rtol=2e-2)


def test_first_places_are_the_same_for_all_agents_and_none_is_taken_twice():
    tracks = []
    for name in SEARCHERS:
        fields = blobs(2, seed=1)
        policy = agents.make(name, search_face(rows=2))
        play(policy, fields, 10)
        tracks.append(fields.measured)
        assert fields.measured.sum(axis=1).tolist() == [10, 10] and policy.explain().seeding.all()
        assert np.isnan(policy.explain().mean).all()
    assert all(np.array_equal(track, tracks[0]) for track in tracks)
    assert (tracks[0][0] != tracks[0][1]).any(), "each world has its own"


def test_nothing_is_measured_twice_until_all_is():
    fields = blobs(1, grid=(4, 5), seed=3)
    policy = agents.make("structured_gp", search_face(grid=(4, 5)), blur=1, **quick("structured_gp"))
    play(policy, fields, 20)
    assert fields.measured.all()
    assert 0 <= policy.act(fields.observe())[0] < 20, "then any cell will do"


@pytest.mark.parametrize("actions", ["cell", "place"])
def test_actions_measure_the_cell_that_was_chosen(actions):
    """Read back by the rule of the contract: floor(x·W), floor(y·H); on a field that is not square."""
    face = search_face(grid=(6, 9), actions=actions, exposures_s=(0.01, 0.1, 1.0))
    field, cells = search_field_of(face, "test"), torch.arange(54)
    action = field.action(cells, 0.6)
    assert all(face.action_space.contains(one) for one in action)
    many = blobs(54, grid=(6, 9))
    assert many.measure(action).tolist() == list(range(54))
    assert (action[:, -1] == (1 if actions == "cell" else np.float32(0.2))).all()
    assert [field.exposure(share) for share in (0.0, 0.2, 0.3, 1.0)] == [0, 0, 1, 2]


def test_a_place_belongs_to_the_cell_below_its_fraction():
    field, fields = search_field_of(search_face(grid=(6, 9)), "test"), blobs(2, grid=(6, 9))
    seen = fields.observe() | {"probe": np.array([[0.999, 0.0], [0.34, 1.0]], np.float32)}
    assert field.scene(seen).last_cell.tolist() == [8, 5 * 9 + 3]


@pytest.mark.parametrize("name", SEARCHERS)
def test_another_task_is_refused(name):
    face = Face("other/Task-v0", 1, spaces.Dict({}), spaces.Box(-1, 1, (5,)), {"kind": "other"})
    with pytest.raises(PolicyError, match="spectrum-search"):
        agents.make(name, face)


def test_a_face_that_lacks_something_is_refused():
    whole = search_face()
    with pytest.raises(PolicyError, match="mode"):
        agents.make("dkl", Face(whole.id, 1, whole.observation_space, whole.action_space, dict(whole.task, mode=None)))
    with pytest.raises(PolicyError, match=r"needs an observation with .*image"):
        agents.make("dkl", Face(whole.id, 1, spaces.Dict({}), whole.action_space, whole.task))
    with pytest.raises(PolicyError, match=r"Discrete\(1024\)"):
        agents.make("dkl", Face(whole.id, 1, whole.observation_space, spaces.Discrete(9), whole.task))
    with pytest.raises(PolicyError, match=r"13 × 13 .* 20 × 12"):
        agents.make("dkl", search_face(grid=(12, 20)), patch=13)
    with pytest.raises(PolicyError, match="blur must be less than the image's shorter side of 12 pixels; given 13"):
        agents.make("structured_gp", search_face(grid=(12, 20)), blur=13)
    with pytest.raises(PolicyError, match=r"\(rows, 32, 32\)"):
        agents.make("dkl", whole).act(blobs(1, grid=(8, 8)).observe())


def test_an_acquisition_function_is_a_setting():
    policy = agents.make("dkl", search_face(), acquisition={"kind": "upper_confidence_bound", "deviations": 3.0})
    assert policy.acquisition.deviations == 3.0
    with pytest.raises(ConfigError, match="acquisition"):
        agents.make("dkl", search_face(), acquisition={"kind": "greediest"})


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_decision_is_explained(name):
    policy, fields = believing(name, steps=8, **quick(name))
    told = policy.explain()
    assert told.mean.shape == told.deviation.shape == told.acquisition.shape == (2, 32, 32)
    assert np.isfinite(told.mean).all() and (told.deviation > 0).all() and not told.seeding.any()
    assert told.chosen.tolist() == fields.last.tolist()
    before = fields.measured.copy()
    before[np.arange(2), fields.last] = False
    allowed = np.where(before, -np.inf, told.acquisition.reshape(2, -1))
    assert told.chosen.tolist() == allowed.argmax(axis=1).tolist()
    assert (told.embedding is None) == (name in ("gp_bo", "structured_gp"))
    if told.embedding is not None:
        assert told.embedding.shape == (2, 1024, 2)
    policy.reset([0, 1])
    assert policy.explain() is None


def test_what_is_told_of_a_measurement_is_calibrated_apart_from_what_is_decided_by():
    policy, _ = believing("dkl", **quick("dkl"), acquisition={"kind": "maximum_variance"})
    belief, decision = policy._belief, policy.explain()
    shape = decision.deviation.shape
    np.testing.assert_array_equal(decision.deviation, belief.spread.float().view(shape))
    np.testing.assert_array_equal(decision.acquisition, belief.deviation.float().view(shape))
    plain = (belief.deviation.square() + belief.noise.square()[:, None]).sqrt()
    assert not torch.allclose(belief.spread, plain, rtol=0.05)
    policy, _ = believing("gp_bo", **quick("gp_bo"))
    belief = policy._belief
    plain = (belief.deviation.square() + belief.noise.square()[:, None]).sqrt()
    np.testing.assert_array_equal(policy.explain().deviation, plain.float().view(shape))


def test_a_person_forbids_pins_and_changes_the_acquisition_function():
    policy, fields = believing()
    policy.act(fields.observe())
    first = policy.explain()
    policy.forbidden[0, int(first.chosen[0])] = True
    policy.pinned[1, 7] = True
    again = policy.decide()
    assert again[0] != first.chosen[0] and again[1] == 7
    np.testing.assert_array_equal(policy.explain().mean, first.mean)
    policy.pinned[:], policy.acquisition = False, MaximumVariance()
    policy.decide()
    assert not np.allclose(policy.explain().acquisition, first.acquisition)
    with pytest.raises(PolicyError, match="act"):
        agents.make("dkl", search_face()).decide()


@pytest.mark.parametrize("name", ["dkl", "gp_bo", "structured_gp"])
def test_what_is_wanted_may_change_in_mid_episode(name):
    """The belief follows the observation's maps: turned upside down, it is turned upside down too."""
    policy, fields = believing(name, steps=25)
    policy.act(fields.observe())
    before = policy.explain().mean.reshape(2, -1)
    fields.value, fields.wanted = 50.0 - 3.0 * fields.value, fields.wanted + 1
    policy.act(fields.observe())
    after = policy.explain().mean.reshape(2, -1)
    known = fields.measured[0]
    error = np.abs(after[0] - fields.value[0])[known].mean()
    assert error < 0.5 * fields.value[0][known].std()
    assert np.corrcoef(before[0], after[0])[0, 1] < -0.5


@pytest.mark.parametrize("name", ["dkl", "structured_gp"])
def test_patches_find_the_best_sooner_than_chance(name):
    """Eight fields: within 35 of 1,024 cells nearly all reach 90 % of the range, chance about every third."""
    track = play(agents.make(name, search_face(rows=8)), blobs(8, seed=11), 35)
    chance = play(agents.make("uniform", search_face(rows=8)), blobs(8, seed=11), 35)
    assert (track[-1] >= 0.9).mean() >= 0.75 > (chance[-1] >= 0.9).mean()


def misleading(rows, seed):
    """Fields (32, 32) where brighter is more, but for a few dark grains that have the most of all."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:32, :32]
    image, value = rng.normal(210.0, 15.0, (rows, 32, 32)), np.full((rows, 32, 32), 0.42)
    image[:, :, 20:], value[:, :, 20:] = rng.normal(134.0, 9.0, (rows, 32, 12)), 0.0
    for row in range(rows):
        for _ in range(4):
            grain = np.hypot(y - rng.uniform(2, 30), x - rng.uniform(2, 18)) < 1.6
            image[row][grain], value[row][grain] = 118.0, 1.0
    value += 0.01 * rng.standard_normal(value.shape) + 1e-4 * (image - 210.0)
    spectra = np.ones((rows, 1024, CHANNELS))
    return Fields(image.clip(0, 255).astype(np.uint8), value.reshape(rows, -1), spectra)


def test_a_law_that_is_wrong_does_not_keep_the_search_on_its_plateau():
    """Eight fields, 45 measurements: without patience's end the plateau at 0.42 is all that most of them find."""
    found = {}
    for patience in (8, 1000):
        policy = agents.make("structured_gp", search_face(rows=8), patience=patience)
        found[patience] = (play(policy, misleading(8, seed=3), 45)[-1] > 0.8).mean()
    assert found[8] >= max(found[1000] + 0.3, 0.75), found


def test_a_spike_does_not_derail_the_search():
    """The first measurement of every field is 100 spreads too high; the search still finds what it would."""
    clean, fields = blobs(6, seed=12), blobs(6, seed=12)
    policy = agents.make("dkl", search_face(rows=6))
    policy.reset(np.arange(6), list(range(6)))
    struck = fields.measure(policy.act(fields.observe()))
    at = np.arange(6)
    fields.value[at, struck] += 100.0 * fields.value.std()
    for _ in range(34):
        fields.measure(policy.act(fields.observe()))
    clean.measured = fields.measured
    assert (clean.best_share() >= 0.9).mean() >= 0.65
    y, x = np.divmod(np.nonzero(fields.measured)[1].reshape(6, 35), 32)
    near = np.hypot(x - struck[:, None] % 32, y - struck[:, None] // 32) < 4
    assert near.sum(axis=1).mean() < 15, "it does not stay beside the spike"


def test_novelty_is_the_distance_to_the_nearest_others():
    spectra = torch.tensor([[1.0, 0.0], [4.0, 0.0], [0.0, 9.0], [0.0, 0.0]])
    shapes = shape_of(spectra)[None]
    kept = torch.tensor([[True, True, True, False]])
    np.testing.assert_allclose(novelty(shapes, kept, 1)[0, :3], [0.0, 0.0, np.sqrt(2.0)], atol=1e-6)
    np.testing.assert_allclose(novelty(shapes, kept, 2)[0, :2], [np.sqrt(0.5)] * 2, rtol=1e-6)


def test_novelty_sees_more_kinds_of_spectra_than_chance():
    """Spectra are a line that moves with height: how far its places spread over what there is, in eight fields."""

    def spread(name):
        fields = blobs(8, seed=13)
        play(agents.make(name, search_face(rows=8)), fields, 30)
        place = fields.spectra.argmax(axis=2)
        return np.mean([len(np.unique(p[m])) / len(np.unique(p)) for p, m in zip(place, fields.measured, strict=True)])

    assert spread("novelty") > spread("uniform") + 0.05


def test_a_place_process_goes_on_with_its_hyperparameters_in_the_values_own_unit():
    """Between two fits, after values of quite another size were measured: still in the unit of the values."""
    policy, fields = believing("gp_bo", rows=1, steps=12, refit_every=50)
    y, x = np.mgrid[:32, :32]
    fields.value = 1e3 + 200.0 * np.sin(x / 6.0 + y / 9.0).reshape(1, -1)
    policy.act(fields.observe())
    told, known = policy.explain(), fields.measured[0]
    error = np.abs(told.mean.reshape(-1) - fields.value[0])[known]
    assert error.max() < 60.0 and (error < 4.0 * told.deviation.reshape(-1)[known]).all()
    assert 1.0 < told.deviation.max() < 400.0


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "botorch.fit", None)
    with pytest.raises(MissingExtraError, match="agents"):
        agents.make("gp_bo", search_face())


@pytest.mark.parametrize(
    ("height", "width", "count"), [(32, 32, 60), (50, 40, 25), (8, 64, 30), (5, 5, 100), (3, 7, 1)]
)
def test_the_grid_is_even_and_walked_to_and_fro(height, width, count):
    order = walk(height, width, count)
    assert np.array_equal(np.sort(order), np.arange(height * width)), "every cell once"
    y, x = np.divmod(order[: min(count, height * width)], width)
    if count == 25:  # 5 × 5
        assert sorted(set(y)) == [5, 15, 25, 35, 45] and sorted(set(x)) == [4, 12, 20, 28, 36]
        assert x[:10].tolist() == [4, 12, 20, 28, 36, 36, 28, 20, 12, 4]
    away = np.hypot(*(np.mgrid[:height, :width].reshape(2, -1, 1) - np.stack((y, x))[:, None])).min(axis=1)
    assert away.max() <= 1.5 * np.sqrt(height * width / min(count, height * width)) or count == 1


def test_raster_serves_each_face_by_its_kind():
    fields = blobs(2)
    policy = agents.make("raster", search_face(rows=2, measurements=16))
    play(policy, fields, 16)
    y, x = np.divmod(np.nonzero(fields.measured[0])[0], 32)
    assert set(y) == set(x) == {4, 12, 20, 28}


def test_uniform_draws_every_number_of_a_multidiscrete_space():
    face = Face("stem_gym_toys/Search-v0", 400, spaces.Dict({}), spaces.MultiDiscrete([3, 4], start=[1, 0]))
    policy = agents.make("uniform", face)
    policy.reset(np.arange(400), list(range(400)))
    drawn = policy.act({})
    assert drawn.dtype == face.action_space.dtype and drawn.shape == (400, 2)
    assert set(drawn[:, 0]) == {1, 2, 3} and set(drawn[:, 1]) == {0, 1, 2, 3}
    with pytest.raises(PolicyError, match="MultiDiscrete"):
        agents.make("uniform", Face("x/Y-v0", 1, spaces.Dict({}), gymnasium.spaces.MultiBinary(3)))
