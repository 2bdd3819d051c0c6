"""The spectrum surrogate: the spectrum at every cell of a HAADF image, from the image and the spectra measured so far.

    surrogate = Im2Spec.load()
    features = surrogate.encode(image)                                   # once an episode
    posterior = surrogate.fit(features, shape, cell, spectra, weight)    # after every measurement
    posterior.mean(), posterior.std(), posterior.scalarized(function)

What the image shows and what the spectra are belong to two different worlds: the same bright rim is a plasmon at 2 eV
in one specimen and an edge at 930 eV in the next, on another axis. So the two halves of the usual encoder–decoder are
kept apart. The *encoder* (patch → features) is trained beforehand on many specimens, by how well features predict
spectra that have not been measured from those that have; it never sees an axis, and is shipped and frozen. The
*decoder* is fitted to the episode in closed form: the modes of the spectra measured so far (principal components), and
a Gaussian process from features and place to each of their coefficients. That takes about a tenth of a second, needs
no steps of an optimizer, works for any axis and number of channels, and knows what it does not know. It is deep kernel
transfer (Patacchiola et al., "Bayesian meta-learning for the few-shot setting via deep kernels", NeurIPS 2020) with
spectra as the target, in place of im2spec's two convolutional halves (Kalinin et al., arXiv:2103.14734, 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stem_gym.core.errors import ConfigError
from stem_gym.surrogates.im2spec_head import Coefficients, Kernel, Sites, evidence, predict
from stem_gym.surrogates.im2spec_modes import Modes, find_modes, without_spikes
from stem_gym.surrogates.im2spec_network import REACH, PatchEncoder, standardised
from stem_gym.surrogates.surrogate import Estimate, ModelCard, judge_range, load_weights

__all__ = ["Im2Spec", "Im2SpecNetwork", "SpectrumPosterior", "sites_of"]

_OUTSIDE_FACTOR = 3.0
_BLOCK = 8  # rows that are fitted together, so that they stay within the processor's cache
_PATTERNS = 64  # of noise
_CACHE_NUMBERS = 2**18  # of spectra that are looked at together, so that they stay within the processor's cache


class Im2SpecNetwork(nn.Module):
    """Everything that is trained: the encoder and the kernel."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.encoder = PatchEncoder(width, features)
        self.kernel = Kernel()


@dataclass(frozen=True)
class SpectrumPosterior:
    """Noise-free spectra at N cells of B episodes of H*W cells: modes, and the law of their coefficients."""

    modes: Modes
    coefficients: Coefficients

    def mean(self) -> Tensor:
        """Expected spectra (B, N, S), in the unit of those measured, never negative."""
        return self._spectra(self.coefficients.mean)

    def std(self) -> Tensor:
        """Standard deviation (B, N, S): of the coefficients, and of what the modes leave out."""
        within = self.coefficients.variance @ self.modes.vectors.square()
        return (within + self.modes.rest[:, None].square()).sqrt()

    def scalarized(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, N) of `function`, spectra (B, N, S) to numbers (B, N), over the uncertainty.

        Gauss–Hermite quadrature of three points along every mode, the changes of all modes added (dimension by
        dimension; Särkkä, "Bayesian filtering and smoothing", 2013, ch. 6): the mean is exact for sums of functions of
        one coefficient each up to the fifth power, the deviation up to the second. What the modes leave out is not
        among it. `function` is called for some cells at a time, always for all rows.
        """
        part = max(1, _CACHE_NUMBERS // self.modes.centre.numel())
        law = self.coefficients
        found = [
            _scalarized(self.modes, mean, variance, function)
            for mean, variance in zip(law.mean.split(part, 1), law.variance.split(part, 1), strict=True)
        ]
        mean, variance = (torch.cat(pieces, 1) for pieces in zip(*found, strict=True))
        return mean, variance.sqrt()

    def noise_of(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """(B,) standard deviation that counting noise gives `function` of a mean spectrum of mean weight.

        From fixed patterns of signs, one for each channel: noise of the right size, for a sum of channels of the right
        deviation to a tenth.
        """
        channels = self.modes.centre.shape[-1]
        sign = torch.from_numpy(np.random.default_rng(0).choice((-1.0, 1.0), (_PATTERNS, channels)).astype(np.float32))
        size = self.modes.noise.sqrt()[:, None] / self.modes.scale
        noisy = self.modes.centre[:, None] + size[:, None] * sign.to(size)
        return function(noisy.clamp(min=0.0)).std(1)

    def rows(self, rows: Tensor) -> SpectrumPosterior:
        """Some of the episodes."""
        return SpectrumPosterior(
            *(type(part)(*(value[rows] for value in vars(part).values())) for part in vars(self).values())
        )

    def at(self, cell: Tensor) -> SpectrumPosterior:
        """Some of the cells, (B, n)."""
        taken = (
            part.gather(1, cell[..., None].expand(-1, -1, part.shape[-1])) for part in vars(self.coefficients).values()
        )
        return replace(self, coefficients=Coefficients(*taken))

    def _spectra(self, coefficients: Tensor) -> Tensor:
        return (self.modes.centre[:, None] + coefficients @ self.modes.vectors).clamp(min=0.0)


def _scalarized(
    modes: Modes, coefficients: Tensor, variance: Tensor, function: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, n) for coefficients and their variances (B, n, K)."""
    middle = modes.centre[:, None] + coefficients @ modes.vectors
    centre = function(middle.clamp(min=0.0))
    mean, total = centre.clone(), torch.zeros_like(centre)
    for vector, along in zip(modes.vectors.unbind(1), (3.0 * variance).sqrt().unbind(-1), strict=True):
        step = along[..., None] * vector[:, None]
        up, down = function((middle + step).clamp(min=0.0)), function((middle - step).clamp(min=0.0))
        slope, bend = 0.5 * (up - down), 0.5 * (up + down) - centre
        mean = mean + bend / 3.0
        total = total + slope.square() / 3.0 + 2.0 * bend.square() / 9.0
    return mean, total


