"""Atom targeting: actions become the right instructions, deliveries are booked by hand, observations hold no truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stem_gym.core.batch import put_rows
from stem_gym.core.config import parse
from stem_gym.core.errors import CapabilityError, ConfigError
from stem_gym.core.instructions import FULL_FRAME, Dwell, Park, Reading, Scan
from stem_gym.core.periodic import nearest_image
from stem_gym.core.units import ELECTRONS_PER_PC
from stem_gym.envs.batch import BatchEnv
from stem_gym.envs.registration import variant_files
from stem_gym.envs.variants import build, load_variant
from stem_gym.tasks.atom_targeting import AtomTargeting, AtomTargetingConfig

ID = "stem_gym/AtomTargeting-v0"
IDS = [id for id in sorted(variant_files()) if load_variant(id).variant.task["kind"] == "atom_targeting"]
CPU = torch.device("cpu")
TERMS = ("reward_useful", "reward_elsewhere", "reward_time")


def task(**changes: Any) -> AtomTargeting:
    settings = load_variant(ID, {"task": changes}).variant.task
    return AtomTargeting(parse(AtomTargetingConfig, settings, "test"))


def batch(rows: int = 2, id: str = ID, **sections: Any) -> BatchEnv:
    return build(load_variant(id, sections), rows)


def start(env: BatchEnv, seed: int = 0) -> Any:
    rows = torch.arange(env.rows)
    return env.reset(rows, [seed + 100 * int(row) for row in rows])


def action(kind: float, x: float, y: float, size: float = -1.0, time: float = 0.0) -> list[float]:
    """Places in fractions of the frame; size and time from −1 to 1."""
    return [kind, 2.0 * x - 1.0, 2.0 * y - 1.0, size, time]


# Actions


def plan(given: list[list[float]], **changes: Any) -> list[Any]:
    it = task(**changes)
    rows = torch.arange(len(given))
    return list(it.plan(it.start(len(given), CPU), torch.tensor(given), rows))


def test_the_corners_of_the_action_space():
    config = task().config
    (scan,) = plan([action(1, 0, 0, 1, 1), action(0, 1, 1, 1, -1), action(1, 0, 0, -1, 0), action(1, 1, 1, -1, 0)])
    smallest = config.scan_side_min_ang / config.fov_ang
    assert isinstance(scan, Scan) and scan.shape == (config.pixels, config.pixels)
    expected = [
        FULL_FRAME, FULL_FRAME, (0.0, 0.0, smallest, smallest), (1 - smallest, 1 - smallest, smallest, smallest),
    ]  # fmt: skip
    assert torch.allclose(scan.region, torch.tensor(expected), atol=1e-6)
    shortest, longest = config.pixel_dwell_min_s, config.pixel_dwell_max_s
    assert scan.dwell_s.tolist() == pytest.approx([longest, shortest, *[(shortest * longest) ** 0.5] * 2])
    assert (scan.fov_ang == config.fov_ang).all()


def test_a_scan_is_centred_where_it_was_asked():
    (scan,) = plan([action(1, 0.5, 0.25, 0.0, 0)])
    side = 0.5 * (1.0 + 4.0 / 24.0)
    left, top, width, height = scan.region[0].tolist()
    assert (width, height) == pytest.approx((side, side))
    assert left + width / 2 == pytest.approx(0.5)
    assert top == pytest.approx(0.0), "moved inside, not cut: its size is what was asked"


def test_a_dwell_is_parked_first():
    config = task().config
    park, dwell = plan([action(-0.01, 0.2, 0.7, 0, 1), action(-1, 1, 0, 0, -1)])
    assert isinstance(park, Park) and isinstance(dwell, Dwell)
    assert park.x.tolist() == pytest.approx([0.2, 1.0]) and park.y.tolist() == pytest.approx([0.7, 0.0], abs=1e-6)
    assert dwell.time_s.tolist() == pytest.approx([config.dwell_max_s, config.dwell_min_s])
    assert dwell.trace > 0 and dwell.stop is None


def test_rows_that_do_different_things_get_instructions_of_their_own():
    given = [action(1, 0.5, 0.5), action(-1, 0.1, 0.1), action(1, 0.5, 0.5), action(-1, 0.2, 0.2)]
    scan, park, dwell = plan(given)
    assert scan.rows.tolist() == [0, 2] and park.rows.tolist() == dwell.rows.tolist() == [1, 3]
    it = task()
    (only,) = it.plan(it.start(4, CPU), torch.tensor(given), torch.tensor([2]))
    assert only.rows.tolist() == [2], "rows that are not stepped do nothing"


def test_every_corner_gives_instructions_that_the_microscope_takes():
    env = batch(32)
    start(env)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 5)
    env.step(corners)
    env.step(corners * (1.0 + 9e-5))  # rounding beyond the ends


def test_the_opening_is_a_full_frame_at_the_middle_dwell():
    it = task()
    (scan,) = it.opening(it.start(2, CPU), torch.tensor([0, 1]))
    assert torch.equal(scan.region, torch.tensor([FULL_FRAME, FULL_FRAME]))
    middle = (it.config.pixel_dwell_min_s * it.config.pixel_dwell_max_s) ** 0.5
    assert scan.dwell_s.tolist() == pytest.approx([middle, middle])


# Readings by hand, without a microscope


def dwell_reading(
    place: tuple[float, float], electrons: float, fraction: float | list[float], seconds: float = 1.0
) -> Reading:
    """A dwell of one row whose trace shows `fraction` of the beam."""
    trace = torch.tensor([fraction] if isinstance(fraction, list) else [[fraction] * 16])
    per_sample = torch.tensor([electrons / 16])
    return Reading(
        "Dwell", torch.tensor([0]), torch.tensor([seconds]), torch.tensor([electrons]), torch.tensor([1.0]),
        {"place": torch.tensor([place]), "trace": trace * per_sample},
        {"electrons_per_sample": per_sample, "counts_per_electron": torch.ones(1), "counts_offset": torch.zeros(1)},
    )  # fmt: skip


def scan_reading(electrons: float, seconds: float, pixels: int) -> Reading:
    """A dark full frame of one row."""
    one = torch.ones(1)
    return Reading(
        "Scan", torch.tensor([0]), one * seconds, one * electrons, one, {"images": torch.zeros(1, 1, pixels, pixels)},
        {"electrons_per_pixel": one, "counts_per_electron": one, "counts_offset": 0 * one,
         "region": torch.tensor([FULL_FRAME]), "pixel_dwell_s": one * 1e-5},
    )  # fmt: skip


def truth_at(
    atoms: list[tuple[float, float]], path: list[tuple[float, float]], present: list[bool]
) -> dict[str, Tensor]:
    """A world of Si atoms at places in Å from the centre of the frame, with the beam's path."""
    centre = torch.tensor([15.0, 15.0])
    return {
        "atom_xy_ang": torch.tensor([atoms]) + centre,
        "atomic_number": torch.full((1, len(atoms)), 14),
        "present": torch.tensor([present]),
        "cell_ang": torch.tensor([[30.0, 30.0]]),
        "probe_path_ang": torch.tensor([path]) + centre,
        "frame_centre_ang": centre[None],
        "fov_ang": torch.tensor([24.0]),
    }


