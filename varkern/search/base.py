"""What the loop asks of a search: how many candidates a scale gets, and which one each image keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from varkern.spec import ModelSpec


@dataclass(frozen=True)
class Candidates:
    """The candidates of one scale, for every image of a batch.

    Args:
        scale: k, from 0.
        num_scales: K.
        labels: ``[B]`` int64; the number of classes itself means "no class".
        tokens: ``[B, M, l]`` int64; of a model with binary codes the bits of every position, ``[B, M, l, d]`` uint8.
        fuse: ``fuse(start, stop, dtype=None, channels_last=False)`` gives the fused features of candidates
            ``start..stop`` as ``[B, stop - start, C, H, W]``, so that a search decides how many exist at a time.
        uniforms: ``uniforms(draw=0)`` gives uniform numbers in [0, 1), one a candidate, ``[B, M]`` float32, fixed by
            the images' seeds; each ``draw`` gives others.
        codebook: ``[V, C]``; None for binary codes.
        code_scale: of binary codes: a bit stands for plus or minus this.
    """

    scale: int
    num_scales: int
    labels: Tensor
    tokens: Tensor
    fuse: Callable[..., Tensor]
    uniforms: Callable[..., Tensor]
    codebook: Tensor | None
    code_scale: float | None = None


class Choice(NamedTuple):
    """Which candidate each image keeps, ``[B]`` int64, and what the search thought of all of them, ``[B, M]``."""

    index: Tensor
    scores: Tensor


class Search(Protocol):
    """A rule for keeping one of several candidates; it never waits for the device."""

    def check(self, spec: ModelSpec) -> None:
        """Raise ``ValueError`` if the search does not fit a model of these sizes; called before any work."""
        ...

    def check_labels(self, highest: int, spec: ModelSpec) -> None:
        """Raise ``ValueError`` if the search cannot judge images of classes up to this one; called before any work."""
        ...

    def num_candidates(self, scale: int, num_scales: int) -> int:
        """M at ``scale``; 1: no search there."""
        ...

    def choose(self, candidates: Candidates) -> Choice:
        """Keep one candidate an image."""
        ...


Scorer = Callable[[Tensor, Tensor, int], Tensor]
"""``(labels[B], features[B, M, C, H, W], scale) -> scores[B, M]``, higher is better."""
