"""Reference pictures in memory and on disk: one file for each picture of a set, or a small bundle of many."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stem_gym.core.errors import RecordError
from stem_gym.datasets.reference_specimens import ReferenceSpecimen
from stem_gym.datasets.scattering_matrix import Aberrations, DetectorAnnulus

__all__ = ["HAADF", "Picture", "Settings", "load_bundle", "load_picture", "save_bundle", "save_picture"]

FORMAT = 1
HAADF = DetectorAnnulus(80.0, 200.0)
_WINDOW_ANG = 21.0  # R² against a window of 80 Å is above 0.9997 at focus: the probe hardly meets its copies


@dataclass(frozen=True)
class Settings:
    """What one picture is computed with."""

    energy_kev: float
    configurations: int  # all phonon configurations
    seed: int
    shared: bool = False  # configurations are dealt out to the Bloch offsets instead of all being used by each
    annulus: DetectorAnnulus = HAADF
    window_ang: float = _WINDOW_ANG


@dataclass(frozen=True)
class Picture:
    """One specimen at one energy under M settings of the optics."""

    kind: str
    split: str
    specimen: ReferenceSpecimen
    settings: Settings
    optics: Aberrations
    halves: np.ndarray  # (2, M, ny, nx) complex64, each half of the phonons; frequencies in FFT order

    @property
    def coefficients(self) -> np.ndarray:
        """(M, ny, nx) Fourier coefficients of the collected fraction, all phonons."""
        return np.asarray(self.halves.mean(axis=0))


def save_picture(picture: Picture, path: Path) -> None:
    """Write one file atomically."""
    _write(path, {"format": np.array(FORMAT), **_arrays(picture), "halves": picture.halves})


def load_picture(path: Path) -> Picture:
    """Read one file; nothing in it is executed. Raises RecordError for a damaged or foreign file."""
    found = _read(path)
    try:
        return _picture(found, found["halves"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def save_bundle(pictures: Mapping[str, Picture], path: Path) -> None:
    """Write many pictures into one small file.

    Half of each real image's spectrum, and the halves' difference in 16 bits.
    """
    arrays: dict[str, Any] = {"format": np.array(FORMAT), "names": np.array(list(pictures))}
    for number, picture in enumerate(pictures.values()):
        kept = picture.halves[..., : (picture.halves.shape[-1] + 1) // 2]
        difference = (kept[0] - kept[1]) / 2
        largest = float(np.abs(difference).max()) or 1.0
        parts = np.stack([difference.real, difference.imag]) / largest
        mine = _arrays(picture) | {
            "mean": kept.mean(axis=0),
            "difference": parts.astype(np.float16),
            "largest_difference": np.array(largest),
        }
        arrays |= {f"{number}/{name}": value for name, value in mine.items()}
    _write(path, arrays)


def load_bundle(path: Path) -> dict[str, Picture]:
    """Read what `save_bundle` wrote. Raises RecordError for a damaged or foreign file."""
    found = _read(path)
    try:
        pictures = {}
        for number, name in enumerate(found["names"].tolist()):
            start = f"{number}/"
            mine = {key[len(start) :]: value for key, value in found.items() if key.startswith(start)}
            real, imaginary = mine["difference"].astype(np.float32) * float(mine["largest_difference"])
            difference = real + 1j * imaginary
            halves = np.stack([mine["mean"] + difference, mine["mean"] - difference])
            pictures[name] = _picture(mine, _whole_spectrum(halves).astype(np.complex64))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error
    return pictures


def _whole_spectrum(half: np.ndarray) -> np.ndarray:
    """The spectrum (…, ny, 2n − 1) of a real image in FFT order from its columns hx ≥ 0, (…, ny, n)."""
    mirrored = np.roll(half[..., ::-1, :], 1, axis=-2)[..., :0:-1]
    return np.concatenate([half, mirrored.conj()], axis=-1)


def _arrays(picture: Picture) -> dict[str, np.ndarray]:
    specimen, settings = picture.specimen, picture.settings
    plain = {
        "kind": picture.kind,
        "split": picture.split,
        "energy_kev": settings.energy_kev,
        "configurations": settings.configurations,
        "seed": settings.seed,
        "shared": settings.shared,
        "window_ang": settings.window_ang,
        "annulus_mrad": [settings.annulus.inner_mrad, settings.annulus.outer_mrad],
        **{f"optics_{name}": value for name, value in vars(picture.optics).items()},
        **{f"specimen_{name}": value for name, value in vars(specimen).items() if name != "kind"},
    }
    return {name: np.asarray(value) for name, value in plain.items()}


def _picture(found: Mapping[str, np.ndarray], halves: np.ndarray) -> Picture:
    fields: dict[str, Any] = {name[9:]: value for name, value in found.items() if name.startswith("specimen_")}
    fields["slice_ang"] = float(fields["slice_ang"])
    inner, outer = map(float, found["annulus_mrad"])
    settings = Settings(
        energy_kev=float(found["energy_kev"]),
        configurations=int(found["configurations"]),
        seed=int(found["seed"]),
        shared=bool(found["shared"]),
        annulus=DetectorAnnulus(inner, outer),
        window_ang=float(found["window_ang"]),
    )
    optics = Aberrations(**{name[7:]: value for name, value in found.items() if name.startswith("optics_")})
    kind = str(found["kind"])
    return Picture(kind, str(found["split"]), ReferenceSpecimen(kind=kind, **fields), settings, optics, halves)


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Atomically: a temporary file in the same folder, then a rename."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
            found = {name: data[name] for name in data.files}
    except Exception as error:  # numpy and zipfile raise many kinds
        raise _damaged(path, error) from error
    if int(found.get("format", np.array(-1))) != FORMAT:
        raise RecordError(f"{path} is not a reference picture of format {FORMAT}.")
    return found


def _damaged(path: Path, error: Exception) -> RecordError:
    return RecordError(f"{path} can not be read as reference pictures: {error}. Delete it and make it again.")
