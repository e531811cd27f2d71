"""Block resampling of a toy model by enumeration, in float64: all maps, all proposals, all picks.

A toy model has ``l`` independent tokens of ``V`` values, ``marginals[l, V]``; a map is its number among the ``V**l``
maps, the last token counting fastest.
"""

from __future__ import annotations

from itertools import product

import numpy as np

Blocks = tuple[tuple[int, ...], ...]


def all_maps(length: int, values: int) -> list[tuple[int, ...]]:
    return list(product(range(values), repeat=length))


def probabilities(marginals: np.ndarray) -> np.ndarray:
    """Of every map."""
    length, values = marginals.shape
    return np.array([np.prod([marginals[i, v] for i, v in enumerate(x)]) for x in all_maps(length, values)])


def chosen_of(marginals: np.ndarray, weights: np.ndarray, m: int) -> np.ndarray:
    """The distribution of the map that is drawn in proportion to its weight among ``m`` maps of the model."""
    p = probabilities(marginals)
    found = np.zeros_like(p)
    for drawn in product(range(len(p)), repeat=m):
        total = weights[list(drawn)].sum()
        for map_number in drawn:
            found[map_number] += np.prod(p[list(drawn)]) * weights[map_number] / total
    return found


def step(marginals: np.ndarray, weights: np.ndarray, block: tuple[int, ...], proposals: int) -> np.ndarray:
    """``[V**l, V**l]``: the probability that a step at ``block`` turns one map into another.

    The sum over all tuples of proposals, each a value for every token of the block, and over what is drawn of the maps
    that they make and the map itself.
    """
    length, values = marginals.shape
    maps = all_maps(length, values)
    number = {x: i for i, x in enumerate(maps)}
    inside = list(product(range(values), repeat=len(block)))
    chance = [np.prod([marginals[i, v] for i, v in zip(block, y, strict=True)]) for y in inside]
    matrix = np.zeros((len(maps), len(maps)))
    for x in maps:
        made = []
        for y in inside:
            composed = list(x)
            for i, v in zip(block, y, strict=True):
                composed[i] = v
            made.append(number[tuple(composed)])
        for drawn in product(range(len(inside)), repeat=proposals):
            set_of = [number[x], *(made[k] for k in drawn)]
            total = weights[set_of].sum()
            for z in set_of:
                matrix[number[x], z] += np.prod([chance[k] for k in drawn]) * weights[z] / total
    return matrix


def sweep(marginals: np.ndarray, weights: np.ndarray, partitions: list[Blocks], proposals: int) -> np.ndarray:
    """One sweep over all blocks of a partition that is drawn evenly from ``partitions``."""
    total = 0.0
    for blocks in partitions:
        matrix = np.eye(len(weights))
        for block in blocks:
            matrix = matrix @ step(marginals, weights, block, proposals)
        total = total + matrix / len(partitions)
    return total
