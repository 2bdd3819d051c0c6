"""Beam fabrication: actions mean what they say, goals are lattice sites, atoms are followed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from stem_gym.core.instructions import FULL_FRAME, Dwell, Park, Reading, Scan, Set
from stem_gym.core.periodic import nearest_image
from stem_gym.tasks.beam_fabrication import PATTERNS, BeamFabrication
from tests.tasks.fabrication import (
    BOND_ANG,
    BONDS,
    FOV_ANG,
    ROW,
    batch,
    dwelled,
    frame,
    greedy,
    opened,
    pairs,
    start,
    task,
    world,
)

# Actions


def was_set(name: str, value: Any, seconds: float = 0.1) -> Reading:
    one = torch.ones(1)
    return Reading("Set", ROW, one * seconds, 0.0 * one, 0.0 * one, {name: one * value}, {})


def plan(it: BeamFabrication, state: Any, action: Any) -> list[Any]:
    return list(it.plan(state, torch.tensor([action]), ROW))


def test_an_action_is_a_place_a_time_and_a_frame():
    it = task()
    state = opened(it, [(3.0, -2.0)])
    park, dwell, scan = plan(it, state, [0.5, -1.0, -1.0])
    assert isinstance(park, Park) and isinstance(dwell, Dwell) and isinstance(scan, Scan)
    assert float(park.x) == pytest.approx((3.0 + 0.5 * 2.2) / FOV_ANG + 0.5)
    assert float(park.y) == pytest.approx((-2.0 - 2.2) / FOV_ANG + 0.5)
    assert float(dwell.time_s) == pytest.approx(0.5) and dwell.trace == 8 and dwell.stop is None
    assert scan.region.tolist() == [list(FULL_FRAME)] and float(scan.fov_ang) == FOV_ANG and scan.shape == (64, 64)
    times = [float(plan(it, state, [0.0, 0.0, part])[1].time_s) for part in (0.0, 1.0)]
    assert times == pytest.approx([(0.5 * 15.0) ** 0.5, 15.0]), "logarithmic"


def test_the_frame_is_left_out_where_it_is_not_wanted():
    it = task(skip_frames=True, stop={"rise": 0.1, "fall": None})
    assert it.action_space.shape == (4,)
    state = opened(it, [(0.0, 0.0)])
    assert [type(part) for part in plan(it, state, [0.0, 0.0, 0.0, -0.1])] == [Park, Dwell]
    full = plan(it, state, [0.0, 0.0, 0.0, 0.0])
    assert [type(part) for part in full] == [Park, Dwell, Scan] and full[1].stop.rise == 0.1


def test_the_frame_is_recentred_when_an_atom_nears_its_edge():
    """An atom at (10, -2) in a frame of 25 Å is 2.5 Å from the edge; the middle of it and its goal comes to the middle
    of the frame, and the beam is put where the atom then is."""
    it = task()
    state = opened(it, [(9.0, -2.0)])
    assert [type(part) for part in plan(it, state, [0.5, 0.0, 0.0])] == [Park, Dwell, Scan], "3.5 Å are enough"
    goal = torch.tensor([5.0, 3.0])
    state = dataclasses.replace(state, goal_ang=goal.expand(1, 1, 2))
    state, _ = it.observe(state, [dwelled([1.0] * 8, 1.0), frame([(10.0, -2.0)])])
    set_x, set_y, park, *_ = plan(it, state, [0.5, 0.0, 0.0])
    middle = 0.5 * (torch.tensor([10.0, -2.0]) + goal)
    assert isinstance(set_x, Set) and (set_x.name, set_y.name) == ("beam_shift_x_ang", "beam_shift_y_ang")
    assert torch.allclose(torch.stack((set_x.value[0], set_y.value[0])), middle, atol=1e-4)
    assert float(park.x) == pytest.approx((10.0 + 1.1 - float(middle[0])) / FOV_ANG + 0.5, abs=1e-5)
    left = torch.tensor([10.0, -2.0]) - middle
    shown = frame([tuple(left.tolist())])
    after, _ = it.observe(
        state, [was_set(set_x.name, middle[0]), was_set(set_y.name, middle[1]), dwelled([1.0] * 8, 1.0), shown]
    )
    assert torch.allclose(after.atom_ang[0, 0], torch.tensor([10.0, -2.0]), atol=1e-4), "where it was on the sample"
    assert torch.allclose(after.goal_ang[0, 0], goal) and torch.allclose(after.beam_shift_ang[0], middle, atol=1e-4)
    assert after.drift_ang_per_s.abs().max() == 0.0, "a move of the beam is no drift"
    assert [type(part) for part in plan(it, after, [0.0, 0.0, 0.0])] == [Park, Dwell, Scan], "once"


def test_an_atom_and_a_goal_at_opposite_edges_leave_the_frame_where_it_is():
    it = task()
    state = opened(it, [(10.0, 0.0)])
    state = dataclasses.replace(state, goal_ang=torch.tensor([[[-10.5, 0.0]]]))
    assert [type(part) for part in plan(it, state, [0.0, 0.0, 0.0])] == [Park, Dwell, Scan]


def test_without_a_beam_shift_the_frame_stays():
    it = task(recentre_ang=None)
    assert "Set" not in it.needs.verbs and not it.needs.controls
    assert [type(part) for part in plan(it, opened(it, [(12.0, 0.0)]), [0.0, 0.0, 0.0])] == [Park, Dwell, Scan]


def test_what_is_set_as_it_comes_is_no_part_of_the_task_description():
    """A shipped policy is bound to the description it was trained for; the default adds nothing to it."""
    assert "recentre_ang" not in task().config.model_dump(mode="json")
    assert task(recentre_ang=2.0).config.model_dump(mode="json")["recentre_ang"] == 2.0


def test_the_frame_follows_the_sample_that_drifts_and_goals_are_reached():
    """0.3 Å/s for minutes: without the beam shift the atom leaves the frame."""
    drift = {"drift": {"speed_ang_per_s": 0.3, "correlation_s": 200.0}}
    found = []
    for margin in (3.0, None):
        env = batch(48, instrument=drift, task={"recentre_ang": margin})
        start(env)
        done = torch.zeros(48, dtype=torch.bool)
        for _ in range(60):
            rows = (~done).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            step = env.step(greedy(env), rows)
            done |= step.terminated
        found.append(float(env._metrics["success"].mean()))
    assert found[0] > 0.9 and found[0] > found[1] + 0.2, found


def test_equal_dwells_leave_the_agent_two_numbers():
    it = task(dwell_min_s=1.5, dwell_max_s=1.5)
    assert it.action_space.shape == (2,)
    assert float(plan(it, opened(it, [(0.0, 0.0)]), [0.3, 0.3])[1].time_s) == 1.5


def test_discrete_actions_name_a_neighbour_and_a_dwell():
    it = task(dwells_s=(1.5, 5.0, 15.0), aim_bonds=1.2)
    assert it.action_space.n == 9
    state = opened(it, [(1.0, 2.0)])
    for action in range(9):
        park, dwell, _ = plan(it, state, action)
        aim = np.array([1.0, 2.0]) + 1.2 * np.array(BONDS[action % 3])
        assert [float(park.x), float(park.y)] == pytest.approx((aim / FOV_ANG + 0.5).tolist(), abs=1e-6)
        assert float(dwell.time_s) == pytest.approx([1.5, 5.0, 15.0][action // 3])


def test_a_discrete_action_can_leave_the_frame_out():
    """Nine numbers with a frame, as without the choice, and the same nine without one."""
    it = task(dwells_s=(1.5, 5.0, 15.0), skip_frames=True)
    assert it.action_space.n == 18
    state = opened(it, [(0.0, 0.0)])
    for number in range(9):
        framed, bare = plan(it, state, number), plan(it, state, number + 9)
        assert [type(part) for part in framed] == [Park, Dwell, Scan]
        assert [type(part) for part in bare] == [Park, Dwell]
        assert float(framed[1].time_s) == float(bare[1].time_s) == (1.5, 5.0, 15.0)[number // 3]
        assert float(framed[0].x) == float(bare[0].x) and float(framed[0].y) == float(bare[0].y)


def test_an_action_chooses_the_energy_and_it_is_set_when_it_changes():
    it = task(energies_kev=(60.0, 55.0, 65.0), skip_frames=True)
    assert it.action_space.shape == (5,) and it.needs.controls >= {"energy_kev"}
    start_, scan = it.opening(it.start(1, torch.device("cpu")), ROW)
    assert isinstance(start_, Set) and start_.value.tolist() == [60.0] and isinstance(scan, Scan)
    state = opened(it, [(0.0, 0.0)])
    for part, energy in ((-1.0, 60.0), (-0.4, 60.0), (-0.3, 55.0), (0.3, 55.0), (0.4, 65.0), (1.0, 65.0)):
        first, *rest = plan(it, state, [0.0, 0.0, 0.0, part, -1.0])
        if energy == 60.0:
            assert isinstance(first, Park), "as it is"
        else:
            assert first.name == "energy_kev" and first.value.tolist() == [energy] and len(rest) == 2
    state, seen = it.observe(state, [was_set("energy_kev", 55.0)])
    assert seen["energy"].tolist() == [[0.0, 1.0, 0.0]]
    assert isinstance(plan(it, state, [0.0, 0.0, 0.0, 0.0, -1.0])[0], Park)
    assert plan(it, state, [0.0, 0.0, 0.0, -1.0, -1.0])[0].value.tolist() == [60.0]


def test_a_discrete_action_chooses_the_energy_last():
    it = task(energies_kev=(60.0, 65.0), dwells_s=(1.5, 5.0), skip_frames=True)
    assert it.action_space.n == 3 * 2 * 2 * 2
    state = opened(it, [(0.0, 0.0)])
    first, _, dwell, *frames = plan(it, state, 1 + 3 * (1 + 2 * (1 + 2 * 1)))
    assert isinstance(first, Set) and first.value.tolist() == [65.0] and float(dwell.time_s) == 5.0 and not frames
    assert isinstance(plan(it, state, 1 + 3 * (1 + 2 * 1))[0], Park)


def test_without_a_choice_of_energy_nothing_is_said_of_it():
    it = task()
    assert "energy" not in it.observation_space.spaces and "energies_kev" not in it.config.model_dump(mode="json")


def test_drift_is_led_to_the_middle_of_the_dwell():
    """The sample moved 1 Å in 4 s: 0.25 Å/s; half of 2 s more, and what passed since the frame."""
    it = task(dwell_min_s=2.0, dwell_max_s=2.0)
    state = opened(it, [(0.0, 0.0)])
    state, seen = it.observe(state, [dwelled([1.0] * 8, 2.0), frame([(1.0, 0.0)], shift=(1.0, 0.0))])
    assert seen["frame"][0].tolist() == pytest.approx([0.0, 0.25, 0.0])
    assert torch.allclose(state.atom_ang[0, 0], torch.zeros(2), atol=1e-6), "places move with the sample"
    park = plan(it, state, [0.0, 0.0])[0]
    assert float(park.x) == pytest.approx((1.0 + 0.25 * 1.0) / FOV_ANG + 0.5)
    later, seen = it.observe(state, [dwelled([1.0] * 8, 6.0)])
    assert float(seen["frame"][0, 0]) == pytest.approx(0.6)
    park = plan(it, later, [0.0, 0.0])[0]
    assert float(park.x) == pytest.approx((1.0 + 0.25 * 7.0) / FOV_ANG + 0.5)


# Goals


def test_goals_are_drawn_evenly_over_the_lattice_sites_in_the_frame():
    """Of a lattice made here: every site inside the field but the atom's own is drawn, and none else, chi-square."""
    it = task(fov_ang=12.0)
    rows, here = 6000, torch.tensor([2.0, -3.0])
    chance = torch.rand(rows, 1, generator=torch.Generator().manual_seed(0))
    bonds = torch.tensor(BONDS)
    goal = it._goals(here.expand(rows, 1, 2), bonds.expand(rows, 1, 3, 2), chance)[:, 0]
    steps = torch.cartesian_prod(torch.arange(-9.0, 10.0), torch.arange(-9.0, 10.0))
    cells = here + steps @ torch.stack((bonds[0] - bonds[1], bonds[0] - bonds[2]))
    sites = torch.cat((cells, cells + bonds[0]))
    sites = sites[(sites.abs() < 6.0).all(1) & ((sites - here).norm(dim=1) > 0.1)]
    away = torch.cdist(goal, sites)
    assert away.amin(1).max() < 5e-3, "lattice sites inside the frame"
    counts = torch.bincount(away.argmin(1), minlength=len(sites))
    assert 50 < len(sites) < 60 and (counts > 0).all()
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


