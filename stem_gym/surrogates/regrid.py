"""Frames of any pixel on one canvas of one pixel, so that what looks at them sees atoms of one size.

Each side is resampled by Keys' cubic convolution (IEEE Trans. Acoust. Speech Signal Process. 29, 1153, 1981), widened
to the coarser of the two pixels so that fine pixels are averaged and no electron is thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CANVAS_PIXEL_ANG", "Canvas", "canvas_size", "on_canvas"]

CANVAS_PIXEL_ANG = 0.375  # finer than half the probe and than Nyquist's pixel of a usual source


@dataclass(frozen=True)
class Canvas:
    """Frames side by side on canvases of one size; a frame fills the top left part of its own, the rest is zero."""

    image: Tensor  # (B, h, w)
    mask: Tensor  # (B, h, w) 1 inside the frame
    scale: Tensor  # (B, 2) pixels of the frame per pixel of the canvas, (x, y)

    def to_frame(self, xy: Tensor) -> Tensor:
        """Places on the canvas (B, N, 2) as pixels of the frame."""
        return (xy + 0.5) * self.scale[:, None] - 0.5

    def from_frame(self, xy: Tensor) -> Tensor:
        """Pixels of the frame (B, N, 2) as places on the canvas."""
        return (xy + 0.5) / self.scale[:, None] - 0.5


def canvas_size(pixels: int, pixel_ang: Tensor, canvas_pixel_ang: float = CANVAS_PIXEL_ANG) -> Tensor:
    """How many canvas pixels (B,) a side fills: a whole number, so the canvas pixel varies a little from row to row."""
    return torch.round(pixels * pixel_ang / canvas_pixel_ang).clamp(min=1).long()


def on_canvas(
    image: Tensor, pixel_ang: Tensor, multiple: int = 1, canvas_pixel_ang: float = CANVAS_PIXEL_ANG
) -> Canvas:
    """Frames (B, H, W) of pixels (B,) Å on canvases whose sides are multiples of `multiple`."""
    height, width = image.shape[1:]
    filled_y, filled_x = (canvas_size(side, pixel_ang, canvas_pixel_ang) for side in (height, width))
    rows, mask_y = _resampling(height, filled_y, multiple)
    columns, mask_x = _resampling(width, filled_x, multiple)
    resampled = rows @ image.to(torch.float32) @ columns.transpose(1, 2)
    scale = torch.stack((width / filled_x, height / filled_y), dim=1)
    return Canvas(resampled, mask_y[:, :, None] * mask_x[:, None, :], scale)


def _resampling(pixels: int, filled: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Weights (B, n, pixels) that fill the first `filled` (B,) of n canvas pixels, and which those are (B, n)."""
    size = -(-int(filled.max()) // multiple) * multiple
    step = (pixels / filled)[:, None]  # (B, 1) of old pixels to a new one
    target = torch.arange(size, device=filled.device)
    centre = (target + 0.5) * step - 0.5  # (B, n)
    source = torch.arange(pixels, device=filled.device)
    weight = _keys((source - centre[..., None]) / step.clamp(min=1.0)[..., None])
    inside = (target < filled[:, None]).float()
    return weight / weight.sum(2, keepdim=True).clamp(min=1e-6) * inside[..., None], inside


def _keys(distance: Tensor) -> Tensor:
    """Keys' cubic kernel with a = −1/2."""
    d = distance.abs()
    near = (1.5 * d - 2.5) * d * d + 1.0
    far = ((-0.5 * d + 2.5) * d - 4.0) * d + 2.0
    return torch.where(d < 1.0, near, torch.where(d < 2.0, far, torch.zeros_like(d)))
