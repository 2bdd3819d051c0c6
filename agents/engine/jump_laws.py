"""What a planner takes for the law of jumps: the rate of each neighbour for a place of the beam."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from agents.engine.honeycomb import BOND_ANG
from agents.policy import Array
from stem_gym.core.config import Config


class SpotLaw(Config):
    """Rate = peak / (1 + (d / width)²)^power per second, d the distance of the beam from the neighbour.

    The public toy k = 1 / (1 + (4 d / a)²) is peak 1, width a / 4, power 1. A probe's flux at an atom has the same
    shape with a higher power: a bright core and a faint skirt.
    """

    kind: Literal["spot"] = "spot"
    peak_per_s: float = Field(default=1.0, gt=0, le=1e3)
    """rate with the beam on the neighbour"""
    width_ang: float = Field(default=BOND_ANG / 4.0, gt=0, le=10)
    """distance scale"""
    power: float = Field(default=1.0, gt=0, le=20)
    """how fast the skirt falls"""

    def rates(self, beam_ang: Array, bonds_ang: Array) -> Array:
        """Per second (…, 3) for the beam seen from the atom (…, 2) and its bonds (…, 3, 2)."""
        square = ((beam_ang[..., None, :] - bonds_ang) ** 2).sum(axis=-1) / self.width_ang**2
        found: Array = self.peak_per_s * (1.0 + square) ** -self.power
        return found


class MapLaw(Config):
    """Rate = floor + peak · exp(−½ ((along − centre) / width)² − ½ (across / (width · anisotropy))²) per second.

    `along` and `across` are the beam's place seen from the atom, along the bond and across it: the form in which a
    measured map of jump rates is told. Rates are those at the current in use.
    """

    kind: Literal["map"] = "map"
    peak_per_s: float = Field(gt=0, le=1e3)
    """largest rate of one neighbour"""
    centre_ang: float = Field(ge=0, le=10)
    """distance of the largest rate from the atom"""
    width_ang: float = Field(gt=0, le=10)
    """standard deviation along the bond"""
    anisotropy: float = Field(default=1.0, gt=0, le=10)
    """standard deviation across the bond over that along it"""
    floor_per_s: float = Field(default=0.0, ge=0, le=10)
    """rate wherever the beam is"""

    def rates(self, beam_ang: Array, bonds_ang: Array) -> Array:
        """Per second (…, 3) for the beam seen from the atom (…, 2) and its bonds (…, 3, 2)."""
        unit = bonds_ang / np.linalg.norm(bonds_ang, axis=-1, keepdims=True)
        beam = beam_ang[..., None, :]
        along = (beam * unit).sum(axis=-1)
        across = beam[..., 1] * unit[..., 0] - beam[..., 0] * unit[..., 1]
        square = ((along - self.centre_ang) / self.width_ang) ** 2
        square = square + (across / (self.width_ang * self.anisotropy)) ** 2
        found: Array = self.floor_per_s + self.peak_per_s * np.exp(-0.5 * square)
        return found


JumpLaw = Annotated[SpotLaw | MapLaw, Field(discriminator="kind")]
TOY = SpotLaw()
