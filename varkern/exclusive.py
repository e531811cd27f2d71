"""One generation at a time on one model: a model has one set of KV caches, which belongs to the call that runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from varkern.families import Family

# Which call uses a cache, by the id of the module that holds it. A dictionary's ``setdefault`` is atomic, so this needs
# no lock, and nothing is stored in the model, where copies and pickles would find it.
_running: dict[int, Call] = {}


class Call:
    """One generation that runs."""

    def __init__(self):
        self.thread = threading.get_ident()


@contextlib.contextmanager
def exclusive(family: Family, model: Any) -> Iterator[None]:
    """Hold the KV caches of ``model`` inside a ``with`` block. They are free again afterwards, also on an exception.

    Objects that share their blocks, such as a model and a wrapper around it, count as one model.

    Raises:
        RuntimeError: at once, if the caches are in use: by another thread, or by a generation that the same thread is
            in, as when a scorer calls the model that it judges. The running generation is not disturbed.
    """
    call, keys = Call(), [id(cache) for cache in family.caches(model)]
    try:
        for key in keys:
            other = _running.setdefault(key, call)
            if other is not call:
                raise RuntimeError(busy(model, other))
        yield
    finally:
        for key in keys:
            if _running.get(key) is call:
                del _running[key]


def busy(model: Any, other: Call) -> str:
    """The message for a model that ``other`` uses."""
    name = type(model).__name__
    if other.thread == threading.get_ident():
        return (
            f"{name} was called inside its own generation, as by a scorer, which would overwrite its KV caches: "
            "use another model there, such as copy.deepcopy(model)"
        )
    return (
        f"{name} is generating in another thread, and its KV caches serve one call at a time: "
        "give each thread a model of its own, or let the threads wait for each other"
    )
