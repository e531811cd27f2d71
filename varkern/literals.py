"""The words that public arguments take, as types. What checks an argument at run time takes its words from here."""

from __future__ import annotations

from typing import Any, Literal, get_args

Backend = Literal["auto", "torch", "triton"]
"""Of :class:`varkern.use_backend`."""

Sampler = Literal["philox", "multinomial"]
"""Of every function that draws tokens."""

Loop = Literal["auto", "fused", "own"]
"""Of :func:`varkern.patch`."""

GenerateLoop = Literal["auto", "fused"]
"""Of :func:`varkern.generate`, which has no loop but varkern's."""

ChosenLoop = Literal["fused", "own"]
"""What :data:`Loop` stands for, for one model."""

Pick = Literal["best", "resample"]
"""Of :class:`varkern.BestOfM`, which also takes a number."""

PathRule = Literal["resample", "cluster", "top"]
"""Of :class:`varkern.PathSearch`, which also takes rules as objects."""

Potential = Literal["value", "maximum", "sum", "difference"]
"""Of the rules of :class:`varkern.PathSearch` that compare rewards."""

Temperature = float | Literal["fitted"]
"""Of searches that resample by a scorer: a number, or that of each scale in the scorer's file."""

Strategy = Literal["hybrid", "top", "random", "small", "rank"]
"""Of :class:`varkern.DensitySearch`, as the following are."""

Metric = Literal["euclidean", "cosine"]
Per = Literal["position", "map"]
BandwidthRule = Literal["image", "batch"]
Threshold = Literal["released", "paper"]
Compatibility = Literal["paper", "released"]
DensityFamily = Literal["VAR", "FlexVAR"]

Interpolation = Literal["bicubic", "bilinear", "area", "nearest", "trilinear"]
"""Of the ops that resize features."""
INTERPOLATIONS = get_args(Interpolation)  # for code that torch.compile traces; that of PyTorch 2.5 knows no types


def check_word(name: str, value: object, words: Any) -> None:
    """Raise ``ValueError`` if ``value`` of the argument ``name`` is not one of ``words``, of this file."""
    allowed = words if isinstance(words, tuple) else get_args(words)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
