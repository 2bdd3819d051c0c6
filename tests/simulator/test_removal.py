"""Atoms that the beam removes: which they are, and settings that do not fit are refused."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from stem_gym.core.errors import ConfigError
from stem_gym.simulator.removal import RemovalModel, fragile_atoms
from stem_gym.simulator.specimens import Specimen


def specimen(numbers: list[int]) -> Specimen:
    """One row of atoms of these elements."""
    z = torch.tensor([numbers])
    none = torch.zeros(1, 0)
    return Specimen(
        torch.full((1, 2), 20.0), torch.rand(1, len(numbers), 2), z, z > 0, none, none[..., None], none, none
    )


@pytest.mark.parametrize("numbers", [[6, 14, 6, 14], [14] * 12 + [6], [6, 6]])
def test_all_atoms_of_the_element_are_found(numbers):
    found = fragile_atoms(specimen(numbers), RemovalModel(element="Si", cross_section_barn=1.0, atoms_max=12))
    sites = found.site[found.there].tolist()
    assert sorted(sites) == [index for index, number in enumerate(numbers) if number == 14]


def test_more_atoms_than_there_are_places_for_are_refused():
    with pytest.raises(ConfigError, match=r"has 3 atoms of Si .* removal.atoms_max is 2"):
        fragile_atoms(specimen([14, 14, 14]), RemovalModel(element="Si", cross_section_barn=1.0, atoms_max=2))


def test_an_unknown_element_is_refused_when_the_settings_are_read():
    with pytest.raises((ValidationError, ConfigError), match="Unknown element 'Sii'"):
        RemovalModel(element="Sii", cross_section_barn=1.0)
