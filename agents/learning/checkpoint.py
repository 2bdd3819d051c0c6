"""Where a training run stands, in one safetensors file: network, optimiser, and the numbers needed to go on.

One file that is replaced as a whole: a kill at any time leaves the checkpoint before or the new one. It holds no code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from agents.engine.storage import write_whole
from stem_gym.core.errors import PolicyError, RecordError

FILE = "checkpoint.safetensors"
_FORMAT = "stem_gym checkpoint 1"


def write_checkpoint(
    folder: Path, network: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> Path:
    """Write the checkpoint of a run. Raises RecordError where the folder can not be written."""
    tensors = {f"network.{name}": value.detach().contiguous() for name, value in network.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value.contiguous() for key, value in state.items()}
    data = save(tensors, metadata={"format": _FORMAT, "progress": json.dumps(progress)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, data)
    except OSError as error:
        raise RecordError(
            f"Can not write the checkpoint to {folder}: {error.strerror or error}. Name a folder that you may write to."
        ) from error
    return folder / FILE


def read_checkpoint(folder: Path, network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Put a run back to where its checkpoint stands and give its progress; None where there is no checkpoint.

    Raises PolicyError for a truncated or foreign file, or one of another network.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 – no mapping
    except (SafetensorError, OSError) as error:
        raise PolicyError(f"{path} is no readable checkpoint: {error}. Remove it to start anew.") from error
    if metadata.get("format") != _FORMAT:
        raise PolicyError(f"{path} is no checkpoint: its format is {metadata.get('format')!r}, not {_FORMAT!r}.")
    own = {name.removeprefix("network."): value for name, value in tensors.items() if name.startswith("network.")}
    try:
        network.load_state_dict(own)
    except RuntimeError as error:
        raise PolicyError(f"{path} belongs to a network of other settings: {error}") from error
    _restore(optimizer, tensors)
    progress: dict[str, Any] = json.loads(metadata["progress"])
    return progress


def _restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
