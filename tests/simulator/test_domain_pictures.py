"""Pictures of domains: area, symmetry, size of the field, and what their radius is told to be."""

from __future__ import annotations

import math

import pytest
import torch

from stem_gym.core.experiments import PICTURE_FOV_NM, contrast, greys
from stem_gym.simulator.domain_pictures import DomainPicture, domain_pictures
from stem_gym.surrogates.domain_size import domain_radius_nm

SIZE = 64
PIXEL_NM = PICTURE_FOV_NM / SIZE


def drawn(radius_nm: torch.Tensor, middle_nm: torch.Tensor | None = None, **settings: float) -> torch.Tensor:
    rows = len(radius_nm)
    middle = torch.zeros(rows, 2) if middle_nm is None else middle_nm
    fov_nm = torch.full((rows,), PICTURE_FOV_NM)
    return domain_pictures(radius_nm, middle, fov_nm, (SIZE, SIZE), DomainPicture(**settings))


def test_the_area_of_a_domain_is_that_of_a_disc():
    radius = torch.tensor([40.0, 100.0, 300.0, 800.0])
    area = drawn(radius).sum((1, 2)) * PIXEL_NM**2
    # The hyperbolic wall adds π³ w² / 12 in the plane (the second moment of its slope), w = 15 nm.
    torch.testing.assert_close(area, math.pi * radius.square() + math.pi**3 * 15.0**2 / 12.0, rtol=0.01, atol=300.0)


def test_no_domain_no_contrast_and_a_large_one_fills_the_field():
    pictures = drawn(torch.tensor([0.0, 5000.0]))
    assert not bool(pictures[0].any()) and float(pictures[1].min()) > 0.999


def test_a_picture_turns_and_shifts_with_its_domain():
    middle = torch.tensor([[300.0, -100.0], [100.0, 300.0]])  # a quarter turn with y downwards
    pictures = drawn(torch.tensor([120.0, 120.0]), middle)
    torch.testing.assert_close(pictures[0].rot90(-1), pictures[1], atol=1e-4, rtol=0.0)
    rows = torch.arange(SIZE) + 0.5
    weight = pictures[0].sum(0) / pictures[0].sum()
    assert float((weight * rows).sum() * PIXEL_NM - 0.5 * PICTURE_FOV_NM) == pytest.approx(300.0, abs=2.0), "x"


@pytest.mark.parametrize("radius_nm", [20.0, 40.0, 90.0, 200.0, 450.0, 850.0])
def test_a_radius_is_told_well_within_the_noise_of_the_laws(radius_nm):
    generator = torch.Generator().manual_seed(int(radius_nm))
    middle = 10.0 * torch.randn(100, 2, generator=generator)
    noise = 0.08 * torch.randn(100, SIZE, SIZE, generator=generator)
    seen = contrast(greys(drawn(torch.full((100,), radius_nm), middle) + noise))
    told = domain_radius_nm(seen, PICTURE_FOV_NM)
    law_sd = math.hypot(8.0, 0.08 * radius_nm)
    assert abs(float(told.mean()) - radius_nm) < 0.4 * law_sd
    assert float(told.std()) < 0.6 * law_sd


def test_no_domain_is_told_as_nearly_none_and_a_wide_one_as_the_field():
    noise = 0.08 * torch.randn(50, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    none, wide = (domain_radius_nm(drawn(torch.full((50,), r)) + noise, PICTURE_FOV_NM) for r in (0.0, 4000.0))
    assert float(none.mean()) < 8.0
    assert float(wide.mean()) == pytest.approx(PICTURE_FOV_NM / math.pi**0.5, rel=0.05)
