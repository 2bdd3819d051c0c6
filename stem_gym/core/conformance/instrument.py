"""`check_instrument`: what must hold for every instrument, one's own or a third party's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stem_gym.core.batch import every_row
from stem_gym.core.conformance.examples import Examples, tensor_fields
from stem_gym.core.errors import ConformanceError, StemGymError
from stem_gym.core.instructions import ATOMS, VERBS, Acquire, Dwell, Instruction, Read, Reading, Scan, Set, Wait, verb
from stem_gym.core.instrument import Instrument, Limits
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.core.wire import instruction_from_json, instruction_to_json, reading_from_json, reading_to_json

_WITHOUT_BEAM = {"Park", "MoveStage", "Set", "Blank", "Wait", "Read"}
_ORDER = ("Scan", "Park", "Dwell", "Acquire", "Map", "Pulse", "MoveStage", "Set", "Blank", "Wait", "Read")
_READ_BACK = 1e-3  # relative; a control is read back as it was set to a part in a thousand
_DATA = {"Dwell": "trace", "Park": "place", "Read": "value"}
_CALIBRATION = {"Scan": "electrons_per_pixel", "Dwell": "electrons_per_sample"}


def check_instrument(
    instrument: Instrument,
    streams: Streams | None = None,
    options: Mapping[str, Any] | None = None,
    frame_shape: tuple[int, int] = (16, 16),
) -> None:
    """Run every verb of an instrument once, refuse what must be refused, and close it.

    The rules: capabilities that are well formed; a reading with the right rows, shapes and ledger for every verb that
    it claims; no effect of an instruction that it refuses, nor on rows that are not named; JSON there and back; the
    same streams give the same answers where it is simulated, also for a list that is known to be all rows; a beam that
    is blanked after an abort; closing twice.
    What it does is small (a frame of `frame_shape`, dwells of 20 ms, a stage move of 1 Å; a real instrument's controls
    are set to the values that they have). `options` go to its reset. Raises ConformanceError for the first rule broken.
    """
    streams = streams or Streams(row_seeds(0, instrument.rows), instrument.device)
    check = _Check(instrument, streams, options, frame_shape)
    check.capabilities()
    check.reset()
    check.verbs()
    check.refusals()
    if instrument.capabilities.simulated:
        check.rows_apart()
        check.repeats()
        check.known_rows()
    check.abort_and_close()


class _Check:
    """The instrument under test, with examples of its instructions."""

    def __init__(
        self, instrument: Instrument, streams: Streams, options: Mapping[str, Any] | None, shape: tuple[int, int]
    ) -> None:
        self.instrument, self.has = instrument, instrument.capabilities
        self.streams, self.options = streams, options
        self.examples = Examples(self.has, shape)
        self.all = torch.arange(instrument.rows, device=instrument.device)
        self.claimed = [name for name in _ORDER if name in self.has.verbs]

    def capabilities(self) -> None:
        """Verbs, detectors, controls and limits are what they should be."""
        has, rows = self.has, self.instrument.rows
        _need(
            has.verbs and has.verbs <= VERBS.keys(),
            "Capabilities.verbs are verbs",
            str(sorted(has.verbs)),
            f"some of {list(VERBS)}",
        )
        _need(
            isinstance(rows, int) and rows >= 1 and (has.rows is None or rows <= has.rows),
            "An instrument has at least one row and no more than its capabilities say",
            f"rows = {rows}, at most {has.rows}",
            "1 ≤ rows ≤ capabilities.rows",
        )
        for key, limits in {**has.limits, **has.settable}.items():
            _need(
                isinstance(limits, Limits) and limits.low <= limits.high,
                f"The limits of {key} are two ordered numbers",
                str(limits),
                "Limits(low, high) with low ≤ high",
            )
        for key in has.limits:
            name, _, field = key.partition(".")
            _need(
                name in VERBS and field in tensor_fields(name),
                "Capabilities.limits are named verb.field",
                key,
                "a field of an instruction, such as 'Dwell.time_s'",
            )
        _need(
            has.axes.keys() <= has.detectors
            and all(axis.dim() == 1 or axis.shape[1:] == (2,) for axis in has.axes.values()),
            "Capabilities.axes are channels of detectors",
            str({key: tuple(axis.shape) for key, axis in has.axes.items()}),
            f"(C,) eV or (C, 2) mrad for some of {sorted(has.detectors)}",
        )
        _need(("Set" in has.verbs) == bool(has.settable), "Set goes with controls", str(dict(has.settable)), "both")

    def reset(self) -> None:
        """All rows start; a simulator then has a truth for each of them, anything else has none."""
        self.streams.next_episode(self.all)
        self.instrument.reset(self.streams, self.all, self.options)
        truth = self.instrument.truth()
        _need(
            bool(truth) == self.has.simulated,
            "truth() is for simulators alone",
            f"simulated = {self.has.simulated}, truth has {sorted(truth)}",
            "truth() == {} unless capabilities.simulated",
        )
        for key, value in truth.items():
            _need(
                len(value) == self.instrument.rows,
                "truth() has an entry for each row",
                f"{key} of shape {tuple(value.shape)}",
                f"({self.instrument.rows}, …)",
            )

    def verbs(self) -> None:
        """Every verb that is claimed answers as it should."""
        for name in self.claimed:
            if name == "Set":
                for control in sorted(self.has.settable):
                    self._set_and_read(control)
            elif name == "Acquire":
                for detector in self.examples.spectrometers:
                    _check_channels(
                        self._answer(self.examples.acquire(self.all, detector)), self.has.axes.get(detector)
                    )
            elif name == "Read":
                for control in sorted(self.has.readable | self.has.settable.keys()):
                    self._answer(Read(self.all, control))
            else:
                self._answer(self.examples.of(name, self.all))

    def refusals(self) -> None:
        """What can not be done is refused with the right error, and nothing has happened."""
        for name in VERBS:
            for case in self.examples.refusals(name, self.all, self.instrument.rows):
                before = self._fingerprint()
                what = f"{name} must be refused: {case.why}"
                try:
                    reading = self.instrument.execute(case.instruction)
                except case.error:
                    pass
                except Exception as error:
                    raise ConformanceError(what, f"{type(error).__name__}: {error}", case.error.__name__) from error
                else:
                    raise ConformanceError(what, f"it answered {reading.verb}", case.error.__name__)
                _same(self._fingerprint(), before, f"A refused {name} ({case.why}) changes nothing")

    def rows_apart(self) -> None:
        """Rows that an instruction or a reset does not name stay as they are."""
        if self.instrument.rows < 2:
            return
        first = self.all[:1]
        for name in self.claimed:
            before = self._others()
            self.instrument.execute(self.examples.of(name, first))
            _same(self._others(), before, f"{name} on row 0 leaves the other rows alone")
        before = self._others()
        self.streams.next_episode(first)
        self.instrument.reset(self.streams, first, self.options)
        _same(self._others(), before, "A reset of row 0 leaves the other rows alone")

    def repeats(self) -> None:
        """The same streams give the same readings, whatever the other rows do in between."""
        runs = []
        start = self.streams.snapshot()
        for busy in (False, True):
            self.streams.restore(start)
            self.instrument.reset(self.streams, self.all, self.options)
            last = self.all[-1:]
            answers: dict[str, Tensor] = {}
            for name in self.claimed:
                if busy and self.instrument.rows > 1:
                    self.instrument.execute(self.examples.of(name, self.all[:-1]))
                answers |= _tensors(self.instrument.execute(self.examples.of(name, last)), name)
            runs.append(answers)
        _same(runs[1], runs[0], "The same streams give the same readings, whatever other rows do")

    def known_rows(self) -> None:
        """A list that is known to be all rows does what the same rows listed do, and no reading changes afterwards."""
        start, runs = self.streams.snapshot(), []
        for rows in (self.all, every_row(self.instrument.rows, self.instrument.device)):
            self.streams.restore(start)
            self.instrument.reset(self.streams, rows, self.options)
            readings = [self.instrument.execute(self.examples.of(name, rows)) for name in self.claimed]
            given = {key: value for reading in readings for key, value in _tensors(reading, reading.verb).items()}
            kept = {key: value.clone() for key, value in given.items()}
            for name in self.claimed:
                self.instrument.execute(self.examples.of(name, rows))
            _same(given, kept, "A reading stays as it was given")
            runs.append(kept | self._fingerprint())
        _same(runs[1], runs[0], "A list that is known to be all rows does what the same rows listed do")

    def abort_and_close(self) -> None:
        """Safe after an abort, usable after the next reset, closed as often as one likes."""
        self.instrument.abort()
        self.instrument.abort()
        if "Read" in self.has.verbs and "blanked" in self.has.readable:
            blanked = self.instrument.execute(Read(self.all, "blanked")).data["value"]
            _need(
                bool((blanked > 0.5).all()),
                "An abort blanks the beam",
                f"blanked = {blanked.tolist()}",
                "1 in each row",
            )
        self.streams.next_episode(self.all)
        self.instrument.reset(self.streams, self.all, self.options)
        self._answer(self.examples.of(self.claimed[0], self.all))
        self.instrument.close()
        self.instrument.close()

    def _answer(self, instruction: Instruction) -> Reading:
        """Execute, and check the reading and its way through JSON."""
        name = verb(instruction)
        copy = instruction_from_json(json.loads(json.dumps(instruction_to_json(instruction))), self.instrument.device)
        try:
            reading = self.instrument.execute(copy)
        except StemGymError as error:
            raise ConformanceError(
                f"{name} is claimed and within the limits", f"{type(error).__name__}: {error}", "a Reading"
            ) from error
        _check_reading(instruction, reading)
        arrays: dict[str, np.ndarray] = {}
        message = json.loads(json.dumps(reading_to_json(reading, arrays)))
        again = reading_from_json(message, arrays, self.instrument.device)
        _same(_tensors(again, name), _tensors(reading, name), f"The reading of {name} comes back from JSON as it was")
        return reading

    def _set_and_read(self, control: str) -> None:
        limits = self.has.settable[control]
        readable = "Read" in self.has.verbs
        value = None
        if readable:
            value = float(self._answer(Read(self.all, control)).data["value"][0])
            if self.has.simulated:
                value = value + 0.01 * (limits.high - limits.low)
                value = value if value <= limits.high else limits.low
                value = limits.values[-1] if limits.values else value
        elif not self.has.simulated:
            return  # nothing is known about where a real control stands
        setting: Set = self.examples.set(self.all, control, value)
        self._answer(setting)
        if readable:
            back, asked = self._answer(Read(self.all, control)).data["value"], setting.value
            _need(
                torch.allclose(back.double(), asked.double(), rtol=_READ_BACK, atol=_READ_BACK),
                f"The control {control} reads back as it was set",
                f"{back.tolist()[:4]} after Set to {asked.tolist()[:4]}",
                f"the same to {_READ_BACK:g}",
            )

    def _fingerprint(self) -> dict[str, Tensor]:
        """What can be known of the instrument without disturbing it."""
        known = {f"truth {key}": value.clone() for key, value in self.instrument.truth().items()}
        if "Read" in self.has.verbs:
            names = self.has.settable.keys() | (self.has.readable if self.has.simulated else set())
            for control in sorted(names):
                known[control] = self.instrument.execute(Read(self.all, control)).data["value"].clone()
        return known

    def _others(self) -> dict[str, Tensor]:
        return {key: value[1:] for key, value in self._fingerprint().items()}


def _check_reading(instruction: Instruction, reading: Reading) -> None:
    """The rules of a single reading."""
    name, n = verb(instruction), len(instruction.rows)
    _need(reading.verb == name, "A reading names its verb", reading.verb, name)
    _need(
        torch.equal(reading.rows, instruction.rows),
        f"The reading of {name} is for the rows that were asked",
        str(reading.rows.tolist()[:8]),
        str(instruction.rows.tolist()[:8]),
    )
    for key in ("seconds", "electrons", "electrons_per_ang2"):
        value = getattr(reading, key)
        good = tuple(value.shape) == (n,) and bool(torch.isfinite(value).all() and (value >= 0).all())
        _need(good, f"The ledger {key} of {name}", f"{value.tolist()}"[:80], f"({n},), finite and not negative")
    for part in (reading.data, reading.calibration):
        for key, value in part.items():
            _need(len(value) == n, f"{key} of {name} has its rows first", str(tuple(value.shape)), f"({n}, …)")
    if name in _WITHOUT_BEAM:
        spent = reading.electrons
        _need(not bool(spent.any()), f"{name} delivers no electrons", str(spent.tolist()[:4]), "0")
    _check_data(instruction, reading)


def _check_channels(reading: Reading, axis: Tensor | None) -> None:
    """A detector whose channels are told answers as many numbers, at a place, with what makes a rate of them."""
    if axis is None:
        return
    n, channels = len(reading.rows), len(axis)
    key = "spectrum" if axis.dim() == 1 else "pattern"
    side = math.isqrt(channels)
    right = {key: (n, channels) if axis.dim() == 1 else (n, side, side), "place": (n, 2)}
    seen = {name: tuple(reading.data[name].shape) for name in right if name in reading.data}
    _need(seen == right, "Acquire answers as many numbers as its detector has channels", str(seen), str(right))
    for name in ("exposure_s", "counts_per_electron", "counts_offset"):
        value = reading.calibration.get(name)
        good = value is not None and tuple(value.shape) == (n,) and bool(torch.isfinite(value).all())
        _need(good, f"Acquire is calibrated by {name}", str(sorted(reading.calibration)), f"({n},), finite")
    _need(bool((reading.electrons > 0).all()), "Acquire delivers electrons", "0", "more than 0")


def _check_data(instruction: Instruction, reading: Reading) -> None:
    name, n = verb(instruction), len(instruction.rows)
    if name in _DATA:
        _need(_DATA[name] in reading.data, f"{name} answers {_DATA[name]}", str(sorted(reading.data)), _DATA[name])
    if name in ("Acquire", "Map"):
        _need(bool(reading.data), f"{name} answers data", "none", "a spectrum, a pattern or a block of them")
    shapes: dict[str, tuple[int, ...]] = {}
    at_least = torch.zeros(n)
    if isinstance(instruction, Scan):
        pictures = [channel for channel in instruction.channels if channel != ATOMS]
        if pictures:
            shapes["images"] = (n, len(pictures), *instruction.shape)
        if len(pictures) < len(instruction.channels):
            shapes[ATOMS] = (n, reading.data[ATOMS].shape[1] if ATOMS in reading.data else 0, 2)
        at_least = instruction.dwell_s.cpu() * (instruction.shape[0] * instruction.shape[1])
    elif isinstance(instruction, Dwell):
        shapes |= {"trace": (n, instruction.trace), "place": (n, 2)} if instruction.trace else {"place": (n, 2)}
        at_least = instruction.time_s.cpu()
    elif isinstance(instruction, Acquire):
        at_least = instruction.exposure_s.cpu()
    elif isinstance(instruction, Wait):
        at_least = instruction.time_s.cpu()
    elif name in ("Park", "Read"):
        shapes[_DATA[name]] = (n, 2) if name == "Park" else (n,)
    elif isinstance(instruction, Set):
        shapes[instruction.name] = (n,)
    for key, shape in shapes.items():
        seen = tuple(reading.data[key].shape) if key in reading.data else None
        _need(seen == shape, f"{key} of {name}", f"shape {seen}", str(shape))
    took = reading.seconds.cpu()
    enough = bool((took >= at_least * (1.0 - _READ_BACK)).all())
    _need(
        enough,
        f"{name} takes the time it was asked for",
        f"{took.tolist()[:4]} s",
        f"{at_least.tolist()[:4]} s or more",
    )
    if name in _CALIBRATION:
        for key in (_CALIBRATION[name], "counts_per_electron", "counts_offset"):
            value = reading.calibration.get(key)
            good = value is not None and bool(torch.isfinite(value).all())
            _need(good, f"{name} is calibrated by {key}", str(sorted(reading.calibration)), f"({n},), finite")
        _need(bool((reading.electrons > 0).all()), f"{name} delivers electrons", "0", "more than 0")


def _tensors(reading: Reading, name: str) -> dict[str, Tensor]:
    """Every tensor of a reading, by name."""
    ledger = {key: getattr(reading, key) for key in ("rows", "seconds", "electrons", "electrons_per_ang2")}
    parts = {**ledger, **reading.data, **{f"calibration {key}": value for key, value in reading.calibration.items()}}
    return {f"{name} {key}": value for key, value in parts.items()}


def _same(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], rule: str) -> None:
    for key in sorted(expected.keys() | given.keys()):
        one, other = given.get(key), expected.get(key)
        alike = one is not None and other is not None and one.shape == other.shape
        if not alike or not torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True):  # type: ignore[arg-type]
            raise ConformanceError(rule, f"{key} is {_short(one)}, was {_short(other)}", "no difference")


def _short(value: Tensor | None) -> str:
    return "absent" if value is None else f"{value.flatten()[:6].tolist()} of shape {tuple(value.shape)}"


def _need(good: Any, rule: str, seen: str, right: str) -> None:
    if not good:
        raise ConformanceError(rule, seen, right)
