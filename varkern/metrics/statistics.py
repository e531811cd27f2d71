"""Statistics of features in one pass and bounded memory, and files of statistics."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from varkern.runs import atomically

from .frechet import Moments
from .images import PixelFacts

SPLIT = 5000  # images per split of the Inception score in the published suite


class RunningMoments:
    """Count, mean and scatter of features, added batch by batch, in float64. Memory is D² numbers for any N.

    Batches, and the statistics of several processes, are merged by the pairwise update of Chan, Golub and LeVeque
    (1979). Unlike sums of squares, it loses no precision if means are large.
    """

    def __init__(self, count: int = 0, mean: Tensor | None = None, scatter: Tensor | None = None):
        self.count = int(count)
        self.mean = mean  # [D]
        self.scatter = scatter  # [D, D], the sum of (x - mean)(x - mean)^T

    def add(self, features: Tensor) -> None:
        """Add features ``[N, D]``, any float dtype; N may be 0. The sums are on the device of the first batch.

        Raises:
            ValueError: if the shape is wrong, or D differs from earlier batches.
        """
        if features.dim() != 2:
            raise ValueError(f"features must have shape [N, D], got {list(features.shape)}")
        if len(features):
            features = features.double()
            centred = features - (mean := features.mean(0))
            self.merge(RunningMoments(len(features), mean, centred.T @ centred))

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
        self.sums: dict[int, Tensor] = {}  # per split: number of images, sum of p log p, sum of p [classes]

    def add(self, probabilities: Tensor, start: int) -> None:
        """Add the class probabilities ``[N, classes]`` of the images ``start``, ``start + 1``, ..."""
        for first in range(start - start % self.split, start + len(probabilities), self.split):
            part = probabilities[max(first - start, 0) : first + self.split - start].double()
            plogp = torch.special.xlogy(part, part).sum()
            self._add(first // self.split, torch.cat((plogp.new_tensor([len(part)]), plogp[None], part.sum(0))))

    def merge(self, other: RunningScore) -> None:
        """Add the sums of ``other``, which has other images and the same ``split``."""
        for number, sums in other.sums.items():
            self._add(number, sums)

    def _add(self, number: int, sums: Tensor) -> None:
        self.sums[number] = self.sums[number] + sums if number in self.sums else sums

    def score(self) -> float:
        """The mean over the splits of ``exp(mean KL(p(y|x) || p(y)))``.

        Raises:
            ValueError: if there are no images.
        """
        if not self.sums:
            raise ValueError("the Inception score needs at least 1 image, got 0")
        scores = []
        for sums in self.sums.values():
            plogp, mean = sums[1] / sums[0], sums[2:] / sums[0]
            # The mean over images of sum p log(p / mean) is mean(p log p) - sum(mean log mean).
            scores.append((plogp - torch.special.xlogy(mean, mean).sum()).exp())
        return float(torch.stack(scores).mean())


@dataclass
class Measured:
    """The statistics of one set of images, measured or read from a file.

    Args:
        moments: moments of the features; None if there are fewer than two images.
        spatial: moments of the spatial features; None if the extractor has none.
        count: number of images; None if unknown.
        extractor: name of the feature extractor; None if unknown.
        score: the Inception score; None if the extractor has no logits.
        features: features ``[N, D]`` float32 of the first images, for precision and recall; None if there are none.
        facts: facts about the pixels; None if they were not collected.
    """

    moments: Moments | None
    spatial: Moments | None = None
    count: int | None = None
    extractor: str | None = None
    score: float | None = None
    features: Tensor | None = None
    facts: PixelFacts | None = None


def save_statistics(path: str | os.PathLike[str], measured: Measured) -> None:
    """Write moments in the format of the published suite: ``mu``, ``sigma`` and, for spatial features, ``mu_s``,
    ``sigma_s``. The number of images and the extractor's name are added as ``count`` and ``features``."""
    arrays = {"mu": measured.moments.mean.numpy(), "sigma": measured.moments.covariance.numpy()}
    if measured.spatial is not None:
        arrays |= {"mu_s": measured.spatial.mean.numpy(), "sigma_s": measured.spatial.covariance.numpy()}
    named = {"count": measured.count, "features": measured.extractor}
    arrays |= {name: np.array(value) for name, value in named.items() if value is not None}
    with atomically(path) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, **arrays)


def load_statistics(path: str | os.PathLike[str]) -> Measured:
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
    return Measured(moments, spatial, count, features)


def _moments(path: str | os.PathLike[str], file: np.lib.npyio.NpzFile, mu: str, sigma: str) -> Moments:
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
