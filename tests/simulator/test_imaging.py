"""Images as Fourier series against sums over atoms, closed forms, symmetry, finite differences and abTEM."""

import math

import pytest
import torch

from stem_gym.core.errors import ConfigError
from stem_gym.simulator.harmonics import Harmonics, harmonic_table, padded_orders
from stem_gym.simulator.imaging import (
    atom_weights_ang2,
    grid_coefficients,
    image_coefficients,
    image_grid,
    probe_signal,
    real_series,
    scan_image,
    scatterer_coefficients,
    structure_change,
    structure_coefficients,
)
from stem_gym.simulator.optics import FWHM_PER_SIGMA, Optics, probe_intensity, transfer_function
from stem_gym.simulator.scattering import OBJECT_SIGMA_ANG, haadf_cross_section_ang2
from stem_gym.simulator.specimens import Specimen

ABERRATED = {"defocus_ang": 40.0, "astigmatism_ang": 25.0, "astigmatism_angle_rad": 0.3}


def few_atoms(batch: int = 1, atoms: int = 7, dtype: torch.dtype = torch.float64, seed: int = 0) -> Specimen:
    """Random atoms and one blob on cells that differ a little, none of them symmetric."""
    generator = torch.Generator().manual_seed(seed)
    cell = torch.tensor([12.0, 10.0], dtype=dtype) + 0.3 * torch.rand(batch, 2, generator=generator, dtype=dtype)
    return Specimen(
        cell_ang=cell,
        xy_ang=torch.rand(batch, atoms, 2, generator=generator, dtype=dtype) * cell[:, None],
        atomic_number=torch.randint(5, 17, (batch, atoms), generator=generator),
        present=torch.arange(atoms).expand(batch, -1) < atoms - 1,
        thermal_sigma_ang=0.04 + 0.05 * torch.rand(batch, atoms, generator=generator, dtype=dtype),
        blob_xy_ang=torch.rand(batch, 1, 2, generator=generator, dtype=dtype) * cell[:, None],
        blob_sigma_ang=torch.full((batch, 1), 2.0, dtype=dtype),
        blob_weight_ang2=torch.full((batch, 1), 5e-3, dtype=dtype),
    )


def optics_of(specimen: Specimen, **settings: float) -> Optics:
    return Optics.of(len(specimen.cell_ang), dtype=specimen.cell_ang.dtype, **settings)


def harmonics_of(specimen: Specimen, optics: Optics) -> Harmonics:
    x, y = specimen.cell_ang.max(dim=0).values.tolist()
    return Harmonics.within((x, y), float(optics.band_limit_per_ang.max()))


def coefficients_of(specimen: Specimen, optics: Optics) -> torch.Tensor:
    harmonics = harmonics_of(specimen, optics)
    weight = atom_weights_ang2(specimen, optics.energy_kev, 80.0, 200.0)
    transfer = transfer_function(optics, *harmonics.frequencies(specimen.cell_ang))
    return image_coefficients(structure_coefficients(specimen, weight, harmonics), transfer)


def test_matrix_product_is_the_sum_over_atoms():
    specimen = few_atoms(batch=2)
    harmonics = Harmonics(nx=9, ny=13)
    weight = torch.rand(2, 7, dtype=torch.float64)
    ours = scatterer_coefficients(specimen.cell_ang, specimen.xy_ang, weight, specimen.thermal_sigma_ang, harmonics)
    kx, ky = harmonics.frequencies(specimen.cell_ang)
    for row in range(2):
        width = specimen.thermal_sigma_ang[row] ** 2 + OBJECT_SIGMA_ANG**2
        x, y = specimen.xy_ang[row].unbind(-1)
        for iy in range(13):
            for ix in range(9):
                k2 = kx[row, ix] ** 2 + ky[row, iy] ** 2
                phase = torch.exp(-2j * math.pi * (kx[row, ix] * x + ky[row, iy] * y))
                direct = (weight[row] * torch.exp(-2 * math.pi**2 * width * k2) * phase).sum() / specimen.cell_ang[
                    row
                ].prod()
                assert abs(ours[row, iy, ix] - direct) < 1e-13


