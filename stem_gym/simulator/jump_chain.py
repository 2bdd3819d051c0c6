"""What happened to dopants between two looks, and how likely a jump-rate map makes it.

Between two looks a dopant is exposed to the beam at known places for known times. Where it stands afterwards is all
that is seen; how it went there is not. Its jumps are a Markov chain on the lattice sites around it, with the rates of
the map (`jumps.JumpMap`) at each site, so the probability of the site that it is found on is an entry of a matrix
exponential (Kalbfleisch and Lawless, J. Am. Stat. Assoc. 80, 863, 1985). That one expression holds every case: a dwell
without a jump (censored at its length), a jump at an unknown moment (interval-censored), the neighbour that won
(competing risks), several jumps in one dwell and jumps there and back (summed over), and jumps in the frame by which it
is looked at. Where the first jump is known to lie in some parts of the exposure, the chain is kept in place before
them.

The time a dwell was used is a stopping time: what was asked for and not used tells nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from stem_gym.core.errors import DataError
from stem_gym.simulator.jumps import BOND_ANG, Aim, FrameAim, JumpMap

PARAMETERS = ("peak_per_s", "centre_bonds", "width_ang", "anisotropy", "floor_per_s")
STAYED, BEYOND = -1, 9  # ends of a transition; 0 to 2 are the neighbours, 3 to 8 the sites behind them
# Site 3 + i lies behind neighbour k, over its bond j.
BEHIND = ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1))
_SITES, _STATES = 10, 12  # not yet gone; the sites; beyond them
_CENTRE = PARAMETERS.index("centre_bonds")
_BOND_RANGE_ANG = (1.0, 2.2)  # silicon stands out of the sheet, and lattice fits err


@dataclass(frozen=True)
class Transitions:
    """What was done to N dopants between two looks, in up to P parts, and where each was found."""

    to_beam_ang: Tensor  # (N, P, 2) from the place where the dopant stood at first, in the middle of each part
    part_s: Tensor  # (N, P) with the beam on; 0 where there are fewer parts
    bond_ang: Tensor  # (N, 3, 2) to its neighbours at first
    end: Tensor  # (N,) int64: STAYED, a neighbour 0 to 2, a site 3 to 8 behind them, BEYOND
    window: Tensor  # (N, 2) int64: parts from … up to before … that hold the first jump; -1, -1: not known
    frame_s: Tensor  # (N,) of beam in the frames, that of the second look among them
    frame_ang2: Tensor  # (N,) area of a frame
    current_pa: Tensor  # (N,)

    def __len__(self) -> int:
        return len(self.end)

    @property
    def jumps(self) -> int:
        """How many dopants were found elsewhere."""
        return int((self.end != STAYED).sum())


def join(parts: Sequence[Transitions]) -> Transitions:
    """All transitions in one; shorter exposures are filled up with parts of no time."""
    if not parts:
        raise DataError("There are no transitions to join; give at least one set.")
    most = max(part.part_s.shape[1] for part in parts)
    filled = [_filled(part, most) for part in parts]
    return Transitions(**{name: torch.cat([values[name] for values in filled]) for name in filled[0]})


def log_likelihood(parameters: Tensor, transitions: Transitions, reference_pa: float = 100.0) -> Tensor:
    """Natural logarithm of the probability of what was found, summed; differentiable in `parameters` (5,).

    Parameters are those of `PARAMETERS`, in that order, at the reference current.
    """
    return _log_each(parameters, transitions, reference_pa).sum()


def places_around(bond_ang: Tensor) -> Tensor:
    """The ten sites (N, 10, 2) of a patch, from the dopant: itself, its neighbours, and those behind them."""
    first, over = (torch.tensor(side, device=bond_ang.device) for side in zip(*BEHIND, strict=True))
    return torch.cat((torch.zeros_like(bond_ang[:, :1]), bond_ang, bond_ang[:, first] - bond_ang[:, over]), dim=1)


def _log_each(parameters: Tensor, transitions: Transitions, reference_pa: float) -> Tensor:
    """Log probabilities (N,)."""
    flows = _flows(parameters, transitions, reference_pa)
    first, last = transitions.window.unsqueeze(2).unbind(1)  # (N, 1)
    known = first >= 0
    waiting = torch.arange(_STATES, device=flows.device) == 0
    chance = waiting.to(flows.dtype).expand(len(flows), -1)
    for part in range(flows.shape[1] - 1):
        chance = torch.where(known & (part >= last) & waiting, 0.0, chance)
        chance = _carried(chance, flows[:, part])
        chance = torch.where(known & (part < first) & ~waiting, 0.0, chance)
    chance = torch.where(known & waiting, 0.0, chance)
    chance = _carried(chance, flows[:, -1])
    found = chance.gather(1, (transitions.end + 2).unsqueeze(1)).squeeze(1)
    found = torch.where(transitions.end == STAYED, found + chance[:, 0], found)
    return torch.log(found.clamp(min=1e-300))


def _carried(chance: Tensor, flows: Tensor) -> Tensor:
    """Probabilities (N, 12) after an exposure in which each state is left by its expected jumps, flows (N, 33).

    That is a product with the exponential of the generator, by uniformisation: exp(Q) = Σ exp(-r) rᵏ / k! (1 + Q / r)ᵏ
    with r no less than the rate of leaving any state, sums of positive numbers (Jensen, Skand. Aktuarietidskr. 36, 87,
    1953).
    """
    sources, moves = _table(flows.dtype, flows.device)
    rate = float(flows.detach().unflatten(1, (-1, 3)).sum(-1).amax()) + 1e-9 if len(flows) else 1e-9
    weight, part = math.exp(-rate), flows / rate
    total = weight * chance
    for order in range(1, math.ceil(rate + 6.0 * math.sqrt(rate) + 8.0)):
        chance = torch.addmm(chance, chance.index_select(1, sources) * part, moves)
        weight *= rate / order
        total = total + weight * chance
    return total


def _flows(parameters: Tensor, transitions: Transitions, reference_pa: float) -> Tensor:
    """Expected jumps (N, P + 1, 33) from each state in each part of the exposure, and in the frames at its end."""
    law, count = JumpMap(reference_pa=reference_pa), len(transitions)
    scale = torch.ones_like(parameters)
    scale[_CENTRE] = BOND_ANG
    row = (parameters * scale).expand(count, -1)
    bonds = transitions.bond_ang
    sites = places_around(bonds)
    # Both sublattices: bonds point the other way from the neighbours.
    bond = torch.cat((bonds.unsqueeze(1), -bonds.unsqueeze(1).expand(-1, 3, -1, -1)), dim=1)
    bond = torch.cat((bond, bonds.unsqueeze(1).expand(-1, 6, -1, -1)), dim=1)
    away = transitions.to_beam_ang.unsqueeze(2) - sites.unsqueeze(1)  # (N, P, 10, 2)
    none = torch.zeros(count, 1, dtype=away.dtype, device=away.device)
    aim = Aim(away, bond, none, none, transitions.current_pa)
    dwell = law.rates(row, aim, none) * transitions.part_s[:, :, None, None]
    frame = FrameAim(none, transitions.frame_s, transitions.frame_ang2, transitions.current_pa)
    looked = law.frame_jumps(row, none, frame)[:, :, None, None].expand(-1, 1, _SITES, 3)
    flows = torch.cat((dwell, looked), dim=1).flatten(2)  # (N, P + 1, 30)
    return torch.cat((flows, flows[..., :3]), dim=2)


@functools.cache
def _table(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """From which state each flow goes (33,), 30 of the sites and 3 of the first place; and what it does (33, 12)."""
    sources, moves = [], torch.zeros(3 * _SITES + 3, _STATES, dtype=dtype)
    for flow in range(len(moves)):
        site, bond = divmod(flow % (3 * _SITES), 3)
        sources.append(1 + site if flow < 3 * _SITES else 0)
        moves[flow, 1 + _target(site, bond)] += 1.0
        moves[flow, sources[-1]] -= 1.0
    return torch.tensor(sources, device=device), moves.to(device)


def _target(site: int, bond: int) -> int:
    """The site of the patch that a jump over a bond leads to; 10 beyond it."""
    if site == 0:
        return 1 + bond
    if site <= 3:
        neighbour = site - 1
        return 0 if bond == neighbour else 4 + BEHIND.index((neighbour, bond))
    neighbour, over = BEHIND[site - 4]
    return 1 + neighbour if bond == over else _SITES


def check_transitions(transitions: Transitions) -> None:
    """Refuse transitions of the wrong shape or type, and such as can not have happened. Raises DataError."""
    count, parts = _check_shapes(transitions)
    for name in ("to_beam_ang", "part_s", "bond_ang", "frame_s", "frame_ang2", "current_pa"):
        bad = (~getattr(transitions, name).isfinite()).nonzero()
        if len(bad):
            raise DataError(f"Transitions.{name} must be finite; transition {int(bad[0, 0])} is not.")
    t, (low, high) = transitions, _BOND_RANGE_ANG
    first, last = t.window.unbind(1)
    length = t.bond_ang.norm(dim=-1)
    known = (first >= 0) & (first < last) & (last <= parts)
    idle = (t.part_s.sum(1) + t.frame_s) <= 0.0
    rules = {
        "part_s must not be negative": (t.part_s < 0.0).any(1),
        "frame_s must not be negative": t.frame_s < 0.0,
        "frame_ang2 must be positive": t.frame_ang2 <= 0.0,
        "current_pa must be positive": t.current_pa <= 0.0,
        f"bond_ang must be {low:g} to {high:g} Å long": ((length < low) | (length > high)).any(1),
        f"end must be {STAYED} to {BEYOND}": (t.end < STAYED) | (t.end > BEYOND),
        f"window must be -1, -1 or from, to with 0 <= from < to <= {parts}": ~known & ~((first == -1) & (last == -1)),
        "a dopant does not move without beam": idle & (t.end != STAYED),
    }
    for rule, broken in rules.items():
        if bool(broken.any()):
            row = int(broken.nonzero()[0, 0])
            raise DataError(f"Transitions: {rule}; transition {row} of {count} breaks this ({int(broken.sum())} do).")


def _check_shapes(transitions: Transitions) -> tuple[int, int]:
    """N and P. Raises DataError."""
    if transitions.part_s.ndim != 2:
        raise DataError(f"Transitions.part_s must be (N, P); given {tuple(transitions.part_s.shape)}.")
    count, parts = transitions.part_s.shape
    shapes = {"to_beam_ang": (count, parts, 2), "bond_ang": (count, 3, 2), "window": (count, 2)}
    for name in (item.name for item in fields(Transitions)):
        value, right = getattr(transitions, name), shapes.get(name, (count, parts) if name == "part_s" else (count,))
        whole = name in ("end", "window")
        if tuple(value.shape) != right or value.is_floating_point() == whole or (whole and value.dtype != torch.int64):
            kind = "int64" if whole else "of floats"
            raise DataError(f"Transitions.{name} must be {right} {kind}; given {tuple(value.shape)} {value.dtype}.")
    return count, parts


def double(transitions: Transitions) -> Transitions:
    """The same with 64-bit floats, which sums of many logarithms need."""
    values = {item.name: getattr(transitions, item.name) for item in fields(Transitions)}
    return Transitions(**{name: v.double() if v.is_floating_point() else v for name, v in values.items()})


def _filled(transitions: Transitions, most: int) -> dict[str, Tensor]:
    """The fields with parts of no time added up to `most`; the beam stays where it was."""
    values = {item.name: getattr(transitions, item.name) for item in fields(Transitions)}
    parts = transitions.part_s.shape[1]
    if most > parts:
        values["part_s"] = torch.nn.functional.pad(transitions.part_s, (0, most - parts))
        last = transitions.to_beam_ang[:, -1:].expand(-1, most - parts, -1)
        values["to_beam_ang"] = torch.cat((transitions.to_beam_ang, last), dim=1)
    return values
