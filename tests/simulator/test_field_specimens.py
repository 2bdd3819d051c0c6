"""Specimens with electric fields: that what the camera sees is the gradient of the projected potential."""

import math

import pytest
import torch
from pydantic import ValidationError

from stem_gym.core.streams import Streams, row_seeds
from stem_gym.simulator.deflection import deflection_per_field_mrad_per_v
from stem_gym.simulator.field_specimens import FieldsRecipe

SHAPE = (40, 48)


def build(recipe, rows=(0, 1, 2), shape=SHAPE, batch=12):
    streams = Streams(row_seeds(8, batch))
    streams.next_episode(torch.arange(batch))
    return recipe.build(streams, torch.tensor(rows), shape)


def centres_mrad(specimen, recipe):
    """Centre of mass of every cell's pattern, (n, cells, 2)."""
    pattern = specimen.loadings @ specimen.components
    return pattern @ recipe.axis() / pattern.sum(-1, keepdim=True)


def test_a_specimen_has_the_shapes_of_the_contract():
    recipe = FieldsRecipe()
    specimen = build(recipe)
    assert specimen.image.shape == (3, *SHAPE)
    assert specimen.loadings.shape == (3, SHAPE[0] * SHAPE[1], 3)
    assert specimen.components.shape == (3, 3, 256)
    assert recipe.axis().shape == (256, 2)
    pattern = specimen.loadings @ specimen.components
    assert (pattern.sum(-1) > 0.02).all() and (pattern.sum(-1) < 1.0).all()
    assert pattern.min() > -0.05 * pattern.max(), "the linear pattern is hardly negative"


def test_rows_do_not_depend_on_the_batch():
    recipe = FieldsRecipe()
    whole = build(recipe, rows=range(12), shape=(20, 31))
    for rows in ([5], [7, 2], [11, 0, 3]):
        part = build(recipe, rows=rows, shape=(20, 31))
        for name in ("image", "loadings", "components"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name


def test_a_foil_of_even_thickness_shows_the_field_of_its_junction():
    # Along a line across a junction the deflections add up to C_E · built-in potential · thickness, whatever its shape:
    # here for every path from the lowest to the highest potential of the field.
    recipe = FieldsRecipe(
        junctions=1, built_in_v=(0.8, 0.8), charges_max=0, wedge=0.0, roughness=0.0, thickness_nm=(100.0, 100.0)
    )
    specimen = build(recipe)
    moved = centres_mrad(specimen, recipe).reshape(3, *SHAPE, 2)
    pixel_nm = recipe.fov_nm / SHAPE[1]
    along_x = 0.5 * (moved[..., 1:, 0] + moved[..., :-1, 0]).cumsum(-1) * pixel_nm
    along_y = 0.5 * (moved[:, 1:, 0, 1] + moved[:, :-1, 0, 1]).cumsum(-1) * pixel_nm
    height = torch.zeros(3, *SHAPE)
    height[:, 1:, 0] = along_y
    height[..., 1:] = height[..., :1] + along_x
    step = height.amax((1, 2)) - height.amin((1, 2))
    expected = deflection_per_field_mrad_per_v(200.0) * 0.8 * 100.0
    # Central differences smear the ends of a path by half a cell and the junction may not be fully inside: 3 %.
    torch.testing.assert_close(step, torch.full((3,), expected), rtol=0.03, atol=0)


def test_the_beam_is_drawn_towards_higher_potential():
    # The same draws again, in the order in which a specimen takes them: C_E · t · ∇V, with the sign of the potential.
    recipe = FieldsRecipe(inner_potential_v=0.0)
    streams, rows = Streams(row_seeds(8, 12)), torch.arange(3)
    streams.next_episode(torch.arange(12))
    thickness = recipe.thickness_map_nm(streams, rows, SHAPE)
    projected = thickness * recipe.potential_v(streams, rows, SHAPE)
    pixel_nm = recipe.fov_nm / SHAPE[1]
    expected = deflection_per_field_mrad_per_v(200.0) * (projected[..., 2:] - projected[..., :-2]) / (2.0 * pixel_nm)
    moved = centres_mrad(build(recipe), recipe).reshape(3, *SHAPE, 2)[:, :, 1:-1, 0]
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-5)


