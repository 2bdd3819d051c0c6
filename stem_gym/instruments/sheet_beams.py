"""The beam energies that a column can be set to: probe, scattering and displacement at each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from stem_gym.core.errors import ConfigError
from stem_gym.simulator.event_rates import CrossSections, KineticsModel
from stem_gym.simulator.flux import FluxTable, highest_lattice_sum
from stem_gym.simulator.jumps import BOND_ANG
from stem_gym.simulator.kinetics import Kinetics
from stem_gym.simulator.microscope import SheetColumn
from stem_gym.simulator.optics import Optics
from stem_gym.simulator.scattering import OBJECT_SIGMA_ANG, haadf_cross_section_ang2


class Beams:
    """Tables over E energies, the first the probe's own: `flux` on atoms, and `signal` as wide as an atom scatters.

    Raises ConfigError for energies that the rates of the sheet do not cover, and for pictures at several energies.
    """

    def __init__(self, config: SheetColumn, device: torch.device) -> None:
        probe = config.probe
        self.energies_kev = tuple(dict.fromkeys((probe.energy_kev, *config.energies_kev)))
        if config.pictures and len(self.energies_kev) > 1:
            raise ConfigError(
                "instrument.pictures are made for one beam energy; leave pictures out, or instrument.energies_kev; "
                f"given {list(self.energies_kev)} keV."
            )
        settings = probe.model_dump(exclude={"defocus_sd_ang", "energy_kev"})
        optics = [Optics.of(1, device=device, energy_kev=energy, **settings) for energy in self.energies_kev]
        self.optics = optics[0]
        thermal, spread = config.specimen.thermal_sigma_ang, probe.defocus_sd_ang
        blur = (thermal**2 + OBJECT_SIGMA_ANG**2) ** 0.5
        self.flux = [FluxTable.of(one, spread, thermal) for one in optics]
        self.signal = [FluxTable.of(one, spread, blur) for one in optics]
        numbers, detector = torch.arange(93, device=device), config.detector
        self.weight_ang2 = torch.stack(  # (E, Z) collected by the detector, by atomic number
            [
                haadf_cross_section_ang2(
                    numbers, torch.tensor(energy, device=device), detector.inner_mrad, detector.outer_mrad
                )
                for energy in self.energies_kev
            ]
        )
        self._known_kev = torch.tensor(self.energies_kev, device=device)

    def kinetics(self, config: SheetColumn, device: torch.device) -> Kinetics:
        """The events of the sheet at all energies."""
        elements = tuple(dict.fromkeys(dopant.element for dopant in config.specimen.dopants)) or ("Si",)
        bound = max(highest_lattice_sum(table.density, BOND_ANG) for table in self.flux)
        sections = _learned_sections(config.kinetics, self.energies_kev)
        return Kinetics(config.kinetics, self.energies_kev, elements, bound, device, sections)

    def number(self, energy_kev: Tensor) -> Tensor:
        """Which of the energies (n,) int64 is meant by `energy_kev` (n,)."""
        return (energy_kev.unsqueeze(1) - self._known_kev).abs().argmin(1)

    def densities(self, energy: Tensor, defocus_ang: Tensor) -> tuple[Tensor, Tensor]:
        """Flux tables (n, R) of the probe at energies (n,) and defoci (n,), and those as wide as an atom scatters."""
        flux, signal = self.flux[0].rows(defocus_ang), self.signal[0].rows(defocus_ang)
        for number in range(1, len(self.energies_kev)):
            chosen = (energy == number).unsqueeze(1)
            flux = torch.where(chosen, self.flux[number].rows(defocus_ang), flux)
            signal = torch.where(chosen, self.signal[number].rows(defocus_ang), signal)
        return flux, signal


def _learned_sections(model: KineticsModel, energies_kev: tuple[float, ...]) -> list[CrossSections] | None:
    """Cross sections from the displacement surrogate, where the configuration says so."""
    if model.outcomes != "surrogate":
        return None
    from stem_gym.surrogates.displacement_rates import from_surrogate  # weights are read only where they are used

    return [from_surrogate(model, energy) for energy in energies_kev]