def test_image_is_cross_section_times_current_density_at_each_atom():
    # Independent of the series: the probe's density, computed in a window of 70 Å, at all near images of each atom.
    # Atoms are at rest, so the object's own width adds to the source's. 1e-3 of the peak: the far tails of the probe.
    specimen = few_atoms(atoms=4)
    specimen = specimen.replace(
        thermal_sigma_ang=torch.zeros(1, 4, dtype=torch.float64),
        blob_weight_ang2=torch.zeros(1, 1, dtype=torch.float64),
    )
    optics = optics_of(specimen, source_fwhm_ang=0.6, **ABERRATED)
    places = torch.rand(1, 20, 2, dtype=torch.float64) * specimen.cell_ang[:, None]
    ours = probe_signal(coefficients_of(specimen, optics), specimen.cell_ang, places)
    blurred = optics_of(specimen, source_fwhm_ang=math.hypot(0.6, OBJECT_SIGMA_ANG * FWHM_PER_SIGMA), **ABERRATED)
    shifts = torch.cartesian_prod(torch.arange(-2, 3), torch.arange(-2, 3)) * specimen.cell_ang  # (25, 2)
    sigma = haadf_cross_section_ang2(specimen.atomic_number, optics.energy_kev[:, None], 80.0, 200.0)
    expected = torch.zeros(1, 20, dtype=torch.float64)
    for atom in range(3):  # the fourth is not present
        step = places[0, :, None] - specimen.xy_ang[0, atom] + shifts  # (20, 25, 2)
        density = probe_intensity(blurred, step.reshape(1, -1, 2), 70.0).reshape(20, 25)
        expected[0] += sigma[0, atom] * density.sum(1)
    torch.testing.assert_close(ours, expected, atol=1e-3 * expected.max().item(), rtol=0)


def test_mean_of_the_image_is_cross_section_over_area():
    specimen = few_atoms(batch=3)
    optics = optics_of(specimen, **ABERRATED)
    image = image_grid(coefficients_of(specimen, optics), 64, 64)
    sigma = atom_weights_ang2(specimen, optics.energy_kev, 80.0, 200.0).sum(1) + specimen.blob_weight_ang2.sum(1)
    # 1e-5: T(0) is 1 but for the interpolation.
    torch.testing.assert_close(image.mean((1, 2)), sigma / specimen.cell_ang.prod(1), atol=0, rtol=1e-5)


def test_parseval():
    specimen = few_atoms()
    coefficients = coefficients_of(specimen, optics_of(specimen))
    image = image_grid(coefficients, 48, 48)
    power = (coefficients.abs() ** 2).sum((1, 2)) * 2 - (coefficients[:, :, 0].abs() ** 2).sum(1)  # hx < 0 too
    torch.testing.assert_close((image**2).mean((1, 2)), power)


def test_scan_grid_and_probe_agree():
    specimen = few_atoms(batch=3)
    coefficients = coefficients_of(specimen, optics_of(specimen, **ABERRATED))
    grid = image_grid(coefficients, 40, 48)
    x = specimen.cell_ang[:, :1] * torch.arange(48) / 48
    y = specimen.cell_ang[:, 1:] * torch.arange(40) / 40
    torch.testing.assert_close(scan_image(coefficients, specimen.cell_ang, x, y), grid)
    places = torch.stack((x[:, 5:15], y[:, 20:30]), dim=-1)
    along = torch.arange(10)
    torch.testing.assert_close(probe_signal(coefficients, specimen.cell_ang, places), grid[:, 20 + along, 5 + along])


def test_real_series_scans_as_the_complex_coefficients_do():
    specimen = few_atoms(batch=2)
    coefficients = coefficients_of(specimen, optics_of(specimen))
    x = torch.rand(2, 11, dtype=torch.float64) * 30.0
    series = real_series(coefficients)
    assert torch.equal(scan_image(coefficients, specimen.cell_ang, x, x), scan_image(series, specimen.cell_ang, x, x))
    torch.testing.assert_close(real_series(3.0 * coefficients), 3.0 * series)  # linear


