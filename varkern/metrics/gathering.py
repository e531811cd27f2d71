"""Measuring a set of images in one pass over their features. Parts of a set can be stored and merged."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from varkern.runs import write_tensors

from .features import Extracted
from .images import PixelFacts
from .statistics import Measured, RunningMoments, RunningScore


class Gathering:
    """The moments, the sums of the Inception score and the first images' features, collected batch by batch.

    Memory holds ``3 * D²`` float64 numbers per kind of features and ``keep * D`` float32 numbers.

    Args:
        keep: the features of images 0 to ``keep - 1`` are kept.
    """

    def __init__(self, keep: int = 0):
        self.keep = keep
        self.moments, self.spatial, self.score = RunningMoments(), RunningMoments(), RunningScore()
        self.kept: dict[int, Tensor] = {}  # number of the first image of a batch: its features [n, D]

    @property
    def count(self) -> int:
        """Number of images so far."""
        return self.moments.count

    def add(self, extracted: Extracted, start: int) -> None:
        """Add the features of the images ``start``, ``start + 1``, ... of the set."""
        self.moments.add(extracted.features)
        if start < self.keep and len(extracted.features):
            self.kept[start] = extracted.features[: self.keep - start].float()
        if extracted.spatial is not None:
            self.spatial.add(extracted.spatial)
        if extracted.logits is not None:
            self.score.add(extracted.logits.double().softmax(1), start)

    def merge(self, other: Gathering) -> None:
        """Add the data of ``other``, which was collected from other images of the same set.

        Raises:
            ValueError: if the numbers of features differ.
        """
        self.moments.merge(other.moments)
        self.spatial.merge(other.spatial)
        self.score.merge(other.score)
        self.kept |= other.kept

    def summarize(self, extractor: str | None = None, facts: PixelFacts | None = None) -> Measured:
        """The statistics of all images so far."""
        kept = [self.kept[start] for start in sorted(self.kept)]
        return Measured(
            self.moments.moments() if self.moments.count > 1 else None,
            self.spatial.moments() if self.spatial.count > 1 else None,
            self.count,
            extractor,
            self.score.score() if self.score.sums else None,
            torch.cat(kept) if kept else None,
            facts,
        )

    def save(self, path: str | os.PathLike[str], notes: Mapping[str, Any] | None = None) -> None:
        """Write the data and ``notes``, JSON values by name, to one safetensors file, completely or not at all."""
        tensors = {f"kept.{start}": features for start, features in self.kept.items()}
        tensors |= {f"score.{number}": sums for number, sums in self.score.sums.items()}
        for part, running in (("moments", self.moments), ("spatial", self.spatial)):
            if running.count:
                found = {"count": torch.tensor(running.count), "mean": running.mean, "scatter": running.scatter}
                tensors |= {f"{part}.{name}": tensor for name, tensor in found.items()}
        write_tensors(path, tensors, {"keep": str(self.keep), "notes": json.dumps(dict(notes or {}))})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> tuple[Gathering, dict[str, Any]]:
        """Read a file that :meth:`save` wrote; returns the gathering and its notes."""
        parts: dict[str, dict[str, Tensor]] = {"kept": {}, "score": {}, "moments": {}, "spatial": {}}
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            for name in file.keys():
                part, key = name.split(".")
                parts[part][key] = file.get_tensor(name)
        gathering = cls(int(metadata["keep"]))
        gathering.moments, gathering.spatial = RunningMoments(**parts["moments"]), RunningMoments(**parts["spatial"])
        gathering.kept, gathering.score.sums = ({int(n): x for n, x in parts[p].items()} for p in ("kept", "score"))
        return gathering, json.loads(metadata["notes"])
