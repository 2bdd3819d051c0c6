"""The atom finder's model card: what it was trained on, where it is valid, and what both finders find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stem_gym.simulator.specimens import Dopant
from stem_gym.surrogates.atom_finder import ClassicalFinder, Finder, Kind, NetworkFinder
from stem_gym.surrogates.atom_finder_frames import Conditions, plain_conditions
from stem_gym.surrogates.atom_finder_scores import MARGIN_ANG, SAME_ANG, score_finders
from stem_gym.surrogates.surrogate import ModelCard

__all__ = ["USUAL", "VALID_RANGE", "held_out_conditions", "held_out_scores", "write_card"]

USUAL = "40 pA, 2 s, 25 Å, 64 px"
HELD_OUT_SEED = 20260
_ROWS = 32
VALID_RANGE = {
    "pixel_ang": (0.12, 0.47),
    "field_ang": (14.9, 30.1),
    "electrons_per_ang2": (6.5e4, 6.8e6),
}
_LIMITS = (
    "Frames of single sheets of graphene as this package's simulator makes them, 60 to 100 keV, 80 to 200 mrad; no "
    "other lattice, no clusters, no adatoms. Not tested on measured frames.",
    "Frames within 40 Å of focus; drift that stays nearly steady within a frame.",
    "Elements are told by brightness: silicon means Na to Ca. Al, Si and P differ by about an eighth in weight.",
    "Nearer than 0.5 Å to the border nothing was counted.",
    "Outside the valid range rows are flagged, an UncertaintyWarning is given and the uncertainty of places widened.",
)
_OTHERS = ("N", "P", "Al", "Ge")


def held_out_conditions(rows: int = _ROWS) -> dict[str, Conditions]:
    """What both finders are judged on, by name: dose, focus, energy, field, and other dopants beside silicon."""
    conditions = {
        f"{current:g} pA, {seconds:g} s, 25 Å, 64 px": plain_conditions(rows, current_pa=current, frame_s=seconds)
        for current, seconds in ((20.0, 0.5), (20.0, 1.0), (40.0, 1.0), (40.0, 2.0), (60.0, 4.0))
    }
    usual = conditions[USUAL]
    dopants = tuple(Dopant(element=element, count_min=0, count_max=1, window_ang=25.0) for element in _OTHERS)
    mixed = usual.recipe.model_copy(update={"dopants": usual.recipe.dopants + dopants})
    crowd = (Dopant(element="Si", count_min=2, count_max=6, window_ang=9.0),)
    crowded = usual.recipe.model_copy(update={"dopants": crowd, "separation_ang": 0.0})
    shaken = usual.detector.model_copy(update={"line_jitter_ang": 0.1})
    drifting = usual.drift.model_copy(update={"speed_ang_per_s": 0.5, "diffusion_ang2_per_s": 0.004})
    edged = usual.recipe.model_copy(update={"edge_probability": 1.0})
    return {
        **conditions,
        "defocus 20 Å": plain_conditions(rows, defocus_ang=20.0),
        "defocus −20 Å": plain_conditions(rows, defocus_ang=-20.0),
        "defocus 40 Å": plain_conditions(rows, defocus_ang=40.0),
        "80 keV": plain_conditions(rows, energy_kev=80.0),
        "100 keV": plain_conditions(rows, energy_kev=100.0),
        "15 Å, 64 px": plain_conditions(rows, fov_ang=15.0),
        "30 Å, 64 px": plain_conditions(rows, fov_ang=30.0),
        "25 Å, 128 px": plain_conditions(rows, pixels=128),
        "N, P, Al, Ge beside Si": replace(usual, recipe=mixed),
        "Si side by side": replace(usual, recipe=crowded),
        "edges": replace(usual, recipe=edged),
        "drift 0.5 Å/s, jitter 0.1 Å": replace(usual, drift=drifting, detector=shaken),
    }


def held_out_scores(finders: Mapping[str, Finder], frames: int, seed: int = HELD_OUT_SEED) -> list[dict[str, Any]]:
    """One entry for each condition and finder: the counts of every kind over as many frames."""
    entries = []
    for name, conditions in held_out_conditions(min(_ROWS, frames)).items():
        # The usual condition is the one that a target is set for, so four times as many frames are taken.
        count = 4 * frames if name == USUAL else frames
        for label, scores in score_finders(finders, conditions, count, seed).items():
            kinds = {kind.name.lower(): counts.document() for kind, counts in scores.items()}
            entries.append({"conditions": name, "finder": label, "frames": count, **kinds})
    return entries


def write_card(path: Path, finder: NetworkFinder, frames: int) -> ModelCard:
    """The finished card, judged on so many frames of each condition; also written as Markdown to PATH.md."""
    scores = held_out_scores({"network": finder, "classical": ClassicalFinder()}, frames)
    runs = finder.card.training["runs"]
    card = replace(
        finder.card,
        stands_for="Kinds and places of the atoms of doped graphene in a HAADF frame",
        reference="The simulator's own frames, whose atoms are known (stem_gym.surrogates.atom_finder_frames)",
        training={
            "frames": sum(run["steps"] * run["rows"] for run in runs),
            "runs": runs,
            "parameters": sum(p.numel() for p in finder.network.parameters()),
            "conditions": "fields 12 to 31 Å of 64 to 128 pixels, 18 to 65 pA, 0.4 to 4.5 s, 58 to 102 keV, 30 to 36 "
            "mrad, defocus to ±42 Å, astigmatism to 15 Å, focal spread to 20 Å, source 0.5 to 0.95 Å, drift to 0.5 "
            "Å/s, line jitter to 0.1 Å, scan errors of 1 %, edges, blobs, vacancies, Si with N, P, Al, S, Ge, Cu, "
            "dopants from adjacent to 4 Å apart",
        },
        held_out={"usual": _find(scores, USUAL), "all": scores},
        limits=_LIMITS,
    )
    path.with_suffix(".md").write_text(_markdown(card, scores))
    return card


def _find(scores: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The silicon figures of both finders under one condition."""
    return {entry["finder"]: entry["silicon"] for entry in scores if entry["conditions"] == name}


