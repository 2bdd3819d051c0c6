"""A progress bar with rate and time left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Bar:
    """Steps of a training run on standard error; nothing where `quiet`."""

    def __init__(self, total: int, quiet: bool) -> None:
        columns = (
            TextColumn("training"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), disable=quiet, refresh_per_second=2)
        self._task = self._bar.add_task("training", total=1.0, told="")
        self._total = total
        self._since: tuple[float, int] | None = None

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def update(self, steps: int, point: Mapping[str, float], done: float) -> None:
        """`steps` are behind; `point` is the last of the curve; `done` is the part of the run that is over."""
        now = self._bar.get_time()
        self._since = self._since or (now, steps)
        spent = now - self._since[0]
        rate = f"{(steps - self._since[1]) / spent:,.0f} steps/s" if spent > 0 else ""
        told = f"{steps:,} of {self._total:,} steps  {rate}"
        if "return" in point:
            told += f"  return {point['return']:.2f}"
        if "targets_served" in point:
            told += f"  served {point['targets_served']:.2f}"
        self._bar.update(self._task, completed=done, told=told)
