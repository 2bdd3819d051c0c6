"""Every scalarizer by hand, against numpy, and where it must refuse."""

from __future__ import annotations

import typing

import numpy as np
import pytest
import torch

from stem_gym.core.config import parse
from stem_gym.core.errors import ConfigError
from stem_gym.core.scalarizers import (
    Anomaly,
    AnyScalarizer,
    BandIntegral,
    BandMaximum,
    CentreOfMass,
    EdgeIntegral,
    NamedScalarizer,
    PeakFit,
    PeakRatio,
    Quotient,
    Scaled,
    Sum,
    VirtualDetector,
    Window,
)

AXIS_EV = torch.linspace(700.0, 1988.0, 162)
BAND = BandIntegral(window=Window(low_ev=935.0, high_ev=1015.0))
EDGE = EdgeIntegral(background=Window(low_ev=800.0, high_ev=920.0), signal=Window(low_ev=935.0, high_ev=1015.0))


def gaussian(centre: float, width: float, height: float = 1.0) -> torch.Tensor:
    return height * torch.exp(-0.5 * ((AXIS_EV - centre) / width) ** 2)


def test_the_band_integral_is_the_sum_of_its_channels() -> None:
    rate = torch.rand(3, 4, 162)
    inside = (AXIS_EV >= 935.0) & (AXIS_EV <= 1015.0)
    torch.testing.assert_close(BAND(rate, AXIS_EV), rate[..., inside].sum(-1))


def test_the_band_maximum_averages_neighbours_and_looks_inside_its_window_alone() -> None:
    rate = torch.zeros(162)
    rate[35] = 9.0  # 980 eV
    rate[100] = 99.0  # 1500 eV, outside
    window = Window(low_ev=935.0, high_ev=1015.0)
    assert BandMaximum(window=window, smooth_channels=3)(rate, AXIS_EV) == pytest.approx(3.0)
    assert BandMaximum(window=window, smooth_channels=1)(rate, AXIS_EV) == pytest.approx(9.0)


def test_a_ratio_in_vacuum_does_not_win() -> None:
    """Noise of a few electrons over nothing would be a huge ratio; the floor holds it below that of a real peak."""
    ratio = PeakRatio(
        numerator=Window(low_ev=900.0, high_ev=1000.0),
        denominator=Window(low_ev=1200.0, high_ev=1300.0),
        floor_per_s=200.0,
    )
    vacuum = torch.zeros(162)
    vacuum[30] = 4.0
    real = gaussian(950.0, 20.0, 30.0) + gaussian(1250.0, 20.0, 30.0)
    assert ratio(vacuum, AXIS_EV) < 0.05 < 0.9 < ratio(real, AXIS_EV)


@pytest.mark.parametrize("r", [1.5, 3.0, 5.0])
def test_an_edge_comes_back_from_under_its_power_law(r: float) -> None:
    """The window's background is 2e6 electrons; the edge 2,200: found to 1 % of it, alone or in a batch."""
    background = 4e5 * (AXIS_EV / 700.0).double() ** -r
    edge = torch.where(AXIS_EV > 940.0, 200.0, 0.0).double()
    wanted = edge[(AXIS_EV >= 935.0) & (AXIS_EV <= 1015.0)].sum()
    both = EDGE(torch.stack((background, background + edge)), AXIS_EV)
    assert both[0] == pytest.approx(0.0, abs=0.01 * float(wanted)) and both[1] == pytest.approx(float(wanted), rel=0.01)


def test_the_edge_of_an_empty_or_noisy_spectrum_is_finite() -> None:
    noise = torch.tensor(np.random.default_rng(0).poisson(0.05, (200, 162)), dtype=torch.float32)
    assert EDGE(torch.cat((noise, torch.zeros(1, 162), -noise)), AXIS_EV).isfinite().all()


@pytest.mark.parametrize(("centre", "width"), [(1000.0, 30.0), (960.0, 22.0)])
def test_a_gaussian_peak_is_fitted_exactly(centre: float, width: float) -> None:
    window = Window(low_ev=900.0, high_ev=1100.0)
    rate = gaussian(centre, width, 50.0)
    assert PeakFit(window=window, quantity="position_ev")(rate, AXIS_EV) == pytest.approx(centre, abs=0.1)
    assert PeakFit(window=window, quantity="width_ev")(rate, AXIS_EV) == pytest.approx(width, abs=0.1)


def test_where_no_peak_is_the_fit_answers_the_middle() -> None:
    window = Window(low_ev=900.0, high_ev=1100.0)
    flat = torch.stack((torch.zeros(162), torch.full((162,), 5.0)))
    assert PeakFit(window=window, quantity="position_ev")(flat, AXIS_EV).tolist() == pytest.approx([1000.0, 1000.0])
    assert PeakFit(window=window, quantity="width_ev")(flat, AXIS_EV).tolist() == pytest.approx([100.0, 100.0])