def table(scores: list[dict[str, Any]], kind: Kind) -> list[str]:
    """A Markdown table of one kind: found, false, position error and how true the told uncertainty is."""
    lines = [
        "| frames | finder | atoms | found | false | rms error / Å | error over told |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in scores:
        counts = entry[kind.name.lower()]
        figures = (
            f"{counts['atoms']}",
            _show(counts["found_share"], 100.0, ".2f", " %"),
            _show(counts["false_share"], 100.0, ".2f", " %"),
            _show(counts["rms_ang"], 1.0, ".3f", ""),
            _show(counts["std_ratio"], 1.0, ".2f", ""),
        )
        lines.append(f"| {entry['conditions']} | {entry['finder']} | " + " | ".join(figures) + " |")
    return lines


def _show(value: float | None, factor: float, form: str, unit: str) -> str:
    return "–" if value is None else f"{value * factor:{form}}{unit}"


def _markdown(card: ModelCard, scores: list[dict[str, Any]]) -> str:
    training = card.training
    out = [
        f"# Model card: {card.name}\n",
        "Written by `python -m stem_gym.surrogates.train_atom_finder`; every figure below was measured by that run.\n",
        f"**Stands for.** {card.stands_for}.\n",
        f"**Reference.** {card.reference}.\n",
        f"**Training.** {training['frames']} frames, no two alike: {training['conditions']}. A U-Net of "
        f"{training['parameters']} parameters.\n",
        "**Valid range.**\n",
        "| quantity | lowest | highest |\n|---|---|---|",
        *(f"| {name} | {low:.4g} | {high:.4g} |" for name, (low, high) in card.valid_range.items()),
        f"\nBelow, frames are 40 pA, 2 s, 25 Å, 64 × 64 pixels, 60 keV in focus, two to six Si, up to two vacancies "
        "and two blobs of contamination, drift 0.25 Å/s, unless the first column says otherwise. A find is an atom's "
        f"where each is the other's nearest and they are within {SAME_ANG} Å; {MARGIN_ANG} Å at the border are left "
        "out.\n",
    ]
    for kind in (Kind.SILICON, Kind.HEAVY, Kind.CARBON, Kind.VACANCY):
        out += [f"## {kind.name.capitalize()}\n", *table(scores, kind), ""]
    out += ["## Limits\n", *(f"* {limit}" for limit in card.limits), ""]
    return "\n".join(out)
