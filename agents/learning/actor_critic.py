"""Our network in the place where Stable-Baselines3 expects its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.learning.network import NetworkSettings, PointingNetwork
from stem_gym.core.errors import missing_extra

try:
    from stable_baselines3.common.policies import ActorCriticPolicy
except ImportError as error:  # pragma: no cover – shown by the test that blocks the import
    raise missing_extra("Training with Stable-Baselines3", "agents") from error


class NetworkPolicy(ActorCriticPolicy):  # type: ignore[misc]
    """A Gaussian around the network's mean; give `network_settings` as policy_kwargs."""

    def __init__(self, *args: Any, network_settings: NetworkSettings, **kwargs: Any) -> None:
        self._network_settings = network_settings
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        self.network = PointingNetwork(self.observation_space, self.action_space, self._network_settings)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    @property
    def log_std(self) -> Tensor:
        """Logarithm of the exploration's standard deviation, (A,)."""
        return self.network.log_std

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        mean, value = self.network(obs)
        law = self.action_dist.proba_distribution(mean, self.network.log_std)
        action = law.get_actions(deterministic=deterministic)
        return action, value.unsqueeze(1), law.log_prob(action)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        mean, value = self.network(obs)
        law = self.action_dist.proba_distribution(mean, self.network.log_std)
        return value.unsqueeze(1), law.log_prob(actions), law.entropy()

    def get_distribution(self, obs: Any) -> Any:
        return self.action_dist.proba_distribution(self.network(obs)[0], self.network.log_std)

    def predict_values(self, obs: Any) -> Tensor:
        return self.network.value(obs).unsqueeze(1)


def value_of(policy: NetworkPolicy) -> Any:
    """A function from observations (arrays) to values (B,), for the timeout bootstrap."""

    def values(observation: Any) -> Any:
        with torch.no_grad():
            return policy.network.value(policy.obs_to_tensor(observation)[0]).cpu().numpy()

    return values
