"""What the loop asks of every kind of model.

A *family* recognises model objects by their structure and opens a *session* for one generation. The session holds
everything that lives from the first scale to the image. Neither depends on searches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from varkern.errors import UnsupportedModelError
from varkern.spec import Logits, ModelSpec, Request

CACHED = ("cached_k", "cached_v")  # the attributes of an attention that hold its KV cache, the batch first


class Draws(Protocol):
    """Where a session's random numbers come from; see :mod:`varkern.draws`."""

    reproduces_upstream: bool

    def smoothed(self, logits: Logits, scale: int, sharpen: float, temperature: float) -> Tensor: ...

    def uniform_tokens(self, scale: int, num_candidates: int, length: int, vocabulary: int) -> Tensor: ...


class Session(Protocol):
    """One generation on one model, scale by scale: ``logits``, ``maps``, ``fuse`` and ``commit``, then ``decode``."""

    @property
    def codebook(self) -> Tensor | None:
        """The codes ``[V, C]``; None for binary codes."""
        ...

    @property
    def code_scale(self) -> float | None:
        """For binary codes: a bit is plus or minus this number."""
        ...

    def logits(self, scale: int) -> Logits:
        """Run the transformer on the scale's input."""
        ...

    def by_position(self, scale: int, tokens: Tensor) -> Tensor:
        """Candidates of :meth:`maps`, one entry per position of the transformer: unchanged, or ``[B, M, l2, d2]``."""
        ...

    def maps(self, scale: int, drawn: Tensor) -> Tensor:
        """Draws ``[B, M, l]`` int64 as token maps: unchanged, as bits ``[B, M, l, d]`` uint8, or the given map."""
        ...

    def fuse(self, scale: int, tokens: Tensor, dtype: torch.dtype | None = None, channels_last: bool = False) -> Tensor:
        """F(.): fused features ``[B, M, C, H, W]`` of candidates ``[B, M, l]`` (or bits); changes nothing."""
        ...

    def commit(self, scale: int, tokens: Tensor, logits: Logits, draws: Draws, hard: bool) -> None:
        """Keep token maps ``[B, l]`` (or bits) and prepare the next scale's input; ``hard``: without any smoothing."""
        ...

    def keep(self, paths: Tensor, finished: bool = False) -> None:
        """Reorder, copy and drop rows of the batch: KV caches, sums of features, conditions and the next input.

        Before the first scale the batch has one row per image, which this copies.

        Args:
            paths: ``[B, n]`` int64: for each of the generation's B images, the rows of the present batch that go on.
                All of them are rows of that image. The new batch has ``B * n`` rows, the paths of an image together.
            finished: True after the last scale, when only :meth:`decode` follows: then nothing else is kept.
        """
        ...

    def image(self, scale: int, rows: slice) -> Tensor:
        """The images ``[N, 3, H, W]`` in [0, 1] of some rows, decoded from the maps up to ``scale``, the last one kept.

        FlexVAR's image of an early scale is smaller than the last one, because each of its maps is an image.
        """
        ...

    def features(self, scale: int) -> Tensor:
        """F(.) of the maps up to ``scale``, the last one kept, ``[N, C, H, W]``: what a scorer sees of them."""
        ...

    def decode(self) -> Any:
        """What the published method returns."""
        ...

    def close(self) -> None:
        """Restore the model's state from before the generation, also after an exception."""
        ...


class Family(Protocol):
    """A kind of model."""

    name: str
    method: str  # the attribute that patching replaces
    arguments: tuple[str, ...]  # the names of the published method's arguments
    required: tuple[str, ...]  # those that the method must have
    has_classes: bool  # labels are classes; False: texts, in the form that the published method takes

    def missing(self, model: object) -> list[str]:
        """What ``model`` lacks to be of this family; empty if it is."""
        ...

    def spec(self, model: Any, request: Request | None = None) -> ModelSpec | Any:  # None only without a request
        """The model's sizes for a request; None without a request, if they depend on it.

        Raises:
            ValueError: if the request's sizes are impossible.
        """
        ...

    def request(self, arguments: Mapping[str, Any]) -> Request:
        """The published method's arguments, by name, as a request."""
        ...

    def check(self, model: Any, request: Request) -> None:
        """Raise ``ValueError`` for options that the model does not support, before any work."""
        ...

    def steps(self, model: Any) -> list[Any]:
        """The functions of the model's parts that the loop of varkern replaces, besides the method."""
        ...

    def device(self, model: Any) -> torch.device: ...

    def caches(self, model: Any) -> list[Any]:
        """The modules that hold the model's KV caches, with a method ``kv_caching(bool)``."""
        ...

    def open(self, model: Any, labels: Any, request: Request, draws: Draws) -> Session:
        """Start a generation for ``labels`` ``[B]``, or for the request's texts."""
        ...

    def repeat(self, labels: Any, count: int) -> Any:
        """The labels of ``count`` paths per image, those of an image together."""
        ...

    def images(self, published: Any) -> Tensor:
        """The published method's return value as images ``[B, 3, H, W]`` in [0, 1]; class-conditional models only."""
        ...

    def generator(self, model: Any, seed: int | Tensor | None) -> torch.Generator | None:
        """The model's generator, seeded as in the published method, or None for PyTorch's default generator."""
        ...


