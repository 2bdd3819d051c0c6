"""The displacement surrogate: what becomes of a carbon atom in graphene after a recoil, as molecular dynamics tells it.

It answers P(outcome | transferred energy, direction, site) for the sites and outcomes of
`stem_gym.datasets.recoil_shards`. The beam travels along +z; "ahead" is the exit side of the sheet.
"""

from __future__ import annotations

import math
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stem_gym.core.errors import ConfigError, unknown_name
from stem_gym.datasets.recoil_shards import OUTCOMES, SITES
from stem_gym.surrogates.displacement_network import OutcomeNetwork, recoil_features
from stem_gym.surrogates.surrogate import Estimate, ModelCard, judge_range, load_weights

__all__ = ["OUTCOMES", "SITES", "DisplacementSurrogate", "recoil_direction", "site_index"]

_LARGEST_STD = 0.5  # of any indicator


def site_index(site: str) -> int:
    """Index of a site's name. Raises UnknownNameError for a name that is none of `SITES`."""
    if site not in SITES:
        raise unknown_name("site", site, SITES)
    return SITES.index(site)


def recoil_direction(tilt_rad: Tensor, azimuth_rad: Tensor) -> Tensor:
    """Unit vectors (…, 3) at a tilt (…) from the beam and an azimuth (…) from the direction to the partner.

    The partner is the silicon atom, the vacancy, or in pristine graphene one of the three neighbours.
    """
    tilt, azimuth = torch.broadcast_tensors(tilt_rad, azimuth_rad)
    sine = torch.sin(tilt)
    return torch.stack((sine * torch.cos(azimuth), sine * torch.sin(azimuth), torch.cos(tilt)), dim=-1)


class DisplacementSurrogate:
    """Outcome probabilities of recoils: batched, on any device, differentiable in energy and direction."""

    def __init__(self, network: OutcomeNetwork, card: ModelCard, settings: dict[str, Any]) -> None:
        self.network, self._card, self.settings = network, card, settings
        self.network.eval().requires_grad_(False)

    @property
    def card(self) -> ModelCard:
        """The model card: training data, held-out error, valid range."""
        return self._card

    @classmethod
    def load(cls, path: Path | None = None, device: torch.device | str | None = None) -> DisplacementSurrogate:
        """The shipped surrogate, or one from PATH(.safetensors, .json). Raises RecordError for damaged files."""
        shipped = Path(str(files("stem_gym.surrogates") / "weights" / "displacement"))
        tensors, card, settings = load_weights(path or shipped)
        with torch.random.fork_rng(devices=[]):  # the first weights are thrown away, and cost nobody a random number
            network = OutcomeNetwork(int(settings["width"]), int(settings["members"]))
        network.load_state_dict(tensors)
        return cls(network.to(device), card, settings)

    def estimate(self, transfer_ev: Tensor, direction: Tensor, site: Tensor, strict: bool = False) -> Estimate:
        """Probability of each outcome for transfers (B,), directions (B, 3) and sites (B,): mean and std (B, 4).

        The standard deviation is of the outcome itself, 0 or 1, about its probability. Rows outside the valid range
        are flagged, warned about and given the largest standard deviation there is; with `strict` they raise
        ValidRangeError.
        """
        mean = self.outcome_probabilities(transfer_ev, direction, site)
        inside = judge_range(self.card, _extremes(transfer_ev, direction), strict)
        std = torch.sqrt(mean * (1 - mean))
        return Estimate(mean, torch.where(inside[:, None], std, torch.full_like(std, _LARGEST_STD)), inside)

    def inside(self, transfer_ev: Tensor, direction: Tensor) -> Tensor:
        """Which recoils (…) lie in the valid range, without a warning: (…) bool."""
        result = torch.ones_like(direction[..., 0], dtype=torch.bool)
        for name, (lowest, highest) in _extremes(transfer_ev, direction).items():
            low, high = self.card.valid_range[name]
            result = result & (lowest >= low) & (highest <= high)
        return result

    def outcome_probabilities(self, transfer_ev: Tensor, direction: Tensor, site: Tensor) -> Tensor:
        """P(outcome) in the order of `OUTCOMES`, (…, 4), for transfers (…), directions (…, 3) and site indices (…).

        Directions need not be of unit length. Transfers beyond the valid range are taken at its border: below the
        lowest one nothing happens. Raises ConfigError for shapes, sites or values that make no sense.
        """
        shape = _check(transfer_ev, direction, site)
        low, high = self.card.valid_range["transfer_ev"]
        energy = transfer_ev.clamp(low, high).expand(shape)
        unit = torch.nn.functional.normalize(direction, dim=-1).expand(*shape, 3)
        logits = self.network(recoil_features(energy, unit, site.expand(shape)))
        return torch.softmax(logits / self.settings["temperature"], dim=-1)

    def threshold_ev(self, direction: Tensor, site: Tensor, outcomes: tuple[str, ...]) -> Tensor:
        """Lowest transfer (n,) from which one of `outcomes` is likelier than not; NaN where there is none.

        For directions (n, 3) and site indices (n,), by the rule that molecular dynamics is asked by
        (`stem_gym.datasets.recoil_thresholds.first_lasting`); not differentiable.
        """
        from stem_gym.datasets.recoil_thresholds import SPAN_EV, STEP_EV, WITHIN_EV, first_lasting  # imports numba

        wanted = [_outcome_index(name) for name in outcomes]

        def likely(row: int, transfer_ev: float) -> bool:
            probability = self.outcome_probabilities(direction.new_tensor(transfer_ev), direction[row], site[row])
            return float(probability[wanted].sum()) > 0.5

        with torch.no_grad():
            found = [first_lasting(partial(likely, row), SPAN_EV, STEP_EV, WITHIN_EV) for row in range(len(direction))]
        return direction.new_tensor([math.nan if one is None else one for one in found])


