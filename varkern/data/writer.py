"""Writing a token-map dataset, in one or more runs and by one or more processes.

The content of a shard depends only on the settings and the shard's number. A process writes its shards one by one: the
tokens, the labels, then a note in ``progress/``. The next run after a killed one keeps the shards that have a note and
makes the others. Every file is written whole or not at all.

Under ``torchrun`` rank r of W makes the shards r, r+W, r+2W, ... No process waits for another. The process that makes
the last missing shard writes the finished manifest, whose content does not depend on which process that is.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from varkern.progress import progress_bar
from varkern.runs import PROGRESS, check_settings, find_rank, lock_folder, write_bytes

from .manifest import FILE, Manifest, Shard


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
    folder: str | os.PathLike, manifest: Manifest, batch_source: BatchSource, name: str = "token maps"
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
    done, finished = read_progress(folder, manifest)
    if finished is None and not done.keys() >= set(mine):
        with lock_folder(folder, rank):
            if not (folder / FILE).exists():
                write_manifest(folder, manifest, rank)
            done, _ = read_progress(folder, manifest)
            write_shards(folder, manifest, batch_source, mine, done, name, quiet=rank > 0)
    return finish(folder, manifest, rank)


def finish(folder: Path, manifest: Manifest, rank: int) -> Manifest | None:
    """Return the finished manifest, and write it if all shards are there; None if some are missing."""
    done, finished = read_progress(folder, manifest)
    if finished is None and len(done) == manifest.num_shards:
        finished = replace(manifest, shards=tuple(done[number] for number in sorted(done)))
        try:
            write_manifest(folder, finished, rank)
        except OSError:  # another rank may have written it and removed the notes
            if read_progress(folder, manifest)[1] is None:
                raise
    if finished is not None:
        shutil.rmtree(folder / PROGRESS, ignore_errors=True)
    return finished


def read_progress(folder: Path, manifest: Manifest) -> tuple[dict[int, Shard], Manifest | None]:
    """Read the finished shards, by number, and the finished manifest if there is one.

    Raises:
        ValueError: if the folder's dataset was made with other settings.
    """
    # Notes are read before the manifest. They are removed only after it is finished, so it is seen if they are gone.
    done = {number: shard for number in range(manifest.num_shards) if (shard := read_note(folder, number))}
    if not (folder / FILE).exists():
        return done, None
    former = Manifest.read(folder)
    check_settings(folder, former.settings(), manifest.settings())
    return done, None if former.shards is None else former


def read_note(folder: Path, number: int) -> Shard | None:
    """Read the note of a finished shard; None if the shard is still to be made."""
    try:
        note = json.loads((folder / PROGRESS / f"{number:05d}.json").read_text())
        sizes = [(folder / note["shard"][kind]).stat().st_size for kind in ("tokens", "labels")]
        return Shard.from_json(note["shard"]) if sizes == note["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_shards(
    folder: Path,
    manifest: Manifest,
    batch_source: BatchSource,
    numbers: Sequence[int],
    done: Mapping[int, Shard],
    name: str,
    quiet: bool,
) -> None:
    """Make those of the shards ``numbers`` that are not done."""
    batches = {number: manifest.batches(number) for number in numbers}
    missing = {number: parts for number, parts in batches.items() if number not in done}
    if not missing:
        return
    images = {number: sum(map(len, parts)) for number, parts in batches.items()}
    total = sum(images.values())
    made = iter(batch_source([part for parts in missing.values() for part in parts]))
    with progress_bar(quiet) as progress:
        before = total - sum(images[number] for number in missing)
        task = progress.add_task(name, total=total, completed=before, note="")
        for number, parts in missing.items():
            rows = []
            for part in parts:
                rows.append(check_batch(next(made, None), part, manifest))
                progress.advance(task, len(part))
            write_shard(folder, number, manifest, rows)


def check_batch(
    batch: Batch | None, numbers: range, manifest: Manifest
) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
    """Check a batch and return tokens ``[n, L]`` uint16, labels ``[n]`` int32, and the names of skipped images.

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
    return tokens.numpy().astype("<u2", order="C"), labels.numpy().astype("<i4"), skipped


def write_shard(folder: Path, number: int, manifest: Manifest, rows: Sequence[tuple]) -> None:
    """Write one shard's files, then its note."""
    tokens, labels, skipped = zip(*rows, strict=True)
    files = {
        f"tokens-{number:05d}.npy": npy_bytes(np.concatenate(tokens)),
        f"labels-{number:05d}.npy": npy_bytes(np.concatenate(labels)),
    }
    for file_name, content in files.items():
        write_bytes(folder / file_name, content)
    sums = [hashlib.sha256(content).hexdigest() for content in files.values()]
    shard = Shard(*files, sum(map(len, labels)), *sums, tuple(name for names in skipped for name in names))
    note = {"shard": asdict(shard), "bytes": [len(content) for content in files.values()]}
    write_bytes(folder / PROGRESS / f"{number:05d}.json", json.dumps(note).encode())


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def write_manifest(folder: Path, manifest: Manifest, rank: int) -> None:
    # Two ranks may write it at the same time, so each writes to a name with its rank and then renames the file.
    unfinished = folder / PROGRESS / f"{FILE}.{rank}"
    write_bytes(unfinished, manifest.to_json().encode())
    os.replace(unfinished, folder / FILE)
