"""What the loop asks of a search: how many candidates each scale gets, and which map each image keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from varkern.spec import ModelSpec

from .diagnostics import Steps


@dataclass(frozen=True)
class Candidates:
    """The candidates of one scale, for every image of a batch.

    Args:
        scale: k, counted from 0.
        num_scales: K.
        labels: ``[B]`` int64; the number of classes itself means "no class".
        tokens: ``[B, M, l]`` int64; for a model with binary codes the bits of every position, ``[B, M, l, d]`` uint8.
        fuse: ``fuse(start, stop, dtype=None, channels_last=False)`` gives the fused features of the candidates from
            ``start`` up to ``stop``, ``[B, stop - start, C, H, W]``. The search decides how many exist at a time.
        uniforms: ``uniforms(draw=0)`` gives one uniform number in [0, 1) per candidate, ``[B, M]`` float32. The
            numbers depend only on the images' seeds and on ``draw``.
        codebook: ``[V, C]``; None for binary codes.
        code_scale: for binary codes: a bit is plus or minus this number.
        by_position: ``by_position()`` gives the tokens with one entry per position of the transformer. That is
            ``tokens`` itself, except where the transformer sees several positions of the map as one (Infinity with
            spatial patchify: ``[B, M, l / 4, 4 * d]`` uint8). None: ``tokens`` itself.
        fuse_maps: ``fuse_maps(maps, dtype=None, channels_last=False)`` gives the fused features ``[B, n, C, H, W]`` of
            maps that the search composed, ``[B, n, l]`` int64 or bits ``[B, n, l, d]`` uint8. Inside a scale the
            model's tokens are independent, so a part of one candidate in another one is as good a draw as either.
        grid: the height and the width of the scale in positions of the transformer. With spatial patchify a position
            holds 2 x 2 positions of the map, else the map has one entry per position, row by row.
        step_uniforms: ``step_uniforms(count, steps)`` gives uniform numbers in [0, 1) for a search that draws many
            times, ``[B, count, steps]`` float32. They differ from those of ``uniforms``, depend only on the images'
            seeds, and larger numbers of draws begin with those of smaller ones.

    Example::

        >>> class First:
        ...     def num_candidates(self, scale, num_scales):
        ...         return 4
        ...
        ...     def choose(self, candidates):
        ...         features = candidates.fuse(0, 4)  # [B, M, C, H, W]
        ...         scores = features.mean((2, 3, 4)) + 0 * candidates.uniforms()
        ...         return varkern.search.Choice(torch.zeros(len(scores), dtype=torch.int64), scores)
        >>> varkern.generate(var, labels, search=First(), seeds=0).choices[3].tolist()
        [0, 0, 0, 0, 0, 0, 0, 0]
    """

    scale: int
    num_scales: int
    labels: Tensor
    tokens: Tensor
    fuse: Callable[..., Tensor]
    uniforms: Callable[..., Tensor]
    # Where ``Any`` stands for None, the loop gives a value, or a search knows its kind of model: no check is asked for.
    codebook: Tensor | Any
    code_scale: float | Any = None
    by_position: Callable[[], Tensor] | Any = None
    fuse_maps: Callable[..., Tensor] | Any = None
    grid: tuple[int, int] | Any = None
    step_uniforms: Callable[[int, int], Tensor] | Any = None


class Choice(NamedTuple):
    """What each image keeps.

    Args:
        index: the candidate that each image keeps, ``[B]`` int64. With ``tokens``: the candidate that the map was
            composed from.
        scores: the scores of all candidates, ``[B, M]``. With ``tokens``: of every map that the search scored, in its
            order.
        tokens: the map that each image keeps, where it is not one of the candidates: ``[B, l]`` int64, or bits
            ``[B, l, d]`` uint8. None: the candidate that ``index`` names.
        steps: what a search that composed the map did step by step; None: nothing to tell.

    Example::

        >>> scores = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
        >>> varkern.search.Choice(scores.argmax(-1), scores).index
        tensor([1, 0])
    """

    index: Tensor  # type: ignore[assignment]  # replaces tuple.index, which is not used here
    scores: Tensor
    tokens: Tensor | None = None
    steps: Steps | None = None


class Search(Protocol):
    """A rule for keeping one of several candidates: any object with these two methods. They must not wait for the GPU.

    Two more methods are optional and run before any work. ``check(spec)`` raises ``ValueError`` if the search does not
    fit a model of these sizes. ``check_labels(highest, spec)`` raises it if the search cannot judge images of classes
    up to ``highest``. A search without these methods fits every model.

    Example::

        >>> class MostUsual:
        ...     def num_candidates(self, scale, num_scales):
        ...         return 8 if scale > 0 else 1
        ...
        ...     def choose(self, candidates):
        ...         tokens = candidates.tokens  # [B, M, l]
        ...         shared = (tokens.unsqueeze(1) == tokens.unsqueeze(2)).sum((2, 3)).float()
        ...         return varkern.search.Choice(shared.argmax(-1), shared)
        >>> varkern.generate(var, labels, search=MostUsual(), seeds=0).images.shape
        torch.Size([8, 3, 24, 24])
    """

    def num_candidates(self, scale: int, num_scales: int) -> int:
        """The number of candidates at ``scale``, counted from 0, of ``num_scales`` scales; 1: no search there."""
        ...

    def choose(self, candidates: Candidates) -> Choice:
        """Keep one candidate for each image, or a map composed of several."""
        ...


def check_model(search: object, spec: ModelSpec) -> None:
    """Raise if a search does not fit a model of these sizes; a search without the method ``check`` fits all models."""
    check = getattr(search, "check", None)
    if check is not None:
        check(spec)


def check_highest_label(search: object, highest: int, spec: ModelSpec) -> None:
    """Raise if a search cannot judge classes up to ``highest``; one without the method ``check_labels`` can."""
    check = getattr(search, "check_labels", None)
    if check is not None:
        check(highest, spec)


Scorer = Callable[[Tensor, Tensor, int], Tensor]
"""``(labels[B], features[B, M, C, H, W], scale) -> scores[B, M]``, higher is better."""
