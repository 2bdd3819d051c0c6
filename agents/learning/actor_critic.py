"""Our network in the place where Stable-Baselines3 expects its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.learning.extra import ActorCriticPolicy
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


class NetworkPolicy(ActorCriticPolicy):
    """A Gaussian around the network's mean; give `network_settings` and `critic_rate` as policy_kwargs."""

    def __init__(self, *args: Any, network_settings: NetworkSettings, critic_rate: float, **kwargs: Any) -> None:
        self._network_settings, self._critic_rate = network_settings, critic_rate
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        self.network = PointingNetwork(self.observation_space, self.action_space, self._network_settings)
        critic = list(self.network.critic.parameters())
        others = [parameter for name, parameter in self.network.named_parameters() if not name.startswith("critic")]
        groups = [{"params": others, "scale": 1.0}, {"params": critic, "scale": self._critic_rate}]
        self.optimizer = ScaledAdam(groups, lr=lr_schedule(1), eps=1e-5)

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
