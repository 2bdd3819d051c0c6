"""Open set: expected information with "none of these" among the answers.

A Gaussian process stands for every smooth response that no law of the set describes. It takes part in the belief and
in the choice: designs that tell the laws apart can hide that all of them are wrong.
"""

from __future__ import annotations

from pydantic import Field

from agents.engine.campaign import CampaignPolicy, CampaignSettings, Outlook, Proposal
from stem_gym.surrogates.information import expected_information


class Settings(CampaignSettings):
    """What can be chosen."""

    none: float | None = Field(0.2, gt=0, lt=1)
    """probability of "none of these" before anything was measured"""


class OpenSet(CampaignPolicy):
    """Finds an experiment worth the nats that it is expected to tell about the answers, "none" included."""

    name = "open_set"
    Settings = Settings

    def propose(self, outlook: Outlook) -> Proposal:
        return self.best(outlook, outlook.judged(expected_information))


POLICY = OpenSet
