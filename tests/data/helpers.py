"""A source of token maps that costs nothing, and processes that are killed while they write."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from varkern.data import Batch, Manifest, write_token_maps

WRITING = os.O_WRONLY | os.O_RDWR
MANY = 150  # kills after which no run comes to an end


def small_manifest(**changes) -> Manifest:
    """50 images of 14 tokens in 8 shards, the last one smaller, of two batches each."""
    fields = {"patch_nums": (1, 2, 3), "vocabulary": 100, "num_classes": 5, "total": 50, "source": {"kind": "test"}}
    return Manifest(**(fields | {"batch_size": 4, "shard_size": 7} | changes))


def tokens_of(number: int, manifest: Manifest) -> np.ndarray:
    """What :func:`source` makes of image ``number``: the corners of the vocabulary first, then anything."""
    drawn = np.random.default_rng(number).integers(0, manifest.vocabulary, manifest.length)
    drawn[:2] = 0, manifest.vocabulary - 1
    return drawn


def source(manifest: Manifest) -> Callable[[Sequence[range]], Iterator[Batch]]:
    def batches(wanted: Sequence[range]) -> Iterator[Batch]:
        for numbers in wanted:
            tokens = torch.from_numpy(np.stack([tokens_of(number, manifest) for number in numbers]))
            yield Batch(tokens, [number % manifest.num_classes for number in numbers])

    return batches


def write(folder: Path, **changes) -> Manifest | None:
    """The dataset of :func:`small_manifest`."""
    manifest = small_manifest(**changes)
    return write_token_maps(folder, manifest, source(manifest))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and below, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fork(work: Callable[[], object], environment: Mapping[str, str] | None = None) -> int:
    """Run ``work`` in a forked child, which leaves with 1 after an error; returns its process id."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ.update(environment or {})
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> bool:
    """Wait for a forked child: True if it came to its end, False if it was killed."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, "the child raised"
    return True


def die_before_change(folder: Path, number: int) -> None:
    """Make this process kill itself right before its ``number``-th change of a file or folder below ``folder``."""
    left = number

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
        changes |= event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & WRITING)
        # Of a tree's removal only the first path is whole.
        if changes and (str(folder) in str(arguments[0]) or event in ("os.remove", "os.rmdir")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_before_changes(work: Callable[[], object], folder: Path, rng: random.Random) -> int:
    """Run ``work`` again and again, each time killed before a random change on disk, until it ends; counts kills."""
    kills = 0
    while True:
        number = rng.randint(1, 14)
        if ended(fork(lambda number=number: (die_before_change(folder, number), work()))):
            return kills
        kills += 1
        assert kills < MANY, "work is lost as fast as it is done"


def at_every_call(event: Callable[[], None]) -> None:
    """Let this thread call ``event`` before every call of a function, also of one that is not written in Python."""
    sys.setprofile(lambda frame, kind, _: event() if kind in ("call", "c_call") else None)


def count_calls(work: Callable[[], object]) -> int:
    """How many functions ``work`` calls. The moment of a kill is such a number, since times differ from run to run."""
    numbers = itertools.count()
    at_every_call(lambda: next(numbers) and None)
    try:
        work()
    finally:
        sys.setprofile(None)
    return next(numbers)


def die_at_call(number: int) -> None:
    """Make this process kill itself at the ``number``-th call of a function."""
    left = itertools.count(1)
    at_every_call(lambda: os.kill(os.getpid(), signal.SIGKILL) if next(left) == number else None)


def kill_at_random_calls(work: Callable[[], object], calls: int, rng: random.Random) -> int:
    """Run ``work`` again and again, each time killed at a random one of its first ``calls`` calls, until it ends."""
    kills = 0
    while True:
        number = rng.randint(1, calls)
        if ended(fork(lambda number=number: (die_at_call(number), work()))):
            return kills
        kills += 1
        assert kills < MANY, "work is lost as fast as it is done"
