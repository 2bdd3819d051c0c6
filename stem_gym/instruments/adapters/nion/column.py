"""The column behind Nion's control names: every set is read back, the stage is waited for, the blanker is checked.

Nion counts in metres, radians and volts, and puts y before x; the names here carry our units. Nion's defocus control
C10 is positive for overfocus, ours (`defocus_ang`) for underfocus.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stem_gym.core.errors import CapabilityError, InstrumentError, did_you_mean
from stem_gym.core.instrument import Limits

BLANKER = "C_Blank"
STAGE = "stage_position_m"
M_PER_ANG = 1e-10
_STAGE_TOLERANCE_ANG = 0.05


@dataclass(frozen=True)
class Control:
    """One of Nion's controls: ours = vendor × `scale`."""

    vendor: str
    scale: float
    limits: Limits | None  # None: can be read, never set
    tolerance: float  # of a read-back, in our unit


CONTROLS = {
    "defocus_ang": Control("C10", -1e10, Limits(-20000.0, 20000.0), 0.1),
    "current_pa": Control("BeamCurrent", 1e12, Limits(0.1, 1000.0), 0.05),
    "beam_shift_x_ang": Control("CSH.x", 1e10, Limits(-1000.0, 1000.0), 0.05),
    "beam_shift_y_ang": Control("CSH.y", 1e10, Limits(-1000.0, 1000.0), 0.05),
    "energy_kev": Control("EHT", 1e-3, None, 0.0),
    "convergence_mrad": Control("ConvergenceAngle", 1e3, None, 0.0),
    "blanked": Control(BLANKER, 1.0, None, 0.0),
    "haadf_counts_per_electron": Control("HAADF_CountsPerElectron", 1.0, None, 0.0),
    "haadf_counts_offset": Control("HAADF_CountsOffset", 1.0, None, 0.0),
}
STAGE_AXES = ("stage_x_ang", "stage_y_ang")
READABLE = frozenset(CONTROLS) | frozenset(STAGE_AXES)


class NionColumn:
    """Sets and reads the controls of a `stem_controller.STEMController`, and never takes its word for a set."""

    def __init__(self, stem: Any, settle_s: float, settle_limit_s: float) -> None:
        self._stem = stem
        self._settle_s = settle_s
        self._settle_limit_s = settle_limit_s

    def settable(self) -> dict[str, Limits]:
        """The allow-listed controls that this column has, with their limits."""
        return {
            name: control.limits
            for name, control in CONTROLS.items()
            if control.limits is not None and self._stem.TryGetVal(control.vendor)[0]
        }

    def readable(self) -> frozenset[str]:
        """The names that this column answers."""
        there = {name for name, control in CONTROLS.items() if self._stem.TryGetVal(control.vendor)[0]}
        return frozenset(there) | frozenset(STAGE_AXES)

    def read(self, name: str) -> float:
        """The value of a control in our unit. Raises CapabilityError where the column has no such control."""
        if name in STAGE_AXES:
            return self._stage_ang()[STAGE_AXES.index(name)]
        control = _known(name)
        found, value = self._stem.TryGetVal(control.vendor)
        if not found or value is None:
            raise CapabilityError(f"Nion Swift has no control {control.vendor!r} ({name}) on this instrument.")
        return float(value) * control.scale

    def read_or(self, name: str, default: float) -> float:
        """The value of a control, or `default` where the column has no such control."""
        found, value = self._stem.TryGetVal(_known(name).vendor)
        return default if not found or value is None else float(value) * _known(name).scale

    def set(self, name: str, value: float) -> None:
        """Set a control and read it back.

        Raises CapabilityError for a control that may not be set or is not there (Nion answers False, silently), and
        InstrumentError where the read-back differs by more than the control's tolerance.
        """
        control = _known(name)
        if control.limits is None:
            raise CapabilityError(f"{name} can be read but never set.")
        if not self._stem.SetVal(control.vendor, value / control.scale):
            raise CapabilityError(f"Nion Swift did not take {control.vendor!r} ({name}); it may not be there.")
        found = self.read(name)
        if not math.isclose(found, value, rel_tol=1e-6, abs_tol=control.tolerance):
            raise InstrumentError(f"{name} was set to {value:g} but reads {found:g}; the column did not follow.")

    def blank(self, on: bool) -> None:
        """Blank or unblank the beam. Raises InstrumentError where the blanker's read-back disagrees."""
        taken = self._stem.SetVal(BLANKER, 1.0 if on else 0.0)
        if not taken or (self._stem.GetVal(BLANKER) != 0.0) != on:
            raise InstrumentError(f"The blanker did not {'close' if on else 'open'}: its read-back says otherwise.")

    def move_stage(self, dx_ang: float, dy_ang: float) -> None:
        """Move so that the sample moves by (dx, dy) in the frame; returns when the stage has settled.

        Nion's own `change_stage_position` has the opposite sign and does not wait. Raises InstrumentError where the
        stage does not arrive.
        """
        from nion.utils import Geometry

        x, y = self._stage_ang()
        wanted = (x + dx_ang, y + dy_ang)
        point = Geometry.FloatPoint(y=wanted[1] * M_PER_ANG, x=wanted[0] * M_PER_ANG)
        if not self._stem.SetVal2D(STAGE, point):
            raise CapabilityError(f"Nion Swift has no control {STAGE!r} on this instrument.")
        self._wait_settled(lambda: math.dist(self._stage_ang(), wanted) <= _STAGE_TOLERANCE_ANG, wanted)

    def _wait_settled(self, arrived: Callable[[], bool], wanted: tuple[float, float]) -> None:
        """Return once `arrived` has held for the settling time."""
        give_up = time.monotonic() + self._settle_limit_s
        since: float | None = None
        while True:
            now = time.monotonic()
            since = (since if since is not None else now) if arrived() else None
            if since is not None and now - since >= self._settle_s:
                return
            if now > give_up:
                x, y = self._stage_ang()
                raise InstrumentError(
                    f"The stage was sent to ({wanted[0]:.2f}, {wanted[1]:.2f}) Å and is at ({x:.2f}, {y:.2f}) Å "
                    f"after {self._settle_limit_s:g} s."
                )
            time.sleep(0.005)

    def _stage_ang(self) -> tuple[float, float]:
        point = self._stem.GetVal2D(STAGE)
        return float(point.x) / M_PER_ANG, float(point.y) / M_PER_ANG


def _known(name: str) -> Control:
    if name not in CONTROLS:
        raise CapabilityError(f"No control {name!r} is known here. {did_you_mean(name, READABLE)}")
    return CONTROLS[name]
