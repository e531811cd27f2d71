"""A token-map dataset of real images, as a VQ-VAE encodes them."""

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

BATCHES_AHEAD = 3  # that are being read while one is encoded


def encode_token_maps(
    folder: str | os.PathLike,
    vae: VQVAE,
    images: ImageFolder,
    *,
    resize: float = RESIZE,
    workers: int = 4,
    batch_size: int = 64,
    shard_size: int = 4096,
    provenance: Mapping[str, Any] | None = None,
) -> Manifest | None:
    """Write the token maps of a folder of images, in its order; unreadable ones are skipped and named in the manifest.

    Args:
        folder: the dataset's; see :func:`.writer.write_token_maps` for runs that were killed and for ``torchrun``.
        vae: encodes them.
        images: see :meth:`.images.ImageFolder.open`.
        resize: short side over the crop's side before the crop, at least 1; see :func:`.images.read_image`.
        workers: threads that read images. Pillow lets go of Python's lock where it decodes and resizes.
        batch_size: images at a time. It is part of the dataset: matrix products round differently at other sizes.
        shard_size: images a shard, which is what a killed run makes again at most.
        provenance: JSON values that the manifest keeps beside the settings, such as the checkpoint's checksum.

    Returns:
        the finished manifest; None if other processes have still shards to make.

    Raises:
        ValueError, OSError: naming what is wrong; an image that cannot even be opened is no broken image.
        ImportError: if pillow is missing.
    """
    require_pillow()
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
        pictures = prefetch(read, chain(*wanted), workers, BATCHES_AHEAD * batch_size)
        for numbers in wanted:
            found = {number: picture for number in numbers if (picture := next(pictures)) is not None}
            tokens = torch.zeros(0, manifest.length, dtype=torch.int64)
            if found:
                tokens = vae.img_to_idxBl(as_input(torch.from_numpy(np.stack(list(found.values()))), weight))
            labels = torch.tensor([images.labels[number] for number in found], dtype=torch.int64)
            yield Batch(tokens, labels, [images.paths[number] for number in numbers if number not in found])

    finished = write_token_maps(Path(folder), manifest, batches, "encoding images")
    if finished is not None and finished.count == 0:
        raise ValueError(f"none of the {len(images)} images below {images.root} is readable")
    return finished


def as_input(pixels: Tensor, like: Tensor) -> Tensor:
    """Pixels uint8 to [-1, 1], with the device and dtype of ``like``."""
    return pixels.to(like.device).float().div_(255).mul_(2).sub_(1).to(like.dtype)
