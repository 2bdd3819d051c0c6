"""Atom targeting: find the atoms of one kind and hold the probe on them through drift, at low dose.

This file is longer than 400 lines because a task is one file: its settings, its state, its manual and its rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from pydantic import Field
from torch import Tensor

from stem_gym.core.batch import add, changed, number, put, rows_where, take
from stem_gym.core.config import Config
from stem_gym.core.elements import atomic_number_of
from stem_gym.core.errors import ConfigError
from stem_gym.core.instructions import Dwell, Instruction, Park, Reading, Scan, full_frames
from stem_gym.core.periodic import nearest_image
from stem_gym.core.task import Marks, Needs, Observation, Score, Task

TRACE_SAMPLES = 16
_MARKED_DWELLS = 32  # the last dwells that a picture shows
_FAR_ANG = 1e6
_FAINTEST = -30.0  # logarithm of what is too faint to be drawn; numbers far below are subnormal, which is slow


class AtomTargetingConfig(Config):
    """Settings of the task; what they mean to the agent is in the docstring of AtomTargeting."""

    kind: Literal["atom_targeting"] = "atom_targeting"
    """this task"""
    element: str
    """symbol of the atoms that are wanted"""
    targets: int = Field(ge=1, le=64)
    """how many of them must be served"""
    wanted_electrons: float = Field(gt=0)
    """electrons to deliver to each target"""
    radius_ang: float = Field(gt=0, le=5)
    """an electron counts when the probe stands within this distance of a target"""
    fov_ang: float = Field(ge=4, le=200)
    """side of the full frame"""
    pixels: int = Field(ge=16, le=512)
    """pixels along a side of every frame, full or partial"""
    probe_fwhm_ang: float = Field(gt=0)
    """full width of the probe, of which a pixel must stay under half"""
    scan_side_min_ang: float = Field(gt=0)
    """side of the smallest partial frame"""
    pixel_dwell_min_s: float = Field(gt=0)
    """shortest dwell on a pixel of a frame"""
    pixel_dwell_max_s: float = Field(gt=0)
    """longest dwell on a pixel of a frame"""
    dwell_min_s: float = Field(gt=0)
    """shortest dwell at a parked place"""
    dwell_max_s: float = Field(gt=0)
    """longest dwell at a parked place"""
    image_full_scale: float = Field(gt=0)
    """collected fraction that is drawn as white"""
    accepted_fraction: float = Field(gt=0)
    """collected fraction above which a dwell is believed to be on a target"""
    site_merge_ang: float = Field(gt=0)
    """accepted dwells closer than this to a known site belong to it"""
    elsewhere_weight: float = Field(ge=0)
    """reward lost per wanted number of electrons that fell elsewhere"""
    time_weight: float = Field(ge=0)
    """reward lost per minute"""
    scores_from: Literal["truth", "perception"] = "truth"
    """what the reward is made of where both are known; an instrument without truth always gives perception"""


@dataclass(frozen=True)
class State:
    """One episode a row: first what the operator knows, then the judge's book."""

    image: Tensor  # (B, H, W) uint8, last frame
    region: Tensor  # (B, 4) of the last frame
    frame_s: Tensor  # (B,) when it was taken
    pixel_dwell_s: Tensor  # (B,) with which dwell
    clock_s: Tensor  # (B,)
    place: Tensor  # (B, 2) parked probe
    trace: Tensor  # (B, 6) last dwell's trace in a few numbers
    dwelled_s: Tensor  # (B,) when it ended
    site: Tensor  # (B, N, 2) perceived sites, fractions of the reference frame
    site_electrons: Tensor  # (B, N) delivered there by own account
    dwell_places: Tensor  # (B, D, 2) last dwells, NaN where none
    seen_useful: Tensor  # (B,) electrons, by own account
    seen_before: Tensor  # (B,) the same before this step
    known: Tensor  # (B,) bool, whether the targets below were looked up
    target: Tensor  # (B, N) int64 index of the atoms
    is_target: Tensor  # (B, N) bool
    delivered: Tensor  # (B, N) electrons within the radius, from truth
    useful: Tensor  # (B,) of those, not more than wanted
    electrons: Tensor  # (B,)
    squared_error_ang2: Tensor  # (B,) summed over dwells
    dwells: Tensor  # (B,)
    lost: Tensor  # (B,) bool, no target left to serve
    score_truth: Tensor  # (B,) summed reward from truth, the opening frame's cost included
    score_perceived: Tensor  # (B,)


