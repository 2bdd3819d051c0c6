"""What an operator's software makes of a frame, by the errors that it has: found dopants, bonds, the sample's shift.

The errors are settings; `benchmarks/perception.py` measures those of the finders that ship.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from stem_gym.core.config import Config
from stem_gym.core.periodic import nearest_image
from stem_gym.core.streams import Streams
from stem_gym.simulator.sheet import Beside


@dataclass(frozen=True)
class View:
    """The frame of n rows that has just ended."""

    cell_ang: Tensor  # (n, 2)
    fov_ang: Tensor  # (n,)
    region: Tensor  # (n, 4)
    dose_e_per_ang2: Tensor  # (n,)
    offset_ang: Tensor  # (n, 2) displacement of the sample at its end
    seen_ang: Tensor  # (n, 2) and at the end of the frame before


class Finder(Config):
    """The errors of the software that finds atoms; position errors fall with the root of the dose."""

    position_sd_ang: float = Field(default=0.05, ge=0, le=1)
    """of a dopant's place on each axis, in a frame of `reference_dose`"""
    shift_sd_ang: float = Field(default=0.03, ge=0, le=1)
    """of the shift between two frames on each axis, likewise"""
    bond_sd_ang: float = Field(default=0.02, ge=0, le=0.5)
    """of the bond vectors of the lattice fit, likewise"""
    reference_dose: float = Field(default=8.0e5, gt=0)
    """e/Å² of a frame at 40 pA, 2 s and 25 Å"""
    missed: float = Field(default=0.0, ge=0, lt=1)
    """share of dopants that a frame does not show"""
    spurious: float = Field(default=0.0, ge=0, lt=1)
    """share of places that are anywhere in the frame instead"""

    def find(self, near: Beside, there: Tensor, view: View, streams: Streams, rows: Tensor) -> dict[str, Tensor]:
        """Readings of `rows` (n,): `atoms` (n, D, 2) in fractions of the frame, `bonds_ang` (n, D, 3, 2), `shift_ang`.

        Sorted along x; NaN for what is not there, not in the frame, or missed.
        """
        n, slots = there.shape
        blur = (self.reference_dose / view.dose_e_per_ang2).sqrt().view(-1, 1, 1)
        noise = streams.normal(rows, (slots + slots * 3 + 1, 2))
        place = nearest_image(near.dopant_ang + view.offset_ang.unsqueeze(1), view.cell_ang.unsqueeze(1))
        place = (place + self.position_sd_ang * blur * noise[:, :slots]) / view.fov_ang.view(-1, 1, 1) + 0.5
        corner, size = view.region.unsqueeze(1).split(2, dim=2)
        if self.missed > 0.0 or self.spurious > 0.0:
            uniform = streams.uniform(rows, (slots, 4))
            place = torch.where(uniform[..., :1] < self.spurious, corner + size * uniform[..., 2:], place)
            place = place.masked_fill(uniform[..., 1:2] < self.missed, torch.nan)
        seen = ((place >= corner) & (place <= corner + size)).all(-1) & there
        unseen = ~seen.unsqueeze(-1)
        place = place.masked_fill(unseen, torch.nan)
        bond_noise = noise[:, slots:-1].reshape(n, slots, 3, 2)
        bond = near.bond_ang + self.bond_sd_ang * blur.unsqueeze(-1) * bond_noise
        bond = bond.masked_fill(unseen.unsqueeze(-1), torch.nan)
        if slots > 1:
            order = place[..., 0].nan_to_num(nan=9.0).argsort(dim=1)
            place = place.gather(1, order.unsqueeze(-1).expand(-1, -1, 2))
            bond = bond.gather(1, order[..., None, None].expand(-1, -1, 3, 2))
        shift = view.offset_ang - view.seen_ang + self.shift_sd_ang * blur[:, 0] * noise[:, -1]
        return {"atoms": place, "bonds_ang": bond, "shift_ang": shift}
