"""Whole generations as captured CUDA graphs: every scale, sampling, scoring, choosing and decoding in one replay.

A captured generation holds for one batch size and one set of settings; labels, image seeds and the strength of guidance
are written into its own tensors before every replay, so these change freely. Capturing takes two generations' time and
the graph keeps a generation's memory, so only the latest few are kept.
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

from varkern.checks import check_request
from varkern.draws import as_image_seeds
from varkern.families import Family
from varkern.generate import Generation, as_labels, run
from varkern.ops.backend import chosen_backend
from varkern.search import Search
from varkern.spec import ModelSpec, Request

logger = logging.getLogger("varkern")

KEPT = 4  # captured generations a patch keeps; each holds the memory of one generation

Capture = Callable[[Callable[[], Generation], torch.device], tuple[Callable[[], None], Generation]]


def capture_cuda(generation: Callable[[], Generation], device: torch.device) -> tuple[Callable[[], None], Generation]:
    """Run ``generation`` once to compile its kernels, capture it, and return what replays it and what it writes."""
    # Weights that autocast casts inside the capture must be cast again at every replay, and neither may a cast from
    # before be read by the graph, which would outlive it, nor one from the graph by what the user runs next.
    torch.clear_autocast_cache()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        generation()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.clear_autocast_cache()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph):
            written = generation()
    finally:
        torch.clear_autocast_cache()
    return graph.replay, written


@dataclass
class Captured:
    """One captured generation: the request it answers, the tensors it reads, what replays it, what it writes."""

    request: Request
    inputs: dict[str, Tensor]
    replay: Callable[[], None]
    written: Generation


class GenerationGraphs:
    """The captured generations of one patched model.

    Args:
        family, model, search: as :func:`varkern.generate.run` takes them; the sampler is ``"philox"``, whose seeds are
            a tensor on the device.
        capacity: how many captured generations are kept, the latest used ones.
        capture: what captures a generation; tests give another.
    """

    def __init__(
        self, family: Family, model: Any, search: Search | None, capacity: int = KEPT, capture: Capture | None = None
    ):
        self.family, self.model, self.search, self.capacity = family, model, search, capacity
        self.capture = capture or capture_cuda
        self.entries: OrderedDict[tuple, Captured] = OrderedDict()
        self.impossible: str | None = None  # why, once it was found and said

    def run(self, request: Request) -> Generation:
        """What :func:`varkern.generate.run` returns for ``request``, replayed where it was captured before.

        The first call with new settings runs the generation eagerly, captures it and says so. Where capture is
        impossible it warns once and runs eagerly from then on.
        """
        spec, device = self.family.spec(self.model, request), self.family.device(self.model)
        if self.impossible is None and (reason := self.hindrance(device)) is not None:
            self.give_up(reason)
        if self.impossible is not None or request.batch_size == 0:
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
            self.entries[key] = entry
            while len(self.entries) > self.capacity:
                self.entries.popitem(last=False)
        self.entries.move_to_end(key)
        for name, tensor in inputs.items():
            entry.inputs[name].copy_(tensor)
        entry.replay()
        return copied(entry.written)

    def eagerly(self, request: Request) -> Generation:
        return run(self.family, self.model, request, self.search, "philox")

    def hindrance(self, device: torch.device) -> str | None:
        """Why nothing can be captured here, if so."""
        if not self.family.has_classes:
            return f"{self.family.name} models are not captured"
        if self.capture is capture_cuda and device.type != "cuda":
            return f"the model is on {device}, and only a GPU has graphs"
        return None

    def give_up(self, reason: str) -> None:
        self.impossible = reason
        self.entries.clear()
        warnings.warn(f"cuda_graph=True: {reason}. Generating without a graph.", RuntimeWarning, stacklevel=4)

    def inputs(self, request: Request, spec: ModelSpec, device: torch.device) -> dict[str, Tensor]:
        """What may change from call to call, as tensors."""
        inputs = {"seeds": as_image_seeds(request, device)}
        if request.labels is not None:  # else the labels are drawn inside, from the seeds
            inputs["labels"] = as_labels(request, spec, device, None)
        cfg = request.options.get("cfg")
        # Without guidance fewer rows run, so that a strength of 0 is another graph and not another input. In float64
        # every scale's strength rounds as it does when it is a number.
        if isinstance(cfg, Tensor) or (isinstance(cfg, Real) and cfg != 0):
            strength = torch.as_tensor(cfg, dtype=torch.float64, device=device)
            inputs["cfg"] = strength.reshape(-1, 1, 1).expand(request.batch_size, 1, 1)
        return inputs

    def key(self, request: Request, inputs: dict[str, Tensor], device: torch.device) -> tuple:
        """All that a captured generation depends on, beside its inputs."""
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
        logger.warning(
            "capturing a CUDA graph for %d images: this call takes about three times as long, the next ones with these "
            "settings replay it",
            request.batch_size,
        )
        with torch.inference_mode(False):  # so that calls in and out of inference mode may write to them
            static = {name: tensor.clone() for name, tensor in inputs.items()}
        options = {**request.options, **({"cfg": static["cfg"]} if "cfg" in static else {})}
        fixed = replace(request, labels=static.get("labels"), seed=static["seeds"], options=options)
        replay, written = self.capture(lambda: self.eagerly(fixed), device)
        return Captured(request, static, replay, written)


def constant(value: Any) -> Any:
    """An option as part of a key: plain values as they are, others by identity, while the graph keeps them alive."""
    if isinstance(value, list | tuple):
        return (list, tuple(map(constant, value)))
    return value if value is None or isinstance(value, str | Real) else (type(value), id(value))


def weights_of(*objects: Any) -> Iterator[tuple[int, int]]:
    """Place and version of every weight that a generation reads: moved or changed weights need another graph."""
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
        if isinstance(found, nn.Module):
            for tensor in (*found.parameters(), *found.buffers()):
                yield tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
        # A VAE kept in a tuple beside the submodules, a search's scorer, a combination's searches.
        pending.extend(v for v in getattr(found, "__dict__", {}).values() if isinstance(v, nn.Module | list | tuple))


def copied(written: Generation) -> Generation:
    """A generation that later replays do not overwrite."""

    def copy(value):
        if isinstance(value, Tensor):
            return value.clone()
        return [copy(part) for part in value] if isinstance(value, list) else value

    return Generation(*map(copy, written))
