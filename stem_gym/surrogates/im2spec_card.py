"""The spectrum surrogate's model card: held-out error, coverage, and simpler predictors beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stem_gym.simulator.spectral_specimen import SpectralSpecimen
from stem_gym.surrogates.im2spec import Im2Spec, SpectrumPosterior
from stem_gym.surrogates.im2spec_lessons import COUNTS, IMAGE_COUNTS, MEASURED, Lesson, draw_lesson
from stem_gym.surrogates.im2spec_network import standardised
from stem_gym.surrogates.surrogate import ModelCard

__all__ = ["PREDICTORS", "VALID_RANGE", "best_factor", "held_out_scores", "write_card"]

VALID_RANGE = {"measured_spectra": (5.0, 300.0), "side_pixels": (24.0, 96.0)}
_COUNTS_OF_MEASURED = (5, 10, 20, 50, 100)
_ROWS, _ASKED = 8, 512
_NORMAL_90 = 1.645
_WINDOW_SHARE = 0.1  # of the channels, in the window whose integral is judged
_SCALE_FLOOR = 0.01  # of the mean spectrum's mean, so that empty channels weigh little

PREDICTORS: Mapping[str, Callable[[Im2Spec, Tensor], Tensor]] = {
    "im2spec": lambda surrogate, image: surrogate.encode(image),
    "brightness": lambda _, image: 2.0 * standardised(image).flatten(1)[..., None],
    "place": lambda _, image: torch.zeros_like(image).flatten(1)[..., None],
}
_LIMITS = (
    "Trained on this package's simulated specimens; on others the encoder's features may say less, and the kernel "
    "leans on brightness and place. The uncertainty is calibrated on average over specimens, not for each.",
    "Spectra are told by six modes of those measured: a spectrum unlike all of them can not be predicted, only the "
    "uncertainty be wide.",
    "Peaks that move with the place are no sum of few modes; they are met less well than peaks that rise and fall.",
    "The standard deviation of a scalarized value leaves out what the modes leave out.",
    "Counting noise is taken as Poisson's; spikes of one channel are mended, other bad spectra are not.",
)


def _fit(surrogate: Im2Spec, lesson: Lesson, predictor: str) -> SpectrumPosterior:
    """The posterior at the cells asked."""
    shape = lesson.image.shape[1], lesson.image.shape[2]
    features = PREDICTORS[predictor](surrogate, lesson.image)
    return surrogate.fit(features, shape, lesson.cell, lesson.spectra).at(lesson.asked)


def explained(found: Tensor, lesson: Lesson) -> Tensor:
    """(B,) share of the truth's variance about the mean measured spectrum that is explained, channels weighted as in
    counting noise; the mean spectrum itself explains 0."""
    mean = lesson.truth.mean(1, keepdim=True)
    weight = 1.0 / (mean + _SCALE_FLOOR * mean.mean(2, keepdim=True))
    guess = lesson.spectra.mean(1, keepdim=True)
    left = ((found - lesson.truth).square() * weight).sum((1, 2))
    return 1.0 - left / ((guess - lesson.truth).square() * weight).sum((1, 2)).clamp(min=1e-30)


def _window(rng: np.random.Generator, rows: int, channels: int) -> Tensor:
    """(B, 1, S) ones inside a window of its own for every row."""
    width = max(2, round(_WINDOW_SHARE * channels))
    start = torch.from_numpy(rng.integers(0, channels - width + 1, rows))[:, None, None]
    number = torch.arange(channels)
    return ((number >= start) & (number < start + width)).float()


def window_errors(rng: np.random.Generator, posterior: SpectrumPosterior, lesson: Lesson) -> Tensor:
    """(B, Q) error of a random window's integral over the standard deviation told."""
    window = _window(rng, len(lesson.image), lesson.truth.shape[-1])
    mean, std = posterior.scalarized(lambda spectra: (spectra * window).sum(-1))
    return (mean - (lesson.truth * window).sum(-1)) / std.clamp(min=1e-30)


def best_factor(
    surrogate: Im2Spec, rng: np.random.Generator, pools: Mapping[str, SpectralSpecimen], lessons: int
) -> float:
    """What the standard deviation must be multiplied with so that 90 % intervals of window integrals hold 90 %."""
    errors = []
    for number in range(lessons):
        measured = _COUNTS_OF_MEASURED[1 + number % (len(_COUNTS_OF_MEASURED) - 1)]
        lesson = draw_lesson(rng, list(pools.values()), _ROWS, measured, _ASKED)
        errors.append(window_errors(rng, _fit(surrogate, lesson, "im2spec"), lesson).abs().flatten())
    return float(torch.cat(errors).quantile(0.9)) / _NORMAL_90


