"""Pictures of a sheet that changes: its expected HAADF image as a Fourier series, mended where an atom moved."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stem_gym.core.batch import rows_where, write_sum
from stem_gym.simulator import imaging
from stem_gym.simulator.exposure import Raster
from stem_gym.simulator.optics import Optics, transfer_function
from stem_gym.simulator.sheet import Event, Sheet
from stem_gym.simulator.specimens import GrapheneRecipe, Specimen


class Pictures:
    """Makes and mends the series of the rows of a batch; `weight_ang2` (Z,) are cross sections by atomic number."""

    def __init__(self, recipe: GrapheneRecipe, optics: Optics, weight_ang2: Tensor) -> None:
        self._optics = optics.rows(torch.zeros(1, dtype=torch.int64, device=weight_ang2.device))
        self._weight_ang2, self._sigma_ang = weight_ang2, recipe.thermal_sigma_ang
        self._harmonics = imaging.Harmonics.within(recipe.largest_cell_ang, float(optics.band_limit_per_ang[0]))

    def start(self, specimen: Specimen, defocus_ang: Tensor) -> tuple[Tensor, Tensor]:
        """Series (n, 2 N, 2 N) and transfer function (n, Ny, Nx) of fresh specimens at defoci (n,)."""
        count = len(defocus_ang)
        optics = self._optics.rows(torch.zeros(count, dtype=torch.int64, device=defocus_ang.device))
        frequencies = self._harmonics.frequencies(specimen.cell_ang)
        transfer = transfer_function(replace(optics, defocus_ang=defocus_ang), *frequencies)
        weight = self._weight_ang2[specimen.atomic_number] * specimen.present
        structure = imaging.structure_coefficients(specimen, weight, self._harmonics)
        return imaging.real_series(imaging.image_coefficients(structure, transfer)), transfer

    def touched(self, sheet: Sheet, rows: Tensor, event: Event) -> Tensor:
        """The two sites (n, 2) that an event may change: the dopant's, and the partner's or that of the vacancy."""
        dopant = sheet.dopant[rows].gather(1, event.dopant.unsqueeze(1)).squeeze(1)
        beside = sheet.neighbours[rows, dopant, event.neighbour]
        return torch.stack((dopant, torch.where(event.kind >= 5, event.site, beside)), dim=1)

    def weights(self, sheet: Sheet, rows: Tensor, sites: Tensor) -> Tensor:
        """Cross sections (n, 2) of what stands at the sites (n, 2)."""
        row = rows.unsqueeze(1)
        return self._weight_ang2[sheet.atomic_number[row, sites]] * sheet.present[row, sites]

    def change(
        self,
        sheet: Sheet,
        rows: Tensor,
        sites: Tensor,
        change_ang2: Tensor,
        transfer: Tensor,
        sigma_ang: float | None = None,
    ) -> Tensor:
        """What cross sections that changed by (n, S) at sites (n, S) add to the series of `rows` (n,).

        `transfer` are their transfer functions; `sigma_ang` is the spread of the scatterers, by default of vibrations.
        """
        place = sheet.xy_ang[rows.unsqueeze(1), sites]
        sigma = torch.full_like(change_ang2, self._sigma_ang if sigma_ang is None else sigma_ang)
        structure = imaging.scatterer_coefficients(sheet.cell_ang[rows], place, change_ang2, sigma, self._harmonics)
        return imaging.real_series(structure * transfer)

    def mend(self, series: Tensor, sheet: Sheet, rows: Tensor, before: tuple[Tensor, Tensor], transfer: Tensor) -> None:
        """Mend the series (B, 2 N, 2 N) in place where atoms of `rows` (n,) have changed since.

        `before` are the atomic numbers and presence (n, K) of these rows then; transfer functions are (B, Ny, Nx).
        """
        number, present = before
        other = (sheet.atomic_number[rows] != number) | (sheet.present[rows] != present)
        here = rows_where(other.any(1))
        if len(here) == 0:
            return
        which, most = rows[here], int(other.sum(1).amax())
        sites = other[here].float().topk(most, dim=1).indices  # where fewer have changed, some that have not
        then = self._weight_ang2[number[here].gather(1, sites)] * present[here].gather(1, sites)
        change = self.weights(sheet, which, sites) - then
        write_sum(series, which, self.change(sheet, which, sites, change, transfer[which]))

    @staticmethod
    def frame(series: Tensor, cell_ang: Tensor, places: Raster) -> Tensor:
        """Expected collected fraction (n, H, W)."""
        return imaging.scan_image(series, cell_ang, places.x_ang, places.y_ang, places.shift_ang)
