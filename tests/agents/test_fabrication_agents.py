"""Agents that move atoms: the honeycomb and the values behind them, what they do in a step, and who wins."""

from __future__ import annotations

import math

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from scipy.linalg import expm
from scipy.optimize import linear_sum_assignment

import agents
from agents.engine.fabrication import workplace_of
from agents.engine.honeycomb import BOND_ANG, BONDS_ANG, honeycomb, hops_from_atom, lattice_angle, turned
from agents.engine.jump_laws import TOY, MapLaw, SpotLaw
from agents.engine.values import PATCH_ANG, Menu, landings, places_around, solve
from agents.planner import assignment
from agents.policy import Face, face_of
from stem_gym.core.errors import ConfigError, PolicyError
from stem_gym.core.streams import row_seeds

LORENTZIAN, FEEDBACK, DISCRETE, DIMER, SKIP, ENERGIES = (
    f"stem_gym/BeamFabrication-{name}-v0"
    for name in ("lorentzian", "feedback", "discrete", "dimer", "discrete-skip", "energies")
)
DEFAULT, TARGETING = "stem_gym/BeamFabrication-v0", "stem_gym/AtomTargeting-v0"
SEED, WORLDS = 21, 24
FRAME_S = 64 * 64 * 4.88e-4 + 0.05


def make_env(id, rows=1, **overrides):
    return gymnasium.make_vec(id, num_envs=rows, autoreset_mode=AutoresetMode.DISABLED, fused=False, **overrides)


@pytest.fixture(scope="module")
def faces():
    """The face of each id, for three rows."""
    found = {}
    for id in (LORENTZIAN, FEEDBACK, DISCRETE, DIMER, SKIP, ENERGIES, DEFAULT, TARGETING):
        env = make_env(id, 3)
        found[id] = face_of(env)
        env.close()
    return found


def observation(goal_ang, angle=0.4, atoms_ang=((0.0, 0.0),), goals_ang=None, order=(2, 0, 1)):
    """One row as the task tells it, from places in the atom's own frame, on a lattice turned by `angle`."""

    def told(places):
        return turned(np.array([places], dtype=float), np.array([angle])).astype(np.float32)

    return {
        "goal": told(goal_ang) / 10.0,
        "bonds": told(BONDS_ANG[list(order)]) / BOND_ANG,
        "atoms": told(atoms_ang) / 10.0,
        "goals": told([goal_ang] if goals_ang is None else goals_ang) / 10.0,
        "trace": np.zeros((1, 4), np.float32),
        "frame": np.zeros((1, 3), np.float32),
        "budget": np.ones((1, 3), np.float32),
    }


def beam_of(action, angle=0.4, reach_ang=2.2):
    """The beam's place of one row's action, in the atom's own frame."""
    return turned(reach_ang * np.asarray(action, dtype=float)[:, :2], np.array([-angle]))[0]


def one_row(face):
    return Face(face.id, 1, face.observation_space, face.action_space, face.task)


# The honeycomb


def test_hops_grow_shell_by_shell_as_on_paper():
    """A honeycomb has 3 n sites n hops away."""
    hops = hops_from_atom(15.0)
    assert [int((hops == n).sum()) for n in range(6)] == [1, 3, 6, 9, 12, 15]


def test_a_blocked_site_is_walked_round():
    """Round a hexagon the other way: two hops become four."""
    lattice = honeycomb(12.0)
    goal = lattice.index(BONDS_ANG[:1] - BONDS_ANG[1:2])
    blocked = np.zeros((1, len(lattice.sites_ang)), dtype=bool)
    assert lattice.hops(goal, blocked)[0, 0] == 2
    blocked[0, lattice.index(BONDS_ANG[0])] = True
    assert lattice.hops(goal, blocked)[0, 0] == 4
    blocked[0, lattice.neighbours[0]] = True
    assert np.isinf(lattice.hops(goal, blocked)[0, 0])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_lattice_angle_is_found_whatever_the_order_of_bonds(order):
    angle = np.linspace(-1.0, 1.0, 5)
    bonds = turned(np.tile(BONDS_ANG[list(order)], (5, 1, 1)), angle)
    found = lattice_angle(bonds)
    np.testing.assert_allclose(np.sin(1.5 * (found - angle)), 0.0, atol=1e-9)  # the same up to 120°


