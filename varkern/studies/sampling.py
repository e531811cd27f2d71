"""Sampling images into a folder, as ``varkern sample`` does.

An image depends only on the settings and its number: its seed is entry ``number`` of ``image_seeds(seed, total)``.
Therefore a killed run continues where it stopped, and the batch size changes no image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from varkern.checks import check
from varkern.extras import require_matplotlib
from varkern.families import recognise
from varkern.generation import generate
from varkern.metrics.arrays import write_array
from varkern.metrics.evaluate import PUBLISHED_IMAGES
from varkern.metrics.images import SHEET, ImageFiles, PixelFacts
from varkern.ops import image_seeds
from varkern.progress import progress_bar
from varkern.search import Search

from .pictures import contact_sheet, save_png, to_pixels

SHEET_IMAGES = 200  # the most images on a contact sheet


@dataclass(frozen=True)
class Order:
    """What to sample.

    Args:
        labels: the class of every image, in the order of their numbers.
        seed: base seed; every image gets its own seed derived from it.
        sampler: ``"philox"`` or ``"multinomial"``. The latter has one generator per batch: the batch size changes
            images then, and a run that continues repeats whole batches.
        options: further arguments of :func:`varkern.generate`, such as ``cfg`` and ``top_k``.
        autocast: dtype of ``torch.autocast`` during generation; None: no autocast.
    """

    labels: Sequence[int]
    seed: int = 0
    sampler: str = "philox"
    options: dict[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None


def image_path(folder: Path, number: int, label: int, seed: int) -> Path:
    """The path of image ``number`` in a folder."""
    return folder / f"{number:06d}-class{label:04d}-seed{seed}.png"


def check_order(model: Any, search: Search | None, order: Order, batch_size: int) -> None:
    """Check an order before any work.

    Raises:
        ImportError, ValueError, TypeError, UnsupportedModelError: if something is missing or out of its range.
    """
    require_matplotlib("plots")  # pillow is one of its requirements
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if not order.labels:
        raise ValueError("classes must have at least one class, got none")
    seeds = image_seeds(order.seed, 1) if order.sampler == "philox" else 0
    spec = check(model, search, labels=order.labels[:1], seeds=seeds, sampler=order.sampler, **order.options)
    for label in order.labels:
        if not 0 <= label < spec.num_classes:
            raise ValueError(f"classes must be in 0..{spec.num_classes - 1}, got {label}")


def fill(folder: Path, model: Any, search: Search | None, order: Order, batch_size: int) -> list[Path]:
    """Generate the images of ``order`` that are missing in ``folder``, with a progress bar.

    Returns:
        the paths of all images, in the order of their numbers.
    """
    labels, seeds = torch.tensor(order.labels), image_seeds(order.seed, len(order.labels))
    paths = [image_path(folder, number, label, order.seed) for number, label in enumerate(order.labels)]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    with progress_bar() as progress:
        task = progress.add_task("sampling", total=len(paths), completed=len(paths) - len(missing), note="")
        for batch in batches(missing, len(paths), batch_size, whole=order.sampler != "philox"):
            with autocasting(model, order.autocast):
                images = generate(
                    model,
                    labels[batch],
                    search=search,
                    seeds=seeds[batch] if order.sampler == "philox" else int(seeds[batch[0]]),
                    sampler=order.sampler,
                    **order.options,
                ).images
            for number, pixels in zip(batch, to_pixels(images), strict=True):
                if not paths[number].exists():
                    save_png(pixels, paths[number])
                    progress.advance(task)
    return paths


def batches(missing: Sequence[int], total: int, batch_size: int, whole: bool) -> Iterator[list[int]]:
    """The missing numbers in batches; ``whole``: the complete batches that contain a missing number."""
    if not whole:
        for start in range(0, len(missing), batch_size):
            yield list(missing[start : start + batch_size])
        return
    for start in sorted({number // batch_size * batch_size for number in missing}):
        yield list(range(start, min(start + batch_size, total)))


def autocasting(model: Any, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(recognise(model).device(model).type, dtype)


def write_sheet(folder: Path, paths: Sequence[Path], order: Order, per_class: int) -> Path:
    """Write the contact sheet of the first :data:`SHEET_IMAGES` images, and return its path."""
    shown = list(paths[:SHEET_IMAGES])
    captions = [f"{label}" if per_class == 1 else f"{label} · {n % per_class}" for n, label in enumerate(order.labels)]
    columns = per_class if 1 < per_class <= 16 else 10
    save_png(contact_sheet(shown, captions[: len(shown)], columns), folder / SHEET)
    return folder / SHEET


def pack(paths: Sequence[Path], out: Path, batch_size: int = 64) -> list[str]:
    """Write finished images, in the order of their numbers, to one ``.npz`` for the published evaluation suite.

    The images are read back from their files.

    Args:
        paths: the paths that :func:`fill` returned.
        out: the ``.npz`` file. An existing file is replaced when the new one is complete.
        batch_size: number of images in memory.

    Returns:
        warnings, each with what is wrong with the images and its consequence.
    """
    images, facts = ImageFiles(paths), PixelFacts()
    with progress_bar() as progress:
        task = progress.add_task("packing", total=len(images), note="")

        def seen() -> Iterator[torch.Tensor]:
            for batch in images.batches(batch_size):
                facts.add(batch)
                yield batch
                progress.advance(task, len(batch))

        write_array(out, len(images), images.size, seen())
    warnings = facts.warnings(images)
    if len(images) < PUBLISHED_IMAGES:
        warnings.append(
            f"{out} has {len(images)} images: published figures use {PUBLISHED_IMAGES:,} (50 per class), and FID is "
            "biased upwards with fewer"
        )
    return warnings
