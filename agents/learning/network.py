"""A small actor-critic network that can point; plain torch, so that a trained policy needs no learner's library.

Where the observation has an `image` (channels, H, W) uint8 and its `region` in a reference frame, keypoints are spatial
soft-argmax means of learned heat maps (Levine et al., J. Mach. Learn. Res. 17, 1334, 2016), told in fractions of the
reference frame. They reach the two `place` numbers of the action linearly, through a learned choice between keypoints;
everything else goes through a small perceptron on all numbers. The critic has its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from gymnasium import spaces
from pydantic import Field
from torch import Tensor, nn

from stem_gym.core.config import Config
from stem_gym.core.errors import PolicyError

KEYPOINTS = 8
_LEVELS = (slice(0, 4), slice(4, 8))  # which of them look at the finer and the coarser copy of the picture
_FINE, _COARSE = 32, 16  # pixels along their sides
_PULL = 80.0  # scale of the pulls of direction and probe on a heat map, beside that of brightness
_SERVED = 0.9  # share of delivery from which a spot counts as served


class NetworkSettings(Config):
    """Size and start of the network."""

    hidden: int = Field(128, ge=8, le=1024)
    """units of each hidden layer"""
    place: tuple[int, int] | None = (1, 2)
    """which two numbers of the action are a place in the reference frame, from −1 to 1; null where none are"""
    spot: float = Field(0.018, gt=0, lt=1)
    """standard deviation of a bright spot, in fractions of the reference frame"""
    sharpness: float = Field(800.0, gt=0)
    """how strongly a heat map prefers its highest spot at the start"""
    log_std: tuple[float, ...] = (-0.4, -3.7, -3.7, -0.7, -0.7)
    """logarithm of the exploration's standard deviation at the start, for each number of the action"""


