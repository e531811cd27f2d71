"""The real images of the demo: scikit-learn's 1,797 handwritten digits of 8x8 pixels, enlarged to 24x24."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 24
NUM_CLASSES = 10
ROTATION = 10.0  # largest angle in degrees, in both directions
SCALE_MEAN, SCALE_SPREAD = 0.90, 0.06
SHIFT = 0.06  # largest shift as a share of the image's side, in all four directions


@cache
def originals() -> tuple[Tensor, Tensor]:
    """All images ``[1797, 1, 8, 8]`` float32 in [-1, 1] and their labels ``[1797]`` int64.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'varkern[digits]'") from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(8).sub(1).unsqueeze(1)
    return images, torch.from_numpy(digits.target).long()


def jitter(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Rotate, scale and shift each image at random and enlarge it to 24x24, in one bicubic resampling.

    Args:
        images: ``[N, 1, 8, 8]`` in [-1, 1].
        generator: generator of the random numbers; None: PyTorch's default.

    Returns:
        ``[N, 3, 24, 24]`` in [-1, 1]; the three colours are equal.
    """
    count = images.shape[0]
    angle, scale, dx, dy = (2 * torch.rand(4, count, generator=generator) - 1).unbind(0)
    angle, scale = angle * math.radians(ROTATION), SCALE_MEAN + SCALE_SPREAD * scale
    # affine_grid maps the output to the input, so the scale is inverted; its unit is half the image's side.
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.stack((cos, -sin, 2 * SHIFT * dx, sin, cos, 2 * SHIFT * dy), dim=1).view(count, 2, 3)
    grid = F.affine_grid(theta, [count, 1, SIDE, SIDE], align_corners=False)
    # grid_sample fills the outside of the image with 0. Adding 1 before and subtracting it after makes this -1, black.
    out = F.grid_sample(images + 1, grid.to(images), mode="bicubic", padding_mode="zeros", align_corners=False) - 1
    return out.clamp_(-1, 1).expand(count, 3, SIDE, SIDE)


def real_batch(count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw ``count`` real digits with replacement and jitter them: images ``[N, 3, 24, 24]``, labels ``[N]``."""
    images, labels = originals()
    chosen = torch.randint(len(labels), (count,), generator=generator)
    return jitter(images[chosen], generator), labels[chosen]
