"""Measuring a set of images in one pass over their features. Parts of a set can be stored and merged."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from varkern.runs import write_tensors

from .features import Extracted
from .frechet import Moments
from .images import PixelFacts
from .statistics import RunningMoments, RunningScore


@dataclass
class Measured:
    """The statistics of one set of images, measured or read from a file.

    Args:
        moments: moments of the features; None if there are fewer than two images.
        spatial: moments of the spatial features; None if the extractor has none.
        count: number of images; None if unknown.
        score: the Inception score; None if the extractor has no logits.
        features: features ``[N, D]`` float32 of the first images, for precision and recall; None if there are none.
        facts: facts about the pixels; None if they were not collected.
    """

    moments: Moments | None
    spatial: Moments | None
    count: int | None
    score: float | None = None
    features: Tensor | None = None
    facts: PixelFacts | None = None


class Gathering:
    """The moments, the sums of the Inception score and the first images' features, collected batch by batch.

    Memory holds ``3 * D²`` float64 numbers per kind of features and ``keep * D`` float32 numbers.

    Args:
        keep: the features of images 0 to ``keep - 1`` are kept.
    """

    def __init__(self, keep: int = 0):
        self.keep, self.count = keep, 0
        self.moments, self.spatial, self.score = RunningMoments(), RunningMoments(), RunningScore()
        self.kept: dict[int, Tensor] = {}  # number of the first image of a batch: its features [n, D]

    def add(self, extracted: Extracted, start: int) -> None:
        """Add the features of the images ``start``, ``start + 1``, ... of the set."""
        self.count += len(extracted.features)
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
        self.count += other.count
        self.moments.merge(other.moments)
        self.spatial.merge(other.spatial)
        self.score.merge(other.score)
        self.kept |= other.kept

    def summarize(self, facts: PixelFacts | None = None) -> Measured:
        """The statistics of all images so far."""
        kept = [self.kept[start] for start in sorted(self.kept)]
        return Measured(
            self.moments.moments() if self.moments.count > 1 else None,
            self.spatial.moments() if self.spatial.count > 1 else None,
            self.count,
            self.score.score() if self.score.sums else None,
            torch.cat(kept) if kept else None,
            facts,
        )

    def save(self, path: str | os.PathLike, notes: Mapping[str, Any] | None = None) -> None:
        """Write the data and ``notes``, JSON values by name, to one safetensors file, completely or not at all."""
        tensors = {f"kept.{start}": features for start, features in self.kept.items()}
        for name, running in (("moments", self.moments), ("spatial", self.spatial)):
            if running.mean is not None and running.scatter is not None:
                tensors |= {f"{name}.mean": running.mean, f"{name}.scatter": running.scatter}
        for number, (_, total, plogp) in self.score.sums.items():
            tensors |= {f"score.{number}.total": total, f"score.{number}.plogp": plogp}
        counts = {
            "count": self.count,
            "keep": self.keep,
            "moments": self.moments.count,
            "spatial": self.spatial.count,
            "score": {str(number): sums[0] for number, sums in self.score.sums.items()},
        }
        metadata = {"counts": json.dumps(counts), "notes": json.dumps(dict(notes or {}))}
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> tuple[Gathering, dict[str, Any]]:
        """Read a file that :meth:`save` wrote; returns the gathering and its notes."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        counts = json.loads(metadata["counts"])
        gathering = cls(counts["keep"])
        gathering.count = counts["count"]
        for name, running in (("moments", gathering.moments), ("spatial", gathering.spatial)):
            running.count = counts[name]
            running.mean, running.scatter = tensors.get(f"{name}.mean"), tensors.get(f"{name}.scatter")
        gathering.score.sums = {
            int(number): (count, tensors[f"score.{number}.total"], tensors[f"score.{number}.plogp"])
            for number, count in counts["score"].items()
        }
        prefix = "kept."
        gathering.kept = {int(n.removeprefix(prefix)): x for n, x in tensors.items() if n.startswith(prefix)}
        return gathering, json.loads(metadata["notes"])
