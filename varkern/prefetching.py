"""Reading ahead: threads read the next items while the caller works on the current one."""

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
    """Yield ``read(item)`` for each item, in order; threads read ahead.

    It uses threads instead of the processes of PyTorch's ``DataLoader``. Reading files and decoding images release the
    GIL, errors keep their type, and no process is forked while GPU threads run.

    Args:
        read: called by up to ``workers`` threads at the same time.
        items: the items to read.
        workers: number of threads.
        ahead: number of items to read beyond the current one.

    Raises:
        Exception: the error of ``read``, when its item is reached.
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
