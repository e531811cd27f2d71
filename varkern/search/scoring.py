"""What searches with a scorer share: checks of their arguments, and the scores of many maps, a few at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from varkern.literals import Temperature
from varkern.spec import ModelSpec, is_int, is_number

from .base import Candidates, Scorer
from .scorers import call_scorer, describe_scorer, move_to, parts_of


def check_scales(first_scale: object, last_scale: object) -> None:
    """Raise ``ValueError`` if these are not the first and the last scale of a search."""
    if not is_int(first_scale) or first_scale < 0:
        raise ValueError(f"first_scale must be an int >= 0, got {first_scale!r}")
    if last_scale is not None and (not is_int(last_scale) or last_scale < first_scale):
        raise ValueError(f"last_scale must be an int >= first_scale={first_scale}, got {last_scale!r}")


def check_scoring(temperature: object, maps_at_once: object, scorer: object) -> None:
    """Raise ``ValueError`` if one of these is out of its range, or a scorer has no fitted temperatures."""
    if isinstance(temperature, str) and temperature == "fitted":
        if getattr(scorer, "temperatures", None) is None:
            raise ValueError(
                "temperature='fitted' needs a scorer whose file has fitted temperatures, which varkern scorer report "
                f"--save-temperatures adds to it, got {describe_scorer(scorer)} without"
            )
    elif not is_number(temperature) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number > 0, got {temperature!r}")
    if not is_int(maps_at_once) or maps_at_once < 1:
        raise ValueError(f"maps_at_once must be an int >= 1, got {maps_at_once!r}")


def temperature_at(temperature: Temperature, scorer: Scorer, scale: int) -> float:
    """The temperature of a scale: the number given, or the one that was fitted for the scorer."""
    if not isinstance(temperature, str):
        return temperature
    fitted: Any = scorer
    return float(fitted.temperatures[scale])


def check_scales_exist(first_scale: int, last_scale: int | None, spec: ModelSpec) -> None:
    """Raise ``ValueError`` if a model of these sizes has no such scale."""
    for name, scale in (("first_scale", first_scale), ("last_scale", last_scale)):
        if scale is not None and scale >= spec.num_scales:
            raise ValueError(f"{name} must be < {spec.num_scales}, the model's scales, got {scale}")


def check_scorer_fits(scorer: Scorer, spec: ModelSpec) -> None:
    """Raise ``ValueError`` if the scorer has a ``config`` that differs from the model's sizes."""
    wanted = {
        "num_classes": spec.num_classes,
        "num_scales": spec.num_scales,
        "channels": spec.channels,
        "size": spec.size[0],
    }
    for config in (getattr(part, "config", None) for part in parts_of(scorer)):
        for name, value in wanted.items():
            if getattr(config, name, value) != value:
                made_for = f"{name}={getattr(config, name)}"
                raise ValueError(f"scorer was made for {made_for}, but the model has {name}={value}")


def check_scorer_knows(scorer: Scorer, highest: int, spec: ModelSpec) -> None:
    """Raise ``ValueError`` for a label above the scorer's classes, of which "no class" is none."""
    for part in parts_of(scorer):
        num_classes = getattr(part, "num_classes", None)
        num_classes = getattr(getattr(part, "config", None), "num_classes", num_classes)
        if num_classes is not None and highest >= num_classes:
            meaning = ", which means 'no class' and has no score" if highest == spec.num_classes else ""
            raise ValueError(
                f"label (label_B, labels) must be in 0..{num_classes - 1}, the scorer's classes, got {highest}{meaning}"
            )


def score_maps(
    scorer: Scorer, candidates: Candidates, fuse: Callable[..., Tensor], count: int, maps_at_once: int
) -> Tensor:
    """Scores ``[B, count]`` float32, computed for ``maps_at_once`` feature maps at a time. NaN counts as the lowest.

    The features have the scorer's ``input_dtype`` and, if its ``channels_last`` is true, that memory format. A scorer
    without these attributes gets contiguous float32.

    Args:
        scorer: see :data:`.base.Scorer`; a module is moved to the candidates' device.
        candidates: whose labels and scale the scorer is given.
        fuse: ``fuse(start, stop, dtype=..., channels_last=...)`` gives the features of some of the maps.
        count: number of maps of each image, >= 1.
        maps_at_once: see :class:`.BestOfM`.

    Raises:
        TypeError, ValueError: if the scorer returns no tensor, or one of another shape.
    """
    move_to(scorer, candidates.tokens.device)
    step = max(maps_at_once // max(len(candidates.tokens), 1), 1)
    wanted = {
        "dtype": getattr(scorer, "input_dtype", None),
        "channels_last": getattr(scorer, "channels_last", False),
    }
    parts = []
    for start in range(0, count, step):
        features = fuse(start, min(start + step, count), **wanted)
        parts.append(call_scorer(scorer, candidates.labels, features, candidates.scale))
    scores = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).float()
    return scores.nan_to_num(nan=-math.inf, neginf=-math.inf, posinf=math.inf)
