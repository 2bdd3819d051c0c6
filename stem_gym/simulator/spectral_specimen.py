"""A field of cells with an image and spectra, as every recipe of spectral specimens gives it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SpectralSpecimen:
    """A field of H × W cells whose spectra are sums of few components: spectrum(cell) = loadings[cell] @ components.

    Cell number y · W + x is the cell of column x and row y. Few components instead of all spectra keep a batch small:
    64 × 64 cells with 128 channels and 12 components take a tenth of the memory.
    """

    image: Tensor  # (n, H, W) expected HAADF, collected fraction of the beam
    loadings: Tensor  # (n, H·W, K) how much of each component is at each cell
    components: Tensor  # (n, K, C) expected detected signal per beam electron and channel
