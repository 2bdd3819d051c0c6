"""A replayed file: what it answers is the file, thinned; its noise, costs and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stem_gym.core.conformance import check_instrument
from stem_gym.core.errors import ConfigError, DataError, InstructionError
from stem_gym.core.instructions import FULL_FRAME, Acquire, Park, Reading, Scan
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.core.units import ELECTRONS_PER_PC
from stem_gym.instruments import make
from stem_gym.instruments.replayed import ReplayedCube
from tests.datasets.test_cubes import DATA

SHAPE, CHANNELS = (6, 9), 20
EXPOSURE_S, CURRENT_PA, PIXEL_NM = 0.2, 50.0, 0.8


def expected() -> np.ndarray:
    """The noise-free counts (H, W, C) of the file: two spectra, mixed from left to right."""
    share = np.linspace(0.0, 1.0, SHAPE[1])[None, :, None] * np.ones((SHAPE[0], 1, 1))
    energy = np.linspace(0.0, 1.0, CHANNELS)
    return 400.0 * ((1.0 - share) * np.exp(-energy) + share * np.exp(-0.5 * ((energy - 0.5) / 0.1) ** 2) + 0.1)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    rng = np.random.default_rng(1)
    spectra = rng.poisson(expected()).astype(np.uint16)
    haadf = rng.integers(100, 200, SHAPE).astype(np.uint16)
    path = tmp_path_factory.mktemp("cubes") / "map.npz"
    known = {"pixel_nm": PIXEL_NM, "exposure_s": EXPOSURE_S, "current_pa": CURRENT_PA}
    np.savez(path, spectra=spectra, energy_eV=np.linspace(700.0, 890.0, CHANNELS), haadf=haadf, **known)
    return path


@pytest.fixture(scope="module")
def imageless(file, tmp_path_factory) -> Path:
    arrays = dict(np.load(file))
    del arrays["haadf"]
    path = tmp_path_factory.mktemp("cubes") / "imageless.npz"
    np.savez(path, **arrays)
    return path


def replayed(path: Path, rows: int = 2, seed: int = 0, **settings: Any) -> ReplayedCube:
    instrument = make("replayed", {"kind": "replayed", "path": str(path)} | settings, rows, torch.device("cpu"))
    streams = Streams(row_seeds(seed, rows))
    streams.next_episode(torch.arange(rows))
    instrument.reset(streams, torch.arange(rows))
    return instrument


def acquire(instrument: ReplayedCube, cell: tuple[int, int], exposure_s: float = EXPOSURE_S) -> Reading:
    n, (height, width) = instrument.rows, instrument.capabilities.grid
    x, y = torch.full((n,), (cell[1] + 0.5) / width), torch.full((n,), (cell[0] + 0.5) / height)
    instrument.execute(Park(torch.arange(n), x, y))
    return instrument.execute(Acquire(torch.arange(n), "eels", torch.full((n,), exposure_s)))


def scan(instrument: ReplayedCube) -> Reading:
    n, fov_ang = instrument.rows, instrument.capabilities.limits["Scan.fov_ang"].low
    region = torch.tensor(FULL_FRAME).repeat(n, 1)
    shape = instrument.capabilities.grid
    return instrument.execute(Scan(torch.arange(n), torch.full((n,), fov_ang), shape, torch.full((n,), 1e-5), region))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"thin": 0.4}, {"counts_per_electron": 3.0, "thin": 0.4}], ids=str)
def test_it_keeps_the_contract(file, rows, settings):
    check_instrument(replayed(file, rows, overheads={"readout_s": 0.01, "park_s_per_um": 1.0}, **settings))


def test_it_keeps_the_contract_without_an_image(imageless):
    check_instrument(replayed(imageless, 2))


def test_a_replay_equals_the_file(file):
    instrument, arrays = replayed(file), np.load(file)
    for y, x in ((0, 0), (3, 7), (5, 8)):
        reading = acquire(instrument, (y, x))
        for row in range(2):
            np.testing.assert_array_equal(reading.data["spectrum"][row], arrays["spectra"][y, x])
    images = scan(instrument).data["images"]
    np.testing.assert_array_equal(images[0, 0], arrays["haadf"])
    assert float(instrument.capabilities.limits["Scan.fov_ang"].low) == pytest.approx(10.0 * PIXEL_NM * SHAPE[1])
    np.testing.assert_allclose(instrument.capabilities.axes["eels"], arrays["energy_eV"], rtol=1e-6)


def test_thinned_counts_are_binomial_and_new_every_time(file):
    rows, share = 3000, 0.3
    instrument, recorded = replayed(file, rows), np.load(file)["spectra"][2, 5].astype(float)
    counts = acquire(instrument, (2, 5), share * EXPOSURE_S).data["spectrum"].numpy()
    error = np.sqrt(share * (1 - share) * recorded / rows)
    assert (np.abs(counts.mean(0) - share * recorded) < 5.0 * error).all()  # five standard errors
    # 20 variances of 3,000 numbers each, with a standard error of 2.6 %; their mean of 0.6 %; five of either.
    ratio = counts.var(0) / (share * (1 - share) * recorded)
    np.testing.assert_allclose(ratio, 1.0, atol=0.13)
    assert abs(ratio.mean() - 1.0) < 0.03
    again = acquire(instrument, (2, 5), share * EXPOSURE_S).data["spectrum"].numpy()
    assert (counts != again).mean() > 0.8
    assert abs(np.corrcoef(counts[:, 0], again[:, 0])[0, 1]) < 0.1  # five standard errors of 0.018


def test_electrons_are_thinned_where_a_count_is_less_than_one(file):
    """A camera of 4 counts an electron: the same mean, four times the variance."""
    rows, share = 3000, 0.3
    recorded = np.load(file)["spectra"][2, 5].astype(float)
    reading = acquire(replayed(file, rows, counts_per_electron=4.0), (2, 5), share * EXPOSURE_S)
    counts = reading.data["spectrum"].numpy()
    np.testing.assert_allclose(counts.mean(0), share * recorded, atol=0.3 * 2.0 + 0.9)  # whole electrons; 5 errors
    ratio = counts.var(0) / (share * (1 - share) * recorded)
    assert abs(ratio.mean() - 4.0) < 0.12
    assert float(reading.calibration["counts_per_electron"][0]) == 4.0


def test_truth_is_the_noise_free_rate_by_the_calibration_of_the_readings(file):
    instrument = replayed(file, thin=0.5, counts_per_electron=2.0)
    reading = acquire(instrument, (4, 6), 0.5 * EXPOSURE_S)
    truth = instrument.truth()
    cell = 4 * SHAPE[1] + 6
    assert torch.equal(truth["acquired"], truth["loadings"][:, cell])
    per_s = CURRENT_PA * ELECTRONS_PER_PC
    rate = torch.einsum("bk,bkc->bc", truth["acquired"], truth["components"])[0] * per_s
    right = expected()[4, 6] * 0.5 / 2.0 / EXPOSURE_S
    # The noise of a factor of the file: 400 counts and less, spread over 54 cells and 20 channels; 3 % in the mean.
    assert np.abs(rate.numpy() / right - 1.0).mean() < 0.05
    calibration = reading.calibration
    seen = reading.data["spectrum"][0] / calibration["counts_per_electron"][0] / calibration["exposure_s"][0]
    assert float(seen.sum() / rate.sum()) == pytest.approx(1.0, abs=0.15)  # five errors of some 1,100 electrons


def test_the_two_halves_of_a_file_without_an_image_are_the_file(imageless):
    instrument, recorded = replayed(imageless), np.load(imageless)["spectra"].astype(int)
    image = scan(instrument).data["images"][0, 0].numpy()
    total = 0
    for y in range(SHAPE[0]):
        for x in range(SHAPE[1]):
            half = acquire(instrument, (y, x)).data["spectrum"][0].numpy()
            assert (half <= recorded[y, x]).all()
            assert half.sum() + image[y, x] == recorded[y, x].sum()
            total += half.sum()
    assert abs(total - 0.5 * recorded.sum()) < 5.0 * np.sqrt(0.25 * recorded.sum())
    again = replayed(imageless, seed=9)
    np.testing.assert_array_equal(scan(again).data["images"][0, 0], image)
    truth = instrument.truth()
    rate = torch.einsum("hk,kc->", truth["loadings"][0], truth["components"][0]) * truth["electrons_per_s"][0]
    # The truth of the whole file, of which half is left: 130,000 counts, the rest of the factors well below a percent.
    assert float(rate) * EXPOSURE_S == pytest.approx(0.5 * recorded.sum(), rel=0.01)


def test_electrons_are_divided_where_a_count_is_less_than_one(imageless):
    """A camera of 4 counts an electron: whole electrons on either side, four times the variance of halved counts."""
    recorded = np.load(imageless)["spectra"].astype(float)
    instrument = replayed(imageless, counts_per_electron=4.0)
    left = instrument.replay.spectra.reshape(recorded.shape)
    assert (left % 4.0 == 0.0).all() and (instrument.replay.image.numpy() % 4.0 == 0.0).all()
    ratio = ((left - 0.5 * recorded) ** 2 / (0.25 * recorded)).mean()
    assert abs(ratio - 4.0) < 0.9  # five standard errors of 1,080 squares


def test_counts_that_are_no_whole_numbers_are_answered_as_they_are(file, tmp_path):
    arrays = dict(np.load(file))
    arrays["spectra"] = arrays["spectra"] * 0.37
    np.savez(tmp_path / "scaled.npz", **arrays)
    instrument = replayed(tmp_path / "scaled.npz")
    whole, half = acquire(instrument, (1, 1)), acquire(instrument, (1, 1), 0.5 * EXPOSURE_S)
    np.testing.assert_allclose(whole.data["spectrum"][0], arrays["spectra"][1, 1], rtol=1e-6)
    np.testing.assert_allclose(half.data["spectrum"][0], 0.5 * arrays["spectra"][1, 1], rtol=1e-6)


def test_spikes_stay_in_what_is_measured_and_out_of_the_truth(file, tmp_path):
    arrays = dict(np.load(file))
    arrays["spectra"][3, 3, 8] = 9000
    np.savez(tmp_path / "spike.npz", **arrays)
    instrument = replayed(tmp_path / "spike.npz")
    assert float(acquire(instrument, (3, 3)).data["spectrum"][0, 8]) == 9000.0
    truth = instrument.truth()
    counts = CURRENT_PA * EXPOSURE_S * ELECTRONS_PER_PC
    there = float(torch.einsum("k,kc->c", truth["acquired"][0], truth["components"][0])[8]) * counts
    assert there < 2.0 * expected()[3, 3, 8]


def test_rows_share_the_file(file):
    instrument = replayed(file, 5)
    truth = instrument.truth()
    assert truth["loadings"].shape[0] == 5 and truth["loadings"].stride(0) == 0 and truth["components"].stride(0) == 0
    assert replayed(file).replay is instrument.replay


def test_a_row_does_not_depend_on_the_batch(file):
    one, many = (acquire(replayed(file, rows, seed=4, thin=0.3), (2, 2)).data["spectrum"][0] for rows in (1, 6))
    assert torch.equal(one, many)


def test_what_can_not_be_done_is_refused(file, tmp_path):
    instrument = replayed(file)
    with pytest.raises(InstructionError, match=r"Acquire.exposure_s must be finite and within \[1e-06, 0.2\]"):
        acquire(instrument, (0, 0), 0.3)
    n = torch.arange(2)
    region = torch.tensor(FULL_FRAME).repeat(2, 1)
    fov = torch.full((2,), 10.0 * PIXEL_NM * SHAPE[1])
    with pytest.raises(InstructionError, match="whole field of 6 × 9 cells"):
        instrument.execute(Scan(n, fov, (12, 18), torch.full((2,), 1e-5), region))
    with pytest.raises(InstructionError, match="Scan.fov_ang must be finite and within"):
        instrument.execute(Scan(n, 0.5 * fov, SHAPE, torch.full((2,), 1e-5), region))
    with pytest.raises(DataError, match="no file"):
        replayed(tmp_path / "absent.npz")
    bare = {key: value for key, value in np.load(file).items() if key not in ("exposure_s", "pixel_nm")}
    np.savez(tmp_path / "bare.npz", **bare)
    with pytest.raises(
        ConfigError, match=r"does not tell .*exposure_s.*; give them in the settings, such as instrument\."
    ):
        replayed(tmp_path / "bare.npz")
    assert replayed(tmp_path / "bare.npz", exposure_s=0.1, pixel_nm=1.0).capabilities.grid == SHAPE


@pytest.mark.parametrize(
    ("name", "spectrometer"), [("cuzn_eels_50x40x162", "eels"), ("fept_core_shell_eds_64x64x992", "eds")]
)
def test_the_measured_sets_keep_the_contract(name, spectrometer):
    path = DATA / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the project")
    check_instrument(replayed(path, 2, spectrometer=spectrometer, exposure_s=0.1, current_pa=100.0, thin=0.5))