class PointingNetwork(nn.Module):
    """Action mean (B, A) and value (B,) from a dictionary of observations (B, …)."""

    def __init__(self, observation: spaces.Space[Any], action: spaces.Space[Any], settings: NetworkSettings) -> None:
        super().__init__()
        _check_spaces(observation, action, settings)
        parts: Mapping[str, spaces.Space[Any]] = observation.spaces  # type: ignore[attr-defined]
        self.numbers = sorted(key for key, part in parts.items() if part.dtype != "uint8")
        count = sum(math.prod(parts[key].shape or ()) for key in self.numbers)
        self.points = "image" in parts and "region" in parts and settings.place is not None
        self.place = list(settings.place or ())
        self.spot = settings.spot
        features = count
        if "image" in parts:
            channels = (parts["image"].shape or (1, 1, 1))[0]
            self.glance = Glance(channels + 1)
            features += self.glance.features
        if self.points:
            self.finder = Finder(channels + 1, settings.sharpness)
            features += 8 * KEYPOINTS
            self.choice = _linear(settings.hidden, KEYPOINTS, 0.01)
        size = action.shape[0]  # type: ignore[index]
        hidden = settings.hidden
        self.actor = nn.Sequential(_linear(features, hidden, 1.4), nn.Tanh(), _linear(hidden, hidden, 1.4), nn.Tanh())
        self.mean = _linear(hidden, size, 0.01)
        self.critic = nn.Sequential(
            _linear(features, hidden, 1.4), nn.Tanh(), _linear(hidden, hidden, 1.4), nn.Tanh(), _linear(hidden, 1, 1.0)
        )
        self.log_std = nn.Parameter(torch.tensor(settings.log_std))

    def forward(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean of the action, unclipped, and value."""
        features, keypoints = self._features(observation)
        return self._mean(features, keypoints), self.critic(features).squeeze(-1)

    def decide(self, observation: Mapping[str, Tensor]) -> Tensor:
        """The mean of the action."""
        return self.forward(observation)[0]

    def value(self, observation: Mapping[str, Tensor]) -> Tensor:
        """The value alone."""
        value: Tensor = self.critic(self._features(observation)[0]).squeeze(-1)
        return value

    def _mean(self, features: Tensor, keypoints: Tensor | None) -> Tensor:
        hidden = self.actor(features)
        mean: Tensor = self.mean(hidden)
        if keypoints is None:
            return mean
        share = torch.softmax(self.choice(hidden), dim=1)  # (B, K)
        pointed = 2.0 * (share.unsqueeze(2) * keypoints).sum(1) - 1.0  # (B, 2)
        return mean.index_add(1, torch.tensor(self.place, device=mean.device), pointed)

    def _features(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        numbers = [observation[key].float().flatten(1) for key in self.numbers]
        if "image" not in observation:
            return torch.cat(numbers, dim=1), None
        region = observation.get("region")
        image = observation["image"]
        extent = torch.ones(len(image), device=image.device) if region is None else region[:, 2]
        fine, coarse = copies_of(image, self.spot * _FINE / extent.clamp(min=1e-3))
        numbers.append(self.glance(coarse))
        if not self.points:
            return torch.cat(numbers, dim=1), None
        probe = observation.get("probe")
        keypoints, seen = self.finder((fine, coarse), observation["region"], probe)
        return torch.cat([*numbers, seen], dim=1), keypoints


class Glance(nn.Module):
    """The whole picture in a few numbers, from a coarse copy of it."""

    features = 64

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * (_COARSE // 4) ** 2, self.features),
            nn.Tanh(),
        )

    def forward(self, coarse: Tensor) -> Tensor:
        summary: Tensor = self.layers(coarse)
        return summary


class Finder(nn.Module):
    """Keypoints (B, K, 2) in fractions of the reference frame, and what is seen there, (B, 8 K).

    Heat maps are learned mixtures of the planes of two copies of the picture: cheap, since nothing is propagated back
    through pictures.
    """

    def __init__(self, channels: int, sharpness: float) -> None:
        super().__init__()
        angle = 2.0 * math.pi * torch.arange(KEYPOINTS) * 3.0 / KEYPOINTS
        self.direction = nn.Parameter(torch.stack((angle.cos(), angle.sin())))  # (2, K): which of equals
        self.nearness = nn.Parameter(torch.tensor([0.0, 1.0]).repeat(KEYPOINTS // 2))  # (K,): the one next to the probe
        self.mixture = nn.Parameter(torch.zeros(channels, KEYPOINTS))
        self.log_sharpness = nn.Parameter(torch.full((KEYPOINTS,), math.log(sharpness)))
        with torch.no_grad():
            self.mixture[0], self.mixture[-1] = 1.0, -1.0  # bright, and not yet served

    def forward(self, pictures: tuple[Tensor, Tensor], region: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
        parts = []
        for picture, own in zip(pictures, _LEVELS, strict=True):
            parts.append(self._look(picture, region, probe, own))
        keypoints, seen = (torch.cat(group, dim=1) for group in zip(*parts, strict=True))
        return keypoints, seen.flatten(1)

    def _look(self, picture: Tensor, region: Tensor, probe: Tensor | None, own: slice) -> tuple[Tensor, Tensor]:
        """Keypoints of some heat maps (B, k, 2), and of each place, way from the probe, planes, spread (B, k, 8)."""
        height, width = picture.shape[2:]
        corner, extent = region[:, None, :2], region[:, None, 2:]
        middle = torch.full_like(region[:, :2], 0.5) if probe is None else probe
        x, y = _centres(width, region), _centres(height, region)
        dx = region[:, 0:1] + region[:, 2:3] * x - middle[:, 0:1]  # (B, W)
        dy = region[:, 1:2] + region[:, 3:4] * y - middle[:, 1:2]
        away = (dy.square().unsqueeze(2) + dx.square().unsqueeze(1)).sqrt().flatten(1).unsqueeze(1)  # (B, 1, H W)
        grid = torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=1)  # (H W, 2) fractions of this frame
        weights = (self.mixture * self.log_sharpness.exp())[:, own].T  # (k, C)
        # The corner's share of the direction is the same for all pixels and falls out of the softmax.
        slope = _PULL * extent * self.direction[:, own].T  # (B, k, 2)
        mixed = torch.cat(
            (weights.expand(len(region), -1, -1), slope, -_PULL * self.nearness[own].expand(len(region), 1, -1).mT), 2
        )
        flat = picture.flatten(2)  # (B, C, H W)
        logits = mixed @ torch.cat((flat, grid.T.expand(len(region), -1, -1), away), dim=1)
        weight = torch.softmax(logits, dim=2)  # (B, k, H W)
        told = weight @ torch.cat((flat.mT, torch.cat((grid, grid.square()), 1).expand(len(region), -1, -1)), dim=2)
        colour, inside, square = told[..., : flat.shape[1]], told[..., -4:-2], told[..., -2:]
        spread = (extent * (square - inside.square()).clamp(min=1e-8).sqrt()).sum(2, keepdim=True)
        keypoints = corner + extent * inside
        seen = torch.cat((2.0 * keypoints - 1.0, 4.0 * (keypoints - middle.unsqueeze(1)), colour, 4.0 * spread), dim=2)
        return keypoints, seen


def copies_of(image: Tensor, spot_pixels: Tensor) -> tuple[Tensor, Tensor]:
    """A finer and a coarser copy (B, C + 1, H, W) of an image (B, C, H, W), from 0 to 1.

    The first channel is softened by a Gaussian of the width that a spot has in it, `spot_pixels` (B,) of the finer copy
    (the matched filter); a plane is added that shows where the last channel is (nearly) full.
    """
    planes = nn.functional.adaptive_avg_pool2d(image.float(), _FINE) / 255.0
    served = ((planes[:, -1:] - _SERVED) / (1.0 - _SERVED)).clamp(min=0.0)
    band = _band(_FINE, spot_pixels)  # (B, H, H); two matrix products are faster here than a convolution
    soft = torch.bmm(torch.bmm(band, planes[:, 0]), band.mT).unsqueeze(1)
    fine = torch.cat((soft, planes[:, 1:], served), dim=1)
    return fine, nn.functional.avg_pool2d(fine, _FINE // _COARSE)


def _centres(size: int, like: Tensor) -> Tensor:
    """Centres of the pixels of a side as fractions of it, (size,)."""
    return (torch.arange(size, device=like.device) + 0.5) / size


def _band(size: int, sigma: Tensor) -> Tensor:
    """Rows of Gaussian weights, (B, size, size); those at the border weigh what there is."""
    at = torch.arange(size, device=sigma.device, dtype=torch.float32)
    weight = torch.exp(-0.5 * ((at[:, None] - at) / sigma[:, None, None]).square())
    return weight / weight.sum(2, keepdim=True)


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _check_spaces(observation: spaces.Space[Any], action: spaces.Space[Any], settings: NetworkSettings) -> None:
    if not isinstance(observation, spaces.Dict):
        raise PolicyError(f"The network needs a Dict of observations; given {observation}.")
    if not (isinstance(action, spaces.Box) and len(action.shape) == 1):
        raise PolicyError(f"The network needs a Box of actions with one axis; given {action}.")
    if len(settings.log_std) != action.shape[0]:
        raise PolicyError(f"log_std needs {action.shape[0]} values for {action}; given {len(settings.log_std)}.")
    image = observation.spaces.get("image")
    if image is not None and len(image.shape or ()) != 3:
        raise PolicyError(f"An image must have the axes (channels, H, W); given {image}.")
