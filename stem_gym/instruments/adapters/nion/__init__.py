"""Nion Swift as an instrument: `make` gives our specimen behind its real scan threads, or its own simulated microscope.

Needs the extra `nion` (GPL-3), which is imported only when an instrument is made. One instrument in a process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field

from stem_gym.core.config import Config, merge, parse
from stem_gym.core.errors import CapabilityError
from stem_gym.core.instrument import Capabilities, Instrument, Limits
from stem_gym.instruments.adapters.nion.column import NionColumn
from stem_gym.instruments.adapters.nion.instrument import CAMERA, NionInstrument
from stem_gym.instruments.adapters.nion.session import NionSession, UsimDevices, require_nion

_VERBS = frozenset({"Scan", "Park", "Dwell", "Blank", "MoveStage", "Set", "Read", "Wait"})
_TIME = Limits(1e-6, 1000.0)
_STEP = Limits(-10_000.0, 10_000.0)
_LIMITS = {
    "Scan.fov_ang": Limits(1.0, 16_000.0),
    "Scan.dwell_s": Limits(1e-8, 1.0),
    "Scan.region": Limits(0.0, 1.0),
    "Park.x": Limits(0.0, 1.0),
    "Park.y": Limits(0.0, 1.0),
    "Dwell.time_s": _TIME,
    "Acquire.exposure_s": Limits(1e-3, 100.0),
    "Wait.time_s": Limits(0.0, 1e5),
    "MoveStage.dx_ang": _STEP,
    "MoveStage.dy_ang": _STEP,
}
_NO_OVERHEADS = {"scan_s": 0.0, "park_s": 0.0, "stage_s": 0.0, "set_s": 0.0}


class Settings(Config):
    """How Nion Swift is run; the rest of the `instrument` section describes our specimen and microscope."""

    source: Literal["twin", "usim"] = "twin"
    """`twin`: our simulated specimen behind Nion's threads; `usim`: the specimen that Nion Swift brings"""
    sample_index: int = Field(0, ge=0, le=2)
    """which of usim's specimens"""
    realtime: bool = False
    """whether an exposure of 1 s takes 1 s; if not, the twin's sample still sees 1 s of drift and dose"""
    time_scale: float = Field(0.002, gt=0, le=1)
    """seconds that the scan threads take for 1 s, where not in real time"""
    settle_s: float = Field(0.05, ge=0, le=60)
    """how long the stage has to stay where it was sent"""
    settle_limit_s: float = Field(20.0, gt=0, le=600)
    """when a stage that does not arrive is given up"""


def make(settings: Mapping[str, Any], rows: int, device: torch.device) -> Instrument:
    """An instrument of one row on a headless Nion Swift, from the `instrument` section of a variant.

    The key `nion` holds `Settings`; the others are those of the simulated microscope, which the twin shows. Raises
    CapabilityError for more than one row, MissingExtraError without the extra, ConfigError for settings it does not
    take.
    """
    section = {key: value for key, value in settings.items() if key not in ("kind", "nion")}
    how = parse(Settings, settings.get("nion", {}), "instrument.nion")
    if rows != 1:
        raise CapabilityError(f"Nion Swift has one column, so one row; given {rows}. Use num_envs=1.")
    require_nion()
    return _twin(section, how) if how.source == "twin" else _usim(how)


def _usim(how: Settings) -> NionInstrument:
    session = NionSession(lambda: UsimDevices(how.sample_index))
    column = NionColumn(session.stem, how.settle_s, how.settle_limit_s)
    detectors = frozenset({"haadf", "maadf", CAMERA})
    known = Capabilities(_VERBS | {"Acquire"}, detectors, column.settable(), column.readable(), _LIMITS, rows=1)
    return NionInstrument(session, column, known)


def _twin(section: Mapping[str, Any], how: Settings) -> NionInstrument:
    from stem_gym.instruments import simulated  # its physics is loaded only where the twin is wanted
    from stem_gym.instruments.adapters.nion.twin import TwinSample
    from stem_gym.instruments.adapters.nion.twin_devices import TwinDevices

    if how.realtime:  # Nion's threads and the wall clock bring their own
        section = merge(section, {"overheads": _NO_OVERHEADS, "detector": {"flyback_s": 0.0}})
    microscope = simulated.make(section, 1, torch.device("cpu"))
    sample = TwinSample(microscope, None if how.realtime else how.time_scale)
    session = NionSession(lambda: TwinDevices(sample))
    column = NionColumn(session.stem, how.settle_s if how.realtime else 0.0, how.settle_limit_s)
    ours = microscope.capabilities
    settable = {name: ours.settable[name] for name in column.settable()}
    limits = _LIMITS | {name: limit for name, limit in ours.limits.items() if name in _LIMITS}
    known = Capabilities(_VERBS & ours.verbs, ours.detectors, settable, column.readable(), limits, 1, simulated=True)
    return NionInstrument(session, column, known, sample, math.pi * (0.5 * microscope._probe_fwhm_ang) ** 2)
