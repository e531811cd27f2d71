"""An alpha by rule: of a model's own samples, so that a hybrid density search finds every other image dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from varkern.checks import check_request
from varkern.families import recognise
from varkern.generation import generate
from varkern.ops import image_seeds
from varkern.search import Search
from varkern.spec import ModelSpec, Request

from .cells import Cell

CALIBRATION_SEED, CALIBRATION_IMAGES = 4_000_000, 500
"""An alpha by rule is found on these images, which no sweep of a lower seed measures."""
CALIBRATION_BATCH = 100


def in_batches(numbers: range, batch_size: int) -> list[range]:
    return [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]


def checked(model: Any, search: Search | None, options: Mapping[str, Any]) -> ModelSpec:
    """The model's sizes, once a search and options are seen to fit it.

    Raises:
        ValueError, TypeError, UnsupportedModelError: if they do not.
    """
    family, rest = recognise(model), dict(options)
    request = Request(
        1, torch.zeros(1, dtype=torch.int64), image_seeds(0, 1), rest.pop("top_k", 0), rest.pop("top_p", 0.0), rest
    )
    spec = family.spec(model, request)
    check_request(family, model, spec, request, search, "philox")
    return spec


def density_ratios(
    model: Any,
    cell: Cell,
    options: Mapping[str, Any],
    images: int | None = None,
    seed: int = CALIBRATION_SEED,
) -> Tensor:
    """max/mean of the densities of each image's samples, ``[images]`` float64: what a hybrid compares with alpha."""
    search = replace(cell, m=1, strategy="top", min_distance=0.0).density()
    num_classes = checked(model, search, options).num_classes
    images = CALIBRATION_IMAGES if images is None else images
    seeds, parts = image_seeds(seed, images), []
    for batch in in_batches(range(images), CALIBRATION_BATCH):
        labels = torch.arange(batch.start, batch.stop) % num_classes
        chosen = seeds[batch.start : batch.stop]
        told = generate(model, labels, search=search, seeds=chosen, decode=False, **options)
        parts.append(told.scores[cell.scale].double().cpu())
    densities = torch.cat(parts)
    return densities.amax(1) / densities.mean(1)