# Values


def test_landings_are_those_of_the_matrix_exponential():
    """Two independent ways to the same continuous-time chain."""
    patch, beam = honeycomb(PATCH_ANG), np.array([1.5, 0.2])
    rates = TOY.rates(beam - patch.sites_ang, patch.sign[:, None, None] * BONDS_ANG)
    generator = np.zeros((len(patch.sites_ang),) * 2)
    for site, near in enumerate(patch.neighbours):
        for rate, other in zip(rates[site], near, strict=True):
            if other >= 0:
                generator[site, other] += rate
                generator[site, site] -= rate
    found, dwelt_s = landings(TOY, Menu(((1.5, 0.2),), (1.5, 5.0), FRAME_S))
    np.testing.assert_allclose(found, [expm(1.5 * generator)[0], expm(5.0 * generator)[0]], atol=1e-9)
    assert dwelt_s.tolist() == [1.5, 5.0]
    rim = (patch.neighbours < 0).any(axis=1)
    assert found[:, rim].sum() < 1e-6  # so little is neglected by the patch's end


def test_the_toy_law_is_the_published_one():
    beam = np.array([0.3, 0.9])
    for rate, bond in zip(TOY.rates(beam, BONDS_ANG), BONDS_ANG, strict=True):
        assert rate == pytest.approx(1.0 / (1.0 + (4.0 * math.dist(beam, bond) / 1.42) ** 2))


def test_a_map_law_peaks_where_it_says_and_turns_with_the_bond():
    law = MapLaw(peak_per_s=0.2, centre_ang=1.2, width_ang=0.4, anisotropy=1.5, floor_per_s=0.01)
    beams = 1.2 / BOND_ANG * BONDS_ANG
    np.testing.assert_allclose(np.diag(law.rates(beams, BONDS_ANG)), 0.21)
    across = np.array([1.2, 0.6])  # one standard deviation to the side of bond 0
    assert law.rates(across, BONDS_ANG)[0] == pytest.approx(0.01 + 0.2 * math.exp(-0.5))


def test_a_dwell_that_stops_at_the_first_jump_holds_one_jump_at_most():
    law, dwell_s = SpotLaw(peak_per_s=0.2, width_ang=0.9, power=3.0), 15.0
    found, dwelt_s = landings(law, Menu(((1.42, 0.0),), (dwell_s,), FRAME_S, stop_late=0.0))
    leaving = law.rates(np.array([1.42, 0.0]), BONDS_ANG).sum()
    assert found[0, 0] == pytest.approx(math.exp(-leaving * dwell_s))
    assert found[0, 4:].sum() == pytest.approx(0.0, abs=1e-9)
    assert dwelt_s[0] == pytest.approx((1.0 - math.exp(-leaving * dwell_s)) / leaving)


def simulated_s(plan, dwell_s, start_ang, count, rng):
    """Seconds to the goal of `count` atoms that start at `start_ang`: jump by jump, in fixed coordinates."""
    place, turned_round = np.tile(start_ang, (count, 1)), np.zeros(count, dtype=bool)
    seconds, open_rows = np.zeros(count), np.arange(count)
    while len(open_rows):
        sign = np.where(turned_round[open_rows], -1.0, 1.0)[:, None]
        site = plan.lattice.index(-sign * place[open_rows])
        beam = place[open_rows] + sign * plan.beam_ang[site]
        left, moving = np.full(len(open_rows), dwell_s), np.arange(len(open_rows))
        while len(moving):
            rows = open_rows[moving]
            bonds = np.where(turned_round[rows], -1.0, 1.0)[:, None, None] * BONDS_ANG
            away = np.linalg.norm(beam[moving][:, None] - place[rows][:, None] - bonds, axis=-1)
            rate = 1.0 / (1.0 + (4.0 * away / 1.42) ** 2)
            left[moving] -= rng.exponential(size=len(moving)) / rate.sum(axis=1)
            jumps = left[moving] > 0.0
            chance = rng.random(len(moving))[:, None] * rate.sum(axis=1, keepdims=True)
            which = (rate.cumsum(axis=1) < chance).sum(axis=1)
            place[rows[jumps]] += bonds[np.arange(len(moving)), which][jumps]
            turned_round[rows[jumps]] ^= True
            moving = moving[jumps]
        seconds[open_rows] += dwell_s + FRAME_S
        open_rows = open_rows[np.linalg.norm(place[open_rows], axis=1) > 0.1]
    return seconds


