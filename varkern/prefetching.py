"""Reading ahead: what comes next is read by threads while the caller works on what it has."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def prefetch(
    read: Callable[[Item], Result], items: Iterable[Item], workers: int = 1, ahead: int = 1
) -> Iterator[Result]:
    """``map(read, items)``, in that order, with the reading done by threads.

    Threads, and not the processes of PyTorch's ``DataLoader``: reading files and decoding images let go of Python's
    lock, an error arrives as it was raised, and no process is forked beside a GPU's threads.

    Args:
        read: called by ``workers`` threads at once.
        workers: threads.
        ahead: items that are read, or waited for, beyond the one that is given.

    Raises:
        Exception: what ``read`` raised, in place of the item's result.
    """
    pool, waiting, rest = ThreadPoolExecutor(workers), deque(), iter(items)
    try:
        while True:
            waiting.extend(pool.submit(read, item) for item in islice(rest, ahead + 1 - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