def judge(it: AtomTargeting, state: Any, readings: list[Reading], truth: Mapping[str, Tensor]) -> tuple[Any, Any]:
    state, _ = it.observe(state, readings)
    return it.score(state, readings, truth)


ATOMS = [(0.0, 0.0), (5.0, 0.0), (0.0, -6.0)]


def test_electrons_are_useful_within_the_radius_and_up_to_what_is_wanted():
    it = task(wanted_electrons=100.0, radius_ang=0.5)
    state = it.start(1, CPU)
    path = [(0.1, 0.0), (0.0, 0.4), (0.0, 0.6), (3.0, 3.0)]  # half of the samples are near enough
    state, score = judge(it, state, [dwell_reading((0.5, 0.5), 120.0, 0.0, 3.0)], truth_at(ATOMS, path, [True] * 3))
    assert float(state.delivered.sum()) == pytest.approx(60.0)
    assert float(score.metrics["reward_useful"]) == pytest.approx(0.6)
    assert float(score.metrics["reward_elsewhere"]) == pytest.approx(-0.5 * 60.0 / 100.0)
    assert float(score.metrics["reward_time"]) == pytest.approx(-3.0 / 60.0)
    assert float(score.reward) == pytest.approx(0.6 - 0.3 - 0.05)
    assert float(score.metrics["useful_share"]) == pytest.approx(0.5)
    state, score = judge(it, state, [dwell_reading((0.5, 0.5), 120.0, 0.0, 3.0)], truth_at(ATOMS, path, [True] * 3))
    assert float(state.delivered.sum()) == pytest.approx(120.0)
    assert float(score.metrics["reward_useful"]) == pytest.approx(0.4), "what exceeds 100 is of no use"
    assert float(score.metrics["reward_elsewhere"]) == pytest.approx(-0.5 * 80.0 / 100.0)
    assert float(score.metrics["targets_served"]) == 1.0 and float(score.metrics["success"]) == 0.0
    assert float(score.metrics["useful_share"]) == pytest.approx(100.0 / 240.0)
    squares = np.mean([0.01, 0.16, 0.36, 18.0])
    assert float(score.metrics["pointing_error_pm"]) == pytest.approx(100.0 * squares**0.5, rel=1e-4)


