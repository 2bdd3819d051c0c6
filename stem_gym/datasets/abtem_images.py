"""Make the abTEM reference set of HAADF pictures: python -m stem_gym.datasets.abtem_images --out DIR

Each file is one specimen at one energy: abTEM's frozen-phonon potentials, every beam of the aperture sent through
them (see `scattering_matrix`), and from the result the expected collected fraction under many settings of the optics,
as Fourier coefficients. Source size and focal spread are left out: they are linear and follow exactly. Two sums over
the two halves of the phonon configurations are kept apart, so that the reference's own noise can be measured.

Files are written atomically and never rewritten: a run that was killed goes on where it stopped, and several
processes may share a folder (`--part 0/4` … `--part 3/4`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from stem_gym.core.errors import RecordError
from stem_gym.datasets.phonon_potentials import FINER, interaction_parameter, phonon_potentials
from stem_gym.datasets.pictures import Picture, Settings, save_picture
from stem_gym.datasets.reference_specimens import HELD_OUT, ReferenceSpecimen, held_out_specimen, training_specimen
from stem_gym.datasets.scattering_matrix import (
    Aberrations,
    Beams,
    aperture,
    band_limit,
    bloch_offsets,
    gram_matrix,
    image_coefficients,
    wavelength_ang,
)

__all__ = ["ENERGIES_KEV", "Job", "make_picture", "plan", "reference_coefficients", "run"]

ENERGIES_KEV = (60.0, 80.0, 100.0)
_SPLITS = ("train", "valid", "held_out")


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
    """Transmission functions (configurations, slices, nx, ny) from phases on the finer grid.

    Only the low frequencies are kept; band-limited as in abTEM where a wave goes on to a next slice.
    """
    nx, ny = (n // FINER for n in phase.shape[2:])
    k = [np.fft.fftfreq(n, side / n) for n, side in zip((nx, ny), cell_ang, strict=True)]
    kept = torch.from_numpy(band_limit(k, cell_ang) | (phase.shape[1] == 1))
    rows, columns = (torch.from_numpy(np.round(np.fft.fftfreq(n) * n).astype(int) % (n * FINER)) for n in (nx, ny))
    out = torch.empty(*phase.shape[:2], nx, ny, dtype=torch.complex64)
    for number, one in enumerate(phase):
        spectrum = torch.fft.fft2(torch.from_numpy(np.exp(1j * one).astype(np.complex64)))
        out[number] = torch.fft.ifft2(spectrum[:, rows[:, None], columns] * kept) / FINER**2
    return out


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
    """The settings every held-out specimen is judged at.

    A focal series at 30, 34 and 35 mrad and two aberrated probes.
    """
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
    kind: str  # a held-out kind, "layered", or empty for any kind
    energy_kev: float
    configurations: int
    seed: tuple[int, ...]


def plan(train: int, layered: int = 0, seed: int = 0, held_out_configurations: int = 48) -> Iterator[Job]:
    """All files in the order of their making: specimens of every kind, held-out ones, and more of several layers.

    Every eighth training specimen is a validation specimen with more phonons. Specimens of several layers are the
    hardest to learn, and thus get a series of their own.
    """
    yield from (_training_job(index, (seed, 3, index), "") for index in range(train))
    for number, kind in enumerate(HELD_OUT):
        for energy in ENERGIES_KEV:
            name = f"held_out-{kind}-0-{energy:.0f}kev"
            yield Job(name, "held_out", kind, energy, held_out_configurations, (seed, 1, number, 0))
    yield from (_training_job(index, (seed, 4, index), "layered") for index in range(layered))


def _training_job(index: int, seed: tuple[int, ...], series: str) -> Job:
    rng = np.random.default_rng([seed[0], 2, *seed[1:]] if series else [seed[0], 2, index])
    energy = float(rng.choice(ENERGIES_KEV)) if rng.uniform() < 0.75 else float(np.round(rng.uniform(60, 100), 1))
    split, configurations = ("valid", 32) if index % 8 == 7 else ("train", 16)
    name = f"{split}-{series}-{index:05d}" if series else f"{split}-{index:05d}"
    return Job(name, split, series, energy, configurations, seed)


def make_picture(job: Job, optics_count: int = 16) -> Picture:
    """Draw the job's specimen and compute its pictures."""
    rng = np.random.default_rng(job.seed)
    if job.split == "held_out":
        specimen, optics = held_out_specimen(job.kind, rng), held_out_optics(rng)
    else:
        specimen, optics = training_specimen(rng, job.kind == "layered"), training_optics(rng, optics_count)
    settings = Settings(job.energy_kev, job.configurations, int(rng.integers(2**31)), shared=True)
    return Picture(
        specimen.kind, job.split, specimen, settings, optics, reference_coefficients(specimen, settings, optics)
    )


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
        print(
            f"{number}/{len(missing)} {job.name}  {elapsed_s / number:.1f} s a picture, {left_min:.0f} min left",
            flush=True,
        )
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make, or go on making, the abTEM reference set.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the set")
    parser.add_argument("--train", type=int, default=96, help="training and validation specimens (default 96)")
    parser.add_argument("--layered", type=int, default=96, help="more of them, of several layers (default 96)")
    parser.add_argument("--splits", nargs="+", choices=_SPLITS, default=_SPLITS, help="only these splits (default all)")
    parser.add_argument("--part", default="0/1", help="share of the work for this process, e.g. 0/4 (default 0/1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole set (default 0)")
    parser.add_argument(
        "--held-out-configurations", type=int, default=48, help="phonon configurations of held-out pictures"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    index, parts = (int(number) for number in given.part.split("/"))
    everything = plan(given.train, given.layered, given.seed, given.held_out_configurations)
    run(given.out, [job for job in everything if job.split in given.splits][index::parts])


if __name__ == "__main__":
    main()
