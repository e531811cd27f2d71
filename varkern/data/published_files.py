"""Conversion between token-map datasets and the files of LSRS' own code.

Such a file (``gt_idx.pth``, ``samples_idx_d16_n1000.pth``) holds a list with one integer tensor ``[n, L]`` per class.
Its L columns are all scales in order. A class without images has an empty list or a tensor without rows.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varkern.runs import write_checkpoint

from .manifest import Manifest, file_sha256
from .token_maps import TokenMaps
from .writer import Batch, write_token_maps

LARGEST_INT16 = 2**15  # smaller ids are written as int16, as in the published files


def read_published(path: str | os.PathLike[str], length: int) -> list[Tensor]:
    """Read the token maps of every class, ``[n, length]`` each, memory-mapped if the file's format allows it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds anything else. It is read with ``weights_only=True`` and never unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file of token maps, got {path}, which does not exist")
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file in the format before PyTorch 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a file of tensors: {error}") from error
    if not isinstance(found, list | tuple) or not found:
        raise ValueError(f"{path} must hold a list with one tensor per class, got {type(found).__name__}")
    classes = []
    for label, maps in enumerate(found):
        if isinstance(maps, list) and not maps:
            maps = torch.empty(0, length, dtype=torch.int16)
        if not isinstance(maps, Tensor) or maps.dim() != 2 or maps.is_floating_point() or maps.dtype == torch.bool:
            came = f"{maps.dtype} of shape {list(maps.shape)}" if isinstance(maps, Tensor) else type(maps).__name__
            raise ValueError(f"{path} must hold integers [n, {length}] for class {label}, got {came}")
        if maps.shape[1] != length:
            raise ValueError(
                f"patch_nums must have as many tokens as the maps of class {label} in {path}, {maps.shape[1]}, "
                f"got {length}"
            )
        classes.append(maps)
    return classes


def import_token_maps(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    patch_nums: Sequence[int],
    vocabulary: int,
    batch_size: int = 64,
    shard_size: int = 4096,
    provenance: Mapping[str, Any] | None = None,
) -> Manifest | None:
    """Write the token maps of a published file as a dataset, class by class in the file's order.

    Args:
        folder: the dataset's folder; :func:`.writer.write_token_maps` describes killed runs and ``torchrun``.
        path: the published file.
        patch_nums: the side of each scale, which the file does not contain.
        vocabulary: V, the number of codes, which the file does not contain.
        batch_size: images per batch.
        shard_size: images per shard.
        provenance: further JSON values for the manifest, such as the checksum of the VQ-VAE.

    Returns:
        the finished manifest, or None if other processes still have shards to make.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an argument is wrong.
        OSError: if a file cannot be written.
    """
    classes = read_published(path, sum(side * side for side in patch_nums))
    counts = [len(maps) for maps in classes]
    source = {
        "kind": "imported",
        **(provenance or {}),
        "file": Path(path).name,
        "sha256": file_sha256(path),
        "per_class": counts if len(set(counts)) > 1 else counts[0],
    }
    if not sum(counts):
        raise ValueError(f"{path} must hold token maps, got {len(counts)} classes without any")
    manifest = Manifest(tuple(patch_nums), vocabulary, len(classes), sum(counts), source, batch_size, shard_size)
    ends = np.cumsum(counts)

    def batches(wanted: Sequence[range]) -> Iterator[Batch]:
        for numbers in wanted:
            places = np.arange(numbers.start, numbers.stop)
            labels = np.searchsorted(ends, places, side="right")
            rows = places - (ends - counts)[labels]
            tokens = [classes[label][row] for label, row in zip(labels, rows, strict=True)]
            yield Batch(torch.stack([row.long() for row in tokens]), torch.from_numpy(labels))

    return write_token_maps(folder, manifest, batches, "importing token maps")


def export_token_maps(maps: TokenMaps, path: str | os.PathLike[str]) -> list[int]:
    """Write a dataset as a published file, whole or not at all; each class in the dataset's order.

    Args:
        maps: the dataset.
        path: the file, which must not exist yet. Ids are int16, or int32 if the vocabulary needs it.

    Returns:
        the number of images of each class.

    Raises:
        ValueError: if ``path`` exists.
        OSError: if it cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"out must be a new file, got {path}, which exists")
    dtype = torch.int16 if maps.manifest.vocabulary <= LARGEST_INT16 else torch.int32
    places = [np.flatnonzero(maps.labels == label) for label in range(maps.manifest.num_classes)]
    classes = [maps.gather(found).to(dtype) for found in places]
    write_checkpoint(path, classes)
    return [len(found) for found in places]