class Im2Spec:
    """Spectra of cells from a HAADF image and the spectra of other cells; batched over episodes."""

    def __init__(self, network: Im2SpecNetwork, card: ModelCard, settings: dict[str, Any]) -> None:
        self.network, self._card, self.settings = network, card, settings
        self.network.eval().requires_grad_(False)

    @property
    def card(self) -> ModelCard:
        """The model card: training data, held-out error, valid range."""
        return self._card

    @classmethod
    def load(cls, path: Path | None = None, device: torch.device | str | None = None) -> Im2Spec:
        """The shipped surrogate, or one from PATH(.safetensors, .json). Raises RecordError for damaged files."""
        tensors, card, settings = load_weights(path or Path(str(files("stem_gym.surrogates") / "weights" / "im2spec")))
        with torch.random.fork_rng(devices=[]):  # the first weights are thrown away, and cost nobody a random number
            network = Im2SpecNetwork(int(settings["width"]), int(settings["features"]))
        network.load_state_dict(tensors)
        return cls(network.to(device), card, settings)

    def encode(self, image: Tensor) -> Tensor:
        """Features (B, H*W, d) of HAADF images (B, H, W) in any unit. Raises ConfigError for bad shapes and values."""
        if image.ndim != 3 or not image.is_floating_point():
            raise ConfigError(
                f"Images are a floating-point tensor (B, H, W); given {image.dtype} of shape {tuple(image.shape)}."
            )
        if min(image.shape[1:]) <= REACH:
            raise ConfigError(
                f"An image must have more than {REACH} pixels a side, the reach of a patch; given {tuple(image.shape)}."
            )
        if not bool(torch.isfinite(image).all()):
            raise ConfigError("Images must be finite; there is NaN or infinity among them.")
        with torch.inference_mode():
            features: Tensor = self.network.encoder(standardised(image))
        return features

    def fit(
        self,
        features: Tensor,
        shape: tuple[int, int],
        cell: Tensor,
        spectra: Tensor,
        weight: Tensor | None = None,
    ) -> SpectrumPosterior:
        """The spectra of all H*W cells from those measured.

        `features` (B, H*W, d) of `encode`, `shape` (H, W), `cell` (B, n) int64 y·W + x, `spectra` (B, n, S) in any
        unit, `weight` (B, n) what each is worth, such as its exposure; 0 for an entry that is none. Every row must
        hold a spectrum. Raises ConfigError for shapes and values that make no sense. Not differentiable.
        """
        weight = torch.ones_like(spectra[..., 0]) if weight is None else weight
        _check(features, shape, cell, spectra, weight)
        with torch.inference_mode():
            blocks = [
                self._fit(shape, *(part[first : first + _BLOCK] for part in (features, cell, spectra, weight)))
                for first in range(0, len(features), _BLOCK)
            ]
        return SpectrumPosterior(*(_joined(parts) for parts in zip(*blocks, strict=True)))

    def _fit(
        self, shape: tuple[int, int], features: Tensor, cell: Tensor, spectra: Tensor, weight: Tensor
    ) -> tuple[Modes, Coefficients]:
        """The same for a few rows, checked."""
        unit = _mean_size(spectra, weight)  # so that powers of very small and very large rates stay within float32
        modes = find_modes(without_spikes(spectra / unit, weight), weight, int(self.settings["modes"]))
        everywhere = sites_of(features, shape)
        measured = everywhere.at(cell)
        found = evidence(self.network.kernel, measured, modes.coefficients, weight)
        law = predict(self.network.kernel, measured, everywhere, modes, weight, found)
        law = replace(law, variance=law.variance * float(self.settings["std_factor"]) ** 2)
        unit = unit[:, 0]
        return replace(modes, centre=modes.centre * unit, scale=modes.scale / unit, rest=modes.rest * unit), law

    def estimate(
        self, image: Tensor, cell: Tensor, spectra: Tensor, weight: Tensor | None = None, strict: bool = False
    ) -> Estimate:
        """Noise-free spectra (B, H*W, S) of images (B, H, W) from the spectra (B, n, S) measured at cells (B, n).

        Rows outside the valid range are flagged, warned about and given three times the standard deviation; with
        `strict` they raise ValidRangeError.
        """
        posterior = self.fit(self.encode(image), (image.shape[1], image.shape[2]), cell, spectra, weight)
        measured = (torch.ones_like(cell) if weight is None else weight > 0).sum(1).float()
        side = torch.full_like(measured, float(min(image.shape[1:]))), torch.full_like(measured, max(image.shape[1:]))
        inside = judge_range(self.card, {"measured_spectra": (measured, measured), "side_pixels": side}, strict)
        factor = torch.where(inside, 1.0, _OUTSIDE_FACTOR)[:, None, None]
        return Estimate(posterior.mean(), posterior.std() * factor, inside)


