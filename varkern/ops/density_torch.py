"""The plain PyTorch form of ``varkern.ops.density``. It works on blocks of rows, without N x N tensors for large N.

A ``Samples`` object gives the coordinates in pieces, ``[G, N, D']`` float32: of a tensor, of a codebook's rows, or of
bits. Distances are sums of squared differences. They do not use a Gram matrix, where cancellation can give equal points
a distance above 0 and near points a negative squared distance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WORKSPACE = {"cpu": 2**20, "cuda": 2**24}  # elements of a block of distances, and of a piece of coordinates
LARGEST_SHIFT = 64  # coordinates are multiplied by 2^-64 .. 2^64 before they are squared
_PIECE = 512  # coordinates per piece; the sums of pieces are added, which keeps the rounding small


class Samples:
    """G groups of N samples in D dimensions, at P positions, each of which has a separate density."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device):
        self.groups, self.positions, self.count, self.dims = shape
        self.device = device

    def pieces(self, groups: slice, position: int) -> Iterator[Tensor]:
        """The coordinates of some groups at one position: float32 ``[G', N, D']`` whose D' add up to D."""
        raise NotImplementedError


class Points(Samples):
    """The samples of a tensor ``x[G, N, D]``."""

    def __init__(self, x: Tensor):
        super().__init__((x.shape[0], 1, x.shape[1], x.shape[2]), x.device)
        self.x = x

    def pieces(self, groups, position):
        for start in range(0, self.dims, _PIECE):
            yield self.x[groups, :, start : start + _PIECE].float()


class Tokens(Samples):
    """The rows of ``codebook[V, C]`` at ``tokens[B, N, l]``. ``joined``: a map of l rows is one sample."""

    def __init__(self, tokens: Tensor, codebook: Tensor, joined: bool):
        batch_size, count, length = tokens.shape
        width = codebook.shape[1]
        positions, dims = (1, length * width) if joined else (length, width)
        super().__init__((batch_size, positions, count, dims), tokens.device)
        self.tokens, self.codebook, self.joined = tokens, codebook, joined

    def pieces(self, groups, position):
        width = self.codebook.shape[1]
        at_once = max(1, _PIECE // width)
        places = range(0, self.tokens.shape[2], at_once) if self.joined else (position,)
        for place in places:
            tokens = self.tokens[groups, :, place : place + (at_once if self.joined else 1)]
            for start in range(0, width, _PIECE):
                yield F.embedding(tokens, self.codebook[:, start : start + _PIECE]).flatten(2).float()


class Bits(Samples):
    """``bits[B, N, l, d]`` as the numbers 0 and 1. ``joined``: all l * d bits are one sample."""

    def __init__(self, bits: Tensor, joined: bool):
        batch_size, count, length, width = bits.shape
        positions, dims = (1, length * width) if joined else (length, width)
        super().__init__((batch_size, positions, count, dims), bits.device)
        self.bits, self.joined = bits, joined

    def pieces(self, groups, position):
        bits = self.bits[groups].flatten(2) if self.joined else self.bits[groups, :, position]
        for start in range(0, self.dims, _PIECE):
            yield (bits[..., start : start + _PIECE] != 0).float()


def silverman_factor(count: int, dims: int) -> float:
    """The factor of Silverman's rule (eq. 3) that turns the mean standard deviation into the bandwidth."""
    return (count * (dims + 2) / 4) ** (-1 / (dims + 4))


@torch.no_grad()
def bandwidths(samples: Samples, cosine: bool, over_batch: bool) -> Tensor:
    """Silverman's bandwidths, float32 ``[G, P]``. ``over_batch``: every group gets the mean over the groups."""
    found = torch.empty(samples.groups, samples.positions, dtype=torch.float64, device=samples.device)
    for groups in _group_blocks(samples):
        for position in range(samples.positions):
            inverse = _inverse_norms(samples, groups, position)[0] if cosine else None
            total: float | Tensor = 0.0
            for piece in samples.pieces(groups, position):
                if inverse is not None:
                    piece = piece * inverse
                total = total + piece.double().var(1, correction=0).sqrt().sum(-1)
            found[groups, position] = total
    found *= silverman_factor(samples.count, samples.dims) / samples.dims
    if over_batch and samples.groups:
        found = found.mean(0, keepdim=True).expand_as(found)
    return found.float()


@torch.no_grad()
def density(samples: Samples, bandwidth: Tensor, cosine: bool) -> Tensor:
    """Sums of kernels with ``bandwidth[G, P]``, added over the positions, float32 ``[G, N]``."""
    total = torch.zeros(samples.groups, samples.count, device=samples.device)
    rows_at_once = max(1, _workspace(samples) // samples.count)
    for groups in _group_blocks(samples):
        for position in range(samples.positions):
            shift, factor = exponents(bandwidth[groups, position])
            units = _inverse_norms(samples, groups, position) if cosine else None
            for start in range(0, samples.count, rows_at_once):
                rows = slice(start, start + rows_at_once)
                squares = _squared_distances(samples, groups, position, rows, units, shift)
                total[groups, rows] += squares.mul_(factor[:, None, None]).exp_().sum(-1)
    return total


def exponents(bandwidth: Tensor) -> tuple[Tensor, Tensor]:
    """``(shift, factor)`` of each bandwidth, with which the kernel is exp(factor * (shift * distance)^2).

    The shift is a power of two and therefore exact. With it squares neither overflow nor underflow where they matter,
    however large or small the samples are. A bandwidth of 0 means the limit: 1 at distance 0, otherwise 0.
    """
    exponent = bandwidth.frexp().exponent.clamp(-LARGEST_SHIFT, LARGEST_SHIFT)
    shift = torch.ldexp(torch.ones_like(bandwidth), -exponent)
    factor = -0.5 / (bandwidth * shift).square()
    return shift, factor.clamp(min=torch.finfo(torch.float32).min)


def _squared_distances(samples, groups, position, rows, units, shift) -> Tensor:
    """Squared distances in units of 1/shift, ``[G', rows, N]``."""
    squares: Any = 0.0  # a tensor after the first piece
    for piece in samples.pieces(groups, position):
        piece = piece * (shift[:, None, None] if units is None else units[0])
        squares = squares + _cdist(piece[:, rows], piece).square_()
    if units is not None:
        zero = units[1]
        # A zero vector counts as orthogonal to every other vector (cosine 0) and as equal to another zero vector.
        squares = ((squares + (zero[:, rows] != zero.mT)) * (0.5 * shift[:, None, None])).square_()
    return squares


def _cdist(rows: Tensor, columns: Tensor) -> Tensor:
    return torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist")


def _inverse_norms(samples, groups, position) -> tuple[Tensor, Tensor]:
    """1 / norm of each sample (0 for a zero vector), and which samples are zero vectors, both ``[G', N, 1]``."""
    total: Any = 0.0  # a tensor after the first piece
    for piece in samples.pieces(groups, position):
        total = total + torch.linalg.vector_norm(piece, dim=-1, keepdim=True, dtype=torch.float64).square()
    zero = total == 0
    return torch.where(zero, 0.0, total.sqrt().reciprocal()).float(), zero


def _workspace(samples: Samples) -> int:
    return WORKSPACE.get(samples.device.type, WORKSPACE["cuda"])


def _group_blocks(samples: Samples) -> Iterator[slice]:
    """Slices of as many groups as keep distances and coordinates within the workspace."""
    step = max(1, _workspace(samples) // (samples.count * max(samples.count, min(samples.dims, _PIECE))))
    for start in range(0, samples.groups, step):
        yield slice(start, start + step)
