"""Random permutations that are computed place by place, so that drawing from 10^9 pairs needs no list of them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from varkern.ops.philox import philox

ROUNDS = 8
_WORD = 0xFFFFFFFF


def permuted(seed: int, count: int, places: np.ndarray, epoch: int, stream: int) -> np.ndarray:
    """Where a random permutation of ``0..count-1`` sends ``places``.

    The numbers are written as rows and columns of a nearly square table, and a Feistel network mixes these, with Philox
    as its round function. The few that leave ``0..count-1`` go through it again until they are back (cycle walking).

    Args:
        seed: keys the permutation, 64 bits.
        count: below 2^60.
        places: int64 in ``0..count-1``, any shape.
        epoch, stream: further numbers, below 2^32, of which each pair gives another permutation.

    Returns:
        int64 in ``0..count-1``, the shape of ``places``; different places give different numbers.
    """
    found = torch.from_numpy(np.array(places, dtype=np.int64))
    pending = torch.ones(found.shape, dtype=torch.bool)
    while bool(pending.any()):
        mixed = mix(seed, count, found[pending], epoch, stream)
        found[pending] = mixed
        pending[pending.clone()] = mixed >= count
    return found.numpy()


def mix(seed: int, count: int, numbers: Tensor, epoch: int, stream: int) -> Tensor:
    """A permutation of the numbers of the smallest nearly square table that holds ``0..count-1``."""
    rows = math.isqrt(count - 1) + 1
    columns = -(-count // rows)
    row, column = numbers // columns, numbers % columns
    for number in range(0, ROUNDS, 2):
        word, *_ = philox(seed & _WORD, seed >> 32 & _WORD, column, number, epoch, stream)
        row = (row + word) % rows
        word, *_ = philox(seed & _WORD, seed >> 32 & _WORD, row, number + 1, epoch, stream)
        column = (column + word) % columns
    return row * columns + column