@pytest.mark.parametrize("dwell_s", [1.5, 5.0])
def test_the_expected_time_is_that_of_the_simulated_chain(dwell_s):
    """4,000 atoms, five jumps away; four standard errors."""
    plan = solve(TOY, Menu(places_around(0.142, 2.2, 18), (dwell_s,), FRAME_S), 20.0)
    site = int(np.flatnonzero(hops_from_atom(20.0) == 5)[0])
    seconds = simulated_s(plan, dwell_s, -plan.lattice.sites_ang[site], 4000, np.random.default_rng(4))
    error = seconds.std() / math.sqrt(len(seconds))
    assert abs(seconds.mean() - plan.seconds[site]) < 4.0 * error, (seconds.mean(), plan.seconds[site], error)


def test_the_optimum_is_below_every_fixed_distance_and_equal_on_both_mirror_sides():
    lattice = honeycomb(20.0)
    best = solve(TOY, Menu(places_around(0.142, 2.2, 18), (5.0,), FRAME_S), 20.0)
    for offset in (1.136, 1.42, 1.704):
        ring = tuple((float(x), float(y)) for x, y in offset / BOND_ANG * BONDS_ANG)
        fixed = solve(TOY, Menu(ring, (5.0,), FRAME_S), 20.0)
        assert (best.seconds <= fixed.seconds + 1e-9).all()
    inner = lattice.sites_ang[np.linalg.norm(lattice.sites_ang, axis=1) < 12.0]  # away from the table's rim
    mirrored = lattice.index(inner * [1.0, -1.0])
    np.testing.assert_allclose(best.seconds[: len(inner)], best.seconds[mirrored], rtol=1e-6)


def test_values_are_computed_once_for_equal_settings(faces):
    first, second = (agents.make("planner", faces[LORENTZIAN], place_step_ang=0.5) for _ in range(2))
    assert first.plan is second.plan
    assert agents.make("planner", faces[LORENTZIAN], place_step_ang=0.4).plan is not first.plan


# Single steps


@pytest.mark.parametrize("angle", [0.0, 0.4, 2.9])
@pytest.mark.parametrize("name", ["greedy", "planner"])
def test_the_beam_goes_to_the_neighbour_on_the_shortest_way(name, angle, faces):
    policy = agents.make(name, one_row(faces[LORENTZIAN]), **({"place_step_ang": 0.142} if name == "planner" else {}))
    for bond in BONDS_ANG:
        beam = beam_of(policy.act(observation(bond, angle)), angle)
        assert np.linalg.norm(beam - bond) < 0.15  # either agent aims at about the neighbour itself


def test_greedy_counts_jumps_and_not_distance(faces):
    """Across a hexagon: the nearer neighbour as the crow flies is not always on the shorter path."""
    policy = agents.make("greedy", one_row(faces[LORENTZIAN]))
    hops, lattice = hops_from_atom(30.0), honeycomb(30.0)
    for goal in lattice.sites_ang[1:60]:
        beam = beam_of(policy.act(observation(goal)))
        onward = lattice.index(-(goal - beam))
        assert hops[onward] == hops[lattice.index(goal)] - 1


def test_greedy_leaves_an_occupied_neighbour_alone(faces):
    policy = agents.make("greedy", one_row(faces[DIMER]))
    goal = BONDS_ANG[0] - BONDS_ANG[1]
    atoms, goals = [(0.0, 0.0), BONDS_ANG[0]], [goal, BONDS_ANG[0]]
    beam = beam_of(policy.act(observation(goal, atoms_ang=atoms, goals_ang=goals)))
    assert np.linalg.norm(beam - BONDS_ANG[0]) > BOND_ANG


