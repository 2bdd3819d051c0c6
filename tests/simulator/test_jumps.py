"""Jump laws: each by hand at a few places, the integral of a map over a frame, turned and mirrored alike."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from stem_gym.core.streams import Streams
from stem_gym.simulator.jumps import (
    BOND_ANG,
    Aim,
    CrossSectionJumps,
    FrameAim,
    JumpLaw,
    JumpMap,
    LorentzianJumps,
    Range,
    exactly,
)

ROW = torch.tensor([0])
LAWS = [
    CrossSectionJumps(),
    LorentzianJumps(),
    JumpMap(anisotropy=exactly(1.4), floor_per_s=exactly(0.01), width_ang=exactly(0.5)),
]


def bonds(turn_rad: float = 0.0) -> Tensor:
    """(3, 2) from a site to its neighbours; the first along x."""
    angle = turn_rad + torch.arange(3) * (2.0 * math.pi / 3.0)
    return BOND_ANG * torch.stack((torch.cos(angle), torch.sin(angle)), dim=-1)


def aim(beam_ang: Tensor, bond_ang: Tensor, current_pa: float = 40.0) -> Aim:
    """Beams (S, 2) seen from one dopant; a probe whose density at distance d is exp(−d²)."""
    beam = beam_ang[None, :, None]
    distance = (beam.unsqueeze(3) - bond_ang[None, None, None]).norm(dim=-1)
    return Aim(
        beam, bond_ang[None, None], torch.exp(-(distance**2)), torch.tensor([6.2415e6 * current_pa]),
        torch.tensor([current_pa]),
    )  # fmt: skip


def rates(law: Any, beam_ang: list[tuple[float, float]] | Tensor, bond_ang: Tensor, **more: float) -> Tensor:
    """Jumps per second (S, 3) of one dopant with 2 barn."""
    where = aim(torch.as_tensor(beam_ang), bond_ang, **more)
    parameters = law.parameters(Streams([0]), ROW)
    return law.rates(parameters, where, torch.tensor([[2.0]]))[0, :, 0]


# By hand


def test_the_cross_section_law_by_hand():
    """At the carbon, at the dopant, and half-way: density × electrons per second × 2e-8 Å²."""
    seen = rates(CrossSectionJumps(), [(BOND_ANG, 0.0), (0.0, 0.0), (BOND_ANG / 2, 0.0)], bonds())
    per_density = 40.0 * 6.2415e6 * 2e-8
    assert seen[0, 0] == pytest.approx(per_density, rel=1e-4)
    assert seen[0, 1:].tolist() == pytest.approx([per_density * math.exp(-3.0 * BOND_ANG**2)] * 2, rel=1e-4)
    assert seen[1].tolist() == pytest.approx([per_density * math.exp(-(BOND_ANG**2))] * 3, rel=1e-4)
    assert seen[2, 0] == pytest.approx(per_density * math.exp(-(BOND_ANG**2) / 4.0), rel=1e-4)


def test_the_lorentzian_law_by_hand():
    """1 at the neighbour, 1/17 a bond away, 1/5 half a bond away; the other neighbours are √3 bonds from the first."""
    seen = rates(LorentzianJumps(), [(BOND_ANG, 0.0), (0.0, 0.0), (BOND_ANG / 2, 0.0)], bonds())
    assert seen[0].tolist() == pytest.approx([1.0, 1.0 / 49.0, 1.0 / 49.0], rel=1e-5)
    assert seen[1].tolist() == pytest.approx([1.0 / 17.0] * 3, rel=1e-5)
    assert seen[2].tolist() == pytest.approx([1.0 / 5.0, 1.0 / 29.0, 1.0 / 29.0], rel=1e-5)  # 4 √(7/4) = √28 bonds


def test_the_map_by_hand():
    """Peak 0.5 /s at 1.2 bonds, 0.4 Å wide, 0.6 Å across, floor 0.02 /s, at half of the reference current."""
    law = JumpMap(
        peak_per_s=exactly(0.5), centre_bonds=exactly(1.2), width_ang=exactly(0.4), anisotropy=exactly(1.5),
        floor_per_s=exactly(0.02), reference_pa=80.0,
    )  # fmt: skip
    top = 1.2 * BOND_ANG
    seen = rates(law, [(top, 0.0), (top - 0.4, 0.0), (top, 0.6), (top, -0.6), (-9.0, 0.0)], bonds())[:, 0]
    less = math.exp(-0.5)
    expected = [0.5 * (0.02 + 0.5 * part) for part in (1.0, less, less, less, 0.0)]
    assert seen.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_defaults_of_the_map_are_the_public_prior():
    """ln 2 / 3 = 0.231 /s at 0.85 bonds, 0.449 Å wide, at 0.1 nA."""
    seen = rates(JumpMap(), [(0.85 * BOND_ANG, 0.0), (0.85 * BOND_ANG, 0.449)], bonds(), current_pa=100.0)[:, 0]
    assert seen.tolist() == pytest.approx([0.23105, 0.23105 * math.exp(-0.5)], rel=1e-3)


@pytest.mark.parametrize("law", LAWS[::2], ids=lambda law: law.kind)
def test_no_current_no_jumps(law):
    seen = rates(law, [(BOND_ANG, 0.0)], bonds(), current_pa=0.0)
    assert seen.eq(0.0).all()


@pytest.mark.parametrize("law", LAWS[::2], ids=lambda law: law.kind)
def test_twice_the_current_twice_the_rate(law):
    beam = [(1.0, 0.3), (0.0, 0.0)]
    assert torch.allclose(rates(law, beam, bonds(), current_pa=80.0), 2.0 * rates(law, beam, bonds()))


# Turned and mirrored


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.kind)
def test_rates_turn_and_mirror_with_the_sheet_and_the_beam(law):
    beam = 2.0 * torch.rand(20, 2, generator=torch.Generator().manual_seed(0)) - 1.0
    expected = rates(law, beam, bonds(0.2))
    assert (expected.amax(0) > 2.0 * expected.amin(0)).all(), "places that differ"
    turn = torch.tensor([[math.cos(0.7), -math.sin(0.7)], [math.sin(0.7), math.cos(0.7)]])
    mirror = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    for change in (turn, mirror, turn @ mirror):
        assert torch.allclose(rates(law, beam @ change.T, bonds(0.2) @ change.T), expected, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(rates(law, beam @ mirror.T, bonds(0.2)), expected, rtol=0.05), "the beam alone"


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.kind)
def test_neighbours_are_alike(law):
    """A third of a turn of the beam moves the rates on by one neighbour."""
    turn = torch.tensor([[-0.5, -(0.75**0.5)], [0.75**0.5, -0.5]])
    beam = 2.0 * torch.rand(20, 2, generator=torch.Generator().manual_seed(1)) - 1.0
    moved = rates(law, beam @ turn.T, bonds(0.1))
    assert torch.allclose(moved, rates(law, beam, bonds(0.1)).roll(1, dims=1), rtol=1e-4, atol=1e-7)


# Frames


def frame(law: Any, seconds: float = 2.0, side_ang: float = 20.0, current_pa: float = 40.0) -> float:
    """Expected jumps to one neighbour in a frame, 2 barn."""
    one = torch.ones(1)
    dose = one * (6.2415e6 * current_pa * seconds / side_ang**2)
    where = FrameAim(torch.tensor([[2.0]]), one * seconds, one * side_ang**2, one * current_pa)
    return float(law.frame_jumps(law.parameters(Streams([0]), ROW), dose, where))


def test_a_frame_is_the_integral_of_the_rates_over_it():
    """A beam that visits every place of the frame alike: the mean rate over the frame × its time."""
    law = JumpMap(
        anisotropy=exactly(0.6), floor_per_s=exactly(0.001), width_ang=exactly(0.5), reference_pa=60.0
    )  # fmt: skip
    line = torch.arange(-10.0, 10.0, 0.05) + 0.025
    beam = torch.cartesian_prod(line, line)
    for neighbour in rates(law, beam, bonds(0.3)).T:
        assert frame(law) == pytest.approx(2.0 * float(neighbour.mean()), rel=1e-3)
    dose = 6.2415e6 * 40.0 * 2.0 / 400.0
    assert frame(CrossSectionJumps()) == pytest.approx(2e-8 * dose, rel=1e-5)
    assert frame(LorentzianJumps()) == 0.0, "in the toy, frames do not disturb"
    assert frame(law, current_pa=0.0) == frame(CrossSectionJumps(), current_pa=0.0) == 0.0


# Ranges


def test_a_range_is_drawn_evenly_or_evenly_in_the_logarithm():
    uniform = torch.tensor([0.0, 0.5, 1.0])
    assert Range(low=1.0, high=5.0).draw(uniform).tolist() == [1.0, 3.0, 5.0]
    assert Range(low=0.01, high=1.0, logarithmic=True).draw(uniform).tolist() == pytest.approx([0.01, 0.1, 1.0])
    assert exactly(0.7).draw(uniform).tolist() == pytest.approx([0.7] * 3)


def test_every_row_draws_its_own_map_within_the_ranges():
    law = JumpMap(
        peak_per_s=Range(low=0.03, high=1.0, logarithmic=True), centre_bonds=Range(low=0.8, high=1.5),
        width_ang=Range(low=0.3, high=0.6), anisotropy=Range(low=0.7, high=1.4), floor_per_s=Range(low=0.0, high=0.002),
    )  # fmt: skip
    drawn = law.parameters(Streams(range(500)), torch.arange(500))
    low, high = drawn.amin(0).tolist(), drawn.amax(0).tolist()
    ends = [(0.03, 1.0), (0.8 * BOND_ANG, 1.5 * BOND_ANG), (0.3, 0.6), (0.7, 1.4), (0.0, 0.002)]
    for (least, most), (bottom, top) in zip(zip(low, high, strict=True), ends, strict=True):
        assert bottom <= least < bottom + 0.02 * (top - bottom) and top - 0.02 * (top - bottom) < most <= top
    assert float((drawn[:, 0] < 0.173).float().mean()) == pytest.approx(0.5, abs=0.07), "half below the geometric mean"
    apart = torch.corrcoef(drawn.T) - torch.eye(5)
    assert apart.abs().max() < 0.15, "drawn apart from one another"
    some = torch.tensor([7, 3])
    assert torch.equal(law.parameters(Streams(range(500)), some), drawn[some])


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"low": 2.0, "high": 1.0}, "low <= high"),
        ({"low": 0.0, "high": 1.0, "logarithmic": True}, "low > 0"),
        ({"low": float("nan"), "high": 1.0}, "finite"),
    ],
)
def test_ranges_that_are_none_are_refused(given, why):
    with pytest.raises(ValidationError, match=why):
        Range(**given)


def test_maps_that_make_no_sense_are_refused():
    for name, value in {
        "peak_per_s": -0.1, "width_ang": 0.0, "anisotropy": -1.0, "centre_bonds": -0.1, "floor_per_s": -1e-3,
    }.items():  # fmt: skip
        with pytest.raises(ValidationError, match=f"{name} must"):
            JumpMap(**{name: Range(low=value, high=1.0)})
    with pytest.raises(ValidationError, match="reference_pa"):
        JumpMap(reference_pa=0.0)


def test_a_law_is_chosen_by_its_kind():
    adapter = TypeAdapter(JumpLaw)
    for law in LAWS:
        assert type(adapter.validate_python({"kind": law.kind})) is type(law)
    with pytest.raises(ValidationError, match="cross_section"):
        adapter.validate_python({"kind": "magic"})
