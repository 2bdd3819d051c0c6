"""The imaging surrogate's model card: what it was trained on, where it is valid, and what it was measured to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from stem_gym.datasets.pictures import HAADF, Picture
from stem_gym.datasets.reference_specimens import UNSEEN
from stem_gym.surrogates.imaging import ImagingSurrogate, grid_shape
from stem_gym.surrogates.imaging_reference import Scores, optics_of, score, specimen_of
from stem_gym.surrogates.surrogate import ModelCard

__all__ = ["describe_training", "held_out_scores", "table_rows", "valid_range", "write_card"]

DEFAULT_SOURCE_FWHM_ANG = 0.7
_REFERENCE = (
    "abTEM multislice with frozen phonons (Madsen & Susi, Open Research Europe 1, 24, 2021), Lobato potentials placed "
    f"exactly, annular detector {HAADF.inner_mrad:.0f} to {HAADF.outer_mrad:.0f} mrad"
)
_LIMITS = (
    "Thin specimens only: single sheets, dichalcogenides of three planes, one layer of adatoms 3 Å above a sheet, and "
    "metal clusters up to three layers high. Heights are not an input.",
    "The detector is fixed; another annulus needs another training run.",
    "The reference places atoms exactly in abTEM. abTEM's default projection collects 12 to 18 % less from a carbon "
    "atom at 60 keV on pixels of 0.066 Å, 4 to 5 % less on 0.033 Å, and approaches the reference on ever finer pixels.",
    "The standard deviation is about the reference, not about a real microscope.",
)


def valid_range(pictures: Iterable[Picture]) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of every input over the training and validation pictures."""
    pictures = list(pictures)

    def span(values: Iterable[Any]) -> tuple[float, float]:
        flat = np.concatenate([np.ravel(v) for v in values])
        return float(flat.min()), float(flat.max())

    specimens = [p.specimen for p in pictures]
    c3 = max(abs(v) for v in span(p.optics.c3_mm for p in pictures))
    defocus = max(abs(v) for v in span(p.optics.defocus_ang for p in pictures))
    density = span([len(s.layer) / s.cell_ang.prod()] for s in specimens)
    return {
        "energy_kev": span([p.settings.energy_kev] for p in pictures),
        "convergence_mrad": span(p.optics.convergence_mrad for p in pictures),
        "defocus_ang": (-defocus, defocus),
        "astigmatism_ang": (0.0, span(p.optics.astigmatism_ang for p in pictures)[1]),
        "c3_mm": (-c3, c3),
        "source_fwhm_ang": (0.0, 1.2),
        "pixel_ang": (0.235, 0.265),
        "atomic_number": span(s.atomic_number for s in specimens),
        "thermal_sigma_ang": span(s.thermal_sigma_ang for s in specimens),
        "atoms_per_ang2": (0.0, density[1]),
    }


