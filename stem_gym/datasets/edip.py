"""The EDIP potential for silicon carbide, which describes silicon in graphene: energy and forces of one system.

    E = Σᵢ [ Σⱼ φ₂(rᵢⱼ, Zᵢ) + Σⱼ₍ₖ φ₃(rᵢⱼ, rᵢₖ, cos θⱼᵢₖ, Zᵢ) ]
    φ₂ = A [(B/r)^ρ − exp(−β Z²)] exp(σ/(r − a))
    φ₃ = exp(γ/(rᵢⱼ − a)) exp(γ/(rᵢₖ − a)) λ [1 − exp(−Q (cos θ + τ)²) + η Q (cos θ + τ)²]
    Q = Q₀ exp(−μ Z),  τ = u₁ + u₂ [u₃ exp(−u₄ Z) − exp(−2 u₄ Z)]
    Z = Σⱼ f(rᵢⱼ),  f = 1 below c, 0 above a, exp(α/(1 − x⁻³)) with x = (r − c)/(a − c) between

Form: Bazant, Kaxiras and Justo, Phys. Rev. B 56, 8542 (1997); Justo et al., Phys. Rev. B 58, 2539 (1998). Parameters
for Si, C and SiC: Jiang, Morgan and Szlufarska, Phys. Rev. B 86, 144118 (2012), as distributed with LAMMPS for its
`pair_style edip/multi` (SiC.edip), which is the check: see benchmarks/recoil.py.
"""

from __future__ import annotations

import numpy as np

from stem_gym.core.errors import ConfigError
from stem_gym.datasets import edip_kernels

__all__ = ["ATOMIC_NUMBERS", "LARGEST_CUTOFF_ANG", "TABLES", "energy_and_forces", "kinds_of", "new_scratch"]

ATOMIC_NUMBERS = (6, 14)  # in the order of the tables
MOST_NEIGHBOURS = 32

# A (eV), B (Å), a (Å), c (Å), α, β, ρ, σ (Å), γ (Å)
_CC = (10.222599, 0.959814, 2.212263, 1.741598, 1.962090, 0.025661, 2.827634, 0.536561, 1.084183)
_SIC = (7.535967, 1.177019, 2.534972, 1.973974, 2.507738, 0.015347, 2.061835, 0.423863, 1.191567)
_SISI = (5.488043, 1.446435, 2.941586, 2.540193, 3.066580, 0.008593, 1.343679, 0.298443, 1.135256)
PAIRS = np.array([[_CC, _SIC], [_SIC, _SISI]])  # (2, 2, 9)

# λ (eV), η, μ, Q₀ by the atom in the middle and its two partners
_C_CC = (3.633621, 0.275605, 0.594236, 289.305617)
_C_CSI = (3.329590, 0.354051, 0.602960, 269.210350)
_MEAN = (3.025559, 0.432497, 0.611684, 249.115082)  # C between two Si, and Si between two C
_SI_CSI = (2.721528, 0.510944, 0.620407, 229.019815)
_SI_SISI = (2.417497, 0.589390, 0.629131, 208.924548)
TRIPLES = np.array(
    [[[_C_CC, _C_CSI], [_C_CSI, _MEAN]], [[_MEAN, _SI_CSI], [_SI_CSI, _SI_SISI]]]
)  # (2, 2, 2, 4) middle, partner, partner

ANGLE = np.array([-0.165799, 32.557, 0.286198, 0.66])  # u₁ … u₄, Ismail and Kaxiras (1993), for all elements
TABLES = (PAIRS, TRIPLES, ANGLE)
CUTOFFS_ANG = np.ascontiguousarray(PAIRS[..., 2])  # (2, 2)
LARGEST_CUTOFF_ANG = float(CUTOFFS_ANG.max())


def kinds_of(atomic_number: np.ndarray) -> np.ndarray:
    """Rows of the tables (N,) for atomic numbers (N,). Raises ConfigError for other elements than C and Si."""
    numbers = np.asarray(atomic_number)
    foreign = sorted(set(numbers.tolist()) - set(ATOMIC_NUMBERS))
    if foreign:
        raise ConfigError(f"EDIP for SiC knows carbon (6) and silicon (14); given the atomic numbers {foreign}.")
    return (numbers == ATOMIC_NUMBERS[1]).astype(np.int64)


def new_list(atoms: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An empty list of neighbours."""
    counts = np.zeros((2, atoms), dtype=np.int64)
    return np.zeros((atoms, MOST_NEIGHBOURS), dtype=np.int64), counts[0], counts[1]


def new_scratch(atoms: int) -> tuple[np.ndarray, ...]:
    """Work space of the kernels."""
    return (
        np.zeros((atoms, MOST_NEIGHBOURS, edip_kernels.BOND_COLUMNS)),
        np.zeros((atoms, MOST_NEIGHBOURS), dtype=np.int64),
        np.zeros(atoms, dtype=np.int64),
        np.zeros(atoms),
        np.zeros((MOST_NEIGHBOURS, 3)),
    )


def energy_and_forces(
    positions_ang: np.ndarray, atomic_number: np.ndarray, cell_ang: np.ndarray
) -> tuple[float, np.ndarray]:
    """Potential energy in eV and forces (N, 3) in eV/Å of atoms at positions (N, 3) on a cell (2,) periodic in x and y.

    Raises ConfigError for a cell too small for its atoms to be counted once, and MissingExtraError without numba.
    """
    positions, cell = np.ascontiguousarray(positions_ang, dtype=np.float64), np.asarray(cell_ang, dtype=np.float64)
    check_system(positions, cell)
    kinds = kinds_of(atomic_number)
    near, forces = new_list(len(kinds)), np.zeros_like(positions)
    if not edip_kernels.list_neighbours(positions, kinds, cell, CUTOFFS_ANG, near, np.zeros_like(positions)):
        raise ConfigError(f"An atom has more than {MOST_NEIGHBOURS} neighbours within its cutoff.")
    energy = edip_kernels.energy_forces(positions, kinds, cell, near, TABLES, new_scratch(len(kinds)), forces)
    return float(energy), forces


def check_system(positions: np.ndarray, cell: np.ndarray) -> None:
    """Raises ConfigError unless positions are a finite (N, 3) and the cell holds an atom's neighbours only once."""
    if positions.ndim != 2 or positions.shape[1] != 3 or not np.isfinite(positions).all():
        raise ConfigError(f"Positions must be finite numbers of shape (N, 3); given shape {positions.shape}.")
    if cell.shape != (2,) or not (cell > 2 * LARGEST_CUTOFF_ANG).all():
        raise ConfigError(f"The cell needs two sides above {2 * LARGEST_CUTOFF_ANG:.2f} Å; given {cell.tolist()}.")
