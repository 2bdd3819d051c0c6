"""The encoder of the spectrum surrogate: what a HAADF image tells about each of its cells.

The same small network reads the 17 × 17 pixels around every cell, as one convolution of the whole image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["REACH", "PatchEncoder", "standardised"]

_DILATIONS = (1, 1, 2, 4)
REACH = sum(_DILATIONS)  # pixels on each side of a cell that matter
_LEAST_CONTRAST = 1e-3  # of the mean; a flatter image than this is noise
_BRIGHTEST = 6.0  # standard deviations; one hot pixel does not rule the features of its neighbours

_FIRST_GAIN, _FIRST_SPREAD = 1.0, 5.0  # features are compared with lengths near 1


def standardised(image: Tensor) -> Tensor:
    """Images (B, H, W) less their mean, over their standard deviation; unit and offset of the detector drop out."""
    mean = image.mean((1, 2), keepdim=True)
    spread = image.std((1, 2), keepdim=True, correction=0)
    scale = torch.maximum(spread, _LEAST_CONTRAST * mean.abs()).clamp(min=torch.finfo(image.dtype).tiny)
    return ((image - mean) / scale).clamp(-_BRIGHTEST, _BRIGHTEST)


class PatchEncoder(nn.Module):
    """Features of every cell from the standardised image around it; the border is reflected.

    The first feature is the cell's own brightness, so that what is learned comes on top of it.
    """

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        before = (1, *(width,) * (len(_DILATIONS) - 1))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(count, width, 3, dilation=dilation) for count, dilation in zip(before, _DILATIONS, strict=True)
        )
        self.mix, self.last = nn.Conv2d(width, width, 1), nn.Conv2d(width, features - 1, 1)
        self.gain = nn.Parameter(torch.tensor(_FIRST_GAIN))
        with torch.no_grad():
            self.last.weight.mul_(_FIRST_SPREAD)

    def forward(self, image: Tensor) -> Tensor:
        """Standardised images (B, H, W), each side longer than `REACH`, to features (B, H*W, features)."""
        seen = nn.functional.pad(image[:, None], (REACH,) * 4, mode="reflect")
        for convolution in self.convolutions:
            seen = nn.functional.silu(convolution(seen))
        learned = self.last(nn.functional.silu(self.mix(seen))).flatten(2)
        return torch.cat((self.gain * image.flatten(1)[:, None], learned), dim=1).mT
