"""The time of every part of a generation, measured between two events on the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from varkern.draws import PhiloxDraws
from varkern.families.var import VARFeatures, VARSession
from varkern.search import BestOfM

# Each method's class, name and part. The time of a part inside another one is subtracted from the outer part.
METHODS = (
    (VARSession, "logits", "blocks"),
    (VARFeatures, "fuse", "F"),
    (VARSession, "commit", "winner"),
    (VARSession, "decode", "decoder"),
    (PhiloxDraws, "tokens", "sampler"),
    (BestOfM, "choose", "scorer"),
)


class Stopwatch:
    """Times on a device: events on a GPU, which are read at the end; the clock on a CPU."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@contextmanager
def timing_parts(model: Any, device: torch.device) -> Iterator[dict[str, float]]:
    """Give a dictionary that has the seconds of every part when the block ends."""
    watch, spans, inside = Stopwatch(device), [], []
    seconds: dict[str, float] = defaultdict(float)
    kept = [(owner, name, vars(owner)[name]) for owner, name, _ in METHODS]

    def timed(function, part):
        def call(*arguments, **options):
            outer = inside[-1] if inside else None
            inside.append(part)
            start = watch.mark()
            try:
                return function(*arguments, **options)
            finally:
                spans.append((part, outer, start, watch.mark()))
                inside.pop()

        return call

    head = model.get_logits
    for owner, name, part in METHODS:
        setattr(owner, name, timed(vars(owner)[name], part))
    model.get_logits = timed(head, "head")
    try:
        yield seconds
    finally:
        del model.get_logits
        for owner, name, method in kept:
            setattr(owner, name, method)
        for part, outer, start, end in spans:
            taken = watch.between(start, end)
            seconds[part] += taken
            if outer is not None:
                seconds[outer] -= taken
