"""What is wrong with a request for images is told here, before any work and before any random state changes."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from varkern.families import Family
from varkern.search import Search, as_search
from varkern.search.base import check_highest_label, check_model
from varkern.spec import ModelSpec, Request, is_int

SAMPLERS = ("philox", "multinomial")


def check_sampler(sampler: str) -> None:
    """Raise ``ValueError`` if there is no such sampler."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(map(repr, SAMPLERS))}, got {sampler!r}")


def check_search(search: Search | None, spec: ModelSpec | None) -> None:
    """Raise ``TypeError`` if ``search`` is none, ``ValueError`` if it does not fit the model's sizes, where known."""
    search = as_search(search)
    if search is not None and spec is not None:
        check_model(search, spec)


def check_request(
    family: Family, model: Any, spec: ModelSpec, request: Request, search: Search | None, sampler: str
) -> None:
    """Raise for anything wrong with a request. Labels on a GPU are looked at once, which waits for the device.

    Texts, of a family without classes, are the family's own to check.

    Raises:
        ValueError, TypeError: naming the argument (in the published method's word and in ``generate``'s, where they
            differ), what came and what is wanted.
    """
    if not is_int(request.batch_size) or request.batch_size < 0:
        raise ValueError(f"batch size (B) must be an int >= 0, got {request.batch_size!r}")
    if not is_int(request.top_k) or request.top_k < 0:
        raise ValueError(f"top_k must be an int >= 0, got {request.top_k!r}")
    if not isinstance(request.top_p, Real) or not 0 <= request.top_p <= 1:
        raise ValueError(f"top_p must be in [0, 1], got {request.top_p!r}")
    check_sampler(sampler)
    check_seed(sampler, request)
    family.check(model, request)
    check_search(search, spec)
    if not family.has_classes:
        return
    check_labels(request)
    bounds = label_range(request, spec)
    if bounds is None:
        return
    low, high = bounds
    if low < 0 or high > spec.num_classes:
        raise ValueError(f"label (label_B, labels) must be in 0..{spec.num_classes}, got {low}..{high}")
    if search is not None:
        check_highest_label(search, high, spec)


def check_labels(request: Request) -> None:
    """Raise for labels of a wrong kind or shape; their values are :func:`label_range`'s."""
    labels = request.labels
    if isinstance(labels, Tensor):
        wanted = f"label (label_B, labels) must be integers of shape [{request.batch_size}]"
        if labels.shape != (request.batch_size,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"{wanted}, got {labels.dtype} of shape {list(labels.shape)}")
    elif labels is not None and not is_int(labels):
        raise TypeError(f"label (label_B, labels) must be an int, a tensor or None, got {type(labels).__name__}")


def label_range(request: Request, spec: ModelSpec) -> tuple[int, int] | None:
    """The lowest and the highest label asked for; None if there are none, or if nothing may wait for the device."""
    labels = request.labels
    if labels is None or request.batch_size == 0:
        return None
    if not isinstance(labels, Tensor):
        label = spec.num_classes if labels < 0 else int(labels)
        return label, label
    if capturing(labels.device):
        return None
    low, high = torch.stack(labels.aminmax()).tolist()
    return low, high


def check_seed(sampler: str, request: Request) -> None:
    """Raise ``ValueError`` or ``TypeError`` if the request's seed does not fit the sampler."""
    seed = request.seed
    if isinstance(seed, Tensor):
        if sampler == "multinomial":
            raise ValueError(
                "seed (g_seed, seeds) must be an int or None for sampler 'multinomial', which has one generator for "
                "the batch, got a tensor"
            )
        if seed.dtype != torch.int64 or seed.shape != (request.batch_size,):
            raise ValueError(
                f"seed (g_seed, seeds) as a tensor must be int64 of shape [{request.batch_size}], "
                f"got {seed.dtype} of shape {list(seed.shape)}"
            )
    elif seed is not None and not is_int(seed):
        raise TypeError(
            f"seed (g_seed, seeds) must be an int, a tensor of image seeds or None, got {type(seed).__name__}"
        )
    elif seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed (g_seed, seeds) must be in [-2**63, 2**64), got {seed}")


def capturing(device: torch.device) -> bool:
    """True inside a CUDA graph's capture, where nothing may wait for the device and labels are the caller's word."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
