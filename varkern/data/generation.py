"""Token-map datasets of a model's samples, drawn without a search or with one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from varkern.checks import check
from varkern.errors import UnsupportedModelError
from varkern.families import recognise
from varkern.generation import generate
from varkern.ops import image_seeds
from varkern.search import Search, as_search
from varkern.search.base import check_highest_label
from varkern.spec import is_int

from .manifest import Manifest
from .writer import Batch, write_token_maps

DATASET_SEED = 1_000_000
"""The default seed of a dataset; sampling and evaluation use 0 by default. An image's seed is a hash of the dataset's
seed and the image's number, so datasets with different seeds share no image."""


def generate_token_maps(
    folder: str | os.PathLike[str],
    model: Any,
    *,
    per_class: int,
    classes: Sequence[int] | None = None,
    search: Search | Sequence[Search] | None = None,
    seed: int = DATASET_SEED,
    cfg: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    autocast: torch.dtype | None = None,
    batch_size: int = 64,
    shard_size: int = 4096,
    provenance: Mapping[str, Any] | None = None,
    **options: Any,
) -> Manifest | None:
    """Write the token maps of ``per_class`` images of every class.

    Without a search they are the model's own samples, with one candidate per scale, on which a scorer is trained (LSRS,
    appendix A). A scorer on top of another one is trained on samples of a search with the other.

    Image ``n`` has the class ``classes[n % len(classes)]`` and the seed ``image_seeds(seed, total)[n]``. Classes
    alternate, and a smaller dataset with the same batch and shard size equals the first part of a larger one.

    Args:
        folder: the dataset's folder; :func:`.writer.write_token_maps` describes killed runs and ``torchrun``.
        model: a class-conditional model of any family. A search that it is patched with is not used, and it is not
            changed.
        per_class: images per class.
        classes: the classes to draw; None means all classes of the model.
        search: the search of every image; None: none. The manifest records its ``repr``, which must be the same in
            every run and does not identify a scorer: describe scorers in ``provenance``.
        seed: base seed; every image's seed is derived from it. Use another seed than for evaluation.
        cfg, top_k, top_p, options: as for :func:`varkern.generate`; the defaults are VAR's published sampling. The
            manifest does not record options that are modules: describe them in ``provenance``.
        autocast: dtype for ``torch.autocast``; None means no autocast.
        batch_size: images per batch. Another value gives slightly different tokens, because matrix products round
            differently.
        shard_size: images per shard. A killed run makes at most one shard again.
        provenance: further JSON values for the manifest, such as the checkpoints' checksums.

    Returns:
        the finished manifest, or None if other processes still have shards to make.

    Raises:
        ValueError, TypeError, UnsupportedModelError: if an argument is wrong, before any work.
        OSError: if a file cannot be written.
    """
    family = recognise(model)
    if not family.has_classes:
        raise UnsupportedModelError(f"model must be class-conditional, got {family.name}, which takes texts")
    sampling, search = {"cfg": cfg, "top_k": top_k, "top_p": top_p, **options}, as_search(search)
    spec, device = check(model, search, seeds=image_seeds(seed, 1), **sampling), family.device(model)
    classes = check_classes(range(spec.num_classes) if classes is None else classes, spec.num_classes)
    check_highest_label(search, max(classes), spec)
    if not is_int(per_class) or per_class < 1:
        raise ValueError(f"per_class must be an int >= 1, got {per_class!r}")
    total = per_class * len(classes)
    source = {
        "kind": "generated",
        **(provenance or {}),
        "seed": seed,
        "seeds": [0, total],  # places in image_seeds(seed, total)
        "classes": classes,
        "per_class": per_class,
        **({} if search is None else {"search": repr(search)}),
        **{name: value for name, value in sampling.items() if not isinstance(value, nn.Module)},
        "dtype": dtype_name(next(model.parameters()).dtype),
        "autocast": None if autocast is None else dtype_name(autocast),
        "device": device.type,
    }
    manifest = Manifest(spec.sides, spec.vocabulary, spec.num_classes, total, source, batch_size, shard_size)
    seeds, labels = image_seeds(seed, total), torch.tensor(classes)

    def batches(wanted: Sequence[range]) -> Iterator[Batch]:
        for numbers in wanted:
            chosen = labels[torch.arange(numbers.start, numbers.stop) % len(labels)]
            with torch.autocast(device.type, autocast) if autocast is not None else contextlib.nullcontext():
                part = seeds[numbers.start : numbers.stop]
                tokens = generate(model, chosen, search=search, seeds=part, decode=False, **sampling).tokens
            yield Batch(tokens, chosen)

    return write_token_maps(Path(folder), manifest, batches, "generating token maps")


def check_classes(classes: Sequence[int], num_classes: int) -> list[int]:
    """Return ``classes`` as a list.

    Raises:
        ValueError: if it is empty, or a class is unknown or comes twice.
    """
    classes = list(classes)
    if not classes:
        raise ValueError("classes must hold at least one class, got none")
    for label in classes:
        if not is_int(label) or not 0 <= label < num_classes:
            raise ValueError(f"classes must be in 0..{num_classes - 1}, got {label}")
    if len(set(classes)) != len(classes):
        raise ValueError(f"classes must differ, got {next(c for c in classes if classes.count(c) > 1)} twice")
    return classes


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
