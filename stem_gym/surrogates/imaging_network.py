"""The convolutional network of the imaging surrogate: maps and optics in, relative correction and its spread out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CorrectionNetwork"]


class CorrectionNetwork(nn.Module):
    """A small residual network with circular padding, whose layers are scaled and shifted by the optics.

    Local (it sees about 2 Å around a pixel) and convolutional, so that it works on cells of any size with the same
    pixel.
    """

    def __init__(
        self, channels: int, conditions: int, width: int = 24, dilations: tuple[int, ...] = (1, 2, 2, 1)
    ) -> None:
        super().__init__()
        self.dilations = dilations
        self.first = nn.Conv2d(channels, width, 5)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, dilation=d) for d in dilations)
        self.last = nn.Conv2d(width, 1, 1)
        self.spread = nn.Sequential(nn.Conv2d(width, 16, 1), nn.SiLU(), nn.Conv2d(16, 2, 1))
        self.modulation = nn.Sequential(
            nn.Linear(conditions, 48), nn.SiLU(), nn.Linear(48, 2 * width * (len(dilations) + 1))
        )
        nn.init.zeros_(self.last.weight)
        with torch.no_grad():
            self.modulation[-1].weight.mul_(0.1)  # type: ignore[operator]

    def forward(self, maps: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, C, ny, nx) and conditions (B, P) to correction (B, ny, nx) and log spread (B, 2, ny, nx).

        The two log spreads are those of a sharp image and of one blurred by the usual source. They read the features
        of the correction without shaping them.
        """
        modulation = self.modulation(conditions).reshape(len(maps), len(self.blocks) + 1, 2, -1, 1, 1)
        x = self.first(functional.pad(maps, (2, 2, 2, 2), mode="circular"))
        x = functional.silu(x * (1 + modulation[:, 0, 0]) + modulation[:, 0, 1])
        for number, (block, d) in enumerate(zip(self.blocks, self.dilations, strict=True), 1):
            y = block(functional.pad(x, (d, d, d, d), mode="circular"))
            x = x + functional.silu(y * (1 + modulation[:, number, 0]) + modulation[:, number, 1])
        return self.last(x)[:, 0], self.spread(x.detach())