def is_identity(rows: Tensor, batch: int) -> bool:
    """Whether ``rows`` are all rows of the batch in their order. False on a GPU, where reading them would wait."""
    return rows.device.type == "cpu" and torch.equal(rows, torch.arange(batch, device="cpu"))


def check_caches(caches: Iterable[Any]) -> None:
    """Raise ``UnsupportedModelError`` if the rows of a KV cache cannot be kept, because it has unknown attributes."""
    for cache in caches:
        lacking = [name for name in CACHED if not hasattr(cache, name)]
        if lacking and not hasattr(cache, "keep_rows"):
            raise UnsupportedModelError(
                f"a PathSearch needs KV caches with the attributes {' and '.join(CACHED)}, which a "
                f"{type(cache).__name__} of the model does not have"
            )


def in_both_halves(rows: Tensor, batch: int, guided: bool) -> Tensor:
    """Rows of a batch as rows of the transformer, whose batch is doubled where there is guidance."""
    return torch.cat((rows, rows + batch)) if guided else rows


def keep_caches(caches: Iterable[Any], rows: Tensor) -> None:
    """Keep some rows of KV caches. One cache is copied at a time, so that no more than one is held twice."""
    for cache in caches:
        if hasattr(cache, "keep_rows"):
            cache.keep_rows(rows)
            continue
        for name in CACHED:
            held = getattr(cache, name)
            if held is not None:
                setattr(cache, name, held.index_select(0, rows))


def missing_caches(blocks: Any) -> list[str]:
    """What ``model.blocks`` lacks to be a list of modules with ``.attn.kv_caching``."""
    if not isinstance(blocks, Iterable):
        return ["blocks (as a list of modules)"]
    for i, block in enumerate(blocks):
        if not hasattr(getattr(block, "attn", None), "kv_caching"):
            return [f"blocks[{i}].attn.kv_caching"]
    return []


def seeded(model: Any, seed: int | Tensor | None, device: torch.device) -> torch.Generator | None:
    """``model.rng`` with ``seed``; None without one."""
    if seed is None:
        return None
    if model.rng.device != device:  # the model was moved after it was built
        model.rng = torch.Generator(device)
    return model.rng.manual_seed(int(seed))


def check_options(family: Family, request: Request, names: Iterable[str]) -> None:
    """Raise ``ValueError`` for an option that the family's published method does not take."""
    names = tuple(names)
    unknown = set(request.options) - set(names)
    if unknown:
        article = "an" if family.name[0] in "AEIOU" else "a"
        raise ValueError(
            f"{article} {family.name} model has no option {', '.join(map(repr, sorted(unknown)))}: "
            f"it takes {', '.join(names)}"
        )


def check_cfg(cfg: Any, batch_size: int) -> None:
    """Raise ``ValueError`` if ``cfg`` is neither a finite number nor a tensor of one strength, or of one per image."""
    if isinstance(cfg, Tensor):
        fits = is_single(cfg) or cfg.shape == (batch_size, 1, 1)
        came = f"shape {list(cfg.shape)}"
    else:
        fits, came = isinstance(cfg, Real) and math.isfinite(cfg), repr(cfg)
    if not fits:
        raise ValueError(
            f"cfg must be a finite number or a tensor of shape [], [1, 1, 1] or [{batch_size}, 1, 1], got {came}"
        )


def is_single(value: object) -> bool:
    """Whether ``value`` is a tensor of one number that does not change the shape of ``[B, l, V]`` beside it."""
    return isinstance(value, Tensor) and value.numel() == 1 and value.dim() <= 3
