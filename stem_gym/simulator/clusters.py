"""Random clusters of spheres on a plane, by the batch, with no loop over rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stem_gym.simulator.placement import count_between

CANDIDATES = 16  # places tried for each sphere; the first that is free is taken


@dataclass(frozen=True)
class ClusterPlan:
    """What is to be placed, the same for every row: how many, how large, how far apart."""

    clusters: tuple[int, int]  # fewest and most
    spheres: tuple[int, int]  # of a cluster
    isolated: tuple[int, int]  # spheres by themselves
    radius_nm: tuple[float, float]  # smallest and largest
    gap_nm: tuple[float, float]  # between the surfaces of neighbours in a cluster, seen from above
    isolation_nm: float  # least gap around a sphere by itself and between clusters

    @property
    def slots(self) -> int:
        """The most spheres that there can be."""
        return self.clusters[1] * self.spheres[1] + self.isolated[1]

    @property
    def draws(self) -> int:
        """Uniforms that `place_spheres` takes for each row."""
        return 1 + self.clusters[1] + 1 + self.slots * (2 + 2 * CANDIDATES)


def place_spheres(uniform: Tensor, plan: ClusterPlan, field_nm: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Centres (n, slots, 2) and radii (n, slots) of spheres that do not overlap; a radius of 0 is no sphere.

    `uniform` (n, plan.draws) in (0, 1), the field's sides (x, y). Clusters grow: each sphere stands a gap away from a
    random one before it, in a random direction, whole inside the field and clear of all others. A sphere for which none
    of its candidate places is free is left out, so a crowded field holds fewer than were drawn.
    """
    rows, most, each = len(uniform), plan.clusters[1], plan.spheres[1]
    wanted = torch.cat((_members(uniform[:, : most + 1], plan), _alone(uniform[:, most + 1], plan)), dim=1)
    rest = uniform[:, most + 2 :].reshape(rows, plan.slots, 2 + 2 * CANDIDATES)
    size, gap = (low + (high - low) * rest[..., i] for i, (low, high) in enumerate((plan.radius_nm, plan.gap_nm)))
    first, second = rest[..., 2:].reshape(rows, plan.slots, 2, CANDIDATES).unbind(2)
    centre, radius = uniform.new_zeros((rows, plan.slots, 2)), uniform.new_zeros((rows, plan.slots))
    sides = uniform.new_tensor(field_nm)
    for slot in range(plan.slots):
        start = slot - slot % each if slot < most * each else slot
        here, clear = size[:, slot, None], torch.full_like(centre[:, :, 0], plan.isolation_nm)
        if slot == start:
            places = _anywhere(first[:, slot], second[:, slot], here, sides, central=slot < most * each)
            good = torch.ones_like(first[:, slot], dtype=torch.bool)
        else:
            group = (centre[:, start:slot], radius[:, start:slot])
            places, good = _beside(group, first[:, slot], second[:, slot], here + gap[:, slot, None])
            clear[:, start:slot] = plan.gap_nm[0]
        apart = (places[:, :, None] - centre[:, None]).norm(dim=-1)
        # Less a thousandth: a neighbour at the smallest gap from its own parent is not lost to rounding.
        near = (apart < radius[:, None] + here[..., None] + clear[:, None] - 1e-3) & (radius[:, None] > 0.0)
        inside = ((places >= here[..., None]) & (places <= sides - here[..., None])).all(-1)
        good = good & inside & ~near.any(-1)
        choice = good.to(torch.int8).argmax(dim=1)
        placed = places.gather(1, choice[:, None, None].expand(-1, 1, 2))[:, 0]
        there = good.any(1) & wanted[:, slot]
        centre[:, slot] = torch.where(there[:, None], placed, 0.0)
        radius[:, slot] = torch.where(there, size[:, slot], 0.0)
    return centre, radius


def _members(uniform: Tensor, plan: ClusterPlan) -> Tensor:
    """Which slots of the clusters are used, (n, clusters · spheres); uniforms (n, clusters + 1)."""
    number = torch.arange(plan.clusters[1], device=uniform.device) < count_between(uniform[:, :1], *plan.clusters)
    filled = count_between(uniform[:, 1:], *plan.spheres)[..., None]
    used = torch.arange(plan.spheres[1], device=uniform.device) < filled
    return (used & number[..., None]).flatten(1)


def _alone(uniform: Tensor, plan: ClusterPlan) -> Tensor:
    """Which slots of isolated spheres are used, (n, isolated); uniforms (n,)."""
    return torch.arange(plan.isolated[1], device=uniform.device) < count_between(uniform, *plan.isolated)[:, None]


def _anywhere(first: Tensor, second: Tensor, radius: Tensor, sides: Tensor, central: bool) -> Tensor:
    """Places (n, T, 2) in the field, or in its middle half where there must be room to grow."""
    unit = torch.stack((first, second), dim=-1)
    if central:
        return sides * (0.25 + 0.5 * unit)
    return radius[..., None] + (sides - 2.0 * radius[..., None]) * unit


def _beside(group: tuple[Tensor, Tensor], which: Tensor, turn: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Places (n, T, 2) at a distance of `reach` (n, 1) from the surface of a random sphere of the group, if it is."""
    centre, radius = group
    parent = torch.floor(which * centre.shape[1]).to(torch.int64).clamp(max=centre.shape[1] - 1)
    size = radius.gather(1, parent)
    angle = 2.0 * math.pi * turn
    step = torch.stack((torch.cos(angle), torch.sin(angle)), dim=-1) * (size + reach)[..., None]
    return centre.gather(1, parent[..., None].expand(-1, -1, 2)) + step, size > 0.0
