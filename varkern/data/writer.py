"""Writing a token-map dataset, in one or more runs and by one or more processes.

The content of a shard depends only on the settings and the shard's number. A process writes its shards one by one. The
next run after a killed one keeps the shards that are there and makes the others. Every file is written under another
name in ``progress/``, and moved to its place when it is complete.

Under ``torchrun`` rank r of W makes the shards r, r+W, r+2W, ... No process waits for another. The process that makes
the last missing shard writes the finished manifest, whose content does not depend on which process that is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from varkern.progress import progress_bar
from varkern.runs import PROGRESS, check_settings, find_rank, lock_folder, write_bytes

from .manifest import FILE, Manifest, Shard, file_sha256
from .token_maps import read_shard


class Batch(NamedTuple):
    """The images of one batch."""

    tokens: Tensor
    """``[n, L]`` integers, or K token maps ``[n, l]``."""
    labels: Tensor | Sequence[int]
    """``[n]``."""
    skipped: Sequence[str] = ()
    """Names of the images that could not be read; n does not count them."""


BatchSource = Callable[[Sequence[range]], Iterable[Batch]]
"""Takes a list of ranges of image numbers, and yields one batch per range, in that order. A batch must depend only on
its range, not on the batches before it."""


def write_token_maps(
    folder: str | os.PathLike[str], manifest: Manifest, batch_source: BatchSource, name: str = "token maps"
) -> Manifest | None:
    """Write a dataset, or the missing part of it.

    Args:
        folder: the dataset's folder; it is made if it does not exist.
        manifest: the settings, without shards.
        batch_source: makes the images, see :data:`BatchSource`; it is not called if nothing is missing.
        name: description of the progress bar.

    Returns:
        the finished manifest, or None if other processes still have shards to make.

    Raises:
        ValueError: if ``folder`` holds other files or a dataset with other settings, or if a batch does not fit the
            manifest.
        OSError: if a file cannot be written; finished shards are kept.
    """
    folder, (rank, world) = Path(folder), find_rank()
    mine = range(rank, manifest.num_shards, world)
    if not mine:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in folder.iterdir() if path.name != PROGRESS]
    if names and FILE not in names:
        raise ValueError(f"out must be an empty folder or a dataset, got {folder}, which holds {min(names)}")
    if (finished := finish(folder, manifest, rank)) is not None:
        return finished
    if missing := [number for number in mine if not is_whole(folder, number, manifest)]:
        with lock_folder(folder, rank):
            if not (folder / FILE).exists():
                place(folder, FILE, manifest.to_json().encode(), rank)
            write_shards(folder, manifest, batch_source, missing, name, rank)
    return finish(folder, manifest, rank)


def finish(folder: Path, manifest: Manifest, rank: int) -> Manifest | None:
    """Return the finished manifest, and write it if all shards are there; None if some are missing.

    Raises:
        ValueError: if the folder's dataset was made with other settings.
    """
    if not (folder / FILE).exists():
        return None
    finished = Manifest.read(folder)
    check_settings(folder, finished.settings(), manifest.settings())
    if finished.shards is None:
        numbers = range(manifest.num_shards)
        if not all(is_whole(folder, number, manifest) for number in numbers):
            return None
        finished = replace(manifest, shards=tuple(describe(folder, number, manifest) for number in numbers))
        try:
            place(folder, FILE, finished.to_json().encode(), rank)
        except OSError:  # another rank may have written it and removed ``progress/``
            if Manifest.read(folder).shards is None:
                raise
    shutil.rmtree(folder / PROGRESS, ignore_errors=True)
    return finished


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def is_whole(folder: Path, number: int, manifest: Manifest) -> bool:
    """True if a shard is there with all its images."""
    try:
        content = read_shard(folder / shard_name(number), manifest)
    except (OSError, ValueError):
        return False
    return len(content.labels) + len(content.skipped) == sum(map(len, manifest.batches(number)))


def describe(folder: Path, number: int, manifest: Manifest) -> Shard:
    path = folder / shard_name(number)
    content = read_shard(path, manifest)
    return Shard(path.name, len(content.labels), file_sha256(path), tuple(content.skipped))


def write_shards(
    folder: Path, manifest: Manifest, batch_source: BatchSource, missing: Sequence[int], name: str, rank: int
) -> None:
    """Make the shards ``missing``."""
    made = iter(batch_source([part for number in missing for part in manifest.batches(number)]))
    with progress_bar(quiet=rank > 0) as progress:
        total = sum(len(part) for number in missing for part in manifest.batches(number))
        task = progress.add_task(name, total=total, note="")
        for number in missing:
            tokens, labels, skipped = [], [], []
            for part in manifest.batches(number):
                batch = check_batch(next(made, None), part, manifest)
                tokens.append(batch.tokens)
                labels.append(batch.labels)
                skipped += batch.skipped
                progress.advance(task, len(part))
            tensors = {"tokens": torch.cat(tokens).to(torch.uint16), "labels": torch.cat(labels).to(torch.int32)}
            place(folder, shard_name(number), save(tensors, {"skipped": json.dumps(skipped)}), rank)


def check_batch(batch: Batch | None, numbers: range, manifest: Manifest) -> Batch:
    """Check a batch and return it with tensors ``[n, L]`` and ``[n]`` on the CPU.

    Raises:
        ValueError: if the batch does not fit the manifest.
    """
    if batch is None:
        raise ValueError(f"batch_source must yield images {numbers.start}..{numbers.stop - 1}, got no further batch")
    tokens, labels, skipped = batch
    tokens = tokens if isinstance(tokens, Tensor) else torch.cat(list(tokens), dim=1)
    labels = torch.as_tensor(labels).cpu()
    wanted = len(numbers) - len(skipped)
    if tokens.shape != (wanted, manifest.length) or labels.shape != (wanted,):
        raise ValueError(
            f"a batch must have tokens [{wanted}, {manifest.length}] and labels [{wanted}], "
            f"got {list(tokens.shape)} and {list(labels.shape)}"
        )
    tokens = tokens.cpu()
    for what, values, limit in (("tokens", tokens, manifest.vocabulary), ("labels", labels, manifest.num_classes)):
        if values.is_floating_point() or values.dtype == torch.bool:
            raise ValueError(f"{what} must be integers, got {values.dtype}")
        if values.numel() and not 0 <= values.min() <= values.max() < limit:
            raise ValueError(f"{what} must be in 0..{limit - 1}, got {values.min()}..{values.max()}")
    return Batch(tokens.contiguous(), labels, skipped)


def place(folder: Path, name: str, content: bytes, rank: int) -> None:
    """Write a file whole or not at all. Two ranks may write the manifest at once, each under a name of its own."""
    unfinished = folder / PROGRESS / f"{name}.{rank}"
    write_bytes(unfinished, content)
    os.replace(unfinished, folder / name)
