"""Specimens of several phases: their spectra against independent sums, and where the rare ones are."""

import math

import pytest
import torch
from pydantic import ValidationError

from stem_gym.core.streams import Streams, row_seeds
from stem_gym.simulator.atomic_shells import shells_of
from stem_gym.simulator.core_loss import (
    angular_factor,
    drude_loss,
    effective_number_of,
    inelastic_mean_free_path_nm,
    plural_scattering,
)
from stem_gym.simulator.phase_specimens import PhasesRecipe
from stem_gym.simulator.phase_spectra import Eds, Eels, Phase
from stem_gym.simulator.x_rays import ionisation_cross_section_nm2

TITANATE = Phase(composition={"Sr": 1.0, "Ti": 1.0, "O": 3.0}, atoms_per_nm3=84.0)
MONOXIDE = Phase(composition={"Mn": 1.0, "O": 1.0}, atoms_per_nm3=91.1)
SHAPE = (32, 48)


def build(recipe=None, rows=(0, 1, 2, 3), shape=SHAPE, batch=12):
    streams = Streams(row_seeds(3, batch))
    streams.next_episode(torch.arange(batch))
    return (recipe or PhasesRecipe()).build(streams, torch.tensor(rows), shape)


def shares(recipe, rows=range(8), shape=SHAPE):
    return recipe.shares(Streams(row_seeds(3, 64)), torch.tensor(list(rows)), shape)


@pytest.mark.parametrize("detector", [Eels(), Eds()], ids=["eels", "eds"])
def test_a_specimen_has_the_shapes_of_the_contract(detector):
    recipe = PhasesRecipe(detector=detector)
    specimen = build(recipe)
    components = 5 * (3 if detector.kind == "eels" else 1)
    assert specimen.image.shape == (4, *SHAPE)
    assert specimen.loadings.shape == (4, SHAPE[0] * SHAPE[1], components)
    assert specimen.components.shape == (4, components, 128)
    assert recipe.axis().shape == (128,)
    spectra = specimen.loadings @ specimen.components
    assert (spectra > 0.0).all() and (spectra.sum(-1) < 0.02).all(), "a small part of the beam"
    assert (specimen.image > 0.0).all() and (specimen.image < 0.5).all()


