"""Make the abTEM reference set of HAADF pictures: python -m stem_gym.datasets.abtem_images --out DIR

Each file is one specimen at one energy: abTEM's frozen-phonon potentials, every beam of the aperture sent through them (see
`scattering_matrix`), and from the result the expected collected fraction under many settings of the optics, as Fourier coefficients.
Source size and focal spread are left out: they are linear and follow exactly. Two sums over the two halves of the phonon
configurations are kept apart, so that the reference's own noise can be measured.

Files are written atomically and never rewritten: a run that was killed goes on where it stopped, and several processes may
share a folder (`--part 0/4` … `--part 3/4`).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from stem_gym.core.errors import RecordError
from stem_gym.datasets.phonon_potentials import interaction_parameter, phonon_potentials
from stem_gym.datasets.reference_specimens import HELD_OUT, ReferenceSpecimen, held_out_specimen, training_specimen
from stem_gym.datasets.scattering_matrix import (
    Aberrations,
    Beams,
    DetectorAnnulus,
    aperture,
    band_limit,
    bloch_offsets,
    gram_matrix,
    image_coefficients,
    wavelength_ang,
)

__all__ = ["Picture", "Settings", "load_picture", "make_picture", "plan", "reference_coefficients"]

FORMAT = 1
HAADF = DetectorAnnulus(80.0, 200.0)
ENERGIES_KEV = (60.0, 80.0, 100.0)
_WINDOW_ANG = 21.0  # R² against a window of 80 Å is above 0.9997 at focus: the probe hardly meets its copies
_SPLITS = ("train", "valid", "held_out")


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


def reference_coefficients(specimen: ReferenceSpecimen, settings: Settings, optics: Aberrations) -> np.ndarray:
    """Fourier coefficients (2, M, ny, nx) of the expected collected fraction, for each half of the phonons.

    F[:, :, hy, hx] in FFT order; the fraction at (x, y) is Σ F exp(2πi (hx x/Lx + hy y/Ly)).
    """
    cell, energy = specimen.cell_ang, settings.energy_kev
    potential = phonon_potentials(specimen, energy, settings.configurations, settings.seed)
    phase = np.asarray(potential.array) * interaction_parameter(energy)
    transmission = _transmission(phase, cell)
    shifted = replace(optics, defocus_ang=optics.defocus_ang + specimen.mid_plane_ang)
    widest = float(optics.convergence_mrad.max())
    shape = _shape(cell, widest, energy)
    offsets, window = bloch_offsets(cell, settings.window_ang)
    edge_mrad = 0.5 * wavelength_ang(energy) / window.min() * 1e3
    halves = np.zeros((2, len(optics), *shape), dtype=np.complex128)
    total = np.zeros(len(optics))
    for number, offset in enumerate(offsets):
        beams = Beams.inside(cell, widest + edge_mrad, energy, offset)
        a = aperture(beams, shifted, energy, window)
        total += np.sum(np.abs(a) ** 2, axis=1)
        for half in range(2):
            mine = transmission[_dealt(settings, half, number, len(offsets))]
            gram = gram_matrix(mine, beams, cell, energy, specimen.slice_ang, settings.annulus)
            halves[half] += image_coefficients(gram, beams, a, shape).numpy()
    return (halves / total[:, None, None]).astype(np.complex64)


def _dealt(settings: Settings, half: int, offset: int, offsets: int) -> np.ndarray:
    """Numbers of the configurations that one half uses at one Bloch offset; the two of a pair stay together."""
    pair = np.arange(settings.configurations) // 2
    mine = pair % 2 == half
    if settings.shared:
        mine &= (pair // 2) % offsets == offset
    if not mine.any():
        raise RecordError(
            f"{settings.configurations} phonon configurations are too few to share among {offsets} Bloch offsets; "
            f"give at least {4 * offsets}, a multiple of it."
        )
    return np.flatnonzero(mine)


def _transmission(phase: np.ndarray, cell_ang: np.ndarray) -> torch.Tensor:
    """Transmission functions (configurations, slices, nx, ny); band-limited as in abTEM where a wave goes on to a next slice."""
    transmission = torch.from_numpy(np.exp(1j * phase).astype(np.complex64))
    if transmission.shape[1] == 1:
        return transmission
    k = [np.fft.fftfreq(n, side / n) for n, side in zip(transmission.shape[2:], cell_ang, strict=True)]
    kept = torch.from_numpy(band_limit(k, cell_ang))
    return torch.fft.ifft2(torch.fft.fft2(transmission) * kept)


def _shape(cell_ang: np.ndarray, convergence_mrad: float, energy_kev: float) -> tuple[int, int]:
    """Odd numbers of harmonics (ny, nx) up to the band limit 2α/λ."""
    limit = 2 * convergence_mrad * 1e-3 / wavelength_ang(energy_kev) * cell_ang
    nx, ny = (2 * int(np.ceil(side + 0.5)) + 1 for side in limit)
    return ny, nx


def training_optics(rng: np.random.Generator, count: int) -> Aberrations:
    """Random settings: half of them without astigmatism, half without spherical aberration, some at focus."""
    focus = np.where(rng.uniform(size=count) < 0.25, rng.normal(0, 8, count), rng.uniform(-70, 70, count))
    return Aberrations(
        convergence_mrad=rng.uniform(29.5, 35.5, count),
        defocus_ang=focus,
        astigmatism_ang=np.where(rng.uniform(size=count) < 0.5, 0.0, rng.uniform(0, 30, count)),
        astigmatism_angle_rad=rng.uniform(0, np.pi, count),
        c3_mm=np.where(rng.uniform(size=count) < 0.5, 0.0, rng.uniform(-0.006, 0.006, count)),
    )


def held_out_optics(rng: np.random.Generator) -> Aberrations:
    """The settings every held-out specimen is judged at: a focal series at 30, 34 and 35 mrad and two aberrated probes."""
    defocus = np.array([0.0, -60.0, -30.0, 30.0, 60.0, 15.0, float(rng.uniform(-50, 50)), float(rng.uniform(-50, 50))])
    count = len(defocus)
    astigmatism, c3 = np.zeros(count), np.zeros(count)
    astigmatism[-2:] = rng.uniform(5, 25, 2)
    c3[-2:] = rng.uniform(-0.004, 0.004, 2)
    convergence = np.full(count, 34.0)
    convergence[3:6] = [30.0, 35.0, 32.0]
    return Aberrations(convergence, defocus, astigmatism, rng.uniform(0, np.pi, count), c3)


@dataclass(frozen=True)
class Job:
    """One file of the set."""

    name: str
    split: str
    kind: str
    energy_kev: float
    configurations: int
    seed: tuple[int, ...]


def plan(train: int, seed: int = 0, held_out_configurations: int = 48, held_out_copies: int = 1) -> Iterator[Job]:
    """All files in the order of their making: some training, then the held-out ones, then the rest of the training set.

    Every eighth training specimen is a validation specimen with more phonons.
    """
    held_out = [
        Job(
            f"held_out-{kind}-{copy}-{energy:.0f}kev",
            "held_out",
            kind,
            energy,
            held_out_configurations,
            (seed, 1, number, copy),
        )
        for copy in range(held_out_copies)
        for number, kind in enumerate(HELD_OUT)
        for energy in ENERGIES_KEV
    ]
    for index in range(train):
        if index == min(120, train - 1):
            yield from held_out
        rng = np.random.default_rng([seed, 2, index])
        energy = float(rng.choice(ENERGIES_KEV)) if rng.uniform() < 0.75 else float(np.round(rng.uniform(60, 100), 1))
        split, configurations = ("valid", 32) if index % 8 == 7 else ("train", 16)
        yield Job(f"{split}-{index:05d}", split, "", energy, configurations, (seed, 3, index))


def make_picture(job: Job, optics_count: int = 16) -> Picture:
    """Draw the job's specimen and compute its pictures."""
    rng = np.random.default_rng(job.seed)
    if job.split == "held_out":
        specimen, optics = held_out_specimen(job.kind, rng), held_out_optics(rng)
    else:
        specimen, optics = training_specimen(rng), training_optics(rng, optics_count)
    settings = Settings(job.energy_kev, job.configurations, int(rng.integers(2**31)), shared=True)
    return Picture(
        specimen.kind, job.split, specimen, settings, optics, reference_coefficients(specimen, settings, optics)
    )


