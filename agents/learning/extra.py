"""Stable-Baselines3 where it is installed; where not, stand-ins that say which extra brings it when they are built.

So every module here can be imported without the extra "agents".
"""

from __future__ import annotations

from typing import Any

from stem_gym.core.errors import missing_extra


class _Missing:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise missing_extra("Training", "agents")


try:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.common.vec_env import VecEnv
except ImportError:
    PPO = BaseCallback = configure = ActorCriticPolicy = VecEnv = _Missing

__all__ = ["PPO", "ActorCriticPolicy", "BaseCallback", "VecEnv", "configure"]
