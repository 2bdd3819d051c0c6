"""The convolutional network of the atom finder: a small U-Net that tells, pixel by pixel, what stands where.

A U-Net (Ronneberger, Fischer & Brox, MICCAI 2015) whose answer is read as in "Objects as points" (Zhou, Wang &
Krähenbühl, arXiv:1904.07850, 2019): a map of scores for each kind, peaked at the atoms, and at each peak the rest of
the way to the atom's place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["KINDS", "MULTIPLE", "AtomFinderNetwork", "Maps"]

KINDS = 4  # vacancy, carbon, silicon, heavy
MAPS = 3  # brightness, mask, dose
MULTIPLE = 4  # sides of the canvas must be multiples of this
_FIRST_SCORES = (-5.0, -2.5, -5.0, -6.0)  # logits of how rare each kind is, so that training starts calm


@dataclass(frozen=True)
class Maps:
    """The network's answer on the canvas."""

    score: Tensor  # (B, KINDS, h, w) logits
    offset: Tensor  # (B, 2, h, w) pixels (x, y) from here to the atom
    log_spread: Tensor  # (B, h, w) log of the mean absolute error of the offset, pixels
    log_weight: Tensor  # (B, h, w) log of the cross section over that of carbon


class _Block(nn.Module):
    """A convolution, normalised, then SiLU, zero outside the frame."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(after)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return functional.silu(self.norm(self.convolution(x))) * mask


class AtomFinderNetwork(nn.Module):
    """Three scales, each half as fine as the one before; about 20 Å around a pixel are seen.

    What lies outside a row's frame stays zero in every layer, so that a row does not feel how large the canvas is.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w1, w2, w3 = width, 2 * width, 3 * width
        self.fine = nn.ModuleList((_Block(MAPS, w1), _Block(w1, w1)))
        self.middle = nn.ModuleList((_Block(w1, w2), _Block(w2, w2)))
        self.coarse = nn.ModuleList((_Block(w2, w3), _Block(w3, w3), _Block(w3, w3)))
        self.to_middle, self.to_fine = nn.Conv2d(w3, w2, 1), nn.Conv2d(w2, w1, 1)
        self.middle_up = _Block(2 * w2, w2)
        self.fine_up = nn.ModuleList((_Block(2 * w1, w1), _Block(w1, 2 * w1)))
        self.last = nn.Conv2d(2 * w1, KINDS + 4, 1)
        with torch.no_grad():
            self.last.weight.mul_(0.1)
            self.last.bias.zero_()  # type: ignore[union-attr]
            self.last.bias[:KINDS] = torch.tensor(_FIRST_SCORES)  # type: ignore[index]

    def forward(self, maps: Tensor) -> Maps:
        """Maps (B, MAPS, h, w), the second of them 1 inside the frame and 0 outside, to the answer."""
        mask = maps[:, 1:2]
        mask2 = functional.max_pool2d(mask, 2)
        mask4 = functional.max_pool2d(mask2, 2)
        fine = _chain(self.fine, maps, mask)
        middle = _chain(self.middle, functional.avg_pool2d(fine, 2), mask2)
        coarse = _chain(self.coarse, functional.avg_pool2d(middle, 2), mask4)
        middle = self.middle_up(torch.cat((middle, _twice(self.to_middle(coarse)) * mask2), dim=1), mask2)
        fine = _chain(self.fine_up, torch.cat((fine, _twice(self.to_fine(middle)) * mask), dim=1), mask)
        answer = self.last(fine)
        return Maps(
            answer[:, :KINDS],
            answer[:, KINDS : KINDS + 2],
            answer[:, KINDS + 2].clamp(-5.0, 2.0),
            answer[:, KINDS + 3],
        )


def _chain(blocks: nn.ModuleList, x: Tensor, mask: Tensor) -> Tensor:
    for block in blocks:
        x = block(x, mask)
    return x


def _twice(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="nearest")
