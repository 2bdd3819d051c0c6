"""An actor-critic over the measurements of a campaign: which experiment next, or what to declare.

Every measurement is read by the same small network and the results are added up, so that their order does not matter
(deep sets, Zaheer et al., NeurIPS 2017); what was measured, how things stand and what is left are then one row of
numbers. From it come the kind of the next action, the experiment among those that a grid of the axes makes, its site,
the value, and the probabilities of the answers, which are what is declared. Those are learned from the truth of
simulated worlds by the logarithmic score, not from rewards: they are an amortised posterior. Where the observation has
a belief, they start from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium import spaces
from pydantic import Field
from torch import Tensor, nn

from stem_gym.core.config import Config
from stem_gym.core.errors import PolicyError
from stem_gym.core.experiments import Protocol

_KEYS = ("measurements", "present", "budget")
_EAGER = 3.0  # logit of an experiment at the start, beside 0 of every other kind
_HOME = 3.0  # logit of the present site at the start, beside 0 of every other: moving costs time
_LEAST = 1e-6  # of a belief, so that it has a logarithm


class HistorySettings(Config):
    """Size of the network."""

    features: int = Field(64, ge=8, le=512)
    """numbers that a measurement is turned into"""
    hidden: int = Field(128, ge=8, le=1024)
    """units of each hidden layer"""
    draws: bool = False
    """whether what is done is drawn as in training, instead of the most likely: a policy that was trained for a short
    time spreads its experiments by its own chance"""


@dataclass(frozen=True)
class Choice:
    """What the network says of B rows."""

    kind: Tensor  # (B, K) logits
    design: Tensor  # (B, E) logits
    site: Tensor  # (B, S) logits
    answer: Tensor  # (B, A) logits
    value: Tensor  # (B,)


@dataclass(frozen=True)
class Picked:
    """One action of each row, as numbers of what was picked."""

    kind: Tensor  # (B,) int64
    design: Tensor  # (B,) int64
    site: Tensor  # (B,) int64


class HistoryNetwork(nn.Module):
    """Choices and value from a dictionary of observations (B, …)."""

    def __init__(self, observation: spaces.Space[Any], protocol: Protocol, settings: HistorySettings) -> None:
        super().__init__()
        if not reads_history(observation):
            raise PolicyError(f"The network needs the observations {', '.join(_KEYS)}; given {observation}.")
        parts: Mapping[str, spaces.Space[Any]] = observation.spaces  # type: ignore[attr-defined]
        self.protocol, self.believes = protocol, "belief" in parts
        designs = protocol.designs()
        self.register_buffer("experiments", protocol.experiments(designs), persistent=False)  # (E, n)
        answers = len(protocol.answers)
        self.read = nn.Sequential(
            nn.Linear(protocol.measurement_size, settings.features),
            nn.SiLU(),
            nn.Linear(settings.features, settings.features),
            nn.SiLU(),
            nn.Linear(settings.features, settings.features),
        )
        known = 2 * settings.features + protocol.present_size + 3 + answers * self.believes
        self.think = _layers(known, settings.hidden)
        self.judge = _layers(known, settings.hidden)
        self.critic = nn.Sequential(*_layers(known, settings.hidden), nn.Linear(settings.hidden, 1))
        self.kind, self.design, self.site, self.answer = (
            _small(settings.hidden, count) for count in (len(protocol.kinds), len(designs), protocol.sites, answers)
        )
        if protocol.sites > 1:
            self.home = nn.Parameter(torch.tensor([_HOME]))
        with torch.no_grad():
            self.kind.bias[0] = _EAGER

    def forward(self, observation: Mapping[str, Tensor]) -> Choice:
        """Logits of every choice, and the value."""
        known = self._known(observation)
        thought = self.think(known)
        answer = self.answer(self.judge(known))
        if self.believes:
            answer = answer + observation["belief"].float().clamp(min=_LEAST).log()
        value = self.critic(known).squeeze(-1)
        site = self.site(thought)
        if self.protocol.sites > 1:
            site = site + self.home * self._present_site(observation)
        return Choice(self.kind(thought), self.design(thought), site, answer, value)

    def decide(self, observation: Mapping[str, Tensor], uniform: Tensor | None = None) -> Tensor:
        """The most likely actions (B, n), or such as are drawn by uniform numbers (B, 3)."""
        choice = self.forward(observation)
        picked = most_likely(choice) if uniform is None else sampled(choice, uniform)
        return self.action(picked, choice.answer)

    def action(self, picked: Picked, answer: Tensor) -> Tensor:
        """Actions (B, n) of what was picked; those that declare give the probabilities of the logits (B, A)."""
        protocol = self.protocol
        experiments: Any = self.experiments
        action = experiments[picked.design].clone()
        kinds = len(protocol.kinds)
        action[:, :kinds] = -1.0
        action.scatter_(1, picked.kind.unsqueeze(1), 1.0)
        if protocol.sites > 1:
            action[:, kinds + len(protocol.axes)] = 2.0 * (picked.site + 0.5) / protocol.sites - 1.0
        declared = protocol.declarations(torch.softmax(answer.double(), dim=1))
        return torch.where((picked.kind == kinds - 1).unsqueeze(1), declared.to(action.dtype), action)

    def _present_site(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Which site (B, S) is the present one, as numbers."""
        sites = self.protocol.sites
        index = (observation["present"][:, 1] * max(1, sites - 1)).round().long()
        return nn.functional.one_hot(index, sites).to(self.home.dtype)

    def _known(self, observation: Mapping[str, Tensor]) -> Tensor:
        measured = observation["measurements"].float()
        done = measured[..., :1]
        read = self.read(measured) * done
        count = done.sum(1).clamp(min=1.0)
        numbers = [read.sum(1) / count, read.sum(1) / 8.0]
        numbers += [observation[key].float() for key in ("present", "budget", *(["belief"] if self.believes else []))]
        return torch.cat(numbers, dim=1)


