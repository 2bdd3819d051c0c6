"""A doped graphene sheet as sites of a lattice: what stands where, what surrounds dopants, what events do to it.

A sheet belongs to its owner: `apply` changes its buffers. Functions take the whole sheet and the rows that they are
for, so that nothing as wide as the lattice is copied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stem_gym.core.batch import write_rows
from stem_gym.core.periodic import nearest_image

CARBON, SILICON = 6, 14
# Events of a carbon beside a dopant, in the order of the last axis of the hazards below.
EXCHANGE, EJECTION, ROTATION, REVERSAL, REPLACEMENT = range(5)
BESIDE = 5
KNOCK_OUT, HEALING, CAPTURE = 5, 6, 7  # the others, in the same numbering
NOTHING, REFUSED = -1, -2


@dataclass(frozen=True)
class Beside:
    """The surroundings of the dopants: small tensors, kept so that the wide lattice is looked at after events alone."""

    dopant_ang: Tensor  # (B, D, 2)
    bond_ang: Tensor  # (B, D, 3, 2)
    atomic_number: Tensor  # (B, D) int64
    barn: Tensor  # (B, D, 5) for the side that it is raised to
    allowed: Tensor  # (B, D, 3, 5) 1 for the events that can happen to each neighbour, else 0; less under contamination


@dataclass
class Sheet:
    """Lattice sites of B rows, padded to K, with D slots for dopants and V for vacancies. Buffers of their owner."""

    cell_ang: Tensor  # (B, 2)
    xy_ang: Tensor  # (B, K, 2)
    neighbours: Tensor  # (B, K, 3) int64, own index where there are fewer
    atomic_number: Tensor  # (B, K) int64
    present: Tensor  # (B, K) bool
    dopant: Tensor  # (B, D) int64, site
    there: Tensor  # (B, D) bool
    raised: Tensor  # (B, D) bool, to the side that the beam drives carbon to: hidden from everybody
    rotated: Tensor  # (B, D) int64, 0 or 1 + the neighbour whose bond is turned
    vacancy: Tensor  # (B, V) int64, site
    open: Tensor  # (B, V) bool
    law: Tensor  # (B, P) parameters of the jump law
    barn: Tensor  # (B, D, 2, 5) cross sections of the events beside a dopant; far and near side
    energy: Tensor  # (B,) int64 which of the beam energies of the kinetics
    cover: Tensor  # (B, K) contamination over each site, in units of what holds a dopant; (B, 0) where there is none
    jumps: Tensor  # (B,) int64 so far
    lost: Tensor  # (B,) int64 carbon atoms knocked out so far
    edged: Tensor  # (B,) bool, whether any atom has ever been without a neighbour
    near: Beside


@dataclass(frozen=True)
class Event:
    """The next event of n rows; `kind` NOTHING where none comes, REFUSED where a candidate was not accepted."""

    kind: Tensor  # (n,) int64
    dopant: Tensor  # (n,) slot, for events beside a dopant
    neighbour: Tensor  # (n,) which of three
    site: Tensor  # (n,) of the vacancy made or filled, for the others
    segment: Tensor  # (n,) int64 in which part of the exposure
    share: Tensor  # (n,) how far into it


def beginning(rows: int, device: torch.device) -> Event:
    """The moment at which an exposure begins."""
    zero = torch.zeros(rows, dtype=torch.int64, device=device)
    return Event(zero + NOTHING, zero, zero, zero, zero, zero.float())


def look(sheet: Sheet, rows: Tensor) -> Beside:
    """What surrounds the dopants of `rows` (n,) now, found on the lattice."""
    row = rows[:, None]
    dopant = sheet.dopant[rows]
    neighbour = sheet.neighbours[row, dopant]  # (n, D, 3)
    place = sheet.xy_ang[row, dopant]
    bond = nearest_image(
        sheet.xy_ang[rows[:, None, None], neighbour] - place.unsqueeze(2), sheet.cell_ang[rows][:, None, None]
    )
    present = sheet.present[rows[:, None, None], neighbour] & (neighbour != dopant.unsqueeze(2))
    carbon = present & (sheet.atomic_number[rows[:, None, None], neighbour] == CARBON)
    there, rotated = sheet.there[rows].unsqueeze(2), sheet.rotated[rows].unsqueeze(2)
    free = carbon & there & (rotated == 0)
    threefold = free & present.all(2, keepdim=True)
    turned = carbon & there & (rotated == torch.arange(1, 4, device=rows.device))
    allowed = torch.stack((threefold, free, threefold, turned, threefold), dim=-1)
    side = sheet.raised[rows].long()[:, :, None, None].expand(-1, -1, 1, BESIDE)
    number = sheet.atomic_number[row, dopant]
    allowed = allowed.float()
    if sheet.cover.shape[1]:
        allowed = allowed * torch.exp(-sheet.cover[row, dopant])[:, :, None, None]
    return Beside(place, bond, number, sheet.barn[rows].gather(2, side).squeeze(2), allowed)


def apply(sheet: Sheet, rows: Tensor, event: Event, silicon_barn: Tensor) -> None:
    """Change the buffers of `rows` (n,) as the events say; silicon that is caught gets `silicon_barn` (E, 2, 5)."""
    happens = event.kind >= 0
    if not bool(happens.any()):
        return
    here = happens.nonzero().squeeze(1)
    row, kind, slot = rows[here], event.kind[here], event.dopant[here]
    dopant = sheet.dopant[row, slot]
    partner = sheet.neighbours[row, dopant, event.neighbour[here]]
    _beside_happens(sheet, row, kind, slot, (dopant, partner, event.neighbour[here]))
    gone = (kind == EJECTION) | (kind == KNOCK_OUT)
    struck = torch.where(kind == EJECTION, partner, event.site[here])
    _make_vacancies(sheet, row[gone], struck[gone])
    filled = (kind == HEALING) | (kind == CAPTURE)
    _fill(sheet, row[filled], event.site[here][filled], kind[filled] == CAPTURE, silicon_barn)
    write_rows(sheet.near, row, look(sheet, row))


def _beside_happens(
    sheet: Sheet, row: Tensor, kind: Tensor, slot: Tensor, sites: tuple[Tensor, Tensor, Tensor]
) -> None:
    dopant, partner, neighbour = sites
    jumps = kind == EXCHANGE
    r, s, d, c = row[jumps], slot[jumps], dopant[jumps], partner[jumps]
    sheet.atomic_number[r, c] = sheet.atomic_number[r, d]
    sheet.atomic_number[r, d] = CARBON
    sheet.dopant[r, s] = c
    sheet.raised[r, s] = ~sheet.raised[r, s]  # it comes out on the other side of the sheet
    sheet.jumps[r] += 1
    turns = kind == ROTATION
    sheet.rotated[row[turns], slot[turns]] = 1 + neighbour[turns]
    back = kind == REVERSAL
    sheet.rotated[row[back], slot[back]] = 0
    replaced = kind == REPLACEMENT
    sheet.atomic_number[row[replaced], dopant[replaced]] = CARBON
    sheet.there[row[replaced], slot[replaced]] = False


def _make_vacancies(sheet: Sheet, row: Tensor, site: Tensor) -> None:
    """Take the carbon at `site` (m,) away; where all slots are taken the count goes on without a place to heal."""
    sheet.present[row, site] = False
    slot = (~sheet.open[row]).float().argmax(1)
    free = ~sheet.open[row, slot]
    sheet.vacancy[row[free], slot[free]] = site[free]
    sheet.open[row[free], slot[free]] = True
    sheet.lost[row] += 1
    sheet.edged[row] = True


def _fill(sheet: Sheet, row: Tensor, site: Tensor, with_silicon: Tensor, silicon_barn: Tensor) -> None:
    sheet.present[row, site] = True
    sheet.atomic_number[row, site] = torch.where(with_silicon, SILICON, CARBON)
    slot = (sheet.open[row] & (sheet.vacancy[row] == site.unsqueeze(1))).float().argmax(1)
    sheet.open[row, slot] = False
    r, s = row[with_silicon], site[with_silicon]
    new = (~sheet.there[r]).float().argmax(1)
    sheet.dopant[r, new], sheet.there[r, new], sheet.rotated[r, new] = s, True, 0
    sheet.barn[r, new] = silicon_barn[sheet.energy[r]]
