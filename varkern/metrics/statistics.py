"""Statistics of features in one pass and bounded memory, and files of statistics."""

from __future__ import annotations

import os
import zipfile
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from varkern.runs import atomically

from .frechet import Moments

SPLIT = 5000  # images per split of the Inception score in the published suite


class RunningMoments:
    """Count, mean and scatter of features, added batch by batch, in float64. Memory is D² numbers for any N.

    Batches, and the statistics of several processes, are merged by the pairwise update of Chan, Golub and LeVeque
    (1979). Unlike sums of squares, it loses no precision if means are large.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None  # [D]
        self.scatter: Tensor | None = None  # [D, D], the sum of (x - mean)(x - mean)^T

    def add(self, features: Tensor) -> None:
        """Add features ``[N, D]``, any float dtype; N may be 0. The sums are on the device of the first batch.

        Raises:
            ValueError: if the shape is wrong, or D differs from earlier batches.
        """
        if features.dim() != 2:
            raise ValueError(f"features must have shape [N, D], got {list(features.shape)}")
        part = RunningMoments()
        part.count = len(features)
        if part.count:
            features = features.double()
            part.mean = features.mean(0)
            centred = features - part.mean
            part.scatter = centred.T @ centred
            self.merge(part)

    def merge(self, other: RunningMoments) -> None:
        """Add the statistics of ``other``.

        Raises:
            ValueError: if the numbers of features differ.
        """
        if other.mean is None or other.scatter is None:
            return
        if self.mean is None or self.scatter is None:
            self.count, self.mean, self.scatter = other.count, other.mean.clone(), other.scatter.clone()
            return
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"features must be {len(self.mean)} per image as before, got {len(other.mean)}")
        difference = other.mean.to(self.mean.device) - self.mean
        total = self.count + other.count
        self.scatter += other.scatter.to(self.scatter.device)
        self.scatter.addr_(difference, difference, alpha=self.count * other.count / total)
        self.mean += difference * (other.count / total)
        self.count = total

    def moments(self) -> Moments:
        """Mean and unbiased covariance of all features so far, on the CPU.

        Raises:
            ValueError: if there are fewer than two images.
        """
        if self.mean is None or self.scatter is None or self.count < 2:
            raise ValueError(f"moments need at least 2 images, got {self.count}")
        return Moments(self.mean.cpu(), (self.scatter / (self.count - 1)).cpu())


class RunningScore:
    """The Inception score in one pass, from the sums of p and of p log p per split.

    The published suite computes the score of each 5,000 consecutive images (a split) and averages these scores. An
    image's split depends only on its number, so parts made by several processes merge into the same splits.
    """

    def __init__(self, split: int = SPLIT):
        self.split = split
        self.sums: dict[int, tuple[int, Tensor, Tensor]] = {}  # per split: images, sum of p [classes], sum of p log p

    def add(self, probabilities: Tensor, start: int) -> None:
        """Add the class probabilities ``[N, classes]`` of the images ``start``, ``start + 1``, ..."""
        for first in range(start - start % self.split, start + len(probabilities), self.split):
            part = probabilities[max(first - start, 0) : first + self.split - start].double()
            self._add(first // self.split, (len(part), part.sum(0), torch.special.xlogy(part, part).sum()))

    def merge(self, other: RunningScore) -> None:
        """Add the sums of ``other``, which has other images and the same ``split``."""
        for number, sums in other.sums.items():
            self._add(number, sums)

    def _add(self, number: int, sums: tuple[int, Tensor, Tensor]) -> None:
        if number in self.sums:
            sums = tuple(a + b for a, b in zip(self.sums[number], sums, strict=True))  # type: ignore[assignment]
        self.sums[number] = sums

    def score(self) -> float:
        """The mean over the splits of ``exp(mean KL(p(y|x) || p(y)))``.

        Raises:
            ValueError: if there are no images.
        """
        if not self.sums:
            raise ValueError("the Inception score needs at least 1 image, got 0")
        scores = []
        for count, total, plogp in self.sums.values():
            mean = total / count
            # The mean over images of sum p log(p / mean) is mean(p log p) - sum(mean log mean).
            scores.append((plogp / count - torch.special.xlogy(mean, mean).sum()).exp())
        return float(torch.stack(scores).mean())


class StoredStatistics(NamedTuple):
    """The contents of a statistics file; ``count`` and ``features`` are None in files of other programs."""

    moments: Moments
    spatial: Moments | None
    count: int | None
    features: str | None


def save_statistics(path: str | os.PathLike, stored: StoredStatistics) -> None:
    """Write statistics in the format of the published suite: ``mu``, ``sigma`` and, for spatial features, ``mu_s``,
    ``sigma_s``. The number of images and the extractor's name are added as ``count`` and ``features``."""
    arrays = {"mu": stored.moments.mean.numpy(), "sigma": stored.moments.covariance.numpy()}
    if stored.spatial is not None:
        arrays |= {"mu_s": stored.spatial.mean.numpy(), "sigma_s": stored.spatial.covariance.numpy()}
    if stored.count is not None:
        arrays["count"] = np.array(stored.count)
    if stored.features is not None:
        arrays["features"] = np.array(stored.features)
    with atomically(path) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, **arrays)


def load_statistics(path: str | os.PathLike) -> StoredStatistics:
    """Read a statistics file of :func:`save_statistics` or the published suite. Nothing is unpickled.

    Raises:
        ValueError: if the file has another format, or its means and covariances are not finite or do not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if "mu" not in file or "sigma" not in file:
                raise ValueError(f"{path} must have the statistics mu and sigma, got {', '.join(file.files)}")
            moments = _moments(path, file, "mu", "sigma")
            spatial = _moments(path, file, "mu_s", "sigma_s") if "mu_s" in file and "sigma_s" in file else None
            count = int(file["count"]) if "count" in file else None
            features = str(file["features"]) if "features" in file else None
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged or not an .npz file: {error}") from error
    return StoredStatistics(moments, spatial, count, features)


def _moments(path: str | os.PathLike, file: np.lib.npyio.NpzFile, mu: str, sigma: str) -> Moments:
    try:
        mean, covariance = file[mu], file[sigma]
    except ValueError as error:  # numpy refuses to unpickle
        raise ValueError(f"{path}: {mu} and {sigma} must be plain numbers: {error}") from error
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise ValueError(
            f"{path}: {mu} must have shape [D] and {sigma} [D, D], got {list(mean.shape)} and {list(covariance.shape)}"
        )
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise ValueError(f"{path}: {mu} and {sigma} must be floats, got {mean.dtype} and {covariance.dtype}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path}: {mu} and {sigma} must be finite")
    return Moments(torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64)))
