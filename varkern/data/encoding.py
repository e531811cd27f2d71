"""Token-map datasets of real images, which a VQ-VAE encodes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varkern.extras import require_pillow
from varkern.models import VQVAE
from varkern.prefetching import prefetch
from varkern.spec import is_int

from .images import RESIZE, BrokenImageError, ImageFolder, read_image
from .manifest import Manifest
from .writer import Batch, write_token_maps

BATCHES_AHEAD = 3  # batches that are read while one is encoded


def encode_token_maps(
    folder: str | os.PathLike[str],
    vae: VQVAE,
    images: ImageFolder,
    *,
    resize: float = RESIZE,
    workers: int = 4,
    batch_size: int = 64,
    shard_size: int = 4096,
    provenance: Mapping[str, Any] | None = None,
) -> Manifest | None:
    """Write the token maps of a folder of images, in its order.

    Unreadable images are skipped; the manifest lists them.

    Args:
        folder: the dataset's folder; :func:`.writer.write_token_maps` describes killed runs and ``torchrun``.
        vae: the VQ-VAE that encodes the images.
        images: the images; see :meth:`.images.ImageFolder.open`.
        resize: short side of the resized image divided by the side of the crop; at least 1.
        workers: threads that read images. Pillow releases the GIL while it decodes and resizes.
        batch_size: images per batch. Another value gives slightly different tokens, because matrix products round
            differently.
        shard_size: images per shard. A killed run makes at most one shard again.
        provenance: further JSON values for the manifest, such as the checkpoint's checksum.

    Returns:
        the finished manifest, or None if other processes still have shards to make.

    Raises:
        ValueError: if an argument is wrong, or no image is readable.
        OSError: if a file cannot be opened or written; an image that cannot be opened is not skipped.
        ImportError: if pillow is missing.
    """
    require_pillow("train")
    if not 1 <= resize < float("inf"):
        raise ValueError(f"resize must be a finite number >= 1, got {resize}")
    if not is_int(workers) or workers < 1:
        raise ValueError(f"workers must be an int >= 1, got {workers!r}")
    weight = vae.quant_conv.weight
    sides = tuple(vae.quantize.v_patch_nums)
    size = sides[-1] * vae.downsample
    source = {
        "kind": "encoded",
        **(provenance or {}),
        "classes": images.classes,
        "images_sha256": images.digest,
        "size": size,
        "resize": resize,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
    }
    manifest = Manifest(sides, vae.vocab_size, len(images.classes), len(images), source, batch_size, shard_size)

    def read(number: int) -> np.ndarray | None:
        try:
            return read_image(images.root / images.paths[number], size, resize)
        except BrokenImageError:
            return None

    def batches(wanted: Sequence[range]) -> Iterator[Batch]:
        pixels = prefetch(read, chain(*wanted), workers, BATCHES_AHEAD * batch_size)
        for numbers in wanted:
            found = {number: image for number in numbers if (image := next(pixels)) is not None}
            tokens = torch.zeros(0, manifest.length, dtype=torch.int64)
            if found:
                tokens = vae.img_to_idxBl(to_input(torch.from_numpy(np.stack(list(found.values()))), weight))
            labels = torch.tensor([images.labels[number] for number in found], dtype=torch.int64)
            yield Batch(tokens, labels, [images.paths[number] for number in numbers if number not in found])

    finished = write_token_maps(Path(folder), manifest, batches, "encoding images")
    if finished is not None and finished.count == 0:
        raise ValueError(f"images must hold a readable image, but all {len(images)} in {images.root} are unreadable")
    return finished


def to_input(pixels: Tensor, like: Tensor) -> Tensor:
    """Convert uint8 pixels to values in [-1, 1], with the device and dtype of ``like``."""
    return pixels.to(like.device).float().div_(255).mul_(2).sub_(1).to(like.dtype)
