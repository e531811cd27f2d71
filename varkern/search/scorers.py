"""What a scorer is to a search: any callable of the right arguments, one network, or the sum of several."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .base import Scorer
from .published_scorer import PublishedScorer, takes_published_arguments


class SumOfScorers(nn.Module):
    """Adds the scores of several scorers.

    Use it for a scorer that was trained on top of another one, on maps that were resampled by the other's scores. Such
    maps have the distribution ``p_model * exp(S1)``, from which the second scorer tells real maps. Therefore it tends
    to ``S2 = log p_real - log p_model - S1``, and the sum of both tends to the score that an exact ``S1`` would have.
    ``varkern tokens generate --scorer S1 --pick resample`` draws such maps.

    For the mean of ``n`` scorers that were each trained by itself, use the sum with ``n`` times the temperature. On the
    demo model it is no better than one of them (``bench/results/demo/boosting.md``).

    Each scorer gets the features in the dtype and memory format that it asks for, and is checked against the model and
    moved to its device as if it were the only one.

    Args:
        scorers: at least one, each as for :class:`varkern.BestOfM`.

    Raises:
        ValueError, TypeError: if no scorer is given, or one of them is not a scorer.

    Example::

        >>> second = varkern.Scorer(scorer.config)
        >>> search = varkern.BestOfM(varkern.SumOfScorers(scorer, second), m=4, pick="resample")
        >>> search
        BestOfM(SumOfScorers(Scorer, Scorer), m=4, first_scale=1, last_scale=None, pick='resample', temperature=1.0)
    """

    scorers: tuple[Scorer, ...]
    networks: nn.ModuleList

    def __init__(self, *scorers: Scorer):
        super().__init__()
        if not scorers:
            raise ValueError("scorers must be at least one for SumOfScorers, got none")
        for scorer in scorers:
            check_scorer(scorer, added=len(scorers) > 1)
        self.scorers = scorers
        # Registered too, so that a change of device reaches them. The tuple keeps functions, and the order.
        self.networks = nn.ModuleList([scorer for scorer in scorers if isinstance(scorer, nn.Module)])

    @property
    def input_dtype(self) -> torch.dtype:
        """The widest dtype that one of the scorers asks for."""
        widest = wanted_features(self.scorers[0])[0]
        for scorer in self.scorers[1:]:
            widest = torch.promote_types(widest, wanted_features(scorer)[0])
        return widest

    @property
    def channels_last(self) -> bool:
        """True if all scorers ask for this memory format."""
        return all(wanted_features(scorer)[1] for scorer in self.scorers)

    def forward(self, labels: Tensor, features: Tensor, scale: int) -> Tensor:
        """The sum of all scores, ``[B, M]``, in float32 or wider; see :data:`.base.Scorer` for the arguments."""
        total: Tensor | None = None
        for scorer in self.scorers:
            scores = call_scorer(scorer, labels, as_wanted(scorer, features), scale)
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            total = scores if total is None else total + scores
        assert total is not None, "there is at least one scorer"
        return total


def check_scorer(scorer: object, added: bool = False) -> None:
    """Raise ``TypeError`` if ``scorer`` is not a scorer, or must be wrapped to be one.

    Warn about a scorer that was trained on top of others, unless it is ``added`` to some.
    """
    if isinstance(scorer, list | tuple):
        raise TypeError(
            f"scorer must be one scorer, got a {type(scorer).__name__}: add several by varkern.SumOfScorers(...)"
        )
    if not callable(scorer) or isinstance(scorer, type):
        what = f"the class {scorer.__name__}" if isinstance(scorer, type) else type(scorer).__name__
        raise TypeError(f"scorer must be callable, got {what}")
    if takes_published_arguments(scorer):
        raise TypeError(
            f"scorer must take (labels, features, scale), got {type(scorer).__name__}, which takes "
            "(x, class_labels, stage_label) as the published network: wrap it by varkern.PublishedScorer(scorer)"
        )
    if not added and (base := getattr(scorer, "on_top_of", ())):
        names = ", ".join(base)
        warnings.warn(
            f"scorer was trained on top of {names}, so its own scores are not enough: use varkern.SumOfScorers of both",
            stacklevel=3,
        )


def parts_of(scorer: Scorer) -> Iterator[Scorer]:
    """The scorers that a sum is made of, however nested; another scorer is its only part."""
    if isinstance(scorer, SumOfScorers):
        for part in scorer.scorers:
            yield from parts_of(part)
    else:
        yield scorer


def wanted_features(scorer: Scorer) -> tuple[torch.dtype, bool]:
    """The dtype of the features that a scorer asks for, and whether it asks for them channels-last."""
    return getattr(scorer, "input_dtype", None) or torch.float32, getattr(scorer, "channels_last", False)


def as_wanted(scorer: Scorer, features: Tensor) -> Tensor:
    """``features``, ``[B, M, C, H, W]``, in the dtype and the memory format that the scorer asks for."""
    dtype, channels_last = wanted_features(scorer)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return features.flatten(0, 1).to(dtype=dtype, memory_format=memory_format).unflatten(0, features.shape[:2])


def call_scorer(scorer: Scorer, labels: Tensor, features: Tensor, scale: int) -> Tensor:
    """Scores ``[B, M]`` of features ``[B, M, C, H, W]``.

    Raises:
        TypeError, ValueError: if the scorer returns no tensor, or one of another shape.
    """
    scores: Any = scorer(labels, features, scale)
    if not isinstance(scores, Tensor):
        raise TypeError(f"scorer must return a tensor, got {type(scores).__name__}")
    if scores.shape != features.shape[:2]:
        raise ValueError(f"scorer must return scores of shape {list(features.shape[:2])}, got {list(scores.shape)}")
    return scores


def describe_scorer(scorer: object) -> str:
    """The name of a function, or of the type of another object, with what it holds in brackets."""
    name = getattr(scorer, "__name__", type(scorer).__name__)
    inside: tuple = ()
    if isinstance(scorer, PublishedScorer):
        inside = (scorer.network,)
    elif isinstance(scorer, SumOfScorers):
        inside = scorer.scorers
    return f"{name}({', '.join(map(describe_scorer, inside))})" if inside else name


def move_to(scorer: Scorer, device: torch.device) -> None:
    """Move every part that is a module to ``device`` if its first parameter is elsewhere."""
    for part in parts_of(scorer):
        if isinstance(part, nn.Module):
            first = next(part.parameters(), None)
            if first is not None and first.device != device:
                part.to(device)
