"""How many electrons an atom gets: the probe's density at a distance from its centre, tabulated for a batch.

The density is that of the actual optics, source size included, smeared by the atom's thermal motion in the plane; it is
averaged over the azimuth, which is exact for a round probe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stem_gym.simulator.optics import FWHM_PER_SIGMA, Optics, probe_intensity

STEP_ANG = 0.05
REACH_ANG = 8.0  # beyond it two electrons in a hundred are left; the density there is taken as zero
_AZIMUTHS = 8
_DEFOCUS_NODES = 25


@dataclass(frozen=True)
class FluxTable:
    """Density per electron, in 1/Å², at distances 0, STEP_ANG, …, on a ladder of defoci."""

    defocus_ang: Tensor  # (F,) ascending and evenly spaced
    density: Tensor  # (F, R)

    @classmethod
    def of(cls, optics: Optics, defocus_spread_ang: float, thermal_sigma_ang: float) -> FluxTable:
        """The table of one setting (a batch of one row) for defoci within five spreads of its own."""
        sigma = math.hypot(float(optics.source_fwhm_ang) / FWHM_PER_SIGMA, thermal_sigma_ang)
        nodes = _DEFOCUS_NODES if defocus_spread_ang > 0.0 else 1
        reach = 5.0 * defocus_spread_ang
        ladder = float(optics.defocus_ang) + torch.linspace(-reach, reach, nodes, device=optics.defocus_ang.device)
        smeared = replace(optics, source_fwhm_ang=torch.full_like(optics.source_fwhm_ang, sigma * FWHM_PER_SIGMA))
        distance = torch.arange(0.0, REACH_ANG + STEP_ANG / 2, STEP_ANG, device=ladder.device)
        angle = torch.arange(_AZIMUTHS, device=ladder.device) * (2.0 * math.pi / _AZIMUTHS) + 0.1
        offset = distance[:, None, None] * torch.stack((torch.cos(angle), torch.sin(angle)), dim=-1)
        one = smeared.rows(torch.zeros(1, dtype=torch.int64, device=ladder.device))
        density = torch.cat(
            [
                probe_intensity(replace(one, defocus_ang=defocus.reshape(1)), offset.reshape(1, -1, 2))
                for defocus in ladder
            ]
        )
        return cls(ladder, density.reshape(nodes, len(distance), _AZIMUTHS).mean(-1).clamp(min=0.0))

    def rows(self, defocus_ang: Tensor) -> Tensor:
        """The densities (B, R) at defoci (B,), straight between those of the ladder and held beyond its ends."""
        if len(self.defocus_ang) == 1:
            return self.density.repeat(len(defocus_ang), 1)
        step = self.defocus_ang[1] - self.defocus_ang[0]
        at = ((defocus_ang - self.defocus_ang[0]) / step).clamp(0.0, len(self.defocus_ang) - 1.001)
        left = at.long()
        share = (at - left).unsqueeze(1)
        return self.density[left] * (1.0 - share) + self.density[left + 1] * share


def density_at(table: Tensor, distance_ang: Tensor) -> Tensor:
    """Density (B, …) per electron, in 1/Å², at distances (B, …) from the probe of each row's `table` (B, R)."""
    at = (distance_ang / STEP_ANG).flatten(1).clamp(max=table.shape[1] - 1.001)
    left = at.long()
    low, high = table.gather(1, left), table.gather(1, left + 1)
    inside = distance_ang < REACH_ANG
    return torch.lerp(low, high, at - left).reshape(distance_ang.shape) * inside


def highest_lattice_sum(density: Tensor, bond_ang: float) -> float:
    """The most that the densities (F, R) at all atoms of a perfect honeycomb can add up to, anywhere, in 1/Å²."""
    a = bond_ang * math.sqrt(3.0)
    order = torch.arange(-8, 9, dtype=torch.float32, device=density.device)
    n, m = torch.meshgrid(order, order, indexing="ij")
    corner = torch.stack((a * (n + 0.5 * m), a * (0.5 * math.sqrt(3.0)) * m), dim=-1).reshape(-1, 2)
    atoms = torch.cat((corner, corner + torch.tensor([0.0, bond_ang], device=density.device)))
    part = torch.arange(24, device=density.device) / 24.0
    u, v = torch.meshgrid(part, part, indexing="ij")
    beam = torch.stack((a * (u + 0.5 * v), a * (0.5 * math.sqrt(3.0)) * v), dim=-1).reshape(1, -1, 1, 2)
    distance = (beam - atoms).norm(dim=-1).expand(len(density), -1, -1)  # (F, beams, atoms)
    # Between points of this grid the sum rises by less than two in a hundred.
    return 1.02 * float(density_at(density, distance).sum(-1).max())
