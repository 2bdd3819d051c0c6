"""Pictures for people: agents compared, a learning curve, frames of a recording. Matplotlib is imported when needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from stem_gym.core.errors import missing_extra
from stem_gym.jobs.outcome import Outcome, mean_and_error, share_interval

_INK, _FAINT, _ACCENT = "#1f2933", "#cbd2d9", "#0b7285"
_SERIES = ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e", "#c92a2a", "#1864ab")
_SHARES = ("success", "useful_share")  # between 0 and 1
_STYLE: Any = {
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}


@contextmanager
def _figure(path: Path, **kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes in the house style, written to `path` at the end."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("Drawing pictures", "viz") from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(layout="constrained", figsize=kwargs.pop("figsize"))
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(**kwargs)
        figure.savefig(path)


def comparison(outcomes: Sequence[Outcome], metrics: Mapping[str, str], path: Path) -> Path:
    """A panel for each metric (name → title), a bar with its standard error for each agent."""
    agents = [outcome.agent for outcome in outcomes]
    size = (2.3 * len(metrics) + 0.9, 0.38 * len(agents) + 1.3)
    with _figure(path, figsize=size, ncols=len(metrics), sharey=True, squeeze=False) as (figure, axes):
        for axis, (name, title) in zip(axes[0], metrics.items(), strict=True):
            for row, outcome in enumerate(outcomes):
                _bar(axis, row, outcome, name)
            axis.set_title(title)
            axis.set_yticks(range(len(agents)), agents)
            axis.tick_params(axis="y", length=0)
            low, high = axis.get_xlim()
            axis.set_xlim(low, high + 0.45 * (high - low))  # room for the figures at the right edge
            if name in _SHARES:
                axis.set_xticks((0.0, 0.5, 1.0))
            axis.axvline(0, color=_FAINT, linewidth=0.8, zorder=0)
        axes[0][0].invert_yaxis()
        figure.suptitle(
            f"{outcomes[0].id}: {len(outcomes[0].episodes)} episodes each, the same worlds",
            fontsize=10,
            x=0.01,
            ha="left",
        )
    return path


def _bar(axis: Any, row: int, outcome: Outcome, name: str) -> None:
    values = [float(episode.get(name, math.nan)) for episode in outcome.episodes]
    mean, error = mean_and_error(values)
    if not math.isfinite(mean):
        axis.text(0, row, " none", va="center", color=_INK)
        return
    whiskers = [[error], [error]]
    if name == "success":
        low, high = share_interval(sum(bool(value) for value in values), len(values))
        whiskers = [[mean - low], [high - mean]]
    axis.barh(row, mean, height=0.62, color=_ACCENT)
    axis.errorbar(mean, row, xerr=whiskers, color=_INK, linewidth=1, capsize=2)
    label = f"{100 * mean:.3g} %" if name in _SHARES else f"{mean:,.3g}"
    axis.annotate(label, (1, row), xycoords=("axes fraction", "data"), ha="right", va="center", fontweight="bold")


def curve(
    points: Sequence[tuple[float, float]], levels: Mapping[str, float], labels: tuple[str, str, str], path: Path
) -> Path:
    """A learning curve of (steps, value) with its running mean; `levels` are other agents' values to compare with.

    `labels` are title, x and y.
    """
    xs, ys = [x for x, _ in points], [y for _, y in points]
    smooth = running_mean(ys, max(1, len(ys) // 12))
    with _figure(path, figsize=(6.4, 3.6)) as (_, axis):
        axis.plot(xs, ys, color=_FAINT, linewidth=1, label="each update")
        axis.plot(xs, smooth, color=_ACCENT, linewidth=2, marker=".", markersize=5, label="running mean")
        for number, (name, level) in enumerate(levels.items(), start=1):
            color = _SERIES[number % len(_SERIES)]
            axis.axhline(level, color=color, linewidth=1, linestyle="--")
            beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
            axis.annotate(name, (1, level), xycoords=("axes fraction", "data"), color=color, **beside)
        axis.set(title=labels[0], xlabel=labels[1], ylabel=labels[2])
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderpad=0.0)  # beside the title
    return path


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place; fewer at the beginning."""
    return [
        sum(values[max(0, i + 1 - window) : i + 1]) / len(values[max(0, i + 1 - window) : i + 1])
        for i in range(len(values))
    ]


def frames(images: Sequence[tuple[str, Any]], title: str, path: Path) -> Path:
    """A strip of frames (caption, (H, W) array), each stretched from its 1 % to its 99.5 % value."""
    import numpy as np

    with _figure(path, figsize=(2.0 * len(images) + 0.2, 2.6), ncols=len(images), squeeze=False) as (figure, axes):
        for axis, (caption, image) in zip(axes[0], images, strict=True):
            low, high = np.percentile(image, (1, 99.5))
            axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-9), interpolation="nearest")
            axis.set_title(caption, fontsize=8, fontweight="normal")
            axis.set_xticks([])
            axis.set_yticks([])
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return path


def spark(values: Sequence[float], width: int = 60) -> str:
    """The values as one line of block characters: a learning curve where only text can be shown."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    columns = [values[start:stop] for start, stop in pairwise(edges)]
    means = [sum(column) / len(column) for column in columns]
    low, high = min(means), max(means)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(blocks[round((mean - low) / (high - low or 1.0) * (len(blocks) - 1))] for mean in means)
