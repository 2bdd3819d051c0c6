"""The displacement surrogate's model card: its training, where it is valid, and what it was measured to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stem_gym.datasets.recoil_shards import OUTCOMES, SITES, Trajectories
from stem_gym.datasets.recoil_thresholds import EVENTS, Threshold
from stem_gym.surrogates.displacement import DisplacementSurrogate, recoil_direction
from stem_gym.surrogates.surrogate import ModelCard

__all__ = ["Recoils", "calibration_error", "compare_thresholds", "held_out_scores", "side_shares", "write_card"]

_BINS = 10
_REFERENCE = (
    "Molecular dynamics with EDIP for SiC (Jiang et al., Phys. Rev. B 86, 144118, 2012): 96 sites, velocity Verlet, "
    "sheet at rest before the impact, outcome told after a quench"
)
_LIMITS = (
    "The potential is the reference, not the experiment: its thresholds are its own. Rates that must meet measured "
    "ones belong to the calibrated threshold table.",
    "All atoms but the struck one are at rest. Thermal motion of the struck atom belongs into the recoil; that of its "
    "neighbours is left out.",
    "12C and 28Si at one lattice constant, that of graphene in EDIP. Other isotopes, strain and edges are not inputs.",
    "Close to a threshold the reference itself alternates between outcomes over less than 0.5 eV; the surrogate gives "
    "shares there.",
    "Four sites only: C beside threefold Si, C in pristine graphene, C beside a single vacancy. What 'other' is "
    "(adatoms, rotated bonds, moved vacancies) is not told apart.",
)


@dataclass(frozen=True)
class Recoils:
    """Trajectories as the surrogate takes them."""

    transfer_ev: Tensor  # (n,)
    direction: Tensor  # (n, 3)
    site: Tensor  # (n,) int64
    outcome: Tensor  # (n,) int64
    weight: Tensor  # (n,)

    @classmethod
    def of(cls, given: Trajectories) -> Recoils:
        """The same as float32 and int64 tensors."""

        def tensor(values: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.as_tensor(values, dtype=dtype)

        site, outcome = tensor(given.site, torch.int64), tensor(given.outcome, torch.int64)
        return cls(tensor(given.transfer_ev), tensor(given.direction), site, outcome, tensor(given.weight))


def calibration_error(probability: np.ndarray, outcome: np.ndarray) -> float:
    """Expected calibration error of the likeliest outcome, ten bins of equal width.

    Guo, Pleiss, Sun and Weinberger, ICML 2017, equation 3. Probabilities (n, outcomes), outcomes (n,).
    """
    confidence, right = probability.max(axis=1), probability.argmax(axis=1) == outcome
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [abs(float(confidence[bins == b].sum() - right[bins == b].sum())) for b in range(_BINS)]
    return sum(gaps) / len(outcome)


def held_out_scores(surrogate: DisplacementSurrogate, recoils: Recoils) -> dict[str, Any]:
    """Accuracy, calibration and likelihood over all recoils and by site, and what a constant guess would reach."""
    with torch.no_grad():
        given = surrogate.outcome_probabilities(recoils.transfer_ev, recoils.direction, recoils.site).double().numpy()
    outcome, weight, site = recoils.outcome.numpy(), recoils.weight.double().numpy(), recoils.site.numpy()
    right = given.argmax(axis=1) == outcome
    likelihood = np.log(np.maximum(given[np.arange(len(outcome)), outcome], 1e-12))
    confusion = np.zeros((len(OUTCOMES), len(OUTCOMES)), dtype=int)
    np.add.at(confusion, (outcome, given.argmax(axis=1)), 1)
    by_class = [abs(float(given[:, k].mean() - (outcome == k).mean())) for k in range(len(OUTCOMES))]
    return {
        "recoils": len(outcome),
        "accuracy": float(right.mean()),
        "accuracy_weighted": float((right * weight).sum() / weight.sum()),
        "accuracy_of_a_constant_guess": sum(int(np.bincount(outcome[site == s]).max()) for s in np.unique(site))
        / len(outcome),
        "expected_calibration_error": calibration_error(given, outcome),
        "largest_error_of_a_share": max(by_class),
        "log_loss": float(-likelihood.mean()),
        "accuracy_by_site": {SITES[s]: float(right[site == s].mean()) for s in np.unique(site)},
        "confusion": confusion.tolist(),
    }


def compare_thresholds(surrogate: DisplacementSurrogate, reference: list[Threshold]) -> list[dict[str, Any]]:
    """Thresholds of the reference beside the surrogate's own, and their difference."""
    rows = []
    for event, outcomes in EVENTS.items():
        chosen = [t for t in reference if t.event == event]
        if not chosen:
            continue
        tilt = torch.deg2rad(torch.tensor([t.tilt_deg for t in chosen]))
        azimuth = torch.deg2rad(torch.tensor([t.azimuth_deg for t in chosen]))
        site = torch.tensor([SITES.index(t.site) for t in chosen])
        found = surrogate.threshold_ev(recoil_direction(tilt, azimuth), site, outcomes).tolist()
        for one, given in zip(chosen, found, strict=True):
            own = None if math.isnan(given) else given
            both = own is not None and one.transfer_ev is not None
            difference = own - one.transfer_ev if both else None  # type: ignore[operator]
            rows.append({**vars(one), "surrogate_ev": own, "difference_ev": difference})
    return rows