def save_picture(picture: Picture, path: Path) -> None:
    """Write one file atomically: a temporary file in the same folder, then a rename."""
    specimen, optics, settings = picture.specimen, picture.optics, picture.settings
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        np.savez_compressed(
            stream,
            format=FORMAT,
            kind=picture.kind,
            split=picture.split,
            halves=picture.halves,
            **{f"optics_{k}": v for k, v in vars(optics).items()},
            **{f"specimen_{k}": v for k, v in vars(specimen).items() if k != "kind"},
            energy_kev=settings.energy_kev,
            configurations=settings.configurations,
            seed=settings.seed,
            shared=settings.shared,
            window_ang=settings.window_ang,
            annulus_mrad=np.array([settings.annulus.inner_mrad, settings.annulus.outer_mrad]),
        )
    temporary.replace(path)


def load_picture(path: Path) -> Picture:
    """Read one file; nothing in it is executed. Raises RecordError for a damaged or foreign file."""
    try:
        with np.load(path, allow_pickle=False) as data:
            found = {name: data[name] for name in data.files}
        if int(found["format"]) != FORMAT:
            raise RecordError(f"{path} has format {int(found['format'])}; this version reads format {FORMAT}.")
        optics = Aberrations(**{k[7:]: v for k, v in found.items() if k.startswith("optics_")})
        fields = {k[9:]: v for k, v in found.items() if k.startswith("specimen_")}
        slice_ang = float(fields.pop("slice_ang"))
        kind = str(found["kind"])
        settings = Settings(
            float(found["energy_kev"]),
            int(found["configurations"]),
            int(found["seed"]),
            bool(found["shared"]),
            DetectorAnnulus(*map(float, found["annulus_mrad"])),
            float(found["window_ang"]),
        )
    except RecordError:
        raise
    except Exception as error:
        raise RecordError(
            f"{path} is not a reference picture, or is damaged: {error}. Delete it and run the command again."
        ) from error
    specimen = ReferenceSpecimen(kind=kind, slice_ang=slice_ang, **fields)
    return Picture(kind, str(found["split"]), specimen, settings, optics, found["halves"])


