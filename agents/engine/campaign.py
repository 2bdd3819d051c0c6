"""What all agents that discriminate laws do in the same way: believe, propose an experiment, declare in time.

The referee's posterior is the belief. An agent proposes what it would do next, most of them the best of a grid of
experiments by a figure of merit. It declares when one answer is probable enough, or when nothing else can be paid for
any longer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from agents.policy import Array, Face, Observation, Policy, as_array
from agents.uniform import own_seed
from stem_gym.core.config import Config
from stem_gym.core.errors import PolicyError
from stem_gym.core.experiments import PICTURE_FOV_NM, History, Present, Protocol, contrast, protocol_of
from stem_gym.core.streams import Streams, row_seeds
from stem_gym.surrogates.domain_size import domain_radius_nm
from stem_gym.surrogates.gaussian_law import GaussianLaw
from stem_gym.surrogates.information import Forecast
from stem_gym.surrogates.referee import Referee

_ALARMING = 3  # measurements before χ² says anything
_DOUBT = 0.95  # what "none of these" then has


class CampaignSettings(Config):
    """What can be chosen of every agent with a referee."""

    seed: int = Field(0, ge=0)
    """the agent's own draws; the same seed in the same worlds gives the same actions"""
    particles: int = Field(16384, ge=64)
    """particles of each law"""
    draws: int | None = Field(None, ge=16)
    """values of each law that an experiment is judged by; null: 64, or 256 where sites have factors of their own"""
    claim: float = Field(0.95, gt=0, lt=1)
    """probability from which an answer is declared"""
    none: float | None = Field(None, gt=0, lt=1)
    """probability of "none of these" before anything was measured; null: it is ruled out"""
    alarm: float | None = Field(None, gt=0)
    """χ² a measurement, of the best description by the likeliest law, beyond which "none of these" is declared; null:
    the laws are never doubted"""


@dataclass(frozen=True)
class Outlook:
    """What is believed, and what could be done: E experiments at each of K sites."""

    protocol: Protocol
    referee: Referee
    draws: int
    history: History
    present: Present
    probability: Tensor  # (B, A)
    design: Tensor  # (E, D)
    seconds: Tensor  # (B, K, E) that an experiment would take
    seconds_left: Tensor  # (B,)

    @property
    def laws(self) -> Tensor:
        """Probabilities (B, L) of what the forecasts are for: the laws, and "none" where the referee weighs it."""
        return self.probability if self.referee.none is not None else self.probability[:, :-1]

    @cached_property
    def forecasts(self) -> list[Forecast]:
        """Of all experiments, at one site after the other."""
        return [self._forecast(site) for site in range(self.protocol.sites)]

    def judged(self, figure: Callable[[Tensor, Forecast], Tensor]) -> Tensor:
        """A figure of merit of probabilities (B, L) and a forecast, (B, E), for every experiment (B, K, E)."""
        return torch.stack([figure(self.laws, forecast) for forecast in self.forecasts], dim=1)

    def _forecast(self, site: int) -> Forecast:
        present, factor = self.present, self.present.noise_factor
        if self.protocol.experiment.sites is None:
            return self.referee.forecast(self.design, factor, self.draws)
        where, fresh, calibrated = torch.full((len(factor),), site), present.fresh[:, site], present.calibrated[:, site]
        return self.referee.forecast(self.design, factor, self.draws, where, fresh, calibrated)


@dataclass(frozen=True)
class Proposal:
    """What a row would do if it does not declare."""

    kind: Tensor  # (B,) int64, index in Protocol.kinds
    design: Tensor  # (B, D)
    site: Tensor  # (B,) int64
    seconds: Tensor  # (B,)


