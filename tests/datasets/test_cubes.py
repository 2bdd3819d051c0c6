"""Reading measured cubes: every way in, every refusal by its words, and no code from a file."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from stem_gym.core.errors import DataError, MissingExtraError
from stem_gym.datasets.cubes import read_cube

DATA = Path(os.environ.get("STEM_GYM_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))
SPECTRA = np.arange(3 * 4 * 5, dtype=np.uint16).reshape(3, 4, 5)
ENERGY_EV = np.linspace(100.0, 140.0, 5)
HAADF = np.arange(12, dtype=np.uint16).reshape(3, 4)


def npz(tmp_path: Path, **arrays: Any) -> Path:
    path = tmp_path / "cube.npz"
    given = {"spectra": SPECTRA, "energy_eV": ENERGY_EV, "haadf": HAADF} | arrays
    np.savez(path, **{key: value for key, value in given.items() if value is not None})
    return path


def test_an_npz_is_read_as_it_is(tmp_path):
    path = npz(tmp_path, pixel_nm=0.5, exposure_s=0.2, current_pa=30.0, title="A map", licence="CC0")
    cube = read_cube(path)
    np.testing.assert_array_equal(cube.spectra, SPECTRA)
    np.testing.assert_array_equal(cube.energy_ev, ENERGY_EV)
    np.testing.assert_array_equal(cube.haadf, HAADF)
    assert (cube.pixel_nm, cube.exposure_s, cube.current_pa) == (0.5, 0.2, 30.0)
    assert (cube.title, cube.licence, cube.whole_counts) == ("A map", "CC0", True)
    assert cube.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    kilo = read_cube(npz(tmp_path, energy_eV=None, energy_keV=ENERGY_EV / 1000.0, haadf=None))
    np.testing.assert_allclose(kilo.energy_ev, ENERGY_EV)
    assert kilo.haadf is None and kilo.pixel_nm is None and kilo.title == "cube"


WRONG = {
    "no energy axis": ({"energy_eV": None}, "no energy axis"),
    "an axis that falls": ({"energy_eV": ENERGY_EV[::-1]}, "must rise"),
    "an axis that stands": ({"energy_eV": np.full(5, 7.0)}, "must rise"),
    "an axis of another length": ({"energy_eV": ENERGY_EV[:4]}, "one number for each of 5 channels"),
    "energy first": ({"spectra": SPECTRA.transpose(2, 0, 1), "haadf": None}, "energy last"),
    "no spectra": ({"spectra": None}, "no array 'spectra'"),
    "a flat array": ({"spectra": SPECTRA.reshape(12, 5)}, r"shape \(H, W, C\)"),
    "text": ({"spectra": SPECTRA.astype(str)}, r"shape \(H, W, C\)"),
    "nan": (
        {"spectra": np.where(SPECTRA == 7, np.nan, SPECTRA)},
        "1 of 60 counts are NaN.*cell x 1, y 0, channel 2.*cut off, or hold 0",
    ),
    "negative": ({"spectra": SPECTRA.astype(float) - 3.0}, "go down to -3.*before a background"),
    "nothing": ({"spectra": np.zeros_like(SPECTRA)}, "all counts are zero"),
    "an image of another shape": ({"haadf": HAADF.T}, "never resampled"),
    "no image, no whole counts": ({"haadf": None, "spectra": SPECTRA + 0.5}, "none can be made by thinning"),
    "pixel of nothing": ({"pixel_nm": 0.0}, "pixel_nm must be above zero"),
    "pixels": ({"pixel_nm": np.ones(2)}, "'pixel_nm' must be one number"),
    "pickled spectra": ({"spectra": np.array([[[1, 2], [3, {}]]], dtype=object)}, "pickled objects"),
}


def test_a_folder_and_a_text_are_told_for_what_they_are(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        read_cube(tmp_path)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match="pickled objects are never read. It must hold") as told:
        read_cube(tmp_path / "text.npz")
    assert "allow_pickle" not in str(told.value)


@pytest.mark.parametrize("fault", WRONG)
def test_what_makes_no_sense_is_refused_by_name(fault, tmp_path):
    arrays, words = WRONG[fault]
    path = npz(tmp_path, **arrays)
    with pytest.raises(DataError, match=words) as told:
        read_cube(path)
    assert str(path) in str(told.value)


def test_files_that_are_torn_foreign_or_absent_are_refused(tmp_path):
    path = npz(tmp_path)
    whole = path.read_bytes()
    for share in (0.3, 0.7, 0.97):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DataError, match="can not be read|pickled objects or a torn array"):
            read_cube(path)
    np.savez_compressed(path, spectra=SPECTRA, energy_eV=ENERGY_EV)
    whole = path.read_bytes()
    begin = 30 + len("spectra.npy") + int.from_bytes(whole[28:30], "little")  # the first member's numbers themselves
    for at in range(begin, begin + 80, 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with pytest.raises(DataError, match="can not be read|pickled objects or a torn array"):
            read_cube(path)
    with path.open("wb") as stream:
        np.save(stream, SPECTRA)
    with pytest.raises(DataError, match="no archive of arrays"):
        read_cube(path)
    with pytest.raises(DataError, match="no file"):
        read_cube(tmp_path / "absent.npz")
    (tmp_path / "a.xyz").write_bytes(b"1")
    with pytest.raises(DataError, match=r"'.xyz' are not read. Known: .npz, .dm3"):
        read_cube(tmp_path / "a.xyz")


class Bomb:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["cube.npz", "cube.ndata", "cube.h5", "cube.zspy"])
def test_a_pickle_never_runs(name, tmp_path):
    went_off = tmp_path / "went_off"
    objects = np.array([Bomb(went_off)], dtype=object)
    path = tmp_path / name
    if name.endswith("npz"):
        path.write_bytes(pickle.dumps(Bomb(went_off)))
    elif name.endswith("ndata"):
        np.save(tmp_path / "data.npy", objects, allow_pickle=True)
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "data.npy", "data.npy")
            archive.writestr("metadata.json", "{}")
    elif name.endswith("h5"):
        path.write_bytes(pickle.dumps(Bomb(went_off)))
    else:
        (path / "Experiments").mkdir(parents=True)
        (path / "Experiments" / ".zarray").write_text('{"filters": [{"id": "pickle", "protocol": 5}]}')
    with pytest.raises(DataError, match="pickled|torn|archive of arrays"):
        read_cube(path)
    assert not went_off.exists()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [".zarray", ".zmetadata", "zarr.json"])
@pytest.mark.parametrize("codec", ['"pickle"', '"p\\u0069ckle"'])
def test_a_zarr_store_that_unpickles_is_refused_wherever_it_says_so(codec, name, packed, tmp_path):
    """Also where its metadata are in one file, or the name is written in other letters; and what is no JSON."""
    path = tmp_path / "cube.zspy"
    for text, words in ((f'{{"metadata": {{"filters": [{{"id": {codec}}}]}}}}', "pickled"), ("{", "can not be read")):
        if packed:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr(f"Experiments/{name}", text)
        else:
            (path / "Experiments").mkdir(parents=True, exist_ok=True)
            (path / "Experiments" / name).write_text(text)
        with pytest.raises(DataError, match=words):
            read_cube(path)


def test_ndata_of_nion_swift_is_read(tmp_path):
    handler = pytest.importorskip("nion.swift.model.NDataHandler")
    calibrations = [
        {"offset": 0.0, "scale": 2.0, "units": "nm"},
        {"offset": 0.0, "scale": 2.0, "units": "nm"},
        {"offset": 100.0, "scale": 10.0, "units": "eV"},
    ]
    properties = {"title": "Map", "data_sources": [{"dimensional_calibrations": calibrations}]}
    path = tmp_path / "map.ndata"
    handler.write_zip(str(path), SPECTRA.astype(np.float32), properties)
    cube = read_cube(path)
    np.testing.assert_array_equal(cube.spectra, SPECTRA)
    np.testing.assert_allclose(cube.energy_ev, ENERGY_EV)
    assert (cube.pixel_nm, cube.title, cube.haadf) == (2.0, "Map", None)


def nsid(path: Path, units: str = "eV") -> Path:
    """What pyNSID writes: arrays with dimension scales, x before y."""
    with h5py.File(path, "w") as file:
        group = file.create_group("Measurement_000/Channel_000/si")
        data = group.create_dataset("si", data=SPECTRA.transpose(1, 0, 2))
        image = group.create_dataset("HAADF", data=HAADF.T)
        for number, (name, values, unit) in enumerate(
            [("x", np.arange(4) * 0.5, "nm"), ("y", np.arange(3) * 0.5, "nm"), ("energy", ENERGY_EV, units)]
        ):
            scale = group.create_dataset(name, data=values)
            scale.make_scale(name)
            scale.attrs["units"], scale.attrs["name"] = unit, name
            data.dims[number].attach_scale(scale)
            if number < 2:
                image.dims[number].attach_scale(scale)
    return path


def test_nsid_is_read_with_y_first(tmp_path):
    cube = read_cube(nsid(tmp_path / "si.h5"))
    np.testing.assert_array_equal(cube.spectra, SPECTRA)
    np.testing.assert_array_equal(cube.haadf, HAADF)
    assert cube.pixel_nm == 0.5
    with pytest.raises(DataError, match="none of its three axes is in eV or keV"):
        read_cube(nsid(tmp_path / "other.h5", units="mrad"))


def rosetta(monkeypatch, module: str, entries: Any) -> None:
    """A stand-in for RosettaSciIO with the interface that it documents."""
    package, reader = types.ModuleType("rsciio"), types.ModuleType(f"rsciio.{module}")

    def file_reader(filename: str) -> Any:
        if isinstance(entries, Exception):
            raise entries
        return entries

    reader.file_reader = file_reader
    monkeypatch.setitem(sys.modules, "rsciio", package)
    monkeypatch.setitem(sys.modules, f"rsciio.{module}", reader)


def axis(index: int, size: int, unit: str, scale: float = 1.0, offset: float = 0.0, name: str = "") -> dict[str, Any]:
    return {"index_in_array": index, "size": size, "units": unit, "scale": scale, "offset": offset, "name": name}


def entries(title: str = "EELS") -> list[dict[str, Any]]:
    metadata = {
        "General": {"title": title, "license": "CC-BY"},
        "Acquisition_instrument": {"TEM": {"beam_current": 0.05, "Detector": {"EELS": {"exposure": 0.1}}}},
    }
    energy_first = [axis(0, 5, "keV", 0.01, 0.1), axis(1, 3, "µm", 5e-4, name="y"), axis(2, 4, "µm", 5e-4, name="x")]
    image_axes = [axis(0, 3, "nm"), axis(1, 4, "nm")]
    return [
        {"data": np.ones((3, 4)), "axes": image_axes, "metadata": {"General": {"title": "BF"}}},
        {"data": HAADF, "axes": image_axes, "metadata": {"General": {"title": "HAADF"}}},
        {"data": SPECTRA.transpose(2, 0, 1), "axes": energy_first, "metadata": metadata},
    ]


@pytest.mark.parametrize(
    ("name", "module"),
    [("a.hspy", "hspy"), ("a.emd", "emd"), ("a.dm3", "digitalmicrograph"), ("a.DM4", "digitalmicrograph")],
)
def test_other_formats_come_through_rosettasciio(name, module, tmp_path, monkeypatch):
    rosetta(monkeypatch, module, entries())
    (tmp_path / name).write_bytes(b"whatever")
    cube = read_cube(tmp_path / name)
    np.testing.assert_array_equal(cube.spectra, SPECTRA)
    np.testing.assert_array_equal(cube.haadf, HAADF)
    np.testing.assert_allclose(cube.energy_ev, ENERGY_EV)
    assert cube.pixel_nm == pytest.approx(0.5)
    assert (cube.exposure_s, cube.current_pa, cube.title, cube.licence) == (0.1, 50.0, "EELS", "CC-BY")


@pytest.mark.parametrize("module", ["hspy", "emd"])
def test_what_rosettasciio_writes_is_read(module, tmp_path):
    """With RosettaSciIO itself, where the extra is installed."""
    writer = pytest.importorskip(f"rsciio.{module}").file_writer
    axes = [axis(0, 3, "nm", 0.5, name="y"), axis(1, 4, "nm", 0.5, name="x"), axis(2, 5, "eV", 10.0, 100.0, "Energy")]
    for number, one in enumerate(axes):
        one["navigate"] = number < 2
    detector = {"EELS": {"exposure": 0.1}}
    metadata = {
        "General": {"title": "EELS"},
        "Signal": {"signal_type": "EELS"},
        "Acquisition_instrument": {"TEM": {"beam_current": 0.05, "Detector": detector}},
    }
    signal = {"data": SPECTRA, "axes": axes, "metadata": metadata, "original_metadata": {}, "learning_results": {}}
    signal |= {"attributes": {"_lazy": False}, "tmp_parameters": {}, "models": {}}
    writer(str(tmp_path / f"a.{module}"), signal | {"package_info": {"package": "stem_gym", "package_version": "0.1"}})
    cube = read_cube(tmp_path / f"a.{module}")
    np.testing.assert_array_equal(cube.spectra, SPECTRA)
    np.testing.assert_allclose(cube.energy_ev, ENERGY_EV)
    assert cube.pixel_nm == pytest.approx(0.5)
    if module == "hspy":  # the other keeps neither
        assert (cube.exposure_s, cube.current_pa) == (0.1, pytest.approx(50.0))


def test_one_of_several_spectrum_images_must_be_chosen(tmp_path, monkeypatch):
    both = [*entries("low loss"), *entries("core loss")]
    both[5]["data"] = both[5]["data"] + 1
    rosetta(monkeypatch, "hspy", both)
    (tmp_path / "a.hspy").write_bytes(b"")
    with pytest.raises(DataError, match="2 spectrum images; choose `signal` among 0: low loss.*1: core loss"):
        read_cube(tmp_path / "a.hspy")
    assert read_cube(tmp_path / "a.hspy", signal=1).title == "core loss"
    with pytest.raises(DataError, match="Given 2"):
        read_cube(tmp_path / "a.hspy", signal=2)


def test_without_the_extra_its_name_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rsciio", None)
    monkeypatch.setitem(sys.modules, "rsciio.hspy", None)
    (tmp_path / "a.hspy").write_bytes(b"")
    with pytest.raises(MissingExtraError, match=r"Reading .hspy files.*stem-gym\[files\]"):
        read_cube(tmp_path / "a.hspy")


def test_a_file_that_its_reader_can_not_take_is_a_data_error(tmp_path, monkeypatch):
    (tmp_path / "a.hspy").write_bytes(b"")
    for problem, words in (
        (OSError("truncated"), "truncated"),
        (AssertionError(), "its reader does not say why"),
        ([{"data": np.array([{}]), "axes": [axis(0, 1, "")]}], "it holds Python objects, which are not read"),
        ([{"axes": []}], "it has no 'data'"),
    ):
        rosetta(monkeypatch, "hspy", problem)
        with pytest.raises(DataError, match=f"can not be read, it may be cut short or damaged: {words}$"):
            read_cube(tmp_path / "a.hspy")


@pytest.mark.parametrize(
    ("name", "shape", "first_ev", "image"),
    [
        ("cuzn_eels_50x40x162", (50, 40, 162), 700.0, True),
        ("fept_core_shell_eds_64x64x992", (64, 64, 992), 160.0, False),
    ],
)
def test_the_measured_sets_are_read(name, shape, first_ev, image):
    path = DATA / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the project")
    cube = read_cube(path)
    assert cube.spectra.shape == shape and cube.whole_counts
    assert cube.energy_ev[0] == pytest.approx(first_ev) and (cube.haadf is not None) == image