def run(out: Path, jobs: list[Job]) -> int:
    """Make whatever of `jobs` is missing in `out`; returns the number of files made."""
    out.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not (out / f"{job.name}.npz").exists()]
    print(f"{len(jobs)} pictures planned, {len(missing)} of them to make in {out}", flush=True)
    start = time.monotonic()
    made = 0
    for number, job in enumerate(missing, 1):
        path = out / f"{job.name}.npz"
        if not path.exists():  # another process may have been here
            save_picture(make_picture(job), path)
            made += 1
        elapsed_s = time.monotonic() - start
        left_min = elapsed_s / number * (len(missing) - number) / 60
        print(f"{number}/{len(missing)} {job.name}  {elapsed_s / number:.1f} s a picture, {left_min:.0f} min left", flush=True)
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make, or go on making, the abTEM reference set.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the set")
    parser.add_argument("--train", type=int, default=900, help="training and validation specimens (default 900)")
    parser.add_argument("--splits", nargs="+", choices=_SPLITS, default=_SPLITS, help="only these splits (default all)")
    parser.add_argument("--part", default="0/1", help="share of the work for this process, e.g. 0/4 (default 0/1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole set (default 0)")
    parser.add_argument(
        "--held-out-configurations", type=int, default=48, help="phonon configurations of held-out pictures"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    index, parts = (int(number) for number in given.part.split("/"))
    jobs = [job for job in plan(given.train, given.seed, given.held_out_configurations) if job.split in given.splits]
    run(given.out, jobs[index::parts])


if __name__ == "__main__":
    main()
