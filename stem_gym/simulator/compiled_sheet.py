"""A doped sheet under the beam in machine code: what `kinetics`, `drift`, `finder` and `detectors` say, row after row.

Those modules are the reference, and what runs on a GPU. Here one row is worked on at a time, with the same draws of its
stream in the same order, in double precision: the same events, and numbers that agree to their rounding. For clean
sheets; contamination is the reference's alone, and so is what a picture shows.

This file is longer than 400 lines because numba's cache does not see that a function of another file has changed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from stem_gym.core.compiled import compiled_exactly as compiled
from stem_gym.core.compiled import inlined
from stem_gym.core.streams import ERFINV_CENTRE, ERFINV_TAIL
from stem_gym.core.units import ANG2_PER_BARN, ELECTRONS_PER_PC
from stem_gym.simulator.flux import REACH_ANG, STEP_ANG

__all__ = [
    "CROSS_SECTION",
    "LORENTZIAN",
    "MAP",
    "Dwells",
    "Frames",
    "Fresh",
    "Physics",
    "Room",
    "Rows",
    "begin",
    "dwell",
    "frame",
    "lay",
    "pass_time",
    "room",
]

CROSS_SECTION, MAP, LORENTZIAN = range(3)  # laws of the jumps
_CARBON, _SILICON = 6, 14
_EXCHANGE, _EJECTION, _ROTATION, _REVERSAL, _REPLACEMENT, _KNOCK_OUT, _HEALING, _CAPTURE = range(8)
_NOTHING, _REFUSED = -1, -2
_BESIDE = 5
_FRAME_PASSES = 64
_BOND, _GAIN, _FREE, _EXCESS, _NEAR = 2, 8, 11, 14, 15  # columns of `Room.near`, after the place
_F = np.float32
_CENTRE, _TAIL = np.array(ERFINV_CENTRE, _F), np.array(ERFINV_TAIL, _F)
_TAYLOR = np.array([1.0 / n for n in (5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0)], _F)
_INVERSE = np.array([0.0] + [1.0 / k for k in range(1, 33)], _F)


class Rows(NamedTuple):
    """The buffers of B rows, changed in place; shapes as in `sheet.Sheet` and `instruments.sheet_rows.SheetRows`."""

    address: ndarray  # (B, 4) of the streams
    cell_ang: ndarray
    xy_ang: ndarray
    neighbours: ndarray
    atomic_number: ndarray
    present: ndarray
    dopant: ndarray
    there: ndarray
    raised: ndarray
    rotated: ndarray
    vacancy: ndarray
    open: ndarray
    law: ndarray
    barn: ndarray
    energy: ndarray
    jumps: ndarray
    lost: ndarray
    edged: ndarray
    dopant_ang: ndarray
    bond_ang: ndarray
    near_number: ndarray
    near_barn: ndarray
    allowed: ndarray
    position_ang: ndarray
    velocity_ang_per_s: ndarray
    creep_ang: ndarray
    fov_ang: ndarray
    place: ndarray
    clock_s: ndarray
    electrons: ndarray
    seen_ang: ndarray
    defocus_ang: ndarray
    density: ndarray
    signal: ndarray
    weight_ang2: ndarray


class Physics(NamedTuple):
    """The settings of a column, as numbers."""

    away_barn: ndarray  # (E, 2) of carbon away from dopants
    silicon_barn: ndarray  # (E, 2, 5) of silicon that a vacancy catches
    ladder_ang: ndarray  # (2,) the first of F defoci, and the step to the next
    flux: ndarray  # (E F, R) density of the probe at each energy and defocus
    signal: ndarray  # (E F, R) the same, as wide as an atom scatters
    weight_ang2: ndarray  # (E, Z) collected by the detector
    law: int
    law_length: float  # current of the map in pA, or bond of the toy in Å
    bound_per_ang2: float
    healing_per_s: float
    capture_per_s: float
    atoms_per_ang2: float
    current_pa: float
    drift_sigma: float  # Å/s on each axis
    drift_tau_s: float
    diffusion_ang2_per_s: float
    settling_s: float
    gain: float
    offset: float
    read_noise: float
    saturation: float
    dark_per_s: float
    whole_counts: bool
    position_sd_ang: float
    shift_sd_ang: float
    bond_sd_ang: float
    reference_dose: float
    missed: float
    spurious: float


class Dwells(NamedTuple):
    """What dwells of n rows are to be, and space for what they give."""

    time_s: ndarray  # (n,)
    rise: float  # NaN: no such rule
    fall: float
    stops: bool
    baseline_samples: int
    window_samples: int
    counts: ndarray  # (n, J)
    told: ndarray  # (5, n) seconds, electrons, those per Å², time and electrons of a sample


class Frames(NamedTuple):
    """What frames of n rows are to be, and space for what they give."""

    fov_ang: ndarray  # (n,)
    region: ndarray  # (n, 4)
    dwell_s: ndarray  # (n,)
    height: int
    width: int
    flyback_s: float
    overhead_s: float
    places: ndarray  # (n, D, 2)
    bonds_ang: ndarray  # (n, D, 3, 2)
    shift_ang: ndarray  # (n, 2)
    knots_ang: ndarray  # (n, 5, 2) displacements of the sample
    told: ndarray  # (4, n) seconds, electrons, those per Å² and a pixel


class Fresh(NamedTuple):
    """What rows begin with: one of T orientations of K sites, and M kinds of dopant."""

    cells_ang: ndarray  # (T, 2)
    places_ang: ndarray  # (T, K, 2)
    elements: ndarray  # (T, K)
    neighbours: ndarray  # (T, K, 3)
    kinds: ndarray  # (M, 4) element, least and most, half of the window
    separation_ang: float
    numbers: ndarray  # (N,) elements whose cross sections are known
    barn: ndarray  # (N, 2, 5)
    fov_ang: float


class Room(NamedTuple):
    """Space for the numbers of the row that is worked on; `room` makes it."""

    uniform: ndarray
    normal: ndarray
    knots: ndarray  # (5, 2) displacements of the sample during an exposure
    before: ndarray  # (2, 2) velocity and creep before it
    drift: ndarray  # (3, 2) place, velocity and creep after it
    ends: ndarray  # (J + 1, 2) displacements at the ends of the samples of a dwell
    path: ndarray  # (J, 2) of the probe on the specimen, in the middle of each sample
    counts: ndarray  # (J,)
    centre: ndarray  # (2,) of a frame
    size: ndarray  # (2,)
    cell: ndarray  # (4,) sides of the sheet, and one over them
    near: ndarray  # (D, 15) what surrounds each dopant
    focus: ndarray  # (3,) rows of the tables that the defocus is between, and how far from the first
    law: ndarray  # (8,) parameters of the jumps
    flux: ndarray  # (3 D,) on each neighbour
    jump: ndarray  # (3 D,) rate towards each
    rates: ndarray  # (15 D + 3,) of all events
    rest: ndarray  # (3,) of those away from dopants: per electron and Å², and per second twice
    moment: ndarray  # (2,) part and share of it
    event: ndarray  # (4,) int64: kind, slot, neighbour, site


def room(slots: int, samples: int) -> Room:
    """Space for rows with so many slots for dopants, and for dwells of so many samples."""
    numbers = 2 * samples + 16 * slots + 32
    shapes = {"uniform": numbers, "normal": numbers, "knots": (5, 2), "before": (2, 2), "drift": (3, 2)}
    shapes |= {"ends": (samples + 1, 2), "path": (samples, 2), "counts": samples, "centre": 2, "size": 2}
    shapes |= {
        "cell": 4,
        "near": (slots, _NEAR),
        "focus": 3,
        "law": 8,
        "flux": 3 * slots,
        "jump": 3 * slots,
        "rates": 15 * slots + 3,
    }
    spaces = {name: np.zeros(shape) for name, shape in (shapes | {"rest": 3, "moment": 2}).items()}
    return Room(**spaces, event=np.zeros(4, np.int64))


# Random numbers: `core.streams`, bit for bit


@inlined
def _uniforms(address: ndarray, row: int, count: int, out: ndarray) -> None:
    """The next `count` uniforms of the stream of a row, which moves on by one draw."""
    blocks = (count + 3) // 4
    key0, key1 = np.uint64(address[row, 0]), np.uint64(address[row, 1])
    episode, draw, low = np.uint64(address[row, 2]), np.uint64(address[row, 3]), np.uint64(0xFFFFFFFF)
    for block in range(blocks):
        c0, c1, c2, c3 = np.uint64(block), draw, episode, np.uint64(0)
        k0, k1 = key0, key1
        for _ in range(10):
            p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
            c0, c1, c2, c3 = (
                (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & low, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & low
            )  # fmt: skip
            k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
        out[block] = _unit(c0)
        out[blocks + block] = _unit(c1)
        out[2 * blocks + block] = _unit(c2)
        out[3 * blocks + block] = _unit(c3)
    address[row, 3] += 1


@inlined
def _unit(word: Any) -> Any:
    return (np.int64(word >> np.uint64(9)) + 0.5) * 2.0**-23


@inlined
def _normals(uniform: ndarray, count: int, third: bool, out: ndarray) -> None:
    """The `count` (even) normals that Box and Muller make of so many uniforms.

    Without `third`, of triples of pairs (the noise of a drift over an even number of steps) the last is left out.
    """
    half = count // 2
    for n in range(half):
        if third or n // 2 % 3 < 2:
            radius = math.sqrt(-2.0 * math.log(uniform[n]))
            cosine, sine = _turn(uniform[half + n])
            out[n], out[half + n] = radius * cosine, radius * sine


@inlined
def _turn(share: float) -> Any:
    """Cosine and sine of a share of a whole turn, by their Taylor series about the nearest quarter, to 2e-9."""
    quarter = math.floor(4.0 * share + 0.5)
    x = 2.0 * math.pi * (share - 0.25 * quarter)
    y = x * x
    sine = x * (1.0 - y * (1 / 6 - y * (1 / 120 - y * (1 / 5040 - y * (1 / 362880)))))
    cosine = 1.0 - y * (1 / 2 - y * (1 / 24 - y * (1 / 720 - y * (1 / 40320 - y * (1 / 3628800)))))
    if quarter & 1:
        cosine, sine = -sine, cosine
    return (-cosine, -sine) if quarter & 2 else (cosine, sine)


@inlined
def _log(x: Any) -> Any:
    bits = _F(x).view(np.int32) - np.int32(0x3F3504F3)
    exponent = _F(bits >> np.int32(23))
    mantissa = np.int32((bits & np.int32(0x007FFFFF)) + np.int32(0x3F3504F3)).view(np.float32)
    z = (mantissa - _F(1.0)) / (mantissa + _F(1.0))
    z2 = z * z
    series = _F(1.0 / 9.0)
    series = series * z2 + _F(1.0 / 7.0)
    series = series * z2 + _F(1.0 / 5.0)
    series = series * z2 + _F(1.0 / 3.0)
    series = series * z2 + _F(1.0)
    return exponent * _F(math.log(2.0)) + _F(2.0) * (z * series)


@inlined
def _normal_quantile(uniform: Any) -> Any:
    x = _F(2.0) * uniform - _F(1.0)
    w = -_log((_F(1.0) - x) * (_F(1.0) + x))
    if w < _F(5.0):
        value, at = _CENTRE[0], w - _F(2.5)
        for k in range(1, len(_CENTRE)):
            value = value * at + _CENTRE[k]
    else:
        value, at = _TAIL[0], np.sqrt(w) - _F(3.0)
        for k in range(1, len(_TAIL)):
            value = value * at + _TAIL[k]
    return (_F(math.sqrt(2.0)) * x) * value


@inlined
def _poisson(uniform: Any, rate: Any) -> Any:
    if rate > _F(10.0):
        root = np.sqrt(rate)
        w = _normal_quantile(uniform)
        w2 = w * w
        quantile = rate + root * w + (_F(2.0) + w2) * _F(1.0 / 6.0) - w * (_F(2.0) + w2) / (_F(72.0) * root)
        quantile = quantile + (_F(-16.0) + w2 * (_F(7.0) + _F(3.0) * w2)) / (_F(810.0) * rate)
        return max(np.floor(quantile), _F(0.0))
    term = _exp_minus(rate)
    cumulative, reach, count = term, uniform * _F(1.0 - 1e-5), _F(0.0)
    for k in range(1, 33):
        if reach <= cumulative:
            break
        count += _F(1.0)
        term = term * (rate * _INVERSE[k])
        cumulative = cumulative + term
    return min(count, _F(32.0))


@inlined
def _exp_minus(x: Any) -> Any:
    y = x * _F(-1.0 / 16.0)
    value = _F(1.0 / 40320.0)
    for k in range(len(_TAYLOR)):
        value = value * y + _TAYLOR[k]
    for _ in range(4):
        value = value * value
    return value


# Drift


@inlined
def _drift(physics: Any, rows: Any, row: int, step_s: float, steps: int, room: Any) -> None:
    """Displacements `room.knots` at the ends of even steps, the present one first.

    `room.drift` is then as after the steps. The formulas are those of `drift.advance`.
    """
    uniform, normal, knots, after = room.uniform, room.normal, room.knots, room.drift
    count = 6 * steps
    _uniforms(rows.address, row, count, uniform)
    tau, scaled = physics.drift_tau_s, step_s / physics.drift_tau_s
    gone = -math.expm1(-scaled)
    gone_twice = gone * (2.0 - gone)
    to_path = gone * gone / math.sqrt(max(gone_twice, 1e-30))
    rest = math.sqrt(max(_path_variance(scaled, gone, gone_twice) - to_path * to_path, 0.0))
    kick, wander = physics.drift_sigma * math.sqrt(gone_twice), physics.drift_sigma * tau
    walk = math.sqrt(2.0 * physics.diffusion_ang2_per_s * step_s)
    moves = physics.drift_sigma > 0.0 or walk > 0.0
    if moves:
        _normals(uniform, count, walk > 0.0 or steps % 2 == 1, normal)
    for axis in range(2):
        place, velocity = float(rows.position_ang[row, axis]), float(rows.velocity_ang_per_s[row, axis])
        creep, fading = float(rows.creep_ang[row, axis]), 1.0
        if creep != 0.0:
            fading = math.exp(-step_s / physics.settling_s)
        knots[0, axis] = place - creep
        for step in range(steps):
            place += velocity * gone * tau
            velocity *= 1.0 - gone
            creep *= fading
            if moves:
                at = 6 * step + axis
                place += wander * (to_path * normal[at] + rest * normal[at + 2])
                velocity += kick * normal[at]
                if walk > 0.0:
                    place += walk * normal[at + 4]
            knots[step + 1, axis] = place - creep
        after[0, axis], after[1, axis], after[2, axis] = place, velocity, creep


@inlined
def _path_variance(scaled: float, gone: float, gone_twice: float) -> float:
    if scaled >= 0.1:
        return 2.0 * scaled - 4.0 * gone + gone_twice
    square = scaled * scaled
    cube = square * scaled
    return cube * (2.0 / 3.0 - 0.5 * scaled + (7.0 / 30.0) * square - cube / 12.0)


@inlined
def _spend(rows: Any, row: int, seconds: float, sent: float, drift: ndarray) -> None:
    for axis in range(2):
        rows.position_ang[row, axis] = drift[0, axis]
        rows.velocity_ang_per_s[row, axis] = drift[1, axis]
        rows.creep_ang[row, axis] = drift[2, axis]
    rows.clock_s[row] += _F(seconds)
    rows.electrons[row] += sent


# What can happen, and what comes first: `kinetics`


@inlined
def _nearest(delta: float, cell: float) -> float:
    return delta - cell * np.rint(delta / cell)


@inlined
def _away(room: Any, slot: int, x: float, y: float) -> Any:
    """A beam at (x, y) seen from a dopant, in the nearest image; divisions would take most of the time."""
    near, cell = room.near, room.cell
    dx, dy = x - near[slot, 0], y - near[slot, 1]
    return dx - cell[0] * np.rint(dx * cell[2]), dy - cell[1] * np.rint(dy * cell[3])


@inlined
def _density(table: ndarray, focus: ndarray, distance: float) -> float:
    """`flux.density_at`, between two defoci: one table for all rows stays in the cache, as one for each would not."""
    if distance >= REACH_ANG:
        return 0.0
    at = min(distance * (1.0 / STEP_ANG), table.shape[1] - 1.001)
    left, first, second, share = int(at), int(focus[0]), int(focus[1]), focus[2]
    low = (1.0 - share) * table[first, left] + share * table[second, left]
    high = (1.0 - share) * table[first, left + 1] + share * table[second, left + 1]
    return low + (high - low) * (at - left)


@inlined
def _focus(physics: Any, rows: Any, row: int, focus: ndarray) -> None:
    """Where the tables of a row's probe are: `flux.FluxTable.rows`."""
    nodes, at = len(physics.flux) // len(physics.away_barn), 0.0
    if nodes > 1:
        at = (rows.defocus_ang[row] - physics.ladder_ang[0]) / physics.ladder_ang[1]
        at = min(max(at, 0.0), nodes - 1.001)
    first = nodes * rows.energy[row] + int(at)
    focus[0], focus[1], focus[2] = first, first + (nodes > 1), at - int(at)


