"""What an import costs and needs: no torch for `import stem_gym`, no extra for any module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.test_project import BLOCKER

REPO = Path(__file__).resolve().parent.parent


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_stem_gym_imports_no_torch():
    """A newcomer's first import registers ids and nothing more; torch alone costs more than a second."""
    heavy = ("torch", "scipy", "h5py", "matplotlib", "stable_baselines3", "agents")
    loaded = python(f"import stem_gym, sys; print([name for name in {heavy!r} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_the_command_line_lists_without_torch():
    code = "import sys, stem_gym.cli as cli; cli.main(['list', '--json']); assert 'torch' not in sys.modules"
    assert "stem_gym/AtomTargeting-v0" in python(code)


def test_importing_registers_every_variant():
    ids = python("import stem_gym, gymnasium; print(*(i for i in gymnasium.registry if i.startswith('stem_gym/')))")
    assert len(ids.split()) == len(list((REPO / "envs_configs").rglob("*.yaml")))


def test_every_module_imports_without_any_extra():
    """Or says which extra it needs. Inside the folder of a vendor's adapter only the front door counts."""
    names = [
        ".".join(path.relative_to(REPO).with_suffix("").parts)
        for top in ("stem_gym", "agents")
        for path in sorted((REPO / top).rglob("*.py"))
        if not path.name.startswith("__") and path.parent.parent.name != "adapters"
    ]
    loop = f"""
import importlib
from stem_gym.core.errors import MissingExtraError
for name in {names!r}:
    try:
        importlib.import_module(name)
    except MissingExtraError as error:
        print(name, error)
"""
    needing = python(BLOCKER + loop).splitlines()
    assert {line.split()[0] for line in needing} <= {"agents.learning.training"}
