"""The simulated spectral column: places, counts and their calibration, drift, costs, snapshots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stem_gym.core.conformance import check_instrument
from stem_gym.core.errors import CapabilityError, ConfigError, InstructionError
from stem_gym.core.instructions import FULL_FRAME, Acquire, Park, Read, Reading, Scan, Wait
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.core.units import ELECTRONS_PER_PC
from stem_gym.instruments import make
from stem_gym.instruments.spectral import SpectralInstrument

STILL = {"speed_ang_per_s": 0.0}
SHAPE = (12, 16)
FOV_NM = 32.0  # of the patches; cells of 2 nm
BRIGHT = {"peak_fraction": 0.05, "background_fraction": 0.01, "channels": 32}


def column(rows: int = 2, seed: int = 0, **settings: Any) -> SpectralInstrument:
    """A still column, reset; settings are merged over that."""
    base = {
        "kind": "spectral",
        "shape": list(SHAPE),
        "current_pa": 100.0,
        "drift": STILL,
        "camera": {"saturation": 1e15},
    }
    instrument = make(
        "spectral", base | {"specimen": {"kind": "patches", **BRIGHT}} | settings, rows, torch.device("cpu")
    )
    streams = Streams(row_seeds(seed, rows))
    streams.next_episode(torch.arange(rows))
    instrument.reset(streams, torch.arange(rows))
    return instrument


def every(instrument: SpectralInstrument) -> Tensor:
    return torch.arange(instrument.rows)


def scan(instrument: SpectralInstrument, dwell_s: float = 1e-5, shape: tuple[int, int] = SHAPE) -> Reading:
    n = instrument.rows
    region = torch.tensor(FULL_FRAME).repeat(n, 1)
    fov, dwell = torch.full((n,), 10.0 * FOV_NM), torch.full((n,), dwell_s)
    return instrument.execute(Scan(every(instrument), fov, shape, dwell, region))


def acquire(
    instrument: SpectralInstrument, x: float, y: float, exposure_s: float = 0.1, detector: str = "eels"
) -> Reading:
    n = instrument.rows
    instrument.execute(Park(every(instrument), torch.full((n,), x), torch.full((n,), y)))
    return instrument.execute(Acquire(every(instrument), detector, torch.full((n,), exposure_s)))


def middle(column: int, row: int) -> tuple[float, float]:
    return (column + 0.5) / SHAPE[1], (row + 0.5) / SHAPE[0]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("pattern", [0, 6])
def test_it_keeps_the_contract(rows, pattern):
    specimen = {"kind": "patches", **BRIGHT, "pattern_pixels": pattern}
    detector = "diffraction" if pattern else "eels"
    lively = {"speed_ang_per_s": 2.0, "scale_error": 0.01}
    overheads = {"park_s": 0.001, "park_s_per_um": 0.01, "readout_s": 0.002}
    instrument = column(rows, specimen=specimen, spectrometer=detector, drift=lively, overheads=overheads)
    check_instrument(instrument)
    assert instrument.capabilities.grid == SHAPE


def test_a_spectrum_is_that_of_its_cell_by_its_own_calibration():
    instrument = column()
    truth = instrument.truth()
    for at_x, at_y in ((0, 0), (9, 3), (15, 11)):
        reading = acquire(instrument, *middle(at_x, at_y), exposure_s=10.0)
        cell = at_y * SHAPE[1] + at_x
        beam_per_s = 100.0 * ELECTRONS_PER_PC
        expected = torch.einsum("bk,bkc->bc", truth["loadings"][:, cell], truth["components"]) * beam_per_s
        calibration = reading.calibration
        counts = reading.data["spectrum"] - calibration["counts_offset"][:, None]
        rate = counts / calibration["counts_per_electron"][:, None] / calibration["exposure_s"][:, None]
        # 6e7 electrons a channel and more: Poisson noise of 1.3e-4; six of it.
        torch.testing.assert_close(rate, expected, rtol=8e-4, atol=0.0)
        torch.testing.assert_close(instrument.truth()["acquired"], truth["loadings"][:, cell])
        torch.testing.assert_close(reading.data["place"], torch.tensor([middle(at_x, at_y)]).expand(2, 2))


def test_counts_have_poisson_mean_and_variance():
    instrument = column(rows=400)
    reading = acquire(instrument, *middle(5, 5), exposure_s=1e-6)
    truth = instrument.truth()
    mean = torch.einsum("bk,bkc->bc", truth["acquired"], truth["components"]) * (100.0 * 1e-6 * ELECTRONS_PER_PC)
    score = (reading.data["spectrum"] - mean) / mean.sqrt()
    # 12,800 numbers: the mean's standard error is 0.009, the variance's 0.0125 (a little more for few counts); five.
    assert abs(float(score.mean())) < 0.045
    assert abs(float(score.var()) - 1.0) < 0.07


def test_the_image_is_that_of_the_specimen_and_not_turned_over():
    instrument = column()
    reading = scan(instrument, dwell_s=1e-3)
    fraction = reading.data["images"][:, 0] / reading.calibration["electrons_per_pixel"][:, None, None]
    # 12,000 electrons a pixel and more are recorded: noise of 0.9 %; five and a half of it.
    torch.testing.assert_close(fraction, instrument.truth()["image"], rtol=0.05, atol=0.0)


def test_drift_moves_where_a_spectrum_comes_from():
    cell_ang = 10.0 * FOV_NM / SHAPE[1]
    instrument = column(rows=1, drift={"speed_ang_per_s": 1.0, "correlation_s": 1e9})
    instrument.execute(Wait(torch.arange(1), torch.tensor([30.0])))
    away = -instrument.truth()["frame_centre_ang"][0] / cell_ang  # displacement of the sample, in cells
    assert away.norm() > 0.5
    acquire(instrument, *middle(8, 6), exposure_s=1e-6)
    x, y = 8.0 - float(away[0]), 6.0 - float(away[1])
    assert 0.0 < x < SHAPE[1] - 1 and 0.0 < y < SHAPE[0] - 1, "the check below is inside the field"
    field = instrument.truth()["loadings"][0].reshape(*SHAPE, -1)
    left, top = int(x), int(y)
    a, b = x - left, y - top
    expected = (1 - b) * ((1 - a) * field[top, left] + a * field[top, left + 1])
    expected += b * ((1 - a) * field[top + 1, left] + a * field[top + 1, left + 1])
    torch.testing.assert_close(instrument.truth()["acquired"][0], expected, rtol=1e-4, atol=1e-5)


def test_time_and_dose_are_counted():
    overheads = {"scan_s": 0.5, "park_s": 0.01, "park_s_per_um": 10.0, "readout_s": 0.25}
    instrument = column(rows=1, overheads=overheads)
    frame = scan(instrument, dwell_s=1e-3)
    pixels = SHAPE[0] * SHAPE[1]
    assert float(frame.seconds) == pytest.approx(pixels * 1e-3 + 0.5)
    assert float(frame.electrons) == pytest.approx(pixels * 1e-3 * 100.0 * ELECTRONS_PER_PC)
    assert float(frame.electrons_per_ang2) == pytest.approx(1e-3 * 100.0 * ELECTRONS_PER_PC / 20.0**2)
    # From the middle of the field 8 cells of 2 nm to the left: 16 nm.
    parked = instrument.execute(Park(torch.arange(1), torch.tensor([0.0]), torch.tensor([0.5])))
    assert float(parked.seconds) == pytest.approx(0.01 + 10.0 * 0.016)
    spectrum = instrument.execute(Acquire(torch.arange(1), "eels", torch.tensor([0.2])))
    assert float(spectrum.seconds) == pytest.approx(0.45)
    assert float(spectrum.electrons_per_ang2) == pytest.approx(0.2 * 100.0 * ELECTRONS_PER_PC / 20.0**2)
    total = float(instrument.execute(Read(torch.arange(1), "clock_s")).data["value"])
    assert total == pytest.approx(float(frame.seconds + parked.seconds + spectrum.seconds), rel=1e-6)


def test_a_row_does_not_depend_on_the_batch():
    readings = []
    for rows in (1, 7):
        instrument = column(rows=rows, seed=3, drift={"speed_ang_per_s": 2.0})
        parts = [scan(instrument).data["images"], acquire(instrument, 0.3, 0.7).data["spectrum"]]
        readings.append([part[0] for part in parts] + [value[0] for value in instrument.truth().values()])
    for one, other in zip(*readings, strict=True):
        assert torch.equal(one, other)


def test_a_snapshot_brings_everything_back():
    instrument = column(drift={"speed_ang_per_s": 2.0})
    kept, streams = instrument.snapshot(), Streams(row_seeds(0, 2))
    here = instrument._streams.snapshot()
    first = acquire(instrument, 0.2, 0.4)
    streams.restore(here)
    instrument.restore(kept, streams)
    again = acquire(instrument, 0.2, 0.4)
    assert torch.equal(first.data["spectrum"], again.data["spectrum"])


def test_patterns_are_square_and_x_is_fast():
    specimen = {"kind": "patches", "peaks": 1, "pattern_pixels": 9, "peak_fraction": 0.05, "background_fraction": 0.0}
    instrument = column(rows=8, specimen=specimen, spectrometer="diffraction")
    pattern = acquire(instrument, 0.5, 0.5, exposure_s=1.0, detector="diffraction").data["pattern"]
    assert pattern.shape == (8, 9, 9)
    axis = instrument.capabilities.axes["diffraction"].reshape(9, 9, 2)
    seen = torch.einsum("byx,yxd->bd", pattern, axis) / pattern.sum((1, 2))[:, None]
    component = instrument.truth()["components"][:, 0].reshape(8, 9, 9)
    right = torch.einsum("byx,yxd->bd", component, axis) / component.sum((1, 2))[:, None]
    torch.testing.assert_close(seen, right, rtol=0.0, atol=0.05)  # 1e7 counts and more in spots 2 mrad wide
    assert float(axis[0, 1, 0] - axis[0, 0, 0]) > 0.0 and float(axis[1, 0, 0] - axis[0, 0, 0]) == 0.0


def test_what_can_not_be_done_is_refused():
    instrument = column()
    with pytest.raises(InstructionError, match="whole field of 12 × 16 cells"):
        scan(instrument, shape=(16, 16))
    with pytest.raises(CapabilityError, match="comes with a Scan"):
        acquire(instrument, 0.5, 0.5, detector="haadf")
    with pytest.raises(CapabilityError, match="no detector 'eds'"):
        acquire(instrument, 0.5, 0.5, detector="eds")
    with pytest.raises(ConfigError, match="diffraction patterns, which 'eels'"):
        column(specimen={"kind": "patches", "pattern_pixels": 4})
    with pytest.raises(ConfigError, match="shape must be 2"):
        column(shape=[1, 16])