def test_a_wedge_deflects_by_its_mean_inner_potential():
    recipe = FieldsRecipe(built_in_v=(1e-6, 1e-6), charges_max=0, wedge=0.5, roughness=0.0, thickness_nm=(100.0, 100.0))
    rows = range(12)
    specimen = build(recipe, rows=rows)
    moved = centres_mrad(specimen, recipe)
    assert moved.std(1).max() < 1e-4, "the same everywhere"
    # The thickness, from the image: T = −ln(1 − I) / μ.
    thickness = -torch.log1p(-specimen.image.double()) / recipe._scattered_per_nm(*recipe.haadf_mrad)
    slope_x = (thickness[:, 0, -1] - thickness[:, 0, 0]) / ((SHAPE[1] - 1) * recipe.fov_nm / SHAPE[1])
    expected = deflection_per_field_mrad_per_v(200.0) * 12.6 * slope_x
    torch.testing.assert_close(moved.mean(1)[:, 0].double(), expected, rtol=2e-3, atol=2e-6)
    assert expected.abs().max() > 1e-3


def test_charges_push_and_pull_from_every_side():
    # A Gaussian potential of amplitude A and rms s bends by C_E t A / s · exp(-1/2) at most, at a distance s.
    recipe = FieldsRecipe(
        built_in_v=(1e-6, 1e-6),
        wedge=0.0,
        roughness=0.0,
        thickness_nm=(100.0, 100.0),
        charges_max=1,
        charge_radius_nm=20.0,
    )
    potential = recipe.potential_v(Streams(row_seeds(8, 60)), torch.arange(60), (64, 64))
    largest = potential.flatten(1).abs().amax(1)
    assert 0.3 < (largest > 1e-3).float().mean() < 0.7, "none or one"
    assert (potential.flatten(1).amax(1) > 0.1).any() and (potential.flatten(1).amin(1) < -0.1).any(), "either sign"
    moved = centres_mrad(build(recipe, rows=range(12), shape=(64, 64)), recipe).norm(dim=-1).amax(-1)
    bound = deflection_per_field_mrad_per_v(200.0) * 100.0 * 1.0 / 20.0 * math.exp(-0.5)
    assert moved.max() <= bound * 1.001
    assert moved.max() > 0.2 * bound


def test_scattering_out_of_the_camera_weakens_the_disc():
    recipe = FieldsRecipe()
    specimen = build(recipe)
    stays = (specimen.loadings @ specimen.components).sum(-1)
    thickness = -torch.log1p(-specimen.image.flatten(1)) / recipe._scattered_per_nm(*recipe.haadf_mrad)
    # Beer's law over the whole field: ln of what stays against the thickness is one line.
    slope = -torch.log(stays) / thickness
    torch.testing.assert_close(slope, torch.full_like(slope, recipe._scattered_per_nm(0.8, 1000.0)), rtol=1e-3, atol=0)


def test_deflections_of_the_default_stay_below_a_pixel():
    specimen = build(FieldsRecipe(), rows=range(12))
    moved = (specimen.loadings[..., 1:] / specimen.loadings[..., :1]).norm(dim=-1)
    assert moved.max() < FieldsRecipe().pixel_mrad


@pytest.mark.parametrize(
    "wrong",
    [{"element": "Xx"}, {"pixels": 10}, {"built_in_v": (1.0, 0.5)}, {"domain_nm": 1.0}, {"junction": 2}],
)
def test_wrong_recipes_are_refused(wrong):
    with pytest.raises(ValidationError):
        FieldsRecipe(**wrong)
