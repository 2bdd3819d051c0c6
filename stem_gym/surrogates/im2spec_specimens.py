"""The specimens that the spectrum surrogate is trained and judged on: every recipe of spectra, in a few sizes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stem_gym.core.streams import Streams, row_seeds
from stem_gym.simulator.flake_specimens import FlakesRecipe
from stem_gym.simulator.particle_specimens import ParticlesRecipe
from stem_gym.simulator.phase_specimens import PhasesRecipe
from stem_gym.simulator.phase_spectra import Eds
from stem_gym.simulator.spectral_specimen import SpectralSpecimen

__all__ = ["RECIPES", "build_specimens"]

RECIPES: Mapping[str, FlakesRecipe | ParticlesRecipe | PhasesRecipe] = {
    "particles": ParticlesRecipe(),
    "particles, larger field": ParticlesRecipe(fov_nm=200.0),
    "flakes": FlakesRecipe(),
    "phases": PhasesRecipe(),
    "phases, fine domains": PhasesRecipe(domain_nm=8.0, interface_width_nm=1.5),
    "phases, X-rays": PhasesRecipe(detector=Eds()),
}
_SHAPE = (64, 64)


def build_specimens(count: int, seed: int) -> dict[str, SpectralSpecimen]:
    """`count` specimens of every recipe, 64 × 64 cells; other seeds share none."""
    pools = {}
    for number, (name, recipe) in enumerate(RECIPES.items()):
        rows = torch.arange(count)
        streams = Streams(row_seeds(seed * len(RECIPES) + number, count))
        streams.next_episode(rows)
        pools[name] = recipe.build(streams, rows, _SHAPE, torch.device("cpu"))
    return pools
