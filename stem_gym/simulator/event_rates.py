"""How often events happen to a doped sheet: settings, published numbers, and cross sections from thresholds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from stem_gym.core.config import Config
from stem_gym.simulator.damage import ISOTOPE_MASS_U, displacement_cross_section
from stem_gym.simulator.jumps import CrossSectionJumps, JumpLaw
from stem_gym.simulator.sheet import CARBON

# Out-of-plane mean square velocity of carbon in graphene at 300 K (Susi et al., Nat. Commun. 7, 13040, 2016), m²/s².
VELOCITY_VARIANCE_300K = {"C": 3.17e5, "12C": 3.17e5, "13C": 2.86e5}


class PublishedRates(Config):
    """Cross sections in barn of the events of one dopant, measured at one energy."""

    energy_kev: float = Field(default=60.0, gt=0)
    exchange_barn: float = Field(default=0.0, ge=0)
    ejection_barn: float = Field(default=0.0, ge=0)
    rotation_barn: float = Field(default=0.0, ge=0)
    reversal_barn: float = Field(default=0.0, ge=0)
    replacement_barn: float = Field(default=0.0, ge=0)
    """a carbon adatom takes the dopant's place"""


# Su et al., Sci. Adv. 5, eaav2252 (2019), table 1, at 60 keV. Where only a bound is given, the bound is used.
PUBLISHED = {
    "P": PublishedRates(
        exchange_barn=0.05, ejection_barn=0.01, rotation_barn=11.2, reversal_barn=200.0, replacement_barn=0.07
    ),
    "N": PublishedRates(rotation_barn=0.9, reversal_barn=22.0),
    "Al": PublishedRates(ejection_barn=0.25),
}


# Nobody has published how often germanium moves under a beam. It stands threefold and out of the sheet, or fourfold in
# it, as silicon does (Tripathi et al., ACS Nano 12, 4641, 2018), and the atom that is struck is carbon for both; that
# its rates are those of silicon is an assumption.
ASSUMED_AS_SILICON = frozenset({"Ge"})


class Damage(Config):
    """Loss of carbon by knock-on displacement."""

    ejection_ev: float = Field(default=17.0, gt=1, lt=100)
    """threshold of a carbon beside a dopant"""
    edge_ev: float = Field(default=19.5, gt=1, lt=100)
    """threshold of a carbon with a missing neighbour"""
    pristine_ev: float = Field(default=21.14, gt=1, lt=100)
    """threshold in the perfect sheet (Susi et al., Nat. Commun. 7, 13040, 2016)"""


class Contamination(Config):
    """Growth of amorphous carbon on the sheet, in layers of as many atoms as the sheet has.

    That it grows where the beam stays is well known (Dyck et al., J. Vac. Sci. Technol. B 36, 011801, 2018). Every
    number here is an assumption: they depend on how clean the sheet and the column are.
    """

    layers_per_dose: float = Field(default=5e-11, ge=0)
    """layers per e/Å² at a place: by default about one in a hundred seconds under a probe of 40 pA"""
    layers_per_s: float = Field(default=1e-4, ge=0)
    """layers per second everywhere, with the beam or without"""
    pin_layers: float = Field(default=0.5, gt=0)
    """below so many layers the events beside a dopant are 1/e as frequent"""
    buried_layers: float = Field(default=2.0, gt=0)
    """a dopant below more is not found in a frame"""


class KineticsModel(Config):
    """Which events there are, and how often."""

    jumps: JumpLaw = CrossSectionJumps()
    """how dopants change places"""
    damage: Damage | None = Damage()
    """how carbon is lost; null: never"""
    outcomes: Literal["thresholds", "surrogate"] = "thresholds"
    """where cross sections of silicon and carbon come from: thresholds calibrated to experiments, or what molecular
    dynamics of recoils has taught the displacement surrogate (thresholds are then without effect)"""
    carbon: Literal["C", "12C", "13C"] = "C"
    """isotope of the sheet; C is the natural mixture"""
    temperature_k: float = Field(default=300.0, gt=0, le=1500)
    """of the sheet"""
    healing_per_s: float = Field(default=0.0, ge=0)
    """rate at which a vacancy is filled by a carbon adatom; depends on their supply, so it is an assumption"""
    capture_per_s: float = Field(default=0.0, ge=0)
    """rate at which a vacancy catches a silicon adatom; an assumption likewise"""
    rates: dict[str, PublishedRates] = Field(default_factory=dict)
    """cross sections of dopants by symbol, beside those built in for P, N and Al; Si comes from the thresholds, and
    Ge, of which no number is published, is assumed to do as Si does"""
    contamination: Contamination | None = None
    """hydrocarbons that gather under the beam; null: a clean sheet stays clean"""
    vacancies_max: int = Field(default=8, ge=1, le=64)
    """vacancies that a row can hold"""


def velocity_variance(isotope: str, temperature_k: float) -> float:
    """Out-of-plane ⟨v²⟩ in m²/s²: the published value at 300 K, carried to T as that of one quantum oscillator.

    ⟨v²⟩ = (ħω / 2M) coth(ħω / 2kT), with ω from the value at 300 K.
    """
    mass_kg = ISOTOPE_MASS_U[isotope] * 1.66053906660e-27
    boltzmann = 1.380649e-23
    target = VELOCITY_VARIANCE_300K[isotope] * mass_kg / boltzmann / 300.0  # (x / 2) coth(x / 2 · …), x = ħω / k 300 K
    low, high = 1e-6, 100.0
    for _ in range(80):
        x = 0.5 * (low + high)
        low, high = (x, high) if 0.5 * x / math.tanh(0.5 * x) < target else (low, x)
    return VELOCITY_VARIANCE_300K[isotope] * math.tanh(0.5 * x) / math.tanh(0.5 * x * 300.0 / temperature_k)


@dataclass(frozen=True)
class CrossSections:
    """Of a carbon atom, in barn, for one beam energy, isotope and temperature."""

    exchange_far_barn: float  # beside silicon that stands out on the beam's side
    exchange_barn: float  # and on the exit side
    ejection_barn: float  # beside a dopant
    edge_barn: float  # with a missing neighbour
    pristine_barn: float


def from_thresholds(model: KineticsModel, energy_kev: float) -> CrossSections:
    """Those of displacement above the model's thresholds; an exchange lies between its own and that of ejection."""
    mass, variance = ISOTOPE_MASS_U[model.carbon], velocity_variance(model.carbon, model.temperature_k)

    def section(threshold_ev: float) -> float:
        return float(displacement_cross_section(energy_kev, CARBON, mass, threshold_ev, variance))

    damage, jumps = model.damage, model.jumps
    ejection = section(damage.ejection_ev) if damage else 0.0
    near = far = 0.0
    if isinstance(jumps, CrossSectionJumps):
        near, far = (max(0.0, section(ev) - ejection) for ev in (jumps.exchange_ev, jumps.exchange_far_ev))
    edge, pristine = (section(damage.edge_ev), section(damage.pristine_ev)) if damage else (0.0, 0.0)
    return CrossSections(far, near, ejection, edge, pristine)
