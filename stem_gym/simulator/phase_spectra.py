"""Spectra of material phases: what a nanometre of each gives to an energy-loss spectrometer or an X-ray detector."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stem_gym.core.config import Config
from stem_gym.core.elements import atomic_number_of
from stem_gym.simulator.atomic_shells import shells_of
from stem_gym.simulator.core_loss import (
    EDGE_EXPONENT,
    STRENGTH_PER_ELECTRON,
    drude_loss,
    edge_cross_section_nm2,
    edges_of,
    effective_number_of,
    inelastic_mean_free_path_nm,
    line_cross_section_nm2,
    loosely_bound_electrons,
    loss_weights,
    white_line_shares,
)
from stem_gym.simulator.smooth_fields import weighted_sum
from stem_gym.simulator.x_rays import (
    bremsstrahlung_cross_section_nm2,
    line_cross_sections_nm2,
    line_shape,
    window_transmission,
)

# Elements whose d or f states are partly empty, so that their L3 and L2 (3d) or M5 and M4 (4f) edges start with a line.
_WHITE = frozenset(["Ca", "Ti", "V", "Cr", "Mn", "Fe", "Co", "Ni", "Ba", "La", "Ce"])
_FIRST_LINES = ("L3", "M5")
_SINGLE_REACH = 3.0  # plasmon energies at which the tail of a single loss is cut
_LOSS_REACH = 5.0  # plasmon energies by which the axis is continued below its start, for what plural losses bring in


class Phase(Config):
    """A material: what it is made of, how dense it is, and the state of its edges."""

    composition: dict[str, float] = Field(min_length=1)
    """atoms of each element in a formula unit"""
    atoms_per_nm3: float = Field(gt=0, lt=250)
    """all elements together"""
    edge_shift_ev: dict[str, float] = Field(default_factory=dict)
    """displacement of an element's edges by its valence and surroundings; 0.1 to 2 eV is usual"""
    shift_spread_ev: float = Field(default=0.0, ge=0, le=5)
    """the same displacement differs by up to this from specimen to specimen, for the elements of `edge_shift_ev`"""
    white_line_ratio: float = Field(default=2.0, gt=0, le=10)
    """area of L3 (M5) to L2 (M4); 2 by the number of electrons, more for half-filled d shells: a measure of valence"""
    white_line_strength: float = Field(default=0.6, ge=0, le=5)
    """oscillator strength of both lines of an atom; an assumption: as much as the 50 eV of continuum behind them"""

    @model_validator(mode="after")
    def _known(self) -> Phase:
        for symbol in self.composition:
            shells_of(symbol)
        strange = sorted(set(self.edge_shift_ev) - set(self.composition))
        if strange:
            raise ValueError(f"edge_shift_ev names {strange}, which are not in the composition")
        if any(amount <= 0.0 for amount in self.composition.values()):
            raise ValueError("amounts in the composition must be positive")
        return self

    def densities(self) -> dict[str, float]:
        """Atoms of each element in a nm³."""
        formula = sum(self.composition.values())
        return {symbol: self.atoms_per_nm3 * amount / formula for symbol, amount in self.composition.items()}


class Channels(Config):
    """An axis of evenly spaced channels."""

    start_ev: float = Field(ge=0)
    """energy of the first channel"""
    channel_ev: float = Field(gt=0, le=500)
    """width of a channel"""
    channels: int = Field(default=128, ge=8, le=8192)

    def axis(self) -> Tensor:
        """Energies of the channels' centres, (C,) in eV."""
        return self.start_ev + self.channel_ev * torch.arange(self.channels, dtype=torch.float32)


