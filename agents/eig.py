"""Expected information: the experiment whose measurement is expected to tell most about which law is true.

Lindley, Ann. Math. Stat. 27, 986 (1956). By quadrature of the laws' predictions, or by a bound from their means and
variances, which takes half the time of the quadrature itself.
"""

from __future__ import annotations

from agents.engine.campaign import CampaignPolicy, CampaignSettings, Outlook, Proposal
from stem_gym.surrogates.information import expected_information, information_bound


class Settings(CampaignSettings):
    """What can be chosen."""

    bound: bool = False
    """whether the bound is taken instead of the quadrature"""


class ExpectedInformation(CampaignPolicy):
    """Finds an experiment worth the nats that it is expected to tell, whatever it costs."""

    name = "eig"
    Settings = Settings

    def propose(self, outlook: Outlook) -> Proposal:
        told = information_bound if self.settings.bound else expected_information
        return self.best(outlook, outlook.judged(told))


POLICY = ExpectedInformation
