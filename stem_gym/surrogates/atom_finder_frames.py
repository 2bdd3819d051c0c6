"""Simulated frames of doped graphene with the truth about their atoms: what the atom finder is trained and judged on.

A frame is made as the simulated microscope makes it: expected image of a periodic specimen, drift within the frame,
scan distortion, line jitter, Poisson counts, calibrated back to a collected fraction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stem_gym.core.periodic import nearest_image
from stem_gym.core.streams import Streams
from stem_gym.core.units import ELECTRONS_PER_PC
from stem_gym.simulator import imaging
from stem_gym.simulator.detectors import DetectorModel, detect, expected_electrons, line_jitter_ang
from stem_gym.simulator.drift import DriftModel, advance, frame_time_s, start_drift
from stem_gym.simulator.exposure import displacement_of_rows, pixel_centres
from stem_gym.simulator.optics import Optics, transfer_function
from stem_gym.simulator.specimens import Contamination, Dopant, GrapheneRecipe, Specimen
from stem_gym.surrogates.atom_finder import Kind
from stem_gym.surrogates.spots import distances

__all__ = ["Conditions", "Frames", "draw_conditions", "kind_of", "plain_conditions", "simulate_frames"]

_KNOTS = 8  # drift is drawn at so many times of a frame
_CELL_MARGIN_ANG = 8.0  # the cell is so much larger than the field, so that no atom is seen twice
_CELL_STEP_ANG = 6.0  # few different cells, since their supercells are searched once and kept
_NEIGHBOUR_ANG = 1.7  # bonded carbon atoms are nearer than this
_CARBON = 6


@dataclass(frozen=True)
class Conditions:
    """How a batch of frames is taken: one field and one shape, the rest by row."""

    recipe: GrapheneRecipe
    drift: DriftModel
    detector: DetectorModel
    fov_ang: float
    pixels: int
    optics: Optics  # of B rows
    current_pa: Tensor  # (B,)
    frame_s: Tensor  # (B,) without flyback

    @property
    def rows(self) -> int:
        """B."""
        return len(self.current_pa)


@dataclass(frozen=True)
class Frames:
    """B frames, and what is to be found in them; places are in pixels (x, y), entries are padded to K."""

    fraction: Tensor  # (B, H, W) collected fraction
    pixel_ang: Tensor  # (B,)
    electrons_per_pixel: Tensor  # (B,)
    xy: Tensor  # (B, K, 2) where each atom was when the beam passed it
    kind: Tensor  # (B, K) int64
    weight: Tensor  # (B, K) cross section over that of carbon; 0 for a vacancy
    present: Tensor  # (B, K) bool: there, and inside the frame

    def rows(self, index: Tensor | slice) -> Frames:
        """The frames of the rows in `index`."""
        return Frames(*(getattr(self, f.name)[index] for f in fields(self)))


def kind_of(atomic_number: Tensor) -> Tensor:
    """The kind that atoms of these numbers are told as; same shape, int64."""
    kind = torch.full_like(atomic_number, int(Kind.HEAVY))
    kind[atomic_number <= 20] = int(Kind.SILICON)
    kind[atomic_number <= 10] = int(Kind.CARBON)
    return kind


def plain_conditions(
    rows: int, fov_ang: float = 25.0, pixels: int = 64, current_pa: float = 40.0, frame_s: float = 2.0, **probe: Any
) -> Conditions:
    """The usual frame of silicon in graphene at 60 keV: two to six Si, vacancies, contamination, drift 0.25 Å/s."""
    recipe = GrapheneRecipe(
        cell_ang=_cell_ang(fov_ang),
        dopants=(Dopant(element="Si", count_min=2, count_max=6, window_ang=fov_ang),),
        separation_ang=2.0,
        vacancies_max=2,
        contamination=Contamination(blobs_max=2),
    )
    optics = Optics.of(rows, focal_spread_ang=10.0, **probe)
    drift = DriftModel(speed_ang_per_s=0.25, correlation_s=20.0, scale_error=0.002, shear_error=0.002)
    detector = DetectorModel(line_jitter_ang=0.03, flyback_s=60e-6)
    current, seconds = torch.full((rows,), current_pa), torch.full((rows,), frame_s)
    return Conditions(recipe, drift, detector, fov_ang, pixels, optics, current, seconds)


def draw_conditions(rng: np.random.Generator, rows: int) -> Conditions:
    """Randomised conditions, wider than what the finder is asked for: fields, doses, optics, specimens, drift."""
    fov_ang = float(rng.uniform(12.0, 31.0))

    def between(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, rows).astype(np.float32))

    optics = Optics.of(
        rows,
        energy_kev=between(58.0, 102.0),
        convergence_mrad=between(30.0, 36.0),
        defocus_ang=torch.from_numpy(rng.uniform(-42.0, 42.0, rows) * rng.uniform(0.0, 1.0, rows)).float(),
        astigmatism_ang=between(0.0, 15.0),
        astigmatism_angle_rad=between(0.0, np.pi),
        focal_spread_ang=between(0.0, 20.0),
        source_fwhm_ang=between(0.5, 0.95),
    )
    drift = DriftModel(
        speed_ang_per_s=float(rng.uniform(0.0, 0.5)),
        correlation_s=20.0,
        diffusion_ang2_per_s=float(rng.uniform(0.0, 0.004)),
        scale_error=0.01,
        shear_error=0.01,
    )
    detector = DetectorModel(
        line_jitter_ang=float(rng.uniform(0.0, 0.1)), flyback_s=60e-6, dark_electrons_per_s=float(rng.uniform(0, 400))
    )
    frame_s = torch.exp(between(np.log(0.4), np.log(4.5)))
    pixels = int(rng.choice([64, 64, 80, 96, 128]))
    return Conditions(
        _draw_recipe(rng, fov_ang), drift, detector, fov_ang, pixels, optics, between(18.0, 65.0), frame_s
    )


def _cell_ang(fov_ang: float) -> float:
    return _CELL_STEP_ANG * math.ceil((fov_ang + _CELL_MARGIN_ANG) / _CELL_STEP_ANG)


def _draw_recipe(rng: np.random.Generator, fov_ang: float) -> GrapheneRecipe:
    """A sheet with silicon and other dopants, spread or crowded, vacancies, edges and blobs."""
    crowded = bool(rng.random() < 0.3)
    window = 9.0 if crowded else fov_ang + 2.0
    dopants = [Dopant(element="Si", count_min=0, count_max=6, window_ang=window)]
    for element in rng.choice(["N", "P", "Al", "S", "Ge", "Cu"], 3, replace=False):
        dopants.append(Dopant(element=str(element), count_max=2, count_min=0, window_ang=fov_ang + 2.0))
    separation = float(rng.choice([0.0, 2.0, 4.0]))
    return GrapheneRecipe(
        cell_ang=_cell_ang(fov_ang),
        dopants=tuple(dopants),
        separation_ang=separation,
        vacancies_max=int(rng.integers(0, 9)),
        edge_probability=0.15,
        contamination=Contamination(blobs_max=4, sigma_min_ang=2.0, atoms_max=60.0),
    )


def simulate_frames(conditions: Conditions, streams: Streams) -> Frames:
    """One frame for each row of `streams`, of a fresh specimen, with the truth."""
    rows = torch.arange(conditions.rows)
    c, specimen = conditions, conditions.recipe.build(streams, torch.arange(conditions.rows))
    shape = (c.pixels, c.pixels)
    dwell_s = c.frame_s / c.pixels**2
    seconds = frame_time_s(shape, dwell_s, c.detector.flyback_s)
    state = start_drift(c.drift, streams, rows)
    path, _ = advance(c.drift, state, (seconds / _KNOTS)[:, None].expand(-1, _KNOTS), streams, rows)
    knots = torch.cat((state.offset_ang[:, None], path), dim=1)
    moved = displacement_of_rows(knots, c.pixels)  # (B, H, 2) the sample under the scan
    wanted = (pixel_centres(c.pixels, moved.device) - 0.5) * c.fov_ang
    skew = state.distortion
    lean = skew[:, 0, 1:] * wanted  # (B, H)
    shift = torch.stack((lean, torch.zeros_like(lean)), dim=-1) - moved
    jitter = line_jitter_ang(streams, rows, c.pixels, c.detector)
    x, y = skew[:, 0, :1] * wanted, skew[:, 1, 1:] * wanted
    series = _expected_series(specimen, c)
    fraction = imaging.scan_image(series, specimen.cell_ang, x, y, shift + jitter)
    counts = detect(expected_electrons(fraction, c.current_pa, dwell_s, c.detector), streams, rows, c.detector)
    electrons = c.current_pa * dwell_s * ELECTRONS_PER_PC
    xy, kind, weight, there = _entries(specimen, c)
    places = _places_in_frame(xy, x, y, shift)
    inside = ((places > -0.5) & (places < c.pixels - 0.5)).all(-1)
    pixel_ang = torch.full((c.rows,), c.fov_ang / c.pixels)
    return Frames(counts / electrons[:, None, None], pixel_ang, electrons, places, kind, weight, there & inside)


def _expected_series(specimen: Specimen, conditions: Conditions) -> Tensor:
    """The expected image of every specimen as a real series."""
    optics, detector = conditions.optics, conditions.detector
    cutoff = float(optics.band_limit_per_ang.max())
    harmonics = imaging.Harmonics.within(conditions.recipe.largest_cell_ang, cutoff)
    weight = imaging.atom_weights_ang2(specimen, optics.energy_kev, detector.inner_mrad, detector.outer_mrad)
    structure = imaging.structure_coefficients(specimen, weight, harmonics)
    transfer = transfer_function(optics, *harmonics.frequencies(specimen.cell_ang))
    return imaging.real_series(imaging.image_coefficients(structure, transfer))


def _entries(specimen: Specimen, conditions: Conditions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Places about the frame's centre (B, K, 2) in Å, kinds, weights and presence (B, K) of atoms and vacancies.

    A vacancy is an empty site with three neighbours; what an edge lacks is none.
    """
    xy = nearest_image(specimen.xy_ang, specimen.cell_ang[:, None])
    energy, detector = conditions.optics.energy_kev, conditions.detector
    section = imaging.atom_weights_ang2(specimen, energy, detector.inner_mrad, detector.outer_mrad)
    carbon = imaging.haadf_cross_section_ang2(
        torch.full_like(specimen.atomic_number[:, :1], _CARBON),
        energy[:, None],
        detector.inner_mrad,
        detector.outer_mrad,
    )
    near = (distances(xy, xy) < _NEIGHBOUR_ANG) & specimen.present[:, None]
    empty = ~specimen.present & (specimen.atomic_number > 0) & (near.sum(2) == 3)
    kind = torch.where(empty, int(Kind.VACANCY), kind_of(specimen.atomic_number))
    return xy, kind, section / carbon, specimen.present | empty


