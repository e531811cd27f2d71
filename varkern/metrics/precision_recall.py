"""Improved precision and recall: the share of one feature set that lies on the other's manifold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 2048
# A squared distance below this share of the sum of both squared norms counts as 0: it is a rounding error.
ROUNDING = 1e-13


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    """The share of generated images that are near a reference image."""
    recall: float
    """The share of reference images that are near a generated image."""


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3, block: int = BLOCK) -> PrecisionRecall:
    """Precision and recall by k-nearest-neighbour balls.

    The ball around a feature reaches to its k-th nearest neighbour in the same set. Precision is the share of
    generated features inside at least one ball of the reference. Recall is the share of reference features inside at
    least one ball of the generated set. Compare two runs only if their sets have about the same sizes.

    Distances are computed in float64, ``block`` by ``block``, and take less than ``3 * block * (block + D)`` float64
    numbers of memory. The published suite computes them in float16 unless they overflow.

    Args:
        reference: ``[N, D]`` float.
        generated: ``[M, D]`` float, on the same device.
        k: number of neighbours, >= 1; the paper and the published suite use 3.
        block: rows and columns of distances that exist at a time, >= 1.

    Raises:
        ValueError: if an argument has a wrong shape or range, or a set does not have more than ``k`` features.

    Source:
        Kynkäänniemi et al. 2019, eq. 1 and 2.
    """
    for name, features in (("reference", reference), ("generated", generated)):
        if features.dim() != 2:
            raise ValueError(f"{name} must have shape [N, D], got {list(features.shape)}")
        if len(features) <= k:
            raise ValueError(f"{name} must have more than k={k} images, got {len(features)}")
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    if block < 1:
        raise ValueError(f"block must be >= 1, got {block}")
    if reference.shape[1] != generated.shape[1]:
        raise ValueError(
            "reference and generated must have the same number of features, "
            f"got {reference.shape[1]} and {generated.shape[1]}"
        )
    return PrecisionRecall(
        share_inside(reference, radii(reference, k, block), generated, block),
        share_inside(generated, radii(generated, k, block), reference, block),
    )


def radii(features: Tensor, k: int, block: int) -> Tensor:
    """Squared distance from every feature ``[N, D]`` to its k-th nearest neighbour, ``[N]`` float64."""
    found = []
    for start in range(0, len(features), block):
        rows = features[start : start + block]
        nearest = torch.full((len(rows), k), torch.inf, dtype=torch.float64, device=features.device)
        for first, distances in blocks(rows, features, block):
            own = torch.arange(start, start + len(rows), device=features.device).unsqueeze(1)
            columns = torch.arange(first, first + distances.shape[1], device=features.device)
            distances = distances.masked_fill(own == columns, torch.inf)
            nearest = torch.cat((nearest, distances), dim=1).topk(k, dim=1, largest=False).values
        found.append(nearest[:, -1])
    return torch.cat(found)


def share_inside(centres: Tensor, squared_radii: Tensor, features: Tensor, block: int) -> float:
    """The share of ``features`` ``[M, D]`` that lie in a ball around one of ``centres`` ``[N, D]``."""
    inside = 0
    for rows in features.split(block):
        hit = torch.zeros(len(rows), dtype=torch.bool, device=features.device)
        for first, distances in blocks(rows, centres, block):
            hit |= (distances <= squared_radii[first : first + distances.shape[1]]).any(1)
        inside += int(hit.sum())
    return inside / len(features)


def blocks(rows: Tensor, columns: Tensor, block: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the first column of each block and the squared distances, ``[rows, block]`` float64."""
    rows = rows.double()
    norms = rows.square().sum(1, keepdim=True)
    for first in range(0, len(columns), block):
        part = columns[first : first + block].double()
        both = norms + part.square().sum(1)
        distances = torch.addmm(both, rows, part.T, alpha=-2)
        # Equal features must have distance 0: a copy of a centre must lie in its ball even if the radius is 0.
        yield first, distances.where(distances > ROUNDING * both, 0)
