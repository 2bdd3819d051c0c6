"""Files of reference pictures: what is written is what is read, damage is told, and a killed run goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stem_gym.core.errors import RecordError
from stem_gym.datasets import abtem_images
from stem_gym.datasets.pictures import Picture, Settings, load_bundle, load_picture, save_bundle, save_picture
from stem_gym.datasets.reference_specimens import held_out_specimen


def a_picture(seed: int = 0) -> Picture:
    """A picture of real images with noise in the halves."""
    rng = np.random.default_rng(seed)
    optics = abtem_images.training_optics(rng, 3)
    images = rng.normal(size=(1, 3, 9, 11)) + 0.01 * rng.normal(size=(2, 3, 9, 11))
    halves = np.fft.fft2(images).astype(np.complex64)
    return Picture("graphene", "train", held_out_specimen("graphene", rng), Settings(60.0, 8, seed), optics, halves)


def assert_same(one: Picture, other: Picture, tolerance: float) -> None:
    assert (one.kind, one.split, one.settings) == (other.kind, other.split, other.settings)
    for name, value in vars(one.specimen).items():
        assert np.array_equal(value, getattr(other.specimen, name)), name
    for name, value in vars(one.optics).items():
        assert np.array_equal(value, getattr(other.optics, name)), name
    assert np.abs(one.halves - other.halves).max() <= tolerance * np.abs(one.halves).max()


def test_file_round_trip(tmp_path: Path) -> None:
    save_picture(a_picture(), tmp_path / "one.npz")
    assert_same(a_picture(), load_picture(tmp_path / "one.npz"), 0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["one.npz"]


def test_bundle_round_trip(tmp_path: Path) -> None:
    pictures = {"a": a_picture(1), "b": a_picture(2)}
    save_bundle(pictures, tmp_path / "all.npz")
    found = load_bundle(tmp_path / "all.npz")
    assert list(found) == ["a", "b"]
    for name, picture in pictures.items():
        assert_same(picture, found[name], 1e-4)  # the halves' difference, 1 % of the whole, is kept in 11 bits
        assert np.abs(picture.coefficients - found[name].coefficients).max() < 1e-6 * np.abs(picture.halves).max()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x80\x04\x95"])
def test_damaged_file_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    for read in (load_picture, load_bundle):
        with pytest.raises(RecordError, match=r"bad\.npz"):
            read(path)


def test_truncated_file_is_told(tmp_path: Path) -> None:
    save_picture(a_picture(), tmp_path / "one.npz")
    whole = (tmp_path / "one.npz").read_bytes()
    (tmp_path / "one.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordError, match="make it again"):
        load_picture(tmp_path / "one.npz")


def test_killed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []

    def make(job: abtem_images.Job) -> Picture:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(job.name)
        return a_picture()

    monkeypatch.setattr(abtem_images, "make_picture", make)
    jobs = list(abtem_images.plan(5))[:5]
    with pytest.raises(KeyboardInterrupt):
        abtem_images.run(tmp_path, jobs)
    (tmp_path / "train-00002.4711.tmp").write_bytes(b"half a file")  # what a killed process leaves behind
    first = list(made)
    monkeypatch.setattr(abtem_images, "make_picture", lambda job: made.append(job.name) or a_picture())
    assert abtem_images.run(tmp_path, jobs) == 3
    assert made == [job.name for job in jobs] and made[:2] == first
    assert "min left" in capsys.readouterr().out