def held_out_scores(
    surrogate: Im2Spec, pools: Mapping[str, SpectralSpecimen], lessons: int, seed: int
) -> list[dict[str, Any]]:
    """One entry for each kind of specimen and number of spectra measured, over `lessons` lessons of eight specimens."""
    entries = []
    for name, pool in pools.items():
        for measured in _COUNTS_OF_MEASURED:
            shares: dict[str, list[Tensor]] = {predictor: [] for predictor in PREDICTORS}
            inside, channels = [], []
            for number in range(lessons):
                rng = np.random.default_rng([seed, number])  # the same specimens and doses, however many are measured
                lesson = draw_lesson(rng, [pool], _ROWS, measured, _ASKED)
                for predictor in PREDICTORS:
                    posterior = _fit(surrogate, lesson, predictor)
                    shares[predictor].append(explained(posterior.mean(), lesson))
                    if predictor == "im2spec":
                        inside.append(window_errors(rng, posterior, lesson).abs() < _NORMAL_90)
                        error = (posterior.mean() - lesson.truth).abs()
                        channels.append(error < _NORMAL_90 * posterior.std())
            entries.append(
                {
                    "specimens": name,
                    "measured": measured,
                    "explained": {predictor: float(torch.cat(found).median()) for predictor, found in shares.items()},
                    "coverage_90_window": float(torch.cat(inside).float().mean()),
                    "coverage_90_channel": float(torch.cat(channels).float().mean()),
                }
            )
    return entries


def write_card(path: Path, surrogate: Im2Spec, scores: list[dict[str, Any]], training: dict[str, Any]) -> ModelCard:
    """The finished card; also written as Markdown to PATH.md."""
    twenty = [entry for entry in scores if entry["measured"] == 20]
    card = replace(
        surrogate.card,
        stands_for="Noise-free spectra at all cells of a HAADF image, from the image and the spectra of some cells",
        reference="The simulator's own specimens, whose spectra are known",
        training={
            **training,
            "parameters": sum(p.numel() for p in surrogate.network.parameters()),
            "conditions": f"{MEASURED[0]} to {MEASURED[1]} spectra, evenly spread or gathered where components are "
            f"strong; {COUNTS[0]:g} to {COUNTS[1]:g} counts in a mean spectrum, {IMAGE_COUNTS[0]:g} to "
            f"{IMAGE_COUNTS[1]:g} in a mean pixel of the image",
        },
        held_out={
            "explained_from_20": float(np.mean([entry["explained"]["im2spec"] for entry in twenty])),
            "coverage_90_window": float(np.mean([entry["coverage_90_window"] for entry in scores])),
            "all": scores,
        },
        limits=_LIMITS,
    )
    path.with_suffix(".md").write_text(_markdown(card, scores))
    return card


def _markdown(card: ModelCard, scores: list[dict[str, Any]]) -> str:
    training = card.training
    out = [
        f"# Model card: {card.name}\n",
        "Written by `python -m stem_gym.surrogates.train_im2spec`; every figure below was measured by that run.\n",
        f"**Stands for.** {card.stands_for}. The encoder is trained and frozen; modes of the spectra and the law of "
        "their coefficients are fitted in closed form to what an episode has measured.\n",
        f"**Reference.** {card.reference}.\n",
        f"**Training.** {training['lessons']} lessons of {training['rows']} specimens out of {training['specimens']}: "
        f"{', '.join(training['recipes'])}; {training['conditions']}. {training['parameters']} parameters.\n",
        "**Valid range.**\n",
        "| quantity | lowest | highest |\n|---|---|---|",
        *(f"| {name} | {low:.4g} | {high:.4g} |" for name, (low, high) in card.valid_range.items()),
        "\nOutside it the rows are flagged, an `UncertaintyWarning` is given and the standard deviation is three times "
        "as wide; with `strict` it raises `ValidRangeError`.\n",
        "## Held-out specimens\n",
        "Share of the variance of the noise-free spectra explained (the mean of the measured spectra explains 0; "
        "median over specimens), by the same fit on the shipped features, on brightness and place, and on place "
        "alone; and how many noise-free values lie in the 90 % intervals: integrals of a tenth of the channels, and "
        "single channels.\n",
        "| specimens | spectra measured | im2spec | brightness | place | coverage of integrals | of channels |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {e['specimens']} | {e['measured']} | {e['explained']['im2spec']:.3f} | "
            f"{e['explained']['brightness']:.3f} | {e['explained']['place']:.3f} | {e['coverage_90_window']:.3f} | "
            f"{e['coverage_90_channel']:.3f} |"
            for e in scores
        ),
        f"\n| over all | value |\n|---|---|\n| explained from 20 spectra | {card.held_out['explained_from_20']:.3f} |",
        f"| coverage of integrals | {card.held_out['coverage_90_window']:.3f} |",
        "\n## Limits\n",
        *(f"* {limit}" for limit in card.limits),
        "",
    ]
    return "\n".join(out)
