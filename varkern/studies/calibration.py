"""Finding alpha: the value at which a hybrid density search counts half of a model's images as dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from varkern.checks import check
from varkern.generation import generate
from varkern.ops import image_seeds

from .cells import Cell

CALIBRATION_SEED, CALIBRATION_IMAGES = 4_000_000, 500
"""The images from which alpha is found. No sweep with a lower seed measures them."""
CALIBRATION_BATCH = 100


def in_batches(numbers: range, batch_size: int) -> list[range]:
    return [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]


def density_ratios(
    model: Any,
    cell: Cell,
    options: Mapping[str, Any],
    images: int | None = None,
    seed: int = CALIBRATION_SEED,
) -> Tensor:
    """Per image, the highest density over the mean density of its samples, ``[images]`` float64.

    A hybrid density search compares this ratio with alpha.
    """
    search = replace(cell, m=1, strategy="top", min_distance=0.0).density()
    num_classes = check(model, search, labels=0, **options).num_classes
    images = CALIBRATION_IMAGES if images is None else images
    seeds, parts = image_seeds(seed, images), []
    for batch in in_batches(range(images), CALIBRATION_BATCH):
        labels = torch.arange(batch.start, batch.stop) % num_classes
        chosen = seeds[batch.start : batch.stop]
        generation = generate(model, labels, search=search, seeds=chosen, decode=False, **options)
        parts.append(generation.scores[cell.scale].double().cpu())
    densities = torch.cat(parts)
    return densities.amax(1) / densities.mean(1)
