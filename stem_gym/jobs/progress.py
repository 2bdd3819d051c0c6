"""Progress of long jobs: what, how far, how fast, how long still."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import progress as bars
from rich.console import Console


class Progress:
    """A bar per task on the error stream, gone when it is done. Use as a context manager."""

    def __init__(self, screen: Console) -> None:
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=30),
            bars.MofNCompleteColumn(),
            _Rate(),
            bars.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._tasks: dict[str, bars.TaskID] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars.live.is_started:
            self._bars.stop()

    def update(self, name: str, done: float, total: float | None) -> None:
        """Show `done` of `total` on the bar `name`; a finished bar goes away."""
        if not self._bars.live.is_started:  # before the first report there is nothing to show
            self._bars.start()
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total)
        task = self._tasks[name]
        self._bars.update(task, completed=done, total=total, visible=total is None or done < total)

    def episodes(self, id: str, agent: str, done: int, total: int) -> None:
        """Report of a benchmark."""
        self.update(f"{agent} on {id}", done, total)

    def steps(self, episode: int, info: Mapping[str, Any]) -> None:
        """Report of a deployment, after each step."""
        steps = int(info.get("measurements", 0))
        served = info.get("targets_served_perceived", info.get("targets_served"))
        tail = f", {served:g} targets served" if served is not None else ""
        name = f"episode {episode}"
        self.update(name, steps, None)
        self._bars.update(self._tasks[name], description=f"{name}: {info.get('seconds', 0.0):.1f} s{tail}")


class _Rate(bars.ProgressColumn):
    """Things per second."""

    def render(self, task: bars.Task) -> str:
        speed = task.finished_speed or task.speed
        return f"{speed:,.3g}/s" if speed else ""
