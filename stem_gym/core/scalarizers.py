"""Scalarizers: what is wanted of a spectrum or a diffraction pattern, as one number.

A scalarizer is a frozen, named setting that can be written in a YAML or made in Python, where `a + b`, `2.0 * a` and
`a / b` compose. Called as `scalarizer(rate, axis)` it turns spectra (…, C), in detected electrons (or X-rays) per
second and channel, into numbers (…); `axis` says what the channels are: (C,) energies in eV for spectra, (C, 2)
scattering angles (x, y) in mrad for the pixels of a diffraction pattern, row by row. Sums are taken along the channels
and not as products of matrices, whose last digits depend on how many spectra there are.

This file is longer than 400 lines because it is a list: every kind takes a few, and they are made of one another.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stem_gym.core.config import Config
from stem_gym.core.errors import ConfigError

_TINY = 1e-12  # keeps logarithms and quotients finite; far below one electron an hour
_NEWTON_STEPS = 2  # from the power of the mean energies, which is right to some percent
_FEWEST_CHANNELS = 3  # of a window in which something is fitted


class _Scalarizer(Config):
    """Base of all: composes, and refuses an axis that it can not work on."""

    dimension: ClassVar[int] = 1  # of the axis: 1 energies, 2 scattering angles

    @property
    def compares(self) -> bool:
        """Whether it compares with the mean spectrum so far."""
        return False

    @property
    def linear(self) -> bool:
        """Whether that of a sum of spectra is the sum of theirs, so that a whole map follows from its components."""
        return False

    @abstractmethod
    def __call__(self, rate: Tensor, axis: Tensor, reference: Tensor | None = None) -> Tensor:
        """Numbers (…) of spectra (…, C); `reference` (…, C) is the mean spectrum so far, for those that compare."""

    @abstractmethod
    def check(self, axis: Tensor) -> None:
        """Raises ConfigError where the channels of `axis` are not those that are asked for."""

    def __add__(self, other: AnyScalarizer) -> Sum:
        return Sum(parts=(*_parts(self), *_parts(other)))

    def __mul__(self, factor: float) -> Scaled:
        return Scaled(factor=float(factor), of_what=self)  # type: ignore[arg-type]

    __rmul__ = __mul__

    def __sub__(self, other: AnyScalarizer) -> Sum:
        return self + -1.0 * other

    def __truediv__(self, other: AnyScalarizer) -> Quotient:
        return Quotient(numerator=self, denominator=other)  # type: ignore[arg-type]

    def _check_dimension(self, axis: Tensor) -> None:
        if axis.dim() != self.dimension:
            kind = {1: "spectra with an energy axis (C,)", 2: "diffraction patterns with angles (C, 2)"}
            raise ConfigError(
                f"The scalarizer {getattr(self, 'kind', '?')!r} works on {kind[self.dimension]}; "
                f"the detector's axis is {tuple(axis.shape)}."
            )


class Window(Config):
    """A range of energies, both ends included."""

    low_ev: float
    """lowest energy"""
    high_ev: float
    """highest energy"""

    def of(self, axis: Tensor) -> Tensor:
        """Which channels are inside, (C,) bool."""
        return (axis >= self.low_ev) & (axis <= self.high_ev)

    def check(self, axis: Tensor, channels: int = 1) -> None:
        """Raises ConfigError for a window that is empty, outside the axis, or has fewer than `channels` channels."""
        first, last = float(axis.min()), float(axis.max())
        if not self.low_ev < self.high_ev:
            raise ConfigError(f"A window must rise; given {self.low_ev:g} to {self.high_ev:g} eV.")
        if self.low_ev < first - _step(axis) or self.high_ev > last + _step(axis):
            raise ConfigError(
                f"The window {self.low_ev:g} to {self.high_ev:g} eV is not inside the spectrum, "
                f"which goes from {first:g} to {last:g} eV."
            )
        if (found := int(self.of(axis).sum())) < channels:
            raise ConfigError(
                f"The window {self.low_ev:g} to {self.high_ev:g} eV holds {found} channel(s) of {_step(axis):g} eV; "
                f"at least {channels} are needed."
            )


class BandIntegral(_Scalarizer):
    """All that is detected inside a window."""

    kind: Literal["band_integral"] = "band_integral"
    window: Window

    @property
    def linear(self) -> bool:
        return True

    def __call__(self, rate: Tensor, axis: Tensor, reference: Tensor | None = None) -> Tensor:
        return rate[..., self.window.of(axis)].sum(-1)

    def check(self, axis: Tensor) -> None:
        self._check_dimension(axis)
        self.window.check(axis)


class BandMaximum(_Scalarizer):
    """The highest of the window's channels, each averaged with its neighbours so that one spike is less of a peak."""

    kind: Literal["band_maximum"] = "band_maximum"
    window: Window
    smooth_channels: int = Field(default=3, ge=1, le=99)
    """odd number of channels in the running mean"""

    def __call__(self, rate: Tensor, axis: Tensor, reference: Tensor | None = None) -> Tensor:
        half = self.smooth_channels // 2
        flat = rate.reshape(-1, 1, rate.shape[-1])
        padded = torch.nn.functional.pad(flat, (half, half), mode="replicate")
        smooth = torch.nn.functional.avg_pool1d(padded, 2 * half + 1, stride=1).reshape(rate.shape)
        return smooth[..., self.window.of(axis)].amax(-1)

    def check(self, axis: Tensor) -> None:
        self._check_dimension(axis)
        self.window.check(axis)
        if self.smooth_channels % 2 == 0 or self.smooth_channels > len(axis):
            raise ConfigError(
                f"smooth_channels must be odd and at most the {len(axis)} channels; given {self.smooth_channels}."
            )


