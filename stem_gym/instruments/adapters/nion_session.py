"""Nion Swift without a window: the scan and camera threads of the instrumentation kit, started and torn down in order.

Everything of Nion's is imported inside the functions, so that this file can be read without the extra installed.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from stem_gym.core.errors import InstrumentError, missing_extra

_one_session = threading.Lock()  # Nion's registry is global: one instrument in a process


class NionConfiguration(Protocol):
    """The devices that a session registers: Nion's own simulator or our specimen behind the same threads."""

    instrument: Any  # a stem_controller.STEMController
    scan_device_id: str
    camera_device_id: str | None

    def run(self) -> None:
        """Register the instrument, its cameras and its scan module."""

    def stop(self) -> None:
        """Unregister them, which ends their threads."""


def require_nion() -> None:
    """Raise MissingExtraError, naming the extra, where Nion Swift is not installed."""
    try:
        import nion.device_kit
        import nion.instrumentation
        import nion.usim_device  # noqa: F401
    except ImportError as error:
        raise missing_extra("The Nion Swift instrument", "nion") from error


class UsimConfiguration:
    """Nion's own simulated microscope ("uSim"), with specimen `sample_index` of its three."""

    scan_device_id = "usim_scan_device"

    def __init__(self, sample_index: int = 0) -> None:
        from nion.usim_device import DeviceConfiguration

        # The default of set_configuration_location would delete ./test_data.
        self._context = DeviceConfiguration.AcquisitionContextConfiguration(
            sample_index=sample_index, set_configuration_location=False
        )
        self.instrument = self._context.instrument
        self.camera_device_id: str | None = self._context.eels_camera_device_id

    def run(self) -> None:
        self._context.run()

    def stop(self) -> None:
        self._context.stop()


class NionSession:
    """A running, headless Nion Swift: `stem` (controls, probe), `scan` and `camera` (hardware sources).

    `configure` makes the devices; it is called after the listeners run and inside the session's own start-up thread.
    Raises InstrumentError where this process already has a session, MissingExtraError without the extra.
    """

    def __init__(self, configure: Any) -> None:
        require_nion()
        if not _one_session.acquire(blocking=False):
            raise InstrumentError(
                "Nion Swift allows one instrument in a process, and one is open. Close it, or start another process."
            )
        self._folder = tempfile.TemporaryDirectory(prefix="stem_gym_nion_")
        self._loop = asyncio.new_event_loop()
        self._undo: list[Any] = []
        self._closed = False
        try:
            # Nion asks the starting thread for its event loop: a thread of our own keeps the caller's loop as it was.
            with ThreadPoolExecutor(1) as starter:
                starter.submit(self._start, configure).result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Tear everything down in the reverse order of its start; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            while self._undo:
                self._undo.pop()()
        finally:
            self._loop.close()
            self._folder.cleanup()
            _one_session.release()

    def _start(self, configure: Any) -> None:
        from nion.instrumentation import DriftTracker, HardwareSource, camera_base, scan_base, stem_controller

        asyncio.set_event_loop(self._loop)
        folder = Path(self._folder.name)
        manager = HardwareSource.HardwareSourceManager()
        self._undo.append(manager.close)
        for run, stop in (
            (HardwareSource.run, HardwareSource.stop),
            (DriftTracker.run, DriftTracker.stop),
            (lambda: camera_base.run(folder), camera_base.stop),
            (lambda: scan_base.run(folder), scan_base.stop),
        ):
            run()
            self._undo.append(stop)
        stem_controller.register_event_loop(self._loop)
        self._undo.append(stem_controller.unregister_event_loop)
        configuration: NionConfiguration = configure()
        self._undo.append(configuration.stop)
        configuration.run()
        self.stem = configuration.instrument
        self.scan = manager.get_hardware_source_for_hardware_source_id(configuration.scan_device_id)
        self.camera = None
        if configuration.camera_device_id is not None:
            self.camera = manager.get_hardware_source_for_hardware_source_id(configuration.camera_device_id)
