"""Figures of a recorded decision, for a paper or a notebook. Matplotlib is imported when needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from agents.engine.decision_log import DecisionLog, Entry
from agents.engine.recorded_spectra import RecordedSpectra, axis_of, recorded_spectra
from agents.policy import Array
from stem_gym.core.errors import RecordError, missing_extra
from stem_gym.core.units import ANG_PER_NM

_INK, _FAINT, _ACCENT, _CHOSEN = "#1f2933", "#cbd2d9", "#0b7285", "#e8590c"
_WINDOWS = {"background": "#868e96", "signal": _ACCENT, "numerator": _ACCENT, "denominator": "#5f3dc4"}
_STYLE: Any = {
    "figure.dpi": 200,
    "figure.facecolor": "white",
    "font.size": 8,
    "text.color": _INK,
    "axes.edgecolor": "#52606d",
    "axes.linewidth": 0.6,
    "axes.labelcolor": _INK,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7,
}
_OTHERS = ("#f59f00", "#15aabf", "#82c91e")  # of what would have been chosen otherwise
_PLAIN = (-2, 4)  # powers of ten that are written out
_UNITS = {"peak_fit": "eV", "anomaly": "", "peak_ratio": "", "quotient": "", "centre_of_mass": "mrad"}


def draw_decision(
    log: DecisionLog,
    path: str | Path,
    step: int | None = None,
    row: int = 0,
    otherwise: Mapping[str, int] | None = None,
) -> Path:
    """All of a decision on one page, written to `path` (PNG, PDF or SVG by its ending).

    The image with the measured places in their order and the chosen one, mean, deviation and acquisition function over
    the field, the last spectrum with the scalarizer's windows, the best value so far, and the embedding where the
    agent has one. `otherwise` are cells that would have been chosen, by the condition. Raises RecordError for a step
    that was not recorded.
    """
    entries = log.upto(step, row)
    entry, spectra, scene = entries[-1], recorded_spectra(entries, log.task), _Scene(log, entries[-1])
    last = 3 if entry.decision.embedding is not None and not entry.decision.seeding[0] else 2
    title = f"{log.id}, {log.agent}, step {entry.step}, {entry.acquisition.kind.replace('_', ' ')}"
    with _figure(Path(path), (11.0, 5.0), (4, last)) as (figure, axes):
        maps, below = axes
        _draw_image(maps[0], scene, spectra)
        _mark_others(maps[0], scene, otherwise or {})
        _draw_map(maps[1], scene, entry.decision.mean[0], "b  Predicted mean", scene.value_label, "viridis")
        _draw_map(maps[2], scene, entry.decision.deviation[0], "c  Deviation", scene.value_label, "magma")
        _draw_map(maps[3], scene, entry.decision.acquisition[0], "d  Acquisition", scene.score_label, "cividis", True)
        _draw_spectrum(below[0], scene, spectra)
        _draw_best(below[1], scene, spectra)
        if last == 3:
            _draw_embedding(below[2], scene, "g  Embedding")
        figure.suptitle(title, fontsize=9, x=0.005, ha="left")
    return Path(path)


def draw_embedding(log: DecisionLog, path: str | Path, step: int | None = None, row: int = 0) -> Path:
    """Where the agent's model places the cells, coloured by the predicted mean, written to `path`.

    Raises RecordError where the agent has no embedding or still took its first places at random.
    """
    entry = log.upto(step, row)[-1]
    if entry.decision.embedding is None or entry.decision.seeding[0]:
        raise RecordError(
            f"Step {entry.step} of {log.folder} has no embedding: nothing was believed yet, or no network."
        )
    with _figure(Path(path), (3.6, 3.1), (1,)) as (_, ((axis,),)):
        _draw_embedding(axis, _Scene(log, entry), f"{log.agent}, step {entry.step}")
    return Path(path)


@contextmanager
def _figure(path: Path, size: tuple[float, float], columns: tuple[int, ...]) -> Iterator[tuple[Any, list[list[Any]]]]:
    """A figure and the axes of its lines, which have so many columns each; written to `path` at the end."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("Drawing decisions", "viz") from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(layout="constrained", figsize=size)
        FigureCanvasAgg(figure)
        lines = figure.subfigures(len(columns), 1, squeeze=False)[:, 0]
        yield figure, [line.subplots(1, n, squeeze=False)[0].tolist() for line, n in zip(lines, columns, strict=True)]
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise RecordError(f"Can not draw to {path}: {error}.") from error