def _places_in_frame(xy_ang: Tensor, x_ang: Tensor, y_ang: Tensor, shift_ang: Tensor) -> Tensor:
    """Pixels (B, K, 2) at which atoms (B, K, 2) are met by a scan of columns x (B, W) and rows y (B, H).

    Each row of the scan is shifted by `shift_ang` (B, H, 2). The row that meets an atom depends on the shift, and the
    shift on the row: four rounds settle it, since the sample moves far less than the scan.
    """
    height = y_ang.shape[1]
    step_x, step_y = x_ang[:, 1:2] - x_ang[:, :1], y_ang[:, 1:2] - y_ang[:, :1]
    row = (xy_ang[..., 1] - y_ang[:, :1]) / step_y
    there = torch.zeros_like(xy_ang)
    for _ in range(4):
        low = row.floor().clamp(0, height - 2)
        share = (row.clamp(0, height - 1) - low).unsqueeze(-1)
        index = low.long().unsqueeze(-1).expand(-1, -1, 2)
        there = shift_ang.gather(1, index) * (1.0 - share) + shift_ang.gather(1, index + 1) * share
        row = (xy_ang[..., 1] - there[..., 1] - y_ang[:, :1]) / step_y
    column = (xy_ang[..., 0] - there[..., 0] - x_ang[:, :1]) / step_x
    return torch.stack((column, row), dim=-1)