class PeakRatio(_Scalarizer):
    """One window's integral over another's; the floor keeps the noise of empty places from winning."""

    kind: Literal["peak_ratio"] = "peak_ratio"
    numerator: Window
    denominator: Window
    floor_per_s: float = Field(gt=0)
    """least denominator, detected electrons per second: well above the noise where nothing is"""

    def __call__(self, rate: Tensor, axis: Tensor, reference: Tensor | None = None) -> Tensor:
        above, below = (rate[..., window.of(axis)].sum(-1) for window in (self.numerator, self.denominator))
        return above / below.clamp(min=self.floor_per_s)

    def check(self, axis: Tensor) -> None:
        self._check_dimension(axis)
        self.numerator.check(axis)
        self.denominator.check(axis)


class EdgeIntegral(_Scalarizer):
    """A core-loss edge above its background A·E^−r, which is fitted in a window before the edge.

    Two-area method: the background window is halved, and the areas of the halves give r and A (R. F. Egerton, Electron
    Energy-Loss Spectroscopy in the Electron Microscope, 3rd ed., 2011, sect. 4.4), here solved to the last digits.
    """

    kind: Literal["edge_integral"] = "edge_integral"
    background: Window
    signal: Window

    def __call__(self, rate: Tensor, axis: Tensor, reference: Tensor | None = None) -> Tensor:
        index, inside = self.background.of(axis).nonzero().squeeze(1), self.signal.of(axis)
        half = len(index) // 2
        log_energy = (axis / axis[index[0]]).to(rate.dtype).log()
        first, second = log_energy[index[:half]], log_energy[index[len(index) - half :]]
        means = [rate[..., part].mean(-1).clamp(min=_TINY).log() for part in (index[:half], index[-half:])]
        lever = second.mean() - first.mean()
        r = (means[0] - means[1]) / lever
        for _ in range(_NEWTON_STEPS):  # the mean of a power is not the power of the mean
            r = r + (_log_mean_power(first, r) - _log_mean_power(second, r) - means[0] + means[1]) / -lever
        log_amplitude = means[0] - _log_mean_power(first, r)
        background = (log_amplitude.unsqueeze(-1) - r.unsqueeze(-1) * log_energy[inside]).clamp(max=60.0).exp()
        return rate[..., inside].sum(-1) - background.sum(-1)

    def check(self, axis: Tensor) -> None:
        self._check_dimension(axis)
        self.background.check(axis, 2 * _FEWEST_CHANNELS)
        self.signal.check(axis)
        if float(axis.min()) <= 0.0 and self.background.low_ev <= 0.0:
            raise ConfigError(f"A power law needs positive energies; the window begins at {self.background.low_ev:g}.")
        if self.background.high_ev > self.signal.low_ev:
            raise ConfigError(
                f"The background window must end before the signal begins; given {self.background.high_ev:g} and "
                f"{self.signal.low_ev:g} eV."
            )