class Eels(Channels):
    """A core-loss window of an electron energy-loss spectrometer."""

    kind: Literal["eels"] = "eels"
    start_ev: float = Field(default=430.0, ge=50)
    """energy of the first channel"""
    channel_ev: float = Field(default=2.0, gt=0, le=50)
    """width of a channel"""
    collection_mrad: float = Field(default=30.0, gt=1, le=150)
    resolution_ev: float = Field(default=1.0, gt=0, le=20)
    """full width at half maximum of the zero-loss peak, lifetime of the core hole included"""
    plasmon_ev: float = Field(default=23.0, gt=3, le=60)
    """of all phases alike (an assumption): what a second loss costs"""
    plasmon_width_ev: float = Field(default=10.0, gt=0, le=60)
    orders: int = Field(default=2, ge=0, le=4)
    """losses besides the core loss that are told apart; more of them count as this many"""
    background_exponent: float = Field(default=3.0, gt=1.5, le=6)
    """r of the power law E^−r, before the share of it that the aperture takes in (0.3 more); 2 to 5 is usual"""
    background_spread: float = Field(default=0.1, ge=0, le=1)
    """how far r may be from it, from specimen to specimen"""

    @model_validator(mode="after")
    def _above_the_plasmons(self) -> Eels:
        if self.start_ev <= _LOSS_REACH * self.plasmon_ev + self.channel_ev:
            raise ValueError(
                f"start_ev must be beyond {_LOSS_REACH:g} plasmon energies: this is a core-loss window; given "
                f"{self.start_ev} with a plasmon at {self.plasmon_ev}"
            )
        return self

    def weights(self, thickness_nm: Tensor, share: Tensor, phases: tuple[Phase, ...], energy_kev: float) -> Tensor:
        """Shares (…, orders + 1) of electrons with 0, 1, … losses besides the core loss; `share` (…, P) of phases."""
        inverse = [
            1.0
            / float(inelastic_mean_free_path_nm(energy_kev, self.collection_mrad, effective_number_of(p.composition)))
            for p in phases
        ]
        return loss_weights(thickness_nm * weighted_sum(share.unbind(dim=-1), inverse), self.orders)

    def components(self, phases: tuple[Phase, ...], energy_kev: float, uniform: Tensor) -> Tensor:
        """Expected electrons per beam electron, channel and nm: (n, P, orders + 1, C).

        `uniform` (n, P + 1) in (0, 1) decides the displacements of edges and the background's exponent.
        """
        below = math.ceil(_LOSS_REACH * self.plasmon_ev / self.channel_ev)
        energy = self.start_ev + self.channel_ev * torch.arange(-below, self.channels, device=uniform.device)
        spread = torch.tensor([p.shift_spread_ev for p in phases], device=uniform.device)
        shift = (2.0 * uniform[:, : len(phases)] - 1.0) * spread
        exponent = self.background_exponent + self.background_spread * (2.0 * uniform[:, len(phases)] - 1.0)
        beam = (energy_kev, self.collection_mrad)
        once = torch.stack(
            [
                self._single(phase, energy, (shift[:, i, None], exponent[:, None]), beam)
                for i, phase in enumerate(phases)
            ],
            dim=1,
        )
        return torch.einsum("npe,kec->npkc", self.channel_ev * once, _losses(self, below).to(once))

    def _single(self, phase: Phase, energy: Tensor, drawn: tuple[Tensor, Tensor], beam: tuple[float, float]) -> Tensor:
        """Core-loss probability per eV and nm (n, E) of a phase; `drawn` are shift and background exponent (n, 1)."""
        shift, exponent = drawn
        total = torch.zeros((len(shift), len(energy)), device=energy.device)
        # The resolution and the channel itself, as one Gaussian.
        blur = math.hypot(self.resolution_ev / math.sqrt(8.0 * math.log(2.0)), self.channel_ev / math.sqrt(12.0))
        shares = dict(zip((True, False), white_line_shares(phase.white_line_ratio), strict=True))
        for symbol, density in phase.densities().items():
            outer = float(loosely_bound_electrons(symbol))
            # All loosely bound electrons as one edge at the plasmon energy, with all their strength.
            loose = (self.plasmon_ev, outer, exponent - 1.0)
            total = total + density * edge_cross_section_nm2(energy, loose, beam, blur)
            moved = phase.edge_shift_ev.get(symbol, 0.0) + shift * (symbol in phase.edge_shift_ev)
            for shell, onset in edges_of(symbol, float(energy[-1]) + 5.0 * blur):
                strength = STRENGTH_PER_ELECTRON * shell.electrons
                edge = (onset + moved, strength, EDGE_EXPONENT)
                total = total + density * edge_cross_section_nm2(energy, edge, beam, blur)
                if symbol in _WHITE and shell.name != "K":
                    white = phase.white_line_strength * shares[shell.name in _FIRST_LINES]
                    total = total + density * line_cross_section_nm2(energy, (onset + moved, white), beam, blur)
        return total


