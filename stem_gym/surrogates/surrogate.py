"""The contract of a surrogate: an estimate with its uncertainty, a model card, and weights that are data.

A surrogate takes what the physics takes and gives what the physics gives, plus a standard deviation and a flag for
each row that says whether the row lies where the surrogate was trained and tested. Weights are a safetensors file
(numbers) beside a JSON file (card, settings, SHA-256 of the numbers): loading them runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from stem_gym.core.errors import RecordError, ValidRangeError

__all__ = ["Estimate", "ModelCard", "Surrogate", "UncertaintyWarning", "judge_range", "load_weights", "save_weights"]


class UncertaintyWarning(UserWarning):
    """A surrogate was used outside its valid range; its uncertainty was widened."""


@dataclass(frozen=True)
class Estimate:
    """What a surrogate says about B rows."""

    mean: Tensor  # (B, …) the physics' quantity, in the physics' unit
    std: Tensor  # (B, …) standard deviation of the reference about the mean, same unit
    inside: Tensor  # (B,) bool: the row lies in the valid range

    def interval(self, factor: float = 1.645) -> tuple[Tensor, Tensor]:
        """Lower and upper bound; the default factor is a 90 % interval."""
        return self.mean - factor * self.std, self.mean + factor * self.std


@dataclass(frozen=True)
class ModelCard:
    """Where a surrogate comes from, how good it is, and where it may be used."""

    name: str
    stands_for: str
    reference: str
    training: dict[str, Any]
    held_out: dict[str, Any]
    valid_range: dict[str, tuple[float, float]]
    limits: tuple[str, ...] = field(default_factory=tuple)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> ModelCard:
        """The card from its JSON form."""
        bounds = {name: (float(low), float(high)) for name, (low, high) in given["valid_range"].items()}
        return cls(**{**given, "valid_range": bounds, "limits": tuple(given.get("limits", ()))})


@runtime_checkable
class Surrogate(Protocol):
    """Anything with a card that estimates what a physics function computes."""

    @property
    def card(self) -> ModelCard:
        """The model card."""
        ...

    def estimate(self, *physics_arguments: Any) -> Estimate:
        """The physics' own arguments in, mean and uncertainty out."""
        ...


def judge_range(card: ModelCard, values: Mapping[str, tuple[Tensor, Tensor]], strict: bool) -> Tensor:
    """Which rows lie inside the card's valid range: (B,) bool.

    `values` gives for each quantity its lowest and highest value in every row, (B,) each. Rows outside raise
    ValidRangeError when `strict`, and otherwise give one UncertaintyWarning that names the quantities.
    """
    inside = torch.ones_like(next(iter(values.values()))[0], dtype=torch.bool)
    complaints = []
    for name, (lowest, highest) in values.items():
        low, high = card.valid_range[name]
        slack = 1e-5 * max(abs(low), abs(high))
        fine = (lowest >= low - slack) & (highest <= high + slack)
        inside = inside & fine
        if not bool(fine.all()):
            complaints.append(
                f"{name} from {float(lowest.min()):.4g} to {float(highest.max()):.4g} (valid: {low:.4g} to {high:.4g})"
            )
    if complaints:
        message = f"{card.name} was asked outside its valid range: {'; '.join(complaints)}."
        if strict:
            raise ValidRangeError(f"{message} Use the physics model there, or strict=False for a widened uncertainty.")
        warnings.warn(f"{message} Its uncertainty is widened.", UncertaintyWarning, stacklevel=3)
    return inside


def save_weights(path: Path, tensors: Mapping[str, Tensor], card: ModelCard, settings: Mapping[str, Any]) -> None:
    """Write PATH.safetensors and PATH.json, each atomically, the numbers first."""
    numbers = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    document = {
        "card": asdict(card),
        "settings": dict(settings),
        "sha256": hashlib.sha256(numbers).hexdigest(),
        "torch": str(torch.__version__),
    }
    _replace(path.with_suffix(".safetensors"), numbers)
    _replace(path.with_suffix(".json"), (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def load_weights(path: Path) -> tuple[dict[str, Tensor], ModelCard, dict[str, Any]]:
    """Read what `save_weights` wrote. Raises RecordError for missing, damaged or foreign files."""
    numbers_path, document_path = path.with_suffix(".safetensors"), path.with_suffix(".json")
    try:
        numbers = numbers_path.read_bytes()
        document = json.loads(document_path.read_text())
        card = ModelCard.from_dict(document["card"])
        expected, settings = document["sha256"], dict(document["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"No surrogate can be read from {path}: {error}. Expected {numbers_path.name} beside {document_path.name}."
        ) from error
    found = hashlib.sha256(numbers).hexdigest()
    if found != expected:
        raise RecordError(
            f"{numbers_path} does not belong to {document_path.name}: its SHA-256 is {found}, not {expected}."
        )
    try:
        return load(numbers), card, settings
    except SafetensorError as error:
        raise RecordError(f"{numbers_path} is damaged: {error}.") from error


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
