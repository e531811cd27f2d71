"""Reading a token-map dataset, memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .manifest import CHUNK, Manifest, Shard, file_sha256


class TokenMaps:
    """The token maps and labels of N images. Use :meth:`open`, which reads the labels; tokens are read on demand."""

    def __init__(self, folder: Path, manifest: Manifest, labels: np.ndarray, shards: list[np.ndarray]):
        self.folder, self.manifest = folder, manifest
        self.labels = labels
        """The class of each image, ``[N]`` int64."""
        self._shards = shards
        self._starts = np.cumsum([0] + [len(shard) for shard in shards])

    @classmethod
    def open(cls, folder: str | os.PathLike, verify: bool = False) -> TokenMaps:
        """Open a finished dataset.

        Args:
            folder: the dataset's folder, as ``varkern tokens`` writes it.
            verify: also call :meth:`verify`, which reads all files.

        Raises:
            FileNotFoundError: if there is no dataset, or one of its files is missing.
            ValueError: if the dataset is unfinished or has another format version, a file has the wrong size, or a
                label is out of range.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest.shards is None:
            raise ValueError(f"{folder} must be a finished dataset, got an unfinished one: run its command again")
        dtype = np.dtype("<u2")
        shards = [map_array(folder / shard.tokens, dtype, (shard.count, manifest.length)) for shard in manifest.shards]
        labels = [np.zeros(0, np.int64)] + [read_labels(folder, shard, manifest) for shard in manifest.shards]
        maps = cls(folder, manifest, np.concatenate(labels), shards)
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
            for name, wanted in ((shard.tokens, shard.tokens_sha256), (shard.labels, shard.labels_sha256)):
                if file_sha256(self.folder / name) != wanted:
                    raise ValueError(f"{self.folder / name} was altered: its sha256 differs from the manifest's")
            rows = max(1, CHUNK // tokens.itemsize // tokens.shape[1])
            largest = max((tokens[i : i + rows].max() for i in range(0, len(tokens), rows)), default=0)
            if largest >= self.manifest.vocabulary:
                raise ValueError(
                    f"{self.folder / shard.tokens} must have tokens below {self.manifest.vocabulary}, got {largest}"
                )
            if after_shard is not None:
                after_shard()


def read_labels(folder: Path, shard: Shard, manifest: Manifest) -> np.ndarray:
    """Read the labels of one shard, ``[count]`` int64.

    Raises:
        ValueError: if the file has the wrong size, or a label is out of range.
    """
    labels = map_array(folder / shard.labels, np.dtype("<i4"), (shard.count,)).astype(np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < manifest.num_classes:
        raise ValueError(
            f"{folder / shard.labels} must have labels in 0..{manifest.num_classes - 1}, "
            f"got {labels.min()}..{labels.max()}"
        )
    return labels


def map_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map the array of a ``.npy`` file. Writing to the array does not change the file.

    ``np.load(mmap_mode=...)`` would keep one file descriptor open per shard, and a process has few of them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file does not hold the whole of such an array.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the dataset")
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            found = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else f"version {version}"
        except ValueError as error:
            raise ValueError(f"{path} was truncated or altered: {error}") from error
        offset = file.tell()
    if found != (shape, False, dtype):
        raise ValueError(f"{path} was altered: its header must be {(shape, False, dtype)}, got {found}")
    wanted = offset + dtype.itemsize * int(np.prod(shape))
    if size != wanted:
        what = "truncated" if size < wanted else "altered"
        raise ValueError(f"{path} was {what}: it must have {wanted} bytes, got {size}")
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    return whole[offset:].view(dtype).reshape(shape)
