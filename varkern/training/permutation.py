"""Random permutations that are computed per place, without a list of all places, of which there may be 10^9."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from varkern.ops.philox import philox

ROUNDS = 8
_WORD = 0xFFFFFFFF


def permute(seed: int, count: int, places: np.ndarray, epoch: int, stream: int) -> np.ndarray:
    """Apply a random permutation of ``0..count-1`` to ``places``.

    A number is a row and a column of a nearly square table. A Feistel network with Philox as its round function mixes
    rows and columns. The few results outside ``0..count-1`` are mixed again until they are inside (cycle walking).

    Args:
        seed: key of the permutation, 64 bits.
        count: size of the permutation, below 2^60.
        places: int64 in ``0..count-1``, any shape.
        epoch, stream: numbers below 2^32; every pair of them gives another permutation.

    Returns:
        int64 in ``0..count-1``, in the shape of ``places``; different places give different numbers.
    """
    found = torch.from_numpy(np.array(places, dtype=np.int64))
    pending = torch.ones(found.shape, dtype=torch.bool)
    while bool(pending.any()):
        mixed = mix(seed, count, found[pending], epoch, stream)
        found[pending] = mixed
        pending[pending.clone()] = mixed >= count
    return found.numpy()


def mix(seed: int, count: int, numbers: Tensor, epoch: int, stream: int) -> Tensor:
    """Permute the numbers of the smallest nearly square table that holds ``0..count-1``."""
    rows = math.isqrt(count - 1) + 1
    columns = -(-count // rows)
    row, column = numbers // columns, numbers % columns
    for number in range(0, ROUNDS, 2):
        word, *_ = philox(seed & _WORD, seed >> 32 & _WORD, column, number, epoch, stream)
        row = (row + word) % rows
        word, *_ = philox(seed & _WORD, seed >> 32 & _WORD, row, number + 1, epoch, stream)
        column = (column + word) % columns
    return row * columns + column
