"""Shared by the benchmarks: data-sheet rates of devices, and timing of a step."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Step = Callable[[], object]


class Rates(NamedTuple):
    """The largest rates of a device, without sparsity."""

    bandwidth: float  # bytes per second
    half: float  # operations per second of the matrix units, float16 or bfloat16


# From the vendors' data sheets, for SXM or OAM variants.
DEVICES = {
    "A100": Rates(2.04e12, 312e12),
    "H100": Rates(3.35e12, 989e12),
    "H200": Rates(4.8e12, 989e12),
    "B200": Rates(8e12, 2250e12),
    "MI300X": Rates(5.3e12, 1307e12),
}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"


def rates_of(device: torch.device) -> Rates | None:
    """The data-sheet rates of ``device``; None if it is not in the table."""
    name = device_name(device)
    return next((rates for key, rates in DEVICES.items() if key in name), None)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def call_seconds(step: Step, device: torch.device, budget: float = 0.15, least: int = 3, most: int = 50) -> list[float]:
    """Sorted seconds of ``least`` to ``most`` plain calls, launches included, until ``budget`` seconds are used."""
    step()
    times: list[float] = []
    while len(times) < least or (sum(times) < budget and len(times) < most):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)


def graph_seconds(step: Step, device: torch.device, repeats: int = 10, replays: int = 5) -> float:
    """Median device seconds of ``step``, from a CUDA graph of ``repeats`` steps; on a CPU, seconds of a plain call."""
    if device.type != "cuda":
        return call_seconds(step, device, budget=0, least=1)[0]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            step()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / repeats)
    del graph
    torch.cuda.empty_cache()  # otherwise the memory of earlier graphs would count in the next peak
    return statistics.median(times)


def spread(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of sorted times."""
    last = len(times) - 1
    return {"median": statistics.median(times), "p20": times[round(0.2 * last)], "p80": times[round(0.8 * last)]}
