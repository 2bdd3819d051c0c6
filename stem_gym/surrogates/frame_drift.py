"""How far the sample moved between two frames: the peak of their cross-correlation, to a fraction of a pixel.

Graphene looks the same after a step of its lattice, so that the correlation of a clean sheet has many peaks. Dopants,
vacancies, edges and contamination tell them apart; where there are none the shorter way is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stem_gym.core.errors import ConfigError
from stem_gym.surrogates.regrid import on_canvas
from stem_gym.surrogates.spots import local_maxima, parabola_peak, smooth

__all__ = ["FrameDrift", "estimate_drift"]

_PIXEL_ANG = 0.2  # fine enough that parabolas tell the heights of peaks to a percent
_SMOOTH_ANG = 0.3  # rms; takes noise out and leaves the atoms
_LEAST_OVERLAP = 0.3
_PRIOR = 0.1  # what the correlation must gain for the longest shift to be believed


@dataclass(frozen=True)
class FrameDrift:
    """By how much what is seen moved from the first frame to the second."""

    shift_ang: Tensor  # (B, 2) (x, y)
    correlation: Tensor  # (B,) of the frames where they overlap, between −1 and 1


def estimate_drift(before: Tensor, after: Tensor, pixel_ang: Tensor, longest_ang: float = 5.0) -> FrameDrift:
    """The shift between frames `before` and `after` (B, H, W) of pixels (B,) Å, at most `longest_ang` on each axis.

    Raises ConfigError for shapes that differ, values that are not finite, pixels that are not positive and shifts of
    more than 70 % of the frame.
    """
    if before.dim() != 3 or before.shape != after.shape or pixel_ang.shape != before.shape[:1]:
        raise ConfigError(
            "Two frames (B, H, W) and a pixel (B,) belong together; given "
            f"{tuple(before.shape)}, {tuple(after.shape)} and {tuple(pixel_ang.shape)}."
        )
    if not bool(torch.isfinite(before).all() & torch.isfinite(after).all()) or not bool((pixel_ang > 0.0).all()):
        raise ConfigError("Frames must be finite and pixels positive.")
    field_ang = float(pixel_ang.min()) * min(before.shape[1:])
    if not 0.0 < longest_ang <= (1.0 - _LEAST_OVERLAP) * field_ang:
        raise ConfigError(
            f"A shift of up to {longest_ang} Å can not be told in a frame of {field_ang:.3g} Å; "
            f"at most {(1.0 - _LEAST_OVERLAP) * field_ang:.3g} Å."
        )
    with torch.inference_mode():
        return _estimate(before, after, pixel_ang, longest_ang)


def _estimate(before: Tensor, after: Tensor, pixel_ang: Tensor, longest_ang: float) -> FrameDrift:
    canvas, later = (on_canvas(frame, pixel_ang, canvas_pixel_ang=_PIXEL_ANG) for frame in (before, after))
    sigma = torch.full((len(before),), _SMOOTH_ANG / _PIXEL_ANG, device=before.device)
    images = [smooth(c.image, sigma) for c in (canvas, later)]
    pixel = canvas.scale * pixel_ang[:, None]  # (B, 2) Å
    reach = math.ceil(longest_ang / float(pixel.min())) + 1
    correlation = _correlation(images[0], images[1], canvas.mask, reach)  # (B, 2 reach + 1, 2 reach + 1)
    steps = torch.arange(-reach, reach + 1, device=before.device).to(before.dtype)
    x, y = steps[None, None] * pixel[:, :1, None], steps[None, :, None] * pixel[:, 1:, None]
    allowed = local_maxima(correlation, 1) & (x.abs() <= longest_ang) & (y.abs() <= longest_ang)
    height = _peak_heights(correlation)
    length = (x.square() + y.square()) / (2.0 * longest_ang**2)
    index = torch.where(allowed, height - _PRIOR * length, -2.0).flatten(1).argmax(1, keepdim=True)  # (B, 1)
    place = torch.stack((index % len(steps), index // len(steps)), dim=-1)  # (B, 1, 2)
    peak = parabola_peak(correlation, place)[:, 0]
    return FrameDrift((peak - reach) * pixel, height.flatten(1).gather(1, index)[:, 0].clamp(-1.0, 1.0))


def _peak_heights(image: Tensor) -> Tensor:
    """Heights (B, h, w) of the parabolas through each pixel and its neighbours; right at maxima alone."""
    height = image.clone()
    for inner, before, after in (
        (height[:, :, 1:-1], image[:, :, :-2], image[:, :, 2:]),
        (height[:, 1:-1], image[:, :-2], image[:, 2:]),
    ):
        centre = image[:, :, 1:-1] if inner.shape[2] < image.shape[2] else image[:, 1:-1]
        bend = (2.0 * centre - before - after).clamp(min=1e-6)
        inner += ((after - before).square() / (8.0 * bend)).clamp(max=0.2)
    return height


def _correlation(first: Tensor, second: Tensor, mask: Tensor, reach: int) -> Tensor:
    """Correlation coefficients (B, 2 reach + 1, 2 reach + 1) of what overlaps when `second` is moved back by (x, y).

    All sums over the overlap are correlations with the mask (Padfield, IEEE Trans. Image Process. 21, 2706, 2012).
    """
    height, width = first.shape[1:]
    shape = (2 * height, 2 * width)
    level = (first * mask).sum((1, 2), keepdim=True) / mask.sum((1, 2), keepdim=True)
    a, b = (first - level) * mask, (second - level) * mask

    def spectrum(image: Tensor) -> Tensor:
        return torch.fft.rfft2(image, s=shape)

    def together(left: Tensor, right: Tensor) -> Tensor:
        full = torch.fft.fftshift(torch.fft.irfft2(left.conj() * right, s=shape), dim=(1, 2))
        return full[:, height - reach : height + reach + 1, width - reach : width + reach + 1]

    there, one, two = spectrum(mask), spectrum(a), spectrum(b)
    count = together(there, there).clamp(min=1.0)
    sum_a, sum_b = together(one, there), together(there, two)
    square_a = together(spectrum(a * a), there) - sum_a.square() / count
    square_b = together(there, spectrum(b * b)) - sum_b.square() / count
    product = together(one, two) - sum_a * sum_b / count
    return product / torch.sqrt((square_a.clamp(min=0.0) * square_b.clamp(min=0.0)).clamp(min=1e-30))
