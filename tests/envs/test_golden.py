"""Every id still does what its golden trace says."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from stem_gym.envs.registration import variant_files
from tests.golden import advice, differences, golden_file, trace

IDS = sorted(variant_files())


@pytest.mark.parametrize("id", IDS)
def test_the_golden_trace_holds(id):
    path = golden_file(id)
    if not path.exists():
        pytest.fail(f"{id} has no golden trace. Make one: python -m tests.golden --write {id}")
    kept = json.loads(path.read_text())
    found = differences(trace(id, np.array(kept["actions"])), kept)
    assert not found, advice(id, found)


def test_every_golden_trace_has_an_id():
    """A renamed id leaves no trace behind."""
    kept = {path.name for path in golden_file("x").parent.glob("*.json")}
    assert kept == {golden_file(id).name for id in IDS}


def test_a_change_is_seen_and_explained():
    kept = json.loads(golden_file(IDS[0]).read_text())
    for spoil in (
        lambda steps: steps[3].update(reward=steps[3]["reward"] * 1.001),
        lambda steps: steps[0].update({"image moment": -steps[0]["image moment"]}),
        lambda steps: steps[-1].pop("info seconds"),
        lambda steps: steps.pop(),
    ):
        changed = copy.deepcopy(kept)
        spoil(changed["steps"])
        found = differences(changed, kept)
        assert len(found) == 1
    message = advice("stem_gym/AtomTargeting-v3", found)
    assert "AtomTargeting-v4" in message and "CHANGELOG" in message and "--write" in message