def test_a_frame_is_all_elsewhere():
    it = task(wanted_electrons=100.0)
    state = it.start(1, CPU)
    _, score = judge(it, state, [scan_reading(50.0, 6.0, it.config.pixels)], truth_at(ATOMS, [(0.0, 0.0)], [True] * 3))
    assert float(score.reward) == pytest.approx(-0.5 * 0.5 - 0.1)


def test_success_ends_the_episode_in_the_dwell_that_completes_it():
    it = task(wanted_electrons=100.0)
    state = it.start(1, CPU)
    told = []
    for atom in ATOMS:
        reading = dwell_reading((atom[0] / 24 + 0.5, atom[1] / 24 + 0.5), 100.0, 0.01)
        state, score = judge(it, state, [reading], truth_at(ATOMS, [atom], [True] * 3))
        told.append((bool(score.terminated), float(score.metrics["targets_served"]), float(score.metrics["success"])))
    assert told == [(False, 1.0, 0.0), (False, 2.0, 0.0), (True, 3.0, 1.0)]
    assert float(score.metrics["success_perceived"]) == 1.0


def test_the_episode_is_lost_with_the_last_atom_that_could_be_served():
    it = task(wanted_electrons=100.0)
    state = it.start(1, CPU)
    first = truth_at(ATOMS, [ATOMS[0]], [True] * 3)
    state, score = judge(it, state, [dwell_reading((0.5, 0.5), 60.0, 0.01)], first)
    assert not score.terminated
    state, score = judge(
        it, state, [dwell_reading((0.5, 0.5), 1.0, 0.0)], first | {"present": torch.tensor([[True, False, False]])}
    )
    assert not score.terminated, "one is left"
    complete, score = judge(
        it, state, [dwell_reading((0.5, 0.5), 60.0, 0.01)], first | {"present": torch.tensor([[True, False, False]])}
    )
    assert score.terminated and score.metrics["success"] == 0.0 and score.metrics["targets_served"] == 1.0, "at once"
    state, score = judge(
        it, state, [dwell_reading((0.5, 0.5), 60.0, 0.01)], first | {"present": torch.zeros(1, 3).bool()}
    )
    assert score.terminated and score.metrics["targets_served"] == 0.0
    assert float(score.metrics["reward_useful"]) == 0.0, "a lost atom can not be served"


def test_targets_are_looked_up_once_and_only_inside_the_frame():
    it = task(wanted_electrons=100.0, targets=3)
    atoms = [(1.0, 0.0), (11.9, 0.0), (12.5, 0.0), (0.0, 13.0)]  # the frame ends at 12 Å
    truth = truth_at(atoms, [(0.0, 0.0)], [True] * 4)
    state, _ = judge(it, it.start(1, CPU), [scan_reading(1.0, 1.0, it.config.pixels)], truth)
    assert state.is_target.sum() == 2 and set(state.target[state.is_target].tolist()) == {0, 1}
    elsewhere = truth | {"frame_centre_ang": torch.tensor([[27.0, 15.0]])}
    again, _ = judge(it, state, [scan_reading(1.0, 1.0, it.config.pixels)], elsewhere)
    assert torch.equal(again.target, state.target) and torch.equal(again.is_target, state.is_target)


