"""Sobol: experiments that fill the space of designs evenly, in an order that does not depend on what is measured.

One scrambled Sobol sequence for all episodes; each begins it at a place of its own. Sites are taken in turn.
"""

from __future__ import annotations

from typing import Any

import torch

from agents.engine.campaign import CampaignPolicy, CampaignSettings, Outlook, Proposal
from agents.policy import Face

_PLACES = 4096


class Settings(CampaignSettings):
    """What can be chosen."""


class Sobol(CampaignPolicy):
    """Goes along a sequence."""

    name = "sobol"
    Settings = Settings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        engine = torch.quasirandom.SobolEngine(len(self.protocol.axes), scramble=True, seed=settings.seed)
        coordinate = 2.0 * engine.draw(_PLACES) - 1.0
        self._sequence = torch.stack([axis.value(coordinate[:, i]) for i, axis in enumerate(self.protocol.axes)], dim=1)
        self._begin = torch.zeros(face.rows, dtype=torch.int64)

    def propose(self, outlook: Outlook) -> Proposal:
        count = outlook.history.done.sum(1)
        rows = torch.arange(self.face.rows)
        drawn = (self.streams.uniform(rows) * _PLACES).long()
        self._begin = torch.where(count == 0, drawn, self._begin)
        design = self._sequence[(self._begin + count) % _PLACES]
        site = count % self.protocol.sites
        moved = (site != outlook.present.site).float()
        seconds = self.protocol.seconds(design, moved, outlook.present.design)
        return Proposal(torch.zeros_like(site), design, site, seconds)


POLICY = Sobol
