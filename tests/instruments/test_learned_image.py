"""The simulated microscope with the learned image in place of the sum over atoms."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

import stem_gym  # noqa: F401 – registers the ids

ID = "stem_gym/AtomTargeting-v0"
POINT = {"probe": {"focal_spread_ang": 0.0}}  # one map instead of the five of a focal spread


@pytest.fixture(scope="module")
def pair():
    made = [gymnasium.make(ID, instrument={**POINT, "surrogate": learned}) for learned in (False, True)]
    for env in made:
        env.reset(seed=4)
    yield made
    for env in made:
        env.close()


def test_the_learned_image_is_near_the_sum_over_atoms_and_not_the_same(pair) -> None:
    physics, learned = (env.unwrapped.batch.instrument._now.series for env in pair)
    # The lattice scatters together what single atoms do not: shapes agree to a few percent, the scale to about ten.
    slope = float((physics * learned).sum() / (physics * physics).sum())
    assert 0.75 < slope < 1.1
    rest = learned - slope * physics
    mean = slice(1, None)  # the mean of the image has no shape
    assert float(rest[:, mean, mean].square().sum() / learned[:, mean, mean].square().sum()) < 0.05
    assert not torch.allclose(physics, learned)


def test_an_episode_runs_on_it_in_the_same_world(pair) -> None:
    action = np.array([1.0, 0.1, 0.1, 1.0, 0.5], np.float32)
    (seen, *_, told), (learned, *_, learned_told) = (env.step(action) for env in pair)
    assert told["electrons"] == learned_told["electrons"]
    correlation = np.corrcoef(seen["image"][0].ravel(), learned["image"][0].ravel())[0, 1]
    assert correlation > 0.8  # both show the same atoms, with the same uniforms behind the noise


def test_a_changed_focus_makes_the_image_anew(pair) -> None:
    from stem_gym.core.instructions import Set

    instrument = pair[1].unwrapped.batch.instrument
    before = instrument._now.series.clone()
    instrument.execute(Set(torch.tensor([0]), "defocus_ang", torch.tensor([40.0])))
    assert not torch.allclose(before, instrument._now.series, rtol=1e-3)