def test_a_row_that_starts_anew_does_not_change_the_targets_of_its_neighbour():
    """Row 0 is in mid-episode and its frame has moved; row 1 has just begun."""
    it = task(wanted_electrons=100.0)
    first = truth_at(ATOMS, [(0.0, 0.0)], [True] * 3)
    known, _ = judge(it, it.start(1, CPU), [scan_reading(1.0, 1.0, it.config.pixels)], first)
    state = put_rows(it.start(2, CPU), torch.tensor([0]), known)
    moved = first | {"frame_centre_ang": torch.tensor([[20.5, 14.0]])}
    both = {key: torch.cat((moved[key], first[key])) for key in first}
    later, _ = it.score(state, [scan_reading(1.0, 1.0, it.config.pixels)], both)
    assert torch.equal(later.target[0], known.target[0]) and torch.equal(later.target[1], known.target[0])
    alone, _ = it.score(it.start(1, CPU), [scan_reading(1.0, 1.0, it.config.pixels)], moved)
    assert not torch.equal(alone.target[0], known.target[0]), "looked up now, they would be in another order"


# Perception


def test_perception_credits_sites_by_their_signal():
    it = task(wanted_electrons=100.0, accepted_fraction=0.002, site_merge_ang=1.5, targets=2)
    state = it.start(1, CPU)

    def see(place: tuple[float, float], electrons: float, signal: float | list[float]) -> tuple[float, list[float]]:
        nonlocal state
        state, score = judge(it, state, [dwell_reading(place, electrons, signal)], {})
        assert score.metrics["reward_useful"] >= 0.0
        return float(score.metrics["reward_useful"]), [round(x, 3) for x in state.site_electrons[0].tolist()]

    assert see((0.5, 0.5), 60.0, 0.001) == (0.0, [0.0, 0.0]), "too dark to be a target"
    assert see((0.5, 0.5), 60.0, 0.003) == (pytest.approx(0.6), [60.0, 0.0])
    near = 0.5 + 1.0 / 24.0
    assert see((near, 0.5), 60.0, 0.003) == (pytest.approx(0.4), [120.0, 0.0]), "1 Å away: the same site, capped"
    assert state.site[0, 0].tolist() == pytest.approx([near, 0.5]), "which moved along"
    assert see((near + 2.0 / 24.0, 0.5), 50.0, [0.003] * 8 + [0.001] * 8) == (pytest.approx(0.25), [120.0, 25.0])
    assert see((0.1, 0.1), 50.0, 0.003) == (0.0, [120.0, 25.0]), "no more sites than targets"
    assert float(state.seen_useful) == pytest.approx(125.0)
    state, score = judge(it, state, [dwell_reading((near + 2.0 / 24.0, 0.5), 80.0, 0.003)], {})
    assert score.terminated and score.metrics["success"] == score.metrics["success_perceived"] == 1.0
    assert "score_truth" not in score.metrics and "pointing_error_pm" not in score.metrics


def test_both_scores_are_told_and_either_can_be_the_reward():
    """A bright dwell beside every atom: perception believes what truth denies."""
    truth = truth_at(ATOMS, [(3.0, 3.0)], [True] * 3)
    rewards = {}
    for source in ("truth", "perception"):
        it = task(wanted_electrons=100.0, scores_from=source)
        _, score = judge(it, it.start(1, CPU), [dwell_reading((0.6, 0.6), 50.0, 0.01, 6.0)], truth)
        rewards[source] = float(score.reward)
        assert float(score.metrics["score_truth"]) == pytest.approx(-0.25 - 0.1)
        assert float(score.metrics["score_perceived"]) == pytest.approx(0.5 - 0.1)
        assert rewards[source] == pytest.approx(sum(float(score.metrics[term]) for term in TERMS))
    assert rewards["truth"] == pytest.approx(-0.35) and rewards["perception"] == pytest.approx(0.4)


# With the microscope


