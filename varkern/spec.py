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
    """Sizes of a model, for one request, that searches and scorers must fit.

    Args:
        num_classes: classes; the label ``num_classes`` itself means "no class". None: a model of texts.
        sides: the side of each scale's token map, ``h`` and ``w`` where they may differ.
        size: H and W of the latent.
        channels: C, the width of a code.
        vocabulary: V, the number of codes; None: binary codes of ``channels`` bits, which no table holds.
        device: where the model is.
    """

    num_classes: int | None
    sides: tuple[int, ...] | tuple[tuple[int, int], ...]
    size: tuple[int, int]
    channels: int
    vocabulary: int | None
    device: torch.device | None = None

    @property
    def num_scales(self) -> int:
        return len(self.sides)


class Logits(NamedTuple):
    """What a model says of one scale: the guided logits are ``(1 + guidance) * cond - guidance * uncond``.

    Of binary codes every bit is a position of its own: ``[B, l * d, 2]``.
    """

    cond: Tensor  # [B, l, V], floating
    uncond: Tensor | None  # the same; None: no guidance is left to do
    guidance: float | Tensor  # one strength, or one an image, [B, 1, 1]
    top_k: int = 0  # the filters of this scale; 0: off
    top_p: float = 0.0
    free: bool = True  # False: its map is greedy or given, so that there is nothing to choose from

    def guided(self, dtype: torch.dtype | None = None) -> Tensor:
        """The logits that are sampled, ``[B, l, V]``, by the published order of operations.

        A tensor of strengths may raise their type; with ``dtype`` it is rounded to that first, as a number would be.
        """
        if self.uncond is None:
            return self.cond
        more, less = 1 + self.guidance, self.guidance
        if dtype is not None and isinstance(less, Tensor):
            more, less = more.to(dtype), less.to(dtype)
        return more * self.cond - less * self.uncond


@dataclass(frozen=True)
class Request:
    """One call for images, in the words that all families share.

    Args:
        batch_size: B.
        labels: ``[B]`` int64; an int for all images (negative: no class); None: drawn at random. Of a model of texts
            what its published method takes in their place.
        seed: an int, ``[B]`` int64 image seeds, or None for a fresh one.
        top_k, top_p: the sampler's filters; 0: off.
        options: what only one family understands, by the names of its published method.
    """

    batch_size: int
    labels: Any
    seed: int | Tensor | None = None
    top_k: int = 0
    top_p: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


def is_int(x: object) -> bool:
    """True for an integer of Python's or NumPy's, false for a bool."""
    return isinstance(x, Integral) and not isinstance(x, bool)
