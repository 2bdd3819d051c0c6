"""The reference specimens: periodic, of real density, and the held-out kinds kept apart."""

from __future__ import annotations

import numpy as np
import pytest

from stem_gym.datasets.abtem_images import plan
from stem_gym.datasets.reference_specimens import HELD_OUT, UNSEEN, held_out_specimen, training_specimen

UNSEEN_ELEMENTS = {22, 32, 79}  # Ti and Ge in graphene, gold


@pytest.mark.parametrize("kind", HELD_OUT)
def test_atoms_of_one_layer_keep_their_distance(kind: str) -> None:
    specimen = held_out_specimen(kind, np.random.default_rng(3))
    step = specimen.xy_ang[:, None] - specimen.xy_ang[None]
    step -= specimen.cell_ang * np.round(step / specimen.cell_ang)
    apart = (
        np.hypot(*np.moveaxis(step, -1, 0)) + 9 * np.eye(len(step)) + 9 * (specimen.layer[:, None] != specimen.layer)
    )
    assert apart.min() > 0.75  # 1.1 Å for adatoms, less the static displacements of up to 0.08 Å rms


def test_graphene_has_its_density() -> None:
    for seed in range(10):
        specimen = held_out_specimen("graphene", np.random.default_rng(seed))
        density = len(specimen.layer) / specimen.cell_ang.prod()
        assert density == pytest.approx(
            2 / (2.46**2 * np.sqrt(3) / 2), rel=0.05
        )  # strained by up to 1.2 % along each axis


def test_unseen_elements_are_never_trained_on() -> None:
    trained = [training_specimen(np.random.default_rng(seed)) for seed in range(300)]
    numbers = {int(n) for specimen in trained for n in specimen.atomic_number}
    assert not numbers & UNSEEN_ELEMENTS
    assert not {specimen.kind for specimen in trained} & UNSEEN
    chromium = [s for s in trained if s.kind == "mos2" and 24 in s.atomic_number]
    assert not chromium  # chromium on the metal site of MoS2 is an unseen kind as well


def test_plan_names_every_file_once_and_never_mixes_splits() -> None:
    jobs = list(plan(40, layered=16))
    assert len({job.name for job in jobs}) == len(jobs)
    assert all(job.name.startswith(f"{job.split}-") for job in jobs)
    seeds = [job.seed for job in jobs if job.split != "held_out"]
    assert len(set(seeds)) == len(seeds)
    assert not set(seeds) & {job.seed for job in jobs if job.split == "held_out"}
    assert list(plan(40, layered=16)) == jobs


def test_layered_series_has_layers() -> None:
    for seed in range(20):
        assert training_specimen(np.random.default_rng(seed), layered=True).layer.max() >= 1
