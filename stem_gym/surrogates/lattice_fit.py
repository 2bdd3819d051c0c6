"""The graphene lattice from found atoms: orientation, spacing and offset, and which site an atom stands on.

The three shortest reciprocal vectors of a honeycomb see every atom in the same phase. Their structure factors, summed
over the atoms near the middle of the frame, give orientation and spacing on a grid; their phases the offset. Sites are
then assigned and an affine lattice fitted by least squares, from the middle outwards, so that scan errors and the skew
of a steady drift are part of the fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stem_gym.core.errors import ConfigError

__all__ = ["Lattice", "fit_lattice"]

GRAPHENE_ANG = 2.46
_SPACINGS = 5  # tried between −6 and 6 %
_SPREAD = 0.06
_ANGLES = 40  # tried in 60°
_CORE_ANG = 6.0  # rms radius of what the first guess is made from
_ROUNDS_ANG = (5.0, 7.0, 10.0, 14.0, 20.0, 40.0)  # half side of what each round of the fit takes in
_NEAR_ANG = 0.5  # an atom farther than this from its site takes no part
_LEAST_ATOMS = 6


@dataclass(frozen=True)
class Lattice:
    """Honeycomb lattices of B rows: sites at origin + n1 a1 + n2 a2 ± (a1 + a2) / 3."""

    origin_ang: Tensor  # (B, 2) the middle of a hexagon, (x, y)
    vectors_ang: Tensor  # (B, 2, 2) a1 and a2, one a row, 60° apart but for distortions
    rms_ang: Tensor  # (B,) distance in the plane of the atoms that took part from their sites
    share: Tensor  # (B,) of the atoms took part
    found: Tensor  # (B,) bool: more than half of the atoms took part, and enough of them

    @property
    def spacing_ang(self) -> Tensor:
        """(B,) lattice constant: root of the cell's area over that of a rhombus of side 1."""
        (ax, ay), (bx, by) = (v.unbind(-1) for v in self.vectors_ang.unbind(1))
        return torch.sqrt((ax * by - ay * bx).abs() * (2.0 / math.sqrt(3.0)))

    @property
    def orientation_rad(self) -> Tensor:
        """(B,) angle from x to a lattice vector, the mean of both, between 0 and 60°."""
        first, second = (torch.atan2(v[:, 1], v[:, 0]) for v in self.vectors_ang.unbind(1))
        sixth = math.pi / 3.0
        turn = torch.stack((first, second - sixth), dim=1)
        mean = torch.atan2(torch.sin(6.0 * turn).mean(1), torch.cos(6.0 * turn).mean(1)) / 6.0
        return torch.remainder(mean, sixth)

    def sites(self, xy_ang: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest sites of places (B, N, 2): their indices (n1, n2, s), (B, N, 3) int64, and places (B, N, 2)."""
        reduced = (xy_ang - self.origin_ang[:, None]) @ torch.linalg.inv(self.vectors_ang)
        options = []
        for sign in (1.0, -1.0):
            cell = torch.round(reduced - sign / 3.0)
            options.append((cell, cell + sign / 3.0))
        # The nearest cell on skewed axes is not always the nearest site, so that its neighbours are looked at too.
        steps = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).to(xy_ang)
        index = torch.cat([c[..., None, :] + steps for c, _ in options], dim=-2)  # (B, N, 18, 2)
        place = torch.cat([p[..., None, :] + steps for _, p in options], dim=-2)
        place = place @ self.vectors_ang[:, None] + self.origin_ang[:, None, None]
        best = (place - xy_ang[..., None, :]).square().sum(-1).argmin(-1)  # (B, N)
        chosen = best[..., None, None].expand(-1, -1, 1, 2)
        cell = index.gather(2, chosen)[:, :, 0].long()
        second = (best >= len(steps)).long()
        return torch.cat((cell, second[..., None]), dim=-1), place.gather(2, chosen)[:, :, 0]

    def places(self, index: Tensor) -> Tensor:
        """Places (B, N, 2) in Å of sites (B, N, 3)."""
        sign = 1.0 - 2.0 * index[..., 2:].to(self.origin_ang)
        return (index[..., :2] + sign / 3.0) @ self.vectors_ang + self.origin_ang[:, None]


def fit_lattice(xy_ang: Tensor, present: Tensor, spacing_ang: float = GRAPHENE_ANG) -> Lattice:
    """The lattices on which atoms (B, N, 2) stand, those that are `present` (B, N). Not differentiable.

    `spacing_ang` is the expected lattice constant, right to 5 %. A row in which no lattice is found says so in `found`.
    Raises ConfigError for shapes that do not belong together and places that are not finite.
    """
    if xy_ang.dim() != 3 or xy_ang.shape[2] != 2 or present.shape != xy_ang.shape[:2] or present.dtype != torch.bool:
        raise ConfigError(
            "Atoms are places (B, N, 2) and a bool (B, N) that says which are present; given "
            f"{tuple(xy_ang.shape)} and {present.dtype} {tuple(present.shape)}."
        )
    if not bool(torch.isfinite(xy_ang[present]).all()) or not spacing_ang > 0.0:
        raise ConfigError(f"Places must be finite and the spacing positive; given a spacing of {spacing_ang}.")
    with torch.inference_mode():
        weight = present.to(xy_ang.dtype)
        xy = torch.where(present[..., None], xy_ang, 0.0)
        middle = (xy * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1.0)
        lattice = _first_guess(xy - middle[:, None], weight, spacing_ang)
        for reach in _ROUNDS_ANG:
            lattice = _refined(lattice, xy - middle[:, None], weight, reach)
        return Lattice(lattice.origin_ang + middle, lattice.vectors_ang, lattice.rms_ang, lattice.share, lattice.found)


def _first_guess(xy_ang: Tensor, weight: Tensor, spacing_ang: float) -> Lattice:
    """Orientation and spacing of the largest structure factor, offset from its phases."""
    core = weight * torch.exp(-0.5 * xy_ang.square().sum(-1) / _CORE_ANG**2)
    angle = torch.arange(_ANGLES) * (math.pi / 3.0 / _ANGLES)
    factor = torch.linspace(1.0 - _SPREAD, 1.0 + _SPREAD, _SPACINGS)
    tried = torch.cartesian_prod(angle, spacing_ang * factor).to(xy_ang)  # (T, 2)
    vectors = _hexagonal(tried[:, 0], tried[:, 1])  # (T, 2, 2)
    reciprocal = 2.0 * math.pi * torch.linalg.inv(vectors).transpose(1, 2)  # (T, 2, 2) b1 and b2, one a row
    third = reciprocal[:, :1] + reciprocal[:, 1:]  # b1 and b2 are 120° apart, so their sum is as short
    waves = torch.cat((reciprocal, third), dim=1)  # (T, 3, 2)
    phase = torch.einsum("bnc,tkc->btkn", xy_ang, waves)
    real, imaginary = (f(phase) @ core[:, None, :, None] for f in (torch.cos, torch.sin))
    power = (real.square() + imaginary.square())[..., 0].sum(2)  # (B, T)
    best = power.argmax(1)
    rows = torch.arange(len(xy_ang), device=xy_ang.device)
    chosen = vectors[best]
    # Two atoms at ± (a1 + a2) / 3 about the origin scatter with phase π: 2 cos(2π / 3) = −1.
    turn = torch.atan2(imaginary, real)[rows, best, :2, 0] - math.pi  # (B, 2)
    origin = (turn[:, None] / (2.0 * math.pi) @ chosen)[:, 0]
    zero = torch.zeros(len(xy_ang)).to(xy_ang)
    return Lattice(origin, chosen, zero, zero, zero > 0.0)


def _hexagonal(angle_rad: Tensor, spacing_ang: Tensor) -> Tensor:
    """Lattice vectors (T, 2, 2) 60° apart, one a row."""
    turns = torch.stack((angle_rad, angle_rad + math.pi / 3.0), dim=1)
    return torch.stack((torch.cos(turns), torch.sin(turns)), dim=2) * spacing_ang[:, None, None]


def _refined(lattice: Lattice, xy_ang: Tensor, weight: Tensor, reach_ang: float) -> Lattice:
    """The affine lattice nearest to the atoms within `reach_ang` of the middle, each on the site that it has now."""
    index, place = lattice.sites(xy_ang)
    away = (place - xy_ang).norm(dim=-1)
    takes_part = weight * (away < _NEAR_ANG) * (xy_ang.abs().amax(-1) < reach_ang)
    sign = 1.0 - 2.0 * index[..., 2:].to(xy_ang)
    known = torch.cat((index[..., :2] + sign / 3.0, torch.ones_like(sign)), dim=-1)  # (B, N, 3)
    weighted = known * takes_part[..., None]
    normal = weighted.transpose(1, 2) @ known + 1e-6 * torch.eye(3).to(xy_ang)
    fitted = torch.linalg.solve(normal, weighted.transpose(1, 2) @ xy_ang)  # (B, 3, 2): a1, a2, origin
    enough = takes_part.sum(1) >= _LEAST_ATOMS
    fitted = torch.where(
        enough[:, None, None], fitted, torch.cat((lattice.vectors_ang, lattice.origin_ang[:, None]), dim=1)
    )
    square = ((known @ fitted - xy_ang).square().sum(-1) * takes_part).sum(1) / takes_part.sum(1).clamp(min=1.0)
    within = (weight * (xy_ang.abs().amax(-1) < reach_ang)).sum(1)
    share = takes_part.sum(1) / within.clamp(min=1.0)
    return Lattice(fitted[:, 2], fitted[:, :2], square.sqrt(), share, enough & (share > 0.5))
