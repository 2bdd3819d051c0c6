"""Atoms in HAADF frames of doped graphene: one function, and the finders that it takes.

    found = find_atoms(fraction, pixel_ang, electrons_per_pixel, NetworkFinder.load())
    silicon = found.present & (found.kind == Kind.SILICON)

`NetworkFinder` is a small trained U-Net, `ClassicalFinder` a matched filter with thresholds, `BrightestSpots` the
highest maxima whatever they are. Another finder is anything with the same two members.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from stem_gym.core.errors import ConfigError, ValidRangeError
from stem_gym.core.units import fwhm_from_sigma
from stem_gym.surrogates.atom_finder_network import MULTIPLE, AtomFinderNetwork
from stem_gym.surrogates.regrid import CANVAS_PIXEL_ANG, Canvas, on_canvas
from stem_gym.surrogates.spots import MATCHED, brightest, parabola_peak, round_maxima, smooth
from stem_gym.surrogates.surrogate import Estimate, ModelCard, judge_range, load_weights

__all__ = [
    "BrightestSpots",
    "ClassicalFinder",
    "Finder",
    "Found",
    "Kind",
    "NetworkFinder",
    "find_atoms",
    "network_input",
]

MOST = 480  # entries of a row: a sheet of 31 Å has 370 atoms
COARSEST_PIXEL_ANG = 0.5  # half the width of the usual probe
_SHEET_FRACTION = 3e-4  # what a graphene sheet collects at 60 keV, 80 to 200 mrad
_LEAST_LEVEL = 0.25 * _SHEET_FRACTION
_BLOCK = 32  # rows that pass through the network together
_OUTSIDE_FACTOR = 3.0


class Kind(IntEnum):
    """What stands at a place, as far as brightness tells."""

    VACANCY = 0  # an empty site of the lattice
    CARBON = 1  # carbon and its neighbours in the periodic table, B to Ne
    SILICON = 2  # silicon and its neighbours, Na to Ca; `Found.weight` tells Al, Si and P apart where the dose allows
    HEAVY = 3  # transition metals, Ge and heavier


@dataclass(frozen=True)
class Found:
    """What was found in B frames, the surest first; entries are padded to N, which the finder fixes."""

    xy: Tensor  # (B, N, 2) pixels of the frame, x first; the middle of the first pixel is (0, 0)
    kind: Tensor  # (B, N) int64, a Kind
    score: Tensor  # (B, N) between 0 and 1, how sure; BrightestSpots: the height
    std: Tensor  # (B, N) pixels, standard deviation of the place on each axis; NaN where not known
    weight: Tensor  # (B, N) cross section over that of carbon; NaN where not known
    present: Tensor  # (B, N) bool
    inside: Tensor  # (B,) bool: the frame lies where the finder was tested

    def fractions(self, shape: tuple[int, int]) -> Tensor:
        """Places as fractions of a frame of H x W pixels: (B, N, 2)."""
        height, width = shape
        return (self.xy + 0.5) / torch.tensor([width, height], dtype=self.xy.dtype, device=self.xy.device)

    def are(self, *kinds: Kind) -> Tensor:
        """Which entries (B, N) are present and of one of these kinds."""
        return self.present & torch.isin(self.kind, torch.tensor(kinds, device=self.kind.device))


@runtime_checkable
class Finder(Protocol):
    """Anything that finds atoms in frames."""

    @property
    def coarsest_pixel_ang(self) -> float:
        """Half the width of the probe: coarser frames do not hold the places."""
        ...

    def find(self, fraction: Tensor, pixel_ang: Tensor, electrons_per_pixel: Tensor | None) -> Found:
        """The atoms of checked frames; see `find_atoms`."""
        ...


def find_atoms(fraction: Tensor, pixel_ang: Tensor, electrons_per_pixel: Tensor | None, finder: Finder) -> Found:
    """The atoms of frames `fraction` (B, H, W): collected fraction of the beam in every pixel. Not differentiable.

    `pixel_ang` (B,) Å, `electrons_per_pixel` (B,) incident, None where the finder does without. Rows may differ in
    pixel and dose. Raises ConfigError for wrong shapes, values that are not finite, pixels and doses that are not
    positive, and ValidRangeError for pixels coarser than half the probe.
    """
    if fraction.dim() != 3 or 0 in fraction.shape or not fraction.is_floating_point():
        raise ConfigError(
            f"Frames are a floating-point tensor (B, H, W); given {fraction.dtype} of shape {tuple(fraction.shape)}."
        )
    if not bool(torch.isfinite(fraction).all()):
        bad = (~torch.isfinite(fraction)).flatten(1).any(1).nonzero().flatten().tolist()
        raise ConfigError(f"Frames must be finite; rows {bad[:8]} hold NaN or infinity.")
    _check_rows("pixel_ang", pixel_ang, len(fraction))
    if electrons_per_pixel is not None:
        _check_rows("electrons_per_pixel", electrons_per_pixel, len(fraction))
    coarsest = float(pixel_ang.max())
    if coarsest > finder.coarsest_pixel_ang * (1.0 + 1e-5):
        raise ValidRangeError(
            f"A pixel of {coarsest:.3g} Å is more than half the probe's width, {finder.coarsest_pixel_ang:.3g} Å; "
            "scan a smaller field or more pixels."
        )
    with torch.inference_mode():
        return finder.find(fraction, pixel_ang, electrons_per_pixel)


def _check_rows(name: str, value: Tensor, rows: int) -> None:
    if value.shape != (rows,):
        raise ConfigError(f"{name} must be one number for each of {rows} frames; given shape {tuple(value.shape)}.")
    if not bool((torch.isfinite(value) & (value > 0)).all()):
        raise ConfigError(f"{name} must be positive and finite; given {value.tolist()[:8]}.")


class BrightestSpots:
    """The `count` brightest spots of each frame, whatever they are, on whole pixels; a frame may have fewer.

    The kind is told as silicon, since nothing is measured of it; the score is the height, a collected fraction.
    """

    def __init__(self, count: int, sigma_pixels: float, coarsest_pixel_ang: float = COARSEST_PIXEL_ANG) -> None:
        self.count, self.sigma_pixels, self._coarsest_ang = count, sigma_pixels, coarsest_pixel_ang

    @property
    def coarsest_pixel_ang(self) -> float:
        return self._coarsest_ang

    def find(self, fraction: Tensor, pixel_ang: Tensor, electrons_per_pixel: Tensor | None) -> Found:
        place, height = brightest(fraction, self.sigma_pixels, self.count)
        unknown = torch.full_like(height, torch.nan)
        kind = torch.full_like(height, int(Kind.SILICON), dtype=torch.int64)
        inside = torch.ones(len(fraction), dtype=torch.bool, device=fraction.device)
        return Found(place.to(fraction.dtype), kind, height, unknown, unknown, height > 0.0, inside)


class ClassicalFinder:
    """Matched filter, local maxima, thresholds on the contrast over the surroundings, parabolas through the maxima.

    Contrasts are in units of what the sheet itself collects (the median of what is no vacuum, under a wide filter), so
    that neither the energy nor the gain matters. Thresholds lie between the contrasts of C, Si and Ge in focused frames
    at 60 keV; `probe_fwhm_ang` is the probe that the filter is made for.
    """

    def __init__(self, probe_fwhm_ang: float = 2.0 * COARSEST_PIXEL_ANG) -> None:
        self.probe_fwhm_ang = probe_fwhm_ang

    @property
    def coarsest_pixel_ang(self) -> float:
        return 0.5 * self.probe_fwhm_ang

    def find(self, fraction: Tensor, pixel_ang: Tensor, electrons_per_pixel: Tensor | None) -> Found:
        canvas = _with_rim(on_canvas(fraction, pixel_ang))
        sigma = self.probe_fwhm_ang / fwhm_from_sigma(1.0) / CANVAS_PIXEL_ANG  # canvas pixels
        sharp, wide = (_smooth_inside(canvas, width) for width in (MATCHED * sigma, _WIDE_ANG / CANVAS_PIXEL_ANG))
        inside = canvas.mask > 0.0
        level = _sheet_level(torch.where(inside, wide, torch.nan))[:, None, None]
        contrast = (sharp - wide) / level
        peak = round_maxima(torch.where(inside, sharp, 0.0)) & inside & (contrast > _CARBON_CONTRAST)
        above, place = _highest(torch.where(peak, contrast - _CARBON_CONTRAST, 0.0))
        bounds = torch.tensor((_SILICON_CONTRAST, _HEAVY_CONTRAST), device=fraction.device) - _CARBON_CONTRAST
        kind = int(Kind.CARBON) + torch.bucketize(above, bounds)
        xy = canvas.to_frame(parabola_peak(sharp, place) - 1.0)
        score = above / (above + 1.0)
        tested = torch.ones(len(fraction), dtype=torch.bool, device=fraction.device)
        unknown = torch.full_like(score, torch.nan)
        return Found(xy, kind, score, unknown, unknown, above > 0.0, tested)


_WIDE_ANG = 2.0  # rms width of the wide filter
_BRIGHT_SHARE = 0.85  # of the frame is darker than what is called bright, so that blobs and dopants do not count
_CARBON_CONTRAST, _SILICON_CONTRAST, _HEAVY_CONTRAST = -0.2, 1.1, 7.0


def _sheet_level(wide: Tensor) -> Tensor:
    """(B,) what the sheet collects: the median of what is no vacuum, in frames (B, h, w) under a wide filter.

    Vacuum is what is less than half as bright as the brighter parts; pixels outside of the frame are NaN.
    """
    flat = wide.flatten(1)
    bright = torch.nanquantile(flat, _BRIGHT_SHARE, dim=1, keepdim=True)
    sheet = torch.where(flat > 0.5 * bright, flat, torch.nan)
    return torch.nanmedian(sheet, dim=1).values.nan_to_num(0.0).clamp(min=_LEAST_LEVEL)


def _with_rim(canvas: Canvas) -> Canvas:
    """The canvas with a pixel more on every side, so that no frame ends where the canvas does."""
    image, mask = (torch.nn.functional.pad(part, (1, 1, 1, 1)) for part in (canvas.image, canvas.mask))
    return Canvas(image, mask, canvas.scale)


def _smooth_inside(canvas: Canvas, sigma_pixels: float) -> Tensor:
    """The frame (B, h, w) under a Gaussian, in which what lies outside of it has no part."""
    sigma = torch.full((len(canvas.image),), sigma_pixels, device=canvas.image.device)
    return smooth(canvas.image, sigma) / smooth(canvas.mask, sigma).clamp(min=1e-6)


def _highest(peaks: Tensor) -> tuple[Tensor, Tensor]:
    """The MOST highest values (B, MOST) of a map (B, h, w) and their places (B, MOST, 2) x first; zero where fewer."""
    width = peaks.shape[2]
    flat = peaks.flatten(1)
    flat = torch.nn.functional.pad(flat, (0, max(0, MOST - flat.shape[1])))
    value, index = flat.topk(MOST, dim=1)
    return value, torch.stack((index % width, index // width), dim=-1)


class NetworkFinder:
    """A small U-Net on frames of one pixel: kinds, places with their uncertainty, and weights. A `Surrogate`."""

    def __init__(self, network: AtomFinderNetwork, card: ModelCard, settings: Mapping[str, Any]) -> None:
        self.network, self._card, self.settings = network, card, dict(settings)
        self.network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def card(self) -> ModelCard:
        """The model card: training data, held-out figures, valid range."""
        return self._card

    @property
    def coarsest_pixel_ang(self) -> float:
        return COARSEST_PIXEL_ANG

    @classmethod
    def load(cls, path: Path | None = None, device: torch.device | str | None = None) -> NetworkFinder:
        """The shipped finder, or one from PATH(.safetensors, .json). Raises RecordError for damaged files."""
        shipped = Path(str(files("stem_gym.surrogates") / "weights" / "atom_finder"))
        tensors, card, settings = load_weights(path or shipped)
        with torch.random.fork_rng(devices=[]):  # the first weights are thrown away, and cost nobody a random number
            network = AtomFinderNetwork(int(settings["width"]))
        network.load_state_dict(tensors)
        return cls(network.to(device), card, settings)

    def find(self, fraction: Tensor, pixel_ang: Tensor, electrons_per_pixel: Tensor | None) -> Found:
        """Rows outside the card's range are flagged, warned about and told with a wider uncertainty."""
        if electrons_per_pixel is None:
            raise ConfigError("The network needs electrons_per_pixel (B,), incident electrons; given None.")
        tested = judge_range(self.card, self._extremes(fraction, pixel_ang, electrons_per_pixel), strict=False)
        rows = (fraction, pixel_ang, electrons_per_pixel, tested)
        blocks = [self._block(*block) for block in zip(*(r.split(_BLOCK) for r in rows), strict=True)]
        return Found(*(torch.cat([getattr(block, f.name) for block in blocks]) for f in fields(Found)))

    def estimate(self, fraction: Tensor, pixel_ang: Tensor, electrons_per_pixel: Tensor) -> Estimate:
        """Places as fractions of the frame, (B, N, 2), with their uncertainty; entries that are not present are NaN."""
        found = find_atoms(fraction, pixel_ang, electrons_per_pixel, self)
        size = torch.tensor([fraction.shape[2], fraction.shape[1]], device=fraction.device)
        absent = ~found.present[..., None]
        mean = found.fractions((fraction.shape[1], fraction.shape[2])).masked_fill(absent, torch.nan)
        return Estimate(mean, (found.std[..., None] / size).masked_fill(absent, torch.nan), found.inside)

    def _extremes(self, fraction: Tensor, pixel_ang: Tensor, electrons: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Lowest and highest value in every row of each quantity that has a valid range."""
        height, width = fraction.shape[1:]
        dose = electrons / pixel_ang**2
        return {
            "pixel_ang": (pixel_ang, pixel_ang),
            "field_ang": (min(height, width) * pixel_ang, max(height, width) * pixel_ang),
            "electrons_per_ang2": (dose, dose),
        }

    def _block(self, fraction: Tensor, pixel_ang: Tensor, electrons: Tensor, tested: Tensor) -> Found:
        canvas = on_canvas(fraction, pixel_ang, MULTIPLE)
        seen = network_input(canvas, electrons / pixel_ang**2)
        answer = self.network(seen.contiguous(memory_format=torch.channels_last))
        chance = torch.sigmoid(answer.score) * canvas.mask[:, None]
        best, kind = chance.max(1)
        least = torch.tensor(self.settings["thresholds"], dtype=best.dtype, device=best.device)[kind]
        score, place = _highest(torch.where(round_maxima(best) & (best > least), best, 0.0))
        xy = canvas.to_frame(place + _at(answer.offset, place))
        spread = _at(answer.log_spread[:, None], place)[..., 0].exp() * canvas.scale.mean(1, keepdim=True)
        std = spread * self.settings["std_per_spread"] * torch.where(tested, 1.0, _OUTSIDE_FACTOR)[:, None]
        weight = _at(answer.log_weight[:, None], place)[..., 0].exp()
        kinds = _at(kind[:, None], place)[..., 0]
        return Found(xy, kinds, score, std, weight * (kinds != int(Kind.VACANCY)), score > 0.0, tested)


def network_input(canvas: Canvas, electrons_per_ang2: Tensor) -> Tensor:
    """What the network sees, (B, 3, h, w): root of the brightness over the frame's mean, the mask, the dose.

    The root makes Poisson noise the same everywhere; the dose is told as the counts in a pixel of mean brightness.
    """
    mask = canvas.mask
    level = (canvas.image.sum((1, 2)) / mask.sum((1, 2))).clamp(min=_LEAST_LEVEL)[:, None, None]
    counts = level * electrons_per_ang2[:, None, None] * CANVAS_PIXEL_ANG**2
    dose = (torch.log(counts.clamp(min=1e-3)) - 3.0) / 2.0
    return torch.stack((torch.sqrt((canvas.image / level).clamp(min=0.0)), mask, dose * mask), dim=1)


def _at(maps: Tensor, place: Tensor) -> Tensor:
    """Values of maps (B, C, h, w) at whole places (B, N, 2): (B, N, C)."""
    width = maps.shape[3]
    index = (place[..., 1] * width + place[..., 0]).clamp(max=maps.shape[2] * width - 1)
    values: Tensor = maps.flatten(2).gather(2, index[:, None].expand(-1, maps.shape[1], -1)).transpose(1, 2)
    return values