@inlined
def _load(physics: Any, rows: Any, row: int, room: Any) -> None:
    """The surroundings of a row's dopants, as `_rates` and `_trace` need them at every moment of a dwell."""
    near, law, cell = room.near, room.law, room.cell
    for axis in range(2):
        cell[axis], cell[2 + axis] = rows.cell_ang[row, axis], 1.0 / rows.cell_ang[row, axis]
    weight = physics.weight_ang2[rows.energy[row]]
    _focus(physics, rows, row, room.focus)
    for slot in range(near.shape[0]):
        for axis in range(2):
            near[slot, axis] = rows.dopant_ang[row, slot, axis]
            for k in range(3):
                near[slot, _BOND + 2 * k + axis] = rows.bond_ang[row, slot, k, axis]
        for k in range(3):
            gain = 0.0
            for kind in range(_EXCHANGE if physics.law == CROSS_SECTION else _EJECTION, _BESIDE):
                gain += rows.near_barn[row, slot, kind] * rows.allowed[row, slot, k, kind]
            near[slot, _GAIN + k] = ANG2_PER_BARN * gain
            near[slot, _FREE + k] = rows.allowed[row, slot, k, _EXCHANGE]
        excess = weight[rows.near_number[row, slot]] - weight[_CARBON]
        near[slot, _EXCESS] = excess if rows.there[row, slot] else 0.0
    for k in range(rows.law.shape[1]):
        law[k] = rows.law[row, k]
    room.rest[0] = ANG2_PER_BARN * _worst_barn(physics, rows, row)
    room.rest[1], room.rest[2] = _thermal(physics, rows, row)