@pytest.mark.parametrize("id", IDS)
def test_the_terms_add_up_to_the_reward_and_to_the_return(id):
    env = batch(4, id)
    _, metrics = start(env)
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros(4)
    opening = metrics["score_truth"].clone()
    for _ in range(8):
        step = env.step(2.0 * torch.rand(4, 5, generator=generator) - 1.0)
        terms = sum(step.metrics[term] for term in TERMS)
        assert torch.allclose(terms, step.reward, atol=1e-6)
        total += step.reward
    assert torch.allclose(step.metrics["episode_return"], total, atol=1e-5)
    assert torch.allclose(step.metrics["score_truth"] - opening, total, atol=1e-4), "but for the first frame's cost"


def pointing(env: BatchEnv) -> Tensor:
    """Actions of a policy that knows the truth: dwell on the first target that is not served."""
    state, truth = env._state, env.instrument.truth()
    target = torch.gather(truth["atom_xy_ang"], 1, state.target[..., None].expand(-1, -1, 2))
    place = nearest_image(target - truth["frame_centre_ang"][:, None], truth["cell_ang"][:, None])
    place = place / truth["fov_ang"][:, None, None] + 0.5
    left = env.task.config.wanted_electrons - state.delivered
    there = torch.gather(truth["present"], 1, state.target) & state.is_target & (left > 0)
    first = there.float().argmax(1)
    rows = torch.arange(env.rows)
    at, wanted = place[rows, first], left[rows, first] * 1.02
    config = env.task.config
    seconds = (wanted / (40.0 * ELECTRONS_PER_PC)).clamp(config.dwell_min_s, min(0.5, config.dwell_max_s))
    time = 2.0 * torch.log(seconds / config.dwell_min_s) / np.log(config.dwell_max_s / config.dwell_min_s) - 1.0
    return torch.stack((-torch.ones(env.rows), *(2.0 * at - 1.0).T, torch.zeros(env.rows), time), dim=1).clamp(-1, 1)


@pytest.mark.parametrize("id", IDS)
def test_who_knows_the_truth_serves_every_target(id):
    """A mirrored axis or a wrong sign anywhere between action and score would make this policy fail."""
    env = batch(8, id)
    start(env, seed=7)
    ended, success, share, useful = (torch.zeros(8) for _ in range(4))
    ended = ended.bool()
    for _ in range(load_variant(id).variant.budget.steps):
        step = env.step(pointing(env), (~ended).nonzero().squeeze(1))
        over = step.terminated & ~ended
        success = torch.where(over, step.metrics["success"], success)
        share = torch.where(over, step.metrics["useful_share"], share)
        useful = torch.where(over, step.metrics["targets_served"] / env.task.config.targets, useful)
        ended |= step.terminated
        if ended.all():
            break
    fragile = "removal" in load_variant(id).variant.instrument
    assert ended.all()
    assert useful.mean() > (0.5 if fragile else 0.99)
    if not fragile:
        assert success.all()
        assert share.mean() > 0.85, "what the first frame and the overshoot took is the rest"


def test_the_useful_share_is_the_dose_map_near_the_atoms():
    """An independent account of the same thing: from the dose map around the atoms, for one long dwell on one atom."""
    env = batch(4, instrument={"drift": {"speed_ang_per_s": 0.0, "diffusion_ang2_per_s": 0.0}})
    start(env)
    before = env.instrument.truth()["dose_map"].clone()
    step = env.step(pointing(env))
    truth = env.instrument.truth()
    bins = before.shape[1]
    area = truth["cell_ang"].prod(1) / bins**2
    near_atoms = ((truth["dose_map"] - before).flatten(1).topk(4, dim=1).values.sum(1) * area).double()
    dwelled = step.metrics["electrons"] - before.sum((1, 2)).double() * area
    assert torch.allclose(near_atoms, dwelled, rtol=1e-3)
    assert torch.allclose(step.metrics["reward_useful"].double() * env.task.config.wanted_electrons, dwelled, rtol=1e-3)