def test_the_planner_walks_round_an_atom_that_has_its_goal(faces):
    """Three jumps are left from the free neighbour on the goal's own hexagon; the short way is blocked."""
    policy = agents.make("planner", one_row(faces[DIMER]), place_step_ang=0.355, dwells=2)
    goal = BONDS_ANG[0] - BONDS_ANG[1]
    atoms, goals = [(0.0, 0.0), BONDS_ANG[0]], [goal, BONDS_ANG[0]]
    beam = beam_of(policy.act(observation(goal, atoms_ang=atoms, goals_ang=goals)))
    lattice = honeycomb(12.0)
    blocked = np.zeros((1, len(lattice.sites_ang)), dtype=bool)
    blocked[0, lattice.index(BONDS_ANG[0])] = True
    hops = lattice.hops(lattice.index(goal)[None], blocked)[0]
    aimed = lattice.index(BOND_ANG * beam / np.linalg.norm(beam))
    assert hops[aimed] == 3


def test_assignment_is_the_one_of_the_hungarian_method():
    cost = np.random.default_rng(0).random((40, 5, 5))
    for mine, row in zip(assignment(cost), cost, strict=True):
        assert mine.tolist() == linear_sum_assignment(row)[1].tolist()


def test_the_planner_gives_goals_so_that_the_sum_is_least(faces):
    """The followed atom lies between both goals; the other one is at the far side of the nearer goal."""
    policy = agents.make("planner", one_row(faces[DIMER]), place_step_ang=0.355, dwells=2)
    step = BONDS_ANG[0] - BONDS_ANG[1]
    left, right = -3.0 * step, 4.0 * step
    atoms, goals = [(0.0, 0.0), -6.0 * step], [left, right]
    beam = beam_of(policy.act(observation(left, atoms_ang=atoms, goals_ang=goals)))
    assert beam @ step > 0.0  # to the right, though the left goal is nearer


def test_discrete_actions_name_the_neighbour_and_the_nearest_dwell(faces):
    policy = agents.make("greedy", one_row(faces[DISCRETE]), dwell_s=6.0)
    for slot, bond in enumerate(BONDS_ANG[[2, 0, 1]]):
        assert policy.act(observation(bond)).tolist() == [slot + 3 * 1]  # of 1.5, 5 and 15 s


def test_a_frame_that_is_not_wanted_and_the_energy_are_said_in_the_actions_own_way(faces):
    seen, dwell = observation(BONDS_ANG[0]), np.array([5.0])
    place = workplace_of(faces[SKIP], "greedy")
    scene = place.scene(seen)
    assert [place.action(scene, BONDS_ANG[:1], dwell, frame).tolist() for frame in (True, False)] == [[4], [13]]
    assert agents.make("greedy", one_row(faces[SKIP]), dwell_s=6.0).act(seen).tolist() == [4], "greedy always looks"
    action = agents.make("greedy", one_row(faces[ENERGIES])).act(seen)
    assert action.shape == (1, 4) and action[0, 3] == -1.0, "the first energy, with which the episode begins"


def test_feedback_looks_when_the_signal_rose_and_goes_on_when_it_did_not(faces):
    policy = agents.make("greedy_feedback", one_row(faces[FEEDBACK]))
    seen = observation(BONDS_ANG[0])
    seen["frame"][0, 0] = 0.2  # 2 s old
    quiet = policy.act(seen)[0]
    seen["trace"][0, 0] = 2.0
    stirred = policy.act(seen)[0]
    policy.reset([0])
    seen["trace"][0, 0], seen["frame"][0, 0] = 0.0, 1.0
    old = policy.act(seen)[0]
    assert quiet[3] < 0 and quiet[2] > 0.0  # a long dwell, no frame
    assert stirred[3] > 0 and stirred[2] == -1.0 and np.abs(stirred[:2]).max() == pytest.approx(1.0)
    assert old[3] > 0 and old[2] > 0.0


