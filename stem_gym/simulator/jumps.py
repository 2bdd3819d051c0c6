"""How fast a dopant changes places with a carbon neighbour under the beam: three laws behind one method.

`CrossSectionJumps` is physics: flux of the actual probe at the neighbour times a displacement cross section.
`JumpMap` is what a laboratory measures: a rate as a function of the beam's place, which may be drawn anew for each
episode. `LorentzianJumps` is the public toy by which results can be laid beside published work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stem_gym.core.config import Config
from stem_gym.core.errors import ConfigError
from stem_gym.core.units import ANG2_PER_BARN
from stem_gym.simulator.specimens import RandomRows

BOND_ANG = 1.42


@dataclass(frozen=True)
class Aim:
    """Where the beam is, seen from the dopants: n rows, S moments, D dopants, three neighbours each."""

    to_beam_ang: Tensor  # (n, S, D, 2) from the dopant
    bond_ang: Tensor  # (n, D, 3, 2) from the dopant to its neighbours
    density_per_ang2: Tensor  # (n, S, D, 3) per electron, at the neighbours
    electrons_per_s: Tensor  # (n,)
    current_pa: Tensor  # (n,)


@dataclass(frozen=True)
class FrameAim:
    """What a frame does to dopants beside its dose."""

    cross_section_barn: Tensor  # (n, D)
    seconds: Tensor  # (n,) beam time
    area_ang2: Tensor  # (n,)
    current_pa: Tensor  # (n,)


class CrossSectionJumps(Config):
    """Rate = flux at the carbon × cross section for transfers between two thresholds.

    The calibrated picture of displacement in graphene: a carbon beside Si that gets more than the exchange threshold
    changes places with it, one that gets more than the ejection threshold leaves (Susi et al., Phys. Rev. Lett. 113,
    115501, 2014). A dopant stands out on one side of the sheet, and only where that is the side that carbon is driven
    to do the two change places. The default thresholds are nevertheless equal: they are calibrated to observed jumps,
    and impacts too weak to displace anything turn the dopant over many times between two jumps (half of those from
    ahead in molecular dynamics; see the card of the displacement surrogate), so that what is observed is the mean.
    """

    kind: Literal["cross_section"] = "cross_section"
    exchange_ev: float = Field(default=13.5, gt=1, lt=100)
    """threshold of the exchange where the dopant is raised to the side that the carbon is driven to"""
    exchange_far_ev: float = Field(default=13.5, gt=1, lt=100)
    """threshold where it is raised to the other side"""

    def check_energies(self, energies_kev: Sequence[float]) -> None:
        """Any: the cross section follows the energy."""

    def parameters(self, streams: RandomRows, rows: Tensor) -> Tensor:
        """Nothing differs between rows: (n, 0)."""
        return torch.zeros(len(rows), 0, device=rows.device)

    def rates(self, parameters: Tensor, aim: Aim, cross_section_barn: Tensor) -> Tensor:
        """Jumps per second (n, S, D, 3); cross sections (n, D)."""
        flux = aim.density_per_ang2 * aim.electrons_per_s.view(-1, 1, 1, 1)
        return flux * (ANG2_PER_BARN * cross_section_barn).unsqueeze(1).unsqueeze(3)

    def frame_jumps(self, parameters: Tensor, dose_e_per_ang2: Tensor, aim: FrameAim) -> Tensor:
        """Expected jumps (n, D) to each neighbour during a frame of this dose (n,)."""
        return ANG2_PER_BARN * aim.cross_section_barn * dose_e_per_ang2[:, None]


class Range(Config):
    """A number, or a range that it is drawn from for each episode."""

    low: float
    high: float
    logarithmic: bool = False
    """whether its logarithm is what is drawn evenly"""

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low <= self.high or (self.logarithmic and self.low <= 0.0):
            raise ValueError(f"low <= high must hold, and low > 0 for logarithmic; given {self.low} and {self.high}")
        return self

    def draw(self, uniform: Tensor) -> Tensor:
        """Values for uniforms in (0, 1)."""
        if self.logarithmic:
            return self.low * (self.high / self.low) ** uniform
        return self.low + (self.high - self.low) * uniform


def exactly(value: float) -> Range:
    """The range of one number."""
    return Range(low=value, high=value)


class JumpMap(Config):
    """A Gaussian rate map: `floor` + `peak` · exp(−½ ((along − centre)/width)² − ½ (across/(width · anisotropy))²).

    `along` and `across` are the beam's place seen from the dopant, along the bond to the neighbour and across it. The
    rate is proportional to the current. Defaults: the prior of a public simulator at 60 keV and about 0.1 nA
    (google/putting-dune): peak ln 2 / 3 per second at 0.85 bonds, width 0.449 Å.
    """

    kind: Literal["map"] = "map"
    peak_per_s: Range = exactly(math.log(2.0) / 3.0)
    """largest rate of one neighbour, at the reference current"""
    centre_bonds: Range = exactly(0.85)
    """distance of the largest rate from the dopant, in bond lengths"""
    width_ang: Range = exactly(0.449)
    """standard deviation along the bond"""
    anisotropy: Range = exactly(1.0)
    """standard deviation across the bond over that along it"""
    floor_per_s: Range = exactly(0.0)
    """rate wherever the beam is, at the reference current"""
    reference_pa: float = Field(default=100.0, gt=0)
    """current that the rates are for"""
    valid_kev: Range | None = None
    """beam energies that the map holds for; null: it does not say, and is taken at one energy alone"""

    @model_validator(mode="after")
    def _possible(self) -> JumpMap:
        for name in ("width_ang", "anisotropy"):
            if (low := getattr(self, name).low) <= 0.0:
                raise ValueError(f"{name} must be above 0; given from {low:g}")
        for name in ("peak_per_s", "centre_bonds", "floor_per_s"):
            if (low := getattr(self, name).low) < 0.0:
                raise ValueError(f"{name} must not be below 0; given from {low:g}")
        return self

    def check_energies(self, energies_kev: Sequence[float]) -> None:
        """Those of `valid_kev`. Raises ConfigError for others, with the range."""
        if self.valid_kev is None:
            remedy = "Leave instrument.energies_kev out, or give kinetics.jumps.valid_kev."
            return _check_one_energy("The rates of the map", energies_kev, remedy)
        low, high = self.valid_kev.low, self.valid_kev.high
        outside = [energy for energy in energies_kev if not low - 1e-6 <= energy <= high + 1e-6]
        if outside:
            raise ConfigError(
                f"The rate map holds for {low:g} to {high:g} keV (kinetics.jumps.valid_kev); given "
                f"{', '.join(f'{energy:g}' for energy in outside)} keV."
            )
        return None

    def parameters(self, streams: RandomRows, rows: Tensor) -> Tensor:
        """Peak, centre (Å), width, anisotropy and floor of each row, (n, 5)."""
        ranges = (self.peak_per_s, self.centre_bonds, self.width_ang, self.anisotropy, self.floor_per_s)
        uniform = streams.uniform(rows, (len(ranges),))
        drawn = [part.draw(uniform[:, column]) for column, part in enumerate(ranges)]
        drawn[1] = drawn[1] * BOND_ANG
        return torch.stack(drawn, dim=1)

    def rates(self, parameters: Tensor, aim: Aim, cross_section_barn: Tensor) -> Tensor:
        """Jumps per second (n, S, D, 3)."""
        along = aim.bond_ang / aim.bond_ang.norm(dim=-1, keepdim=True)  # (n, D, 3, 2)
        beam = aim.to_beam_ang.unsqueeze(3)  # (n, S, D, 1, 2)
        ahead = (beam * along.unsqueeze(1)).sum(-1)
        aside = beam[..., 1] * along[:, None, ..., 0] - beam[..., 0] * along[:, None, ..., 1]
        peak, centre, width, anisotropy, floor = (part[:, None, None, None] for part in parameters.unbind(1))
        square = ((ahead - centre) / width).square() + (aside / (width * anisotropy)).square()
        scale = (aim.current_pa / self.reference_pa)[:, None, None, None]
        return scale * (floor + peak * torch.exp(-0.5 * square))

    def frame_jumps(self, parameters: Tensor, dose_e_per_ang2: Tensor, aim: FrameAim) -> Tensor:
        """Expected jumps (n, D) to each neighbour during a frame: the map's integral over the area it shares."""
        peak, _, width, anisotropy, floor = parameters.unbind(1)
        integral = 2.0 * math.pi * peak * width.square() * anisotropy + floor * aim.area_ang2
        expected = integral * aim.seconds / aim.area_ang2 * (aim.current_pa / self.reference_pa)
        return expected[:, None].expand_as(aim.cross_section_barn)


