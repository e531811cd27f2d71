"""The types that the loop, families and searches share: a model's sizes, a request, the logits of a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypeIs


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a model, for one request, that searches and scorers must fit.

    Args:
        num_classes: number of classes; the label ``num_classes`` means "no class". None: a text-to-image model.
        sides: the side of each scale's token map, or ``(h, w)`` where they may differ.
        size: H and W of the latent.
        channels: C, the width of a code.
        vocabulary: V, the number of codes; None: binary codes of ``channels`` bits.
        device: the model's device.
        patch: one position of the transformer holds ``patch`` by ``patch`` positions of the token map.
    """

    num_classes: int | None
    sides: tuple[int, ...] | tuple[tuple[int, int], ...]
    size: tuple[int, int]
    channels: int
    vocabulary: int | None
    device: torch.device | None = None
    patch: int = 1

    @property
    def num_scales(self) -> int:
        return len(self.sides)

    def grid(self, scale: int) -> tuple[int, int]:
        """Height and width of a scale's token map, in positions of the transformer."""
        side = self.sides[scale]
        h, w = side if isinstance(side, tuple) else (side, side)
        return h // self.patch, w // self.patch


class Logits(NamedTuple):
    """A model's output for one scale. The guided logits are ``(1 + guidance) * cond - guidance * uncond``.

    For binary codes every bit counts as a position: ``[B, l * d, 2]``.
    """

    cond: Tensor  # [B, l, V], floating
    uncond: Tensor | None  # the same; None: there is no guidance, or it was applied already
    guidance: float | Tensor  # one strength, or one per image, [B, 1, 1]
    top_k: int = 0  # the filters of this scale; 0: off
    top_p: float = 0.0
    free: bool = True  # False: the map is greedy or given, so there is nothing to choose from

    def guided(self, dtype: torch.dtype | None = None) -> Tensor:
        """The guided logits, ``[B, l, V]``, computed in the published order of operations.

        A tensor of strengths may raise their dtype; ``dtype`` rounds it first, as a number would be rounded.
        """
        if self.uncond is None:
            return self.cond
        guidance = self.guidance
        if dtype is None or not isinstance(guidance, Tensor):
            return (1 + guidance) * self.cond - guidance * self.uncond
        return (1 + guidance).to(dtype) * self.cond - guidance.to(dtype) * self.uncond


@dataclass(frozen=True)
class Request:
    """One call for images, in a form that is the same for all families.

    Args:
        batch_size: B.
        labels: ``[B]`` int64; an int for all images (negative: no class); None: drawn at random. For a text-to-image
            model, the condition that its published method takes.
        seed: an int, ``[B]`` int64 image seeds, or None for a fresh one.
        top_k, top_p: the sampler's filters; 0: off.
        options: the remaining arguments of the family's published method, by name.
    """

    batch_size: int
    labels: Any
    seed: int | Tensor | None = None
    top_k: int = 0
    top_p: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


def is_int(x: object) -> TypeIs[int]:
    """True for an integer of Python or NumPy, false for a bool."""
    return isinstance(x, Integral) and not isinstance(x, bool)


def is_number(x: object) -> TypeIs[float]:
    """True for a real number of Python or NumPy, false for a bool."""
    return isinstance(x, Real) and not isinstance(x, bool)
