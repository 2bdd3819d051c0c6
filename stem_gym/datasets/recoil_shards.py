"""Recoil trajectories in memory and on disk: one file for each shard of a set."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from stem_gym.core.errors import RecordError

__all__ = ["OUTCOMES", "SITES", "Trajectories", "load_shard", "load_shards", "save_shard", "shard_path", "split_of"]

FORMAT = 1
# The order is part of every stored file and of the surrogate's answer.
SITES = ("silicon_ahead", "silicon_behind", "pristine", "vacancy")
OUTCOMES = ("nothing", "exchange", "ejected", "other")
SPLITS = ("train", "valid", "held_out")


@dataclass(frozen=True)
class Trajectories:
    """Recoils and their outcomes, n of them."""

    site: np.ndarray  # (n,) index into SITES
    transfer_ev: np.ndarray  # (n,)
    direction: np.ndarray  # (n, 3) unit vectors: towards the partner, across, along the beam
    weight: np.ndarray  # (n,) density, uniform in transfer and solid angle, over the density drawn from
    outcome: np.ndarray  # (n,) index into OUTCOMES
    silicon_side: np.ndarray  # (n,) side of the sheet the silicon ended on, +1 or −1; 0 without silicon
    time_fs: np.ndarray  # (n,) length of the flight

    def __len__(self) -> int:
        return len(self.site)

    @classmethod
    def joined(cls, parts: list[Trajectories]) -> Trajectories:
        """Several sets one after the other."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"recoil-{number:05d}.npz"


def split_of(number: int) -> str:
    """Of ten shards two are held out, two are for validation and calibration, six are for training."""
    return {9: "held_out", 8: "held_out", 7: "valid", 6: "valid"}.get(number % 10, "train")


def save_shard(path: Path, trajectories: Trajectories, settings: Mapping[str, Any]) -> bool:
    """Write one file atomically; False, with the file as it was, where another process has written it before."""
    arrays = {f.name: getattr(trajectories, f.name) for f in fields(Trajectories)}
    told = json.dumps(dict(settings), sort_keys=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        np.savez_compressed(stream, format=np.array(FORMAT), settings=np.array(told), **arrays)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return True


def load_shard(path: Path) -> tuple[Trajectories, dict[str, Any]]:
    """Read one file; nothing in it is executed. Raises RecordError for a damaged or foreign file."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
            found = {name: data[name] for name in data.files}
        if int(found["format"]) != FORMAT:
            raise ValueError(f"its format is {int(found['format'])}, not {FORMAT}")
        settings = json.loads(str(found["settings"]))
        trajectories = Trajectories(*(found[f.name] for f in fields(Trajectories)))
        lengths = {len(getattr(trajectories, f.name)) for f in fields(Trajectories)}
        if len(lengths) != 1:
            raise ValueError(f"its arrays have the lengths {sorted(lengths)}")
    except Exception as error:  # numpy and zipfile raise many kinds
        raise RecordError(
            f"{path} can not be read as recoil trajectories: {error}. Delete it and make it again."
        ) from error
    return trajectories, settings


def load_shards(folder: Path, split: str) -> tuple[Trajectories, dict[str, Any]]:
    """All trajectories of one of `SPLITS` and the settings they share.

    Raises RecordError where there are none, or where shards were made with different settings.
    """
    paths = [p for p in sorted(folder.glob("recoil-*.npz")) if split_of(int(p.stem.partition("-")[2])) == split]
    if not paths:
        raise RecordError(
            f"{folder} holds no {split!r} recoils. Make them: "
            f"python -m stem_gym.datasets.recoil_trajectories --out {folder}"
        )
    parts = [load_shard(path) for path in paths]
    for path, (_, settings) in zip(paths, parts, strict=True):
        if settings != parts[0][1]:
            raise RecordError(f"{path} was made with {settings}, but {paths[0].name} with {parts[0][1]}.")
    return Trajectories.joined([part for part, _ in parts]), parts[0][1]
