"""Expected information for its cost: the experiment that is expected to tell most per second of microscope time."""

from __future__ import annotations

import torch
from torch import Tensor

from agents.engine.campaign import CampaignPolicy, CampaignSettings, Outlook
from stem_gym.surrogates.information import expected_information


class Settings(CampaignSettings):
    """What can be chosen."""


class InformationPerCost(CampaignPolicy):
    """Finds an experiment worth the nats a second that it is expected to tell."""

    name = "eig_per_cost"
    Settings = Settings

    def merit(self, outlook: Outlook) -> Tensor:
        told = [expected_information(outlook.laws, forecast) for forecast in outlook.forecasts]
        return torch.stack(told, dim=1) / outlook.seconds


POLICY = InformationPerCost
