"""What there is: environments, agents, shipped policies, instruments; and one environment in detail."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from gymnasium import spaces
from pydantic import BaseModel
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from stem_gym.core.config import Variant, read_yaml
from stem_gym.core.errors import ConfigError
from stem_gym.core.spaces import space_as_data
from stem_gym.envs.registration import broken_variants, variant_files
from stem_gym.jobs.roster import agents_package

_UNITS = {
    "ang": "Å", "ang2": "Å²", "nm": "nm", "mm": "mm", "pm": "pm", "mrad": "mrad", "rad": "rad", "s": "s", "pa": "pA",
    "kev": "keV", "ev": "eV", "v": "V", "electrons": "e", "seconds": "s", "barn": "barn", "dose": "(e/Å²)",
}  # fmt: skip


def environments() -> dict[str, str]:
    """Id → its sentence; broken files are left out."""
    readable = {id: path for id, path in variant_files().items() if path not in broken_variants()}
    return {id: str(read_yaml(path).get("summary", "")) for id, path in readable.items()}


def check_files() -> None:
    """Raises ConfigError that tells every variant's file that can not be read."""
    if faults := broken_variants():
        raise ConfigError("\n  ".join(map(str, faults.values())))


def agents() -> dict[str, str]:
    """Agent → its sentence, read without importing the agent."""
    outside = {point.name: point.value for point in entry_points(group="stem_gym.agents")}
    return {name: first_line(outside.get(name, f"agents.{name}")) for name in agents_package().names()}


def instruments() -> dict[str, str]:
    """Instrument → its sentence, read without importing the vendor's code."""
    from stem_gym.instruments import instrument_modules

    return {name: first_line(module) for name, module in sorted(instrument_modules().items()) if _makes(module)}


def policies() -> list[str]:
    """Shipped policies, as agent and environment."""
    return [f"{agent} for {folder.name}" for agent, folder in agents_package().shipped_policies()]


def as_data() -> dict[str, Any]:
    """The whole catalogue as plain data."""
    return {"environments": environments(), "agents": agents(), "instruments": instruments(), "policies": policies()}


def tables() -> list[Table]:
    """The whole catalogue for people."""
    data = as_data()
    parts = [_two_columns(title, data[title]) for title in ("environments", "agents", "instruments")]
    return [*parts, _two_columns("shipped policies", dict.fromkeys(data["policies"], ""))]


def first_line(module: str) -> str:
    """The first line of a module's docstring; the module is not run."""
    docstring = ast.get_docstring(_tree(module)) or ""
    return docstring.partition("\n")[0]


def _makes(module: str) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "make" for node in _tree(module).body)


def _tree(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module.partition(":")[0])
    if spec is None or spec.origin is None:
        return ast.parse("")
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _two_columns(title: str, rows: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(style="dim")
    for name, text in rows.items():
        table.add_row(name, text)
    return table


@dataclass(frozen=True)
class Setting:
    """One value of a configuration."""

    path: str
    value: Any
    unit: str
    meaning: str


@dataclass(frozen=True)
class Description:
    """One environment in detail."""

    variant: Variant
    config_hash: str
    settings: tuple[Setting, ...]
    observation_space: spaces.Dict
    action_space: spaces.Space[Any]
    manual: str  # the task's own documentation
    particulars: Mapping[str, str]  # what the numbers of the variant stand for

    def as_data(self) -> dict[str, Any]:
        """As plain data, with the hash that results and policies carry."""
        return {
            "id": self.variant.id,
            "summary": self.variant.summary,
            "config": {setting.path: setting.value for setting in self.settings},
            "units": {setting.path: setting.unit for setting in self.settings if setting.unit},
            "config_hash": self.config_hash,
            "observation_space": space_as_data(self.observation_space),
            "action_space": space_as_data(self.action_space),
            "manual": self.manual,
            "particulars": dict(self.particulars),
        }

    def parts(self) -> list[Any]:
        """For people: the manual, the spaces and every setting with its unit."""
        named = {"action": self.action_space} | self.observation_space.spaces
        shown = _two_columns("spaces", {name: str(space) for name, space in named.items()})
        table = Table(title=f"configuration {self.config_hash}", title_justify="left", title_style="bold", box=None)
        table.add_column("setting", no_wrap=True)
        table.add_column("value", justify="right")
        table.add_column("unit")
        table.add_column("meaning", style="dim")
        section = ""
        for setting in self.settings:
            above, _, name = setting.path.rpartition(".")
            if above != section:
                table.add_row(Text(_short(above), style="bold"))
                section = above
            table.add_row(f"  {name}", _value_text(setting.value), setting.unit, setting.meaning)
        title = Text(f"{self.variant.id}: {self.variant.summary}", style="bold")
        known = [_two_columns("in this variant", self.particulars)] if self.particulars else []
        return [title, Markdown(self.manual), *known, shown, table]


def _short(path: str, most: int = 26) -> str:
    """The last parts of a long path, so that a narrow screen keeps room for the meaning."""
    return path if len(path) <= most else "…" + path[-most + 1 :].partition(".")[2]


def _value_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_value_text, value)) if isinstance(value, tuple | list) else str(value)


def settings_of(config: BaseModel, path: str = "") -> list[Setting]:
    """Every value of a configuration with its unit and meaning; own values first, then those of its sections."""
    own, below = [], []
    for name, field in type(config).model_fields.items():
        value, where = getattr(config, name), f"{path}{name}"
        if isinstance(value, BaseModel):
            below += settings_of(value, f"{where}.")
        elif items := _sections(value):
            below += [setting for key, item in items for setting in settings_of(item, f"{where}.{key}.")]
        else:
            own.append(Setting(where, value, unit_of(name), (field.description or "").strip()))
    return own + below


def _sections(value: Any) -> list[tuple[Any, BaseModel]]:
    """The sections in a list or a mapping of them, by number or name."""
    items = list(value.items() if isinstance(value, Mapping) else enumerate(value if isinstance(value, tuple) else ()))
    return items if items and all(isinstance(item, BaseModel) for _, item in items) else []


def unit_of(name: str) -> str:
    """The unit that a name ends in: `drift_ang_per_s` is in Å/s."""
    top, *bottoms = name.split("_per_")
    above = _UNITS.get(top.rpartition("_")[2], "")
    below = [_UNITS.get(part.partition("_")[0], "") for part in bottoms]
    if not bottoms:
        return above
    return "/".join([above or "1", *below]) if all(below) else ""


def describe(id: str, overrides: Mapping[str, Any]) -> Description:
    """The environment `id` with overrides, built once so that what is shown is what runs.

    Raises UnknownNameError for an unknown id, ConfigError for what does not fit.
    """
    from stem_gym.envs.variants import build, load_variant

    loaded = load_variant(id, overrides)
    batch = build(loaded, rows=1)
    try:
        task, instrument = (getattr(part, "config", None) for part in (batch.task, batch.instrument))
        models = {"budget": batch.budget, "task": task, "instrument": instrument}
        settings = [s for name, m in models.items() if isinstance(m, BaseModel) for s in settings_of(m, f"{name}.")]
        return Description(
            variant=loaded.variant,
            config_hash=loaded.hash,
            settings=tuple(settings),
            observation_space=batch.observation_space,
            action_space=batch.action_space,
            manual=inspect.getdoc(type(batch.task)) or "",
            particulars=batch.task.particulars(),
        )
    finally:
        batch.close()
