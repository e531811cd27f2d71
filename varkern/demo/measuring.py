"""What the demo's digits are measured by: the classifier as an extractor, sets of real digits, the papers' cells."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from varkern.metrics.evaluate import measure
from varkern.metrics.features import SPATIAL_CHANNELS, Extracted, Extractor
from varkern.metrics.gathering import Measured
from varkern.studies.cells import MEDIAN
from varkern.studies.presets import Preset

from . import digits
from .train import PATCH_NUMS, SAMPLING, load_classifier

REFERENCE_IMAGES = 20_000
MOST_CANDIDATES = 256
DENSITY = {"alpha": MEDIAN, "min_distance": 0.0}


def extractor(weights: Path, device: torch.device) -> Extractor:
    """The classifier in ``weights``: 64 features, 10 logits and, for sFID, 7 of its 64 last maps, 6x6.

    It takes images of 24x24 pixels.
    """
    classifier = load_classifier(weights, device)

    def extract(images: Tensor) -> Extracted:
        if images.shape[-2:] != (digits.SIDE, digits.SIDE):
            raise ValueError(
                f"features demo are of digits of {digits.SIDE}x{digits.SIDE} pixels, "
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
        count: how many.
        seed: of what digits and how they are jittered.
    """

    def __init__(self, count: int, seed: int):
        images, self.labels = digits.real_batch(count, torch.Generator().manual_seed(seed))
        self.images, self.name, self.size = as_bytes(images), f"{count:,} real digits", (digits.SIDE, digits.SIDE)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        yield from self.images.split(batch_size)

    def describe(self, number: int) -> str:
        return f"image {number}"

    def warnings(self) -> list[str]:
        return []


def as_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as an image file keeps them, uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def fingerprint(folder: Path) -> str:
    """A hash of the models' files but the scorer's, so that figures of different weights are never joined."""
    digest = hashlib.sha256()
    for name in ("vae", "var", "classifier"):
        digest.update((folder / f"{name}.safetensors").read_bytes())
    return digest.hexdigest()[:16]


def measure_digits(extractor: Extractor, seed: int, keep: int) -> Measured:
    """What 20,000 real digits measure, ``keep`` of them for precision and recall."""
    return measure(RealDigits(REFERENCE_IMAGES, seed), extractor, 100, keep)


def adapted(preset: Preset, max_m: int = MOST_CANDIDATES) -> Preset:
    """A preset as the demo model has it: its scales, alpha by rule, no distance between representatives.

    Cells of more than ``max_m`` candidates, or of scales that the model lacks, are left out.

    Raises:
        ValueError: if the preset is of models of several depths, or nothing is left.
    """
    if any(cell.model for cell in preset.cells):
        raise ValueError(f"{preset.name} compares models of several depths, and there is one demo model")
    rows = {}
    for cell, printed in preset.rows:
        cell = replace(cell, **(DENSITY if cell.n != 1 and cell.min_distance is None else {}))
        if cell.fits(len(PATCH_NUMS)) and cell.most_candidates() <= max_m:
            rows.setdefault(cell, printed)
    if not rows:
        raise ValueError(f"max_m must leave at least one cell of {preset.name}, got {max_m}")
    return replace(preset, rows=tuple(rows.items()), **SAMPLING, top_k=0)
