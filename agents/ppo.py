"""PPO: a small network that learned by itself (proximal policy optimisation, Schulman et al., arXiv 1707.06347).

Trained with Stable-Baselines3 (extra "agents"), campaigns of experiments by a loop of our own; running a trained policy
needs torch alone. `agents.make("ppo", env)` gives the policy that ships for the env's id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from agents.engine.roster import shipped
from agents.engine.storage import check_arrays, check_contract, read_arrays, read_contract
from agents.learning.history_network import HistoryNetwork, HistorySettings, reads_history
from agents.learning.map_network import MapNetwork, MapSettings, reads_maps
from agents.learning.network import NetworkSettings, PointingNetwork
from agents.policy import Array, Face, Observation, Policy, as_array, face_of
from agents.uniform import own_seed
from stem_gym.core.config import Config, parse
from stem_gym.core.errors import PolicyError
from stem_gym.core.experiments import protocol_of
from stem_gym.core.streams import Streams, row_seeds

FRESH, SHIPPED = "fresh", "shipped"
_LOG_STD = -1.0  # of the exploration at the start, where nothing is pointed at


class Settings(Config):
    """What can be chosen."""

    weights: str = SHIPPED
    """"shipped", "fresh" (untrained), the folder of a trained policy, or the id of another environment whose shipped
    policy is taken over as it is: what reads maps fits a field of any size"""
    network: NetworkSettings = NetworkSettings()
    """the network, where the weights are fresh"""
    maps: MapSettings = MapSettings()
    """the network of a search over the cells of a field, where the weights are fresh"""
    history: HistorySettings = HistorySettings()
    """the network of a campaign of experiments between laws, where the weights are fresh"""
    seed: int = Field(0, ge=0)
    """first weights of an untrained network, and the draws of one that draws"""


class Ppo(Policy):
    """Acts on the mean of the learned Gaussian, or does what is most likely where there are choices."""

    name = "ppo"
    Settings = Settings

    def __init__(self, face: Face, settings: Any) -> None:
        folder = None if settings.weights == FRESH else _folder_of(face, settings.weights)
        contract = None if folder is None else _contract_in(folder, face, settings.weights)
        if contract is not None:
            settings = parse(Settings, contract["settings"], f"{folder}, settings")
        super().__init__(face, settings)
        with torch.random.fork_rng(devices=[]):  # the first weights are a function of the seed, and of nothing else
            torch.manual_seed(settings.seed)
            self.network = _network(face, settings)
        self._streams, self._rows = Streams(row_seeds(settings.seed, face.rows)), torch.arange(face.rows)
        if folder is not None and contract is not None:
            self.set_arrays(read_arrays(folder, contract))

    def reset(self, rows: Sequence[int] | Array, seeds: Sequence[int] | None = None) -> None:
        """Nothing is remembered between steps but where its own random numbers stand."""
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        if seeds is not None:
            self._streams.seed(index, [own_seed(self.settings.seed, world) for world in seeds])
        self._streams.next_episode(index)

    def act(self, observation: Observation) -> Array:
        tensors = {key: torch.as_tensor(as_array(value)) for key, value in observation.items()}
        with torch.inference_mode():
            action = self._decided(tensors).numpy()
        space: Any = self.face.action_space
        if isinstance(space, gymnasium.spaces.Box):
            action = np.clip(action, space.low, space.high)
        return np.asarray(action, dtype=space.dtype)

    def _decided(self, observation: dict[str, Tensor]) -> Tensor:
        """Actions (B, …), the most likely ones unless the policy draws."""
        if isinstance(self.network, HistoryNetwork) and self.settings.history.draws:
            return self.network.decide(observation, self._streams.uniform(self._rows, (3,)))
        return self.network.decide(observation)

    def arrays(self) -> dict[str, Array]:
        return {name: value.detach().numpy() for name, value in self.network.state_dict().items()}

    def set_arrays(self, arrays: Mapping[str, Array]) -> None:
        check_arrays(arrays, self.arrays())
        self.network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()})


def train(
    id: str,
    out: str | Path,
    settings: Mapping[str, Any] | None = None,
    resume: bool = True,
    quiet: bool = False,
    overrides: Mapping[str, Any] | None = None,
    imitation: Mapping[str, Any] | None = None,
    **training: Any,
) -> Ppo:
    """Train on `id` in the folder `out` and give the trained policy; `training` are fields of `Training`.

    `imitation` (fields of `Imitation`; may be empty) begins with a warm start from a script, for atom targeting. A
    folder with a checkpoint is resumed. Ctrl-C keeps what was done and raises KeyboardInterrupt. Raises
    MissingExtraError without Stable-Baselines3, RecordError where `out` can not be written, ConfigError for settings.
    """
    from agents.learning.run import Run, Training

    env = gymnasium.make_vec(id, num_envs=1, **(overrides or {}))
    face = face_of(env)
    env.close()
    chosen = {"weights": FRESH, "network": network_for(face), **(settings or {})}
    policy = Ppo(face, parse(Settings, chosen, "settings of the agent 'ppo'"))

    def save(network: torch.nn.Module, facts: Mapping[str, Any]) -> None:
        policy.network.load_state_dict(network.state_dict())
        policy.save(out, facts)

    run = Run(id, Path(out), parse(Training, training, "training settings"), save, overrides or {}, quiet)
    if isinstance(policy.network, HistoryNetwork):
        from agents.learning.history_training import train_history

        train_history(run, policy.network, resume)
        return policy
    from agents.learning.training import train_network

    chosen_network = policy.settings.maps if isinstance(policy.network, MapNetwork) else policy.settings.network
    train_network(run, chosen_network, None if imitation is None else _warm_start(run, imitation), resume)
    return policy


def _network(face: Face, settings: Settings) -> PointingNetwork | MapNetwork | HistoryNetwork:
    if reads_history(face.observation_space):
        return HistoryNetwork(face.observation_space, protocol_of(face.task), settings.history)
    if reads_maps(face.observation_space, face.action_space):
        return MapNetwork(face.observation_space, face.action_space, settings.maps)
    return PointingNetwork(face.observation_space, face.action_space, settings.network)


def network_for(face: Face) -> dict[str, Any]:
    """Settings of the network that suit an environment: one that points where there is a picture with its region."""
    observation, action = face.observation_space, face.action_space
    if reads_history(observation):
        return {}
    points = isinstance(observation, gymnasium.spaces.Dict) and {"image", "region"} <= observation.spaces.keys()
    if points or not isinstance(action, gymnasium.spaces.Box):
        return {}
    return {"place": None, "log_std": (_LOG_STD,) * int(np.prod(action.shape))}


def _warm_start(run: Any, imitation: Mapping[str, Any]) -> Any:
    from agents.learning.imitation import Imitation, imitate

    settings = parse(Imitation, imitation, "imitation settings")

    def teach(network: PointingNetwork) -> dict[str, Any]:
        loss = imitate(network, run.id, settings, run.training.rows, run.training.seed, run.overrides)
        facts = {"from": "a script without memory, by dataset aggregation (agents/learning/imitation.py)", "loss": loss}
        return facts | settings.model_dump(mode="json")

    return teach


def _folder_of(face: Face, weights: str) -> Path:
    id = face.id if weights == SHIPPED else weights
    folder = shipped(Ppo.name, id)
    if folder is not None and (weights == SHIPPED or not Path(weights).is_dir()):
        return folder
    if weights != SHIPPED:
        return Path(weights)
    raise PolicyError(
        f"No trained 'ppo' ships for {face.id}.{_other_maps(face)} Train one "
        f'(stem-gym train ppo {face.id} --out DIR) and give its folder as weights, or ask for weights="fresh".'
    )


def _other_maps(face: Face) -> str:
    """Whose policy could be taken over."""
    if not reads_maps(face.observation_space, face.action_space):
        return ""
    return ' That of another search fits its maps: weights="stem_gym/SpectrumSearch-v0".'


def _contract_in(folder: Path, face: Face, weights: str) -> dict[str, Any]:
    """The contract, checked against the environment; of a policy that is taken over, that its network fits."""
    contract = read_contract(folder)
    if contract["agent"] != Ppo.name:
        raise PolicyError(f"The policy in {folder} is of the agent {contract['agent']!r}, not of 'ppo'.")
    if weights != contract["id"] or contract["id"] == face.id:
        check_contract(contract, face, folder)
    elif not reads_maps(face.observation_space, face.action_space):
        raise PolicyError(
            f"The policy of {weights} can not be taken over: {face.id} is no search over the cells of a field. "
            f"Train one for it: stem-gym train ppo {face.id} --out DIR."
        )
    return contract


POLICY = Ppo
