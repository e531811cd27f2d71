"""Folders of long work: files that are written whole or not at all, settings that must match, locks, and ranks.

A long command writes to a folder. It can be killed at any time, and the same command continues where it stopped. Three
rules make this safe. The folder holds the settings with which its files were made, and other settings are refused. A
file gets its name only when it is complete. A process holds a lock while it writes.

Under ``torchrun`` several processes, the ranks, share the work of one folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import lock_descriptor
from safetensors.torch import save
from torch import Tensor, distributed

SETTINGS, PROGRESS = "settings.json", "progress"


@contextlib.contextmanager
def atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to ``path`` at the end. After an error the previous file is kept.

    Under ``torchrun`` each process has another temporary path, so several processes may write the same file.
    """
    path, rank = Path(path), os.environ.get("RANK", "0")
    unfinished = path.with_name(path.name + (".partial" if rank == "0" else f".{rank}.partial"))
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: if the file cannot be written; the message names the file, also for a full disk.
    """
    try:
        with atomically(path) as unfinished, unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = f"{error.strerror}, while writing {path}; finished files are kept, run again to continue"
        raise OSError(error.errno, reason) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, see :func:`write_bytes`; its folder is made if it does not exist."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Write JSON, see :func:`write_text`."""
    write_text(path, json.dumps(values, indent=1) + "\n")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, see :func:`write_bytes`; ``save_file`` does not raise ``OSError`` for a full disk."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, None if metadata is None else dict(metadata)))


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write ``state`` in the format of ``torch.save``, see :func:`write_bytes`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getbuffer())


def open_folder(folder: Path) -> None:
    """Make ``folder`` and check that files can be written in it.

    Raises:
        OSError: if they cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.touch()
    probe.unlink(missing_ok=True)  # another process may have removed it


def check_file(name: str, path: Path | None, suffix: str) -> None:
    """Check that the file of argument ``name`` can be written, and make its folder. ``path`` may be None.

    Raises:
        ValueError: if ``path`` does not end in ``suffix``, or is a folder.
        OSError: if files cannot be written in its folder.
    """
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise ValueError(f"{name} must end in {suffix}, got {path}")
    if path.is_dir():
        raise ValueError(f"{name} must be a file, got the folder {path}")
    open_folder(path.parent)


def describe_file(path: str | os.PathLike[str] | None) -> dict[str, Any] | str | None:
    """Describe a file by path, size and time, for settings. Other text, such as a short name, is returned unchanged."""
    if path is None or not Path(path).is_file():
        return path if path is None else str(path)
    stat = Path(path).stat()
    return {"path": str(Path(path).resolve()), "bytes": stat.st_size, "modified": stat.st_mtime_ns}


def check_settings(
    name: object, former: Mapping[str, Any], now: Mapping[str, Any], remedy: str = "choose another folder"
) -> None:
    """Check that a file or folder was made with the current settings.

    Args:
        name: the file or folder, for the message.
        former, now: JSON values by name; nested mappings are compared value by value.
        remedy: what to do, for the message.

    Raises:
        ValueError: if settings differ; the message has the first three, such as ``source.cfg was 1.5, now 2.0``.
    """
    there, here = (dict(flatten(json.loads(json.dumps(settings)))) for settings in (former, now))
    changes = [
        f"{setting} was {there.get(setting)!r}, now {here.get(setting)!r}"
        for setting in {**there, **here}
        if there.get(setting) != here.get(setting)
    ]
    if changes:
        raise ValueError(f"{name} was made with other settings ({'; '.join(changes[:3])}): {remedy}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``("a.b", 1)`` for ``{"a": {"b": 1}}``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a folder's files to the folder, or check them if they are there.

    Args:
        folder: a folder that exists.
        settings: JSON values by name.

    Raises:
        ValueError: if the folder's files were made with other settings, see :func:`check_settings`.
    """
    path = folder / SETTINGS
    if not path.exists():
        write_json(path, settings)
        return
    try:
        former = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a readable settings file: remove {folder} or choose another folder") from error
    check_settings(folder, former, settings)


class BeingWrittenError(ValueError):
    """Another process is writing to the folder."""


@contextlib.contextmanager
def lock_folder(folder: Path, rank: int) -> Iterator[None]:
    """Hold a folder's lock for ``rank``, so that the same command cannot run twice.

    Raises:
        BeingWrittenError: if another process holds the lock.
    """
    # The system releases a lock on an open file however its process ends. filelock's FileLock would put a marker file
    # in the folder where the file system has no locks, and a killed process would leave it there.
    (folder / PROGRESS).mkdir(exist_ok=True)
    with (folder / PROGRESS / f"rank{rank}.lock").open("ab") as file:
        try:
            free = lock_descriptor(file.fileno(), blocking=False)
        except OSError:  # a file system without locks: two simultaneous runs only waste time
            free = True
        if not free:
            raise BeingWrittenError(f"{folder} is being written by another process")
        _locked.add(file)
        try:
            yield
        finally:
            _locked.discard(file)


_locked: set[BinaryIO] = set()  # the files of this process's locks


def _close_in_child() -> None:
    """In a forked child, which inherits open files: close them, so that a lock ends with the process that took it."""
    while _locked:
        _locked.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def find_rank() -> tuple[int, int]:
    """Return ``RANK`` and ``WORLD_SIZE``, which ``torchrun`` sets; 0 and 1 without it.

    Raises:
        ValueError: if they are not such numbers.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"RANK must be in 0..WORLD_SIZE-1, got RANK={rank!r} and WORLD_SIZE={world!r}")
    return int(rank), int(world)


@dataclass(frozen=True)
class Ranks:
    """One of the processes that compute together.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        device: device of this process.
    """

    rank: int
    size: int
    device: torch.device

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` over all ranks, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def agree(self, name: str, fact: bool) -> None:
        """Raise ``ValueError`` on every rank unless ``fact`` is the same on all ranks."""
        count = int(self.sum(torch.tensor(int(fact), device=self.device)))
        if count not in (0, self.size):
            raise ValueError(f"{name}: true on {count} of {self.size} ranks, which must share their storage")


@contextlib.contextmanager
def join_ranks(device: torch.device) -> Iterator[Ranks]:
    """Connect the ranks that ``torchrun`` started; without it there is one rank.

    Args:
        device: device of a single process. Under ``torchrun`` each rank uses the GPU of its ``LOCAL_RANK``.
    """
    if distributed.is_available() and distributed.is_initialized():  # the caller ends it
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), device)
        return
    rank, size = find_rank()
    if size == 1:
        yield Ranks(rank, size, device)
        return
    if not distributed.is_available():
        raise ValueError(f"WORLD_SIZE must be 1 with a PyTorch built without torch.distributed, got {size}")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, size, device)
    finally:
        # Before pytorch/pytorch#154976 (seen with 2.5.1) a group that ends holds Python's lock while it waits for
        # gloo's threads, which may wait for that lock. A named backend outlives its group and ends without the lock.
        backend = None if device.type == "cuda" else distributed.group.WORLD._get_backend(device)
        distributed.destroy_process_group()
        del backend