def blind_steps(policy, goal, atoms_ang=((0.0, 0.0),)):
    """The actions of a first dwell, after a rise in it, and after a rise in the next, with no frame in between."""
    policy.reset([0])
    actions = []
    for rise, age in ((0.0, 0.2), (2.0, 0.2), (2.0, 0.2)):
        seen = observation(goal, atoms_ang=atoms_ang)
        seen["trace"][0, 0], seen["frame"][0, 0] = rise, age
        actions.append(policy.act(seen)[0])
    return actions


def test_feedback_goes_on_from_where_the_atom_has_jumped_without_a_look(faces):
    """The goal is two jumps away along bond 0 and then, on the other sublattice, against bond 1."""
    policy = agents.make("greedy_feedback", one_row(faces[FEEDBACK]), short_ang=0.5)
    onward = BONDS_ANG[0] - BONDS_ANG[1]
    first, second, third = blind_steps(policy, onward + BONDS_ANG[0])
    assert np.linalg.norm(beam_of(first[None]) - BONDS_ANG[0]) < 0.01 and first[3] < 0
    reached = beam_of(second[None])
    assert second[3] < 0 and reached @ onward == pytest.approx(np.linalg.norm(reached) * np.linalg.norm(onward)), (
        "along the second neighbour's direction"
    )
    assert np.linalg.norm(reached) > 2.46 - 0.5
    assert third[3] > 0 and third[2] == -1.0, "the third is out of reach: look"
    policy.reset([0])
    again = policy.act(observation(onward + BONDS_ANG[0]))[0]
    assert np.allclose(again[:3], first[:3]), "a new episode knows nothing of the last"


def test_feedback_looks_when_it_thinks_that_the_goal_is_reached_and_believes_the_frame(faces):
    policy = agents.make("greedy_feedback", one_row(faces[FEEDBACK]))
    first, second, _ = blind_steps(policy, BONDS_ANG[0])
    assert first[3] < 0 and second[3] > 0 and second[2] == -1.0
    seen = observation(BONDS_ANG[0])
    seen["trace"][0, 0] = 2.0  # of the dwell that the frame came after: it did not jump after all
    assert np.allclose(policy.act(seen)[0][:3], first[:3])


def test_feedback_counts_from_where_it_thinks_the_atom_is_whatever_stands_in_the_way(faces):
    """After a jump over bond 0 the atom it has left behind is no obstacle on the way back."""
    policy = agents.make("greedy_feedback", one_row(faces[FEEDBACK]), short_ang=0.5, rise=0.5)
    policy.act(observation(BONDS_ANG[0]))
    seen = observation((0.01, 0.0))  # the goal is now where the atom was seen
    seen["trace"][0, 0], seen["frame"][0, 0] = 2.0, 0.2
    assert np.linalg.norm(beam_of(policy.act(seen))) < 0.01


@pytest.mark.parametrize("name", ["greedy", "planner"])
def test_without_atoms_in_sight_as_little_as_possible_is_done(name, faces):
    policy = agents.make(
        name, one_row(faces[DEFAULT]), **({"place_step_ang": 0.7, "dwells": 2} if name == "planner" else {})
    )
    blind = {key: np.zeros_like(value) for key, value in observation((0.0, 0.0)).items()}
    action = policy.act(blind)[0]
    assert action[2] == -1.0 and np.abs(action[:2]).max() == pytest.approx(1.0)


# What is refused


@pytest.mark.parametrize("name", ["greedy", "greedy_feedback", "planner"])
def test_atom_targeting_is_refused(name, faces):
    with pytest.raises(PolicyError, match="beam-fabrication"):
        agents.make(name, faces[TARGETING])


@pytest.mark.parametrize("name", ["greedy", "planner"])
def test_an_observation_without_atoms_is_refused(name, faces):
    face = faces[DEFAULT]
    picture = spaces.Dict({"image": spaces.Box(0, 255, (1, 64, 64), np.uint8)})
    with pytest.raises(PolicyError, match="atoms, bonds, goal, goals"):
        agents.make(name, Face(face.id, 1, picture, face.action_space, face.task))