class PeakFit(_Scalarizer):
    """Energy or width of the Gaussian that fits a window's peak, in eV.

    The logarithm of a Gaussian is a parabola; weighted with the squared rate it is fitted in closed form (H. Guo,
    "A simple algorithm for fitting a Gaussian function", IEEE Signal Process. Mag. 28, 134, 2011). Where the window
    has no peak the answer is the window's middle, and its half width.
    """

    kind: Literal["peak_fit"] = "peak_fit"
    window: Window
    quantity: Literal["position_ev", "width_ev"]
    """energy of the maximum, or standard deviation"""

    def __call__(self, rate: Tensor, axis: Tensor, reference: Tensor | None = None) -> Tensor:
        inside = self.window.of(axis)
        middle, half = (
            0.5 * (self.window.low_ev + self.window.high_ev),
            0.5 * (self.window.high_ev - self.window.low_ev),
        )
        x = ((axis[inside] - middle) / half).double()  # (W,) within ±1
        y = rate[..., inside].double()
        top = y.amax(-1, keepdim=True)
        y = (y / top.clamp(min=_TINY)).clamp(min=1e-6)
        weight = y.square()
        powers = torch.stack((torch.ones_like(x), x, x.square()))  # (3, W)
        normal = torch.einsum("...w,iw,jw->...ij", weight, powers, powers)
        right = torch.einsum("...w,iw,...w->...i", weight, powers, y.log())
        normal = normal + 1e-9 * torch.eye(3, dtype=normal.dtype, device=normal.device)
        _, slope, curvature = torch.linalg.solve(normal, right).unbind(-1)
        peaked = (curvature < -1e-6) & (top.squeeze(-1) > 0.0)
        safe = torch.where(peaked, curvature, -1.0)
        if self.quantity == "position_ev":
            place = torch.where(peaked, -0.5 * slope / safe, 0.0).clamp(-1.0, 1.0)
            return (middle + half * place).to(rate.dtype)
        width = torch.where(peaked, (-0.5 / safe).sqrt(), 1.0).clamp(max=1.0)
        return (half * width).to(rate.dtype)

    def check(self, axis: Tensor) -> None:
        self._check_dimension(axis)
        self.window.check(axis, _FEWEST_CHANNELS)


class Anomaly(_Scalarizer):
    """How unlike the mean spectrum so far a spectrum is: sine of the angle between their square roots, 0 to 1.

    Square roots make Poisson noise even (F. J. Anscombe, Biometrika 35, 246, 1948).
    """

    kind: Literal["anomaly"] = "anomaly"
    window: Window | None = None
    """channels that are compared; all if absent"""

    @property
    def compares(self) -> bool:
        return True

    def __call__(self, rate: Tensor, axis: Tensor, reference: Tensor | None = None) -> Tensor:
        if reference is None:
            return torch.zeros_like(rate[..., 0])
        inside = slice(None) if self.window is None else self.window.of(axis)
        one, other = (part[..., inside].clamp(min=0.0).sqrt() for part in (rate, reference))
        one, other = (torch.nn.functional.normalize(part, dim=-1, eps=_TINY) for part in (one, other))
        half_chord = 0.5 * (one - other).norm(dim=-1)  # of the angle on the unit sphere, exact for small ones too
        return 2.0 * half_chord * (1.0 - half_chord.square()).clamp(min=0.0).sqrt()

    def check(self, axis: Tensor) -> None:
        self._check_dimension(axis)
        if self.window is not None:
            self.window.check(axis)


class CentreOfMass(_Scalarizer):
    """Mean scattering angle of a diffraction pattern in mrad, along x or y, or its length."""

    kind: Literal["centre_of_mass"] = "centre_of_mass"
    dimension: ClassVar[int] = 2
    component: Literal["x_mrad", "y_mrad", "magnitude_mrad"]
    """along the fast axis, along the slow one, or the length of both"""

    def __call__(self, rate: Tensor, axis: Tensor, reference: Tensor | None = None) -> Tensor:
        total = rate.sum(-1, keepdim=True)
        moment = torch.stack([(rate * along).sum(-1) for along in axis.to(rate.dtype).unbind(1)], dim=-1)
        mean = torch.where(total > 0.0, moment / total.clamp(min=_TINY), 0.0)
        return {"x_mrad": mean[..., 0], "y_mrad": mean[..., 1], "magnitude_mrad": mean.norm(dim=-1)}[self.component]

    def check(self, axis: Tensor) -> None:
        self._check_dimension(axis)