def threshold_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many thresholds lie within 0.5 eV of the reference's, by event, and the largest difference."""
    summary = {}
    for event in dict.fromkeys(row["event"] for row in rows):
        chosen = [row for row in rows if row["event"] == event]
        # An event that neither of the two knows is agreement.
        same = [row for row in chosen if row["transfer_ev"] is None and row["surrogate_ev"] is None]
        differences = [abs(row["difference_ev"]) for row in chosen if row["difference_ev"] is not None]
        summary[event] = {
            "directions": len(chosen),
            "within_0.5_ev": len(same) + sum(d <= 0.5 for d in differences),
            "neither_has_one": len(same),
            "mean_difference_ev": float(np.mean(differences)) if differences else None,
            "largest_difference_ev": max(differences, default=None),
        }
    return summary


def side_shares(given: Trajectories) -> dict[str, float]:
    """How often the silicon ends on the other side of the sheet, by site and outcome, over the drawn recoils."""
    shares = {}
    for name, before in (("silicon_ahead", 1), ("silicon_behind", -1)):
        for outcome in ("nothing", "exchange"):
            chosen = (given.site == SITES.index(name)) & (given.outcome == OUTCOMES.index(outcome))
            if chosen.any():
                shares[f"{name}, {outcome}"] = float((given.silicon_side[chosen] == -before).mean())
    return shares


def write_card(path: Path, card: ModelCard, rows: list[dict[str, Any]]) -> ModelCard:
    """The finished card, also written as Markdown to PATH.md."""
    card = replace(
        card,
        stands_for="P(outcome | transferred energy, direction, site) of a carbon atom in graphene hit by an electron",
        reference=_REFERENCE,
        held_out={**card.held_out, "thresholds": threshold_summary(rows)},
        limits=_LIMITS,
    )
    path.with_suffix(".md").write_text(_markdown(card, rows))
    return card


def _ev(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f}"


def _markdown(card: ModelCard, rows: list[dict[str, Any]]) -> str:
    training, held = card.training, card.held_out
    out = [
        f"# Model card: {card.name}\n",
        "Written by `python -m stem_gym.surrogates.train_displacement`; every figure below was measured by that run or "
        "by `python -m stem_gym.datasets.recoil_thresholds`.\n",
        f"**Stands for.** {card.stands_for}. Outcomes: {', '.join(OUTCOMES)}. Sites: {', '.join(SITES)}, where "
        "'ahead' is a silicon atom on the side of the sheet where the electron leaves.\n",
        f"**Reference.** {card.reference}.\n",
        f"**Training.** {training['trajectories']} trajectories, and {training['validation_trajectories']} more for "
        f"the temperature of the probabilities; {held['recoils']} held out, split by file. Outcomes in the training "
        f"set: {', '.join(f'{name} {count}' for name, count in training['outcomes'].items())}.\n",
        *([training["note"] + "\n"] if training["note"] else []),
        "**Valid range.**\n",
        "| quantity | lowest | highest |\n|---|---|---|",
        *(f"| {name} | {low:.4g} | {high:.4g} |" for name, (low, high) in card.valid_range.items()),
        "\nOutside it the rows are flagged, an `UncertaintyWarning` is given and the standard deviation is the largest "
        "there is; with `strict` it raises `ValidRangeError`.\n",
        "## Held-out trajectories\n",
        "| quantity | value |\n|---|---|",
        f"| accuracy | {held['accuracy']:.4f} |",
        f"| accuracy, recoils uniform in energy and solid angle | {held['accuracy_weighted']:.4f} |",
        f"| accuracy of each site's commonest outcome | {held['accuracy_of_a_constant_guess']:.4f} |",
        f"| expected calibration error | {held['expected_calibration_error']:.4f} |",
        f"| largest error of an outcome's share | {held['largest_error_of_a_share']:.4f} |",
        f"| log loss | {held['log_loss']:.4f} |",
        *(f"| accuracy, {name} | {value:.4f} |" for name, value in held["accuracy_by_site"].items()),
        "\nRecoils are drawn near the thresholds, where they are hardest to tell. Rows are what happened, columns the "
        "likeliest answer:\n",
        f"| | {' | '.join(OUTCOMES)} |\n|---|{'---|' * len(OUTCOMES)}",
        *_confusion(held["confusion"]),
        "\n## Thresholds\n",
        "Lowest transferred energy in eV from which an event happens (reference) or is likelier than not (surrogate): "
        "two steps of 0.5 eV have to agree, then it is bisected. Azimuth 0° is towards the partner.\n",
        "| site | tilt | azimuth | event | reference | surrogate |\n|---|---|---|---|---|---|",
        *(
            f"| {r['site']} | {r['tilt_deg']:.0f}° | {r['azimuth_deg']:.0f}° | {r['event']} | {_ev(r['transfer_ev'])} "
            f"| {_ev(r['surrogate_ev'])} |"
            for r in rows
        ),
        "",
        *(_sentence(event, found) for event, found in held["thresholds"].items()),
        "## The side of the silicon\n",
        "Share of trajectories after which the silicon stands on the other side of the sheet, over those for training; "
        "not part of the surrogate's answer.\n",
        "| site, outcome | share |\n|---|---|",
        *(f"| {name} | {share:.3f} |" for name, share in training["silicon_on_the_other_side"].items()),
        "\n## Limits\n",
        *(f"* {limit}" for limit in card.limits),
        "",
    ]
    return "\n".join(out)


def _confusion(counts: list[list[int]]) -> list[str]:
    return [f"| {OUTCOMES[k]} | {' | '.join(map(str, row))} |" for k, row in enumerate(counts)]


def _sentence(event: str, found: Mapping[str, Any]) -> str:
    return (
        f"{event}: {found['within_0.5_ev']} of {found['directions']} within 0.5 eV (in "
        f"{found['neither_has_one']} of them neither has a threshold); where both have one the mean "
        f"difference is {_ev(found['mean_difference_ev'])} eV, the largest {_ev(found['largest_difference_ev'])} eV.\n"
    )
