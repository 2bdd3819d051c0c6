"""What a column with a doped sheet keeps of each row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stem_gym.instruments.column import ColumnRows
from stem_gym.simulator.sheet import Sheet


@dataclass
class SheetRows(ColumnRows):
    """Everything that belongs to a row."""

    sheet: Sheet
    beam_shift_ang: Tensor  # (B, 2) as set; the drift's displacement counts it already
    energy_kev: Tensor  # (B,)
    defocus_ang: Tensor  # (B,)
    density: Tensor  # (B, R) flux table of the probe
    signal: Tensor  # (B, R) the same, as wide as an atom scatters
    weight_ang2: Tensor  # (B, Z) collected by the detector, by atomic number
    seen_ang: Tensor  # (B, 2) the sample's displacement when the last frame ended
    series: Tensor  # (B, 2 N, 2 N) the expected picture as a real series; (B, 0) where there are no pictures
    transfer: Tensor  # (B, Ny, Nx) or (B, 0)
