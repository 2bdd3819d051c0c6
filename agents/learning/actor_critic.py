"""Our network in the place where Stable-Baselines3 expects its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.learning.extra import ActorCriticPolicy
from agents.learning.map_network import MapNetwork, MapSettings
from agents.learning.network import NetworkSettings, PointingNetwork


class ScaledAdam(torch.optim.Adam):
    """Adam whose groups learn at `scale` times the common rate, which the learner sets for all groups alike."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] *= group["scale"]
        try:
            return super().step(closure)
        finally:
            for group in self.param_groups:
                group["lr"] /= group["scale"]


def network_of(observation: Any, action: Any, settings: NetworkSettings | MapSettings) -> PointingNetwork | MapNetwork:
    """The network that its settings are for."""
    if isinstance(settings, MapSettings):
        return MapNetwork(observation, action, settings)
    return PointingNetwork(observation, action, settings)


class NetworkPolicy(ActorCriticPolicy):
    """A Gaussian around the network's mean, or a choice by its logits.

    Give `network_settings` and `critic_rate` as policy_kwargs.
    """

    def __init__(
        self, *args: Any, network_settings: NetworkSettings | MapSettings, critic_rate: float, **kwargs: Any
    ) -> None:
        self._network_settings, self._critic_rate = network_settings, critic_rate
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        self.network = network_of(self.observation_space, self.action_space, self._network_settings)
        critic = list(self.network.critic.parameters())
        others = [parameter for name, parameter in self.network.named_parameters() if not name.startswith("critic")]
        groups = [{"params": others, "scale": 1.0}, {"params": critic, "scale": self._critic_rate}]
        self.optimizer = ScaledAdam(groups, lr=lr_schedule(1), eps=1e-5)

    @property
    def log_std(self) -> Tensor:
        """Logarithm of the exploration's standard deviation, (A,); where a cell is chosen there is none."""
        return getattr(self.network, "log_std", torch.zeros(0))

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        law, value = self._law(obs)
        action = law.get_actions(deterministic=deterministic)
        return action, value.unsqueeze(1), law.log_prob(action)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        law, value = self._law(obs)
        return value.unsqueeze(1), law.log_prob(actions), law.entropy()

    def get_distribution(self, obs: Any) -> Any:
        return self._law(obs)[0]

    def predict_values(self, obs: Any) -> Tensor:
        return self.network.value(obs).unsqueeze(1)

    def _law(self, obs: Any) -> tuple[Any, Tensor]:
        """The distribution of actions, and the value (B,)."""
        out, value = self.network(obs)
        if isinstance(self.network, MapNetwork):
            return self.action_dist.proba_distribution(out), value
        return self.action_dist.proba_distribution(out, self.network.log_std), value


def value_of(policy: NetworkPolicy) -> Any:
    """A function from observations (arrays) to values (B,), for the timeout bootstrap."""

    def values(observation: Any) -> Any:
        with torch.no_grad():
            return policy.network.value(policy.obs_to_tensor(observation)[0]).cpu().numpy()

    return values
