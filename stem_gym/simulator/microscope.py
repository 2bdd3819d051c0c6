"""The settings of a simulated microscope (specimen, illumination, drift, detector, costs), and what it can do."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stem_gym.core.config import Config
from stem_gym.core.instructions import ATOMS
from stem_gym.core.instrument import Capabilities, Limits
from stem_gym.simulator.detectors import DetectorModel
from stem_gym.simulator.drift import DriftModel
from stem_gym.simulator.event_rates import KineticsModel
from stem_gym.simulator.finder import Finder
from stem_gym.simulator.removal import RemovalModel
from stem_gym.simulator.specimens import GrapheneRecipe, Recipe


class Probe(Config):
    """The illumination."""

    energy_kev: float = Field(default=60.0, ge=20, le=300)
    """beam energy"""
    convergence_mrad: float = Field(default=34.0, gt=1, le=60)
    """convergence semi-angle"""
    defocus_ang: float = Field(default=0.0, ge=-500, le=500)
    """mean defocus at the start of an episode; positive is underfocus"""
    defocus_sd_ang: float = Field(default=0.0, ge=0, le=100)
    """spread of the defocus from episode to episode"""
    astigmatism_ang: float = Field(default=0.0, ge=0, le=200)
    """twofold astigmatism"""
    astigmatism_angle_rad: float = 0.0
    """its azimuth"""
    c3_mm: float = Field(default=0.0, ge=-5, le=5)
    """spherical aberration"""
    focal_spread_ang: float = Field(default=0.0, ge=0, le=200)
    """rms chromatic spread of the focus"""
    source_fwhm_ang: float = Field(default=0.7, ge=0, le=5)
    """effective source size in the specimen plane"""


class Overheads(Config):
    """What instructions cost beside the exposure."""

    scan_s: float = Field(default=0.05, ge=0)
    """start and read-out of a frame"""
    park_s: float = Field(default=0.0, ge=0)
    """placing the probe; deflectors take microseconds"""
    stage_s: float = Field(default=1.0, ge=0)
    """a stage move"""
    set_s: float = Field(default=0.1, ge=0)
    """changing a control"""
    energy_s: float = Field(default=30.0, ge=0)
    """changing to another aligned beam energy, until the column has settled; an assumption"""


class Microscope(Config):
    """A simulated microscope with its specimen."""

    kind: Literal["simulated"] = "simulated"
    """this instrument"""
    specimen: Recipe
    """what is under the beam"""
    fov_ang: float = Field(default=24.0, gt=1, le=1000)
    """field of view before the first scan"""
    current_pa: float = Field(default=40.0, gt=0, le=1000)
    """beam current"""
    probe: Probe = Probe()
    """illumination"""
    drift: DriftModel = DriftModel()
    """drift and scan distortion"""
    detector: DetectorModel = DetectorModel()
    """annular detector"""
    overheads: Overheads = Overheads()
    """time beside exposure"""
    removal: RemovalModel | None = None
    """atoms that the beam removes; none if absent"""
    contamination_per_dose: float = Field(default=0.0, ge=0)
    """rise of the collected fraction per e/Å² of mean dose, by contamination that the beam collects"""
    dose_pixel_ang: float = Field(default=1.0, gt=0)
    """pixel of the dose map"""
    surrogate: bool = False
    """whether the learned imaging surrogate corrects the expected images"""


class SheetColumn(Config):
    """A simulated column with a doped graphene sheet that the beam changes."""

    kind: Literal["sheet"] = "sheet"
    """this instrument"""
    specimen: GrapheneRecipe
    """what is under the beam"""
    fov_ang: float = Field(default=25.0, gt=1, le=200)
    """field of view before the first scan"""
    current_pa: float = Field(default=40.0, gt=0, le=1000)
    """beam current"""
    probe: Probe = Probe()
    """illumination"""
    drift: DriftModel = DriftModel()
    """drift and scan distortion"""
    detector: DetectorModel = DetectorModel()
    """annular detector"""
    overheads: Overheads = Overheads()
    """time beside exposure"""
    kinetics: KineticsModel = KineticsModel()
    """what the beam does to the sheet"""
    finder: Finder = Finder()
    """what the software sees"""
    pictures: bool = False
    """whether frames can be had as pictures too (channel "haadf")"""
    energies_kev: tuple[Annotated[float, Field(ge=20, le=300)], ...] = ()
    """beam energies that are aligned beside the probe's own, and can be set"""
    free_slots: int = Field(default=0, ge=0, le=16)
    """room for dopants that a vacancy may catch"""
    compiled: bool = Field(default=False, exclude_if=lambda value: not value)
    """whether the sheet runs in machine code: many times faster, the same but for rounding; on a CPU, for clean sheets,
    with the extra `physics`"""


def capabilities() -> Capabilities:
    """What the simulated column can do, and between which limits."""
    shift = Limits(-1000.0, 1000.0)
    settable = {
        "current_pa": Limits(0.1, 1000.0),
        "defocus_ang": Limits(-500.0, 500.0),
        "beam_shift_x_ang": shift,
        "beam_shift_y_ang": shift,
    }
    time = Limits(1e-6, 1000.0)
    limits = {
        "Scan.fov_ang": Limits(1.0, 1000.0),
        "Scan.dwell_s": Limits(1e-8, 1.0),
        "Scan.region": Limits(0.0, 1.0),
        "Park.x": Limits(0.0, 1.0),
        "Park.y": Limits(0.0, 1.0),
        "Dwell.time_s": time,
        "Wait.time_s": Limits(0.0, 1e5),
        "MoveStage.dx_ang": Limits(-1e4, 1e4),
        "MoveStage.dy_ang": Limits(-1e4, 1e4),
    }
    verbs = {"Scan", "Park", "Dwell", "MoveStage", "Set", "Blank", "Wait", "Read"}
    readable = frozenset({"clock_s", "electrons", "fov_ang", "blanked"})
    return Capabilities(frozenset(verbs), frozenset({"haadf"}), settable, readable, limits, None, True)


def sheet_capabilities(config: SheetColumn, fewest_atoms: int) -> Capabilities:
    """What the simulated column can do with a sheet: no stage, beam shift and energy, and atoms found in a frame."""
    column = capabilities()
    verbs = column.verbs - {"MoveStage"}
    settable = {name: column.settable[name] for name in ("beam_shift_x_ang", "beam_shift_y_ang")}
    if config.energies_kev:
        every = tuple(dict.fromkeys((config.probe.energy_kev, *config.energies_kev)))
        settable["energy_kev"] = Limits.one_of(every)
    limits = {key: value for key, value in column.limits.items() if key.partition(".")[0] in verbs}
    detectors = frozenset({ATOMS, "haadf"} if config.pictures else {ATOMS})
    return Capabilities(
        verbs, detectors, settable, column.readable, limits, None, True, fewest_atoms, compiled=config.compiled
    )
