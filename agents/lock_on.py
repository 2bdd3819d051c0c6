"""Lock on: a good operator's script. Finds the sites, follows the drift with small scans, dwells where they will be.

One full frame gives the sites (matched filter); every partial frame after it gives one site's place to a few
hundredths of an Å (sub-pixel fit), and a Kalman filter turns these into places and drift. A dwell is put on the middle
of the path that the site will take, no longer than the uncertainty and the drift allow; a dwell with a dark ADF signal
is not believed, and the site is looked for again in a wider scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from agents.engine.sight import brightest_spots, centroids, field_of, fractions_of, same_sites
from agents.engine.tracking import DriftPrior, SiteTracker
from agents.policy import Array, Face, Observation, Policy, as_array
from stem_gym.core.config import Config
from stem_gym.core.units import ELECTRONS_PER_PC

_AGE_S = 10.0  # the observation's ages are in this unit, and end at 1
_SAME_ANG = 0.8  # two pictures of a site agree to this, once the drift in between is taken out


class Settings(Config):
    """What can be chosen."""

    drift_ang_per_s: float = Field(0.25, gt=0)
    """expected rms drift"""
    drift_correlation_s: float = Field(20.0, gt=0)
    """time over which the drift changes"""
    diffusion_ang2_per_s: float = Field(0.003, ge=0)
    """expected random walk on each axis"""
    current_pa: float = Field(40.0, gt=0)
    """beam current that is assumed until a dwell has told it"""
    scan_sigma_ang: float = Field(0.04, gt=0)
    """how well a frame of fine pixels tells a place"""
    pixel_sigma: float = Field(0.4, ge=0)
    """what is added to that in quadrature, in pixels of the frame"""
    scan_side_ang: float = Field(5.0, gt=0)
    """side of a partial frame when all is well"""
    scan_pixel_dwell_s: float = Field(8e-6, gt=0)
    """its dwell per pixel"""
    trust_sigma_ang: float = Field(0.12, gt=0)
    """dwell only when the place is known to this"""
    radius_used: float = Field(0.8, gt=0, le=1)
    """part of the radius that drift and doubt may fill during a dwell"""
    contrast: float = Field(1.3, ge=1)
    """the faintest site must be so much brighter than the next spot, else a slower frame is taken"""
    brightness: float = Field(0.5, gt=0)
    """a spot fainter than this part of the accepted fraction is no site"""
    tries: int = Field(3, ge=1)
    """opening frames after which the brightest spots are taken as they are"""
    margin: float = Field(0.04, ge=0)
    """electrons given beyond what is wanted, as a fraction"""


class LockOn(Policy):
    """Sees, predicts, decides, for all rows at once."""

    name = "lock_on"
    Settings = Settings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        self.field = field_of(face, self.name)
        prior = DriftPrior(settings.drift_ang_per_s, settings.drift_correlation_s, settings.diffusion_ang2_per_s)
        rows, sites = face.rows, self.field.targets
        self._tracker = SiteTracker(rows, sites, prior)
        self._found = np.zeros((rows, sites), dtype=bool)
        self._given = np.zeros((rows, sites))  # electrons / wanted, as far as they are believed
        self._rate = np.zeros(rows)  # electrons / wanted per second of dwell, as far as it is known
        self._target = np.zeros(rows, dtype=np.int64)
        self._missed = np.zeros(rows, dtype=np.int64)  # scans in a row that did not show the target
        self._tries = np.zeros(rows, dtype=np.int64)  # opening frames since the sites were known
        self._kind = np.zeros(rows)  # of the last step: 0 the opening frame, 1 a scan, −1 a dwell
        self._planned_s = np.zeros(rows)
        self._hit = np.zeros(rows)  # how much of the last dwell is thought to have been within the radius
        self._before = np.zeros((rows, 3))  # last frame's age, last dwell's age, share given to all sites

    def reset(self, rows: Sequence[int] | Array, seeds: Sequence[int] | None = None) -> None:
        index = np.asarray(rows, dtype=np.int64)
        self._tracker.reset(index)
        own = (self._found, self._given, self._rate, self._target, self._missed, self._tries, self._kind)
        for memory in (*own, self._planned_s, self._hit, self._before):
            memory[index] = 0

    def act(self, observation: Observation) -> Array:
        seen = {key: as_array(value) for key, value in observation.items()}
        self._pass_time(seen)
        self._take_dwell(seen)
        self._take_frame(seen)
        self._before[:] = np.column_stack((seen["frame"][:, 1], seen["dwell"][:, 5], seen["delivered"][:, :, 2].sum(1)))
        return self._decide()

    # What the last step told

    def _pass_time(self, seen: Observation) -> None:
        """The time that the last step took: from the ages that the observation tells, else as planned."""
        age = np.where(self._kind > 0, seen["dwell"][:, 5], seen["frame"][:, 1])
        grown = _AGE_S * (age - np.where(self._kind > 0, self._before[:, 1], self._before[:, 0]))
        told = (age < 1.0) & (self._kind != 0) & (grown > 0.0)
        self._tracker.advance(np.where(told, grown, self._planned_s))

    def _take_dwell(self, seen: Observation) -> None:
        """Book what the dwell gave by own account, as far as it is believed; a dark one raises doubt."""
        dwelled = self._kind < 0
        gain = np.where(dwelled, seen["delivered"][:, :, 2].sum(1) - self._before[:, 2], 0.0).clip(min=0.0)
        mean, last = 4.0 * seen["dwell"][:, 0], 4.0 * seen["dwell"][:, 2]  # over the accepted fraction
        bright = dwelled & (mean > 1.0)
        seconds = self.field.dwell_max_s * seen["dwell"][:, 4]
        self._rate = np.maximum(self._rate, np.where(bright & (seconds > 0.0), gain / seconds.clip(min=1e-3), 0.0))
        # The account of the task may have been full, so a bright dwell counts with the rate that was seen before.
        rows = np.arange(len(gain))
        self._given[rows, self._target] += np.where(bright, np.maximum(gain, self._rate * seconds), gain) * self._hit
        self._tracker.doubt(np.where(dwelled & ~bright, 0.5, np.where(dwelled & (last < 1.0), 0.25, 0.0)))

    def _take_frame(self, seen: Observation) -> None:
        """Find the sites in an opening frame; measure the places of those that any frame shows."""
        image = fractions_of(seen, self.field)
        region_ang = seen["region"].astype(np.float64) * self.field.fov_ang
        pixel_ang = region_ang[:, 2] / image.shape[2]
        seconds = seen["frame"][:, 0] * self.field.pixel_dwell_max_s * image.shape[1] * image.shape[2]
        opening = np.flatnonzero(self._kind == 0)
        if len(opening):
            self._open(opening, image, region_ang, pixel_ang)
        looked = self._kind >= 0
        start, age_s, inside = self._expected(region_ang, pixel_ang, seconds)
        spot, height = centroids(image, start, self.field.probe_sigma_ang / pixel_ang)
        measured = region_ang[:, None, :2] + (spot + 0.5) * pixel_ang[:, None, None]  # (B, N, 2)
        shown = looked[:, None] & inside & (height > 0.6 * self.field.accepted_fraction)
        self._measure(shown, measured, age_s, pixel_ang)

    def _open(self, rows: Array, image: Tensor, region_ang: Array, pixel_ang: Array) -> None:
        """The brightest spots are the sites, if they stand out from the next one; else a slower frame is wanted."""
        count, field = self.field.targets, self.field
        sigma_pixels = field.probe_sigma_ang * image.shape[2] / field.fov_ang
        spots, height = brightest_spots(image[torch.from_numpy(rows)], sigma_pixels, count + 1)
        clear = height[:, count - 1] > self.settings.contrast * height[:, count]
        self._tries[rows] = np.where(clear, self.settings.tries, self._tries[rows] + 1)
        sure = self._tries[rows] >= self.settings.tries
        self._found[rows] = False
        rows, spots, height = rows[sure], spots[sure, :count], height[sure, :count]
        places = region_ang[rows, None, :2] + (spots + 0.5) * pixel_ang[rows, None, None]
        old = self._tracker.mean[rows, :, :-1].transpose(0, 2, 1)
        match = same_sites(old, places, _SAME_ANG)  # (n, N) which old site a new one was
        given = np.take_along_axis(self._given[rows], match.clip(min=0), axis=1)
        self._given[rows] = np.where(match >= 0, given, 0.0)
        self._found[rows] = height > self.settings.brightness * field.accepted_fraction
        self._tracker.place(rows, places, 1.0)

    def _expected(self, region_ang: Array, pixel_ang: Array, seconds: Array) -> tuple[Array, Array, Array]:
        """Where each site should be in the frame, (B, N, 2) pixels; seconds since its row; whether inside."""
        sites = self._tracker.mean[:, :, :-1].transpose(0, 2, 1)  # (B, N, 2)
        velocity = self._tracker.mean[:, None, :, -1]
        age_s = np.zeros(sites.shape[:2])
        for _ in range(2):  # the row depends on the place, the place on the row's time
            then = sites - velocity * age_s[..., None]
            down = ((then[..., 1] - region_ang[:, 1:2]) / region_ang[:, 3:4]).clip(0.0, 1.0)
            age_s = seconds[:, None] * (1.0 - down)
        pixels = (then - region_ang[:, None, :2]) / pixel_ang[:, None, None] - 0.5
        inside = ((then > region_ang[:, None, :2]) & (then < region_ang[:, None, :2] + region_ang[:, None, 2:])).all(-1)
        return pixels, age_s, inside & self._found

    def _measure(self, seen: Array, places_ang: Array, age_s: Array, pixel_ang: Array) -> None:
        """Give the filter what was seen, unless it is too far from where it can be."""
        settings, tracker = self.settings, self._tracker
        sigma_ang = np.hypot(settings.scan_sigma_ang, settings.pixel_sigma * pixel_ang)
        accepted = np.zeros_like(seen)
        for site in range(seen.shape[1]):
            spread = np.sqrt(np.maximum(tracker.covariance[:, 0, site, site], tracker.covariance[:, 1, site, site]))
            there = tracker.mean[:, :, site] - tracker.mean[:, :, -1] * age_s[:, site, None]
            jump = np.linalg.norm(places_ang[:, site] - there, axis=1)
            accepted[:, site] = seen[:, site] & (jump < 0.5 + 3.0 * spread)
            tracker.measure(site, age_s[:, site], places_ang[:, site], sigma_ang, accepted[:, site])
        rows = np.arange(len(seen))
        shown = accepted[rows, self._target]
        scanned = self._kind > 0
        self._missed = np.where(shown, 0, np.where(scanned, self._missed + 1, self._missed))
        tracker.doubt(np.where(scanned & ~shown, 0.5, 0.0))

    # What to do next

    def _missing(self) -> Array:
        """(B,) what the target still needs; where all seem served but the episode goes on, a little more."""
        given = self._given[np.arange(len(self._target)), self._target]
        missing: Array = 1.0 + self.settings.margin - given
        return np.where(missing > 0.5 * self.settings.margin, missing, 0.1)

    def _decide(self) -> Array:
        settings, field = self.settings, self.field
        self._choose_target()
        rate = np.where(self._rate > 0.0, self._rate, settings.current_pa * ELECTRONS_PER_PC / field.wanted_electrons)
        rows = np.arange(len(rate))
        _, now_ang = self._tracker.predict(self._target, np.zeros(len(rows)))
        stay_s = np.minimum(self._longest_stay_s(), self._missing() / rate).clip(field.dwell_min_s, field.dwell_max_s)
        place, later_ang = self._tracker.predict(self._target, 0.5 * stay_s)
        self._hit = _share_within(later_ang, self._tracker.speed_ang_per_s * stay_s, field.radius_ang)
        # Far more given than wanted, and the episode goes on: some of it went to what was no target.
        wrong = (self._given > 1.3).all(1)
        self._given[wrong] = 0.0
        lost = (self._missed >= 2) | ~self._found[rows, self._target] | wrong
        look = lost | (now_ang > settings.trust_sigma_ang)
        side = np.where(lost, field.fov_ang, settings.scan_side_ang + 6.0 * now_ang).clip(
            field.scan_side_min_ang, field.fov_ang
        )
        pixel_s = np.where(lost, field.pixel_dwell_max_s, settings.scan_pixel_dwell_s)
        scan_place, _ = self._tracker.predict(self._target, 0.05 + 0.5 * pixel_s * field.pixels**2)
        scan_place = np.where(lost[:, None], 0.5 * field.fov_ang, scan_place)
        scan = field.scan(scan_place / field.fov_ang, side, pixel_s)
        stay = field.stay(place / field.fov_ang, stay_s)
        # A frame that is taken because nothing was found, or all was lost, opens the search anew.
        self._kind = np.where(look, np.where(lost, 0.0, 1.0), -1.0)
        self._missed[lost] = 0
        self._tries[lost & (self._tries >= settings.tries)] = 0
        self._planned_s = np.where(look, 0.05 + pixel_s * field.pixels**2, stay_s)
        return np.where(look[:, None], scan, stay)

    def _choose_target(self) -> None:
        """Stay with a target until it has what was wanted; then the nearest of those that have not."""
        rows = np.arange(len(self._target))
        sites = self._tracker.mean[:, :, :-1].transpose(0, 2, 1)
        reachable = self._found & ((sites > 0.0) & (sites < self.field.fov_ang)).all(-1)
        open_ = reachable & (self._given < 1.0 + 0.5 * self.settings.margin)
        away = np.linalg.norm(sites - sites[rows, self._target][:, None], axis=-1)
        # Where all seem served but the episode goes on, the own account is wrong: give more to the least served.
        key = np.where(open_.any(1)[:, None], np.where(open_, away, np.inf), np.where(reachable, self._given, np.inf))
        wanted = key.argmin(1)
        stays = open_[rows, self._target]
        self._target = np.where(stays | ~reachable.any(1), self._target, wanted)

    def _longest_stay_s(self) -> Array:
        """(B,) how long the target stays near the middle of its path: drift and doubt fill a part of the radius."""
        room = self.settings.radius_used * self.field.radius_ang
        longest = np.full(len(self._target), self.field.dwell_min_s)
        for stay_s in np.geomspace(self.field.dwell_min_s, self.field.dwell_max_s, 12):
            half = np.full(len(longest), 0.5 * stay_s)
            _, sigma = self._tracker.predict(self._target, 2.0 * half)
            fits = self._tracker.speed_ang_per_s * half + 1.3 * sigma < room
            longest = np.where(fits, stay_s, longest)
        return longest


def _share_within(sigma_ang: Array, path_ang: Array, radius_ang: float) -> Array:
    """(B,) part of a dwell within `radius_ang`, for a Gaussian doubt on each axis and a path through the middle.

    Rayleigh's distribution, the path's own spread (a uniform one, on two axes) added to the variance.
    """
    variance = sigma_ang**2 + path_ang**2 / 24.0
    share: Array = 1.0 - np.exp(-0.5 * radius_ang**2 / np.maximum(variance, 1e-6))
    return share


POLICY = LockOn
