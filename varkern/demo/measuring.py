"""Measuring the demo's digits: the classifier as a feature extractor, sets of real digits, and the papers' presets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from varkern.metrics.evaluate import measure
from varkern.metrics.features import SPATIAL_CHANNELS, Extracted, Extractor
from varkern.metrics.statistics import Measured
from varkern.studies.cells import MEDIAN
from varkern.studies.presets import Preset

from . import digits
from .train import PATCH_NUMS, SAMPLING, load_classifier

REFERENCE_IMAGES = 20_000
MOST_CANDIDATES = 256
DENSITY = {"alpha": MEDIAN, "min_distance": 0.0}


def extractor(weights: Path, device: torch.device) -> Extractor:
    """The classifier of the folder ``weights``, a feature extractor of images of 24x24 pixels.

    It gives 64 features, 10 logits and, for sFID, the first 7 of its 64 last maps of 6x6.
    """
    classifier = load_classifier(weights, device)

    def extract(images: Tensor) -> Extracted:
        if images.shape[-2:] != (digits.SIDE, digits.SIDE):
            raise ValueError(
                f"images must have {digits.SIDE}x{digits.SIDE} pixels for features demo, "
                f"got {images.shape[-1]}x{images.shape[-2]}"
            )
        maps = classifier.maps(images.float() / 127.5 - 1)
        features = classifier.from_maps(maps)
        spatial = maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Extracted(features, classifier.head(features), spatial)

    return Extractor("demo", extract, device)


class RealDigits:
    """Jittered digits as a set of images; see :func:`.digits.real_batch`.

    Args:
        count: number of images.
        seed: seed of the choice of digits and of their jitter.
    """

    def __init__(self, count: int, seed: int):
        images, self.labels = digits.real_batch(count, torch.Generator().manual_seed(seed))
        self.images, self.name, self.size = to_bytes(images), f"{count:,} real digits", (digits.SIDE, digits.SIDE)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        yield from self.images.split(batch_size)

    def describe(self, number: int) -> str:
        return f"image {number}"

    def warnings(self) -> list[str]:
        return []


def to_bytes(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8, rounded, as in an image file."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def fingerprint(folder: Path) -> str:
    """A hash of the files of all models except the scorer. Results of other weights are refused by it."""
    digest = hashlib.sha256()
    for name in ("vae", "var", "classifier"):
        digest.update((folder / f"{name}.safetensors").read_bytes())
    return digest.hexdigest()[:16]


def measure_digits(extractor: Extractor, seed: int, keep: int) -> Measured:
    """The statistics of 20,000 real digits, with the features of the first ``keep`` for precision and recall."""
    return measure(RealDigits(REFERENCE_IMAGES, seed), extractor, 100, keep)


def adapt_preset(preset: Preset, max_m: int = MOST_CANDIDATES) -> Preset:
    """Adapt a preset to the demo model: its sampling options, a measured alpha, and ``min_distance=0``.

    Cells with more than ``max_m`` candidates, or with scales that the model does not have, are left out.

    Raises:
        ValueError: if the preset compares models of several depths, or no cell is left.
    """
    if any(cell.model for cell in preset.cells):
        raise ValueError(f"preset must be of one model for the demo, got {preset.name}, which compares several depths")
    rows = {}
    for cell, printed in preset.rows:
        cell = replace(cell, **(DENSITY if cell.n != 1 and cell.min_distance is None else {}))
        if cell.fits(len(PATCH_NUMS)) and cell.most_candidates() <= max_m:
            rows.setdefault(cell, printed)
    if not rows:
        raise ValueError(f"max_m must leave at least one cell of {preset.name}, got {max_m}")
    return replace(preset, rows=tuple(rows.items()), **SAMPLING, top_k=0)
