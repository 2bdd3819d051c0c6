"""Pictures of a switched domain: a disc of the other phase with a soft wall, as a phase-contrast frame shows it."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from stem_gym.core.config import Config

PHASE = "phase"  # the detector that shows domains


class DomainPicture(Config):
    """How domains are pictured."""

    wall_nm: float = Field(15.0, gt=0)
    """half width of the domain wall"""
    jitter_nm: float = Field(10.0, ge=0)
    """standard deviation of the domain's middle about the tip, along each axis"""
    noise: float = Field(0.08, ge=0)
    """standard deviation of a pixel, in units of the contrast"""


def domain_pictures(
    radius_nm: Tensor, middle_nm: Tensor, fov_nm: Tensor, shape: tuple[int, int], picture: DomainPicture
) -> Tensor:
    """Contrast (n, H, W), 0 outside and 1 inside, of discs of radii (n,) in square fields of sides (n,).

    The middles (n, 2) are told from the field's own. A pixel is the mean over a 3 × 3 grid of points in it, since a
    domain may be smaller than one. The wall is a hyperbolic tangent, (1 + tanh((r − ρ)/w))/2 (R. C. Miller and
    A. Savage, Phys. Rev. 115, 1176, 1959).
    """
    y, x = (_places(pixels, fov_nm) for pixels in shape)  # (n, 3 H), (n, 3 W)
    x, y = x - middle_nm[:, :1], y - middle_nm[:, 1:]
    away = (x.square().unsqueeze(1) + y.square().unsqueeze(2)).sqrt()
    wall = torch.minimum(torch.full_like(radius_nm, picture.wall_nm), 0.5 * radius_nm.clamp(min=1e-3))
    inside = 0.5 * (1.0 + torch.tanh((radius_nm[:, None, None] - away) / wall[:, None, None]))
    inside = inside * (radius_nm > 0.0)[:, None, None]
    return torch.nn.functional.avg_pool2d(inside.unsqueeze(1), 3).squeeze(1)


def _places(pixels: int, fov_nm: Tensor) -> Tensor:
    """Three places in each pixel of a side, from the field's middle, (n, 3 pixels)."""
    count = 3 * pixels
    part = (torch.arange(count, dtype=fov_nm.dtype, device=fov_nm.device) + 0.5) / count - 0.5
    return part * fov_nm.unsqueeze(1)
