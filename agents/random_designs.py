"""Random designs: experiments drawn evenly from the grid of designs and sites; the referee's posterior is declared.

What an agent gains by choosing is what it has over this one, which believes as it does.
"""

from __future__ import annotations

import torch

from agents.engine.campaign import CampaignPolicy, CampaignSettings, Outlook, Proposal


class Settings(CampaignSettings):
    """What can be chosen."""


class RandomDesigns(CampaignPolicy):
    """Finds every experiment worth a random number."""

    name = "random_designs"
    Settings = Settings

    def propose(self, outlook: Outlook) -> Proposal:
        return self.best(outlook, self.streams.uniform(torch.arange(self.face.rows), outlook.seconds.shape[1:]))


POLICY = RandomDesigns
