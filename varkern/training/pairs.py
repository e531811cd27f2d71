"""Which real map meets which generated one, and when: all of it a function of (seed, epoch, image), never of history.

An epoch is every real image of the training part once, in an order of its own. Its partner is drawn anew each epoch,
uniformly among the generated images of its class. Epochs follow one another without a gap: batch ``s`` holds the
examples ``s * B`` to ``s * B + B - 1`` of the endless sequence, so no batch is short and none is dropped.

The published recipe has other epochs: a random share of all pairs, the same in every epoch; see :class:`ProductPart`.
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

from .permutation import permuted

# The counter's last word: what a random number of training is for.
ORDER, PARTNERS, SPLIT, FIXED_PARTNERS, SHARE, SHARE_ORDER = 16, 17, 18, 19, 20, 21


def random_words(seed: int, count: int, epoch: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """Two 32-bit words for each of ``count`` places, ``[count]`` int64: Philox, keyed by ``seed``."""
    places = torch.arange(count)
    low, high, *_ = philox(seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, places & 0xFFFFFFFF, places >> 32, epoch, stream)
    return low.numpy(), high.numpy()


def random_order(seed: int, count: int, epoch: int, stream: int) -> np.ndarray:
    """A permutation of ``0..count-1``."""
    low, high = random_words(seed, count, epoch, stream)
    return np.argsort((high << 31) | (low >> 1), kind="stable")


class Batch(NamedTuple):
    """Pairs of one class each: tokens ``[n, L]`` and labels ``[n]``, all int64."""

    real: Tensor
    generated: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """On ``device``; from pinned memory the copy does not wait."""
        if device.type == "cuda":
            return Batch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in self))
        return Batch(*(tensor.to(device) for tensor in self))


class Part:
    """Some images of the two datasets, such as those to train on.

    Args:
        real_maps, generated_maps: the datasets.
        real, generated: places in them, int64, every class of ``real`` among those of ``generated``.
        seed: of the orders and the partners.
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
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)  # two: a batch may reach into the next

    def __len__(self) -> int:
        return len(self.real)

    def partners(self, epoch: int, stream: int) -> np.ndarray:
        """For every real image of the part a generated one of its class: places in that dataset, ``[len]``."""
        low, _ = random_words(self.seed, len(self), epoch, stream)
        return self.generated[self.starts[self.labels] + (low * self.counts[self.labels] >> 32)]

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return random_order(self.seed, len(self), epoch, ORDER), self.partners(epoch, PARTNERS)

    def examples(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Places of the real and of the generated image of examples ``first`` to ``stop - 1``, counted from epoch 0."""
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
        """One rank's share of the batches of a training, each read in the background one step ahead.

        Args:
            steps: whose batches are wanted; batch ``s`` holds the examples ``s * batch_size`` and on.
            batch_size: pairs of all ranks together, a multiple of ``ranks``.
            rank, ranks: this process and how many there are.
        """
        share = batch_size // ranks
        starts = (step * batch_size + rank * share for step in steps)
        return prefetch(lambda first: self._read(*self.examples(first, first + share)), starts)

    def fixed_batches(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Every real image once, in the dataset's order, each with a partner that never changes.

        Args:
            size: pairs a batch, at most.
            rank, ranks: of several processes each takes every ``ranks``-th batch.
        """
        partners = self.partners(0, FIXED_PARTNERS)
        for start in range(rank * size, len(self), ranks * size):
            part = slice(start, start + size)
            yield self._read(self.real[part], partners[part])

    def _read(self, real: np.ndarray, generated: np.ndarray) -> Batch:
        labels = torch.from_numpy(np.asarray(self.real_maps.labels)[real])
        return Batch(self.real_maps.gather(real), self.generated_maps.gather(generated), labels)


class ProductPart(Part):
    """A random share of all pairs that some images make: the same pairs in every epoch, each time in another order.

    With a thousand images per class on either side there are 10^9 pairs, so nothing here holds a list of them.

    Args:
        real_maps, generated_maps, real, generated, seed: as for :class:`Part`.
        share: of all pairs, in (0, 1]; rounded up to whole pairs. No pair is in it twice.
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
        self.ends = np.cumsum(counts * self.counts)  # where every class ends when all pairs are numbered
        self.total = int(self.ends[-1])
        self.count = min(math.ceil(share * self.total), self.total)

    def __len__(self) -> int:
        return self.count

    def chosen(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the real and of the generated image of the share's pairs ``places``, in 0..len-1."""
        numbers = permuted(self.seed, self.total, places, 0, SHARE)
        label = np.searchsorted(self.ends, numbers, side="right")
        before = np.where(label > 0, self.ends[label - 1], 0)
        row, column = np.divmod(numbers - before, self.counts[label])
        return self.real_by_class[self.real_starts[label] + row], self.generated[self.starts[label] + column]

    def examples(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Places of the real and of the generated image of examples ``first`` to ``stop - 1``, counted from epoch 0."""
        epochs, places = np.divmod(np.arange(first, stop), len(self))
        for epoch in np.unique(epochs):
            here = epochs == epoch
            places[here] = permuted(self.seed, len(self), places[here], int(epoch), SHARE_ORDER)
        return self.chosen(places)

    def fixed_batches(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Every pair of the share once, in an order that never changes; see :meth:`Part.fixed_batches`."""
        for start in range(rank * size, len(self), ranks * size):
            yield self._read(*self.chosen(np.arange(start, min(start + size, len(self)))))


def held_out(labels: np.ndarray, share: float, seed: int, stream: int) -> np.ndarray:
    """Which images are kept for validation, ``[N]`` bool: of every class the share, rounded up, but never all.

    The choice depends on the labels and the seed alone.
    """
    order = random_order(seed, len(labels), stream, SPLIT)
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels, minlength=1)
    place = np.empty(len(labels), np.int64)
    place[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = np.minimum(np.ceil(share * counts).astype(np.int64), np.maximum(counts - 1, 0))
    return place < wanted[labels]


class Pairs(NamedTuple):
    """Two datasets, cut into what is trained on and what is held out."""

    training: Part
    validation: Part
    left_out: int
    """Real images of classes of which there is no generated image, or none left after the cut."""


def make_pairs(
    real: TokenMaps,
    generated: TokenMaps,
    validation: float,
    seed: int,
    pair_share: float | None = None,
    validation_pairs: float | None = None,
) -> Pairs:
    """Cut both datasets by image, the same for the same labels, ``validation`` and ``seed``.

    Args:
        real, generated: the datasets.
        validation: share of each class's images that is held out.
        seed: of the cut, the orders and the partners.
        pair_share, validation_pairs: share of all pairs of the training part, and of the part that is held out; None:
            every real image with one partner.

    Raises:
        ValueError: if a dataset is empty, the datasets do not fit each other, or no class is in both.
    """
    check_datasets(real, generated)
    parts = []
    real_labels, generated_labels = (np.asarray(maps.labels) for maps in (real, generated))
    masks = [held_out(labels, validation, seed, i) for i, labels in enumerate((real_labels, generated_labels))]
    for wanted, share in ((False, pair_share), (True, validation_pairs)):
        real_places, generated_places = (np.flatnonzero(mask == wanted) for mask in masks)
        shared = np.isin(real_labels[real_places], generated_labels[generated_places])
        given = (real, generated, real_places[shared], generated_places, seed)
        parts.append(Part(*given) if share is None else ProductPart(*given, share))
    return Pairs(*parts, left_out=len(real) - sum(len(part.real) for part in parts))


def fingerprint(maps: TokenMaps) -> str:
    """A hash of all that is in a dataset, by its manifest's checksums."""
    return hashlib.sha256(maps.manifest.to_json().encode()).hexdigest()[:16]


def check_datasets(real: TokenMaps, generated: TokenMaps) -> None:
    """Raise ``ValueError`` for datasets that give no pairs, saying why."""
    for name, maps in (("real", real), ("generated", generated)):
        if not len(maps):
            raise ValueError(f"{name} must hold token maps, got none in {maps.folder}")
    for name in ("patch_nums", "vocabulary", "num_classes"):
        first, second = getattr(real.manifest, name), getattr(generated.manifest, name)
        if first != second:
            raise ValueError(f"real and generated must have the same {name}, got {first} and {second}")
    if not np.isin(real.labels, generated.labels).any():
        raise ValueError(
            f"real and generated must share a class, got {named(real.labels)} and {named(generated.labels)}"
        )


def named(labels: np.ndarray, most: int = 8) -> str:
    """The classes among ``labels``, the first few by number."""
    classes = np.unique(labels)
    shown = ", ".join(map(str, classes[:most]))
    return f"{len(classes)} classes ({shown}{', ...' if len(classes) > most else ''})"
