"""A spectrum image that nobody measured, for trying out what is meant for measured ones: made, always the same."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch

from stem_gym.core.streams import Streams
from stem_gym.core.units import ELECTRONS_PER_PC
from stem_gym.datasets.cubes import SpectrumCube
from stem_gym.simulator.phase_specimens import PhasesRecipe

SHAPE = (40, 48)
_SEED = 7
_CURRENT_PA, _EXPOSURE_S, _FRAME_DWELL_S = 100.0, 0.05, 1e-4
_SPIKES = ((9, 31, 70), (27, 5, 12))  # row, column, channel
_SPIKE_COUNTS = 20_000
_DEAD = (18, 40)


@functools.cache
def example_cube() -> SpectrumCube:
    """Core losses of an oxide film (recipe "phases"), with counting noise, two X-ray spikes and a dead cell."""
    recipe, streams, rows = PhasesRecipe(), Streams([_SEED]), torch.zeros(1, dtype=torch.int64)
    streams.next_episode(rows)
    specimen = recipe.build(streams, rows, SHAPE)
    expected = (specimen.loadings @ specimen.components)[0] * (_CURRENT_PA * _EXPOSURE_S * ELECTRONS_PER_PC)
    counts = streams.poisson(rows, expected.clamp(min=0.0).unsqueeze(0))[0]
    image = streams.poisson(rows, specimen.image * (_CURRENT_PA * _FRAME_DWELL_S * ELECTRONS_PER_PC))[0]
    spectra = counts.reshape(*SHAPE, -1).numpy().astype(np.int32)
    for spike in _SPIKES:
        spectra[spike] += _SPIKE_COUNTS
    spectra[_DEAD] = 0
    return SpectrumCube(
        spectra=spectra,
        energy_ev=recipe.axis().double().numpy(),
        haadf=image.numpy(),
        pixel_nm=recipe.fov_nm / SHAPE[1],
        exposure_s=_EXPOSURE_S,
        current_pa=_CURRENT_PA,
        title="Made-up core-loss map of an oxide film of several phases",
        licence="MIT",
        sha256=hashlib.sha256(spectra.tobytes()).hexdigest(),
        whole_counts=True,
    )
