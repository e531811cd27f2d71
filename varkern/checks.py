"""Everything that can be wrong with a request for images, raised before any work and before any random state changes.

Nothing in this file changes a model, a search or a scorer.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varkern.errors import UnsupportedModelError
from varkern.families import Family, recognise
from varkern.families.base import check_caches
from varkern.fingerprints import find_difference
from varkern.literals import GenerateLoop, Loop, Sampler, check_word
from varkern.search import PathSearch, Search, as_search
from varkern.search.base import check_highest_label, check_model
from varkern.spec import ModelSpec, Request, is_int


def check(
    model: Any,
    search: Search | Sequence[Search] | None = None,
    *,
    sampler: Sampler = "philox",
    loop: Loop = "auto",
    **sampling: Any,
) -> ModelSpec | None:
    """Raise what :func:`varkern.patch` or :func:`varkern.generate` would raise, and do nothing else.

    Args:
        model: as ``generate`` takes it.
        search: as ``generate`` takes it.
        sampler: as ``generate`` takes it.
        loop: as ``generate`` takes it.
        sampling: any other keyword arguments of ``generate``, and ``labels`` (default: one image of class 0). Without
            any, only what ``patch`` checks is checked: the model's family, and whether the search fits its sizes.

    Returns:
        The model's sizes; None if they depend on arguments that were not given (the VAE, the schedule).

    Raises:
        UnsupportedModelError: if the model fits no family, or its method lacks an argument that the family's has.
        ValueError, TypeError: naming the argument, what came and what is wanted.

    Example::

        >>> varkern.check(var, varkern.BestOfM(scorer, m=4), top_k=20).num_scales
        5
    """
    check_word("sampler", sampler, Sampler)
    check_word("loop", loop, GenerateLoop if sampling else Loop)
    family, search = recognise(model), as_search(search)
    if not sampling:
        spec = family.spec(model)
        check_search(search, spec)
        return spec
    if family.has_classes and loop != "fused":
        check_loop(family, model)
    request = as_request(family, model, **({"labels": 0, "seeds": 0} | sampling))
    spec = family.spec(model, request)
    check_request(family, model, spec, request, search, sampler)
    return spec


def check_loop(family: Family, model: Any) -> None:
    """Raise ``UnsupportedModelError`` if varkern's loop may give other images than the model's own method."""
    difference = find_difference(model, family, getattr(model, family.method))
    if difference is not None:
        raise UnsupportedModelError(
            f"generate runs varkern's loop, and {difference}: use varkern.patch(model, search) and call the model's "
            f"{family.method}, or pass loop='fused' if both do the same"
        )


def check_method(family: Family, model: Any) -> None:
    """Raise ``UnsupportedModelError`` if the model's method lacks an argument that makes it the family's."""
    taken = inspect.signature(getattr(model, family.method)).parameters
    lacking = [name for name in family.required if name not in taken]
    if lacking:
        raise UnsupportedModelError(
            f"{type(model).__name__} fits {family.name}, but its {family.method} takes no {' and no '.join(lacking)}"
        )


def as_request(
    family: Family,
    model: Any,
    labels: int | Sequence[int] | np.ndarray | Tensor | None,
    *,
    seeds: int | Tensor | None = None,
    batch_size: int | None = None,
    cfg: float | Tensor = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    **options: Any,
) -> Request:
    """The arguments of ``generate``, described in its docstring, as a request.

    Raises:
        UnsupportedModelError: if the model is a text-to-image model.
        ValueError: if the number of images is unclear.
    """
    if not family.has_classes:
        raise UnsupportedModelError(
            f"generate needs a class-conditional model, got {type(model).__name__}, an {family.name} model, which "
            f"takes texts: use varkern.patch(model, search) and call the model's {family.method}"
        )
    if isinstance(labels, Sequence | np.ndarray):
        labels = torch.as_tensor(labels, dtype=None if len(labels) else torch.int64, device="cpu")
    sizes = {len(x) for x in (labels, seeds) if isinstance(x, Tensor) and x.dim()}
    sizes |= set() if batch_size is None else {batch_size}
    if len(sizes) > 1:
        raise ValueError(f"labels, seeds and batch_size must agree on the number of images, got {sorted(sizes)}")
    if not sizes and labels is None:
        raise ValueError("batch_size must be given when labels is None and seeds is not a tensor")
    return Request(sizes.pop() if sizes else 1, labels, seeds, top_k, top_p, {"cfg": cfg, **options})


def check_search(search: Search | None, spec: ModelSpec | None) -> None:
    """Raise ``TypeError`` if ``search`` is none, ``ValueError`` if it does not fit the model's known sizes."""
    search = as_search(search)
    if search is not None and spec is not None:
        check_model(search, spec)


def check_request(
    family: Family, model: Any, spec: ModelSpec, request: Request, search: Search | None, sampler: str
) -> None:
    """Raise for anything wrong with a request. Labels on a GPU are read once, which waits for the device.

    The conditions of a text-to-image family are checked by the family.

    Raises:
        ValueError, TypeError: naming the argument (as the published method and as ``generate`` call it), what came and
            what is wanted.
    """
    if not is_int(request.batch_size) or request.batch_size < 0:
        raise ValueError(f"batch size (B) must be an int >= 0, got {request.batch_size!r}")
    if not is_int(request.top_k) or request.top_k < 0:
        raise ValueError(f"top_k must be an int >= 0, got {request.top_k!r}")
    if not isinstance(request.top_p, Real) or not 0 <= request.top_p <= 1:
        raise ValueError(f"top_p must be in [0, 1], got {request.top_p!r}")
    check_word("sampler", sampler, Sampler)
    check_seed(sampler, request)
    family.check(model, request)
    check_search(search, spec)
    if isinstance(search, PathSearch):
        check_caches(family.caches(model))
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
    """Raise for labels of a wrong type or shape; :func:`check_request` checks their values."""
    labels = request.labels
    if isinstance(labels, Tensor):
        wanted = f"label (label_B, labels) must be integers of shape [{request.batch_size}]"
        if labels.shape != (request.batch_size,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"{wanted}, got {labels.dtype} of shape {list(labels.shape)}")
    elif labels is not None and not is_int(labels):
        raise TypeError(f"label (label_B, labels) must be an int, a tensor or None, got {type(labels).__name__}")


def label_range(request: Request, spec: ModelSpec) -> tuple[int, int] | None:
    """The lowest and the highest label of a request; None if it has none, or if nothing may wait for the device."""
    labels = request.labels
    if labels is None or request.batch_size == 0:
        return None
    assert spec.num_classes is not None, "texts are no labels"
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
    """True while a CUDA graph is captured, when nothing may wait for the device and labels go unchecked."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