def describe_training(
    trained: Mapping[str, Picture], validation: Mapping[str, Picture], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What the surrogate was trained on."""
    elements = {int(n) for p in trained.values() for n in np.unique(p.specimen.atomic_number)}
    return {
        "specimens": len(trained),
        "validation_specimens": len(validation),
        "pictures": sum(len(p.optics) for p in trained.values()),
        "kinds": dict(sorted(Counter(p.kind for p in trained.values()).items())),
        "atomic_numbers": sorted(elements),
        "phonon_configurations": sorted({p.settings.configurations for p in trained.values()}),
        "detector_mrad": [HAADF.inner_mrad, HAADF.outer_mrad],
        "settings": {name: settings[name] for name in ("steps", "pictures", "rows", "rate", "width", "seed")},
        "note": settings["note"],
    }


def held_out_scores(surrogate: ImagingSurrogate, pictures: Mapping[str, Picture]) -> list[dict[str, Any]]:
    """One entry for each held-out specimen, energy and source size.

    R² of the sum over atoms and of the surrogate, coverage.
    """
    rows = []
    for name, picture in pictures.items():
        for fwhm in (DEFAULT_SOURCE_FWHM_ANG, 0.0):
            specimen, optics = specimen_of(picture), optics_of(picture, fwhm)
            shape = grid_shape(specimen.cell_ang)
            given = surrogate.estimate(specimen, optics, shape)
            scores = score(picture, given.mean, given.std, fwhm)
            atoms = score(picture, surrogate.sum_over_atoms(specimen, optics, shape), None, fwhm)
            rows.append(
                {
                    "name": name,
                    "kind": _kind(name),
                    "energy_kev": picture.settings.energy_kev,
                    "unseen_kind": _kind(name) in UNSEEN,
                    "source_fwhm_ang": fwhm,
                    "surrogate": asdict(scores),
                    "sum_over_atoms": asdict(atoms),
                }
            )
    return rows


def _kind(name: str) -> str:
    return name.split("-")[1]


def pooled(rows: Iterable[Mapping[str, Any]], model: str) -> Scores:
    """Scores of several entries added up."""
    first, *others = (Scores(**row[model]) for row in rows)
    return sum(others, start=first)


def table_rows(rows: list[dict[str, Any]], source_fwhm_ang: float, models: tuple[str, ...]) -> list[list[str]]:
    """Lines of the table by specimen and energy, then by kind seen and unseen.

    Names, R² of each model, worst picture, coverage.
    """
    chosen = [row for row in rows if row["source_fwhm_ang"] == source_fwhm_ang]
    groups = [
        (f"{row['kind']}{' (unseen)' if row['unseen_kind'] else ''}", f"{row['energy_kev']:.0f}", [row])
        for row in chosen
    ]
    for energy in sorted({row["energy_kev"] for row in chosen}):
        groups.append(
            (
                "all seen kinds",
                f"{energy:.0f}",
                [r for r in chosen if r["energy_kev"] == energy and not r["unseen_kind"]],
            )
        )
    groups.append(("all seen kinds", "all", [r for r in chosen if not r["unseen_kind"]]))
    groups.append(("all unseen kinds", "all", [r for r in chosen if r["unseen_kind"]]))
    lines = []
    for label, energy, members in groups:
        if not members:
            continue
        last = pooled(members, models[-1])
        figures = [f"{pooled(members, model).r2:.5f}" for model in models]
        lines.append(
            [label, energy, *figures, f"{last.worst:.4f}", f"{last.noise_share:.1e}", f"{100 * last.coverage:.0f} %"]
        )
    return lines


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The few figures a reader asks for first."""
    found: dict[str, Any] = {}
    for fwhm, label in ((DEFAULT_SOURCE_FWHM_ANG, "source_0.7_ang"), (0.0, "without_source")):
        seen = [row for row in rows if row["source_fwhm_ang"] == fwhm and not row["unseen_kind"]]
        unseen = [row for row in rows if row["source_fwhm_ang"] == fwhm and row["unseen_kind"]]
        if not seen:
            continue
        scores = pooled(seen, "surrogate")
        found[label] = {
            "r2": scores.r2,
            "r2_sum_over_atoms": pooled(seen, "sum_over_atoms").r2,
            "lowest_r2_of_a_specimen": min(pooled([row], "surrogate").r2 for row in seen),
            "lowest_r2_of_a_picture": scores.worst,
            "coverage_90": scores.coverage,
            "reference_noise": scores.noise_share,
            "r2_unseen_kinds": pooled(unseen, "surrogate").r2 if unseen else None,
            "coverage_90_unseen_kinds": pooled(unseen, "surrogate").coverage if unseen else None,
        }
    return found


def write_card(path: Path, card: ModelCard, training: dict[str, Any], rows: list[dict[str, Any]]) -> ModelCard:
    """The finished card, also written as Markdown to PATH.md."""
    card = replace(
        card,
        stands_for="Expected HAADF image: collected fraction per incident electron on a periodic specimen",
        reference=_REFERENCE,
        training=training,
        held_out=summary(rows),
        limits=_LIMITS,
    )
    path.with_suffix(".md").write_text(_markdown(card, rows))
    return card


def _markdown(card: ModelCard, rows: list[dict[str, Any]]) -> str:
    training = card.training
    out = [
        f"# Model card: {card.name}\n",
        "Written by `python -m stem_gym.surrogates.train_imaging`; every figure below was measured by that run.\n",
        f"**Stands for.** {card.stands_for}.\n",
        f"**Reference.** {card.reference}.\n",
        f"**Training.** {training['specimens']} specimens ({training['pictures']} pictures), and "
        f"{training['validation_specimens']} more for the calibration of the uncertainty. "
        f"Kinds: {', '.join(f'{kind} {count}' for kind, count in training['kinds'].items())}. "
        f"Atomic numbers: {', '.join(map(str, training['atomic_numbers']))}.\n",
        *([training["note"] + "\n"] if training["note"] else []),
        "**Valid range.**\n",
        "| quantity | lowest | highest |\n|---|---|---|",
        *(f"| {name} | {low:.4g} | {high:.4g} |" for name, (low, high) in card.valid_range.items()),
        "\nOutside it the rows are flagged, an `UncertaintyWarning` is given and the standard deviation is "
        "widened; with `strict` it raises `ValidRangeError`.\n",
    ]
    header = (
        "| specimen | keV | R² sum over atoms | R² surrogate | worst picture | reference noise | in 90 % interval |"
    )
    for fwhm, title in ((DEFAULT_SOURCE_FWHM_ANG, "with a source of 0.7 Å"), (0.0, "without source size")):
        out += [f"## Held-out specimens, {title}\n", header, "|---|---|---|---|---|---|---|"]
        out += ["| " + " | ".join(line) + " |" for line in table_rows(rows, fwhm, ("sum_over_atoms", "surrogate"))]
        out.append("")
    out.append(
        "R² is 1 − Σ(estimate − abTEM)² / Σ(abTEM − mean of its picture)² over eight settings of the optics "
        "(defocus −60 to 60 Å, 30 to 35 mrad, two aberrated). The worst picture is a single setting, usually one where "
        "defocus has washed out the contrast. The noise is what the reference's finite number of phonon configurations "
        "takes from R².\n"
    )
    out += ["## Limits\n", *(f"* {limit}" for limit in card.limits), ""]
    return "\n".join(out)
