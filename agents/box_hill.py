"""Box and Hill: the classical criterion of model discrimination, from means and variances of the laws' predictions.

G. E. P. Box and W. J. Hill, Technometrics 9, 57 (1967).
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.engine.campaign import CampaignPolicy, CampaignSettings, Outlook
from stem_gym.surrogates import information


class Settings(CampaignSettings):
    """What can be chosen."""


class BoxHill(CampaignPolicy):
    """Finds an experiment worth the criterion."""

    name = "box_hill"
    Settings = Settings

    def merit(self, outlook: Outlook) -> Tensor:
        told = [information.box_hill(outlook.laws, forecast) for forecast in outlook.forecasts]
        return torch.stack(told, dim=1)


POLICY = BoxHill