def test_offset_of_a_scan_row_moves_that_row_exactly():
    specimen = few_atoms(batch=2)
    coefficients = coefficients_of(specimen, optics_of(specimen, **ABERRATED))
    x = torch.linspace(0.0, 8.0, 16, dtype=torch.float64).expand(2, -1)
    y = torch.linspace(1.0, 7.0, 9, dtype=torch.float64).expand(2, -1)
    offset = torch.randn(2, 9, 2, dtype=torch.float64)
    image = scan_image(coefficients, specimen.cell_ang, x, y, offset)
    for line in range(9):
        row = torch.stack((x + offset[:, line, :1], (y + offset[..., 1])[:, line : line + 1].expand(-1, 16)), dim=-1)
        torch.testing.assert_close(image[:, line], probe_signal(coefficients, specimen.cell_ang, row))


def test_drift_of_the_sample_is_the_opposite_offset():
    specimen = few_atoms()
    drift = torch.tensor([0.8, -0.5], dtype=torch.float64)
    moved = specimen.replace(xy_ang=specimen.xy_ang + drift, blob_xy_ang=specimen.blob_xy_ang + drift)
    optics = optics_of(specimen)
    x = torch.linspace(0.0, 8.0, 16, dtype=torch.float64)[None]
    offset = (-drift).expand(1, 16, 2)
    torch.testing.assert_close(
        scan_image(coefficients_of(moved, optics), specimen.cell_ang, x, x),
        scan_image(coefficients_of(specimen, optics), specimen.cell_ang, x, x, offset),
    )


def test_the_image_repeats_with_the_cell():
    specimen = few_atoms()
    coefficients = coefficients_of(specimen, optics_of(specimen))
    places = torch.rand(1, 9, 2, dtype=torch.float64)
    far = places + specimen.cell_ang[:, None] * torch.tensor([3.0, -2.0])
    torch.testing.assert_close(
        probe_signal(coefficients, specimen.cell_ang, places), probe_signal(coefficients, specimen.cell_ang, far)
    )


def test_mirrored_specimen_and_probe_give_the_mirrored_image():
    specimen = few_atoms()
    flip = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    mirrored = specimen.replace(xy_ang=specimen.xy_ang * flip, blob_xy_ang=specimen.blob_xy_ang * flip)
    x = torch.linspace(0.0, 8.0, 16, dtype=torch.float64)[None]
    image = scan_image(coefficients_of(specimen, optics_of(specimen, **ABERRATED)), specimen.cell_ang, x, x)
    other = optics_of(specimen, **(ABERRATED | {"astigmatism_angle_rad": -0.3}))
    reflected = scan_image(coefficients_of(mirrored, other), specimen.cell_ang, -x, x)
    torch.testing.assert_close(image, reflected, atol=1e-9, rtol=1e-6)
    assert not torch.allclose(image, image.flip(-1), rtol=0.05)  # else the test says nothing


def test_specimen_turned_by_a_right_angle_gives_the_turned_image():
    specimen = few_atoms()

    def turn(xy: torch.Tensor) -> torch.Tensor:  # (x, y) -> (-y, x)
        return torch.stack((-xy[..., 1], xy[..., 0]), dim=-1)

    turned = specimen.replace(
        cell_ang=specimen.cell_ang.flip(-1),
        xy_ang=turn(specimen.xy_ang),
        blob_xy_ang=turn(specimen.blob_xy_ang),
    )
    places = torch.rand(1, 30, 2, dtype=torch.float64) * 10.0
    before = coefficients_of(specimen, optics_of(specimen, **ABERRATED))
    angle = ABERRATED["astigmatism_angle_rad"] + math.pi / 2
    after = coefficients_of(turned, optics_of(turned, **(ABERRATED | {"astigmatism_angle_rad": angle})))
    torch.testing.assert_close(
        probe_signal(before, specimen.cell_ang, places), probe_signal(after, turned.cell_ang, turn(places))
    )


def test_rotating_the_whole_specimen_rotates_the_image():
    # A lone cluster in a large cell, turned by an arbitrary angle; 1e-3 of the peak: tails over the borders.
    generator = torch.Generator().manual_seed(4)
    base = few_atoms(atoms=6)
    centre = torch.tensor([15.0, 15.0], dtype=torch.float64)
    local = 3.0 * (torch.rand(1, 6, 2, dtype=torch.float64, generator=generator) - 0.5)
    angle = 0.6
    matrix = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
    )
    cell = torch.full((1, 2), 30.0, dtype=torch.float64)
    none = {"blob_weight_ang2": torch.zeros(1, 1, dtype=torch.float64)}
    straight = base.replace(cell_ang=cell, xy_ang=centre + local, **none)
    turned = base.replace(cell_ang=cell, xy_ang=centre + local @ matrix.T, **none)
    places = 4.0 * (torch.rand(1, 40, 2, dtype=torch.float64, generator=generator) - 0.5)
    before = probe_signal(coefficients_of(straight, optics_of(straight)), cell, centre + places)
    after = probe_signal(coefficients_of(turned, optics_of(turned)), cell, centre + places @ matrix.T)
    torch.testing.assert_close(before, after, atol=1e-3 * before.max().item(), rtol=0)


