"""Variance of the model average: the experiment whose value is least certain, over laws and parameters together.

The acquisition of uncertainty sampling: it can not tell what is unknown about the law from what is unknown within it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.engine.campaign import CampaignPolicy, CampaignSettings, Outlook
from stem_gym.surrogates import information


class Settings(CampaignSettings):
    """What can be chosen."""


class AverageVariance(CampaignPolicy):
    """Finds an experiment worth the variance of the value that is expected of it."""

    name = "bma_variance"
    Settings = Settings

    def merit(self, outlook: Outlook) -> Tensor:
        told = [information.bma_variance(outlook.laws, forecast) for forecast in outlook.forecasts]
        return torch.stack(told, dim=1)


POLICY = AverageVariance
