"""Spectrum images in the files of other programs: Nion Swift and NSID here, the others through RosettaSciIO.

Files are data: pickled content is refused before anything reads it.
"""

from __future__ import annotations

import importlib
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from stem_gym.core.errors import DataError, missing_extra

# Type of file → the module of RosettaSciIO that reads it.
_ROSETTA = {
    ".hspy": "rsciio.hspy",
    ".zspy": "rsciio.zspy",
    ".emd": "rsciio.emd",
    ".dm3": "rsciio.digitalmicrograph",
    ".dm4": "rsciio.digitalmicrograph",
}
FOREIGN = frozenset({*_ROSETTA, ".ndata", ".h5"})
_EV = {"ev": 1.0, "kev": 1000.0, "mev": 0.001}  # "meV": no microscope records a spectrum in mega-electronvolts
_NM = {
    "nm": 1.0,
    "m": 1e9,
    "mm": 1e6,
    "µm": 1e3,
    "μm": 1e3,
    "um": 1e3,
    "å": 0.1,
    "a": 0.1,
    "ang": 0.1,
    "angstrom": 0.1,
    "pm": 1e-3,
}
_PA_PER_NA = 1000.0
_ZARR_METADATA = (".zarray", ".zmetadata", "zarr.json")  # where a zarr store may name the codecs of its arrays
_TORN = (
    OSError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
)


@dataclass(frozen=True)
class Recorded:
    """What a file holds, not checked yet."""

    spectra: NDArray[Any]  # (H, W, C) if it is right
    energy_ev: NDArray[Any] | None = None  # (C,)
    haadf: NDArray[Any] | None = None  # (H, W)
    pixel_nm: float | None = None
    exposure_s: float | None = None
    current_pa: float | None = None
    title: str = ""
    licence: str = ""


@dataclass(frozen=True)
class _Axis:
    """One axis of an array."""

    values: NDArray[Any]
    unit: str
    name: str = ""

    @property
    def energy_ev(self) -> NDArray[np.float64] | None:
        """The values in eV; None where the unit is no energy."""
        factor = _EV.get(self.unit.strip().lower())
        return None if factor is None else np.asarray(self.values, dtype=np.float64) * factor

    @property
    def step_nm(self) -> float | None:
        """The step between two cells in nm; None where the unit is no length."""
        factor = _NM.get(self.unit.strip().lower())
        return None if factor is None or len(self.values) < 2 else abs(float(self.values[1] - self.values[0])) * factor


@dataclass(frozen=True)
class _Signal:
    """One array of a file with its axes."""

    data: NDArray[Any]
    axes: Sequence[_Axis]
    title: str = ""
    metadata: Mapping[str, Any] | None = None

    @property
    def energy_axis(self) -> int | None:
        """Which axis of three is an energy; None where none or more than one is."""
        found = [number for number, axis in enumerate(self.axes) if axis.energy_ev is not None]
        return found[0] if len(found) == 1 and np.ndim(self.data) == 3 else None


def read_foreign(file: Path, signal: int | None) -> Recorded:
    """The spectrum image of a file in one of the types FOREIGN. Raises DataError and MissingExtraError."""
    suffix = file.suffix.lower()
    if suffix in _ROSETTA:
        signals = _read_rosetta(file, suffix)
    else:
        try:
            signals = _read_ndata(file) if suffix == ".ndata" else _read_nsid(file)
        except _TORN as error:
            raise DataError(f"{file} can not be read, it may be torn or hold pickled objects: {error}") from error
    return _recorded(signals, signal, file)


def _recorded(signals: Sequence[_Signal], number: int | None, file: Path) -> Recorded:
    """The one spectrum image among the signals, y first and energy last, with the image of the same field."""
    cubes = [signal for signal in signals if signal.energy_axis is not None]
    if not cubes:
        seen = [f"{signal.title or '?'} {np.shape(signal.data)}" for signal in signals]
        raise DataError(f"{file} has no energy axis: none of its three axes is in eV or keV. It holds {seen}.")
    if (number is None and len(cubes) > 1) or (number is not None and not 0 <= number < len(cubes)):
        listed = ", ".join(f"{i}: {cube.title or '?'} {np.shape(cube.data)}" for i, cube in enumerate(cubes))
        raise DataError(f"{file} holds {len(cubes)} spectrum images; choose `signal` among {listed}. Given {number}.")
    cube = cubes[number or 0]
    energy = cube.energy_axis or 0
    first, second = (axis for axis in range(3) if axis != energy)
    if cube.axes[first].name.lower().startswith("x"):  # some programs put x first
        first, second = second, first
    shape = (np.shape(cube.data)[first], np.shape(cube.data)[second])
    image = _image_of(signals, shape)
    known = _acquisition(cube.metadata or {})
    return Recorded(
        spectra=np.ascontiguousarray(np.transpose(np.asarray(cube.data), (first, second, energy))),
        energy_ev=cube.axes[energy].energy_ev,
        haadf=image,
        pixel_nm=cube.axes[second].step_nm,
        title=cube.title,
        **known,
    )


def _image_of(signals: Sequence[_Signal], shape: tuple[int, int]) -> NDArray[Any] | None:
    """The image with these cells whose title says that it is an annular one, else the only one of that shape."""
    images = [signal for signal in signals if np.shape(signal.data) == shape]
    named = [image for image in images if "adf" in image.title.lower()]
    haadf = [image for image in named if "haadf" in image.title.lower()]
    chosen = (haadf or named or (images if len(images) == 1 else []))[:1]
    return np.asarray(chosen[0].data) if chosen else None


