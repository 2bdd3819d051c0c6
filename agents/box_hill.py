"""Box and Hill: the classical criterion of model discrimination, from means and variances of the laws' predictions.

G. E. P. Box and W. J. Hill, Technometrics 9, 57 (1967).
"""

from __future__ import annotations

from agents.engine.campaign import CampaignPolicy, CampaignSettings, Outlook, Proposal
from stem_gym.surrogates import information


class Settings(CampaignSettings):
    """What can be chosen."""


class BoxHill(CampaignPolicy):
    """Finds an experiment worth the criterion."""

    name = "box_hill"
    Settings = Settings

    def propose(self, outlook: Outlook) -> Proposal:
        return self.best(outlook, outlook.judged(information.box_hill))


POLICY = BoxHill
