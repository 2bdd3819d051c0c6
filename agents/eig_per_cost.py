"""Expected information for its cost: the experiment that is expected to tell most per second of microscope time."""

from __future__ import annotations

from agents.engine.campaign import CampaignPolicy, CampaignSettings, Outlook, Proposal
from stem_gym.surrogates.information import expected_information


class Settings(CampaignSettings):
    """What can be chosen."""


class InformationPerCost(CampaignPolicy):
    """Finds an experiment worth the nats a second that it is expected to tell."""

    name = "eig_per_cost"
    Settings = Settings

    def propose(self, outlook: Outlook) -> Proposal:
        return self.best(outlook, outlook.judged(expected_information) / outlook.seconds)


POLICY = InformationPerCost
