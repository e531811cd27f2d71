"""The rules of a search over paths, as plain as they can be: one image, Python's floats, explicit centres."""

import itertools
import math

import numpy as np


def potentials(rewards, kind):
    """Of one path with rewards so far, the earliest first."""
    if kind == "value" or len(rewards) == 1:
        return rewards[-1]
    return {"maximum": max(rewards), "sum": math.fsum(rewards), "difference": rewards[-1] - rewards[-2]}[kind]


def systematic(weights, count, u):
    """Walk along the weights, with a mark at (i + u) / count of their sum for each i."""
    total, found = math.fsum(weights), []
    for i in range(count):
        mark, path, left = (i + u) / count * total, 0, 0.0
        while left + weights[path] <= mark:
            left, path = left + weights[path], path + 1
        found.append(path)
    return found


def outcomes(weights, count):
    """Every outcome of systematic resampling and its probability, from the values of u at which it changes."""
    total, ends = math.fsum(weights), np.cumsum(weights)
    edges = {0.0, 1.0} | {float(end / total * count % 1.0) for end in ends[:-1]}
    found = {}
    for low, high in itertools.pairwise(sorted(edges)):
        if high - low > 1e-12:
            outcome = tuple(systematic(weights, count, (low + high) / 2))
            found[outcome] = found.get(outcome, 0.0) + high - low
    return found


def inertia(points, labels, count):
    """Sum of squared distances to the means of the clusters."""
    total = 0.0
    for cluster in range(count):
        members = points[[label == cluster for label in labels]]
        if len(members):
            total += ((members - members.mean(0)) ** 2).sum()
    return total


def best_inertia(points, count):
    """Over every way to divide the points."""
    return min(inertia(points, labels, count) for labels in itertools.product(range(count), repeat=len(points)))


def lloyd(points, start, count, iterations):
    """k-means from one start, with centres as points."""
    centres = [points[start]]
    while len(centres) < count:
        centres.append(points[np.argmax([min(((p - c) ** 2).sum() for c in centres) for p in points])])
    for _ in range(iterations + 1):
        distances = np.array([[((p - c) ** 2).sum() for c in centres] for p in points])
        labels = distances.argmin(1)
        centres = [points[labels == k].mean(0) if (labels == k).any() else centres[k] for k in range(count)]
    return labels, distances.min(1).sum()


def cluster(points, count, iterations=20):
    """The kept paths: of each cluster the one nearest to its centre, in the order of the paths."""
    runs = [lloyd(points, start, count, iterations) for start in range(len(points))]
    least = min(found for _, found in runs)
    labels = next(labels for labels, found in runs if found <= least * (1 + 1e-9))
    widest = max(((p - q) ** 2).sum() for p in points for q in points)
    kept, own = [], {}
    for k in range(count):
        members = np.flatnonzero(labels == k)
        if len(members):
            own |= {i: ((points[i] - points[members].mean(0)) ** 2).sum() for i in members}
            kept.append(next(i for i in members if own[i] <= min(own[j] for j in members) + 1e-9 * widest))
    while len(kept) < count:
        left = [i for i in range(len(points)) if i not in kept]
        kept.append(next(i for i in left if own[i] >= max(own[j] for j in left) - 1e-9 * widest))
    return sorted(int(i) for i in kept)
