"""Nion Swift without a window: the scan and camera threads of the instrumentation kit, started and torn down in order.

Everything of Nion's is imported inside the functions, so that this file can be read without the extra installed.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from stem_gym.core.errors import InstrumentError, missing_extra

_one_session = threading.Lock()  # Nion's registry is global: one instrument in a process


class Devices(Protocol):
    """What a session registers: Nion's own simulated devices, or our specimen behind devices of the same kit."""

    instrument: Any  # a stem_controller.STEMController
    scan_device_id: str
    camera_device_id: str | None

    def run(self) -> None:
        """Register the instrument, its cameras and its scan module."""

    def stop(self) -> None:
        """Unregister them, which ends their threads."""

    def take_fault(self) -> BaseException | None:
        """What went wrong in a device's own thread since the last call; Nion Swift itself would only print it."""


def require_nion() -> None:
    """Raise MissingExtraError, naming the extra, where Nion Swift is not installed."""
    try:
        import nion.device_kit
        import nion.instrumentation
        import nion.usim_device  # noqa: F401
    except ImportError as error:
        raise missing_extra("The Nion Swift instrument", "nion") from error


class UsimDevices:
    """Nion's own simulated microscope ("uSim") with specimen `sample_index` of its three."""

    scan_device_id = "usim_scan_device"

    def __init__(self, sample_index: int = 0) -> None:
        from nion.usim_device import DeviceConfiguration

        # Left at its default, set_configuration_location deletes ./test_data.
        self._context = DeviceConfiguration.AcquisitionContextConfiguration(
            sample_index=sample_index, set_configuration_location=False
        )
        self.instrument = self._context.instrument
        self.camera_device_id: str | None = self._context.eels_camera_device_id

    def run(self) -> None:
        self._context.run()

    def stop(self) -> None:
        self._context.stop()

    def take_fault(self) -> BaseException | None:
        return None


class NionSession:
    """A running, headless Nion Swift: `devices`, `stem` (controls, probe), `scan` and `camera` (hardware sources).

    `make_devices` is called once Nion's listeners run. Raises InstrumentError where this process already has a session,
    MissingExtraError without the extra.
    """

    def __init__(self, make_devices: Callable[[], Devices]) -> None:
        require_nion()
        if not _one_session.acquire(blocking=False):
            raise InstrumentError(
                "Nion Swift allows one instrument in a process, and one is open. Close it, or start another process."
            )
        self._folder = tempfile.TemporaryDirectory(prefix="stem_gym_nion_")
        self._loop = asyncio.new_event_loop()
        self._undo: list[Callable[[], object]] = []
        self._closed = False
        try:
            _in_own_thread(lambda: self._start(make_devices))
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

    def _start(self, make_devices: Callable[[], Devices]) -> None:
        from nion.instrumentation import DriftTracker, HardwareSource, camera_base, scan_base, stem_controller

        asyncio.set_event_loop(self._loop)
        folder = Path(self._folder.name)
        manager = HardwareSource.HardwareSourceManager()
        self._undo.append(manager.close)
        self._enter(HardwareSource.run, HardwareSource.stop)
        self._enter(DriftTracker.run, DriftTracker.stop)
        self._enter(lambda: camera_base.run(folder), camera_base.stop)
        self._enter(lambda: scan_base.run(folder), scan_base.stop)
        self._enter(
            lambda: stem_controller.register_event_loop(self._loop), lambda: stem_controller.unregister_event_loop()
        )
        self.devices = make_devices()
        self._enter(self.devices.run, self.devices.stop)
        self.stem = self.devices.instrument
        self.scan = manager.get_hardware_source_for_hardware_source_id(self.devices.scan_device_id)
        camera_id = self.devices.camera_device_id
        self.camera: Any = manager.get_hardware_source_for_hardware_source_id(camera_id) if camera_id else None

    def _enter(self, start: Callable[[], object], stop: Callable[[], object]) -> None:
        start()
        self._undo.append(stop)


def _in_own_thread(start: Callable[[], None]) -> None:
    """Run `start` to its end in a thread of its own, and raise what it raises.

    Nion asks the starting thread for its event loop, and the caller's is to stay as it is. The thread is a daemon, so
    that Nion's camera threads become daemons too: otherwise a program that fails before `close` would never end.
    """
    done: Future[None] = Future()

    def run() -> None:
        try:
            start()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="nion-start", daemon=True).start()
    done.result()
