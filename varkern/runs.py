"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomically(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to, renamed to it at the end; after an error the former file stays.

    Under ``torchrun`` every process has a temporary path of its own, so that two may write one file at the same time.
    """
    path, rank = Path(path), os.environ.get("RANK", "0")
    unfinished = path.with_name(path.name + (".partial" if rank == "0" else f".{rank}.partial"))
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
