"""What surrounds each cell of an image: its patch, and the few numbers that say most of it. Batched over images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from stem_gym.core.errors import PolicyError

_WEAKEST = 1e-4  # of the strongest component; below, a direction is rounding


def check_side(side: int, height: int, width: int) -> None:
    """Raises PolicyError for patches that an image of height × width does not hold."""
    if not 1 <= side <= min(height, width):
        raise PolicyError(
            f"A patch of {side} × {side} pixels does not fit an image of {width} × {height}; "
            f"give a side of 1 to {min(height, width)}."
        )


def patches_of(image: Tensor, side: int) -> Tensor:
    """Patches (n, H*W, side²) around every cell of `image` (n, H, W), mirrored at the borders without the border cell.

    A patch of an even side reaches one cell further up and left. Raises PolicyError where the patch is larger than the
    image.
    """
    height, width = image.shape[1:]
    check_side(side, height, width)
    before, after = side // 2, (side - 1) // 2
    framed = pad(image[:, None], (before, after, before, after), mode="reflect")[:, 0]
    windows = framed.unfold(1, side, 1).unfold(2, side, 1)  # (n, H, W, side, side)
    return windows.reshape(len(image), height * width, side * side)


def principal_features(patches: Tensor, count: int) -> Tensor:
    """The `count` strongest principal components of the patches (n, C, P) of each image: (n, C, count).

    Between scores and whitened scores: component k has the variance √(λ_k/λ_1), so that weak ones are heard but noise
    is not made as loud as structure. Each has its sign from its largest entry; where an image has fewer directions, the
    rest is 0.
    """
    centred = (patches - patches.mean(dim=1, keepdim=True)).double()  # so that equal images give equal features
    covariance = centred.mT @ centred / patches.shape[1]
    strength, direction = torch.linalg.eigh(covariance)
    count = min(count, patches.shape[2])
    strength = strength[:, -count:].flip(1).clamp(min=0.0)
    direction = direction[:, :, -count:].flip(2)
    largest = direction.gather(1, direction.abs().argmax(dim=1, keepdim=True))
    direction = direction * torch.where(largest < 0, -1.0, 1.0)
    share = strength / strength[:, :1].clamp(min=1e-12)
    gain = torch.where(share > _WEAKEST, share.clamp(min=_WEAKEST) ** 0.25 / strength.clamp(min=1e-12).sqrt(), 0.0)
    return (centred @ (direction * gain[:, None])).float()


def intensity_and_gradient(image: Tensor, blur: int) -> Tensor:
    """Per cell: intensity, its mean over `blur` × `blur` cells, and the steepness of that mean, (n, H*W, 3).

    Each column has mean 0 and standard deviation 1 over the image (0 where it does not vary).
    """
    reach = blur // 2
    framed = pad(image[:, None], (reach, reach, reach, reach), mode="reflect")
    smooth = avg_pool2d(framed, 2 * reach + 1, stride=1)[:, 0]
    slope_y, slope_x = torch.gradient(smooth, dim=(1, 2))
    columns = torch.stack((image, smooth, (slope_x.square() + slope_y.square()).sqrt()), dim=-1).flatten(1, 2)
    centred = columns - columns.mean(dim=1, keepdim=True)
    spread = centred.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(spread > 1e-9, centred / spread.clamp(min=1e-9), 0.0)
