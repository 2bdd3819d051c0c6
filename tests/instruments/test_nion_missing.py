"""Nion Swift without Nion Swift: a clear refusal, whether or not the extra is installed here."""

from __future__ import annotations

import random
import sys

import pytest
import torch

from stem_gym.core.errors import CapabilityError, ConfigError, MissingExtraError
from stem_gym.core.instructions import TraceRule
from stem_gym.instruments.adapters.nion import make
from stem_gym.instruments.adapters.nion.trace import samples_until
from stem_gym.simulator import exposure

CPU = torch.device("cpu")


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nion.device_kit", None)  # Python's own way to say "not there"
    with pytest.raises(MissingExtraError, match=r'pip install "stem-gym\[nion\]"'):
        make({"nion": {"source": "usim"}}, 1, CPU)


def test_importing_the_adapter_imports_nothing_of_nion():
    import subprocess

    code = (
        "import sys, stem_gym.instruments.adapters.nion; print([m for m in sys.modules if m.split('.')[0] == 'nion'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_nion_has_one_row():
    with pytest.raises(CapabilityError, match="one row; given 4"):
        make({}, 4, CPU)


def test_settings_are_strict():
    with pytest.raises(ConfigError, match="Did you mean 'realtime'"):
        make({"nion": {"real_time": True}}, 1, CPU)


def test_a_trace_rule_stops_where_it_should():
    rise, fall = TraceRule(rise=0.12), TraceRule(fall=0.04)
    assert samples_until([100, 100, 100, 100, 100, 100], rise) is None
    assert samples_until([100, 100, 100, 100, 125, 100], rise) == 5  # (100 + 125) / 2 is the first mean above 112
    assert samples_until([100, 100, 100, 100, 123, 100], rise) is None
    assert samples_until([100, 100, 100, 100, 100, 92], fall) == 6
    assert samples_until([100, 100], rise) is None  # still inside the baseline


@pytest.mark.parametrize("rule", [TraceRule(rise=0.1037), TraceRule(fall=0.1037), TraceRule(0.1537, 0.1037, 6, 3)])
def test_the_rule_is_the_simulated_microscopes(rule):
    draw = random.Random(1)
    for _ in range(200):
        trace = [float(draw.randint(80, 120)) for _ in range(16)]
        simulated = int(exposure.samples_until(torch.tensor([trace]), rule))
        assert (samples_until(trace, rule) or len(trace)) == simulated
