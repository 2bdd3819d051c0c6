"""Measured spectrum images as data: read, checked, and named by their checksum. Nothing in a file can run as code."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stem_gym.core.errors import DataError
from stem_gym.datasets.cube_files import FOREIGN, Recorded, read_foreign

_NPZ_KEYS = "'spectra' (H, W, C), 'energy_eV' or 'energy_keV' (C,), and optionally 'haadf' (H, W), 'pixel_nm', …"
_EV_PER_KEV = 1000.0


@dataclass(frozen=True)
class SpectrumCube:
    """A spectrum at each cell of a grid, as it was recorded."""

    spectra: NDArray[Any]  # (H, W, C) counts, in the type of the file
    energy_ev: NDArray[np.float64]  # (C,) rising
    haadf: NDArray[Any] | None  # (H, W) counts of the image that was recorded with them
    pixel_nm: float | None  # side of a cell; None where the file does not tell
    exposure_s: float | None  # of one spectrum
    current_pa: float | None
    title: str
    licence: str  # as the file states it; empty where it does not
    sha256: str  # of the file
    whole_counts: bool  # whether all numbers are whole, so that counts can be thinned


def read_cube(path: str | os.PathLike[str], signal: int | None = None) -> SpectrumCube:
    """The spectrum image in a file; `signal` picks one where the file holds several.

    `.npz` holds the arrays `spectra` (H, W, C) and `energy_eV` or `energy_keV` (C,), and may hold `haadf` (H, W) and
    the scalars `pixel_nm`, `exposure_s`, `current_pa`, `title`, `licence`. `.ndata` (Nion Swift) and NSID `.h5` are
    read here as well; `.hspy`, `.zspy`, `.emd`, `.dm3` and `.dm4` by RosettaSciIO. y comes first, then x, then energy,
    whatever the order in the file.

    Raises DataError for what is missing, torn, pickled or makes no sense; MissingExtraError where RosettaSciIO is
    needed and absent.
    """
    file = Path(path)
    if not file.exists():
        raise DataError(f"There is no file {file}. Give the path of a spectrum image.")
    suffix = file.suffix.lower()
    if file.is_dir() and suffix != ".zspy":
        raise DataError(f"{file} is a folder. Give the path of a file in it.")
    if suffix == ".npz":
        recorded = _read_npz(file)
    elif suffix in FOREIGN:
        recorded = read_foreign(file, signal)
    else:
        raise DataError(f"{file}: files of type {suffix!r} are not read. Known: .npz, {', '.join(sorted(FOREIGN))}.")
    return _checked(recorded, file)


def _read_npz(file: Path) -> Recorded:
    try:
        with file.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{file} is no archive of arrays. It must hold {_NPZ_KEYS}.")
            with archive:
                arrays = {key: archive[key] for key in archive.files}
    except DataError:
        raise
    except ValueError as error:  # numpy's own words advise to unpickle
        raise DataError(
            f"{file} is no archive of plain arrays, or one of them is torn; pickled objects are never read. It must "
            f"hold {_NPZ_KEYS}."
        ) from error
    except (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{file} ({file.stat().st_size:,} bytes) can not be read, it may be cut short or damaged: {error}. Copy or "
            "save it again."
        ) from error
    if "spectra" not in arrays:
        raise DataError(f"{file} has no array 'spectra'; it holds {sorted(arrays)}. It must hold {_NPZ_KEYS}.")
    energy = arrays.get("energy_eV")
    if energy is None and "energy_keV" in arrays:
        energy = arrays["energy_keV"].astype(np.float64) * _EV_PER_KEV
    return Recorded(
        spectra=arrays["spectra"],
        energy_ev=energy,
        haadf=arrays.get("haadf"),
        pixel_nm=_scalar(arrays, "pixel_nm", file),
        exposure_s=_scalar(arrays, "exposure_s", file),
        current_pa=_scalar(arrays, "current_pa", file),
        title=str(arrays.get("title", "")),
        licence=str(arrays.get("licence", "")),
    )


def _scalar(arrays: Mapping[str, NDArray[Any]], key: str, file: Path) -> float | None:
    if key not in arrays:
        return None
    value = arrays[key]
    if value.size != 1 or value.dtype.kind not in "fiu":
        raise DataError(f"{file}: {key!r} must be one number; given {value.dtype} of shape {value.shape}.")
    return float(value.reshape(()))


def _checked(recorded: Recorded, file: Path) -> SpectrumCube:
    """The cube of what a file holds. Raises DataError, which names the file and what would be right."""
    spectra = np.asarray(recorded.spectra)
    if spectra.ndim != 3 or min(spectra.shape, default=0) < 2 or spectra.dtype.kind not in "fiub":
        raise DataError(
            f"{file}: spectra must be numbers of shape (H, W, C), at least two each; given {spectra.dtype} of shape "
            f"{spectra.shape}."
        )
    if not np.isfinite(spectra).all():
        bad = np.argwhere(~np.isfinite(spectra))
        y, x, channel = bad[0].tolist()
        raise DataError(
            f"{file}: {len(bad)} of {spectra.size} counts are NaN or infinite; the first in cell x {x}, y {y}, channel "
            f"{channel}. Give what was counted; cells and channels that were not recorded are cut off, or hold 0."
        )
    if spectra.min() < 0:
        raise DataError(
            f"{file}: the counts go down to {spectra.min():g}. Give what the detector recorded, before a background or "
            "dark signal was taken off."
        )
    if not spectra.any():
        raise DataError(f"{file}: all counts are zero.")
    energy_ev = _checked_energy(recorded.energy_ev, spectra.shape[2], file)
    whole = bool((spectra == np.round(spectra)).all())
    haadf = _checked_haadf(recorded.haadf, spectra.shape[:2], file)
    if haadf is None and not whole:
        raise DataError(
            f"{file}: there is no image of the same field, and the counts are no whole numbers, so that none can be "
            "made by thinning them. Give the array 'haadf', or the raw counts."
        )
    for key in ("pixel_nm", "exposure_s", "current_pa"):
        value = getattr(recorded, key)
        if value is not None and not 0.0 < value < np.inf:
            raise DataError(f"{file}: {key} must be above zero; given {value:g}.")
    return SpectrumCube(
        spectra=spectra,
        energy_ev=energy_ev,
        haadf=haadf,
        pixel_nm=recorded.pixel_nm,
        exposure_s=recorded.exposure_s,
        current_pa=recorded.current_pa,
        title=recorded.title or file.stem,
        licence=recorded.licence,
        sha256=_sha256(file),
        whole_counts=whole,
    )


def _checked_energy(energy: NDArray[Any] | None, channels: int, file: Path) -> NDArray[np.float64]:
    if energy is None:
        raise DataError(
            f"{file} has no energy axis. Give 'energy_eV' or 'energy_keV', or an axis whose unit is eV or keV."
        )
    axis = np.asarray(energy, dtype=np.float64)
    if axis.shape != (channels,):
        raise DataError(
            f"{file}: the energy axis must have one number for each of {channels} channels; given {axis.shape}. "
            "Spectra are of shape (H, W, C): y, x, and energy last."
        )
    if not np.isfinite(axis).all() or not (np.diff(axis) > 0.0).all():
        raise DataError(f"{file}: the energy axis must rise from channel to channel; it begins {axis[:4].tolist()}.")
    return axis


def _checked_haadf(image: NDArray[Any] | None, shape: tuple[int, ...], file: Path) -> NDArray[Any] | None:
    if image is None:
        return None
    haadf = np.asarray(image)
    if haadf.shape != shape or haadf.dtype.kind not in "fiu" or not np.isfinite(haadf).all() or haadf.min() < 0:
        raise DataError(
            f"{file}: the image must have one finite count, not below zero, for each of {shape[0]} × {shape[1]} cells; "
            f"given {haadf.dtype} of shape {haadf.shape}. It is never resampled."
        )
    return haadf


def _sha256(path: Path) -> str:
    """Of a file; of a folder (.zspy) of its files' names and contents, in order."""
    digest = hashlib.sha256()
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    for item in files:
        if path.is_dir():
            digest.update(item.relative_to(path).as_posix().encode())
        with item.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