def test_feedback_needs_a_rule_that_stops_dwells(faces):
    with pytest.raises(PolicyError, match="stop"):
        agents.make("greedy_feedback", faces[DEFAULT])


@pytest.mark.parametrize(
    ("name", "id", "settings", "words"),
    [
        ("greedy", DEFAULT, {"offset_ang": 2.5}, "reaches"),
        ("greedy", DEFAULT, {"offset_ang": 0.0}, "offset_ang"),
        ("greedy", DEFAULT, {"dwell_s": -1.0}, "dwell_s"),
        ("greedy_feedback", FEEDBACK, {"offset_ang": 3.0}, "reaches"),
        ("greedy_feedback", FEEDBACK, {"rise": 0.0}, "rise"),
        ("planner", DEFAULT, {"law": {"kind": "spot", "peak_per_s": 0.0}}, "peak_per_s"),
        ("planner", DEFAULT, {"law": {"kind": "map", "peak_per_s": 1.0}}, "centre_ang"),
        ("planner", DEFAULT, {"place_angles": 7}, "place_angles"),
        ("planner", LORENTZIAN, {"law": {"kind": "spot", "peak_per_s": 1e-9, "width_ang": 0.1}}, "hardly ever"),
    ],
)
def test_senseless_settings_are_refused(name, id, settings, words, faces):
    with pytest.raises((PolicyError, ConfigError), match=words):
        agents.make(name, faces[id], **settings)


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("greedy", LORENTZIAN),
        ("greedy", DISCRETE),
        ("uniform", DISCRETE),
        ("greedy_feedback", FEEDBACK),
        ("planner", DIMER),
        ("planner", DISCRETE),
        ("planner", SKIP),
        ("greedy", ENERGIES),
    ],
)
def test_the_rules_of_a_policy_are_kept(name, id):
    env = make_env(id, 3)
    settings = {"place_step_ang": 0.355, "dwells": 3} if name == "planner" else {}
    agents.check_policy(agents.make(name, env, **settings), env)
    env.close()


# Who wins


def goal_s(name, id, limit_s, worlds=WORLDS, **overrides):
    """Seconds to the goal in the same worlds; the limit where it was not reached."""
    env = make_env(id, worlds, budget={"seconds": limit_s}, **overrides)
    policy = agents.make(name, env)
    results = agents.evaluate(policy, id, worlds, SEED, env=env)
    env.close()
    return np.array([result["goal_s"] if result["success"] else limit_s for result in results])


def test_on_the_toy_greedy_beats_uniform_by_far_and_never_the_planner():
    """Means of 24 worlds: about 40 s for both scripts; uniform hardly ever gets there within 120 s."""
    uniform, greedy, planner = (goal_s(name, LORENTZIAN, 120.0) for name in ("uniform", "greedy", "planner"))
    assert greedy.mean() < 0.5 * uniform.mean()
    gain = greedy - planner
    assert gain.mean() > -2.0 * gain.std() / math.sqrt(len(gain))


def test_the_planner_takes_as_long_as_it_expects():
    env = make_env(LORENTZIAN, WORLDS)
    opening, info = env.reset(seed=row_seeds(SEED, WORLDS))
    expected = agents.make("planner", env).expected_s(opening) + info["seconds"]
    env.close()
    late = goal_s("planner", LORENTZIAN, 600.0) - expected
    assert abs(late.mean()) < 4.0 * late.std() / math.sqrt(len(late))


def test_feedback_beats_greedy_in_seconds_where_a_rule_stops_dwells():
    """The same 64 worlds: 14 ± 3 s sooner in 80, and sooner than where no rule stops dwells."""
    greedy, feedback = (goal_s(name, FEEDBACK, 600.0, 64) for name in ("greedy", "greedy_feedback"))
    gain = greedy - feedback
    assert gain.mean() > 2.0 * gain.std() / math.sqrt(len(gain)), (greedy.mean(), feedback.mean())
    blind = goal_s("greedy", DEFAULT, 600.0, 64)
    assert (blind - feedback).mean() > 2.0 * (blind - feedback).std() / math.sqrt(len(gain))
