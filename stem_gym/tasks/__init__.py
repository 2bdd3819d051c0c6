"""What is wanted of the microscope: one file per task. `task_class(kind)` finds a task by its file name."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from stem_gym.core.errors import unknown_name
from stem_gym.core.task import Task


def task_kinds() -> list[str]:
    """Names of all tasks: the files of this folder, but for those of their parts (`_…`)."""
    names = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in names if not name.startswith("_"))


def task_class(kind: str) -> type[Task[Any]]:
    """The task in `stem_gym/tasks/<kind>.py`. Raises UnknownNameError."""
    if kind not in task_kinds():
        raise unknown_name("task", kind, task_kinds())
    module = importlib.import_module(f"{__name__}.{kind}")
    name = "".join(part.capitalize() for part in kind.split("_"))
    found: type[Task[Any]] = getattr(module, name)
    return found
