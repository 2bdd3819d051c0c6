"""What contamination does in the column of a doped sheet: it grows under the beam, and frames and traces show it."""

from __future__ import annotations

import torch
from torch import Tensor

from stem_gym.instruments.sheet_rows import SheetRows
from stem_gym.simulator import contamination
from stem_gym.simulator.event_rates import Contamination
from stem_gym.simulator.jumps import BOND_ANG
from stem_gym.simulator.kinetics import Beam, Frame
from stem_gym.simulator.pictures import Pictures
from stem_gym.simulator.sheet import CARBON

ATOMS_PER_ANG2 = 4.0 / (3.0 * 3.0**0.5 * BOND_ANG**2)  # of graphene
_SPREAD_ANG = 1.0  # of its atoms about the sites that the thickness is kept at: no lattice is seen in it


class Haze:
    """Books the growth of contamination on the rows of a column; does nothing where the model is None."""

    def __init__(self, model: Contamination | None, pictures: Pictures | None) -> None:
        self._model, self._pictures = model, pictures

    def after_frame(self, state: SheetRows, rows: Tensor, frame: Frame) -> None:
        """Growth by the dose of a frame; its time is booked by `after_time`."""
        if self._model is not None:
            self._grow(state, rows, 0.0 * frame.seconds, contamination.dose_in_frame(state.sheet, rows, frame))

    def after_dwell(self, state: SheetRows, rows: Tensor, beam: Beam, used: Tensor) -> None:
        """Growth by the dose of the first `used` (n,) parts of a dwell; its time is booked by `after_time`."""
        if self._model is not None:
            dose = contamination.dose_in_dwell(state.sheet, rows, beam, used)
            self._grow(state, rows, torch.zeros_like(beam.current_pa), dose)

    def after_time(self, state: SheetRows, rows: Tensor, seconds: Tensor) -> None:
        """Growth that needs no beam."""
        if self._model is not None and self._model.layers_per_s > 0.0:
            self._grow(state, rows, seconds, None)

    def in_sight(self, state: SheetRows, rows: Tensor) -> Tensor:
        """Which dopants (n, D) of `rows` (n,) a frame can show."""
        there = state.sheet.there[rows]
        if self._model is None:
            return there
        over = contamination.layers_over_dopants(self._model, state.sheet, rows)
        return there & (over <= self._model.buried_layers)

    def in_trace(self, state: SheetRows, rows: Tensor, beam: Beam) -> Tensor | float:
        """What it adds to the collected fraction, (n, J)."""
        if self._model is None:
            return 0.0
        seen = contamination.layers_under_probe(self._model, state.sheet, rows, beam.path_ang, state.signal[rows])
        return ATOMS_PER_ANG2 * state.weight_ang2[rows, CARBON].unsqueeze(1) * seen

    def _grow(self, state: SheetRows, rows: Tensor, seconds: Tensor, dose: Tensor | None) -> None:
        if self._model is None:
            return
        sheet = state.sheet
        growth = contamination.grow(self._model, sheet, rows, seconds, dose)
        if self._pictures is not None:
            sites = torch.arange(growth.shape[1], device=rows.device).expand(len(rows), -1)
            change = growth * state.weight_ang2[rows, CARBON].unsqueeze(1) * (sheet.atomic_number[rows] > 0)
            mended = self._pictures.change(sheet, rows, sites, change, state.transfer[rows], _SPREAD_ANG)
            state.series.index_add_(0, rows, mended)
