"""Reading a token-map dataset, memory-mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .manifest import Manifest, file_sha256

ROWS = 4096  # images whose tokens are checked at a time


class TokenMaps:
    """The token maps and labels of N images. Use :meth:`open`, which reads the labels; tokens are read on demand."""

    def __init__(self, folder: Path, manifest: Manifest, labels: np.ndarray, shards: list[np.ndarray]):
        self.folder, self.manifest = folder, manifest
        self.labels = labels
        """The class of each image, ``[N]`` int64."""
        self._shards = shards
        self._starts = np.cumsum([0] + [len(shard) for shard in shards])

    @classmethod
    def open(cls, folder: str | os.PathLike[str], verify: bool = False) -> TokenMaps:
        """Open a finished dataset.

        Args:
            folder: the dataset's folder, as ``varkern tokens`` writes it.
            verify: also call :meth:`verify`, which reads all files.

        Raises:
            FileNotFoundError: if there is no dataset, or one of its files is missing.
            ValueError: if the dataset is unfinished or has another format version, a file is not whole or has other
                sizes, or a label is out of range.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest.shards is None:
            raise ValueError(f"{folder} must be a finished dataset, got an unfinished one: run its command again")
        shards = [read_shard(folder / shard.file, manifest, shard.count) for shard in manifest.shards]
        labels = [np.zeros(0, np.int64), *(shard.labels for shard in shards)]
        maps = cls(folder, manifest, np.concatenate(labels), [shard.tokens for shard in shards])
        if verify:
            maps.verify()
        return maps

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"TokenMaps({str(self.folder)!r}, {len(self)} images of {self.manifest.length} tokens)"

    def __reduce__(self):
        return TokenMaps.open, (self.folder,)

    def gather(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Read the tokens of some images.

        Args:
            indices: n image numbers in 0..N-1, in any order; repeats are allowed. A tensor must be on the CPU.

        Returns:
            ``[n, L]`` int64, all scales in order.

        Raises:
            IndexError: if a number is out of range.
        """
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices must be in 0..{len(self) - 1}, got {indices.min()}..{indices.max()}")
        found = np.empty((len(indices), self.manifest.length), np.int64)
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        order = np.argsort(shards, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1) if len(order) else ():
            shard = shards[group[0]]
            found[group] = self._shards[shard][indices[group] - self._starts[shard]]
        return torch.from_numpy(found)

    def split(self, tokens: Tensor) -> list[Tensor]:
        """Split tokens ``[n, L]`` into K token maps ``[n, l]``, which are views."""
        return list(tokens.split(self.manifest.lengths, dim=-1))

    def verify(self, after_shard: Callable[[], None] | None = None) -> None:
        """Read every file, compare it with its checksum, and check its tokens.

        Args:
            after_shard: called after each shard, for a progress bar.

        Raises:
            ValueError: if a file was altered or has tokens beyond the vocabulary; the message names the first one.
        """
        for shard, tokens in zip(self.manifest.shards, self._shards, strict=True):
            path = self.folder / shard.file
            if file_sha256(path) != shard.sha256:
                raise ValueError(f"{path} was altered: its sha256 differs from the manifest's")
            largest = max((tokens[i : i + ROWS].max() for i in range(0, len(tokens), ROWS)), default=0)
            if largest >= self.manifest.vocabulary:
                raise ValueError(f"{path} must have tokens below {self.manifest.vocabulary}, got {largest}")
            if after_shard is not None:
                after_shard()


class ShardContent(NamedTuple):
    """The content of a shard's file."""

    tokens: np.ndarray
    """``[n, L]`` uint16, memory-mapped. Writing to the array does not change the file."""
    labels: np.ndarray
    """``[n]`` int64."""
    skipped: list[str]
    """Names of the images that could not be read."""


def read_shard(path: Path, manifest: Manifest, count: int | None = None) -> ShardContent:
    """Read a shard of ``count`` images; None: any number.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not whole or has other sizes, or a label is out of range.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the dataset")
    try:
        with safe_open(path, framework="pt") as file:
            tokens, labels = (file.get_tensor(name).numpy() for name in ("tokens", "labels"))
            skipped = json.loads(file.metadata()["skipped"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was truncated or altered: {error}") from error
    rows = len(labels) if count is None else count
    if tokens.dtype != np.uint16 or tokens.shape != (rows, manifest.length) or labels.shape != (rows,):
        raise ValueError(
            f"{path} was altered: it must have uint16 tokens {[rows, manifest.length]} and labels {[rows]}, "
            f"got {tokens.dtype} {list(tokens.shape)} and {list(labels.shape)}"
        )
    labels = labels.astype(np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < manifest.num_classes:
        raise ValueError(
            f"{path} must have labels in 0..{manifest.num_classes - 1}, got {labels.min()}..{labels.max()}"
        )
    return ShardContent(tokens, labels, skipped)