@inlined
def _jump_rate(kind: int, length: float, scale: float, law: ndarray, beam: Any, bond: Any) -> float:
    """Jumps per second by the laws of `jumps` but the first; `beam` and `bond` are seen from the dopant."""
    (x, y), (along, across) = beam, bond
    if kind == LORENTZIAN:
        return 1.0 / (1.0 + 16.0 / length**2 * ((x - along) ** 2 + (y - across) ** 2))
    reach = math.sqrt(along * along + across * across)
    ahead, aside = (x * along + y * across) / reach, (y * along - x * across) / reach
    square = ((ahead - law[1]) / law[2]) ** 2 + (aside / (law[2] * law[3])) ** 2
    return scale * (law[4] + law[0] * math.exp(-0.5 * square))


@inlined
def _rates(physics: Any, x: float, y: float, room: Any) -> float:
    """Events per second beside dopants under a beam at (x, y); fills `room.flux` and `room.jump`, (3 D,) each."""
    near, flux, jump, law, kind = room.near, room.flux, room.jump, room.law, physics.law
    length, scale = physics.law_length, physics.current_pa / physics.law_length
    per_second, total = physics.current_pa * ELECTRONS_PER_PC, 0.0
    for slot in range(near.shape[0]):
        dx, dy = _away(room, slot, x, y)
        for k in range(3):
            bx, by = near[slot, _BOND + 2 * k], near[slot, _BOND + 2 * k + 1]
            sent = per_second * _density(physics.flux, room.focus, math.sqrt((dx - bx) ** 2 + (dy - by) ** 2))
            flux[3 * slot + k] = sent
            total += sent * near[slot, _GAIN + k]
            if kind != CROSS_SECTION:
                rate = _jump_rate(kind, length, scale, law, (dx, dy), (bx, by))
                jump[3 * slot + k] = near[slot, _FREE + k] * rate
                total += jump[3 * slot + k]
    return total


