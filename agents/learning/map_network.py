"""A fully convolutional actor-critic over the map of a search: which cell to measure next, whatever the field's size.

Every cell is told what a plain regression says of it: the mean of the values measured so far, weighted by how alike the
neighbourhoods in the image are and by how near the places are, and how much of such evidence there is. Convolutions
mix this with the image into one number a cell; the most likely cell is measured. It learns over many worlds how far to
trust what it has seen and how far to look around, which an acquisition function is told by its inventor.
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

_MAPS = ("image", "value", "measured")
_ALIKE = 1.0  # greatest width of the likeness of neighbourhoods, in standard deviations of what is seen
_NEAR = 0.12  # greatest width of the nearness of places, in sides of the field
_WIDTHS = 2  # of both; each is half the one before
_SEEN = 6  # numbers of a neighbourhood
_PLANES = _SEEN + 4 * _WIDTHS + 3
_PRIOR = 0.05  # weight of "as the mean so far" in the regression
_TAKEN = -1e6  # logit of a cell that was measured
_TINY = 1e-6


class MapSettings(Config):
    """Size and start of the network."""

    channels: int = Field(16, ge=4, le=128)
    """planes of the hidden layers"""
    greed: float = Field(1.0, ge=0)
    """weight at the start of what the regression says, in standard deviations so far"""
    curiosity: float = Field(1.0, ge=0)
    """weight at the start of being unlike everything that was measured"""
    sharpness: float = Field(6.0, gt=0)
    """how strongly the higher of two cells is preferred at the start"""


class MapNetwork(nn.Module):
    """Logits of cells (B, H·W) and value (B,) from a dictionary of observations (B, …)."""

    def __init__(self, observation: spaces.Space[Any], action: spaces.Space[Any], settings: MapSettings) -> None:
        super().__init__()
        if not reads_maps(observation, action):
            raise PolicyError(
                f"The network needs the maps {_MAPS} and one action a cell; given {observation}, {action}."
            )
        planes = settings.channels
        self.mix = nn.Sequential(
            nn.Conv2d(_PLANES, planes, 1),
            nn.ReLU(),
            nn.Conv2d(planes, planes, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(planes, planes, 3, padding=2, dilation=2),
            nn.ReLU(),
        )
        self.around, self.here = nn.Conv2d(planes, 1, 1), nn.Conv2d(_PLANES, 1, 1)
        with torch.no_grad():  # at the start the two numbers below decide alone
            self.around.weight.mul_(0.1)
            self.here.weight.mul_(0.1)
        self.greed, self.curiosity = (nn.Parameter(torch.tensor([w])) for w in (settings.greed, settings.curiosity))
        self.log_sharpness = nn.Parameter(torch.tensor([math.log(settings.sharpness)]))
        self.critic = nn.Sequential(nn.Linear(2 * _PLANES, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits, of measured cells far below all others, and value."""
        planes = planes_of(observation)
        return self._logits(planes, observation["measured"]), self._value(planes)

    def decide(self, observation: Mapping[str, Tensor]) -> Tensor:
        """The most likely cell (B,)."""
        return self.forward(observation)[0].argmax(1)

    def value(self, observation: Mapping[str, Tensor]) -> Tensor:
        """The value alone."""
        return self._value(planes_of(observation))

    def _logits(self, planes: Tensor, measured: Tensor) -> Tensor:
        expected, evidence = planes[:, _SEEN + 2], planes[:, _SEEN + 3]  # by the narrower likeness
        around = self.around(self.mix(nn.functional.avg_pool2d(planes, 2, ceil_mode=True)))
        learned = (_drawn_out(around, planes.shape[2:]) + self.here(planes)).squeeze(1)
        logits = self.log_sharpness.exp() * (learned + self.greed * expected - self.curiosity * evidence)
        return logits.masked_fill(measured > 0, _TAKEN).flatten(1)

    def _value(self, planes: Tensor) -> Tensor:
        value: Tensor = self.critic(torch.cat((planes.mean((2, 3)), planes.amax((2, 3))), dim=1)).squeeze(-1)
        return value


def reads_maps(observation: spaces.Space[Any], action: spaces.Space[Any]) -> bool:
    """Whether the spaces are those of a search over the cells of a field."""
    if not (isinstance(observation, spaces.Dict) and isinstance(action, spaces.Discrete)):
        return False
    shapes = {observation.spaces[key].shape for key in _MAPS if key in observation.spaces}
    return all(key in observation.spaces for key in (*_MAPS, "budget")) and shapes == {
        shape for shape in shapes if shape is not None and len(shape) == 2 and math.prod(shape) == action.n
    }


