"""How well a finder finds: frames with known atoms against what was found in them, counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from stem_gym.core.streams import Streams, row_seeds
from stem_gym.surrogates.atom_finder import Finder, Found, Kind, find_atoms
from stem_gym.surrogates.atom_finder_frames import Conditions, Frames, simulate_frames
from stem_gym.surrogates.spots import distances

__all__ = ["Counts", "judge", "score_finders"]

SAME_ANG = 0.7  # half a bond: what is found nearer than this to an atom is that atom
MARGIN_ANG = 0.5  # atoms nearer to the border need not be found, nor are they false


@dataclass(frozen=True)
class Counts:
    """Sums over frames for one kind; add them up, then read off the shares."""

    there: int = 0  # atoms of the kind, away from the border
    found: int = 0  # of them, found as this kind
    told: int = 0  # finds of the kind, away from the border
    false: int = 0  # of them, those where no atom of the kind is
    placed: int = 0  # pairs of an atom and its find
    square_ang2: float = 0.0  # of the distance, summed over them
    surprise: float = 0.0  # squared distance over twice the told variance, summed

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def found_share(self) -> float:
        """Share of the atoms that were found; NaN where there were none."""
        return self.found / self.there if self.there else float("nan")

    @property
    def false_share(self) -> float:
        """Share of the finds that are false; NaN where nothing was found."""
        return self.false / self.told if self.told else float("nan")

    @property
    def rms_ang(self) -> float:
        """Root mean square distance in the plane between atom and find."""
        return (self.square_ang2 / self.placed) ** 0.5 if self.placed else float("nan")

    @property
    def std_ratio(self) -> float:
        """Error over told uncertainty, rms: 1 where the uncertainty is right."""
        return (self.surprise / self.placed) ** 0.5 if self.placed else float("nan")

    def document(self) -> dict[str, Any]:
        """The figures as JSON takes them, None where there is none."""
        figures = {
            "atoms": self.there,
            "found_share": self.found_share,
            "false_share": self.false_share,
            "rms_ang": self.rms_ang,
            "std_ratio": self.std_ratio,
        }
        return {name: None if value != value else value for name, value in figures.items()}


def judge(frames: Frames, found: Found, kind: Kind) -> Counts:
    """Compare what was found of one kind with the truth.

    A find and an atom belong together where each is the other's nearest and they are within half a bond.
    """
    true, told = frames.present & (frames.kind == int(kind)), found.are(kind)
    pixel = frames.pixel_ang[:, None, None]
    away = distances(frames.xy, found.xy) * pixel  # (B, K, N) Å
    away = torch.where(true[:, :, None] & told[:, None], away, torch.inf)
    nearest_ang, partner = away.min(2)
    mutual = away.min(1).indices.gather(1, partner) == torch.arange(away.shape[1], device=away.device)
    paired = (nearest_ang < SAME_ANG) & mutual
    true_inside, told_inside = (_inside(xy, frames) for xy in (frames.xy, found.xy))
    matched = torch.zeros(told.shape, dtype=torch.int64).scatter_add_(1, partner, paired.long()) > 0
    counted = paired & true_inside
    square = nearest_ang[counted].double().square()
    std_ang = (found.std.gather(1, partner) * frames.pixel_ang[:, None])[counted].double()
    return Counts(
        there=int((true & true_inside).sum()),
        found=int(counted.sum()),
        told=int((told & told_inside).sum()),
        false=int((told & told_inside & ~matched).sum()),
        placed=int(counted.sum()),
        square_ang2=float(square.sum()),
        surprise=float((square / (2.0 * std_ang.square())).sum()),
    )


def _inside(xy: Tensor, frames: Frames) -> Tensor:
    """Which places (B, N, 2) lie in the frame, away from its border."""
    margin = (MARGIN_ANG / frames.pixel_ang)[:, None, None]
    size = torch.tensor([frames.fraction.shape[2], frames.fraction.shape[1]], device=xy.device)
    return ((xy + 0.5 > margin) & (xy + 0.5 < size - margin)).all(-1)


def score_finders(
    finders: Mapping[str, Finder], conditions: Conditions, frames: int, seed: int
) -> dict[str, dict[Kind, Counts]]:
    """Counts of finders by kind over the same `frames` fresh frames, made in batches of the conditions' rows."""
    rows = conditions.rows
    streams = Streams(row_seeds(seed, rows))
    counts = {name: {kind: Counts() for kind in Kind} for name in finders}
    for _ in range(-(-frames // rows)):
        streams.next_episode(torch.arange(rows))
        batch = simulate_frames(conditions, streams)
        for name, finder in finders.items():
            found = find_atoms(batch.fraction, batch.pixel_ang, batch.electrons_per_pixel, finder)
            counts[name] = {kind: counts[name][kind] + judge(batch, found, kind) for kind in Kind}
    return counts
