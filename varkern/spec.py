"""The words that the loop, families and searches share: a model's sizes, a request, a scale's logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a model that searches and scorers must fit.

    Args:
        num_classes: classes; the label ``num_classes`` itself means "no class".
        sides: the side of each scale's token map.
        size: H and W of the latent.
        channels: C, the width of a code.
        vocabulary: V, the number of codes.
        device: where the model is.
    """

    num_classes: int
    sides: tuple[int, ...]
    size: tuple[int, int]
    channels: int
    vocabulary: int
    device: torch.device | None = None

    @property
    def num_scales(self) -> int:
        return len(self.sides)


class Logits(NamedTuple):
    """What a model says of one scale: the guided logits are ``(1 + guidance) * cond - guidance * uncond``."""

    cond: Tensor  # [B, l, V] float32
    uncond: Tensor | None  # the same; None: the model was run without guidance
    guidance: float | Tensor  # one strength, or one an image, [B, 1, 1]

    def guided(self) -> Tensor:
        """The logits that are sampled, ``[B, l, V]``, by the published order of operations."""
        if self.uncond is None:
            return self.cond
        return (1 + self.guidance) * self.cond - self.guidance * self.uncond


@dataclass(frozen=True)
class Request:
    """One call for images, in the words that all families share.

    Args:
        batch_size: B.
        labels: ``[B]`` int64; an int for all images (negative: no class); None: drawn at random.
        seed: an int, ``[B]`` int64 image seeds, or None for a fresh one.
        top_k, top_p: the sampler's filters; 0: off.
        options: what only one family understands, by the names of its published method.
    """

    batch_size: int
    labels: int | Tensor | None
    seed: int | Tensor | None = None
    top_k: int = 0
    top_p: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


def is_int(x: object) -> bool:
    """True for an integer of Python's or NumPy's, false for a bool."""
    return isinstance(x, Integral) and not isinstance(x, bool)
