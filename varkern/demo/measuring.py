"""What the demo's digits are measured by: the classifier as an extractor of features, and sets of real digits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from varkern.metrics.features import SPATIAL_CHANNELS, Extracted, Extractor
from varkern.models import VQVAE

from . import digits
from .train import load_classifier


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


class Reconstructed(RealDigits):
    """The same digits as a VQ-VAE gives them back.

    Args:
        digits: the real ones.
        vae: of the demo.
    """

    def __init__(self, digits: RealDigits, vae: VQVAE):
        self.images, self.labels, self.size = digits.images, digits.labels, digits.size
        self.name, self.vae = f"{digits.name} through the VQ-VAE", vae

    @torch.inference_mode()
    def batches(self, batch_size: int) -> Iterator[Tensor]:
        device = next(self.vae.parameters()).device
        for batch in super().batches(batch_size):
            images = batch.to(device).float() / 127.5 - 1
            yield as_bytes(self.vae.img_to_reconstructed_img(images, last_one=True)).cpu()


def as_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as an image file keeps them, uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()