def test_change_of_structure_is_the_difference_of_structures():
    before = few_atoms(batch=2)
    harmonics = harmonics_of(before, optics_of(before))
    xy, number = before.xy_ang.clone(), before.atomic_number
    xy[:, 2] += 0.7
    after = before.replace(xy_ang=xy, present=before.present & (torch.arange(7) != 4))
    energy = optics_of(before).energy_kev
    weight = atom_weights_ang2(before, energy, 80.0, 200.0)
    sigma = before.thermal_sigma_ang
    change = structure_change(
        before.cell_ang,
        (before.xy_ang[:, [2, 4]], weight[:, [2, 4]], sigma[:, [2, 4]]),
        (xy[:, [2]], weight[:, [2]], sigma[:, [2]]),
        harmonics,
    )
    assert (number[:, 4] > 0).all()
    expected = structure_coefficients(
        after, atom_weights_ang2(after, energy, 80.0, 200.0), harmonics
    ) - structure_coefficients(before, weight, harmonics)
    torch.testing.assert_close(change, expected)


def test_what_is_not_present_scatters_nothing():
    specimen = few_atoms()
    harmonics = harmonics_of(specimen, optics_of(specimen))
    weight = torch.ones(1, 7, dtype=torch.float64)  # also for the seventh, which is not there
    without = Specimen(
        cell_ang=specimen.cell_ang,
        xy_ang=specimen.xy_ang[:, :6],
        atomic_number=specimen.atomic_number[:, :6],
        present=specimen.present[:, :6],
        thermal_sigma_ang=specimen.thermal_sigma_ang[:, :6],
        blob_xy_ang=specimen.blob_xy_ang,
        blob_sigma_ang=specimen.blob_sigma_ang,
        blob_weight_ang2=specimen.blob_weight_ang2,
    )
    torch.testing.assert_close(
        structure_coefficients(specimen, weight, harmonics),
        structure_coefficients(without, weight[:, :6], harmonics),
    )


def test_grid_coefficients_invert_the_grid():
    specimen = few_atoms(batch=2)
    optics = optics_of(specimen)
    coefficients, harmonics = coefficients_of(specimen, optics), harmonics_of(specimen, optics)
    for shape in ((48, 52), (harmonics.ny, 2 * harmonics.nx - 1)):
        torch.testing.assert_close(grid_coefficients(image_grid(coefficients, *shape), harmonics), coefficients)


def test_a_grid_below_nyquist_is_refused():
    specimen = few_atoms()
    optics = optics_of(specimen)
    harmonics = harmonics_of(specimen, optics)
    with pytest.raises(ConfigError, match="at least"):
        image_grid(coefficients_of(specimen, optics), harmonics.ny - 1, 100)
    with pytest.raises(ConfigError, match="at least"):
        grid_coefficients(torch.zeros(1, 100, 2 * harmonics.nx - 2), harmonics)


@pytest.mark.parametrize("cell", [(0.0, 10.0), (10.0, -1.0)])
def test_a_cell_without_area_is_refused(cell):
    with pytest.raises(ConfigError, match="positive"):
        Harmonics.within(cell, 1.4)


@pytest.mark.parametrize("count", [1, 2, 5, 42, 43, 100])
def test_harmonic_table_holds_cosines_and_sines(count):
    turns = 5.0 * torch.rand(2, 6, dtype=torch.float64)
    size = padded_orders(count)
    assert count <= size <= count + math.isqrt(count) + 1
    phase = 2 * math.pi * turns[:, None] * torch.arange(size)[None, :, None]
    torch.testing.assert_close(harmonic_table(turns, count), torch.cat((torch.cos(phase), torch.sin(phase)), dim=1))