def test_an_anomaly_is_the_sine_of_an_angle_whatever_the_brightness() -> None:
    one, other = torch.zeros(162), torch.zeros(162)
    one[10], other[20] = 4.0, 9.0
    assert Anomaly()(5.0 * one, AXIS_EV, one) == pytest.approx(0.0, abs=1e-6)
    assert Anomaly()(other, AXIS_EV, one) == pytest.approx(1.0, abs=1e-6)
    # Square roots of (1, 1) against (1, 0): 45°.
    assert Anomaly()(one / 4.0 + other / 9.0, AXIS_EV, one) == pytest.approx(np.sqrt(0.5), abs=1e-6)
    assert Anomaly()(one, AXIS_EV) == 0.0


def test_patterns_have_a_centre_of_mass_and_rings() -> None:
    angles = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    pattern = torch.tensor([[1.0, 3.0, 4.0], [0.0, 0.0, 0.0]])
    assert CentreOfMass(component="x_mrad")(pattern, angles).tolist() == pytest.approx([0.25, 0.0])
    assert CentreOfMass(component="y_mrad")(pattern, angles).tolist() == pytest.approx([1.0, 0.0])
    assert CentreOfMass(component="magnitude_mrad")(pattern, angles)[0] == pytest.approx(np.hypot(0.25, 1.0))
    assert VirtualDetector(inner_mrad=1.5, outer_mrad=3.0)(pattern, angles).tolist() == [4.0, 0.0]


def test_they_compose_in_python_and_in_a_file() -> None:
    rate = torch.rand(5, 162)
    other = BandIntegral(window=Window(low_ev=1200.0, high_ev=1300.0))
    a, b = BAND(rate, AXIS_EV), other(rate, AXIS_EV)
    torch.testing.assert_close((BAND + other)(rate, AXIS_EV), a + b)
    torch.testing.assert_close((BAND - 2.0 * other)(rate, AXIS_EV), a - 2.0 * b)
    torch.testing.assert_close((BAND / other)(rate, AXIS_EV), a / b)
    composed = (BAND + 2.0 * other) / other
    again = parse(NamedScalarizer, {"name": "x", "measure": composed.model_dump(mode="json")}, "test")
    assert again.measure == composed


@pytest.mark.parametrize(
    ("scalarizer", "words"),
    [
        (BandIntegral(window=Window(low_ev=100.0, high_ev=200.0)), "goes from 700 to 1988 eV"),
        (BandIntegral(window=Window(low_ev=1000.0, high_ev=900.0)), "must rise"),
        (BandIntegral(window=Window(low_ev=1001.0, high_ev=1002.0)), "holds 0 channel"),
        (BandMaximum(window=Window(low_ev=900.0, high_ev=1000.0), smooth_channels=4), "odd"),
        (EdgeIntegral(background=EDGE.signal, signal=EDGE.background), "before the signal"),
        (EdgeIntegral(background=Window(low_ev=900.0, high_ev=920.0), signal=EDGE.signal), "at least 6"),
        (CentreOfMass(component="x_mrad"), "diffraction"),
        (VirtualDetector(inner_mrad=1.0, outer_mrad=2.0), "diffraction"),
        (2.0 * BandIntegral(window=Window(low_ev=100.0, high_ev=200.0)), "not inside"),
        (BAND + CentreOfMass(component="x_mrad"), "diffraction"),
        (BAND / CentreOfMass(component="x_mrad"), "diffraction"),
        (PeakFit(window=Window(low_ev=1000.0, high_ev=1010.0), quantity="width_ev"), "at least 3"),
        (Anomaly(window=Window(low_ev=10.0, high_ev=20.0)), "not inside"),
    ],
)
def test_what_the_axis_does_not_have_is_refused(scalarizer: typing.Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        scalarizer.check(AXIS_EV)


def test_energies_are_no_angles() -> None:
    angles = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    with pytest.raises(ConfigError, match="energy axis"):
        BAND.check(angles)
    with pytest.raises(ConfigError, match="reaches 1 mrad"):
        VirtualDetector(inner_mrad=5.0, outer_mrad=6.0).check(angles)


@pytest.mark.parametrize("scalarizer", [BAND, 2.0 * BAND, BAND + BAND, BAND / BAND, EDGE, Anomaly(), BAND + EDGE])
def test_what_says_that_it_is_linear_adds_up(scalarizer: typing.Any) -> None:
    generator = torch.Generator().manual_seed(1)
    one, other = 100.0 * torch.rand(2, 162, generator=generator, dtype=torch.float64)
    whole = scalarizer(one + 3.0 * other, AXIS_EV, one)
    parts = scalarizer(one, AXIS_EV, one) + 3.0 * scalarizer(other, AXIS_EV, one)
    assert scalarizer.linear == bool((whole - parts).abs() < 1e-9 * parts.abs())


def test_only_an_anomaly_compares() -> None:
    assert [(part + part).compares for part in (BAND, Anomaly())] == [False, True]
    assert (2.0 * Anomaly()).compares and (BAND / Anomaly()).compares and not (BAND / BAND).compares


def test_every_kind_has_a_test_here() -> None:
    """A new kind without a case fails."""
    kinds = {kind.__name__ for kind in typing.get_args(typing.get_args(AnyScalarizer)[0])}
    assert kinds == {
        kind.__name__
        for kind in (
            BandIntegral,
            BandMaximum,
            PeakRatio,
            EdgeIntegral,
            PeakFit,
            Anomaly,
            CentreOfMass,
            VirtualDetector,
            Sum,
            Scaled,
            Quotient,
        )
    }
