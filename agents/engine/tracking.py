"""Where the sites are while the sample drifts: a Kalman filter of all sites and their common velocity, row by row.

State on each axis: the places of N sites and one velocity, since the sample is rigid. Velocity is an Ornstein and
Uhlenbeck process, a random walk is added (R. E. Kalman, J. Basic Eng. 82, 35, 1960). Batched: no loop over rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agents.policy import Array

UNKNOWN_ANG = 50.0  # standard deviation of a place that was never seen


@dataclass(frozen=True)
class DriftPrior:
    """What is expected of the drift before any of it was seen."""

    speed_ang_per_s: float  # root mean square
    correlation_s: float
    diffusion_ang2_per_s: float


class SiteTracker:
    """Means and covariances of B rows; lengths in Å of the reference frame."""

    def __init__(self, rows: int, sites: int, prior: DriftPrior) -> None:
        self.prior = prior
        self.mean = np.zeros((rows, 2, sites + 1))  # x or y of each site, then the velocity
        self.covariance = np.zeros((rows, 2, sites + 1, sites + 1))

    def reset(self, rows: Array) -> None:
        """Forget `rows` (n,)."""
        sites = self.mean.shape[2] - 1
        self.mean[rows] = 0.0
        variance = np.full(sites + 1, UNKNOWN_ANG**2)
        variance[-1] = 0.5 * self.prior.speed_ang_per_s**2
        self.covariance[rows] = np.diag(variance)

    def place(self, rows: Array, places_ang: Array, sigma_ang: float) -> None:
        """Put the sites of `rows` (n,) at `places_ang` (n, N, 2), unrelated to what was known."""
        self.mean[rows, :, :-1] = places_ang.transpose(0, 2, 1)
        sites = self.mean.shape[2] - 1
        variance = np.full(sites + 1, sigma_ang**2)
        variance[-1] = 0.5 * self.prior.speed_ang_per_s**2
        self.covariance[rows] = np.diag(variance)

    def advance(self, seconds: Array) -> None:
        """Let time pass, (B,)."""
        prior, dt = self.prior, seconds[:, None]  # (B, 1), for both axes
        kept = np.exp(-dt / prior.correlation_s)
        reach = prior.correlation_s * (1.0 - kept)  # path of a unit velocity
        transition = np.zeros_like(self.covariance)
        sites = self.mean.shape[2] - 1
        transition[..., range(sites), range(sites)] = 1.0
        transition[..., :sites, sites] = reach[..., None]
        transition[..., sites, sites] = kept
        self.mean = (transition @ self.mean[..., None])[..., 0]
        self.covariance = transition @ self.covariance @ transition.swapaxes(-1, -2)
        growth = prior.speed_ang_per_s**2 / prior.correlation_s  # of the velocity's variance per second and axis
        self.covariance[..., :sites, :sites] += (growth * dt**3 / 3.0 + 2.0 * prior.diffusion_ang2_per_s * dt)[
            ..., None, None
        ]
        self.covariance[..., :sites, sites] += (growth * dt**2 / 2.0)[..., None]
        self.covariance[..., sites, :sites] += (growth * dt**2 / 2.0)[..., None]
        self.covariance[..., sites, sites] += growth * dt

    def measure(self, site: int, age_s: Array, places_ang: Array, sigma_ang: Array, seen: Array) -> None:
        """Site `site` was at `places_ang` (B, 2) `age_s` (B,) ago, known to `sigma_ang` (B,), in rows `seen` (B,)."""
        row_vector = np.zeros((len(age_s), 1, self.mean.shape[2]))
        row_vector[:, 0, site] = 1.0
        row_vector[:, 0, -1] = -age_s
        expected = (row_vector * self.mean).sum(-1)  # (B, 2)
        along = (self.covariance * row_vector[:, :, None]).sum(-1)  # (B, 2, N + 1)
        variance = (along * row_vector).sum(-1) + sigma_ang[:, None] ** 2
        gain = np.where(seen[:, None, None], along / variance[..., None], 0.0)
        self.mean = self.mean + gain * (places_ang - expected)[..., None]
        self.covariance = self.covariance - gain[..., None] * along[..., None, :]

    def doubt(self, sigma_ang: Array) -> None:
        """All sites may have moved together by `sigma_ang` (B,) more than was thought."""
        self.covariance[..., :-1, :-1] += (sigma_ang**2)[:, None, None, None]

    def predict(self, site: Array, ahead_s: Array) -> tuple[Array, Array]:
        """Places (B, 2) of each row's `site` (B,) in `ahead_s` (B,), and their standard deviation an axis (B,)."""
        rows = np.arange(len(site))
        place = self.mean[rows, :, site] + self.mean[:, :, -1] * ahead_s[:, None]
        own = self.covariance[rows, :, site, site]
        cross, speed = self.covariance[rows, :, site, -1], self.covariance[:, :, -1, -1]
        variance = own + 2.0 * ahead_s[:, None] * cross + ahead_s[:, None] ** 2 * speed
        return place, np.sqrt(variance.max(axis=1).clip(min=0.0))

    @property
    def speed_ang_per_s(self) -> Array:
        """(B,) how fast the sample is thought to move."""
        speed: Array = np.linalg.norm(self.mean[:, :, -1], axis=1)
        return speed