@inlined
def _frame_jumps(physics: Any, laws: ndarray, row: int, frame: Any, barn: float) -> float:
    """Expected jumps towards one neighbour in a frame: likewise, with the first."""
    dose, beam_s, _, area = frame
    if physics.law == CROSS_SECTION:
        return ANG2_PER_BARN * barn * dose
    if physics.law == LORENTZIAN:
        return 0.0
    integral = 2.0 * math.pi * laws[row, 0] * laws[row, 2] ** 2 * laws[row, 3] + laws[row, 4] * area
    return integral * beam_s / area * (physics.current_pa / physics.law_length)


@inlined
def _worst_barn(physics: Any, rows: Any, row: int) -> float:
    pristine, edge = physics.away_barn[rows.energy[row], 0], physics.away_barn[rows.energy[row], 1]
    return max(pristine, edge) if rows.edged[row] else pristine


@inlined
def _thermal(physics: Any, rows: Any, row: int) -> Any:
    """Healing and capture per second."""
    vacancies = 0
    for slot in range(rows.open.shape[1]):
        vacancies += rows.open[row, slot]
    if vacancies == 0:
        return 0.0, 0.0
    room = False
    for slot in range(rows.there.shape[1]):
        room = room or not rows.there[row, slot]
    return physics.healing_per_s * vacancies, physics.capture_per_s * vacancies * room


@compiled
def _pick(weights: ndarray, count: int, uniform: float) -> int:
    """An index drawn in proportion to the first `count` weights."""
    total = 0.0
    for index in range(count):
        total += weights[index]
    reached, wanted = 0.0, uniform * total
    for index in range(count):
        reached += weights[index]
        if reached > wanted:
            return index
    return count - 1


@inlined
def _next_event(physics: Any, rows: Any, row: int, sample_s: float, samples: int, room: Any) -> None:
    """The first event of a dwell after `room.moment` (part, share), which moves to it."""
    uniform, event, moment, rest, path = room.uniform, room.event, room.moment, room.rest, room.path
    _uniforms(rows.address, row, 3, uniform)
    threshold, chance, place = -math.log(uniform[0]), uniform[1], uniform[2]
    begin, done = int(moment[0]), moment[1]
    away = rest[0] * physics.bound_per_ang2 * physics.current_pa * ELECTRONS_PER_PC
    reached = 0.0
    event[0] = _NOTHING
    for part in range(begin, samples):
        left = 1.0 - done if part == begin else 1.0
        beside = _rates(physics, path[part, 0], path[part, 1], room)
        expected = left * sample_s * (beside + away + rest[1] + rest[2])
        if reached + expected > threshold:
            start = done if part == begin else 0.0
            moment[0], moment[1] = part, min(start + left * (threshold - reached) / expected, 1.0)
            _which(physics, rows, row, away, chance, room)
            if event[0] >= _KNOCK_OUT:
                _place(physics, rows, row, room, place, (path[part, 0], path[part, 1], 0.0, 0.0))
            return
        reached += expected


