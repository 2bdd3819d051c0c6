"""X-ray lines, cross sections and the detector's resolution against other formulas and numbers worked by hand."""

import math

import numpy as np
import pytest
import torch

from stem_gym.core.errors import ConfigError
from stem_gym.simulator.atomic_shells import shells_of
from stem_gym.simulator.x_rays import (
    bremsstrahlung_cross_section_nm2,
    ionisation_cross_section_nm2,
    line_cross_sections_nm2,
    line_shape,
    resolution_fwhm_ev,
    window_transmission,
)


@pytest.mark.parametrize(("symbol", "energy"), [("C", 3.0), ("O", 6.0), ("Si", 15.0), ("Si", 20.0), ("Fe", 40.0)])
def test_ionisation_agrees_with_lotz_at_low_energy(symbol, energy):
    # Lotz, Z. Phys. 206, 205 (1967): σ = 4.5e-14 cm² eV² · n ln(E/I) / (E I), from measurements at 5 to 20 times the
    # binding energy, where the relativistic terms are small; it claims some 10 %, and 20 % covers Bethe's as well.
    shell = shells_of(symbol)[0]
    lotz = 4.5 * shell.electrons * math.log(energy * 1e3 / shell.binding_ev) / (energy * 1e3 * shell.binding_ev)
    assert ionisation_cross_section_nm2(shell, energy) == pytest.approx(lotz, rel=0.2)  # 1e-14 cm² is 1 nm²


def test_ionisation_rises_again_at_relativistic_energies():
    # −ln(1 − β²) − β² turns the fall with energy around; Bethe's minimum is beyond the rest energy of 511 keV.
    shell = shells_of("O")[0]
    cross = [ionisation_cross_section_nm2(shell, energy) for energy in (200.0, 1000.0, 100000.0)]
    assert cross[0] > cross[1] < cross[2]
    assert ionisation_cross_section_nm2(shell, 0.7) == 0.0


def test_lines_share_their_shells_x_rays():
    lines = line_cross_sections_nm2("Fe", 200.0)
    shell = shells_of("Fe")[0]
    k_shell = [cross for energy, cross in lines if energy > 6000.0]
    assert sum(k_shell) == pytest.approx(
        ionisation_cross_section_nm2(shell, 200.0) * shell.fluorescence_yield, rel=2e-3
    )
    # Kβ to Kα of iron is 0.12 to 0.14 in the tables (Scofield 1974: 0.137 by theory; measured about 0.13).
    assert 0.12 < k_shell[1] / k_shell[0] < 0.145


def test_cliff_lorimer_factor_of_nickel_in_aluminium():
    # k(Ni Kα, Al Kα) by weight of thin NiAl at 200 kV is near 1.6 to 1.7 (Williams and Carter: k(Ni/Si) 1.4 to 1.6,
    # k(Al/Si) about 1): here the ratio of lines per gram, 25 % for the Bethe parameters.
    (aluminium,) = [cross for energy, cross in line_cross_sections_nm2("Al", 200.0) if abs(energy - 1486) < 5]
    (nickel,) = [cross for energy, cross in line_cross_sections_nm2("Ni", 200.0) if abs(energy - 7474) < 20]
    assert (aluminium / 26.98) / (nickel / 58.69) == pytest.approx(1.6, rel=0.25)


def test_an_element_without_lines_is_refused():
    with pytest.raises(ConfigError, match="'Kr'"):
        line_cross_sections_nm2("Kr", 200.0)


def test_bremsstrahlung_is_kramers_law_by_hand():
    # 16π/(3√3) = 9.6740; α r_e² = 7.29735e-3 · (2.81794e-6 nm)² = 5.79468e-14 nm²; β² = 0.483465 at 200 keV. For Z = 29
    # at 1 keV: 9.6740 · 5.79468e-14 · 841 / 0.483465 / 1000 = 9.7515e-13 nm²/eV.
    energy = torch.tensor([1000.0, 10000.0, 200001.0], dtype=torch.float64)
    cross = bremsstrahlung_cross_section_nm2(energy, 29, 200.0)
    assert cross[0].item() == pytest.approx(9.7515e-13, rel=1e-4, abs=0)
    assert cross[1].item() == pytest.approx(9.7515e-14, rel=1e-4, abs=0)
    assert cross[2].item() == 0.0


def test_resolution_follows_the_statistics_of_pairs():
    # A quarter of a million photons of 10 keV: 10000 / 3.76 pairs with a Fano factor of 0.12, and the noise that makes
    # 130 eV at 5895 eV. 8 ln 2 · 0.12 · 3.76 is 2.502 for the formula's 2.5.
    rng = np.random.default_rng(0)
    pairs = 10000 / 3.76
    noise_var = (130.0 / 2.35482) ** 2 - 0.12 * 3.76 * 5895.0
    measured = 3.76 * rng.normal(pairs, math.sqrt(0.12 * pairs), 250000) + rng.normal(0, math.sqrt(noise_var), 250000)
    ours = resolution_fwhm_ev(torch.tensor(10000.0, dtype=torch.float64)).item()
    assert 2.35482 * measured.std() == pytest.approx(ours, rel=5 / math.sqrt(2 * 250000))


def test_a_line_keeps_its_x_rays_whatever_the_channels():
    fine, coarse = torch.arange(0.0, 12000.0, 10.0), torch.arange(0.0, 12000.0, 200.0)
    line = torch.tensor([1740.0, 6401.0])
    for channel in (fine, coarse):
        torch.testing.assert_close(line_shape(channel, line).sum(-1), torch.ones(2), rtol=0, atol=1e-5)
    shape = line_shape(fine.double(), line.double())
    mean = (shape * fine).sum(-1)
    spread = torch.sqrt((shape * (fine - mean[:, None]) ** 2).sum(-1) - 10.0**2 / 12)
    torch.testing.assert_close(mean, line.double(), rtol=0, atol=0.01)
    torch.testing.assert_close(2.35482 * spread, resolution_fwhm_ev(line.double()), rtol=1e-4, atol=0)


def test_the_window_passes_half_where_it_says():
    energy = torch.tensor([200.0, 400.0, 4000.0])
    expected = torch.tensor([2.0**-8, 0.5, 2.0 ** (-1e-3)])
    torch.testing.assert_close(window_transmission(energy, 400.0), expected)