class AtomTargeting(Task[State]):
    """Deliver a wanted number of electrons to each atom of one kind while the sample drifts.

    ## Action: `Box(-1, 1, (5,))`

    | number | meaning |
    |---|---|
    | 0 kind | ≥ 0: scan a frame; < 0: park and dwell |
    | 1, 2 place | (a + 1)/2 is the fraction (x, y) of the reference frame: centre of the scan, or the parked place |
    | 3 size | side of the scan, linear from `scan_side_min_ang` to the full frame; it is moved inside the frame |
    | 4 time | dwell per pixel, or at the place; logarithmic from the shortest to the longest |

    ## Observation: `Dict`

    | key | meaning |
    |---|---|
    | `image` (2, H, W) | uint8: last frame (255 = `image_full_scale`); delivered by own account (255 = wanted) |
    | `region` (4,) | left, top, width, height of both, in fractions of the reference frame |
    | `frame` (2,) | its pixel dwell / longest; its age / (10 s), at most 1 |
    | `dwell` (6,) | see below |
    | `probe` (2,) | parked place |
    | `delivered` (N, 3) | sites by own account: x, y, electrons / wanted (at most 2); zeros where none |
    | `budget` (3,) | what is left of steps, seconds and electrons |

    `dwell` tells the last dwell's ADF trace in units of 4 × `accepted_fraction`: mean, first quarter, last quarter,
    lowest sample; then its time / longest; its age / (10 s).

    ## Reward

    useful electrons (within `radius_ang` of a target, up to the wanted number) / wanted
    − `elsewhere_weight` × other electrons / wanted − `time_weight` × minutes; each term is in `info`.
    From truth in simulation; elsewhere an electron counts whose ADF signal was above `accepted_fraction`. `info` has
    both as `score_truth` and `score_perceived`, summed over the episode with the opening frame's cost.

    ## Start and end

    A full frame at the middle pixel dwell is taken first, and paid for. The episode ends when `targets` atoms have what
    was wanted, when none is left to serve, or with the budget. Targets are the atoms of the kind inside the first
    frame; where there are more than `targets`, those nearest to its centre.

    Version 0: first release.
    """

    Config = AtomTargetingConfig
    needs = Needs(verbs=frozenset({"Scan", "Park", "Dwell"}), detectors=frozenset({"haadf"}))

    def __init__(self, config: AtomTargetingConfig) -> None:
        self.config: AtomTargetingConfig = config
        self._atomic_number = atomic_number_of(config.element)
        _check(config)
        size = config.pixels
        self._pixel_centres = (torch.arange(size) + 0.5) / size  # parts of a frame
        self._slots = torch.arange(config.targets)
        unit: dict[str, Any] = {"low": 0.0, "high": 1.0, "dtype": np.float32}
        self.action_space = spaces.Box(-1.0, 1.0, (5,), np.float32)
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (2, size, size), np.uint8),
                "region": spaces.Box(shape=(4,), **unit),
                "frame": spaces.Box(shape=(2,), **unit),
                "dwell": spaces.Box(0.0, 4.0, (6,), np.float32),
                "probe": spaces.Box(shape=(2,), **unit),
                "delivered": spaces.Box(0.0, 2.0, (config.targets, 3), np.float32),
            }
        )

    def start(self, rows: int, device: torch.device) -> State:
        """Nothing seen, nothing delivered."""
        zero = torch.zeros(rows, device=device)
        pair = torch.zeros(rows, 2, device=device)
        slots = torch.zeros(rows, self.config.targets, device=device)
        size = self.config.pixels
        return State(
            image=torch.zeros(rows, size, size, dtype=torch.uint8, device=device),
            region=full_frames(rows, device),
            frame_s=zero,
            pixel_dwell_s=zero,
            clock_s=zero,
            place=pair + 0.5,
            trace=torch.zeros(rows, 6, device=device),
            dwelled_s=zero,
            site=torch.zeros(rows, self.config.targets, 2, device=device),
            site_electrons=slots,
            dwell_places=torch.full((rows, _MARKED_DWELLS, 2), torch.nan, device=device),
            seen_useful=zero,
            seen_before=zero,
            known=torch.zeros(rows, dtype=torch.bool, device=device),
            target=slots.long(),
            is_target=slots.bool(),
            delivered=slots,
            useful=zero,
            electrons=zero,
            squared_error_ang2=zero,
            dwells=zero,
            lost=torch.zeros(rows, dtype=torch.bool, device=device),
            score_truth=zero,
            score_perceived=zero,
        )

    def opening(self, state: State, rows: Tensor) -> Sequence[Instruction]:
        """One full frame."""
        config = self.config
        dwell_s = (config.pixel_dwell_min_s * config.pixel_dwell_max_s) ** 0.5
        region = full_frames(len(rows), rows.device)
        return [self._scan(rows, region, torch.full((len(rows),), dwell_s, device=rows.device))]

    def plan(self, state: State, action: Tensor, rows: Tensor) -> Sequence[Instruction]:
        """Scans for some rows, park and dwell for the others."""
        config = self.config
        action = take(action, rows)
        scans = action[:, 0] >= number(0.0)
        part = (number(0.5) * (action[:, 1:] + number(1.0))).clamp(
            0.0, 1.0
        )  # (n, 4) x, y, size, time; rounding beyond the ends is cut
        place = part[:, :2]
        smallest = config.scan_side_min_ang / config.fov_ang
        frames, stays = rows_where(scans), rows_where(~scans)
        instructions: list[Instruction] = []
        if len(frames):
            side = (number(smallest) + number(1.0 - smallest) * part[:, 2:3]).expand(-1, 2)
            corner = torch.minimum((place - number(0.5) * side).clamp(min=0.0), number(1.0) - side)
            region = torch.cat((corner, side), dim=1)
            pixel_s = _between(config.pixel_dwell_min_s, config.pixel_dwell_max_s, part[:, 3])
            instructions.append(self._scan(*(take(part, frames) for part in (rows, region, pixel_s))))
        if len(stays):
            parked = take(rows, stays)
            dwell_s = _between(config.dwell_min_s, config.dwell_max_s, take(part, stays)[:, 3])
            instructions.append(Park(parked, *take(place, stays).unbind(1)))
            instructions.append(Dwell(parked, dwell_s, trace=TRACE_SAMPLES))
        return instructions

    def observe(self, state: State, readings: Sequence[Reading]) -> tuple[State, Observation]:
        """The operator's view after the readings."""
        clock_s, electrons = state.clock_s, state.electrons
        changes: dict[str, Tensor] = {}
        for reading in readings:
            clock_s = add(clock_s, reading.rows, reading.seconds)
            electrons = add(electrons, reading.rows, reading.electrons)
            if reading.verb == "Scan":
                changes |= self._see_frame(state, reading, clock_s)
            elif reading.verb == "Dwell":
                changes |= self._see_dwell(state, reading, clock_s)
        state = changed(state, clock_s=clock_s, electrons=electrons, **changes)
        return state, self._observation(state)

    def score(self, state: State, readings: Sequence[Reading], truth: Mapping[str, Tensor]) -> tuple[State, Score]:
        """Reward, end and metrics, from truth where there is some and from perception where not."""
        wanted = self.config.wanted_electrons
        spent, seconds = _spent(readings, state)
        seen_before, true_before = state.seen_before, state.useful
        for_truth = bool(truth)
        if for_truth:
            state = self._judge(self._look_up_targets(state, truth), readings, truth)
        gains = torch.stack((state.seen_useful - seen_before, state.useful - true_before))
        terms = self._terms(gains, spent, seconds)
        useful, elsewhere, time = terms.values()
        reward_seen, reward_true = (useful + elsewhere + time).unbind(0)
        state = changed(
            state,
            seen_before=state.seen_useful,
            score_perceived=state.score_perceived + reward_seen,
            score_truth=state.score_truth + reward_true if for_truth else state.score_truth,
        )
        by_truth = for_truth and self.config.scores_from == "truth"
        served = ((state.delivered >= number(wanted)) & state.is_target).sum(1)
        seen = (state.site_electrons >= number(wanted)).sum(1)
        needed = state.is_target.sum(1).clamp(min=1) if for_truth else torch.full_like(seen, self.config.targets)
        success, success_seen = served >= needed, seen >= self.config.targets
        lost = state.lost & ~success if for_truth else torch.zeros_like(success)
        metrics = {
            **{name: term[int(by_truth)] for name, term in terms.items()},
            "targets_served": (served if for_truth else seen).float(),
            "targets_served_perceived": seen.float(),
            "success": (success if for_truth else success_seen).float(),
            "success_perceived": success_seen.float(),
            "useful_share": (state.useful if for_truth else state.seen_useful) / state.electrons.clamp(min=1.0),
            "score_perceived": state.score_perceived,
        }
        if for_truth:
            metrics["score_truth"] = state.score_truth
            metrics["pointing_error_pm"] = number(100.0) * torch.sqrt(state.squared_error_ang2 / state.dwells)
        reward = reward_true if by_truth else reward_seen
        terminated = (success if by_truth else success_seen) | lost
        return state, Score(reward, terminated, metrics)

    def marks(self, state: State, truth: Mapping[str, Tensor]) -> Marks:
        """Last frame, probe, last dwells, and the targets where they are known."""
        if truth:
            targets = _gather(truth["atom_xy_ang"], state.target) - truth["frame_centre_ang"].unsqueeze(1)
            targets = nearest_image(targets, truth["cell_ang"].unsqueeze(1)) / truth["fov_ang"][:, None, None] + 0.5
            targets = torch.where(state.is_target.unsqueeze(-1), targets, torch.nan)
        else:
            targets = torch.where((state.site_electrons > 0).unsqueeze(-1), state.site, torch.nan)
        return Marks(state.place, state.dwell_places, targets, state.image.float() / 255.0, state.region)

    def _scan(self, rows: Tensor, region: Tensor, dwell_s: Tensor) -> Scan:
        config = self.config
        fov = torch.full((len(rows),), config.fov_ang, device=rows.device)
        return Scan(rows, fov, (config.pixels, config.pixels), dwell_s, region)

    def _see_frame(self, state: State, reading: Reading, clock_s: Tensor) -> dict[str, Tensor]:
        """What a frame that ended at `clock_s` changes in the state."""
        rows, calibration = reading.rows, reading.calibration
        fraction = _fraction(reading.data["images"][:, 0], calibration, "electrons_per_pixel")
        image = fraction.mul_(255.0 / self.config.image_full_scale).round_().clamp_(0.0, 255.0).to(torch.uint8)
        return {
            "image": put(state.image, rows, image),
            "region": put(state.region, rows, calibration["region"]),
            "frame_s": put(state.frame_s, rows, take(clock_s, rows)),
            "pixel_dwell_s": put(state.pixel_dwell_s, rows, calibration["pixel_dwell_s"]),
        }

    def _see_dwell(self, state: State, reading: Reading, clock_s: Tensor) -> dict[str, Tensor]:
        """What a dwell that ended at `clock_s` changes in the state."""
        config, rows, place = self.config, reading.rows, reading.data["place"]
        fraction = _fraction(reading.data["trace"], reading.calibration, "electrons_per_sample")  # (n, J)
        accepted = reading.electrons * (fraction > number(config.accepted_fraction)).float().mean(1)
        quarter = TRACE_SAMPLES // 4
        signal = torch.stack(
            (fraction.mean(1), fraction[:, :quarter].mean(1), fraction[:, -quarter:].mean(1), fraction.amin(1)), dim=1
        ) / number(4.0 * config.accepted_fraction)
        zero = torch.zeros_like(reading.seconds)
        trace = torch.cat((signal, torch.stack((reading.seconds / number(config.dwell_max_s), zero), dim=1)), dim=1)
        before = take(state.site_electrons, rows)
        site, electrons = self._credit(take(state.site, rows), before, place, accepted)
        gain = electrons.clamp(max=config.wanted_electrons) - before.clamp(max=config.wanted_electrons)
        marks = torch.cat((take(state.dwell_places, rows)[:, 1:], place.unsqueeze(1)), dim=1)
        return {
            "place": put(state.place, rows, place),
            "trace": put(state.trace, rows, trace),
            "dwelled_s": put(state.dwelled_s, rows, take(clock_s, rows)),
            "site": put(state.site, rows, site),
            "site_electrons": put(state.site_electrons, rows, electrons),
            "dwell_places": put(state.dwell_places, rows, marks),
            "seen_useful": add(state.seen_useful, rows, gain.sum(1)),
        }

    def _credit(self, site: Tensor, electrons: Tensor, place: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
        """Sites (n, N, 2) and their electrons (n, N) after a dwell at `place` of which `accepted` (n,) are believed.

        The electrons go to the nearest known site within reach, else to the first free one; the site moves along.
        """
        empty = electrons <= number(0.0)
        distance_ang = (site - place.unsqueeze(1)).norm(dim=-1) * number(self.config.fov_ang)
        distance_ang = torch.where(empty, number(_FAR_ANG), distance_ang)
        nearest_ang, nearest = distance_ang.min(1)
        reachable = nearest_ang < number(self.config.site_merge_ang)
        slot = torch.where(reachable, nearest, empty.float().argmax(1))
        takes = (accepted > number(0.0)) & (reachable | empty.any(1))
        chosen = (self._slots.to(slot.device) == slot.unsqueeze(1)) & takes.unsqueeze(1)
        moved = torch.where(chosen.unsqueeze(-1), place.unsqueeze(1), site)
        return moved, electrons + chosen * accepted.unsqueeze(1)

    def _observation(self, state: State) -> Observation:
        config = self.config
        share = (state.site_electrons / number(config.wanted_electrons)).clamp(max=2.0)
        ended_s = torch.stack((state.frame_s, state.dwelled_s), dim=1)
        ages = ((state.clock_s.unsqueeze(1) - ended_s) / number(10.0)).clamp(0.0, 1.0)
        trace = torch.cat((state.trace[:, :5].clamp(0.0, 4.0), ages[:, 1:]), dim=1)
        known = (share > number(0.0)).unsqueeze(-1)
        return {
            "image": self._draw(state, share),
            "region": state.region.clone(),
            "frame": torch.cat(
                (
                    (state.pixel_dwell_s / number(config.pixel_dwell_max_s)).clamp(0.0, 1.0).unsqueeze(1),
                    ages[:, :1],
                ),
                dim=1,
            ),
            "dwell": trace,
            "probe": state.place.clone(),
            "delivered": torch.cat((state.site * known, share.unsqueeze(-1)), dim=-1),
        }

    def _draw(self, state: State, share: Tensor) -> Tensor:
        """The last frame, and the sites as soft spots on its region: (B, 2, H, W) uint8."""
        region = state.region[:, None, :, None]
        corner, size = region[:, :, :2], region[:, :, 2:]
        sigma = number(self.config.probe_fwhm_ang / self.config.fov_ang)
        places = corner + size * self._pixel_centres.to(share.device)
        away = (places - state.site.unsqueeze(-1)) / sigma  # (B, N, 2, pixels)
        along_x, along_y = torch.exp((number(-0.5) * away.square()).clamp_(min=_FAINTEST)).unbind(2)
        spots = torch.bmm((along_y * (number(255.0) * share.clamp(max=1.0)).unsqueeze(-1)).transpose(1, 2), along_x)
        both = state.image.new_empty(len(spots), 2, *spots.shape[1:])
        both[:, 0], both[:, 1] = state.image, spots.clamp_(max=255.0)
        return both

    def _look_up_targets(self, state: State, truth: Mapping[str, Tensor]) -> State:
        """The wanted atoms inside the first frame, nearest to its centre first; once an episode."""
        if bool(state.known.all()):
            return state
        centre = truth["frame_centre_ang"].unsqueeze(1)
        away = nearest_image(truth["atom_xy_ang"] - centre, truth["cell_ang"].unsqueeze(1)).abs().amax(-1)
        inside = away < 0.5 * truth["fov_ang"].unsqueeze(1)
        candidate = inside & truth["present"] & (truth["atomic_number"] == self._atomic_number)
        short = (0, max(0, self.config.targets - away.shape[1]))  # a specimen may have fewer atoms than are wanted
        order = torch.nn.functional.pad(torch.where(candidate, -away, -_FAR_ANG), short, value=-_FAR_ANG)
        rank, index = order.topk(self.config.targets, dim=1)
        fresh = ~state.known.unsqueeze(1)
        return changed(
            state,
            target=torch.where(fresh, index.clamp(max=away.shape[1] - 1), state.target),
            is_target=torch.where(fresh, rank > -_FAR_ANG, state.is_target),
            known=torch.ones_like(state.known),
        )

    def _judge(self, state: State, readings: Sequence[Reading], truth: Mapping[str, Tensor]) -> State:
        """Book what the dwells truly delivered."""
        wanted = self.config.wanted_electrons
        present = torch.gather(truth["present"], 1, state.target) & state.is_target
        delivered, useful = state.delivered, state.useful
        squared_error_ang2, dwells = state.squared_error_ang2, state.dwells
        for reading in readings:
            if reading.verb != "Dwell":
                continue
            rows = reading.rows
            atom = _gather(take(truth["atom_xy_ang"], rows), take(state.target, rows))  # (n, N, 2)
            delta = take(truth["probe_path_ang"], rows).unsqueeze(1) - atom.unsqueeze(2)
            cell = take(truth["cell_ang"], rows)[:, None, None]
            square = nearest_image(delta, cell).square().sum(-1)  # (n, N, P)
            square = torch.where(take(state.is_target, rows).unsqueeze(-1), square, number(_FAR_ANG))
            near = (square < number(self.config.radius_ang**2)) & take(present, rows).unsqueeze(-1)
            here = take(delivered, rows) + near.float().mean(2) * reading.electrons.unsqueeze(1)
            within = here.clamp(max=wanted).sum(1)
            delivered = put(delivered, rows, here)
            useful = put(useful, rows, within)
            squared_error_ang2 = add(squared_error_ang2, rows, square.mean(2).amin(1))
            dwells = add(dwells, rows, torch.ones_like(within))
        return changed(
            state,
            delivered=delivered,
            useful=useful,
            squared_error_ang2=squared_error_ang2,
            dwells=dwells,
            lost=~(present & (delivered < number(wanted))).any(1),
        )

    def _terms(self, useful: Tensor, spent: Tensor, seconds: Tensor) -> dict[str, Tensor]:
        """The three terms of the reward of a step for useful electrons (2, B) as perceived and in truth."""
        config, wanted = self.config, number(self.config.wanted_electrons)
        return {
            "reward_useful": useful / wanted,
            "reward_elsewhere": number(-config.elsewhere_weight) * (spent - useful) / wanted,
            "reward_time": (number(-config.time_weight) * seconds / number(60.0)).expand(2, -1),
        }


def _check(config: AtomTargetingConfig) -> None:
    """Refuse settings that contradict each other."""
    pixel_ang = config.fov_ang / config.pixels
    if pixel_ang > 0.5 * config.probe_fwhm_ang:
        raise ConfigError(
            f"A pixel of {pixel_ang:.3g} Å is more than half the probe's {config.probe_fwhm_ang:.3g} Å; "
            f"use at least {int(2.0 * config.fov_ang / config.probe_fwhm_ang) + 1} pixels or a smaller fov_ang."
        )
    for low, high in (
        ("pixel_dwell_min_s", "pixel_dwell_max_s"),
        ("dwell_min_s", "dwell_max_s"),
        ("scan_side_min_ang", "fov_ang"),
    ):
        if not getattr(config, low) < getattr(config, high):
            raise ConfigError(
                f"{low} must be below {high}; given {getattr(config, low):g} and {getattr(config, high):g}."
            )


def _between(low: float, high: float, part: Tensor) -> Tensor:
    """Logarithmic from low (part 0) to high (part 1)."""
    return number(low) * number(high / low) ** part


def _fraction(counts: Tensor, calibration: Mapping[str, Tensor], electrons: str) -> Tensor:
    """Collected fraction of the beam from counts (n, …)."""
    shape = (-1,) + (1,) * (counts.dim() - 1)
    gain, offset, beam = (
        calibration[key].reshape(shape) for key in ("counts_per_electron", "counts_offset", electrons)
    )
    return (counts - offset).div_(gain * beam)


def _gather(places: Tensor, index: Tensor) -> Tensor:
    """Places (B, K, 2) at indices (B, N): (B, N, 2)."""
    return torch.gather(places, 1, index.unsqueeze(-1).expand(-1, -1, 2))


def _spent(readings: Sequence[Reading], state: State) -> tuple[Tensor, Tensor]:
    """Electrons and seconds of the step, each (B,)."""
    electrons, seconds = torch.zeros_like(state.clock_s), torch.zeros_like(state.clock_s)
    for reading in readings:
        electrons = add(electrons, reading.rows, reading.electrons)
        seconds = add(seconds, reading.rows, reading.seconds)
    return electrons, seconds
