"""A measured spectrum image, replayed: all rows share one file, and each measures it afresh, cell by cell.

A spectrum is the recorded one, binomially thinned to a shorter exposure: new noise at every measurement, and the spikes
and dead cells of the file in it. Truth is the file's noise-free part. Nothing drifts, and nothing is resampled.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from stem_gym.core.config import Config as Settings
from stem_gym.core.config import parse
from stem_gym.core.errors import ConfigError
from stem_gym.core.instructions import Acquire, Blank, Park, Read, Reading, Scan, Wait, no_dose
from stem_gym.core.instrument import Limits
from stem_gym.core.streams import Streams
from stem_gym.core.units import ANG_PER_NM, ELECTRONS_PER_PC
from stem_gym.datasets.cube_factors import Factors, factorise
from stem_gym.datasets.cubes import SpectrumCube, read_cube
from stem_gym.datasets.example_cube import example_cube
from stem_gym.instruments.simulation import Simulation
from stem_gym.simulator.probe_grid import ProbeGrid, ProbeRows, SpectralOverheads, blank, of_detector
from stem_gym.simulator.thinning import thin

_SHORTEST_S = 1e-6  # of an exposure; a recorded one that is shorter still can be had whole


class Config(Settings):
    """A file and what is to be known of its recording."""

    kind: Literal["replayed"] = "replayed"
    """this instrument"""
    path: str | None = Field(default=None, min_length=1)
    """of the spectrum image; see `stem_gym.datasets.cubes.read_cube` for what can be read. Without one, an example is
    replayed that nobody measured"""
    signal: int | None = Field(default=None, ge=0)
    """which spectrum image, where the file holds several"""
    spectrometer: Literal["eels", "eds"] = "eels"
    """name of the detector that Acquire takes"""
    current_pa: float | None = Field(default=None, gt=0)
    """beam current of the recording; needed where the file does not tell"""
    exposure_s: float | None = Field(default=None, gt=0)
    """exposure of one recorded spectrum; needed where the file does not tell"""
    pixel_nm: float | None = Field(default=None, gt=0)
    """side of a cell; needed where the file does not tell"""
    thin: float = Field(default=1.0, gt=0, le=1)
    """share of the recorded counts that a measurement of the recorded exposure gives; 1: the recorded spectrum"""
    counts_per_electron: float = Field(default=1.0, gt=0)
    """counts that the recording detector gave per electron or X-ray; electrons are thinned, not counts"""
    overheads: SpectralOverheads = SpectralOverheads()
    """time beside exposure"""


@dataclass(frozen=True)
class Replay:
    """A file made ready, once for all rows."""

    cube: SpectrumCube
    image: Tensor  # (H, W) counts
    spectra: NDArray[Any]  # (H·W, C) counts that are left for the spectra
    factors: Factors  # of the whole recording
    share: float  # of its counts that are left for the spectra; the others made the image


@dataclass
class _Rows:
    """Everything that belongs to a row."""

    probe: ProbeRows
    acquired: Tensor  # (B, K) loadings of the last cell that was measured; NaN before the first


def make(settings: Mapping[str, Any], rows: int, device: torch.device) -> ReplayedCube:
    """A replayed file from the `instrument` section of a variant. Raises DataError for a file that can not be used."""
    return ReplayedCube(parse(Config, settings, "instrument"), rows, device)


class ReplayedCube(Simulation[_Rows]):
    """Executes Scan, Park, Acquire, Blank, Wait and Read on a recorded spectrum image.

    Scan answers the recorded image whatever its dwell time. Where the file has none, its electrons are divided once, by
    a seed from its checksum: one half summed over the channels is the image, the other half gives the spectra. An
    exposure longer than the recorded one is refused. Counts that are no whole numbers can not be thinned: they are
    answered as the file has them, in proportion to the exposure, and a second measurement is the first one again.
    """

    title = "The replayed file"

    def __init__(self, config: Config, rows: int, device: torch.device | str = "cpu") -> None:
        super().__init__(rows, device)
        self.config = config
        self.replay = _prepare(config)
        cube = self.replay.cube
        height, width, _ = cube.spectra.shape
        self._exposure_s = _known(config, cube, "exposure_s")
        cell_ang, current_pa = _known(config, cube, "pixel_nm") * ANG_PER_NM, _known(config, cube, "current_pa")
        self._grid = ProbeGrid((height, width), cell_ang, current_pa, config.overheads)
        axis = torch.from_numpy(cube.energy_ev.astype(np.float32))
        limits = Limits(min(_SHORTEST_S, self._exposure_s), self._exposure_s)
        self.capabilities = self._grid.capabilities({config.spectrometer: axis}, limits)
        self._image = self.replay.image.to(self.device)
        self._loadings = torch.from_numpy(self.replay.factors.loadings.astype(np.float32)).to(self.device)
        beam = current_pa * self._exposure_s * ELECTRONS_PER_PC
        per_electron = self.replay.share * config.thin / (config.counts_per_electron * beam)
        components = (self.replay.factors.components * per_electron).astype(np.float32)
        self._components = torch.from_numpy(components).to(self.device)
        self._beam_per_s = torch.full((rows,), current_pa * ELECTRONS_PER_PC, device=self.device)
        self._handlers = {
            Scan: self._scan,
            Park: self._park,
            Acquire: self._acquire,
            Blank: self._blank,
            Wait: self._wait,
            Read: self._read,
        }

    def _fresh(self, streams: Streams, rows: Tensor) -> _Rows:
        """The probe back in the middle, clock and ledger at zero."""
        nowhere = torch.full((len(rows), self._loadings.shape[1]), torch.nan, device=self.device)
        return _Rows(self._grid.start(len(rows), self.device), nowhere)

    def _book(self, reading: Reading) -> None:
        self._grid.spend(self._now.probe, reading)

    def truth(self) -> Mapping[str, Tensor]:
        """Loadings and components of the file's noise-free part, views that all rows share; spikes are not in them.

        `electrons_per_s` turns a spectrum per beam electron into detected electrons (or X-rays) per second. `acquired`
        is what the last Acquire measured, NaN before the first; it is live, good until the next instruction.
        """
        return {
            "loadings": self._loadings.expand(self.rows, -1, -1),
            "components": self._components.expand(self.rows, -1, -1),
            "acquired": self._now.acquired,
            "electrons_per_s": self._beam_per_s,
            "fov_ang": torch.full((self.rows,), self._grid.fov_ang, device=self.device),
            "frame_centre_ang": torch.zeros(self.rows, 2, device=self.device),
        }

    @torch.inference_mode()
    def abort(self) -> None:
        """Blank every row."""
        if self._state is not None:
            self._state.probe.blanked.fill_(True)

    def _scan(self, scan: Scan) -> Reading:
        self._grid.check_scan(scan)
        images = self._image.expand(len(scan.rows), -1, -1)
        return self._grid.scan_reading(scan, images, of_detector(scan.rows, 1.0, 0.0), 0.0)

    def _acquire(self, acquire: Acquire) -> Reading:
        self._grid.check_acquire(acquire, self.capabilities)
        state, rows = self._now, acquire.rows
        place = state.probe.place.index_select(0, rows)
        cells = self._grid.cells_of(place)
        state.acquired.index_copy_(0, rows, self._loadings.index_select(0, cells))
        counts = self._counts(rows, cells, acquire.exposure_s)
        calibration = of_detector(rows, self.config.counts_per_electron, 0.0)
        return self._grid.acquire_reading(acquire, place, {"spectrum": counts}, calibration)

    def _counts(self, rows: Tensor, cells: Tensor, exposure_s: Tensor) -> Tensor:
        """The recorded counts (n, C) of `cells` (n,), as an exposure (n,) would have given them."""
        recorded = self.replay.spectra[cells.cpu().numpy()].astype(np.float64)
        share = (exposure_s.cpu().double() / self._exposure_s).clamp(max=1.0).numpy()
        share = np.where(share > 1.0 - 1e-6, 1.0, share) * self.config.thin  # single precision of the whole exposure
        uniform = self._streams.uniform(rows, (recorded.shape[1],)).cpu().numpy()
        per_electron = self.config.counts_per_electron
        if self.replay.cube.whole_counts:
            electrons = recorded if per_electron == 1.0 else np.round(recorded / per_electron)
            kept = np.where(share[:, None] < 1.0, thin(electrons, share, uniform) * per_electron, recorded)
        else:
            kept = recorded * share[:, None]
        return torch.from_numpy(kept.astype(np.float32)).to(self.device)

    def _park(self, park: Park) -> Reading:
        return self._grid.park(self._now.probe, park)

    def _blank(self, instruction: Blank) -> Reading:
        return blank(self._now.probe, instruction, instruction.on)

    def _wait(self, wait: Wait) -> Reading:
        return no_dose(wait, wait.time_s)

    def _read(self, read: Read) -> Reading:
        return self._grid.read(self._now.probe, read)


_FACTS = ("pixel_nm", "exposure_s", "current_pa")  # that a file may leave untold


def _known(config: Config, cube: SpectrumCube, key: str) -> float:
    """A value from the settings, else from the file. Raises ConfigError where neither tells."""
    given = getattr(config, key)
    value = given if given is not None else getattr(cube, key)
    if value is None:
        untold = [name for name in _FACTS if getattr(config, name) is None and getattr(cube, name) is None]
        raise ConfigError(
            f"instrument: {config.path or 'the example'} does not tell {', '.join(untold)}; give them in the settings, "
            f"such as instrument.{key}."
        )
    return float(value)


def _prepare(config: Config) -> Replay:
    """The file made ready; read and factorised once a process while it stays as it is."""
    if config.path is None:
        return _prepared(None, None, config.counts_per_electron, (0, 0))
    file = Path(config.path)
    state = os.stat(file) if file.exists() else None
    version = (state.st_mtime_ns, state.st_size) if state else (0, 0)
    return _prepared(config.path, config.signal, config.counts_per_electron, version)


@functools.lru_cache(maxsize=4)
def _prepared(path: str | None, signal: int | None, counts_per_electron: float, version: tuple[int, int]) -> Replay:
    cube = example_cube() if path is None else read_cube(path, signal)
    spectra, image, share = cube.spectra, cube.haadf, 1.0
    if image is None:
        rng = np.random.default_rng(int(cube.sha256[:16], 16))
        electrons = np.round(spectra / counts_per_electron).astype(np.int64)
        half = rng.binomial(electrons, 0.5)
        image, share = half.sum(2) * counts_per_electron, 0.5
        left = (electrons - half) * counts_per_electron
        spectra = left.astype(spectra.dtype if counts_per_electron == 1.0 else np.float64)
    flat = spectra.reshape(-1, spectra.shape[2])
    return Replay(cube, torch.from_numpy(np.asarray(image, dtype=np.float32)), flat, factorise(cube), share)