class VirtualDetector(_Scalarizer):
    """All that is scattered into a ring of angles."""

    kind: Literal["virtual_detector"] = "virtual_detector"
    dimension: ClassVar[int] = 2
    inner_mrad: float = Field(ge=0)
    """inner angle"""
    outer_mrad: float = Field(gt=0)
    """outer angle"""

    @property
    def linear(self) -> bool:
        return True

    def __call__(self, rate: Tensor, axis: Tensor, reference: Tensor | None = None) -> Tensor:
        return rate[..., self._inside(axis)].sum(-1)

    def check(self, axis: Tensor) -> None:
        self._check_dimension(axis)
        if not bool(self._inside(axis).any()):
            largest = float(axis.norm(dim=-1).max())
            raise ConfigError(
                f"No pixel lies between {self.inner_mrad:g} and {self.outer_mrad:g} mrad; the pattern reaches "
                f"{largest:.3g} mrad."
            )

    def _inside(self, axis: Tensor) -> Tensor:
        angle = axis.norm(dim=-1)
        return (angle >= self.inner_mrad) & (angle <= self.outer_mrad)


class Sum(_Scalarizer):
    """Others added up."""

    kind: Literal["sum"] = "sum"
    parts: tuple[AnyScalarizer, ...] = Field(min_length=1)

    @property
    def compares(self) -> bool:
        return any(part.compares for part in self.parts)

    @property
    def linear(self) -> bool:
        return all(part.linear for part in self.parts)

    def __call__(self, rate: Tensor, axis: Tensor, reference: Tensor | None = None) -> Tensor:
        return torch.stack([part(rate, axis, reference) for part in self.parts]).sum(0)

    def check(self, axis: Tensor) -> None:
        for part in self.parts:
            part.check(axis)


class Scaled(_Scalarizer):
    """Another one times a factor; −1 looks for the least instead of the most."""

    kind: Literal["scaled"] = "scaled"
    factor: float
    of_what: AnyScalarizer

    @property
    def compares(self) -> bool:
        return self.of_what.compares

    @property
    def linear(self) -> bool:
        return self.of_what.linear

    def __call__(self, rate: Tensor, axis: Tensor, reference: Tensor | None = None) -> Tensor:
        return self.factor * self.of_what(rate, axis, reference)

    def check(self, axis: Tensor) -> None:
        self.of_what.check(axis)


class Quotient(_Scalarizer):
    """One over another, whose size is kept above a floor."""

    kind: Literal["quotient"] = "quotient"
    numerator: AnyScalarizer
    denominator: AnyScalarizer
    floor: float = Field(default=1.0, gt=0)
    """least denominator, in its own unit"""

    @property
    def compares(self) -> bool:
        return self.numerator.compares or self.denominator.compares

    def __call__(self, rate: Tensor, axis: Tensor, reference: Tensor | None = None) -> Tensor:
        above, below = self.numerator(rate, axis, reference), self.denominator(rate, axis, reference)
        return above / below.clamp(min=self.floor)

    def check(self, axis: Tensor) -> None:
        self.numerator.check(axis)
        self.denominator.check(axis)


AnyScalarizer = Annotated[
    BandIntegral
    | BandMaximum
    | PeakRatio
    | EdgeIntegral
    | PeakFit
    | Anomaly
    | CentreOfMass
    | VirtualDetector
    | Sum
    | Scaled
    | Quotient,
    Field(discriminator="kind"),
]
for _composed in (Sum, Scaled, Quotient):
    _composed.model_rebuild()


class NamedScalarizer(Config):
    """A scalarizer under a name of one's own."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """what it is called in lists, in `info` and on plots"""
    measure: AnyScalarizer
    """what it measures"""


def _parts(scalarizer: Any) -> tuple[Any, ...]:
    return scalarizer.parts if isinstance(scalarizer, Sum) else (scalarizer,)


def _step(axis: Tensor) -> float:
    """Width of a channel."""
    return float((axis.max() - axis.min()) / max(1, len(axis) - 1))


def _log_mean_power(log_energy: Tensor, r: Tensor) -> Tensor:
    """ln of the mean of E^−r over log energies (W,), for exponents (…)."""
    return (-r.unsqueeze(-1) * log_energy).logsumexp(-1) - math.log(len(log_energy))
