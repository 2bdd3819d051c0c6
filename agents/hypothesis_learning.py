"""Hypothesis learning: structured Gaussian processes of every law, and an ε-greedy choice among them.

Y. Liu et al., arXiv 2202.01089, and Ziatdinov et al., arXiv 2112.06649. After some random experiments every law is
tried in each of a few steps of warming up; later one is chosen, mostly the one with the highest mean reward. The next
experiment is where the chosen law's process is least certain. The law is rewarded with +1 where the median of its
predictive variance fell since the step before, and with −1 where it rose.

The published verdict is the law with the highest mean reward. It says how well a law lowers its own variance, not
whether it is true, and is near chance; by default the referee's posterior for the same experiments is declared.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from agents.engine.campaign import CampaignPolicy, CampaignSettings, Outlook, Proposal
from agents.engine.structured_law import StructuredLaws
from agents.policy import Face

_SURE = 0.9  # what the published verdict gives to its law, of which it has no probability


class Settings(CampaignSettings):
    """What can be chosen."""

    first: int = Field(2, ge=1)
    """random experiments at the start (the published study: 20, of 120)"""
    warm_up: int = Field(3, ge=0)
    """steps in which every law is tried"""
    epsilon: float = Field(0.4, ge=0, le=1)
    """share of the later steps in which a law is chosen at random"""
    own_verdict: bool = False
    """whether the published verdict is declared, at the end of the budget"""
    samples: int = Field(256, ge=16)
    """particles of each law's process"""
    kept: int = Field(16, ge=1)
    """of these, how many predict"""


class HypothesisLearning(CampaignPolicy):
    """Finds an experiment worth the variance of the chosen law's process."""

    name = "hypothesis_learning"
    Settings = Settings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        self.laws = StructuredLaws(self.protocol, settings.samples, min(settings.kept, settings.samples))
        rows, laws = face.rows, self.laws.count
        self.reward = torch.zeros(rows, laws)  # summed
        self.tried = torch.zeros(rows, laws)
        self._median = torch.full((rows, laws), torch.nan)  # of the variance, when the law was last looked at

    @torch.inference_mode()
    def reset(self, rows: Any, seeds: Any = None) -> None:
        super().reset(rows, seeds)
        index = torch.as_tensor(rows)
        self.reward[index], self.tried[index], self._median[index] = 0.0, 0.0, torch.nan

    def propose(self, outlook: Outlook) -> Proposal:
        rows = self.face.rows
        drawn = self.streams.uniform(torch.arange(rows), (2 + outlook.design.shape[0] * self.protocol.sites,))
        count = outlook.history.done.sum(1)
        variance = torch.stack(
            [self.laws.variance(law, outlook.history, outlook.design) for law in range(self.laws.count)], dim=1
        )  # (B, L, E)
        warm = count < self.settings.first + self.settings.warm_up
        chosen = self.chosen(drawn[:, :2])
        active = torch.nn.functional.one_hot(chosen, self.laws.count).bool() | warm.unsqueeze(1)
        self.judge(variance.median(dim=2).values, active & (count >= self.settings.first).unsqueeze(1))
        least = variance.median(dim=2).values.argmin(1)  # while warming up, the most certain law leads
        leading = torch.where(warm, least, chosen)
        own = variance[torch.arange(rows), leading]
        random = drawn[:, 2:].reshape(outlook.seconds.shape)
        # A tiny random share decides among sites, of which the process knows nothing.
        ranked = own.unsqueeze(1) * (1.0 + 1e-4 * random)
        merit = torch.where((count < self.settings.first)[:, None, None], random, ranked)
        return self.best(outlook, merit)

    def chosen(self, uniform: Tensor) -> Tensor:
        """The law (B,) of each row by ε-greedy choice, from uniform numbers (B, 2)."""
        mean = self.reward / self.tried.clamp(min=1.0)
        anyone = (uniform[:, 1] * self.laws.count).long().clamp(max=self.laws.count - 1)
        return torch.where(uniform[:, 0] < self.settings.epsilon, anyone, mean.argmax(1))

    def judge(self, median: Tensor, active: Tensor) -> None:
        """Reward the `active` laws (B, L) for the medians (B, L) of their variance, and remember these."""
        known = active & ~torch.isnan(self._median)
        self.reward += torch.where(known, torch.sign(self._median - median).nan_to_num(0.0), torch.zeros_like(median))
        self.tried += known.float()
        self._median = torch.where(active, median, self._median)

    def declared(self, outlook: Outlook) -> Tensor:
        if not self.settings.own_verdict:
            return super().declared(outlook)
        best = (self.reward / self.tried.clamp(min=1.0)).argmax(1)
        answers = outlook.probability.shape[1]
        share = torch.full_like(outlook.probability, (1.0 - _SURE) / (answers - 1))
        return share.scatter(1, best.unsqueeze(1), _SURE)


POLICY = HypothesisLearning
