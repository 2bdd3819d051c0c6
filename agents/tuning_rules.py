"""Tuning rules: expected information for its cost, and a few rules by hand for what tells nothing by itself.

An operator's rules: calibrate before anything else; tune when the noise has grown by more than so much; erase the site
when no fresh one is left. The simple competitor of policies that learn when to do so.
"""

from __future__ import annotations

import dataclasses

import torch
from pydantic import Field

from agents.engine.campaign import CampaignPolicy, CampaignSettings, Outlook, Proposal
from stem_gym.surrogates.information import expected_information


class Settings(CampaignSettings):
    """What can be chosen."""

    tune_above: float = Field(2.0, gt=1)
    """growth of the noise from which it is tuned"""
    spare: float = Field(3.0, ge=1)
    """an enabling action must leave time for so many of the proposed experiments"""


class TuningRules(CampaignPolicy):
    """Proposes as `eig_per_cost`, unless a rule asks for an enabling action that can be paid for."""

    name = "tuning_rules"
    Settings = Settings

    def propose(self, outlook: Outlook) -> Proposal:
        proposal = self.best(outlook, outlook.judged(expected_information) / outlook.seconds)
        present = outlook.present
        here = present.site.unsqueeze(1)
        wanted = {
            "tune": present.noise_factor > self.settings.tune_above,
            "erase": ~present.fresh.any(1),
            "calibrate": ~present.calibrated.gather(1, here).squeeze(1),
        }
        for number, action in enumerate(self.protocol.experiment.enabling.values(), start=1):
            paid = action.seconds + self.settings.spare * proposal.seconds < outlook.seconds_left
            asked = wanted[action.does] & paid
            proposal = dataclasses.replace(
                proposal,
                kind=torch.where(asked, number, proposal.kind),
                seconds=torch.where(asked, action.seconds, proposal.seconds),
            )
        return proposal


POLICY = TuningRules
