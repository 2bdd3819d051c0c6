"""A saved policy: a folder with `policy.safetensors` and the contract `policy.json`. Data, never code.

The contract names the agent, the environment's id, both spaces, the normalisation, the hash of the task, the settings,
the versions, how the policy came about, and the checksum of the arrays. All of it is checked before the policy acts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as decode
from safetensors.numpy import save as encode

from agents.policy import Array, Face, Policy
from stem_gym.core.config import parse
from stem_gym.core.errors import PolicyError, RecordError, StemGymError
from stem_gym.core.spaces import space_as_data

FORMAT = "stem_gym policy 1"
ARRAYS, CONTRACT = "policy.safetensors", "policy.json"
_KEYS = {
    "format": str, "agent": str, "id": str, "observation_space": dict, "action_space": dict, "normalisation": str,
    "task_hash": str, "settings": dict, "sha256": str,
}  # fmt: skip
_VERSIONED = ("stem-gym", "torch", "gymnasium", "numpy", "stable-baselines3", "safetensors")


def save_policy(policy: Policy, folder: Path, training: Mapping[str, Any]) -> Path:
    """Write the folder; each file appears whole or not at all. Raises RecordError where it can not be written."""
    arrays = {name: np.ascontiguousarray(value) for name, value in policy.arrays().items()}
    data = encode(arrays)
    contract = contract_of(policy) | {
        "sha256": hashlib.sha256(data).hexdigest(),
        "versions": versions(),
        "training": dict(training),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ARRAYS, data)
        write_whole(folder / CONTRACT, (json.dumps(contract, indent=1) + "\n").encode())
    except OSError as error:
        raise RecordError(
            f"Can not write the policy to {folder}: {error.strerror or error}. Name a folder that you may write to."
        ) from error
    return folder


def contract_of(policy: Policy) -> dict[str, Any]:
    """What a deployer checks."""
    face = policy.face
    return {
        "format": FORMAT,
        "agent": policy.name,
        "id": face.id,
        "observation_space": space_as_data(face.observation_space),
        "action_space": space_as_data(face.action_space),
        "normalisation": "uint8 images divided by 255; all other numbers as the environment gives them",
        "task_hash": face.task_hash,
        "settings": policy.settings.model_dump(mode="json"),
    }


def load_policy(folder: Path, face: Face) -> Policy:
    """The policy in `folder`, made by the installed agent that its contract names, checked against `face`.

    Raises PolicyError for missing, truncated or foreign files, and for another id, other spaces or another task.
    """
    from agents.engine.roster import policy_class

    contract = read_contract(folder)
    check_contract(contract, face, folder)
    arrays = read_arrays(folder, contract)
    kind = policy_class(contract["agent"])
    try:
        settings = parse(kind.Settings, contract["settings"], f"{folder / CONTRACT}, settings")
    except StemGymError as error:
        raise PolicyError(f"The installed agent {contract['agent']!r} does not take these settings: {error}") from error
    policy = kind(face, settings)
    policy.set_arrays(arrays)
    return policy


def read_contract(folder: Path) -> dict[str, Any]:
    """The contract of a saved policy. Raises PolicyError for anything else."""
    path = folder / CONTRACT
    if folder.is_file():
        raise PolicyError(f"{folder} is a file; name the folder of the saved policy, here {folder.parent}.")
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PolicyError(
            f"No saved policy in {folder}: it has no {CONTRACT}. Name a folder written by `stem-gym train`."
        ) from None
    except OSError as error:
        raise PolicyError(f"Can not read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{path} is damaged or no policy's contract: {error}.") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        given = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise PolicyError(f"{path} is no policy's contract: its format is {given!r}, it should be {FORMAT!r}.")
    missing = [key for key in _KEYS if key not in data]
    if missing:
        raise PolicyError(f"{path} lacks {', '.join(missing)}: the contract is incomplete.")
    for key, kind in _KEYS.items():
        if not isinstance(data[key], kind):
            raise PolicyError(
                f"{path} is damaged or no policy's contract: {key!r} should be of type {kind.__name__}; "
                f"given {json.dumps(data[key])[:60]}."
            )
    return data


def check_contract(contract: Mapping[str, Any], face: Face, folder: Path) -> None:
    """Refuse a policy that was made for another environment; both are named."""
    if contract["id"] != face.id:
        raise PolicyError(
            f"The policy in {folder} was made for {contract['id']}; it was asked to run on {face.id}. "
            f"Run it on {contract['id']}, or train one for {face.id}."
        )
    for name in ("observation_space", "action_space"):
        expected, given = contract[name], space_as_data(getattr(face, name))
        if expected != given:
            raise PolicyError(
                f"The policy in {folder} was made for another {name.replace('_', ' ')} of {face.id}: "
                f"{_difference(expected, given)}"
            )
    if contract["task_hash"] != face.task_hash:
        raise PolicyError(
            f"The policy in {folder} was made for the task with hash {contract['task_hash']}; {face.id} as configured "
            f"here has {face.task_hash}. Use the task's own values, or train a policy for these."
        )


def read_arrays(folder: Path, contract: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays, after their checksum. Raises PolicyError for a truncated or foreign file."""
    path = folder / ARRAYS
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PolicyError(f"Can not read the policy's arrays {path}: {error.strerror or error}.") from error
    found = hashlib.sha256(data).hexdigest()
    if found != contract["sha256"]:
        raise PolicyError(
            f"{path} is truncated or belongs to another policy: its SHA-256 is {found[:12]}…, "
            f"the contract says {str(contract['sha256'])[:12]}…."
        )
    try:
        arrays: dict[str, Array] = decode(data)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:  # the last three: a type that numpy lacks
        raise PolicyError(f"{path} is no safetensors file: {error}.") from error
    return arrays


def check_arrays(arrays: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """Raises PolicyError unless names, shapes and types agree and every number is finite."""
    wrong = sorted(set(arrays) ^ set(expected))
    if wrong:
        raise PolicyError(f"The saved arrays do not fit the installed agent; in one but not the other: {wrong[:4]}.")
    for name, value in arrays.items():
        if value.shape != expected[name].shape:
            raise PolicyError(
                f"The saved array {name!r} has shape {value.shape}; the installed agent needs {expected[name].shape}."
            )
        if value.dtype != expected[name].dtype:
            raise PolicyError(
                f"The saved array {name!r} is of type {value.dtype}; the installed agent needs {expected[name].dtype}."
            )
        if not np.isfinite(value).all():
            raise PolicyError(f"The saved array {name!r} holds numbers that are not finite: the policy is damaged.")


def _difference(expected: Any, given: Any) -> str:
    """What differs, key by key for a Dict."""
    if isinstance(expected, dict) and isinstance(given, dict) and {"Dict"} == expected.keys() == given.keys():
        for key in sorted(expected["Dict"].keys() | given["Dict"].keys()):
            old, new = expected["Dict"].get(key), given["Dict"].get(key)
            if old != new:
                return f"{key!r} was {json.dumps(old)}, here it is {json.dumps(new)}."
    return f"it was {json.dumps(expected)}, here it is {json.dumps(given)}."


def versions() -> dict[str, str]:
    """Versions of what a policy's behaviour may depend on."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_whole(path: Path, data: bytes) -> None:
    """Write under another name first, so that a kill leaves the old file or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(data)
    draft.replace(path)
