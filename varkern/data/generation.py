"""A token-map dataset of what a model draws, without any search."""

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
from varkern.spec import is_int

from .manifest import Manifest
from .writer import Batch, write_token_maps

DATASET_SEED = 1_000_000
"""What dataset seeds are made from unless said otherwise; sampling and evaluation begin at 0. Image seeds are a hash
of this and the image's number, so datasets of two seeds share no image."""


def generate_token_maps(
    folder: str | os.PathLike,
    model: Any,
    *,
    per_class: int,
    classes: Sequence[int] | None = None,
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
    """Write the token maps of ``per_class`` images of every class, one candidate a scale (LSRS, appendix A).

    Image ``n`` is of class ``classes[n % len(classes)]`` and has the seed ``image_seeds(seed, total)[n]``, so that the
    beginning of a dataset is balanced, and a smaller one of the same batch and shard size is the beginning of a larger.

    Args:
        folder: the dataset's; see :func:`.writer.write_token_maps` for runs that were killed and for ``torchrun``.
        model: of any family with classes; patched or not, its own distribution is drawn, and it is not changed.
        per_class: images of a class.
        classes: None: all that the model has.
        seed: from which every image's seed is made; it must not be one that is used for evaluation.
        cfg, top_k, top_p, options: as for :func:`varkern.generate`; the defaults are VAR's published sampling. Those
            that are modules are left out of the manifest: name them in ``provenance``.
        autocast: None, or the dtype to generate under ``torch.autocast`` with.
        batch_size: images at a time. It is part of the dataset: matrix products round differently at other sizes.
        shard_size: images a shard, which is what a killed run makes again at most.
        provenance: JSON values that the manifest keeps beside the settings, such as the checkpoints' checksums.

    Returns:
        the finished manifest; None if other processes have still shards to make.

    Raises:
        ValueError, TypeError, OSError, UnsupportedModelError: naming what is wrong, before any work.
    """
    family = recognise(model)
    if not family.has_classes:
        raise UnsupportedModelError(f"token maps are kept of models of classes, {family.name} is one of texts")
    sampling = {"cfg": cfg, "top_k": top_k, "top_p": top_p, **options}
    spec, device = check(model, seeds=image_seeds(seed, 1), **sampling), family.device(model)
    classes = check_classes(range(spec.num_classes) if classes is None else classes, spec.num_classes)
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
        **{name: value for name, value in sampling.items() if not isinstance(value, nn.Module)},
        "dtype": name_of(next(model.parameters()).dtype),
        "autocast": None if autocast is None else name_of(autocast),
        "device": device.type,
    }
    manifest = Manifest(spec.sides, spec.vocabulary, spec.num_classes, total, source, batch_size, shard_size)
    seeds, labels = image_seeds(seed, total), torch.tensor(classes)

    def batches(wanted: Sequence[range]) -> Iterator[Batch]:
        for numbers in wanted:
            chosen = labels[torch.arange(numbers.start, numbers.stop) % len(labels)]
            with torch.autocast(device.type, autocast) if autocast is not None else contextlib.nullcontext():
                part = seeds[numbers.start : numbers.stop]
                tokens = generate(model, chosen, seeds=part, decode=False, **sampling).tokens
            yield Batch(tokens, chosen)

    return write_token_maps(Path(folder), manifest, batches, "generating token maps")


def check_classes(classes: Sequence[int], num_classes: int) -> list[int]:
    """``classes`` as a list.

    Raises:
        ValueError: if there are none, one is unknown, or one comes twice.
    """
    classes = list(classes)
    if not classes:
        raise ValueError("classes must name at least one class")
    for label in classes:
        if not is_int(label) or not 0 <= label < num_classes:
            raise ValueError(f"classes must be in 0..{num_classes - 1}, got {label}")
    if len(set(classes)) != len(classes):
        raise ValueError(f"classes must differ, got {next(c for c in classes if classes.count(c) > 1)} twice")
    return classes


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
