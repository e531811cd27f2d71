"""Sums of Gaussian kernels for binary codes. Squared distances are Hamming distances, counted on packed words.

The tiles and slots are those of ``density.py``. Codes of +-s are measured in units of 2 s, so that the squared distance
is the number of bits that differ. Bound by the units that count bits and compute exponentials, each at an eighth of the
float32 rate. For d=32 a pair costs as much as three of its 32 coordinates would in float32.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .density import POSITIONS_AT_ONCE, SMALLEST_SYMMETRIC, exponents
from .density_bandwidth import add_slots, silverman_parts
from .density_samples import Samples, locate
from .launching import launch

BLOCK_I = 32
BLOCK_J = 128
WORDS_AT_ONCE = 64


@triton.jit(do_not_specialize=["N", "D", "words"])
def pack_kernel(
    bits_ptr, out_ptr, N, D, words, stride_bits_b, stride_bits_n, stride_bits_l, stride_bits_d, BLOCK_N: tl.constexpr
):
    """Pack 32 bits per word into ``out[B, l * words, N]``."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    bit = tl.arange(0, 32)
    d = (word % words) * 32 + bit
    place = n.to(tl.int64)[:, None] * stride_bits_n + (d * stride_bits_d)[None, :]
    bits_ptr += image * stride_bits_b + (word // words) * stride_bits_l
    bits = tl.load(bits_ptr + place, mask=(n < N)[:, None] & (d < D)[None, :], other=0)  # [BLOCK_N, 32]
    packed = tl.sum((bits != 0).to(tl.int32) << bit[None, :], 1)
    tl.store(out_ptr + (image * tl.num_programs(1) + word) * N + n, packed, mask=n < N)


@triton.jit
def count_bits(x):
    """The number of set bits of a 32-bit word. The compiler turns these lines into one instruction."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["N", "positions", "words", "parts", "groups", "tiles", "row_programs"])
def bit_density_kernel(
    words_ptr, bandwidth_ptr, sums_ptr,
    N, words, positions, groups, tiles, row_programs, tiles_at_once, positions_at_once, parts, width,
    stride_bandwidth_group, stride_bandwidth_position,
    SYMMETRIC: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Like ``density_kernel``, for samples of ``words`` words per position at ``words_ptr[G, positions, words, N]``."""
    group, row_start, first_tile, last_tile, row_slot, column_slot = locate(
        tiles, row_programs, tiles_at_once, SYMMETRIC, BLOCK_I, BLOCK_J
    )
    first_position = tl.program_id(2) * positions_at_once
    last_position = tl.minimum(first_position + positions_at_once, positions)
    if bandwidth_ptr is not None:
        bandwidth_ptr += group.to(tl.int64) * stride_bandwidth_group
    words_ptr += group.to(tl.int64) * positions * words * N
    sums_ptr += group.to(tl.int64) * N
    slot_size = groups.to(tl.int64) * N

    i = row_start + tl.arange(0, BLOCK_I)
    total = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
    for tile in range(first_tile, last_tile):
        j = tile * BLOCK_J + tl.arange(0, BLOCK_J)
        for position in range(first_position, last_position):
            width_ptr = bandwidth_ptr
            if bandwidth_ptr is not None:
                width_ptr += position * stride_bandwidth_position
            shift, factor = exponents(width_ptr, width, parts, BLOCK_PARTS)
            differing = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.int32)
            for word in range(position * words, (position + 1) * words):
                row = tl.load(words_ptr + tl.cast(word, tl.int64) * N + i, mask=i < N, other=0)  # [BLOCK_I]
                column = tl.load(words_ptr + tl.cast(word, tl.int64) * N + j, mask=j < N, other=0)
                differing += count_bits(row[:, None] ^ column[None, :])
            squares = differing.to(tl.float32) * (shift * shift)
            total += tl.where((j < N)[None, :], tl.exp2(squares * factor), 0.0)
    tl.store(sums_ptr + row_slot * slot_size + i, tl.sum(total, 1), mask=i < N)
    if SYMMETRIC:
        column_sums = tl.sum(tl.where((i < N)[:, None], total, 0.0), 0)
        j = first_tile * BLOCK_J + tl.arange(0, BLOCK_J)
        tl.store(sums_ptr + column_slot * slot_size + j, column_sums, mask=j < tl.where(column_slot > row_slot, N, 0))


