"""The learning curve of a run: a CSV file and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.engine.storage import write_whole

FILE = "curve.csv"
Point = dict[str, float]


def write_curve(folder: Path, curve: Sequence[Point]) -> Path:
    """Write `curve.csv`, whole or not at all."""
    columns = list(dict.fromkeys(key for point in curve for key in point))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" for key, value in point.items()} for point in curve)
    write_whole(folder / FILE, text.getvalue().encode())
    return folder / FILE


def read_curve(folder: Path) -> list[Point]:
    """The points of `curve.csv`; none where there is no file."""
    path = folder / FILE
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(stream)]


def draw_curve(curve: Sequence[Point], path: Path, title: str) -> Path | None:
    """A picture of return and targets served against steps; None where Matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    panels = [(key, name) for key, name in _PANELS if any(key in point for point in curve)]
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (key, name) in zip(axes, panels, strict=True):
        known = [(point["steps"], point[key]) for point in curve if key in point]
        steps, values = [step for step, _ in known], [value for _, value in known]
        axis.plot(steps, values, color="#cbd2d9", linewidth=1)
        axis.plot(steps, _running_mean(values, max(1, len(values) // 15)), color="#0b7285", linewidth=2)
        axis.set_title(name)
        millions = steps[-1] >= 5e6
        axis.set_xlabel("million steps" if millions else "thousand steps")
        axis.xaxis.set_major_formatter(lambda value, _, unit=1e6 if millions else 1e3: f"{value / unit:,g}")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    draft = path.with_name(f".draft-{path.name}")
    figure.savefig(draft)
    draft.replace(path)
    return path


_PANELS = (
    ("return", "return"),
    ("targets_served", "targets served"),
    ("best_share", "best so far, part of the range"),
    ("seconds", "seconds of microscope time"),
)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]
