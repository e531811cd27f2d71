"""Pairs of real and generated token maps, and their order. Both depend only on the seed, the epoch and the image.

In each epoch every real image of the training part comes once, in a new random order. Its partner is drawn anew in each
epoch, uniformly among the generated images of its class. The epochs form one endless sequence: batch ``s`` holds its
examples ``s * B`` to ``s * B + B - 1``, so every batch is full.

The published recipe has other epochs, a random share of all pairs that stays the same; see :class:`ProductPart`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from varkern.data import TokenMaps
from varkern.ops.philox import philox
from varkern.prefetching import prefetch

from .permutation import permute

# The last word of the Philox counter: the purpose of a random number.
ORDER, PARTNERS, SPLIT, FIXED_PARTNERS, SHARE, SHARE_ORDER = 16, 17, 18, 19, 20, 21


def random_words(seed: int, count: int, epoch: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw two 32-bit words per place, ``[count]`` int64 each, from Philox with the key ``seed``."""
    places = torch.arange(count)
    low, high, *_ = philox(seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, places & 0xFFFFFFFF, places >> 32, epoch, stream)
    return low.numpy(), high.numpy()


def random_order(seed: int, count: int, epoch: int, stream: int) -> np.ndarray:
    """Draw a permutation of ``0..count-1``."""
    low, high = random_words(seed, count, epoch, stream)
    return np.argsort((high << 31) | (low >> 1), kind="stable")


class Batch(NamedTuple):
    """Pairs of token maps ``[n, L]`` of one class, and their labels ``[n]``, all int64."""

    real: Tensor
    generated: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """Copy to ``device``; for a GPU through pinned memory, without waiting."""
        if device.type == "cuda":
            return Batch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in self))
        return Batch(*(tensor.to(device) for tensor in self))