class Eds(Channels):
    """An energy-dispersive X-ray detector."""

    kind: Literal["eds"] = "eds"
    start_ev: float = Field(default=200.0, gt=0)
    """energy of the first channel"""
    channel_ev: float = Field(default=80.0, gt=0, le=500)
    """width of a channel"""
    solid_angle_sr: float = Field(default=0.7, gt=0, lt=12.5)
    manganese_fwhm_ev: float = Field(default=130.0, gt=80, le=300)
    """resolution at Mn Kα"""
    window_half_ev: float = Field(default=400.0, gt=0, le=2000)
    """X-ray energy of which the detector's window lets half pass"""

    def weights(self, thickness_nm: Tensor, share: Tensor, phases: tuple[Phase, ...], energy_kev: float) -> Tensor:
        """X-rays do not care how often the electron lost energy otherwise: ones (…, 1)."""
        return torch.ones_like(thickness_nm)[..., None]

    def components(self, phases: tuple[Phase, ...], energy_kev: float, uniform: Tensor) -> Tensor:
        """Expected X-rays detected per beam electron, channel and nm: (n, P, 1, C); the same for every row."""
        spectra = _x_ray_spectra(self, phases, energy_kev).to(uniform.device)
        return spectra[None, :, None].expand(len(uniform), -1, -1, -1)


Detector = Annotated[Eels | Eds, Field(discriminator="kind")]


def _losses(window: Eels, below: int) -> Tensor:
    """Matrices (orders + 1, below + C, C) that add 0, 1, … losses to a spectrum and cut it to the window."""
    return _loss_matrices(
        below, window.channels, window.orders, (window.channel_ev, window.plasmon_ev, window.plasmon_width_ev)
    )


@lru_cache(maxsize=16)
def _loss_matrices(below: int, channels: int, orders: int, loss: tuple[float, float, float]) -> Tensor:
    channel_ev, plasmon_ev, width_ev = loss
    size = below + channels
    single = torch.zeros(size, dtype=torch.float64)
    reach = math.ceil(_SINGLE_REACH * plasmon_ev / channel_ev) + 1
    single[:reach] = drude_loss(channel_ev * torch.arange(reach, dtype=torch.float64), plasmon_ev, width_ev)
    offset = torch.arange(size)[None, :] - torch.arange(size)[:, None]  # arrival minus departure
    once = torch.where(offset >= 0, single[offset.clamp(min=0)], 0.0)
    powers = [torch.eye(size, dtype=torch.float64)]
    for _ in range(orders):
        powers.append(powers[-1] @ once)
    return torch.stack(powers)[:, :, below:].to(torch.float32)


@lru_cache(maxsize=16)
def _cached_x_ray_spectra(window: str, phases: tuple[str, ...], energy_kev: float) -> Tensor:
    detector = Eds.model_validate_json(window)
    return torch.stack([_x_ray_spectrum(detector, Phase.model_validate_json(p), energy_kev) for p in phases])


def _x_ray_spectra(detector: Eds, phases: tuple[Phase, ...], energy_kev: float) -> Tensor:
    return _cached_x_ray_spectra(
        detector.model_dump_json(), tuple(phase.model_dump_json() for phase in phases), energy_kev
    )


def _x_ray_spectrum(detector: Eds, phase: Phase, energy_kev: float) -> Tensor:
    """X-rays detected per beam electron, channel and nm of a phase, (C,)."""
    channel = detector.axis().to(torch.float64)
    total = torch.zeros_like(channel)
    for symbol, density in phase.densities().items():
        energy, cross = (
            torch.tensor(v, dtype=torch.float64) for v in zip(*line_cross_sections_nm2(symbol, energy_kev), strict=True)
        )
        passed = cross * window_transmission(energy, detector.window_half_ev)
        total = total + density * (passed @ line_shape(channel, energy, detector.manganese_fwhm_ev))
        continuum = bremsstrahlung_cross_section_nm2(channel, atomic_number_of(symbol), energy_kev)
        slow = window_transmission(channel, detector.window_half_ev)
        total = total + density * detector.channel_ev * continuum * slow
    return (detector.solid_angle_sr / (4.0 * math.pi) * total).to(torch.float32)