def test_goals_reach_every_corner_of_a_large_frame_and_no_farther_than_they_may():
    it = task(fov_ang=60.0, goal_ang=90.0)
    chance = torch.linspace(0.001, 0.999, 400).unsqueeze(1)
    here, bonds = torch.full((400, 1, 2), -25.0), torch.tensor(BONDS).expand(400, 1, 3, 2)
    goal = it._goals(here, bonds, chance)[:, 0]
    for way in torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]):
        assert (goal * way).sum(1).max() > 50.0, way  # of 60, into the corner
    near = task(fov_ang=60.0, goal_ang=8.0)._goals(here[:50], bonds[:50], chance[::8])[:, 0]
    assert 7.0 < (near - here[:50, 0]).norm(dim=1).max() <= 8.0


def test_goals_of_the_microscope_are_sites_that_exist():
    """The errors of the lattice fit add up with the distance; most goals are well within half a bond of a true site."""
    env = batch(60)
    start(env)
    state, sheet = env._state, env.instrument._now.sheet
    away = state.goal_ang + state.origin_ang.unsqueeze(1) - sheet.xy_ang
    away = nearest_image(away, sheet.cell_ang.unsqueeze(1)).norm(dim=-1).amin(1)[state.begun]
    assert state.begun.float().mean() > 0.95
    assert float(away.mean()) < 0.2 and float((away < 0.5 * BOND_ANG).float().mean()) > 0.97
    assert (state.goal_ang[state.begun].abs() < 0.5 * FOV_ANG).all()