def test_rows_do_not_depend_on_the_batch():
    specimen = few_atoms(batch=64, dtype=torch.float32)
    offset = torch.randn(64, 64, 2)
    x = torch.linspace(0.0, 9.0, 64).expand(64, -1)
    y = torch.linspace(0.0, 8.0, 64).expand(64, -1)

    optics = optics_of(specimen, **ABERRATED)
    harmonics = harmonics_of(specimen, optics)

    def images(rows: torch.Tensor) -> list[torch.Tensor]:
        part, cell = specimen.rows(rows), specimen.cell_ang[rows]
        weight = atom_weights_ang2(part, optics.energy_kev[rows], 80.0, 200.0)
        transfer = transfer_function(optics.rows(rows), *harmonics.frequencies(cell))
        coefficients = image_coefficients(structure_coefficients(part, weight, harmonics), transfer)
        return [
            coefficients,
            scan_image(coefficients, cell, x[rows], y[rows], offset[rows]),
            scan_image(coefficients, cell, x[rows], y[rows]),
            probe_signal(coefficients, cell, offset[rows, :20]),
        ]

    whole = images(torch.arange(64))
    for rows in ([3], [63, 0, 17], list(range(5, 22))):
        index = torch.tensor(rows)
        for part, full in zip(images(index), whole, strict=True):
            assert torch.equal(part, full[index])
        coefficients, cell = whole[0], specimen.cell_ang[index]
        picked = [
            scan_image(coefficients, cell, x[index], y[index], offset[index], rows=index),
            scan_image(coefficients, cell, x[index], y[index], rows=index),
            probe_signal(coefficients, cell, offset[index, :20], rows=index),
        ]
        for part, full in zip(picked, whole[1:], strict=True):
            assert torch.equal(part, full[index])


@pytest.mark.parametrize(
    "name",
    ["xy_ang", "thermal_sigma_ang", "blob_weight_ang2", "blob_sigma_ang", "blob_xy_ang", "cell_ang"],
)
def test_gradients_to_the_specimen(name):
    specimen = few_atoms(atoms=3)
    optics = optics_of(specimen, **ABERRATED)
    x = torch.linspace(0.3, 6.0, 5, dtype=torch.float64)[None]
    harmonics = harmonics_of(specimen, optics)

    def image(value: torch.Tensor) -> torch.Tensor:
        changed = specimen.replace(**{name: value})
        weight = atom_weights_ang2(changed, optics.energy_kev, 80.0, 200.0)
        transfer = transfer_function(optics, *harmonics.frequencies(changed.cell_ang))
        coefficients = image_coefficients(structure_coefficients(changed, weight, harmonics), transfer)
        offset = 0.1 * torch.ones(1, 5, 2, dtype=torch.float64)
        return 1e4 * scan_image(coefficients, changed.cell_ang, x, x, offset)  # of order one, so that 1e-6 means it

    value = getattr(specimen, name).clone().requires_grad_()
    assert torch.autograd.gradcheck(image, (value,), eps=1e-5, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["defocus_ang", "source_fwhm_ang", "convergence_mrad", "astigmatism_ang", "c3_mm", "focal_spread_ang"]
)
def test_gradients_to_the_optics(name):
    specimen = few_atoms(atoms=3)
    settings = {**ABERRATED, "source_fwhm_ang": 0.6, "convergence_mrad": 33.9, "c3_mm": 0.002, "focal_spread_ang": 20.0}
    harmonics = harmonics_of(specimen, optics_of(specimen, convergence_mrad=34.0))
    weight = atom_weights_ang2(specimen, torch.tensor([60.0], dtype=torch.float64), 80.0, 200.0)
    structure = structure_coefficients(specimen, weight, harmonics)
    places = torch.rand(1, 4, 2, dtype=torch.float64) * 8.0

    def signal(value: torch.Tensor) -> torch.Tensor:
        optics = Optics.of(1, dtype=torch.float64, **{**settings, name: value})
        transfer = transfer_function(optics, *harmonics.frequencies(specimen.cell_ang))
        return 1e4 * probe_signal(image_coefficients(structure, transfer), specimen.cell_ang, places)

    value = torch.tensor(settings[name], dtype=torch.float64, requires_grad=True)
    eps = 1e-7 if name == "c3_mm" else 1e-5
    assert torch.autograd.gradcheck(signal, (value,), eps=eps, atol=1e-4, rtol=1e-4)
