"""Hydrocarbons that the beam cracks and pins to the sheet: they thicken where it stays.

Thickness is kept at the lattice sites, in layers of as many carbon atoms as the sheet has. It grows in proportion to
the dose at the site and, more slowly, with time. What it does is in three places: a dopant below it is held fast (the
events beside it become rarer by exp(−layers / pin_layers)), one below too much of it is seen no longer, and its atoms
scatter as those of the sheet do, which frames and traces show as haze. Growth during an exposure is booked at its end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stem_gym.core.batch import write_rows
from stem_gym.core.periodic import nearest_image
from stem_gym.core.units import ELECTRONS_PER_PC
from stem_gym.simulator.event_rates import Contamination
from stem_gym.simulator.flux import density_at
from stem_gym.simulator.kinetics import Beam, Frame
from stem_gym.simulator.sheet import Sheet, look


def dose_in_dwell(sheet: Sheet, rows: Tensor, beam: Beam, used: Tensor) -> Tensor:
    """Electrons per Å² at the sites (n, K) of `rows` (n,) in the first `used` (n,) parts of a dwell."""
    dose = torch.zeros_like(sheet.cover[rows])
    place, cell = sheet.xy_ang[rows], sheet.cell_ang[rows].unsqueeze(1)
    for part in range(beam.part_s.shape[1]):  # a part at a time: sites times parts are many
        away = nearest_image(place - beam.path_ang[:, part : part + 1], cell).norm(dim=-1)
        electrons = beam.current_pa * beam.part_s[:, part] * (part < used) * ELECTRONS_PER_PC
        dose += density_at(beam.density, away) * electrons.unsqueeze(1)
    return dose


def dose_in_frame(sheet: Sheet, rows: Tensor, frame: Frame) -> Tensor:
    """Electrons per Å² at the sites (n, K) of `rows` (n,) in a frame: its own dose inside it."""
    part = nearest_image(sheet.xy_ang[rows] - frame.centre_ang.unsqueeze(1), sheet.cell_ang[rows].unsqueeze(1))
    inside = (part.abs() <= 0.5 * frame.size_ang.unsqueeze(1)).all(-1)
    return inside * frame.dose_e_per_ang2.unsqueeze(1)


def grow(model: Contamination, sheet: Sheet, rows: Tensor, seconds: Tensor, dose_e_per_ang2: Tensor | None) -> Tensor:
    """Thicken the layers of `rows` (n,) after `seconds` (n,) and a dose (n, K); gives the growth (n, K) in layers."""
    growth = (model.layers_per_s * seconds).unsqueeze(1).expand(-1, sheet.cover.shape[1])
    if dose_e_per_ang2 is not None:
        growth = growth + model.layers_per_dose * dose_e_per_ang2
    sheet.cover[rows] += growth / model.pin_layers
    write_rows(sheet.near, rows, look(sheet, rows))
    return growth


def layers_over_dopants(model: Contamination, sheet: Sheet, rows: Tensor) -> Tensor:
    """Layers (n, D) over the dopants of `rows` (n,)."""
    return model.pin_layers * sheet.cover[rows.unsqueeze(1), sheet.dopant[rows]]


def layers_under_probe(model: Contamination, sheet: Sheet, rows: Tensor, path_ang: Tensor, density: Tensor) -> Tensor:
    """Layers (n, J) that the probe sees at places (n, J, 2): their mean, weighted by its density at the sites."""
    cell = sheet.cell_ang[rows][:, None, None]
    away = nearest_image(path_ang.unsqueeze(2) - sheet.xy_ang[rows].unsqueeze(1), cell).norm(dim=-1)  # (n, J, K)
    weight = density_at(density, away) * (sheet.atomic_number[rows] > 0).unsqueeze(1)
    total = weight.sum(2).clamp(min=1e-30)
    return model.pin_layers * (weight * sheet.cover[rows].unsqueeze(1)).sum(2) / total
