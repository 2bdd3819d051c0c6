"""Bright spots in frames: matched filter, highest maxima, and where exactly one of them stands. Batched over rows.

Places are in pixels, (x, y), the middle of the first pixel at (0, 0); images are (B, H, W) collected fractions.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["brightest", "centroids", "distances", "local_maxima", "parabola_peak", "round_maxima", "smooth"]

MATCHED = 0.8  # width of the filter over that of the probe: a little narrower, so that neighbours stay apart


def smooth(image: Tensor, sigma_pixels: Tensor) -> Tensor:
    """`image` (B, H, W) under a Gaussian of each row's own width (B,), kept at the borders."""
    height, width = image.shape[1:]
    return _window(height, sigma_pixels) @ image @ _window(width, sigma_pixels).transpose(1, 2)


def _window(size: int, sigma_pixels: Tensor) -> Tensor:
    at = torch.arange(size, dtype=torch.float32, device=sigma_pixels.device)
    weight = torch.exp(-0.5 * ((at[:, None] - at) / sigma_pixels[:, None, None]).square())  # (B, size, size)
    return weight / weight.sum(2, keepdim=True)


def distances(first: Tensor, second: Tensor) -> Tensor:
    """Distances between places (B, N, 2) and (B, M, 2): (B, N, M).

    Not by the matrix product that torch takes for long lists: it is off by hundredths of a pixel.
    """
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def local_maxima(image: Tensor, reach: int) -> Tensor:
    """Which pixels (B, H, W) are the highest of the square of 2 reach + 1 pixels around them."""
    highest = torch.nn.functional.max_pool2d(image[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0]
    return image == highest


def round_maxima(image: Tensor) -> Tensor:
    """Which pixels (B, H, W) are the highest within two pixels along x and y, the corners of that square left out.

    Two atoms 3.8 pixels apart along a diagonal may have pixels only (2, 2) apart.
    """
    wide, tall = (
        torch.nn.functional.max_pool2d(image[:, None], size, stride=1, padding=(size[0] // 2, size[1] // 2))[:, 0]
        for size in ((3, 5), (5, 3))
    )
    return image == torch.maximum(wide, tall)


def brightest(image: Tensor, sigma_pixels: float, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest maxima of the matched-filtered frames: places (B, count, 2) whole pixels, heights (B, count).

    Height is the smoothed fraction; where a frame has fewer maxima it is 0. `sigma_pixels` is the probe's rms width.
    """
    rows, width = len(image), image.shape[2]
    filtered = smooth(image, torch.full((rows,), MATCHED * sigma_pixels, device=image.device))
    reach = max(1, round(1.5 * sigma_pixels))
    peaks = torch.where(local_maxima(filtered, reach), filtered, 0.0).flatten(1)
    value, index = peaks.topk(count, dim=1)
    return torch.stack((index % width, index // width), dim=-1), value


def parabola_peak(image: Tensor, place: Tensor) -> Tensor:
    """Maxima (B, N, 2) of the parabolas along x and y through whole-pixel maxima `place` (B, N, 2) int64."""
    height, width = image.shape[1:]
    x, y = place[..., 0].clamp(1, width - 2), place[..., 1].clamp(1, height - 2)
    flat = image.flatten(1)

    def value(dx: int, dy: int) -> Tensor:
        return flat.gather(1, (y + dy) * width + x + dx)

    centre = value(0, 0)
    steps = []
    for before, after in ((value(-1, 0), value(1, 0)), (value(0, -1), value(0, 1))):
        bend = (2.0 * centre - before - after).clamp(min=1e-12)
        steps.append((0.5 * (after - before) / bend).clamp(-1.0, 1.0))
    return torch.stack((x + steps[0], y + steps[1]), dim=-1)


def centroids(image: Tensor, start: Tensor, sigma_pixels: Tensor, steps: int = 6) -> tuple[Tensor, Tensor]:
    """Sub-pixel centres of spots: (B, N, 2) pixels, and their mean height over the background (B, N).

    A Gaussian-weighted centroid, moved until it stands still, each step doubled since window and spot have the same
    width (half of the way is left otherwise). `start` (B, N, 2) pixels, `sigma_pixels` (B,).
    """
    height, width = image.shape[1:]
    background = torch.quantile(image.flatten(1), 0.3, dim=1)[:, None, None]
    signal = (image - background).clamp(min=0.0)
    centre = start.to(torch.float32)
    sigma = sigma_pixels.to(torch.float32)[:, None, None]
    x = torch.arange(width, dtype=torch.float32, device=image.device)
    y = torch.arange(height, dtype=torch.float32, device=image.device)
    mass = torch.zeros_like(centre[..., 0])
    for _ in range(steps):
        along_x = torch.exp(-0.5 * ((x - centre[:, :, :1]) / sigma).square())  # (B, N, W)
        along_y = torch.exp(-0.5 * ((y - centre[:, :, 1:]) / sigma).square())
        columns = along_y @ signal  # (B, N, W)
        mass = (columns * along_x).sum(2)
        mean_x = (columns * along_x * x).sum(2) / mass.clamp(min=1e-12)
        mean_y = ((along_y * y) @ signal * along_x).sum(2) / mass.clamp(min=1e-12)
        shift = torch.stack((mean_x, mean_y), dim=-1) - centre
        centre = centre + (2.0 * shift).clamp(-2.0 * sigma, 2.0 * sigma) * (mass > 1e-12).unsqueeze(-1)
    return centre, mass / (along_x.sum(2) * along_y.sum(2)).clamp(min=1e-12)