def reads_history(observation: spaces.Space[Any]) -> bool:
    """Whether the observations are those of a campaign of experiments with its values told."""
    return isinstance(observation, spaces.Dict) and all(key in observation.spaces for key in _KEYS)


def most_likely(choice: Choice) -> Picked:
    """What is most likely to be picked."""
    return Picked(choice.kind.argmax(1), choice.design.argmax(1), choice.site.argmax(1))


def log_probability(choice: Choice, picked: Picked) -> Tensor:
    """Logarithm (B,) of the probability of what was picked; design and site count where an experiment was."""
    kind, design, site = (
        torch.log_softmax(logits, dim=1).gather(1, index.unsqueeze(1)).squeeze(1)
        for logits, index in (
            (choice.kind, picked.kind),
            (choice.design, picked.design),
            (choice.site, picked.site),
        )
    )
    return kind + torch.where(picked.kind == 0, design + site, torch.zeros_like(design))


def entropy(choice: Choice) -> Tensor:
    """Entropy (B,) of what is picked."""
    kind, design, site = (
        -(torch.softmax(logits, 1) * torch.log_softmax(logits, 1)).sum(1)
        for logits in (choice.kind, choice.design, choice.site)
    )
    return kind + torch.softmax(choice.kind, 1)[:, 0] * (design + site)


def sampled(choice: Choice, uniform: Tensor) -> Picked:
    """A draw for each row, from uniform numbers (B, 3)."""
    picks = []
    for column, logits in enumerate((choice.kind, choice.design, choice.site)):
        below = torch.softmax(logits, dim=1).cumsum(1)
        index = (uniform[:, column : column + 1] * below[:, -1:] > below).sum(1)
        picks.append(index.clamp(max=logits.shape[1] - 1))
    return Picked(*picks)


def _layers(inputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())


def _small(inputs: int, outputs: int) -> nn.Linear:
    """A last layer that says nearly nothing at the start."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, 0.01)
    nn.init.zeros_(layer.bias)
    return layer