@pytest.mark.parametrize("detector", [Eels(), Eds()], ids=["eels", "eds"])
def test_rows_do_not_depend_on_the_batch(detector):
    recipe = PhasesRecipe(detector=detector)
    whole = build(recipe, rows=range(12), shape=(20, 31))
    for rows in ([5], [7, 2], [11, 0, 3]):
        part = build(recipe, rows=rows, shape=(20, 31))
        for name in ("image", "loadings", "components"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name


def test_shares_fill_every_cell():
    found = shares(PhasesRecipe())
    torch.testing.assert_close(found.sum(1), torch.ones(8, *SHAPE), rtol=0, atol=1e-5)
    assert (found >= -1e-6).all()
    three = PhasesRecipe(phases=(TITANATE, MONOXIDE, TITANATE), precipitate=None, interface=None, defect=None)
    found = shares(three)
    assert found.shape[1] == 3
    torch.testing.assert_close(found.sum(1), torch.ones(8, *SHAPE), rtol=0, atol=1e-5)


def test_rare_states_are_rare_and_where_they_belong():
    recipe = PhasesRecipe(defects_max=1, precipitates_max=1)
    found = shares(recipe, rows=range(64), shape=(64, 64))
    area = (found > 0.5).float().mean((0, 2, 3))
    assert area[:2].min() > 0.2, "both domains fill much of the field"
    assert 0.0 < area[3] < 0.05, "interface"
    # A Gaussian spot of 1.2 nm is more than a half over π 2 ln 2 · 1.2² = 6.3 nm² of 3600; the border cuts some.
    assert 0.5 * 6.3 / 3600 < area[4].item() < 6.3 / 3600
    # Where the interface's own state is strong both domains are near, within two widths: 4 nm; but for thin necks.
    near = torch.nn.functional.max_pool2d(found[:, :2], 9, stride=1, padding=4)
    assert (near.amin(1)[found[:, 3] > 0.5] > 0.5).float().mean() > 0.95


def test_precipitates_have_no_interface_of_domains_inside():
    # The same draws with and without the state of interfaces: the middles of precipitates stay what they are.
    recipe = PhasesRecipe(interface_share=0.9, defect=None)
    with_state, without = (shares(recipe.model_copy(update=change))[:, 2] for change in ({}, {"interface": None}))
    middle = without > 0.99
    assert middle.any()
    torch.testing.assert_close(with_state[middle], without[middle], rtol=0, atol=0.02)


def test_precipitates_have_their_size():
    recipe = PhasesRecipe(precipitates_max=1, precipitate_radius_nm=(6.0, 6.0), interface=None, defect=None)
    area_nm2 = shares(recipe, rows=range(40), shape=(60, 60))[:, -1].sum((1, 2))  # cells of 1 nm²
    # An ellipse of stretched and shrunk axes keeps its area π r², but for the soft edge; those at the border lose some.
    assert area_nm2.max().item() == pytest.approx(math.pi * 36.0, rel=0.1)
    assert (area_nm2 > 0.2 * math.pi * 36.0).all()


# ---- spectra ----


def test_losses_are_those_of_plural_scattering():
    # One spectrum of t/λ = 0.8 with every order told apart, against the Fourier formula on an axis from 0 on.
    window = Eels(orders=4, background_spread=0.0)
    tau, thickness = torch.tensor([0.8]), 50.0
    once = window.model_copy(update={"orders": 0}).components((TITANATE,), 200.0, torch.full((1, 2), 0.5))[0, 0, 0]
    parts = window.components((TITANATE,), 200.0, torch.full((1, 2), 0.5))[0, 0]
    torch.testing.assert_close(parts[0], once)
    weight = torch.exp(-tau) * torch.stack([tau[0] ** k / math.factorial(k) for k in range(4)])
    weight = torch.cat((weight, 1.0 - weight.sum(0, keepdim=True)))
    ours = thickness * weight @ parts
    wide = Eels(start_ev=240.0, channels=223, orders=0, background_spread=0.0)
    core = wide.components((TITANATE,), 200.0, torch.full((1, 2), 0.5))[0, 0, 0].double()
    plasmon = torch.zeros(223, dtype=torch.float64)
    plasmon[:36] = drude_loss(2.0 * torch.arange(36, dtype=torch.float64), 23.0, 10.0)
    theirs = thickness * plural_scattering(plasmon, core, tau.double())[0, 95:]
    # What is left: losses of more than four plasmons, and what four of them bring from before 315 eV.
    torch.testing.assert_close(ours.double(), theirs, rtol=0.01, atol=0)


def test_weights_use_the_mean_free_path_of_the_mixture():
    window = Eels()
    path = [
        inelastic_mean_free_path_nm(200.0, 30.0, effective_number_of(p.composition)).item()
        for p in (TITANATE, MONOXIDE)
    ]
    weight = window.weights(torch.tensor([40.0]), torch.tensor([[0.25, 0.75]]), (TITANATE, MONOXIDE), 200.0)
    tau = 40.0 * (0.25 / path[0] + 0.75 / path[1])
    assert weight[0, 0].item() == pytest.approx(math.exp(-tau), rel=1e-5)
    assert weight.sum().item() == pytest.approx(1.0)


def test_edges_scale_with_their_atoms_and_stand_on_a_falling_background():
    spectrum = Eels(channels=128, orders=0).components((TITANATE,), 200.0, torch.full((1, 2), 0.5))[0, 0, 0]
    energy = Eels().axis()
    before, after = (energy > 500) & (energy < 526), (energy > 540) & (energy < 560)
    assert (spectrum[before].diff() < 0).all()
    assert spectrum[after].mean() > 1.3 * spectrum[before].mean(), "the O K edge"
    more = TITANATE.model_copy(update={"atoms_per_nm3": 168.0})
    twice = Eels(orders=0).components((more,), 200.0, torch.full((1, 2), 0.5))[0, 0, 0]
    torch.testing.assert_close(twice, 2.0 * spectrum)


@pytest.mark.parametrize("exponent", [2.5, 3.5])
def test_the_background_falls_with_its_exponent(exponent):
    # Aluminium has no edge between 100 eV and 1.5 keV: what is left is E^-r times the share that the aperture takes in.
    metal = Phase(composition={"Al": 1.0}, atoms_per_nm3=60.2)
    window = Eels(start_ev=400.0, channel_ev=4.0, background_exponent=exponent, orders=0, background_spread=0.4)
    spectrum = window.components((metal,), 200.0, torch.tensor([[0.5, 0.5], [0.5, 1.0]]))[:, 0, 0]
    axis = window.axis()
    expected = axis[100] / axis[20], angular_factor(axis[100], 200.0, 30.0) / angular_factor(axis[20], 200.0, 30.0)
    for row, power in zip(spectrum, (exponent, exponent + 0.4), strict=True):
        assert (row[100] / row[20]).item() == pytest.approx((expected[0] ** -power * expected[1]).item(), rel=1e-4)


def test_the_valence_moves_and_weighs_white_lines():
    # Fine channels: the place of the largest channel is the line, the areas above the edges are as 4 to 1.
    window = Eels(start_ev=620.0, channel_ev=0.2, channels=250, resolution_ev=0.6, orders=0, plasmon_ev=23.0)
    energy = window.axis()
    moved = Phase(
        composition={"Mn": 1.0, "O": 1.0}, atoms_per_nm3=91.1, edge_shift_ev={"Mn": -1.5}, white_line_ratio=4.0
    )
    without = moved.model_copy(update={"white_line_strength": 0.0})
    uniform = torch.full((1, 2), 0.5)
    spectrum, continuum = (window.components((p,), 200.0, uniform)[0, 0, 0] for p in (moved, without))
    assert energy[spectrum.argmax()].item() == pytest.approx(638.7 - 1.5, abs=0.11)
    lines = spectrum - continuum
    ratio = lines[energy < 643.0].sum() / lines[energy > 643.0].sum()
    # The dipole formula weighs L2 a little less, by 1 / E and the aperture: 2.5 %.
    assert ratio.item() == pytest.approx(4.0, rel=0.04)
    # By hand, electrons per nm: 45.55 Mn per nm³ × 4π a0² R² / (T E) × strength 0.6 × ln(1 + β²/θ_E²), T = 123.5 keV
    # and θ_E = 1.86 mrad: 45.55 × 6.514 eV² nm² / (123500 × 640 eV²) × 0.6 × 5.57 = 1.255e-5.
    assert lines.sum().item() == pytest.approx(1.255e-5, rel=0.01, abs=0)


def test_shifts_differ_from_specimen_to_specimen_within_their_spread():
    window = Eels(start_ev=620.0, channel_ev=0.2, channels=250, resolution_ev=0.6, orders=0)
    phase = Phase(composition={"Mn": 1.0, "O": 1.0}, atoms_per_nm3=91.1, edge_shift_ev={"Mn": 0.0}, shift_spread_ev=2.0)
    uniform = torch.tensor([[0.0, 0.5], [0.5, 0.5], [1.0, 0.5]])
    peak = window.axis()[window.components((phase,), 200.0, uniform)[:, 0, 0].argmax(-1)]
    torch.testing.assert_close(peak, torch.tensor([636.7, 638.7, 640.7]), rtol=0, atol=0.11)


def test_x_rays_are_counted_from_first_principles():
    # Mn Kα of MnO by hand: 45.55 Mn per nm³ × σ_K × yield × share of Kα × 0.7/4π of the X-rays.
    window = Eds(start_ev=5000.0, channel_ev=10.0, channels=200, window_half_ev=100.0)
    spectrum = window.components((MONOXIDE,), 200.0, torch.full((1, 2), 0.5))[0, 0, 0]
    energy = window.axis()
    inside = (energy - 5896.5).abs() < 250.0
    between = (energy > 6150) & (energy < 6300)
    peak = spectrum[inside].sum() - spectrum[between].mean() * inside.sum()
    shell = shells_of("Mn")[0]
    expected = 45.55 * ionisation_cross_section_nm2(shell, 200.0) * 0.3192 * 0.876 * 0.7 / (4 * math.pi)
    assert peak.item() == pytest.approx(expected, rel=0.01)


def test_thickness_and_composition_show_in_the_image():
    # Uniform fields: the share scattered is that of a foil of that thickness, more of the heavier phase.
    heavy = Phase(composition={"Pt": 1.0}, atoms_per_nm3=66.0)
    recipe = PhasesRecipe(
        phases=(TITANATE, heavy), precipitate=None, interface=None, defect=None, wedge=0.0, roughness=0.0,
        thickness_nm=(30.0, 30.0),
    )  # fmt: skip
    specimen = build(recipe, rows=(0,))
    share = specimen.loadings.reshape(*SHAPE, 2, 3).sum(-1) / 30.0  # of each phase: all orders together
    for i in (0, 1):
        inside = share[..., i] > 0.998
        assert inside.any()
        expected = 1.0 - math.exp(-30.0 * recipe._haadf_per_nm((TITANATE, heavy)[i]))
        torch.testing.assert_close(
            specimen.image[0][inside], torch.full((int(inside.sum()),), expected), rtol=0.02, atol=0
        )
    assert recipe._haadf_per_nm(heavy) > 3.0 * recipe._haadf_per_nm(TITANATE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"composition": {"Mn": 1.0, "Xx": 1.0}},
        {"composition": {}},
        {"composition": {"Mn": -1.0}},
        {"composition": {"Mn": 1.0}, "edge_shift_ev": {"O": 1.0}},
    ],
)
def test_wrong_phases_are_refused(wrong):
    with pytest.raises((ValidationError, ValueError)):
        Phase(atoms_per_nm3=80.0, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"thickness_nm": (30.0, 20.0)},
        {"domain_nm": 0.1},
        {"phases": (TITANATE,)},
        {"detector": {"kind": "eels", "start_ev": 55.0}},
        {"fov": 10.0},
    ],
)
def test_wrong_recipes_are_refused(wrong):
    with pytest.raises(ValidationError):
        PhasesRecipe(**wrong)
