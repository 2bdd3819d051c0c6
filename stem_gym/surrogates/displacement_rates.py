"""Cross sections of the events in graphene from the displacement surrogate, beside those of calibrated thresholds.

`python -m stem_gym.surrogates.displacement_rates` prints both, by energy.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stem_gym.core.errors import ConfigError
from stem_gym.simulator.damage import ISOTOPE_MASS_U, RecoilSpectrum, recoil_direction, recoil_spectrum
from stem_gym.simulator.event_rates import CrossSections, KineticsModel, from_thresholds, velocity_variance
from stem_gym.simulator.sheet import CARBON
from stem_gym.surrogates import displacement
from stem_gym.surrogates.displacement import DisplacementSurrogate, site_index

__all__ = ["from_surrogate"]

_LOWEST_EV = 11.0  # nothing happens below it at any site, in any direction
_FLOOR = 0.02  # what the network gives less than this is its own floor, not an outcome of the reference
_EVENTS = {
    "exchange_barn": "Si and C change places",
    "ejection_barn": "C beside Si leaves",
    "edge_barn": "C beside a vacancy leaves",
    "pristine_barn": "C leaves the perfect sheet",
}
_BEYOND = 1e-3  # share of recoils that may lie beyond what it was taught
_AZIMUTHS, _TRANSFERS, _VELOCITIES = 12, 48, 24


def from_surrogate(
    model: KineticsModel, energy_kev: float, surrogate: DisplacementSurrogate | None = None
) -> CrossSections:
    """Sum over recoils of cross section × outcome probability, for each event of a carbon atom.

    Silicon is ahead of the sheet for half of the impacts: those too weak to displace anything turn it over many times
    between two jumps. Recoils leave at the angle of a resting nucleus, evenly about the beam.
    """
    surrogate = surrogate or DisplacementSurrogate.load()
    mass, variance = ISOTOPE_MASS_U[model.carbon], velocity_variance(model.carbon, model.temperature_k)
    recoils = recoil_spectrum(energy_kev, CARBON, mass, _LOWEST_EV, variance, _TRANSFERS, _VELOCITIES)
    _check_recoils(recoils, surrogate, energy_kev)
    tilt = torch.acos(recoil_direction(recoils.transfer_ev, recoils.largest_ev)).float()[:, None]
    azimuth = (torch.arange(_AZIMUTHS) + 0.5) * (2.0 * math.pi / _AZIMUTHS)
    direction = displacement.recoil_direction(tilt, azimuth[None])  # (N, A, 3)
    transfer = recoils.transfer_ev.float()[:, None].expand(-1, _AZIMUTHS)

    def section(site: str, outcome: str) -> float:
        where = torch.full(transfer.shape, site_index(site))
        chance = surrogate.outcome_probabilities(transfer, direction, where)[..., displacement.OUTCOMES.index(outcome)]
        real: Tensor = ((chance - _FLOOR).clamp(min=0.0) / (1.0 - _FLOOR)).mean(1)
        return float((recoils.cross_section_barn * real).sum())

    def beside(outcome: str) -> float:
        return 0.5 * (section("silicon_ahead", outcome) + section("silicon_behind", outcome))

    damaged = 1.0 if model.damage else 0.0
    return CrossSections(
        exchange_far_barn=beside("exchange"),
        exchange_barn=beside("exchange"),
        ejection_barn=damaged * beside("ejected"),
        edge_barn=damaged * section("vacancy", "ejected"),
        pristine_barn=damaged * section("pristine", "ejected"),
    )


def _check_recoils(recoils: RecoilSpectrum, surrogate: DisplacementSurrogate, energy_kev: float) -> None:
    """Refuse a beam whose recoils the surrogate was not taught. Raises ConfigError."""
    highest_ev = surrogate.card.valid_range["transfer_ev"][1]
    weight = recoils.cross_section_barn
    beyond = float((weight * (recoils.transfer_ev > highest_ev)).sum() / weight.sum().clamp(min=1e-300))
    if beyond > _BEYOND:
        raise ConfigError(
            f"The displacement surrogate knows recoils to {highest_ev:g} eV; at {energy_kev:g} keV {beyond:.1%} of "
            "them are harder. Use a lower beam energy, or kinetics.outcomes: thresholds."
        )


def table(energies_kev: Sequence[float]) -> str:
    """Cross sections in barn of both sources as Markdown, a row for each event and energy."""
    model = KineticsModel()
    lines = ["| event | energy / keV | thresholds / barn | surrogate / barn |", "|---|---|---|---|"]
    pairs = [(energy, from_thresholds(model, energy), from_surrogate(model, energy)) for energy in energies_kev]
    for name, told in _EVENTS.items():
        lines += [f"| {told} | {e:g} | {getattr(a, name):.3g} | {getattr(b, name):.3g} |" for e, a, b in pairs]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the cross sections of both."""
    parser = argparse.ArgumentParser(description="Cross sections in barn: calibrated thresholds and surrogate.")
    parser.add_argument("--energies", type=float, nargs="+", default=[60.0, 80.0, 100.0], help="beam energies in keV")
    given = parser.parse_args(arguments)
    print(table(given.energies))


if __name__ == "__main__":
    main()