def _outcome_index(name: str) -> int:
    if name not in OUTCOMES:
        raise unknown_name("outcome", name, OUTCOMES)
    return OUTCOMES.index(name)


def _extremes(transfer_ev: Tensor, direction: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Lowest and highest value in every row of each quantity that has a valid range."""
    x, y, z = direction.detach().unbind(-1)
    tilt = torch.rad2deg(torch.atan2(torch.hypot(x, y), z))
    transfer = transfer_ev.detach().expand(tilt.shape)
    return {"transfer_ev": (transfer, transfer), "tilt_deg": (tilt, tilt)}


def _check(transfer_ev: Tensor, direction: Tensor, site: Tensor) -> torch.Size:
    """The common shape (…). Raises ConfigError for input that makes no sense."""
    if direction.ndim < 1 or direction.shape[-1] != 3:
        raise ConfigError(f"Directions are vectors of shape (…, 3); given shape {tuple(direction.shape)}.")
    if site.is_floating_point() or site.dtype == torch.bool:
        raise ConfigError(f"Sites are indices into {SITES}, of an integer type; given {site.dtype}.")
    try:
        shape = torch.broadcast_shapes(transfer_ev.shape, direction.shape[:-1], site.shape)
    except RuntimeError as error:
        shapes = tuple(transfer_ev.shape), tuple(direction.shape), tuple(site.shape)
        raise ConfigError(
            f"Transfers (…), directions (…, 3) and sites (…) must broadcast; given the shapes {shapes}."
        ) from error
    sound = torch.isfinite(transfer_ev).all() & (transfer_ev >= 0).all() & torch.isfinite(direction).all()
    sound = sound & (direction.detach().norm(dim=-1) > 0).all()
    if not bool(sound):
        raise ConfigError("Transfers must be finite and at least 0 eV, and directions finite and longer than zero.")
    if site.numel() and not (int(site.min()) >= 0 and int(site.max()) < len(SITES)):
        raise ConfigError(f"Sites are 0 to {len(SITES) - 1} for {SITES}; given {int(site.min())} to {int(site.max())}.")
    return shape
