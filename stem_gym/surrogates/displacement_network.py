"""The displacement surrogate's network: a few small perceptrons on features that have the sheet's own symmetry."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stem_gym.datasets.recoil_shards import OUTCOMES, SITES

__all__ = ["FEATURES", "OutcomeNetwork", "recoil_features"]

FEATURES = 6 + len(SITES)
_USUAL_TRANSFER_EV = 20.0
_PRISTINE = SITES.index("pristine")


def recoil_features(transfer_ev: Tensor, direction: Tensor, site: Tensor) -> Tensor:
    """Features (…, FEATURES) of recoils (…), unit directions (…, 3) and sites (…): polynomials of the momentum.

    The momentum is in units of that of 20 eV. A mirror through beam and partner changes nothing, nor in pristine
    graphene a turn by 120° about the beam: x³ − 3xy² is the lowest polynomial that such turns leave alone.
    """
    momentum = torch.sqrt(transfer_ev / _USUAL_TRANSFER_EV)[..., None] * direction
    x, y, z = momentum.unbind(-1)
    pristine = (site == _PRISTINE).to(x.dtype)
    planar = x * x + y * y
    kind = nn.functional.one_hot(site, len(SITES)).to(x.dtype)
    own = torch.stack(
        (
            3.0 * (z - 0.9),
            3.0 * (transfer_ev / _USUAL_TRANSFER_EV - 0.9),
            4.0 * planar,
            (1 - pristine) * 3.0 * x,
            (1 - pristine) * 4.0 * y * y,
            pristine * 8.0 * (x * x - 3.0 * y * y) * x,
        ),
        dim=-1,
    )
    return torch.cat((own, kind), dim=-1)


class OutcomeNetwork(nn.Module):
    """Logits (…, outcomes) from features (…, FEATURES): the mean of several perceptrons, each with its own weights."""

    def __init__(self, width: int, members: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            nn.Sequential(
                nn.Linear(FEATURES, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, len(OUTCOMES)),
            )
            for _ in range(members)
        )

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([member(features) for member in self.members]).mean(dim=0)
