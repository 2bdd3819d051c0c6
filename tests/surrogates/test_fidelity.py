"""The fidelity benchmark runs in seconds without abTEM and stores what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quick_benchmark_stores_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "fidelity.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=dict(os.environ))
    results = json.loads((tmp_path / "fidelity.json").read_text())
    assert results["machine"]["processor"]
    for figures in results["summary"].values():
        assert figures["r2_surrogate"] > 0.99
        assert figures["r2_physics"] > 0.97
    assert all(entry["surrogate_s"] > 0 and "ratio" not in entry for entry in results["speed"])
    assert "graphene" in done.stdout and "Stored in" in done.stdout