@pytest.mark.parametrize(
    ("pattern", "distances"),  # between all pairs of sites, in bonds, sorted
    [
        ("dimer", [1.0]),
        ("trimer", [1.0, 1.0, 3**0.5]),
        ("line4", [3**0.5] * 3 + [12**0.5] * 2 + [27**0.5]),
        ("ring6", [1.0] * 6 + [3**0.5] * 6 + [2.0] * 3),
        (((0, 0, 0), (1, 1, 0)), [3**0.5]),
    ],
)
@pytest.mark.parametrize("flip", [False, True])
def test_patterns_are_what_their_names_say(pattern, distances, flip):
    """Whatever the sublattice of the first atom and the order of its bonds; near the middle of the atoms."""
    count = len(PATTERNS[pattern]) if isinstance(pattern, str) else len(pattern)
    it = task(dopants=count, pattern=pattern, fov_ang=FOV_ANG)
    atoms = [(-4.0 + 1.5 * i, 3.0 - (-1.0) ** i) for i in range(count)]
    goal = opened(it, atoms, flip=flip).goal_ang[0]
    apart = torch.pdist(goal).sort().values / BOND_ANG
    assert apart.tolist() == pytest.approx(distances, abs=1e-3)
    assert (goal.mean(0) - torch.tensor(atoms).mean(0)).norm() < 1.8 * BOND_ANG
    own = goal - torch.tensor(atoms[0])
    vectors = torch.tensor(BONDS) * (-1.0 if flip else 1.0)
    lattice = torch.stack((vectors[0] - vectors[1], vectors[0] - vectors[2])).T
    part = torch.linalg.solve(lattice, own.T).T
    other = torch.linalg.solve(lattice, (own - vectors[0]).T).T
    off = torch.minimum((part - part.round()).abs().amax(1), (other - other.round()).abs().amax(1))
    assert off.max() < 1e-3, "on the lattice of the first atom"


