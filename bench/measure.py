"""Shared by the benchmarks: data-sheet rates of devices, timing of a step, and tables that are printed row by row."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Step = Callable[[], object]
TINY = os.environ.get("VARKERN_BENCH_TINY", "0") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIDES = (1, 2) if TINY else (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # VAR at 256 px
BATCH = 2 if TINY else 24  # images, as in LSRS, Fig. 6


class Rates(NamedTuple):
    """The largest rates of a device, without sparsity."""

    bandwidth: float  # bytes per second
    half: float  # operations per second of the matrix units, float16 or bfloat16
    instructions: float = math.nan  # float32 instructions per second: lanes times the boost clock


# From the vendors' data sheets, for SXM or OAM variants.
DEVICES = {
    "A100": Rates(2.04e12, 312e12, 9.75e12),
    "H100": Rates(3.35e12, 989e12, 33.5e12),
    "H200": Rates(4.8e12, 989e12, 33.5e12),
    "B200": Rates(8e12, 2250e12, 37e12),
    "MI300X": Rates(5.3e12, 1307e12),
}
UNKNOWN = Rates(math.nan, math.nan)


def device_name(device: torch.device = DEVICE) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"


def rates_of(name: str) -> Rates | None:
    """The data-sheet rates of the device with this name; None if it is not in the table."""
    return next((rates for key, rates in DEVICES.items() if key in name), None)


RATES = rates_of(device_name()) or UNKNOWN


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def call_seconds(step: Step, budget: float = 0.2, least: int = 3, most: int = 50) -> float:
    """Median seconds of ``least`` to ``most`` plain calls, launches included, until ``budget`` seconds are used."""
    step()
    times: list[float] = []
    while len(times) < (1 if TINY else least) or (sum(times) < budget and len(times) < most and not TINY):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def graph_seconds(step: Step) -> float:
    """Median device seconds of ``step``, replayed in a CUDA graph; on a CPU, seconds of one plain call."""
    if DEVICE.type != "cuda":
        return call_seconds(step, 0, 1)
    from triton.testing import do_bench_cudagraph

    synchronize()
    return do_bench_cudagraph(step, return_mode="median") / 1e3


def peak_bytes(step: Step) -> float:
    """Peak memory of a call, without the memory that was in use before; NaN without a GPU."""
    if DEVICE.type != "cuda":
        return math.nan
    step()
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


class Table:
    """Prints rows as they come; a row with other columns than the one before gets a head.

    Cells are texts or numbers; the names of the columns hold the units.
    """

    def __init__(self) -> None:
        self.names: list[str] = []

    def add(self, row: Mapping[str, str | float]) -> None:
        if list(row) != self.names:
            self.names = list(row)
            print("\n" + " | ".join(f"{name:>10}" for name in row))
        cells = [value if isinstance(value, str) else format_number(value) for value in row.values()]
        print(" | ".join(f"{cell:>{max(10, len(name))}}" for name, cell in zip(row, cells, strict=True)), flush=True)


def format_number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def bar(text: str, came: float, wanted: float, at_most: bool = True) -> None:
    """Print a bar, and whether it was met."""
    met = "met" if (came <= wanted if at_most else came >= wanted) else "NOT MET"
    print(f"{text}: {format_number(came)}, {'at most' if at_most else 'at least'} {wanted:g}: {met}")
