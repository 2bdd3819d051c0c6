"""Variance of the model average: the experiment whose value is least certain, over laws and parameters together.

The acquisition of uncertainty sampling: it can not tell what is unknown about the law from what is unknown within it.
"""

from __future__ import annotations

from agents.engine.campaign import CampaignPolicy, CampaignSettings, Outlook, Proposal
from stem_gym.surrogates import information


class Settings(CampaignSettings):
    """What can be chosen."""


class AverageVariance(CampaignPolicy):
    """Finds an experiment worth the variance of the value that is expected of it."""

    name = "bma_variance"
    Settings = Settings

    def propose(self, outlook: Outlook) -> Proposal:
        return self.best(outlook, outlook.judged(information.bma_variance))


POLICY = AverageVariance
