"""Sums of Gaussian kernels over all pairs of a group's samples: ``sum_j exp(-|x_i - x_j|^2 / (2 h^2))``.

Source: VAR-Scaling (arXiv 2601.07293), eq. 2. The per-position form follows the released code and replaces its chain
of ``cdist``, power, ``exp`` and ``sum``. Bound by arithmetic: one subtraction and one multiply-add per pair and
dimension, ``N^2 D`` of each, or half of that where one tile serves both halves of the symmetric matrix.

Distances are sums of squared differences. Equal samples are therefore at distance 0 exactly, and near ones keep their
digits, which a Gram matrix in float32 (on tensor cores or not) cannot guarantee. In a tile of 8 x 128 pairs every
thread holds one column. The coordinates of the 128 columns pass through shared memory into registers, 16 at a time. The
coordinates of the 8 rows are broadcast to all threads of a warp, four per load. Coordinates are multiplied by a power
of two near 1 / h, so that squares neither overflow nor underflow. This is exact and costs nothing, because the
subtraction becomes a multiply-add.

The order of a group's sums depends only on the group's own sizes. For large groups every pair of tiles is visited once
and adds to the sums of its rows and of its columns. Every partial sum is written to a separate slot, and a second
launch adds the slots in a fixed order. There are no atomics.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from .density_bandwidth import add_slots, inverse_norms, silverman_parts
from .density_samples import Samples, locate, row_pointers
from .launching import launch

BLOCK_I = 8
BLOCK_J = 128
ROW_BLOCKS = 4  # blocks of rows that a program takes one after another in large (symmetric) groups
QUARTERS = tl.constexpr(BLOCK_J // (ROW_BLOCKS * BLOCK_I))
SMALLEST_SYMMETRIC = 513  # below, a second launch and fewer programs cost more than half the work saves
POSITIONS_AT_ONCE = 16
MOST_PIECES = 4
STEPS_AT_ONCE = 32  # about how many tiles of 8 x 128 pairs x 16 coordinates a program works through
LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(2.0**-126)
LARGEST_SHIFT = tl.constexpr(64)


@triton.jit
def exponents(bandwidth_ptr, width, parts, BLOCK_PARTS: tl.constexpr):
    """(shift, factor) of a bandwidth, with which the kernel is exp2(factor * (shift * distance)^2).

    The bandwidth is ``width`` times the sum of its parts, or ``width`` if there are none. A bandwidth of 0 means the
    limit: 1 at distance 0, otherwise 0.
    """
    h = width
    if bandwidth_ptr is not None:
        part = tl.arange(0, BLOCK_PARTS)
        h *= tl.sum(tl.load(bandwidth_ptr + part, mask=part < parts, other=0.0), 0)
    exponent = ((h.to(tl.int32, bitcast=True) >> 23) & 255) - 126
    exponent = tl.minimum(tl.maximum(exponent, -LARGEST_SHIFT), LARGEST_SHIFT)
    exponent = tl.where(h > 0, exponent, 0)
    shift = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = h * shift
    return shift, -0.5 * LOG2_E / tl.maximum(scaled * scaled, SMALLEST)


@triton.jit
def pieces_of(x, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """``x[BLOCK, 4 * PIECES]`` as PIECES tiles ``[4, BLOCK]``, with one exchange through shared memory in all."""
    if PIECES == 8:
        x = tl.permute(tl.reshape(x, (BLOCK, 2, 2, 2, 4)), (4, 0, 1, 2, 3))
        x0, x1 = tl.split(x)
        x00, x01 = tl.split(x0)
        x10, x11 = tl.split(x1)
        x0, x4 = tl.split(x00)
        x2, x6 = tl.split(x01)
        x1, x5 = tl.split(x10)
        x3, x7 = tl.split(x11)
        return x0, x1, x2, x3, x4, x5, x6, x7
    elif PIECES == 4:
        x = tl.permute(tl.reshape(x, (BLOCK, 2, 2, 4)), (3, 0, 1, 2))
        x0, x1 = tl.split(x)
        x00, x02 = tl.split(x0)
        x01, x03 = tl.split(x1)
        return x00, x01, x02, x03
    elif PIECES == 2:
        return tl.split(tl.permute(tl.reshape(x, (BLOCK, 2, 4)), (2, 0, 1)))
    else:
        return (tl.trans(x),)


@triton.jit
def add_squares(
    squares, samples, i, j, place, units, COSINE: tl.constexpr,
    EVEN: tl.constexpr, PIECES: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Add to ``squares[BLOCK_I, 4, BLOCK_J]`` the squared differences of samples i and j at one place."""
    table_ptr, tokens_ptr, N, D, V, strides = samples
    row_units, column_units = units
    rows_ptr = row_pointers(table_ptr, tokens_ptr, i, place, N, V, strides)
    columns_ptr = row_pointers(table_ptr, tokens_ptr, j, place, N, V, strides)
    for start in range(0, D, 4 * PIECES):
        d = start + tl.arange(0, 4 * PIECES)
        columns_at = columns_ptr[:, None] + d[None, :]
        columns = tl.load(columns_at) if EVEN else tl.load(columns_at, mask=(d < D)[None, :], other=0.0)
        columns = columns.to(tl.float32) * column_units  # [BLOCK_J, 4 * PIECES]
        pieces = pieces_of(columns, BLOCK_J, PIECES)
        for k in tl.static_range(PIECES):
            d = start + 4 * k + tl.arange(0, 4)
            rows_at = rows_ptr[:, None] + d[None, :]
            rows = tl.load(rows_at) if EVEN else tl.load(rows_at, mask=(d < D)[None, :], other=0.0)
            rows = rows.to(tl.float32)  # [BLOCK_I, 4]
            if COSINE:
                # Both products are rounded before they are subtracted, so that equal samples are at 0 exactly.
                rows = rows * row_units
                difference = rows[:, :, None] - pieces[k][None, :, :]
            else:  # the unit is a power of two, so its product is exact; fused with the subtraction it costs nothing
                difference = tl.fma(rows[:, :, None], row_units, -pieces[k][None, :, :])
            squares = tl.fma(difference, difference, squares)
    return squares


