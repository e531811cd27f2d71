"""Code that the density kernels share: where samples lie in memory, and which pairs of samples a program takes."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """G groups of N samples. Each of ``positions`` has a separate density; a sample has ``length * dims`` numbers.

    The numbers are ``table[G, N, length, dims]``, or the rows of ``table[V, dims]`` that
    ``tokens[G, N, positions * length]`` selects.
    """

    table: Tensor
    tokens: Tensor | None
    groups: int
    count: int
    positions: int
    length: int
    dims: int

    @property
    def vocabulary(self) -> int:
        return 1 if self.tokens is None else self.table.shape[0]

    @property
    def table_strides(self) -> tuple[int, int, int]:
        """The strides of groups, rows and places."""
        return (0, self.table.stride(0), 0) if self.tokens is not None else self.table.stride()[:3]

    @property
    def token_strides(self) -> tuple[int, ...]:
        return (0, 0, 0) if self.tokens is None else self.tokens.stride()


def points(x: Tensor) -> Samples:
    """Samples ``x[G, N, D]`` at one position."""
    x = x if x.stride(2) == 1 else x.contiguous()
    groups, count, dims = x.shape
    return Samples(x[:, :, None, :], None, groups, count, 1, 1, dims)


def token_maps(tokens: Tensor, codebook: Tensor, joined: bool) -> Samples:
    """Maps ``tokens[B, N, l]`` of rows of ``codebook[V, C]``, as l positions or, if ``joined``, one sample per map."""
    codebook = codebook if codebook.stride(1) == 1 else codebook.contiguous()
    groups, count, length = tokens.shape
    if (count - 1) * tokens.stride(1) + (length - 1) * tokens.stride(2) >= 2**31:  # offsets in an image are int32
        tokens = tokens.contiguous()
    positions = (1, length) if joined else (length, 1)
    return Samples(codebook, tokens, groups, count, *positions, codebook.shape[1])


@triton.jit
def locate(
    tiles, row_programs, tiles_at_once, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """(group, first row, first and last tile of columns, slot of the row sums, slot of the column sums).

    SYMMETRIC: of T tiles, tile I is paired with the tiles I, I + 1, ..., I + T // 2 (modulo T), so that every pair of
    tiles occurs once. With an even T the pairs at distance T / 2 would occur twice; the second occurrence takes no tile
    and adds nothing. BLOCK_J / ROWS programs share the rows of a tile, and each has a slot for its column sums.
    """
    group = tl.program_id(0) // row_programs
    row_program = tl.program_id(0) % row_programs
    step = tl.program_id(1)
    slots = tl.num_programs(1)
    if SYMMETRIC:
        SHARES: tl.constexpr = BLOCK_J // ROWS
        tile = row_program // SHARES
        first_tile = (tile + step) % tiles
        last_tile = first_tile + tl.where((2 * step == tiles) & (tile >= step), 0, 1)
        column_slot = tl.where(step > 0, slots + (step - 1) * SHARES + row_program % SHARES, 0)
        slots += (slots - 1) * SHARES
    else:
        first_tile = step * tiles_at_once
        last_tile = tl.minimum(first_tile + tiles_at_once, tiles)
        column_slot = 0
    before = tl.program_id(2) * slots
    return group, row_program * ROWS, first_tile, last_tile, before + step, before + column_slot


@triton.jit
def row_pointers(table_ptr, tokens_ptr, n, place, N, V, strides):
    """Pointers to the first coordinates of samples n at a place. Indices beyond the last sample give the first one."""
    stride_table_row, stride_table_place, stride_tokens_sample, stride_tokens_place = strides
    if tokens_ptr is None:
        row = tl.where(n < N, n, 0).to(tl.int64)
    else:
        token = tl.load(tokens_ptr + n * stride_tokens_sample + place * stride_tokens_place, mask=n < N, other=0)
        row = tl.minimum(tl.maximum(token.to(tl.int32), 0), V - 1).to(tl.int64)
    return table_ptr + row * stride_table_row + tl.cast(place, tl.int64) * stride_table_place
