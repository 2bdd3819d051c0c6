"""Everything that executes instructions. `make(kind, …)` finds an instrument by its file name.

An instrument is one module here, in `adapters/`, or in another distribution (entry-point group `stem_gym.instruments`),
with a function `make(settings, rows, device) -> Instrument`. `settings` is the `instrument` section of the variant.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stem_gym.core.errors import unknown_name

if TYPE_CHECKING:  # a list of instruments needs no torch
    import torch

    from stem_gym.core.instrument import Instrument

_NOT_KINDS = {"adapters", "simulation", "column", "recorder", "guard", "refereed"}  # no instruments by themselves


def instrument_modules() -> dict[str, str]:
    """Kind → module of every instrument that can be made by name."""
    folder = Path(__file__).parent
    found = {
        module.name: f"{__name__}{prefix}.{module.name}"
        for path, prefix in ((folder, ""), (folder / "adapters", ".adapters"))
        for module in pkgutil.iter_modules([str(path)])
        if module.name not in _NOT_KINDS
    }
    found.update({point.name: point.value for point in entry_points(group="stem_gym.instruments")})
    return found


def make(kind: str, settings: Mapping[str, Any], rows: int, device: torch.device) -> Instrument:
    """The instrument of this kind. Raises UnknownNameError, and ConfigError for settings that it does not take."""
    known = instrument_modules()
    if kind not in known:
        raise unknown_name("instrument", kind, known)
    module = importlib.import_module(known[kind])
    if not hasattr(module, "make"):
        raise unknown_name("instrument", kind, [name for name in known if name != kind])
    instrument: Instrument = module.make(settings, rows, device)
    return instrument
