"""Writing a token-map dataset, over one or more runs and by one or more processes.

A shard is a function of the settings and its number alone, and so is every batch in it. A process writes its shards
one by one: tokens, labels, then a note in ``progress/`` that both are done. A run that was killed keeps what is noted
and makes the rest again; a file appears under its name only when it is whole.

Under ``torchrun`` rank r of W makes shards r, r+W, r+2W, ... and no process waits for another: whoever notes the last
missing shard sees that all are there, and writes the finished manifest, whose bytes do not depend on who that is.
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
from varkern.runs import PROGRESS, check_settings, find_rank, locked, write_bytes

from .manifest import FILE, Manifest, Shard


class Batch(NamedTuple):
    """The images of one batch."""

    tokens: Tensor
    """``[n, L]`` integers, or K token maps ``[n, l]``."""
    labels: Tensor | Sequence[int]
    """``[n]``."""
    skipped: Sequence[str] = ()
    """Names of the images that could not be read; n is smaller by their number."""


BatchSource = Callable[[Sequence[range]], Iterable[Batch]]
"""Takes the batches that are wanted, as ranges of images' numbers, and gives them one by one, in that order. What it
gives for a range must depend on the range alone, not on what came before it."""


def write_token_maps(
    folder: str | os.PathLike, manifest: Manifest, batch_source: BatchSource, name: str = "token maps"
) -> Manifest | None:
    """Write a dataset, or what is missing of it.

    Args:
        folder: is made if it is not there.
        manifest: without shards.
        batch_source: makes the images, see :data:`BatchSource`; it is not called if nothing is missing.
        name: what the progress bar says.

    Returns:
        the finished manifest; None if other processes have still shards to make.

    Raises:
        ValueError: if ``folder`` holds a dataset made with other settings, naming them, or if the source gives what
            does not fit the manifest.
        OSError: if a file cannot be written, naming it. What is whole stays.
    """
    folder, (rank, world) = Path(folder), find_rank()
    mine = range(rank, manifest.num_shards, world)
    if not mine:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    strangers = [path.name for path in folder.iterdir() if path.name != PROGRESS]
    if strangers and FILE not in strangers:
        raise ValueError(f"{folder} holds other files, such as {min(strangers)}: choose another folder")
    done, finished = look(folder, manifest)
    if finished is None and not done.keys() >= set(mine):
        with locked(folder, rank):
            if not (folder / FILE).exists():
                write_manifest(folder, manifest, rank)
            done, _ = look(folder, manifest)
            write_shards(folder, manifest, batch_source, mine, done, name, quiet=rank > 0)
    return finish(folder, manifest, rank)


def finish(folder: Path, manifest: Manifest, rank: int) -> Manifest | None:
    """Write the finished manifest if every shard is there and nobody has written it yet; returns it if it is there."""
    done, finished = look(folder, manifest)
    if finished is None and len(done) == manifest.num_shards:
        finished = replace(manifest, shards=tuple(done[number] for number in sorted(done)))
        try:
            write_manifest(folder, finished, rank)
        except OSError:  # perhaps because another rank has finished it and tidied up
            if look(folder, manifest)[1] is None:
                raise
    if finished is not None:
        shutil.rmtree(folder / PROGRESS, ignore_errors=True)
    return finished


def look(folder: Path, manifest: Manifest) -> tuple[dict[int, Shard], Manifest | None]:
    """The shards that are noted as done, by number, and the finished manifest if there is one.

    Raises:
        ValueError: if the folder's dataset is made with other settings.
    """
    # In this order: notes are removed only after the manifest is finished, so a note that is gone cannot mislead.
    done = {number: shard for number in range(manifest.num_shards) if (shard := note_of(folder, manifest, number))}
    if not (folder / FILE).exists():
        return done, None
    former = Manifest.read(folder)
    check_settings(folder, former.settings(), manifest.settings())
    return done, None if former.shards is None else former


def note_of(folder: Path, manifest: Manifest, number: int) -> Shard | None:
    """What is noted of a shard whose files are there; None: it is to be made."""
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
    """Make the shards ``numbers`` that are not done, with a progress bar."""
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
                rows.append(checked(next(made, None), part, manifest))
                progress.advance(task, len(part))
            write_shard(folder, number, manifest, rows)


def checked(batch: Batch | None, numbers: range, manifest: Manifest) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
    """A batch as tokens ``[n, L]`` uint16, labels ``[n]`` int32, and names of what was skipped.

    Raises:
        ValueError: if the batch does not fit the manifest.
    """
    if batch is None:
        raise ValueError(f"batch_source ended before images {numbers.start}..{numbers.stop - 1}")
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
    """Write one shard's files, then the note that they are whole."""
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
    # By way of a name of the rank's own, because two ranks may find at the same time that all is done.
    own = folder / PROGRESS / f"{FILE}.{rank}"
    write_bytes(own, manifest.to_json().encode())
    os.replace(own, folder / FILE)