@functools.cache
def plan(count: int, positions: int, words: int) -> dict:
    """Launch parameters, which do not depend on the batch size; see ``density.plan``."""
    tiles = triton.cdiv(count, BLOCK_J)
    symmetric = count >= SMALLEST_SYMMETRIC
    positions_at_once = min(positions, POSITIONS_AT_ONCE)
    tiles_at_once = 1 if symmetric else max(1, min(tiles, WORDS_AT_ONCE // (positions_at_once * words)))
    half, shares = tiles // 2, BLOCK_J // BLOCK_I
    column_programs = half + 1 if symmetric else triton.cdiv(tiles, tiles_at_once)
    return {
        "tiles": tiles,
        "position_groups": triton.cdiv(positions, positions_at_once),
        "positions_at_once": positions_at_once,
        "tiles_at_once": tiles_at_once,
        "row_programs": tiles * shares if symmetric else triton.cdiv(count, BLOCK_I),
        "column_programs": column_programs,
        "slots": column_programs + (half * shares if symmetric else 0),
        "constants": {"SYMMETRIC": symmetric, "BLOCK_I": BLOCK_I, "BLOCK_J": BLOCK_J},
    }


def pack(bits: Tensor) -> Tensor:
    """Pack ``bits[B, N, l, d]`` (uint8) into int32 words ``[B, l * ceil(d / 32), N]``."""
    batch_size, count, length, dims = bits.shape
    words = triton.cdiv(dims, 32)
    out = torch.empty((batch_size, length * words, count), dtype=torch.int32, device=bits.device)
    launch(
        pack_kernel,
        (triton.cdiv(count, 128), length * words, batch_size),
        bits,
        out,
        count,
        dims,
        words,
        *bits.stride(),
        BLOCK_N=128,
        num_warps=4,
    )
    return out


def bit_density(bits: Tensor, out: Tensor, bandwidth: Tensor | None, width: float, over_batch: bool, joined: bool):
    """Write the sums of kernels of ``bits[B, N, l, d]`` (bool or uint8) into ``out[B, N]``.

    Bandwidths are given as in ``density.density``, in units of 2 s.
    """
    if out.numel() == 0:
        return
    bits = bits.view(torch.uint8)
    bits = bits if bits.stride(3) == 1 else bits.contiguous()
    batch_size, count, length, dims = bits.shape
    positions, joined_length = (1, length) if joined else (length, 1)
    samples = Samples(bits, None, batch_size, count, positions, joined_length, dims)
    packed = pack(bits)
    words = packed.shape[1] // positions
    parts = 1
    strides = (0, 0)
    if bandwidth is not None:
        width, strides = 1.0, bandwidth.stride()
    elif not width:
        bandwidth, width, strides = silverman_parts(samples, None, over_batch, bits=True)
        parts = bandwidth.shape[-1]
    chosen = plan(count, positions, words)
    slots = chosen["slots"] * chosen["position_groups"]
    sums = out if slots == 1 else out.new_empty((slots, *out.shape))
    grid = (batch_size * chosen["row_programs"], chosen["column_programs"], chosen["position_groups"])
    launch(
        bit_density_kernel, grid,
        packed, bandwidth, sums,
        count, words, positions, batch_size, chosen["tiles"], chosen["row_programs"], chosen["tiles_at_once"],
        chosen["positions_at_once"], parts, width, *strides,
        **chosen["constants"], BLOCK_PARTS=triton.next_power_of_2(parts), num_warps=4,
    )  # fmt: skip
    if slots > 1:
        add_slots(sums, out, 1.0)