class Part:
    """A part of the images of two datasets, such as the training part.

    Args:
        real_maps, generated_maps: the datasets.
        real, generated: indices into the datasets, int64; ``generated`` must hold every class of ``real``.
        seed: seed of the orders and the partners.
    """

    def __init__(
        self, real_maps: TokenMaps, generated_maps: TokenMaps, real: np.ndarray, generated: np.ndarray, seed: int
    ):
        self.real_maps, self.generated_maps, self.real, self.seed = real_maps, generated_maps, real, seed
        self.labels = np.asarray(real_maps.labels)[real]
        labels = np.asarray(generated_maps.labels)[generated]
        self.generated = generated[np.argsort(labels, kind="stable")]
        self.counts = np.bincount(labels, minlength=int(self.labels.max(initial=0)) + 1)
        self.starts = np.cumsum(self.counts) - self.counts
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)  # two, because a batch may extend into the next epoch

    def __len__(self) -> int:
        return len(self.real)

    def partners(self, epoch: int, stream: int) -> np.ndarray:
        """Draw a generated image of the same class per real image; indices into that dataset, ``[len]``."""
        low, _ = random_words(self.seed, len(self), epoch, stream)
        return self.generated[self.starts[self.labels] + (low * self.counts[self.labels] >> 32)]

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return random_order(self.seed, len(self), epoch, ORDER), self.partners(epoch, PARTNERS)

    def examples(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the real and the generated images of examples ``first`` to ``stop - 1``, from epoch 0 on."""
        numbers = np.arange(first, stop)
        epochs, places = np.divmod(numbers, len(self))
        real, generated = np.empty_like(numbers), np.empty_like(numbers)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order, partners = self._epoch(int(epoch))
            chosen = order[places[here]]
            real[here], generated[here] = self.real[chosen], partners[chosen]
        return real, generated

    def batches(self, steps: range, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Yield one rank's share of the training batches; the next batch is read in the background.

        Args:
            steps: the steps of the batches; batch ``s`` starts at the example ``s * batch_size``.
            batch_size: pairs per batch over all ranks, a multiple of ``ranks``.
            rank, ranks: number of this process, and of all processes.
        """
        share = batch_size // ranks
        starts = (step * batch_size + rank * share for step in steps)
        return prefetch(lambda first: self._read(*self.examples(first, first + share)), starts)

    def fixed_batches(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Yield every real image once, in the dataset's order, with a partner that never changes.

        Args:
            size: largest number of pairs per batch.
            rank, ranks: number of this process, and of all processes; each takes every ``ranks``-th batch.
        """
        partners = self.partners(0, FIXED_PARTNERS)
        for start in range(rank * size, len(self), ranks * size):
            part = slice(start, start + size)
            yield self._read(self.real[part], partners[part])

    def _read(self, real: np.ndarray, generated: np.ndarray) -> Batch:
        labels = torch.from_numpy(np.asarray(self.real_maps.labels)[real])
        return Batch(self.real_maps.gather(real), self.generated_maps.gather(generated), labels)


class ProductPart(Part):
    """A random share of all pairs of a part's images. Every epoch has the same pairs in another order.

    For ImageNet with a thousand images per class on either side there are 10^9 pairs, so no list of them is made.

    Args:
        real_maps, generated_maps, real, generated, seed: as for :class:`Part`.
        share: share of all pairs, in (0, 1], rounded up to whole pairs. All of them differ.
    """

    def __init__(
        self,
        real_maps: TokenMaps,
        generated_maps: TokenMaps,
        real: np.ndarray,
        generated: np.ndarray,
        seed: int,
        share: float,
    ):
        super().__init__(real_maps, generated_maps, real, generated, seed)
        self.real_by_class = real[np.argsort(self.labels, kind="stable")]
        counts = np.bincount(self.labels, minlength=len(self.counts))
        self.real_starts = np.cumsum(counts) - counts
        self.ends = np.cumsum(counts * self.counts)  # the end of every class in the numbering of all pairs
        self.total = int(self.ends[-1])
        self.count = min(math.ceil(share * self.total), self.total)

    def __len__(self) -> int:
        return self.count

    def find_pairs(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the real and the generated images of the share's pairs ``places``, in 0..len-1."""
        numbers = permute(self.seed, self.total, places, 0, SHARE)
        label = np.searchsorted(self.ends, numbers, side="right")
        before = np.where(label > 0, self.ends[label - 1], 0)
        row, column = np.divmod(numbers - before, self.counts[label])
        return self.real_by_class[self.real_starts[label] + row], self.generated[self.starts[label] + column]

    def examples(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the real and the generated images of some examples; see :meth:`Part.examples`."""
        epochs, places = np.divmod(np.arange(first, stop), len(self))
        for epoch in np.unique(epochs):
            here = epochs == epoch
            places[here] = permute(self.seed, len(self), places[here], int(epoch), SHARE_ORDER)
        return self.find_pairs(places)

    def fixed_batches(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Yield every pair of the share once, in an order that never changes; see :meth:`Part.fixed_batches`."""
        for start in range(rank * size, len(self), ranks * size):
            yield self._read(*self.find_pairs(np.arange(start, min(start + size, len(self)))))


def select_held_out(labels: np.ndarray, share: float, seed: int, stream: int) -> np.ndarray:
    """Select the images for validation, ``[N]`` bool: the share of each class, rounded up, but never the whole class.

    The choice depends only on the labels and the seed.
    """
    order = random_order(seed, len(labels), stream, SPLIT)
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels, minlength=1)
    place = np.empty(len(labels), np.int64)
    place[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = np.minimum(np.ceil(share * counts).astype(np.int64), np.maximum(counts - 1, 0))
    return place < wanted[labels]


class Pairs(NamedTuple):
    """Two datasets, split into a training part and a held-out part for validation."""

    training: Part
    validation: Part
    left_out: int
    """Number of real images without a generated image of their class in the same part."""


def make_pairs(
    real: TokenMaps,
    generated: TokenMaps,
    validation: float,
    seed: int,
    pair_share: float | None = None,
    validation_pairs: float | None = None,
) -> Pairs:
    """Split both datasets by image. Equal labels, ``validation`` and ``seed`` give equal parts.

    Args:
        real, generated: the datasets.
        validation: share of each class's images that is held out.
        seed: seed of the split, the orders and the partners.
        pair_share, validation_pairs: share of all pairs of the training part and of the held-out part. None means that
            every real image has one partner.

    Raises:
        ValueError: if a dataset is empty, the datasets do not fit each other, or no class is in both.
    """
    check_datasets(real, generated)
    parts = []
    real_labels, generated_labels = (np.asarray(maps.labels) for maps in (real, generated))
    masks = [select_held_out(labels, validation, seed, i) for i, labels in enumerate((real_labels, generated_labels))]
    for wanted, share in ((False, pair_share), (True, validation_pairs)):
        real_places, generated_places = (np.flatnonzero(mask == wanted) for mask in masks)
        shared = np.isin(real_labels[real_places], generated_labels[generated_places])
        given = (real, generated, real_places[shared], generated_places, seed)
        parts.append(Part(*given) if share is None else ProductPart(*given, share))
    return Pairs(*parts, left_out=len(real) - sum(len(part.real) for part in parts))


def fingerprint(maps: TokenMaps) -> str:
    """Hash the content of a dataset, by its manifest's checksums."""
    return hashlib.sha256(maps.manifest.to_json().encode()).hexdigest()[:16]


def check_datasets(real: TokenMaps, generated: TokenMaps) -> None:
    """Raise ``ValueError`` if the datasets do not fit each other or give no pairs."""
    for name, maps in (("real", real), ("generated", generated)):
        if not len(maps):
            raise ValueError(f"{name} must hold token maps, got none in {maps.folder}")
    for name in ("patch_nums", "vocabulary", "num_classes"):
        first, second = getattr(real.manifest, name), getattr(generated.manifest, name)
        if first != second:
            raise ValueError(f"real and generated must have the same {name}, got {first} and {second}")
    if not np.isin(real.labels, generated.labels).any():
        first, second = list_classes(real.labels), list_classes(generated.labels)
        raise ValueError(f"real and generated must share a class, got {first} and {second}")


def list_classes(labels: np.ndarray, most: int = 8) -> str:
    """Describe the classes in ``labels``: their number, and the first ``most``."""
    classes = np.unique(labels)
    shown = ", ".join(map(str, classes[:most]))
    return f"{len(classes)} classes ({shown}{', ...' if len(classes) > most else ''})"