@triton.jit
def kernels_of_tile(
    samples, inverse_ptr, bandwidth_ptr, i, j, positions, length, parts, width, stride_bandwidth_position,
    JOINED: tl.constexpr, EVEN: tl.constexpr, PIECES: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The kernels of samples i and j ``[BLOCK_I, BLOCK_J]``, summed over positions [first, last)."""
    COSINE: tl.constexpr = inverse_ptr is not None
    first_position, last_position = positions
    N = samples[2]
    total = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
    for position in range(first_position, last_position):
        width_ptr = bandwidth_ptr
        if bandwidth_ptr is not None:
            width_ptr += position * stride_bandwidth_position
        shift, factor = exponents(width_ptr, width, parts, BLOCK_PARTS)
        if COSINE:
            row_units = tl.load(inverse_ptr + tl.cast(position, tl.int64) * N + i, mask=i < N, other=0.0)
            column_units = tl.load(inverse_ptr + tl.cast(position, tl.int64) * N + j, mask=j < N, other=0.0)
            units = (row_units[:, None], column_units[:, None])
        else:
            units = (shift, shift)
        parts_of_squares = tl.zeros((BLOCK_I, 4, BLOCK_J), dtype=tl.float32)  # four sums per pair, for accuracy
        if JOINED:
            for place in range(length):
                parts_of_squares = add_squares(
                    parts_of_squares, samples, i, j, place, units, COSINE, EVEN, PIECES, BLOCK_I, BLOCK_J
                )
        else:
            parts_of_squares = add_squares(
                parts_of_squares, samples, i, j, position, units, COSINE, EVEN, PIECES, BLOCK_I, BLOCK_J
            )
        squares = tl.sum(parts_of_squares, 1)
        if COSINE:
            # A zero vector counts as orthogonal to every other vector and as equal to another zero vector.
            apart = (row_units == 0.0)[:, None] != (column_units == 0.0)[None, :]
            distance = (squares + apart.to(tl.float32)) * (0.5 * shift)
            squares = distance * distance
        total += tl.exp2(squares * factor)
    return tl.where((j < N)[None, :], total, 0.0)


@triton.jit(do_not_specialize=["N", "V", "positions", "length", "parts", "groups", "tiles", "row_programs"])
def density_kernel(
    table_ptr, tokens_ptr, inverse_ptr, bandwidth_ptr, sums_ptr,
    N, D, V, positions, length, groups, tiles, row_programs, tiles_at_once, positions_at_once, parts, width,
    stride_table_group, stride_table_row, stride_table_place,
    stride_tokens_image, stride_tokens_sample, stride_tokens_place, stride_bandwidth_group, stride_bandwidth_position,
    SYMMETRIC: tl.constexpr, JOINED: tl.constexpr, EVEN: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, ROW_BLOCKS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """A program (group and block of rows, tiles of columns, positions) writes its part of the sums into its own slot.

    Every one of ``positions`` gets a density, and these are added. JOINED: ``length`` rows of the table make one
    sample. EVEN: the number of coordinates in a row of the table is a multiple of 4 * PIECES.
    """
    group, row_start, first_tile, last_tile, row_slot, column_slot = locate(
        tiles, row_programs, tiles_at_once, SYMMETRIC, ROW_BLOCKS * BLOCK_I, BLOCK_J
    )
    first_position = tl.program_id(2) * positions_at_once
    last_position = tl.minimum(first_position + positions_at_once, positions)
    table_ptr += group.to(tl.int64) * stride_table_group
    if tokens_ptr is not None:
        tokens_ptr += group.to(tl.int64) * stride_tokens_image
    if inverse_ptr is not None:
        inverse_ptr += group.to(tl.int64) * positions * N
    if bandwidth_ptr is not None:
        bandwidth_ptr += group.to(tl.int64) * stride_bandwidth_group
    strides = (stride_table_row, stride_table_place, stride_tokens_sample, stride_tokens_place)
    samples = (table_ptr, tokens_ptr, N, D, V, strides)
    row_sums_ptr = sums_ptr + (row_slot * groups.to(tl.int64) + group) * N

    if SYMMETRIC:
        last_position = tl.where(last_tile > first_tile, last_position, first_position)
        j = first_tile * BLOCK_J + tl.arange(0, BLOCK_J)
        column_sums = tl.zeros((BLOCK_J,), dtype=tl.float32)
        for block in range(ROW_BLOCKS):
            i = row_start + block * BLOCK_I + tl.arange(0, BLOCK_I)
            total = kernels_of_tile(
                samples, inverse_ptr, bandwidth_ptr, i, j, (first_position, last_position), length, parts, width,
                stride_bandwidth_position, JOINED, EVEN, PIECES, BLOCK_PARTS, BLOCK_I, BLOCK_J,
            )  # fmt: skip
            tl.store(row_sums_ptr + i, tl.sum(total, 1), mask=i < N)
            column_sums += tl.sum(tl.where((i < N)[:, None], total, 0.0), 0)
        column_sums_ptr = sums_ptr + (column_slot * groups.to(tl.int64) + group) * N
        tl.store(column_sums_ptr + j, column_sums, mask=j < tl.where(column_slot > row_slot, N, 0))
    else:
        i = row_start + tl.arange(0, BLOCK_I)
        total = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
        for tile in range(first_tile, last_tile):
            j = tile * BLOCK_J + tl.arange(0, BLOCK_J)
            total += kernels_of_tile(
                samples, inverse_ptr, bandwidth_ptr, i, j, (first_position, last_position), length, parts, width,
                stride_bandwidth_position, JOINED, EVEN, PIECES, BLOCK_PARTS, BLOCK_I, BLOCK_J,
            )  # fmt: skip
        tl.store(row_sums_ptr + i, tl.sum(total, 1), mask=i < N)


@functools.cache
def plan(count: int, dims: int, positions: int, length: int) -> dict:
    """Launch parameters for groups of ``count`` samples, each of ``length`` rows of ``dims`` coordinates.

    They do not depend on the batch size, so that it cannot change the order of a sum. In small groups a program
    compares 8 rows with as many tiles of columns as STEPS_AT_ONCE allows, and has one slot. In large groups every pair
    of tiles is visited once.
    """
    tiles = triton.cdiv(count, BLOCK_J)
    pieces = min(MOST_PIECES, triton.next_power_of_2(triton.cdiv(dims, 4)))
    positions_at_once = min(positions, POSITIONS_AT_ONCE)
    symmetric = count >= SMALLEST_SYMMETRIC
    chosen = {
        "tiles": tiles,
        "position_groups": triton.cdiv(positions, positions_at_once),
        "positions_at_once": positions_at_once,
        "constants": {
            "SYMMETRIC": symmetric,
            "JOINED": length > 1,
            "EVEN": dims % (4 * pieces) == 0,
            "PIECES": pieces,
            "ROW_BLOCKS": ROW_BLOCKS if symmetric else 1,
            "BLOCK_I": BLOCK_I,
            "BLOCK_J": BLOCK_J,
        },
    }
    if symmetric:
        half = tiles // 2
        return chosen | {
            "row_programs": tiles * QUARTERS.value,
            "column_programs": half + 1,
            "tiles_at_once": 1,
            "slots": 1 + half + half * QUARTERS.value,
        }
    steps = positions_at_once * length * triton.cdiv(dims, 4 * pieces)
    tiles_at_once = max(1, min(tiles, STEPS_AT_ONCE // steps))
    column_programs = triton.cdiv(tiles, tiles_at_once)
    return chosen | {
        "row_programs": triton.cdiv(count, BLOCK_I),
        "column_programs": column_programs,
        "tiles_at_once": tiles_at_once,
        "slots": column_programs,
    }


def density(samples: Samples, out: Tensor, bandwidth: Tensor | None, width: float, over_batch: bool, cosine: bool):
    """Write the sums of kernels into ``out[G, N]``.

    The bandwidth is ``bandwidth[G, positions]``, or ``width`` if that is > 0. If neither is given it is Silverman's,
    per group and position, or with ``over_batch`` the mean over the groups, per position.
    """
    if out.numel() == 0:
        return
    inverse = inverse_norms(samples) if cosine else None
    parts = 1
    strides = (0, 0)
    if bandwidth is not None:
        width, strides = 1.0, bandwidth.stride()
    elif not width:
        bandwidth, width, strides = silverman_parts(samples, inverse, over_batch)
        parts = bandwidth.shape[-1]
    chosen = plan(samples.count, samples.dims, samples.positions, samples.length)
    slots = chosen["slots"] * chosen["position_groups"]
    sums = out if slots == 1 else out.new_empty((slots, *out.shape))
    grid = (samples.groups * chosen["row_programs"], chosen["column_programs"], chosen["position_groups"])
    launch(
        density_kernel, grid,
        samples.table, samples.tokens, inverse, bandwidth, sums,
        samples.count, samples.dims, samples.vocabulary, samples.positions, samples.length, samples.groups,
        chosen["tiles"], chosen["row_programs"], chosen["tiles_at_once"], chosen["positions_at_once"], parts, width,
        *samples.table_strides, *samples.token_strides, *strides,
        **chosen["constants"], BLOCK_PARTS=triton.next_power_of_2(parts), num_warps=4,
    )  # fmt: skip
    if slots > 1:
        add_slots(sums, out, 1.0)
