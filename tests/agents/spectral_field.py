"""A spectrum search by hand: made-up specimens, their observations, and a face, without an environment."""

from __future__ import annotations

import gymnasium
import numpy as np
import torch

from agents.policy import Face
from stem_gym.core.config import parse
from stem_gym.core.scalarizers import NamedScalarizer
from tests.surrogates.spectral_toys import blobs

SIDE, CHANNELS, EXPOSURE_S = 32, 40, 1.0
FIRST_EV, LAST_EV = 400.0, 790.0
SCALARIZERS = [
    {"name": "low", "measure": {"kind": "band_integral", "window": {"low_ev": 450.0, "high_ev": 560.0}}},
    {"name": "high", "measure": {"kind": "band_integral", "window": {"low_ev": 600.0, "high_ev": 720.0}}},
    {"name": "strange", "measure": {"kind": "anomaly"}},
]


def face(rows: int, **task: object) -> Face:
    """What an agent may know."""
    box = gymnasium.spaces.Box
    observation = gymnasium.spaces.Dict(
        {
            "image": box(0, 255, (SIDE, SIDE), np.uint8),
            "value": box(-1e30, 1e30, (SIDE, SIDE), np.float32),
            "measured": box(0, 1, (SIDE, SIDE), np.uint8),
            "probe": box(0, 1, (2,), np.float32),
            "last_value": box(-1e30, 1e30, (1,), np.float32),
            "spectrum": box(-1e30, 1e30, (CHANNELS,), np.float32),
            "axis": box(-1e30, 1e30, (2,), np.float32),
            "scalarizer": box(0, 1, (len(SCALARIZERS),), np.float32),
            "budget": box(0, 1, (3,), np.float32),
        }
    )
    told = {
        "kind": "spectrum_search",
        "grid": [SIDE, SIDE],
        "actions": "cell",
        "exposures_s": [EXPOSURE_S],
        "detector": "eels",
        "mode": "optimise",
        "level_share": 0.5,
        "scalarizers": SCALARIZERS,
        "spectrum_channels": 128,
        "measurements": 60,
        "remeasure": True,
    }
    space = gymnasium.spaces.Discrete(SIDE * SIDE)
    return Face("stem_gym/SpectrumSearch-toy-v0", rows, observation, space, told | task)


class Field:
    """B specimens that answer measurements with Poisson counts, about 3,000 in a spectrum."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.specimens, self.rng = blobs(seed, rows, SIDE, CHANNELS), np.random.default_rng(seed)
        self.axis = torch.linspace(FIRST_EV, LAST_EV, CHANNELS)
        rate = self.specimens.loadings @ self.specimens.components
        self.rate = rate * (3000.0 / EXPOSURE_S) / rate.mean(1).sum(1)[:, None, None]  # (B, H·W, S)
        self.wanted = np.zeros(rows, np.int64)
        self.steps = 0
        self.measured = np.zeros((rows, SIDE * SIDE), np.uint8)
        self.spectra = np.zeros((rows, SIDE * SIDE, CHANNELS), np.float32)
        self.cell = np.zeros(rows, np.int64)

    def truth(self, number: int) -> torch.Tensor:
        """(B, H·W) noise-free values of a scalarizer."""
        measure = parse(NamedScalarizer, SCALARIZERS[number], "toy").measure
        return measure(self.rate, self.axis, self.rate.mean(1, keepdim=True))

    def measure(self, cell: np.ndarray) -> None:
        """One spectrum in every row, at the cells (B,)."""
        rows = np.arange(len(cell))
        self.spectra[rows, cell] = self.rng.poisson(self.rate[rows, cell].numpy() * EXPOSURE_S) / EXPOSURE_S
        self.measured[rows, cell], self.cell, self.steps = 1, cell, self.steps + 1

    def observation(self) -> dict[str, np.ndarray]:
        """What the policy sees."""
        rows = np.arange(len(self.cell))
        image = self.specimens.image / self.specimens.image.amax((1, 2), keepdim=True)
        measures = [parse(NamedScalarizer, given, "toy").measure for given in SCALARIZERS]
        spectra = torch.from_numpy(self.spectra)
        mean = spectra.sum(1, keepdim=True) / torch.from_numpy(self.measured).sum(1).clamp(min=1)[:, None, None]
        maps = torch.stack([measure(spectra, self.axis, mean) for measure in measures], 1).numpy()
        value = (maps[rows, self.wanted] * self.measured).astype(np.float32)
        some = self.measured.any(1)
        place = np.stack(((self.cell % SIDE + 0.5) / SIDE, (self.cell // SIDE + 0.5) / SIDE), 1)
        return {
            "image": (255 * image).round().numpy().astype(np.uint8),
            "value": value.reshape(-1, SIDE, SIDE),
            "measured": self.measured.reshape(-1, SIDE, SIDE).copy(),
            "probe": np.where(some[:, None], place, 0.5).astype(np.float32),
            "last_value": value[rows, self.cell][:, None],
            "spectrum": self.spectra[rows, self.cell],
            "axis": np.tile(np.array([FIRST_EV, LAST_EV], np.float32), (len(rows), 1)),
            "scalarizer": np.eye(len(SCALARIZERS), dtype=np.float32)[self.wanted],
            "budget": np.tile(np.array([1 - self.steps / 100, 1, 1], np.float32), (len(rows), 1)),
        }