def test_a_pattern_stays_inside_the_frame():
    it = pairs(task)
    goal = opened(it, [(11.9, 11.9), (12.2, 10.0)]).goal_ang[0]
    assert (goal.abs() < 12.5 - BOND_ANG).all()


# Following and tracking


def test_the_followed_atom_is_the_one_nearest_to_a_goal_that_is_free():
    it = pairs(task)
    state = opened(it, [(-6.0, 0.0), (5.0, 1.0)])
    goals = state.goal_ang[0]
    near = torch.cdist(state.atom_ang[0], goals)
    first, its_goal = divmod(int(near.argmin()), 2)
    seen = it._observation(state)
    assert torch.allclose(seen["goal"][0] * 10.0, goals[its_goal] - state.atom_ang[0, first], atol=1e-5)
    assert torch.allclose(seen["atoms"][0] * 10.0, state.atom_ang[0] - state.atom_ang[0, first], atol=1e-5)
    there = state.atom_ang.clone()
    there[0, first] = goals[its_goal] + 0.3
    other = it._observation(type(state)(**vars(state) | {"atom_ang": there}))
    wanted = goals[1 - its_goal] - there[0, 1 - first]
    assert torch.allclose(other["goal"][0] * 10.0, wanted, atol=0.1), "it has arrived: now the other one"