def test_the_observation_holds_no_truth():
    """Worlds that differ in what only truth knows look the same, and what is judged does not feed back."""
    env, spied = batch(3), batch(3)
    start(env), start(spied)

    def lies() -> Mapping[str, Tensor]:
        truth = dict(type(spied.instrument).truth(spied.instrument))
        return truth | {"atom_xy_ang": truth["atom_xy_ang"] + 1.7, "probe_path_ang": truth["probe_path_ang"] * 0.0}

    spied.instrument.truth = lies
    generator = torch.Generator().manual_seed(5)
    differs = False
    for _ in range(6):
        act = 2.0 * torch.rand(3, 5, generator=generator) - 1.0
        act[0] = pointing(env)[0]
        one, other = env.step(act), spied.step(act)
        assert one.observation.keys() == {"image", "region", "frame", "dwell", "probe", "delivered", "budget"}
        for key in one.observation:
            assert torch.equal(one.observation[key], other.observation[key]), key
        differs |= not torch.equal(one.reward, other.reward)
    assert differs, "the lies were told to the judge"


def test_the_observation_is_what_the_readings_said():
    env = batch(1)
    start(env)
    config = env.task.config
    first = env.step(torch.tensor([action(1, 0.5, 0.5, 0.0, 1.0)])).observation
    assert first["frame"].tolist() == [[1.0, 0.0]], "the longest pixel dwell, just taken"
    assert float(first["region"][0, 2]) == pytest.approx(0.5 + 0.5 * 4.0 / 24.0)
    second = env.step(torch.tensor([action(-1, 0.25, 0.75, 0, 1.0)])).observation
    assert second["probe"][0].tolist() == pytest.approx([0.25, 0.75])
    assert second["dwell"][0, 4:].tolist() == pytest.approx([1.0, 0.0])
    assert float(second["frame"][0, 1]) == pytest.approx(config.dwell_max_s / 10.0, rel=1e-3)
    assert torch.equal(second["image"][0, 0], first["image"][0, 0]), "the last frame stays"


class Blindfolded:
    """The simulated microscope as a real one would be: nobody tells the truth."""

    def __init__(self, instrument: Any) -> None:
        self._instrument = instrument
        self.capabilities = replace(instrument.capabilities, simulated=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._instrument, name)

    def truth(self) -> dict[str, Tensor]:
        return {}


def test_without_truth_it_scores_from_perception():
    seeing, blind = batch(2), batch(2)
    blind = BatchEnv(blind.task, Blindfolded(blind.instrument), blind.budget)
    start(seeing), start(blind)
    for _ in range(10):
        act = pointing(seeing)
        one, other = seeing.step(act), blind.step(act)
        assert all(torch.equal(one.observation[key], other.observation[key]) for key in one.observation)
        assert torch.equal(other.metrics["score_perceived"], one.metrics["score_perceived"])
        assert "score_truth" not in other.metrics and "score_truth" in one.metrics
        assert torch.equal(other.metrics["targets_served"], one.metrics["targets_served_perceived"])
        assert torch.allclose(other.reward, sum(other.metrics[term] for term in TERMS), atol=1e-6)
    assert other.metrics["targets_served_perceived"].sum() > 0, "dwells on Si are recognised by their signal"


# What is refused


@pytest.mark.parametrize("verb", sorted(AtomTargeting.needs.verbs))
def test_an_instrument_that_lacks_a_verb_is_refused(verb):
    env = batch(1)
    env.instrument.capabilities = replace(env.instrument.capabilities, verbs=env.instrument.capabilities.verbs - {verb})
    with pytest.raises(CapabilityError, match=f"AtomTargeting needs the verb.*{verb}, which SimulatedMicroscope lacks"):
        BatchEnv(env.task, env.instrument, env.budget)


def test_an_instrument_without_the_detector_is_refused():
    env = batch(1)
    env.instrument.capabilities = replace(env.instrument.capabilities, detectors=frozenset({"bf"}))
    with pytest.raises(CapabilityError, match="needs the detector.*haadf, which"):
        BatchEnv(env.task, env.instrument, env.budget)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fov_ang": 33.0}, "A pixel of 0.516 Å is more than half the probe's 1 Å; use at least 67 pixels"),
        ({"pixels": 47}, "more than half the probe's"),
        ({"pixel_dwell_min_s": 1.0}, "pixel_dwell_min_s must be below pixel_dwell_max_s; given 1 and 6.4e-05"),
        ({"dwell_min_s": 2.0}, "dwell_min_s must be below dwell_max_s"),
        ({"scan_side_min_ang": 24.0}, "scan_side_min_ang must be below fov_ang"),
        ({"element": "Zz"}, "Unknown element 'Zz'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        task(**changes)