def _acquisition(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Exposure, current and licence by HyperSpy's names: seconds, and nA for the current."""
    column = _at(metadata, "Acquisition_instrument", "TEM")
    detectors = _at(column, "Detector")
    times = [_at(detectors, detector).get(key) for detector in ("EELS", "EDS") for key in ("exposure", "dwell_time")]
    exposure = next((float(time) for time in times if isinstance(time, int | float)), None)
    current = column.get("beam_current")
    licence = _at(metadata, "General").get("license", "")
    return {
        "exposure_s": exposure,
        "current_pa": float(current) * _PA_PER_NA if isinstance(current, int | float) else None,
        "licence": str(licence),
    }


def _at(tree: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """The mapping at a path; an empty one where there is none."""
    for key in path:
        inner = tree.get(key)
        tree = inner if isinstance(inner, Mapping) else {}
    return tree


def _read_rosetta(file: Path, suffix: str) -> list[_Signal]:
    if suffix == ".zspy":
        _refuse_pickled_zarr(file)
    try:
        reader = importlib.import_module(_ROSETTA[suffix]).file_reader
    except ImportError as error:
        raise missing_extra(f"Reading {suffix} files", "files") from error
    try:
        return [_rosetta_signal(entry) for entry in reader(str(file))]
    except Exception as error:  # a reader of many formats raises many things for a damaged file
        told = f"it has no {error}" if isinstance(error, KeyError) else str(error) or "its reader does not say why"
        raise DataError(f"{file} can not be read, it may be cut short or damaged: {told}") from error


def _rosetta_signal(entry: Mapping[str, Any]) -> _Signal:
    data = np.asarray(entry["data"])
    if data.dtype.hasobject:
        raise DataError("it holds Python objects, which are not read")
    axes = sorted(entry["axes"], key=lambda axis: axis.get("index_in_array", 0))
    metadata = entry.get("metadata", {})
    title = _at(metadata, "General").get("title", "")
    return _Signal(data, [_rosetta_axis(axis, data.shape) for axis in axes], str(title), metadata)


def _rosetta_axis(axis: Mapping[str, Any], shape: tuple[int, ...]) -> _Axis:
    values: NDArray[Any]
    if "axis" in axis:
        values = np.asarray(axis["axis"], dtype=np.float64)
    else:
        size = int(axis.get("size", shape[int(axis.get("index_in_array", 0))]))
        values = float(axis.get("offset", 0.0)) + float(axis.get("scale", 1.0)) * np.arange(size)
    return _Axis(values, str(axis.get("units") or ""), str(axis.get("name") or ""))


def _refuse_pickled_zarr(file: Path) -> None:
    """A zarr store names its codecs in small JSON files: one of them is Python's pickle, which could run code."""
    try:
        if file.is_dir():
            texts = [item.read_bytes() for name in _ZARR_METADATA for item in file.rglob(name)]
        else:
            with zipfile.ZipFile(file) as archive:
                names = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] in _ZARR_METADATA]
                texts = [archive.read(name) for name in names]
        # Read as JSON, as the store's reader does: a text may be written in other letters than it holds.
        pickled = any("pickle" in json.dumps(json.loads(text)) for text in texts)
    except (*_TORN, RecursionError) as error:
        raise DataError(f"{file} can not be read, it may be cut short: {error}") from error
    if pickled:
        raise DataError(f"{file} holds pickled objects, which are not read: they could run code.")


def _read_ndata(file: Path) -> list[_Signal]:
    """Nion Swift: a zip archive of `data.npy` and `metadata.json`."""
    with zipfile.ZipFile(file) as archive:
        with archive.open("data.npy") as stream:
            data = np.lib.format.read_array(stream, allow_pickle=False)
        properties = json.loads(archive.read("metadata.json").decode("utf-8"))
    source = (properties.get("data_sources") or [properties])[0]
    calibrations = source.get("dimensional_calibrations") or source.get("spatial_calibrations") or []
    axes = [
        _Axis(
            float(part.get("offset", 0.0)) + float(part.get("scale", 1.0)) * np.arange(size),
            str(part.get("units") or ""),
        )
        for part, size in zip(calibrations, data.shape, strict=True)
    ]
    return [_Signal(data, axes, str(properties.get("title", "")))]


def _read_nsid(file: Path) -> list[_Signal]:
    """NSID: arrays with dimension scales that carry `units` and `name`; the spectrum image and images of its field."""
    signals: list[_Signal] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim in (2, 3) and all(len(item.dims[i]) for i in range(item.ndim)):
            scales = [item.dims[i][0] for i in range(item.ndim)]
            axes = [_Axis(np.asarray(s[()]), _text(s.attrs.get("units")), _text(s.attrs.get("name"))) for s in scales]
            if item.dtype.hasobject:
                raise ValueError(f"{name} holds objects")
            data = np.asarray(item[()])
            if item.ndim == 2 and axes[0].name.lower().startswith("x"):
                data, axes = data.T, axes[::-1]
            signals.append(_Signal(data, axes, _text(item.attrs.get("main_data_name")) or name))

    with h5py.File(file, "r") as opened:
        opened.visititems(visit)
    return signals


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")