def test_atoms_are_tracked_through_jumps_misses_and_false_places():
    it = pairs(task)
    state = opened(it, [(-6.0, 0.0), (5.0, 1.0)])
    nan = (math.nan, math.nan)

    def see(state: Any, *atoms: tuple[float, float]) -> tuple[Any, list[list[float]]]:
        state, _ = it.observe(state, [frame(list(atoms))])
        return state, [[round(x, 4) for x in place] for place in state.atom_ang[0].tolist()]

    jumped, places = see(state, (-4.6, 0.0), (4.0, 2.0))
    assert places == [[-4.6, 0.0], [4.0, 2.0]]
    missed, places = see(jumped, (3.0, 3.0), nan)
    assert places == [[-4.6, 0.0], [3.0, 3.0]], "what is not seen stays; the other is still itself"
    _, places = see(missed, (-3.2, 0.0), (3.0, 3.0))
    assert places == [[-3.2, 0.0], [3.0, 3.0]]
    wrong, places = see(jumped, (4.0, 2.0), (9.0, -9.0))
    assert places == [[-4.6, 0.0], [4.0, 2.0]], "a place far from every atom is not believed"
    _, places = see(wrong, (-4.6, 1.0), (4.0, 2.0))
    assert places == [[-4.6, 1.0], [4.0, 2.0]]
    _, places = see(wrong, (4.0, 2.0), (9.0, -9.0))
    assert places == [[9.0, -9.0], [4.0, 2.0]], "but if it is there again, it jumped far"
    _, places = see(jumped, (-4.6, 0.0), (2.0, 2.0), (4.1, 2.0))
    assert places == [[-4.6, 0.0], [4.1, 2.0]], "more places than atoms: the nearest"


def test_the_episode_begins_with_the_first_frame_that_shows_all_atoms():
    it = pairs(task)
    state = opened(it, [(-6.0, 0.0), (math.nan, math.nan)])
    assert not state.begun and not it._observation(state)["goal"].any()
    state, _ = it.observe(state, [frame([(-5.0, 0.0), (6.0, 0.0)], shift=(1.0, 0.0))])
    assert state.begun and torch.allclose(state.atom_ang[0], torch.tensor([[-6.0, 0.0], [5.0, 0.0]]))
    state, score = it.score(state, [], world([(-6.0, 0.0), (5.0, 0.0)], centre=(8.0, 4.0)))
    assert state.origin_ang[0].tolist() == [9.0, 4.0], "the middle of the first frame, from the second"


def test_the_trace_is_told_in_four_numbers():
    it = task()
    _, seen = it.observe(opened(it, [(0.0, 0.0)]), [dwelled([100, 90, 100, 110, 150, 140, 120, 120], 3.0, (0.2, 0.7))])
    assert seen["trace"][0].tolist() == pytest.approx([0.2, 0.5, 1.0, 0.2])
    _, seen = it.observe(opened(it, [(0.0, 0.0)]), [dwelled([100.0, 90.0, 130.0] + [math.nan] * 5, 3.0)])
    assert seen["trace"][0].tolist() == pytest.approx([0.3, 0.3, 3 / 8, 0.2])
