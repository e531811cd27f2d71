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
    """The token maps of N images and their classes. Opening reads the labels; tokens are read when asked for.

    Use :meth:`open`.
    """

    def __init__(self, folder: Path, manifest: Manifest, labels: np.ndarray, shards: list[np.ndarray]):
        self.folder, self.manifest = folder, manifest
        self.labels = labels
        """The classes, ``[N]`` int64."""
        self._shards = shards
        self._starts = np.cumsum([0] + [len(shard) for shard in shards])

    @classmethod
    def open(cls, folder: str | os.PathLike, verify: bool = False) -> TokenMaps:
        """Open a finished dataset.

        Args:
            folder: of ``varkern tokens`` or :func:`.writer.write_token_maps`.
            verify: compare every checksum too, which reads all; see :meth:`verify`.

        Raises:
            FileNotFoundError: if there is no dataset, or a file of it is missing.
            ValueError: if the dataset is unfinished or of another format version, if a file has not the size that
                its images need, or if a label is beyond the classes; naming the file.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest.shards is None:
            raise ValueError(f"{folder} is unfinished: run the command that makes it again, it goes on where it was")
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
        """The tokens of some images.

        Args:
            indices: n numbers in 0..N-1, in any order, repeats allowed; on the CPU.

        Returns:
            ``[n, L]`` int64, all scales behind one another.

        Raises:
            IndexError: for a number that is out of range.
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
        """Tokens ``[n, L]`` as K token maps ``[n, l]``, which share their memory."""
        return list(tokens.split(self.manifest.lengths, dim=-1))

    def verify(self, after_shard: Callable[[], None] | None = None) -> None:
        """Compare every file with its checksum, which reads all of them.

        Args:
            after_shard: called after each shard, for a progress bar.

        Raises:
            ValueError: naming the first file that was altered, or that has tokens beyond the vocabulary.
        """
        for shard, tokens in zip(self.manifest.shards, self._shards, strict=True):
            for name, wanted in ((shard.tokens, shard.tokens_sha256), (shard.labels, shard.labels_sha256)):
                if file_sha256(self.folder / name) != wanted:
                    raise ValueError(f"{self.folder / name} is altered: its sha256 is not the one in the manifest")
            rows = max(1, CHUNK // tokens.itemsize // tokens.shape[1])
            largest = max((tokens[i : i + rows].max() for i in range(0, len(tokens), rows)), default=0)
            if largest >= self.manifest.vocabulary:
                raise ValueError(
                    f"{self.folder / shard.tokens} has token {largest}, the vocabulary is {self.manifest.vocabulary}"
                )
            if after_shard is not None:
                after_shard()


def read_labels(folder: Path, shard: Shard, manifest: Manifest) -> np.ndarray:
    """The labels of one shard, ``[count]`` int64.

    Raises:
        ValueError: if the file has not the right size, or a label is beyond the classes.
    """
    labels = map_array(folder / shard.labels, np.dtype("<i4"), (shard.count,)).astype(np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < manifest.num_classes:
        raise ValueError(
            f"{folder / shard.labels} has labels {labels.min()}..{labels.max()}, "
            f"they must be in 0..{manifest.num_classes - 1}"
        )
    return labels


def map_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a ``.npy`` file, mapped into memory and not read. Writing to it does not change the file.

    ``np.load(mmap_mode=...)`` would keep a file descriptor a shard, of which a process has few.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file does not hold such an array, whole.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the dataset")
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            found = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else f"version {version}"
        except ValueError as error:
            raise ValueError(f"{path} is truncated or altered: {error}") from error
        offset = file.tell()
    if found != (shape, False, dtype):
        raise ValueError(f"{path} is altered: its header says {found}, wanted is {(shape, False, dtype)}")
    wanted = offset + dtype.itemsize * int(np.prod(shape))
    if size != wanted:
        what = "truncated" if size < wanted else "altered"
        raise ValueError(f"{path} is {what}: it has {size} bytes, wanted are {wanted}")
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    return whole[offset:].view(dtype).reshape(shape)