@compiled
def _which(physics: Any, rows: Any, row: int, away: float, chance: float, room: Any) -> None:
    """What an event is, by the rates that `_rates` has just looked at: kind, slot and neighbour."""
    rates, event = room.rates, room.event
    count = 3 * rows.dopant.shape[1]
    for index in range(count):
        for kind in range(_BESIDE):
            rate = ANG2_PER_BARN * room.flux[index] * rows.near_barn[row, index // 3, kind]
            rate *= rows.allowed[row, index // 3, index % 3, kind]
            if kind == _EXCHANGE and physics.law != CROSS_SECTION:
                rate = room.jump[index]
            rates[_BESIDE * index + kind] = rate
    count *= _BESIDE
    rates[count], rates[count + 1], rates[count + 2] = away, room.rest[1], room.rest[2]
    index = _pick(rates, count + 3, chance)
    if index < count:
        event[0], event[1], event[2] = index % _BESIDE, index // _BESIDE // 3, index // _BESIDE % 3
    else:
        event[0] = index - count + _KNOCK_OUT


@inlined
def _next_in_frame(physics: Any, rows: Any, row: int, frame: Any, room: Any) -> None:
    """The first event of a frame after the part `room.moment[0]` of it, which moves to it.

    `frame` is its dose per Å², its seconds with the beam on and those altogether, and its area in Å².
    """
    dose, _, seconds, _ = frame
    uniform, rates, event, centre, size = room.uniform, room.rates, room.event, room.centre, room.size
    count, after = 3 * rows.dopant.shape[1], room.moment[0]
    _uniforms(rows.address, row, count + 4, uniform)
    first, which = math.inf, 0
    for index in range(count):
        slot, k = index // 3, index % 3
        x = rows.dopant_ang[row, slot, 0] + rows.bond_ang[row, slot, k, 0] - centre[0]
        y = rows.dopant_ang[row, slot, 1] + rows.bond_ang[row, slot, k, 1] - centre[1]
        x = _nearest(x, rows.cell_ang[row, 0]) / size[0] + 0.5
        when = _nearest(y, rows.cell_ang[row, 1]) / size[1] + 0.5
        if 0.0 <= x < 1.0 and 0.0 <= when < 1.0 and after < when < first:
            expected = _expected(physics, rows, row, index, frame, rates)
            if uniform[index] < -math.expm1(-expected):
                first, which = when, index
    at = max(after, 0.0)
    rates[_BESIDE] = ANG2_PER_BARN * rows.present.shape[1] * _worst_barn(physics, rows, row) * dose
    healing, capture = _thermal(physics, rows, row)
    rates[_BESIDE + 1], rates[_BESIDE + 2] = healing * seconds, capture * seconds
    rest = rates[_BESIDE] + rates[_BESIDE + 1] + rates[_BESIDE + 2]
    wait = at - math.log(uniform[count]) / max(rest, 1e-30)
    event[0] = _NOTHING
    if wait < first and wait < 1.0:
        event[0] = _KNOCK_OUT + _pick(rates[_BESIDE:], 3, uniform[count + 2])
        _place(physics, rows, row, room, uniform[count + 3], (centre[0], centre[1], size[0], size[1]))
    elif first < math.inf:
        _expected(physics, rows, row, which, frame, rates)
        event[0], event[1], event[2] = _pick(rates, _BESIDE, uniform[count + 1]), which // 3, which % 3
    room.moment[0] = min(first, wait)


@inlined
def _expected(physics: Any, rows: Any, row: int, index: int, frame: Any, out: ndarray) -> float:
    """Expected events of each kind at one neighbour in a frame, and their sum."""
    slot, k, total = index // 3, index % 3, 0.0
    for kind in range(_BESIDE):
        barn, allowed = rows.near_barn[row, slot, kind], rows.allowed[row, slot, k, kind]
        if kind == _EXCHANGE:
            out[kind] = allowed * _frame_jumps(physics, rows.law, row, frame, barn)
        else:
            out[kind] = allowed * ANG2_PER_BARN * barn * frame[0]
        total += out[kind]
    return total


@compiled
def _place(physics: Any, rows: Any, row: int, room: Any, uniform: float, where: Any) -> None:
    """Give an event away from dopants its site; a knock-out that the true rate does not take becomes REFUSED.

    `where` is the beam's x and y and two zeros in a dwell; in a frame, its middle, width and height.
    """
    event, focus = room.event, room.focus
    if event[0] != _KNOCK_OUT:
        chosen, total = 0.0, 0
        for slot in range(rows.open.shape[1]):
            chosen += uniform * rows.open[row, slot]
        for slot in range(rows.open.shape[1]):
            total += rows.open[row, slot]
            if total > chosen:
                event[3] = rows.vacancy[row, slot]
                return
        return
    (x, y, width, height), sites, reached = where, rows.present.shape[1], 0.0
    worst = max(_worst_barn(physics, rows, row), 1e-30)
    for site in range(sites):
        barn = _barn_of(physics, rows, row, site)
        if barn == 0.0:
            continue
        dx = _nearest(rows.xy_ang[row, site, 0] - x, rows.cell_ang[row, 0])
        dy = _nearest(rows.xy_ang[row, site, 1] - y, rows.cell_ang[row, 1])
        if width > 0.0:
            share = (abs(dx) <= 0.5 * width and abs(dy) <= 0.5 * height) / sites
        else:
            share = _density(physics.flux, focus, math.sqrt(dx * dx + dy * dy)) / physics.bound_per_ang2
        reached += share * barn / worst
        if reached > uniform:
            event[3] = site
            return
    event[0] = _REFUSED


@compiled
def _barn_of(physics: Any, rows: Any, row: int, site: int) -> float:
    """Knock-on cross section of a carbon that has no dopant beside it; zero for all else."""
    if not rows.present[row, site] or rows.atomic_number[row, site] != _CARBON:
        return 0.0
    whole = True
    for k in range(3):
        other = rows.neighbours[row, site, k]
        there = rows.present[row, other]
        if there and rows.atomic_number[row, other] != _CARBON:
            return 0.0
        whole = whole and there and other != site
    return physics.away_barn[rows.energy[row], 0 if whole else 1]


# What an event does: `sheet.apply`


@compiled
def _happen(physics: Any, rows: Any, row: int, event: ndarray) -> None:
    kind, slot, neighbour, site = event[0], event[1], event[2], event[3]
    number, dopant = rows.atomic_number[row], rows.dopant[row, slot]
    partner = rows.neighbours[row, dopant, neighbour]
    if kind == _EXCHANGE:
        number[partner], number[dopant] = number[dopant], _CARBON
        rows.dopant[row, slot] = partner
        rows.raised[row, slot] = not rows.raised[row, slot]
        rows.jumps[row] += 1
    elif kind == _ROTATION:
        rows.rotated[row, slot] = 1 + neighbour
    elif kind == _REVERSAL:
        rows.rotated[row, slot] = 0
    elif kind == _REPLACEMENT:
        number[dopant] = _CARBON
        rows.there[row, slot] = False
    elif kind == _EJECTION:
        _make_vacancy(rows, row, partner)
    elif kind == _KNOCK_OUT:
        _make_vacancy(rows, row, site)
    else:
        _fill(physics, rows, row, site, kind == _CAPTURE)
    _look(rows, row)


@compiled
def _make_vacancy(rows: Any, row: int, site: int) -> None:
    rows.present[row, site] = False
    for slot in range(rows.open.shape[1]):
        if not rows.open[row, slot]:
            rows.vacancy[row, slot], rows.open[row, slot] = site, True
            break
    rows.lost[row] += 1
    rows.edged[row] = True


@compiled
def _fill(physics: Any, rows: Any, row: int, site: int, with_silicon: bool) -> None:
    rows.present[row, site] = True
    rows.atomic_number[row, site] = _SILICON if with_silicon else _CARBON
    for slot in range(rows.open.shape[1]):
        if rows.open[row, slot] and rows.vacancy[row, slot] == site:
            rows.open[row, slot] = False
            break
    if not with_silicon:
        return
    for slot in range(rows.there.shape[1]):
        if not rows.there[row, slot]:
            rows.dopant[row, slot], rows.there[row, slot], rows.rotated[row, slot] = site, True, 0
            for side in range(2):
                for kind in range(_BESIDE):
                    rows.barn[row, slot, side, kind] = physics.silicon_barn[rows.energy[row], side, kind]
            return


@compiled
def _look(rows: Any, row: int) -> None:
    """`sheet.look`."""
    for slot in range(rows.dopant.shape[1]):
        site = rows.dopant[row, slot]
        rows.near_number[row, slot] = rows.atomic_number[row, site]
        side = 1 if rows.raised[row, slot] else 0
        for kind in range(_BESIDE):
            rows.near_barn[row, slot, kind] = rows.barn[row, slot, side, kind]
        whole = True
        for k in range(3):
            other = rows.neighbours[row, site, k]
            whole = whole and rows.present[row, other] and other != site
        there, rotated = rows.there[row, slot], rows.rotated[row, slot]
        for k in range(3):
            other = rows.neighbours[row, site, k]
            here = rows.present[row, other] and other != site
            carbon = here and rows.atomic_number[row, other] == _CARBON and there
            free, turned = carbon and rotated == 0, carbon and rotated == k + 1
            for kind in range(_BESIDE):
                possible = turned if kind == _REVERSAL else free and (whole or kind == _EJECTION)
                rows.allowed[row, slot, k, kind] = 1.0 if possible else 0.0
        for axis in range(2):
            place = rows.xy_ang[row, site, axis]
            rows.dopant_ang[row, slot, axis] = place
            for k in range(3):
                away = float(rows.xy_ang[row, rows.neighbours[row, site, k], axis]) - place
                rows.bond_ang[row, slot, k, axis] = _nearest(away, rows.cell_ang[row, axis])


# Dwells


@inlined
def _trace(physics: Any, rows: Any, row: int, sample_s: float, first: int, samples: int, room: Any) -> None:
    """Counts of the samples from `first` on: `detectors.detect` of what the probe sees at each place."""
    beam, near = physics.current_pa * sample_s * ELECTRONS_PER_PC, room.near
    path, counts = room.path, room.counts
    sheet, dark = physics.atoms_per_ang2 * physics.weight_ang2[rows.energy[row], _CARBON], physics.dark_per_s * sample_s
    _uniforms(rows.address, row, samples, room.uniform)
    for sample in range(first, samples):
        fraction = sheet
        for slot in range(near.shape[0]):
            dx, dy = _away(room, slot, path[sample, 0], path[sample, 1])
            fraction += _density(physics.signal, room.focus, math.sqrt(dx * dx + dy * dy)) * near[slot, _EXCESS]
        electrons = _poisson(_F(room.uniform[sample]), _F(max(fraction, 0.0) * beam + dark))
        counts[sample] = electrons * physics.gain + physics.offset
    if physics.read_noise > 0.0:
        even = samples + samples % 2
        _uniforms(rows.address, row, even, room.uniform)
        _normals(room.uniform, even, True, room.normal)
        for sample in range(first, samples):
            counts[sample] += physics.read_noise * room.normal[sample]
    for sample in range(first, samples):
        whole = counts[sample] if physics.whole_counts else np.rint(counts[sample])
        counts[sample] = min(max(whole, 0.0), physics.saturation)


@inlined
def _samples_until(counts: ndarray, samples: int, dwells: Any) -> int:
    """`exposure.samples_until`."""
    window = dwells.window_samples
    baseline = _mean(counts, 0, dwells.baseline_samples)
    for end in range(window, samples + 1):
        running = _mean(counts, end - window, end)
        risen, fallen = running >= baseline * (1.0 + dwells.rise), running <= baseline * (1.0 - dwells.fall)
        if end > dwells.baseline_samples and (risen or fallen):
            return end
    return samples


@inlined
def _mean(counts: ndarray, first: int, last: int) -> float:
    total = 0.0
    for sample in range(first, last):
        total += counts[sample]
    return total / (last - first)


@compiled
def dwell(physics: Physics, rows: Rows, which: ndarray, dwells: Dwells, room: Room) -> None:
    """Dwell at the parked place on the rows `which` (n,), while the sheet changes and drifts under the beam."""
    samples = dwells.counts.shape[1]
    knots, ends, path, before, counts = room.knots, room.ends, room.path, room.before, room.counts
    event, moment, part = room.event, room.moment, 1.0 / samples
    for n in range(len(which)):
        row, sample_s = which[n], dwells.time_s[n] / samples
        for axis in range(2):
            before[0, axis], before[1, axis] = rows.velocity_ang_per_s[row, axis], rows.creep_ang[row, axis]
        _drift(physics, rows, row, dwells.time_s[n] / 2.0, 2, room)
        for axis in range(2):
            wanted = (rows.place[row, axis] - 0.5) * rows.fov_ang[row]
            for end in range(samples + 1):
                at = 2.0 * end * part
                left = 0 if at < 1.0 else 1
                ends[end, axis] = knots[left, axis] + (knots[left + 1, axis] - knots[left, axis]) * (at - left)
            for sample in range(samples):
                path[sample, axis] = wanted - 0.5 * (ends[sample, axis] + ends[sample + 1, axis])
        _load(physics, rows, row, room)
        _trace(physics, rows, row, sample_s, 0, samples, room)
        used = samples
        moment[0] = moment[1] = 0.0
        while True:
            _next_event(physics, rows, row, sample_s, samples, room)
            if dwells.stops:
                used = _samples_until(counts, samples, dwells)
            if event[0] == _NOTHING or moment[0] >= used:
                break
            if event[0] >= 0:
                _happen(physics, rows, row, event)
                _load(physics, rows, row, room)
            _trace(physics, rows, row, sample_s, int(moment[0]) + 1, samples, room)
        if dwells.stops:
            share = used / samples
            for axis in range(2):
                creep = before[1, axis] + share * (room.drift[2, axis] - before[1, axis])
                room.drift[0, axis] = ends[used, axis] + creep
                room.drift[1, axis] = before[0, axis] + share * (room.drift[1, axis] - before[0, axis])
                room.drift[2, axis] = creep
            for sample in range(used, samples):
                counts[sample] = math.nan
        seconds = sample_s * used
        sent = physics.current_pa * seconds * ELECTRONS_PER_PC
        for sample in range(samples):
            dwells.counts[n, sample] = counts[sample]
        dwells.told[0, n], dwells.told[1, n], dwells.told[2, n] = (
            seconds,
            sent,
            sent * _density(physics.flux, room.focus, 0.0),
        )
        dwells.told[3, n], dwells.told[4, n] = sample_s, physics.current_pa * sample_s * ELECTRONS_PER_PC
        _spend(rows, row, seconds, sent, room.drift)


# Frames, and time without a beam


@compiled
def pass_time(physics: Physics, rows: Rows, which: ndarray, seconds: ndarray, room: Room) -> None:
    """Let the samples of the rows `which` (n,) drift for some seconds (n,)."""
    for n in range(len(which)):
        _drift(physics, rows, which[n], seconds[n], 1, room)
        _spend(rows, which[n], seconds[n], 0.0, room.drift)


@compiled
def frame(physics: Physics, rows: Rows, which: ndarray, frames: Frames, room: Room) -> None:
    """Scan frames of the rows `which` (n,): what the beam does meanwhile, and what an atom finder makes of them."""
    knots, centre, size, moment, event = room.knots, room.centre, room.size, room.moment, room.event
    for n in range(len(which)):
        row, beam_s = which[n], frames.dwell_s[n] * frames.height * frames.width
        seconds = beam_s + frames.height * frames.flyback_s + frames.overhead_s
        _drift(physics, rows, row, seconds / 4.0, 4, room)
        for axis in range(2):
            size[axis] = frames.region[n, 2 + axis] * frames.fov_ang[n]
            middle = (frames.region[n, axis] + 0.5 * frames.region[n, 2 + axis] - 0.5) * frames.fov_ang[n]
            drifted = knots[0, axis] + knots[1, axis] + knots[2, axis] + knots[3, axis] + knots[4, axis]
            centre[axis] = middle - drifted / 5.0
            for knot in range(5):
                frames.knots_ang[n, knot, axis] = knots[knot, axis]
        sent = physics.current_pa * beam_s * ELECTRONS_PER_PC
        dose = sent / (size[0] * size[1])
        moment[0] = -1.0
        for _ in range(_FRAME_PASSES):
            _next_in_frame(physics, rows, row, (dose, beam_s, seconds, size[0] * size[1]), room)
            if event[0] == _NOTHING:
                break
            if event[0] >= 0:
                _happen(physics, rows, row, event)
        _find(physics, rows, row, dose, frames, n, room)
        rows.fov_ang[row] = frames.fov_ang[n]
        for axis in range(2):
            rows.seen_ang[row, axis] = room.drift[0, axis] - room.drift[2, axis]
        frames.told[0, n], frames.told[1, n], frames.told[2, n] = seconds, sent, dose
        frames.told[3, n] = sent / (frames.height * frames.width)
        _spend(rows, row, seconds, sent, room.drift)


@inlined
def _find(physics: Any, rows: Any, row: int, dose: float, frames: Any, n: int, room: Any) -> None:
    """`finder.find`: places, bonds and shift with the errors of a finder."""
    slots, uniform, noise = rows.dopant.shape[1], room.uniform, room.normal
    count, fov_ang = 2 * (4 * slots + 1), float(frames.fov_ang[n])
    blur = math.sqrt(physics.reference_dose / dose)
    _uniforms(rows.address, row, count, uniform)
    if physics.position_sd_ang > 0.0 or physics.bond_sd_ang > 0.0 or physics.shift_sd_ang > 0.0:
        _normals(uniform, count, True, noise)
    else:
        noise[:count] = 0.0
    wrong = physics.missed > 0.0 or physics.spurious > 0.0
    if wrong:
        _uniforms(rows.address, row, 4 * slots, uniform)
    for slot in range(slots):
        seen = rows.there[row, slot]
        for axis in range(2):
            offset = room.drift[0, axis] - room.drift[2, axis]
            place = _nearest(rows.dopant_ang[row, slot, axis] + offset, rows.cell_ang[row, axis])
            place += physics.position_sd_ang * blur * noise[2 * slot + axis]
            place = place / fov_ang + 0.5
            corner, size = float(frames.region[n, axis]), float(frames.region[n, 2 + axis])
            if wrong and uniform[4 * slot] < physics.spurious:
                place = corner + size * uniform[4 * slot + 2 + axis]
            seen = seen and corner <= place <= corner + size
            frames.places[n, slot, axis] = place
        if not seen or (wrong and uniform[4 * slot + 1] < physics.missed):
            for axis in range(2):
                frames.places[n, slot, axis] = math.nan
                for k in range(3):
                    frames.bonds_ang[n, slot, k, axis] = math.nan
            continue
        for k in range(3):
            for axis in range(2):
                error = physics.bond_sd_ang * blur * noise[2 * (slots + 3 * slot + k) + axis]
                frames.bonds_ang[n, slot, k, axis] = rows.bond_ang[row, slot, k, axis] + error
    if slots > 1:
        _sort(frames.places[n], frames.bonds_ang[n])
    for axis in range(2):
        offset = room.drift[0, axis] - room.drift[2, axis]
        error = physics.shift_sd_ang * blur * noise[2 * (4 * slots) + axis]
        frames.shift_ang[n, axis] = offset - rows.seen_ang[row, axis] + error


@compiled
def _sort(places: ndarray, bonds: ndarray) -> None:
    """Along x, what is not there last."""
    for last in range(1, len(places)):
        at = last
        while at > 0 and (math.isnan(places[at - 1, 0]) or places[at, 0] < places[at - 1, 0]):
            for axis in range(2):
                places[at, axis], places[at - 1, axis] = places[at - 1, axis], places[at, axis]
                for k in range(3):
                    bonds[at, k, axis], bonds[at - 1, k, axis] = bonds[at - 1, k, axis], bonds[at, k, axis]
            at -= 1


# Fresh sheets


@compiled
def lay(rows: Rows, which: ndarray, fresh: Fresh, foreign: ndarray, space: Any) -> None:
    """Whole sheets with dopants on the rows `which` (n,), in single precision: `GrapheneRecipe.build`, bit for bit.

    Tells where the dopants are, `foreign` (n, K); their slots have no site yet.
    """
    places, kinds = fresh.places_ang, fresh.kinds
    uniform, free, allowed = space
    sites, near = places.shape[1], _F(fresh.separation_ang) * _F(fresh.separation_ang)
    for n in range(len(which)):
        row = which[n]
        xy, number = rows.xy_ang[row], rows.atomic_number[row]
        _uniforms(rows.address, row, 4, uniform)
        pick = int(_F(uniform[0]) * _F(len(places)))
        width, height = fresh.cells_ang[pick, 0], fresh.cells_ang[pick, 1]
        mirror = _F(-1.0 if uniform[3] < 0.5 else 1.0)
        right, down = _F(uniform[1]) * width, _F(uniform[2]) * height
        rows.cell_ang[row, 0], rows.cell_ang[row, 1] = width, height
        for site in range(sites):
            xy[site, 0] = _wrapped(places[pick, site, 0] * mirror + right, width)
            xy[site, 1] = _wrapped(places[pick, site, 1] + down, height)
            number[site] = fresh.elements[pick, site]
            rows.present[row, site] = free[site] = number[site] > 0
            foreign[n, site] = 0.0
            for k in range(3):
                rows.neighbours[row, site, k] = fresh.neighbours[pick, site, k]
        for kind in range(len(kinds)):
            _uniforms(rows.address, row, 1 + sites, uniform)
            element, least, most, half = int(kinds[kind, 0]), kinds[kind, 1], kinds[kind, 2], _F(kinds[kind, 3])
            more = min(np.floor(_F(uniform[0]) * _F(most - least + 1.0)), most - least)
            for site in range(sites):
                x, y = _nearest(xy[site, 0], width), _nearest(xy[site, 1], height)
                allowed[site] = free[site] and max(abs(x), abs(y)) < half
                free[site] = free[site] and not allowed[site]
            for _ in range(int(least + more)):
                best, largest = -1, -1.0
                for site in range(sites):
                    if allowed[site] and uniform[1 + site] > largest:
                        best, largest = site, uniform[1 + site]
                if best < 0:
                    break
                number[best], foreign[n, best], allowed[best] = element, element != _CARBON, False
                for site in range(sites):
                    x = _nearest(xy[site, 0] - xy[best, 0], width)
                    y = _nearest(xy[site, 1] - xy[best, 1], height)
                    if x * x + y * y < near:
                        allowed[site] = False
            for site in range(sites):
                free[site] = free[site] or allowed[site]
        _uniforms(rows.address, row, rows.raised.shape[1], uniform)
        for slot in range(rows.raised.shape[1]):
            rows.raised[row, slot] = uniform[slot] < 0.5


@compiled
def begin(physics: Physics, rows: Rows, which: ndarray, fresh: Fresh, slots: Any, drawn: Any) -> None:
    """All other buffers of rows (n,) on which fresh sheets lie, but the law of their jumps, which is drawn elsewhere.

    As `Kinetics.sheet` and `SheetMicroscope._fresh` have them, bit for bit. `slots` are the sites (n, D) of the dopants
    and whether there is one; drawn are defoci (n,) and velocities (n, 2).
    """
    (site, there), (defocus_ang, velocity) = slots, drawn
    nodes, lengths = len(physics.flux) // len(physics.away_barn), physics.flux.shape[1]
    for n in range(len(which)):
        row = which[n]
        for slot in range(site.shape[1]):
            rows.dopant[row, slot], rows.there[row, slot] = site[n, slot], there[n, slot]
            rows.rotated[row, slot], kind = 0, 0
            for k in range(len(fresh.numbers) - 1, -1, -1):
                if fresh.numbers[k] == rows.atomic_number[row, site[n, slot]]:
                    kind = k
            for side in range(2):
                for event in range(_BESIDE):
                    barn = fresh.barn[kind, side, event]
                    rows.barn[row, slot, side, event] = barn if there[n, slot] else _F(0.0)
        for slot in range(rows.open.shape[1]):
            rows.vacancy[row, slot], rows.open[row, slot] = 0, False
        rows.energy[row] = rows.jumps[row] = rows.lost[row] = 0
        rows.edged[row] = False
        _look(rows, row)
        for axis in range(2):
            rows.position_ang[row, axis] = rows.creep_ang[row, axis] = rows.seen_ang[row, axis] = 0.0
            rows.velocity_ang_per_s[row, axis], rows.place[row, axis] = velocity[n, axis], 0.5
        rows.clock_s[row], rows.electrons[row], rows.fov_ang[row] = 0.0, 0.0, fresh.fov_ang
        rows.defocus_ang[row], left, share = defocus_ang[n], 0, _F(0.0)
        if nodes > 1:
            last = _F(nodes - 1.001)
            at = min(max((defocus_ang[n] - physics.ladder_ang[0]) / physics.ladder_ang[1], _F(0.0)), last)
            left, share = int(at), at - _F(int(at))
        right = min(left + 1, nodes - 1)  # a row's own tables are for the reference, which may be given its snapshot
        for length in range(lengths):
            low, high = physics.flux[left, length], physics.flux[right, length]
            rows.density[row, length] = low * (_F(1.0) - share) + high * share
            low, high = physics.signal[left, length], physics.signal[right, length]
            rows.signal[row, length] = low * (_F(1.0) - share) + high * share
        for element in range(physics.weight_ang2.shape[1]):
            rows.weight_ang2[row, element] = physics.weight_ang2[0, element]


@inlined
def _wrapped(value: Any, period: Any) -> Any:
    if value < _F(0.0):
        value += period
    return value - period if value >= period else value