class _Scene:
    """Lengths, names and places of one decision."""

    def __init__(self, log: DecisionLog, entry: Entry) -> None:
        self.entry, self.task = entry, log.task
        self.height, self.width = entry.observation["measured"].shape
        self.cell_nm = float(log.task["fov_ang"]) / ANG_PER_NM / self.width
        wanted = log.task["scalarizers"][int(entry.observation["scalarizer"].argmax())]
        self.measure: Mapping[str, Any] = wanted["measure"]
        unit = _unit_of(self.measure, str(log.task["detector"]))
        self.value_label = f"{wanted['name']} ({unit})" if unit else str(wanted["name"])
        self.score_label = "random number" if entry.decision.seeding[0] else _score_label(entry.acquisition.kind, unit)
        self.chosen = int(entry.decision.chosen[0])

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of the field in nm; y grows downwards."""
        return 0.0, self.width * self.cell_nm, self.height * self.cell_nm, 0.0

    def places(self, cells: Any) -> Array:
        """(x, y) of cells in nm, (2, N)."""
        index = np.asarray(cells)
        return np.stack((index % self.width + 0.5, index // self.width + 0.5)) * self.cell_nm


def _draw_image(axis: Any, scene: _Scene, spectra: RecordedSpectra) -> None:
    axis.imshow(scene.entry.observation["image"], cmap="gray", extent=scene.extent, interpolation="nearest")
    if len(spectra.cell):
        x, y = scene.places(spectra.cell)
        order = np.arange(1, len(x) + 1)
        dots = axis.scatter(x, y, c=order, cmap="plasma", s=14, edgecolors="white", linewidths=0.4, zorder=3)
        _bar(dots, axis, "measurement", whole=True)
    _mark_chosen(axis, scene)
    axis.set_title("a  Image and places")
    _label_field(axis)


def _draw_map(
    axis: Any, scene: _Scene, values: Array, title: str, label: str, colours: str, chosen: bool = False
) -> None:
    axis.set_title(title)
    _label_field(axis)
    if not np.isfinite(values).any():
        axis.set(xlim=scene.extent[:2], ylim=scene.extent[2:], aspect="equal")
        words = "Nothing is believed yet:\nfirst places at random"
        axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center")
        return
    low, high = np.nanpercentile(np.where(np.isfinite(values), values, np.nan), (10.0 if chosen else 0.0, 100.0))
    shown = axis.imshow(values, cmap=colours, extent=scene.extent, interpolation="nearest", vmin=low, vmax=high)
    _bar(shown, axis, label, extend="min" if float(np.nanmin(values)) < low else "neither")
    if chosen:
        _mark_chosen(axis, scene)


def _draw_spectrum(axis: Any, scene: _Scene, spectra: RecordedSpectra) -> None:
    axis.set_title("e  Last spectrum")
    if not len(spectra.cell):
        axis.text(0.5, 0.5, "Nothing is measured yet", transform=axis.transAxes, ha="center", va="center")
        axis.set(xticks=[], yticks=[])
        return
    rate, kind = spectra.rate[-1].numpy(), _kind_of(str(scene.task["detector"]))
    channels = axis_of(scene.entry.observation, scene.task).numpy()
    if channels.ndim == 2:
        side = math.isqrt(len(rate))
        low, high = float(channels.min()), float(channels.max())
        half = 0.5 * (high - low) / max(1, side - 1)
        extent = (low - half, high + half, high + half, low - half)
        axis.set_title("e  Last pattern")
        _bar(axis.imshow(rate.reshape(side, side), cmap="gray", extent=extent), axis, f"{kind}/s and pixel")
        axis.set(xlabel="angle x (mrad)", ylabel="angle y (mrad)")
        return
    axis.plot(channels, rate, color=_INK, linewidth=0.8, drawstyle="steps-mid")
    for name, low, high in windows_of(scene.measure):
        axis.axvspan(low, high, color=_WINDOWS.get(name, _ACCENT), alpha=0.18, linewidth=0, label=name)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(loc="best")
    axis.set(xlabel="energy loss (eV)" if scene.task["detector"] == "eels" else "energy (eV)")
    axis.set(ylabel=f"{kind}/s and channel", xlim=(channels[0], channels[-1]))
    axis.ticklabel_format(axis="y", scilimits=_PLAIN, useMathText=True)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_best(axis: Any, scene: _Scene, spectra: RecordedSpectra) -> None:
    """Values of what is wanted now, in the order of the measurements."""
    axis.set_title("f  Best so far")
    axis.set(xlabel="measurements", ylabel=scene.value_label)
    axis.spines[["top", "right"]].set_visible(False)
    if not len(spectra.cell):
        return
    value = scene.entry.observation["value"].ravel()[spectra.cell]
    order = np.arange(1, len(value) + 1)
    axis.plot(order, value, ".", color=_FAINT, markersize=5, markeredgecolor="#9aa5b1", markeredgewidth=0.4)
    axis.plot(order, np.maximum.accumulate(value), color=_ACCENT, linewidth=1.4, drawstyle="steps-post")
    if not scene.entry.decision.seeding[0]:
        y, x = divmod(scene.chosen, scene.width)
        mean, deviation = (float(part[0, y, x]) for part in (scene.entry.decision.mean, scene.entry.decision.deviation))
        bars = {"fmt": "*", "color": _CHOSEN, "markersize": 8, "capsize": 2, "elinewidth": 0.9}
        axis.errorbar(len(value) + 1, mean, 1.645 * deviation, label="expected next, 90 %", **bars)
        axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.ticklabel_format(axis="y", scilimits=_PLAIN, useMathText=True)


def _draw_embedding(axis: Any, scene: _Scene, title: str) -> None:
    embedding: Any = scene.entry.decision.embedding
    points = embedding[0] - embedding[0].mean(axis=0)
    names = ("embedding 1", "embedding 2")
    if points.shape[1] > 2:  # the plane in which the cells are spread most
        points = points @ np.linalg.svd(points, full_matrices=False)[2][:2].T
        names = ("principal axis 1", "principal axis 2")
    if points.shape[1] == 1:
        points = np.column_stack((points, scene.entry.decision.mean[0].ravel()))
        names = ("embedding", scene.value_label)
    mean, measured = scene.entry.decision.mean[0].ravel(), scene.entry.observation["measured"].ravel() > 0
    dots = axis.scatter(*points.T, c=mean, cmap="viridis", s=4, linewidths=0, alpha=0.8, rasterized=True)
    axis.scatter(*points[measured].T, s=14, facecolors="none", edgecolors=_INK, linewidths=0.6, label="measured")
    star = {"marker": "*", "s": 70, "color": _CHOSEN, "edgecolors": "white", "linewidths": 0.6}
    axis.scatter(*points[scene.chosen], label="chosen", **star)
    _bar(dots, axis, f"mean of {scene.value_label}")
    axis.legend(loc="best", handletextpad=0.2)
    axis.set(title=title, xlabel=names[0], ylabel=names[1])
    axis.spines[["top", "right"]].set_visible(False)


def windows_of(measure: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(name, lowest, highest energy in eV) of all windows of a scalarizer, given as plain data."""
    found = []
    for name, part in measure.items():
        if isinstance(part, Mapping) and {"low_ev", "high_ev"} <= part.keys():
            found.append((name, float(part["low_ev"]), float(part["high_ev"])))
        for inner in part if isinstance(part, list | tuple) else [part]:
            if isinstance(inner, Mapping) and "kind" in inner:
                found += windows_of(inner)
    return found


