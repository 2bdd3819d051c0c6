"""The size of a domain from its picture, as an operator's script would measure it: by the area that has switched.

Pixels far from the domain add noise and no signal. So the area is summed inside circles about the field's middle, and
the smallest circle counts that leaves a margin around the domain it holds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MARGIN = 2.0  # pixels between a domain and the circle that its area is summed in
_SMALLEST = 4.0  # pixels, radius of the first circle


def domain_radius_nm(images: Tensor, fov_nm: float) -> Tensor:
    """Radii (n,) of the domains in pictures (n, H, W) of contrast 0 outside to 1 inside, about the field's middle.

    0 where noise makes the area negative. A domain that fills the field is told to be about as large as that.
    """
    size = images.shape[-1]
    pixel_nm = fov_nm / size
    at = torch.arange(size, dtype=images.dtype, device=images.device) + 0.5 - 0.5 * size
    away = (at.square().unsqueeze(0) + at.square().unsqueeze(1)).sqrt()  # (H, W) pixels
    reach = 0.5 * size * math.sqrt(2.0)
    circles = torch.arange(_SMALLEST, reach + 1.0, dtype=images.dtype, device=images.device)  # (K,)
    inside = (away < circles[:, None, None]).to(images.dtype)
    area = torch.einsum("nhw,khw->nk", images, inside)  # pixels
    radius = (area.clamp(min=0.0) / math.pi).sqrt()
    fits = radius + _MARGIN < circles
    first = fits.to(torch.int64).argmax(1)
    chosen = torch.where(fits.any(1), first, len(circles) - 1)
    return pixel_nm * radius.gather(1, chosen.unsqueeze(1)).squeeze(1)
