"""Whole generations as captured CUDA graphs: every scale, sampling, scoring, choosing and decoding in one replay.

A captured generation is valid for one batch size and one set of settings. Labels, image seeds and the strength of
guidance are written into its tensors before every replay, so they may change. Capturing takes the time of two
generations and each graph keeps the memory of one, so only the few that were used last are kept.
"""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from varkern.checks import capturing, check_request
from varkern.draws import as_image_seeds
from varkern.families import Family
from varkern.generation import as_labels, run
from varkern.ops.backend import chosen_backend
from varkern.ops.fusion import list_tables
from varkern.search import PathSearch, Search
from varkern.spec import ModelSpec, Request

logger = logging.getLogger("varkern")

KEPT = 4  # captured generations that a patch keeps; each holds the memory of one generation

Capture = Callable[[Callable[[], Tensor], torch.device], tuple[Callable[[], None], Tensor]]


def capture_cuda(generation: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Run ``generation`` once to compile its kernels, capture it, and return what replays it and what it writes."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # Weights that autocast casts inside the capture must be cast again at every replay. The graph must not read a cast
    # made before, which it would outlive, and later code must not read a cast made inside the graph.
    torch.clear_autocast_cache()
    try:
        # PyTorch would choose a stream of the GPU that was current at the process's first capture. After a failed
        # capture the stream stays the current one, so the surrounding block restores the former stream.
        with torch.cuda.device(device), torch.cuda.stream(stream):
            generation()
            torch.clear_autocast_cache()
            # In PyTorch's default mode a CUDA call of another thread (a loader that pins memory, NCCL's watchdog) would
            # make the capture fail, and fail too.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                written = generation()
    finally:
        torch.clear_autocast_cache()
        torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay, written


@dataclass
class Captured:
    """One captured generation: its request, the tensors it reads, what replays it, and the images it writes."""

    request: Request
    inputs: dict[str, Tensor]
    replay: Callable[[], None]
    written: Tensor
    tables: list[tuple[Tensor, ...]]  # read by the graph, which does not keep them alive
    search: Search | None  # kept alive, because its identity is part of the key


class GenerationGraphs:
    """The captured generations of one patched model.

    Args:
        family, model, search: as :func:`varkern.generation.run` takes them; the sampler is ``"philox"``, whose seeds
            are a tensor on the device. ``search`` may be replaced before any call.
        capacity: how many captured generations are kept; those used last.
        capture: the function that captures a generation; tests pass another.
    """

    def __init__(
        self, family: Family, model: Any, search: Search | None, capacity: int = KEPT, capture: Capture | None = None
    ):
        self.family, self.model, self.search, self.capacity = family, model, search, capacity
        self.capture = capture or capture_cuda
        self.entries: OrderedDict[tuple, Captured] = OrderedDict()
        self.impossible: str | None = None  # why nothing can be captured, once a warning has said so
        self.copied: torch.cuda.Event | None = None  # the last images have been copied out of the graph's memory

    def run(self, request: Request) -> Tensor:
        """The images of :func:`varkern.generation.run` for ``request``, replayed if it was captured before.

        The first call with new settings runs the generation eagerly, captures it and logs this. If capture is
        impossible, it warns once and runs eagerly from then on. Inside the caller's capture it also runs eagerly.
        """
        spec, device = self.family.spec(self.model, request), self.family.device(self.model)
        if self.impossible is None and (reason := self.hindrance(device)) is not None:
            self.give_up(reason)
        if self.impossible is not None or request.batch_size == 0 or capturing(device):
            return self.eagerly(request)
        check_request(self.family, self.model, spec, request, self.search, "philox")
        inputs = self.inputs(request, spec, device)
        key = self.key(request, inputs, device)
        entry = self.entries.get(key)
        if entry is None:
            try:
                entry = self.captured(inputs, request, device)
            except Exception as error:
                said = str(error).splitlines() or [""]
                self.give_up(
                    f"capturing failed ({type(error).__name__}: {said[0]}); a scorer that waits is a usual cause"
                )
                return self.eagerly(request)
            key = self.key(request, inputs, device)  # again: a search that counts its calls has changed
            self.entries[key] = entry
            while len(self.entries) > self.capacity:
                self.entries.popitem(last=False)
        self.entries.move_to_end(key)
        return self.replayed(entry, inputs, device)

    def replayed(self, entry: Captured, inputs: dict[str, Tensor], device: torch.device) -> Tensor:
        """A copy of the images, made in the current stream; a replay in another stream waits for the copy."""
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if stream is not None and self.copied is not None:
            stream.wait_event(self.copied)
        for name, tensor in inputs.items():
            entry.inputs[name].copy_(tensor)
        entry.replay()
        images = entry.written.clone()
        if stream is not None:
            self.copied = stream.record_event()
        return images

    def eagerly(self, request: Request) -> Tensor:
        return run(self.family, self.model, request, self.search, "philox").images

    def hindrance(self, device: torch.device) -> str | None:
        """Why nothing can be captured here; None if capture may work."""
        if not self.family.has_classes:
            return f"{self.family.name} models are not captured"
        if self.capture is capture_cuda and device.type != "cuda":
            return f"the model is on {device}, and only a GPU has graphs"
        if isinstance(self.search, PathSearch):
            return "a PathSearch is not captured"
        return None

    def give_up(self, reason: str) -> None:
        self.impossible = reason
        self.entries.clear()
        warnings.warn(f"cuda_graph=True: {reason}. Generating without a graph.", RuntimeWarning, stacklevel=4)

    def inputs(self, request: Request, spec: ModelSpec, device: torch.device) -> dict[str, Tensor]:
        """The inputs that may change from call to call, as tensors."""
        inputs = {"seeds": as_image_seeds(request, device)}
        if request.labels is not None:  # else the labels are drawn inside, from the seeds
            inputs["labels"] = as_labels(request, spec, device, None)
        cfg = request.options.get("cfg")
        # Without guidance fewer rows run, so a strength of 0 needs another graph. In float64 the strength of each scale
        # is rounded as a number would be.
        if isinstance(cfg, Tensor) or (isinstance(cfg, Real) and cfg != 0):
            if isinstance(cfg, Tensor):
                strength = cfg.to(device=device, dtype=torch.float64).reshape(-1, 1, 1)
            else:  # filled on the device, because a copy from the host would wait
                strength = torch.full((1, 1, 1), float(cfg), dtype=torch.float64, device=device)
            inputs["cfg"] = strength.expand(request.batch_size, 1, 1)
        return inputs

    def key(self, request: Request, inputs: dict[str, Tensor], device: torch.device) -> tuple:
        """Everything that a captured generation depends on, except its inputs."""
        options = {name: value for name, value in request.options.items() if name not in inputs}
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        named = tuple((name, constant(options[name])) for name in sorted(options))
        return (
            request.batch_size,
            request.top_k,
            request.top_p,
            named,
            tuple(sorted(inputs)),
            autocast,
            chosen_backend(),
            self.model.training,
            tuple(weights_of(self.model, self.search, *request.options.values())),
        )

    def captured(self, inputs: dict[str, Tensor], request: Request, device: torch.device) -> Captured:
        logger.info(
            "capturing a CUDA graph for %d images: this call takes about three times as long, the next ones with these "
            "settings replay it",
            request.batch_size,
        )
        with torch.inference_mode(False):  # calls inside and outside inference mode write to these tensors
            static = {name: tensor.clone() for name, tensor in inputs.items()}
        options = {**request.options, **({"cfg": static["cfg"]} if "cfg" in static else {})}
        fixed = replace(request, labels=static.get("labels"), seed=static["seeds"], options=options)
        replay, written = self.capture(lambda: self.eagerly(fixed), device)
        return Captured(request, static, replay, written, list_tables(), self.search)


def constant(value: Any) -> Any:
    """An option as part of a key: plain values as they are, others by identity; the graph keeps these alive."""
    if isinstance(value, list | tuple):
        return (list, tuple(map(constant, value)))
    if isinstance(value, dict):
        return (dict, tuple((constant(name), constant(entry)) for name, entry in value.items()))
    return value if value is None or isinstance(value, str | Real) else (type(value), id(value))


def weights_of(*objects: Any) -> Iterator[tuple]:
    """Address and version of every weight that a generation reads, and every setting of a search.

    Moved or changed weights need another graph, and so does an assignment such as ``search.m = 8``.
    """
    seen: set[int] = set()
    pending = list(objects)
    while pending:
        found = pending.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, list | tuple):
            pending.extend(found)
            continue
        attributes = getattr(found, "__dict__", {})
        if isinstance(found, nn.Module):
            for tensor in (*found.parameters(), *found.buffers()):
                yield place_of(tensor)
        else:
            for name, value in attributes.items():
                yield name, place_of(value) if isinstance(value, Tensor) else constant(value)
        # A VAE that is kept in a tuple, the scorer of a search, the searches of a combination.
        pending.extend(v for v in attributes.values() if isinstance(v, nn.Module | list | tuple))


def place_of(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
