"""Density search, written to be read: one image, one candidate at a time, in float64 NumPy.

After the paper's section 3.3 and the released code's order of steps; nothing of varkern is used.
"""

from __future__ import annotations

import numpy as np


def density(samples: np.ndarray, bandwidth: float, metric: str) -> np.ndarray:
    """Sums of Gaussian kernels between samples ``[N, D]`` (eq. 2 without its constant)."""
    sums = np.zeros(len(samples))
    for i, x in enumerate(samples):
        for other in samples:
            distance = np.sqrt(((x - other) ** 2).sum())
            if metric == "cosine":  # samples have unit length: 1 - cos is half the square
                distance = distance**2 / 2
            sums[i] += np.exp(-(distance**2) / (2 * bandwidth**2)) if distance else 1.0
    return sums


def silverman(samples: np.ndarray) -> float:
    """Eq. 3, the standard deviation over N as in the released code."""
    n, d = samples.shape
    return samples.std(axis=0).mean() * (n * (d + 2) / 4) ** (-1 / (d + 4))


def map_densities(codes: np.ndarray, per="position", bandwidth: str | float = "image", metric="euclidean"):
    """Densities ``[B, N]`` of maps of codes ``[B, N, l, C]``."""
    batch, n, length, width = codes.shape
    if per == "map":
        codes, length = codes.reshape(batch, n, 1, length * width), 1
    if metric == "cosine":
        codes = codes / np.sqrt((codes**2).sum(-1, keepdims=True))
    found = np.zeros((batch, n))
    for position in range(length):
        own = [silverman(codes[image, :, position]) for image in range(batch)]
        for image in range(batch):
            h = {"image": own[image], "batch": sum(own) / batch}.get(bandwidth, bandwidth)
            found[image] += density(codes[image, :, position], h, metric)
    return found


def is_low(densities: np.ndarray, alpha: float, threshold: str) -> bool:
    """Whether an image's samples are of low density: the released code's test, or the paper's as printed (eq. 9)."""
    current = densities.mean() * alpha
    return densities.max() < current if threshold == "released" else current < densities.max()


def in_order(densities: np.ndarray, uniform: np.ndarray, strategy: str, alpha: float, threshold: str) -> list[int]:
    """All candidates of an image, those first that are to become representatives first."""
    places = range(len(densities))
    if strategy == "hybrid":
        strategy = "random" if is_low(densities, alpha, threshold) else "top"
    if strategy in ("top", "rank"):
        return sorted(places, key=lambda i: -densities[i])
    if strategy == "small":
        return sorted(places, key=lambda i: densities[i])
    return sorted(places, key=lambda i: -uniform[i])


def representatives(order: list[int], maps: np.ndarray, count: int, min_distance: float) -> list[int]:
    """The first ``count`` of ``order`` that are not closer than ``min_distance`` to an earlier one; ``maps[N, D]``."""
    taken: list[int] = []
    for candidate in order:
        if len(taken) == count:
            break
        distances = [np.sqrt(((maps[candidate] - maps[earlier]) ** 2).sum()) for earlier in taken]
        if all(distance >= min_distance for distance in distances):
            taken.append(candidate)
    return taken


def probabilities(taken: list[int], densities: np.ndarray, strategy: str, count: int) -> np.ndarray:
    """With which probability each candidate ``[N]`` is the final choice; without any density they are equally so."""
    weights = np.zeros(len(densities))
    for place, candidate in enumerate(taken):
        weights[candidate] = min(count, len(densities)) - place if strategy == "rank" else densities[candidate]
    if not weights.any():
        weights[taken] = 1
    return weights / weights.sum()


def draw(probability: np.ndarray, uniform: np.ndarray) -> tuple[int, float]:
    """The candidate that wins by Gumbel's trick, and how far it is ahead of the next."""
    with np.errstate(divide="ignore"):
        noisy = np.log(probability) - np.log(-np.log(uniform + 2.0**-25))
    first = int(noisy.argmax())
    others = np.delete(noisy, first)
    return first, float(noisy[first] - others.max()) if len(others) else np.inf


def choose(densities, order_uniform, choice_uniform, maps, *, strategy, count, alpha, threshold, min_distance):
    """One image's choice: ``(candidate, its lead, representatives)``."""
    order = in_order(densities, order_uniform, strategy, alpha, threshold)
    taken = representatives(order, maps, count, min_distance)
    return *draw(probabilities(taken, densities, strategy, count), choice_uniform), taken
