"""What all low-loss recipes share: the beam, the channels, the tail of the zero loss, the image of a thickness."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stem_gym.core.config import Config
from stem_gym.core.elements import atomic_number_of
from stem_gym.core.units import ANG_PER_NM
from stem_gym.simulator.scattering import haadf_cross_section_ang2
from stem_gym.simulator.spectra import channel_weights, source_axis_ev

Composition = tuple[tuple[str, float], ...]  # elements and their atoms per nm³


class LowLossRecipe(Config):
    """Settings of the beam and of the spectrometer's channels; the base of the recipes that have low losses."""

    beam_kev: float = Field(default=60.0, ge=20, le=300)
    collection_mrad: float = Field(default=20.0, gt=0, le=100, description="semi-angle into the spectrometer")
    collected: float = Field(default=0.5, gt=0, le=1, description="share of these electrons that is detected")
    haadf_mrad: tuple[float, float] = Field(default=(80.0, 200.0), description="annulus of the image")
    first_ev: float = Field(gt=0, description="energy of the first channel")
    last_ev: float = Field(gt=0, description="energy of the last channel")
    channels: int = Field(default=128, ge=8, le=4096)
    zero_loss_fwhm_ev: float = Field(gt=0, le=2, description="width of the zero loss, to which all losses are spread")
    tail_per_ev: float = Field(ge=0, le=1, description="zero-loss tail per beam electron at the first channel; assumed")
    tail_exponent: float = Field(ge=0, le=10, description="of the tail's power law in energy; assumed")

    @model_validator(mode="after")
    def _axis_rises(self) -> LowLossRecipe:
        self._check_range("haadf_mrad", 10.0, 1000.0)
        if self.last_ev <= self.first_ev:
            raise ValueError(f"last_ev must exceed first_ev; given {self.first_ev:g} to {self.last_ev:g}")
        return self

    def _check_range(self, name: str, least: float, most: float) -> None:
        """Refuse a pair that does not rise or leaves its bounds."""
        low, high = getattr(self, name)
        if not least <= low <= high <= most:
            raise ValueError(f"{name} must rise from at least {least:g} to at most {most:g}; given {low:g} to {high:g}")

    def axis(self) -> Tensor:
        """Energies of the channels, (C,) in eV."""
        return torch.linspace(self.first_ev, self.last_ev, self.channels)

    def source_ev(self, device: torch.device | str | None = None) -> Tensor:
        """The even energies (S,) at which losses are to be given to `signal`."""
        return source_axis_ev(self.axis().to(device), self.zero_loss_fwhm_ev)

    def signal(self, losses_per_ev: Tensor) -> Tensor:
        """Detected signal per beam electron and channel, (n, K + 1, C), of losses (n, K, S); the last is the tail."""
        axis = self.axis().to(losses_per_ev)
        source = self.source_ev(losses_per_ev.device)
        losses = losses_per_ev @ channel_weights(source, axis, self.zero_loss_fwhm_ev)
        tail = self.tail_per_ev * (axis[1] - axis[0]) * torch.exp(-self.tail_exponent * torch.log(axis / axis[0]))
        return self.collected * torch.cat((losses, tail.expand(len(losses), 1, -1)), dim=1)

    def haadf_per_nm(self, atoms_per_nm3: Composition) -> float:
        """Share of the beam that a nm of a material scatters into the annulus of the image."""
        number = torch.tensor([atomic_number_of(element) for element, _ in atoms_per_nm3])
        density = torch.tensor([d for _, d in atoms_per_nm3], dtype=torch.float64)
        beam_kev = torch.tensor(self.beam_kev, dtype=torch.float64)
        section_nm2 = haadf_cross_section_ang2(number, beam_kev, *self.haadf_mrad) / ANG_PER_NM**2
        return float((density * section_nm2).sum())


def cell_centres_nm(shape: tuple[int, int], width_nm: float, device: torch.device | str | None = None) -> Tensor:
    """Centres (H·W, 2) of the square cells of a field of this width; cell number y · W + x."""
    pixel = width_nm / shape[1]
    y, x = ((torch.arange(size, device=device) + 0.5) * pixel for size in shape)
    return torch.stack(torch.broadcast_tensors(x, y[:, None]), dim=-1).reshape(-1, 2)