class CampaignPolicy(Policy):
    """Belief, proposal, declaration."""

    Settings = CampaignSettings

    def __init__(self, face: Face, settings: Any) -> None:
        super().__init__(face, settings)
        if "experiment" not in face.task or "measurements" not in getattr(face.observation_space, "spaces", {}):
            raise PolicyError(
                f"The agent {self.name!r} chooses between laws; {face.id} is no such task. "
                "Try stem_gym/HypothesisDiscrimination-v0."
            )
        self.protocol = protocol_of(face.task)
        self.horizon_s = float(face.task["horizon_s"])
        self.places = int(face.task["experiments"])
        none = None if settings.none is None else GaussianLaw(self.protocol.experiment, settings.none)
        self.referee = Referee(self.protocol.experiment, face.rows, settings.particles, none=none)
        self.streams = Streams(row_seeds(settings.seed, face.rows))
        self.design = self.protocol.designs()
        sites = self.protocol.experiment.sites
        self.draws = settings.draws or (256 if sites is not None and sites.factor > 0.0 else 64)
        self._acts = torch.zeros(face.rows)
        self._sizes = torch.zeros(face.rows, self.places)  # measured in pictures, where values are not told
        self._seen = torch.zeros(face.rows, 1, dtype=torch.int64)  # of these

    def reset(self, rows: Sequence[int] | Array, seeds: Sequence[int] | None = None) -> None:
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        own = None if seeds is None else [own_seed(self.settings.seed, world) for world in seeds]
        if own is not None:
            self.streams.seed(index, own)
        self.streams.next_episode(index)
        self.referee.reset(index, own)
        self._acts[index] = 0.0
        self._seen = self._seen.index_fill(0, index, 0)

    @torch.inference_mode()
    def act(self, observation: Observation) -> Array:
        outlook = self.look(observation)
        proposal = self.propose(outlook)
        declares = self._declares(outlook, proposal)
        action = self.action_of(proposal)
        action[declares] = self.protocol.declarations(self.declared(outlook)[declares].double())
        self._acts += 1.0
        return action.numpy()

    def look(self, observation: Observation) -> Outlook:
        """What is believed after an observation, and what could be done."""
        seen = {key: torch.as_tensor(as_array(value)) for key, value in observation.items()}
        history = self.protocol.history(seen["measurements"])
        if "image" in seen:
            history = self._measured(history, seen["image"])
        present = self.protocol.present(seen["present"], seen["budget"])
        self.referee.update(history)
        rows, sites = len(present.site), self.protocol.sites
        elsewhere = (present.site.unsqueeze(1) != torch.arange(sites)).float().unsqueeze(2)  # (B, K, 1)
        shape = (rows, sites, *self.design.shape)
        seconds = self.protocol.seconds(
            self.design.expand(shape), elsewhere, present.design[:, None, None].expand(shape)
        )
        return Outlook(
            self.protocol,
            self.referee,
            self.draws,
            history,
            present,
            self.referee.probability,
            self.design,
            seconds,
            present.left[:, 1] * self.horizon_s,
        )

    def _measured(self, history: History, image: Tensor) -> History:
        """The history with the sizes of domains in pictures (B, 1, H, W), of which the last was measured now."""
        size_nm = domain_radius_nm(contrast(image[:, 0]), PICTURE_FOV_NM)
        last = history.done.sum(1, keepdim=True) - 1
        fresh = self._sizes.scatter(1, last.clamp(min=0), size_nm.unsqueeze(1))
        again = self._acts.unsqueeze(1) > 0  # the picture before the first pulse shows nothing
        self._sizes = torch.where((last >= 0) & again & (last + 1 > self._seen), fresh, self._sizes)
        self._seen = last + 1
        return replace(history, value=self._sizes * history.done)

    @abstractmethod
    def propose(self, outlook: Outlook) -> Proposal:
        """What each row would do next, if it does not declare."""

    def best(self, outlook: Outlook, merit: Tensor) -> Proposal:
        """The experiment of the highest merit (B, K, E) among those that can be paid for."""
        paid = outlook.seconds < outlook.seconds_left[:, None, None]
        flat = torch.where(paid, merit.to(torch.float64), -torch.inf).flatten(1)
        index = flat.argmax(1)
        count = len(self.design)
        seconds = outlook.seconds.flatten(1).gather(1, index.unsqueeze(1)).squeeze(1)
        return Proposal(torch.zeros_like(index), self.design[index % count], index // count, seconds)

    def declared(self, outlook: Outlook) -> Tensor:
        """The probabilities (B, A) that a declaration gives."""
        if self.settings.alarm is None:
            return outlook.probability
        loud = (self.referee.chi2 > self.settings.alarm) & (outlook.history.done.sum(1) >= _ALARMING)
        doubted = (1.0 - _DOUBT) * outlook.probability
        doubted[:, -1] += _DOUBT
        return torch.where(loud.unsqueeze(1), doubted, outlook.probability)

    def action_of(self, proposal: Proposal) -> Tensor:
        """Actions (B, n) of proposals."""
        action = self.protocol.experiments(proposal.design, proposal.site)
        for number, name in enumerate(self.protocol.experiment.enabling, start=1):
            some = proposal.kind == number
            action[some] = self.protocol.enabling(name, int(some.sum()))
        return action

    def _declares(self, outlook: Outlook, proposal: Proposal) -> Tensor:
        """Which rows declare now: those that are sure, and those for which nothing else leaves a step to do so."""
        sure = self.declared(outlook).amax(1) >= self.settings.claim
        used = 1.0 - outlook.present.left[:, 0].double()
        steps_left = torch.where(self._acts > 0.0, self._acts * (1.0 / used.clamp(min=1e-9) - 1.0), torch.inf)
        full = outlook.history.done.sum(1) >= self.places
        return sure | full | (steps_left < 1.5) | (proposal.seconds >= outlook.seconds_left)