def _joined(parts: Sequence[Any]) -> Any:
    """Dataclasses of tensors, one after the other along the rows."""
    return type(parts[0])(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


def sites_of(features: Tensor, shape: tuple[int, int]) -> Sites:
    """All cells of images of H × W cells; places are fractions of the longer side."""
    height, width = shape
    y, x = torch.meshgrid(
        torch.arange(height, device=features.device), torch.arange(width, device=features.device), indexing="ij"
    )
    place = torch.stack((x, y), -1).flatten(0, 1).to(features.dtype) / max(shape)
    return Sites(features, place.expand(len(features), -1, -1))


def _mean_size(spectra: Tensor, weight: Tensor) -> Tensor:
    """(B, 1, 1) mean absolute value of what was measured, 1 where all of it is 0."""
    there = weight[..., None] > 0
    size = torch.where(there, spectra.abs(), 0.0).sum((1, 2)) / (there.sum((1, 2)) * spectra.shape[-1]).clamp(min=1)
    return torch.where(size > 0, size, 1.0)[:, None, None]


def _check(features: Tensor, shape: tuple[int, int], cell: Tensor, spectra: Tensor, weight: Tensor) -> None:
    """Raises ConfigError for input that makes no sense."""
    rows, cells = features.shape[0], shape[0] * shape[1]
    if features.ndim != 3 or features.shape[1] != cells:
        raise ConfigError(
            f"Features of {rows} images of {shape[0]} × {shape[1]} cells are (B, {cells}, d); "
            f"given shape {tuple(features.shape)}."
        )
    if spectra.ndim != 3 or cell.shape != spectra.shape[:2] or weight.shape != cell.shape or len(cell) != rows:
        raise ConfigError(
            f"Cells (B, n), spectra (B, n, S) and weights (B, n) of {rows} rows must agree; given the shapes "
            f"{tuple(cell.shape)}, {tuple(spectra.shape)} and {tuple(weight.shape)}."
        )
    if cell.is_floating_point() or not bool(((cell >= 0) & (cell < cells)).all()):
        raise ConfigError(f"Cells are whole numbers from 0 to {cells - 1}; given {cell.dtype}, {cell.tolist()[0][:8]}.")
    there = weight > 0
    if not bool((torch.isfinite(weight) & (weight >= 0)).all()) or not bool(there.any(1).all()):
        raise ConfigError("Weights must be finite and at least 0, and every row needs a spectrum with one above 0.")
    if not bool(torch.isfinite(spectra[there]).all()):
        raise ConfigError("Measured spectra must be finite; there is NaN or infinity among them.")