def _unit_of(measure: Mapping[str, Any], detector: str) -> str:
    """Unit of a scalarizer's values; empty where it is a ratio."""
    kind = str(measure["kind"])
    if kind in ("sum", "scaled"):
        inner = measure["parts"][0] if kind == "sum" else measure["of_what"]
        return _unit_of(inner, detector)
    return _UNITS.get(kind, f"{_kind_of(detector)}/s")


def _kind_of(detector: str) -> str:
    return "X-rays" if detector == "eds" else "electrons"


def _score_label(kind: str, unit: str) -> str:
    beside = f" ({unit})" if unit else ""
    return {
        "expected_improvement": "ln expected improvement",
        "above_level": "ln probability",
        "random_choice": "random number",
    }.get(kind, kind.replace("_", " ") + beside)


def _mark_chosen(axis: Any, scene: _Scene) -> None:
    x, y = scene.places(scene.chosen)
    axis.scatter(x, y, marker="*", s=90, color=_CHOSEN, edgecolors="white", linewidths=0.8, zorder=4)


def _mark_others(axis: Any, scene: _Scene, cells: Mapping[str, int]) -> None:
    """Hollow stars where something else would have been measured."""
    for colour, (condition, cell) in zip(_OTHERS, cells.items(), strict=False):
        x, y = scene.places(cell)
        star = {"marker": "*", "s": 110, "facecolors": "none", "edgecolors": colour, "linewidths": 1.3}
        axis.scatter(x, y, label=f"if {condition}", zorder=5, **star)
    if cells:
        axis.legend(loc="upper left", bbox_to_anchor=(0.0, -0.3), borderaxespad=0.0)


def _label_field(axis: Any) -> None:
    axis.set(xlabel="x (nm)", ylabel="y (nm)")


def _bar(shown: Any, axis: Any, label: str, whole: bool = False, extend: str = "neither") -> None:
    bar = axis.figure.colorbar(shown, ax=axis, shrink=0.85, pad=0.02, extend=extend)
    bar.set_label(label)
    bar.outline.set_linewidth(0.4)
    bar.formatter.set_powerlimits(_PLAIN)
    bar.formatter.set_useMathText(True)
    if whole:
        bar.locator.set_params(integer=True)
        bar.update_ticks()
