"""Two steps ahead: the first of two actions that together are expected to tell most about the law per second.

For the experiments that look best at once, what the second one would tell is averaged over what the first may show. An
enabling action tells nothing itself; it is worth what the best experiment after it tells, for the time of both.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from pydantic import Field
from torch import Tensor

from agents.engine.campaign import CampaignPolicy, CampaignSettings, Outlook, Proposal
from stem_gym.surrogates.information import Forecast, evened, expected_information, unevened


class Settings(CampaignSettings):
    """What can be chosen."""

    draws: int | None = Field(256, ge=16)
    """values of each law that an experiment is judged by: more than for one step, as those of the second are weighed by
    the first; null: as other agents have"""
    candidates: int = Field(3, ge=1, le=16)
    """experiments whose second step is looked at"""
    outcomes: int = Field(4, ge=1, le=16)
    """measurements of the first that the second is averaged over"""
    every: int = Field(2, ge=1)
    """of the grid of designs, each so many are second steps"""


class Lookahead(CampaignPolicy):
    """Finds an action worth the nats a second of the pair that it begins."""

    name = "lookahead"
    Settings = Settings

    def propose(self, outlook: Outlook) -> Proposal:
        told = outlook.judged(expected_information)  # (B, K, E)
        merit = told / outlook.seconds
        paid = outlook.seconds < outlook.seconds_left[:, None, None]
        best = torch.where(paid, merit, -torch.inf).flatten(1).topk(min(self.settings.candidates, merit[0].numel()))
        pairs = torch.full_like(merit, -torch.inf).flatten(1)
        for index in best.indices.unbind(1):
            pairs.scatter_(1, index.unsqueeze(1), self._pair(outlook, told, index).unsqueeze(1))
        pairs = torch.where(paid.flatten(1), pairs, -torch.inf)
        proposal = self.best(outlook, pairs.reshape(merit.shape))
        return self._enabled(outlook, proposal, pairs.amax(1))

    def _pair(self, outlook: Outlook, told: Tensor, index: Tensor) -> Tensor:
        """Nats a second (B,) of the experiments of an index (B,) into (K, E), each with the best that follows it."""
        count, every = len(outlook.design), self.settings.every
        rows, site, design = torch.arange(len(index)), index // count, index % count
        value = torch.stack([one.value for one in outlook.forecasts], dim=1)[rows, site]  # (B, L, S, E)
        first = value[rows, :, :, design]  # (B, L, S)
        own, cost = told.flatten(1)[rows, index].unsqueeze(1), outlook.seconds.flatten(1)[rows, index].unsqueeze(1)
        second = outlook.seconds[rows, site][:, ::every]  # (B, E') at the same site
        noise, factor = outlook.forecasts[0].noise, outlook.present.noise_factor
        worth = torch.zeros(len(index))
        for probability, weight in self._after(outlook, first):
            follow = expected_information(probability, Forecast(value[..., ::every], noise, factor, weight))
            worth = worth + ((own + follow) / (cost + second)).amax(1) / self.settings.outcomes
        return worth

    def _after(self, outlook: Outlook, first: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Probabilities (B, L) and weights (B, L, S) after each of some measurements of values (B, L, S)."""
        noise, factor = outlook.forecasts[0].noise, outlook.present.noise_factor
        even = evened(first, noise)
        law = outlook.laws
        weight = (law.unsqueeze(2) / first.shape[2]).expand_as(first).flatten(1)
        order = even.flatten(1).argsort(1)
        below = weight.gather(1, order).cumsum(1)
        found = []
        for part in range(self.settings.outcomes):
            share = (part + 0.5) / self.settings.outcomes
            place = (below < share * below[:, -1:]).sum(1, keepdim=True).clamp(max=below.shape[1] - 1)
            shown = unevened(even.flatten(1).gather(1, order.gather(1, place)), noise)  # (B, 1)
            deviation = self.protocol.experiment.noise_sd(first, factor[:, None, None])
            log = -0.5 * ((shown.unsqueeze(2) - first) / deviation).square() - deviation.log()
            evidence = torch.logsumexp(log, dim=2) - math.log(first.shape[2])
            probability = torch.softmax(law.clamp(min=1e-12).log() + evidence, dim=1)
            found.append((probability, torch.softmax(log, dim=2)))
        return found

    def _enabled(self, outlook: Outlook, proposal: Proposal, worth: Tensor) -> Proposal:
        """The proposal, or an enabling action where what follows it is worth more for the time of both."""
        experiment, present = self.protocol.experiment, outlook.present
        here = self.protocol.seconds(
            outlook.design.expand(len(worth), -1, -1),
            torch.zeros(len(worth), 1),
            present.design.unsqueeze(1).expand(-1, len(outlook.design), -1),
        )
        site = present.site.unsqueeze(1)
        for number, action in enumerate(experiment.enabling.values(), start=1):
            useful = {
                "tune": present.noise_factor > 1.0 + 1e-3,
                "erase": ~present.fresh.gather(1, site).squeeze(1),
                "calibrate": ~present.calibrated.gather(1, site).squeeze(1),
            }[action.does]
            factor = torch.ones_like(present.noise_factor) if action.does == "tune" else present.noise_factor
            where = None if experiment.sites is None else present.site
            fresh, calibrated = (one.gather(1, site).squeeze(1) for one in (present.fresh, present.calibrated))
            fresh, calibrated = fresh | (action.does == "erase"), calibrated | (action.does == "calibrate")
            forecast = self.referee.forecast(outlook.design, factor, self.draws, where, fresh, calibrated)
            follow = (expected_information(outlook.laws, forecast) / (action.seconds + here)).amax(1)
            paid = action.seconds + here.amin(1) < outlook.seconds_left
            better = useful & paid & (follow > worth)
            worth = torch.where(better, follow, worth)
            proposal = dataclasses.replace(
                proposal,
                kind=torch.where(better, number, proposal.kind),
                seconds=torch.where(better, action.seconds, proposal.seconds),
            )
        return proposal


POLICY = Lookahead
