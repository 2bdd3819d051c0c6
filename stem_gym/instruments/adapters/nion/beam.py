"""The beam's gate: open inside one exposure, closed by everything that ends it: its end, an abort, a fault, a hang."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from stem_gym.core.errors import InstrumentError
from stem_gym.instruments.adapters.nion.column import NionColumn
from stem_gym.instruments.adapters.nion.meter import Meter

GRACE_S = 10.0  # how much longer than asked an exposure may take before it is called hung


class BeamGate:
    """Opens the beam for one exposure at a time. `halt` asks Nion's scan and camera threads to stop."""

    def __init__(self, column: NionColumn, meter: Meter, halt: Callable[[], None]) -> None:
        self._column, self._meter, self._halt = column, meter, halt
        self._lock = threading.Lock()  # an abort is final: after it, nothing opens the beam again
        self._exposure: threading.Event | None = None  # the running one; set when it is over
        self._waiting: int | None = None  # the thread that waits for it
        self._why = ""
        self.aborted = threading.Event()

    def begin(self) -> None:
        """A new instruction: what was aborted before is over."""
        self.aborted.clear()

    def abort(self, why: str = "Aborted") -> None:
        """Blank at once, then stop what is being exposed. From any thread."""
        with self._lock:
            self._why = why
            self.aborted.set()
            self._column.blank(True)
            exposure, itself = self._exposure, self._waiting == threading.get_ident()
        # Nion does not hear of an abort before its task runs, so it is told until the exposure is over.
        give_up = time.monotonic() + GRACE_S
        while exposure is not None and not exposure.is_set() and time.monotonic() < give_up:
            self._stop_threads()
            if itself or exposure.wait(0.01):
                return

    def check(self) -> None:
        """Raise InstrumentError where the instruction was aborted."""
        if self.aborted.is_set():
            raise InstrumentError(f"{self._why}; the beam is blanked, and what was being recorded is thrown away.")

    @contextlib.contextmanager
    def open(self, exposure_s: float) -> Iterator[None]:
        """The beam is open inside. Raises InstrumentError where the exposure was aborted or hung."""
        why = f"The exposure hung: it did not end {GRACE_S:g} s after the {exposure_s:.3g} s that were asked"
        limit = threading.Timer(exposure_s + GRACE_S, self.abort, [why])
        limit.daemon = True
        over = threading.Event()
        limit.start()
        try:
            with self._lock:
                self.check()
                self._exposure, self._waiting = over, threading.get_ident()
                self._column.blank(False)
                self._meter.beam(True)
            yield
        except BaseException:
            self._stop_threads()
            raise
        finally:
            over.set()
            limit.cancel()
            with self._lock:
                self._exposure = self._waiting = None
                self._column.blank(True)
                self._meter.beam(False)
        self.check()

    def _stop_threads(self) -> None:
        with contextlib.suppress(AssertionError):  # Nion asserts that the task has not ended this very moment
            self._halt()