@torch.no_grad()
def planes_of(observation: Mapping[str, Tensor]) -> Tensor:
    """What every cell is told, (B, P, H, W): neighbourhood, expectations, evidence, mask, best, budget left."""
    image, measured = observation["image"].float() / 255.0, observation["measured"].float()
    height, width = image.shape[1:]
    seen = _neighbourhoods(image)  # (B, F, H, W)
    slots = max(1, int(measured.flatten(1).sum(1).max()))
    known, cell = measured.flatten(1).topk(slots, dim=1)  # (B, M): the measured cells, then others that count nothing
    value = _standardised(observation["value"].flatten(1).gather(1, cell), known)
    at_cell = seen.flatten(2).gather(2, cell.unsqueeze(1).expand(-1, _SEEN, -1))  # (B, F, M)
    told = torch.stack((value * known, known), dim=2)  # (B, M, 2) what is added up
    parts = [*_by_likeness(seen, at_cell, told), *_by_nearness(cell, told, height, width)]
    best = torch.where(known > 0, value, -3.0).amax(1)
    left = observation["budget"].amin(1)
    flat = torch.stack((best, left), dim=1)[:, :, None, None].expand(-1, -1, height, width)
    return torch.cat((seen, *parts, measured.unsqueeze(1), flat), dim=1)


def _by_likeness(seen: Tensor, at_cell: Tensor, told: Tensor) -> list[Tensor]:
    """Expectation and evidence (B, 2, H, W) from cells that look alike, for the wider and the narrower likeness.

    Worked out on every second cell and drawn out again: exponentials are what a step costs.
    """
    coarse = nn.functional.avg_pool2d(seen, 2, ceil_mode=True)
    rows, _, height, width = coarse.shape
    here = coarse.flatten(2)  # (B, F, N)
    square = torch.baddbmm(at_cell.square().sum(1).unsqueeze(1), here.mT, at_cell, alpha=-2.0)  # (B, N, M)
    distance = square.add_(here.square().sum(1).unsqueeze(2)).clamp_(min=0.0)
    weight = distance.mul_(-0.5 / _ALIKE**2).exp_()
    maps = []
    for _ in range(_WIDTHS):
        maps.append(_drawn_out(_regressed(weight @ told).mT.reshape(rows, 2, height, width), seen.shape[2:]))
        weight = weight.square().square_()  # half the width
    return maps


def _by_nearness(cell: Tensor, told: Tensor, height: int, width: int) -> list[Tensor]:
    """The same from cells that are near: a Gaussian of both axes is a product, so that this is one matrix product."""
    maps = []
    for number in range(_WIDTHS):
        reach = _NEAR / 2**number
        along_x = _bell(
            (torch.arange(width, device=cell.device)[:, None] - (cell % width).unsqueeze(1)) / (width * reach)
        )
        along_y = _bell(
            (torch.arange(height, device=cell.device)[:, None] - (cell // width).unsqueeze(1)) / (height * reach)
        )
        sums = [along_y * told[:, :, part].unsqueeze(1) @ along_x.mT for part in (0, 1)]  # each (B, H, W)
        maps.append(_regressed(torch.stack(sums, dim=3)).permute(0, 3, 1, 2))
    return maps


def _regressed(sums: Tensor) -> Tensor:
    """Expectation and evidence from sums (…, 2) of weighted values and of weights."""
    weighted, weight = sums.unbind(-1)
    return torch.stack((weighted / (weight + _PRIOR), weight / (weight + 1.0)), dim=-1)


def _drawn_out(plane: Tensor, shape: torch.Size) -> Tensor:
    return nn.functional.interpolate(plane, size=tuple(shape), mode="bilinear", align_corners=False)


def _bell(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square())


def _neighbourhoods(image: Tensor) -> Tensor:
    """Brightness at three widths, two contrasts and the slope, each in its own standard deviations, (B, F, H, W)."""
    plane = image.unsqueeze(1)
    soft, softer, softest = (_blurred(plane, size) for size in (3, 7, 15))
    padded = nn.functional.pad(soft, (1, 1, 1, 1), mode="replicate")
    slope = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]).square() + (
        padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    ).square()
    seen = torch.cat((soft, softer, softest, soft - softer, softer - softest, (slope + _TINY).sqrt()), dim=1)
    centred = seen - seen.mean((2, 3), keepdim=True)
    return centred / centred.square().mean((2, 3), keepdim=True).sqrt().clamp(min=_TINY)


def _blurred(plane: Tensor, size: int) -> Tensor:
    """Running mean over a square of `size` pixels, of what there is at the border: along x, then along y."""
    for shape in ((1, size), (size, 1)):
        around = (shape[0] // 2, shape[1] // 2)
        plane = nn.functional.avg_pool2d(plane, shape, stride=1, padding=around, count_include_pad=False)
    return plane


def _standardised(value: Tensor, known: Tensor) -> Tensor:
    """Values (B, M) in standard deviations of those that are known, at most four; 0 for the others."""
    count = known.sum(1, keepdim=True).clamp(min=1.0)
    centred = (value - (value * known).sum(1, keepdim=True) / count) * known
    spread = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return (centred / spread.clamp(min=_TINY * (1.0 + value.abs().amax(1, keepdim=True)))).clamp(-4.0, 4.0)