def _check_one_energy(law: str, energies_kev: Sequence[float], remedy: str) -> None:
    """Raises ConfigError where a law that knows no energy is asked for several."""
    if len(energies_kev) > 1:
        raise ConfigError(
            f"{law} do not follow the beam energy, and do not say for which they hold; given "
            f"{', '.join(f'{energy:g}' for energy in energies_kev)} keV. {remedy}"
        )


class LorentzianJumps(Config):
    """The public toy: k = 1 / (1 + (4 d / a)²) per second, d from the beam to the neighbour, a the bond.

    Frames do not disturb.
    """

    kind: Literal["lorentzian"] = "lorentzian"
    bond_ang: float = Field(default=BOND_ANG, gt=0)
    """the length a"""

    def check_energies(self, energies_kev: Sequence[float]) -> None:
        """One alone. Raises ConfigError."""
        _check_one_energy("The toy's rates", energies_kev, "Leave instrument.energies_kev out.")

    def parameters(self, streams: RandomRows, rows: Tensor) -> Tensor:
        """Nothing differs between rows: (n, 0)."""
        return torch.zeros(len(rows), 0, device=rows.device)

    def rates(self, parameters: Tensor, aim: Aim, cross_section_barn: Tensor) -> Tensor:
        """Jumps per second (n, S, D, 3)."""
        away = aim.to_beam_ang.unsqueeze(3) - aim.bond_ang.unsqueeze(1)
        return 1.0 / (1.0 + (16.0 / self.bond_ang**2) * away.square().sum(-1))

    def frame_jumps(self, parameters: Tensor, dose_e_per_ang2: Tensor, aim: FrameAim) -> Tensor:
        """None: (n, D) zeros."""
        return torch.zeros_like(aim.cross_section_barn)


JumpLaw = Annotated[CrossSectionJumps | JumpMap | LorentzianJumps, Field(discriminator="kind")]
