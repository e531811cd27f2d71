"""The kernels around the density kernels: Silverman's bandwidth, the norms of samples, and the sum over slots.

``h = sigma (N (D + 2) / 4)^(-1 / (D + 4))``, where sigma is the mean over the dimensions of the standard deviation,
computed with a divisor of N (VAR-Scaling, eq. 3). Bound by reading the samples once. Squared differences from the first
sample are summed in float64: they cannot overflow, and equal samples give exactly 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .density_samples import Samples, row_pointers
from .launching import launch


@triton.jit(do_not_specialize=["N", "V", "positions", "length", "chunks"])
def deviations_kernel(
    table_ptr, tokens_ptr, inverse_ptr, out_ptr,
    N, D, V, positions, length, chunks,
    stride_table_group, stride_table_row, stride_table_place,
    stride_tokens_image, stride_tokens_sample, stride_tokens_place,
    BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the sum of the standard deviations of BLOCK_D dimensions to ``out[group, position, (place, chunk)]``."""
    group = (tl.program_id(0) // positions).to(tl.int64)
    position = tl.program_id(0) % positions
    place = position * length + tl.program_id(1) // chunks
    d = (tl.program_id(1) % chunks) * BLOCK_D + tl.arange(0, BLOCK_D)
    table_ptr += group * stride_table_group
    if tokens_ptr is not None:
        tokens_ptr += group * stride_tokens_image
    if inverse_ptr is not None:
        inverse_ptr += (group * positions + position) * N
    strides = (stride_table_row, stride_table_place, stride_tokens_sample, stride_tokens_place)

    first_ptr = row_pointers(table_ptr, tokens_ptr, tl.zeros((1,), dtype=tl.int32), place, N, V, strides)
    first = tl.load(first_ptr[:, None] + d[None, :], mask=(d < D)[None, :], other=0)  # [1, BLOCK_D]
    first = (first != 0).to(tl.float32) if BITS else first.to(tl.float32)
    if inverse_ptr is not None:
        first *= tl.load(inverse_ptr)
    sums = tl.zeros((BLOCK_D,), dtype=tl.float64)
    squares = tl.zeros((BLOCK_D,), dtype=tl.float64)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        rows_ptr = row_pointers(table_ptr, tokens_ptr, n, place, N, V, strides)
        x = tl.load(rows_ptr[:, None] + d[None, :], mask=(d < D)[None, :], other=0)  # [BLOCK_N, BLOCK_D]
        x = (x != 0).to(tl.float32) if BITS else x.to(tl.float32)
        if inverse_ptr is not None:
            x *= tl.load(inverse_ptr + n, mask=n < N, other=0.0)[:, None]
        x = tl.where((n < N)[:, None], x.to(tl.float64) - first.to(tl.float64), 0.0)
        sums += tl.sum(x, 0)
        squares += tl.sum(x * x, 0)
    mean = sums / N
    variance = tl.maximum(squares / N - mean * mean, 0.0)
    deviation = tl.sum(tl.sqrt(variance), 0)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), deviation.to(tl.float32))


@triton.jit(do_not_specialize=["N", "V", "positions", "length"])
def inverse_norms_kernel(
    table_ptr, tokens_ptr, out_ptr,
    N, D, V, positions, length,
    stride_table_group, stride_table_row, stride_table_place,
    stride_tokens_image, stride_tokens_sample, stride_tokens_place,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write 1 / norm of BLOCK_N samples, or 0 for a zero vector, to ``out[group, position, N]``."""
    group = (tl.program_id(0) // positions).to(tl.int64)
    position = tl.program_id(0) % positions
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    table_ptr += group * stride_table_group
    if tokens_ptr is not None:
        tokens_ptr += group * stride_tokens_image
    strides = (stride_table_row, stride_table_place, stride_tokens_sample, stride_tokens_place)
    squares = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for place in range(position * length, (position + 1) * length):
        rows_ptr = row_pointers(table_ptr, tokens_ptr, n, place, N, V, strides)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            x = tl.load(rows_ptr[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0).to(tl.float64)
            squares += tl.sum(x * x, 1)
    inverse = tl.where(squares > 0, 1.0 / tl.sqrt(tl.where(squares > 0, squares, 1.0)), 0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * N + n, inverse, mask=n < N)


@triton.jit(do_not_specialize=["slots", "size", "factor"])
def add_slots_kernel(
    slots_ptr, out_ptr, slots, size, factor, stride_slot, stride_element,
    BLOCK_SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """``out[e] = factor * sum_s slots[s, e]``, in an order that depends only on the number of slots."""
    element = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    total = tl.zeros((BLOCK_SIZE,), dtype=tl.float32)
    for start in range(0, slots, BLOCK_SLOTS):
        slot = (start + tl.arange(0, BLOCK_SLOTS)).to(tl.int64)
        place = slot[:, None] * stride_slot + (element * stride_element)[None, :]
        part = tl.load(slots_ptr + place, mask=(slot < slots)[:, None] & (element < size)[None, :], other=0.0)
        total += tl.sum(part, 0)
    tl.store(out_ptr + element, total * factor, mask=element < size)


def add_slots(slots: Tensor, out: Tensor, factor: float) -> None:
    """``out[...] = factor * slots.sum(0)`` for contiguous float32 tensors, in an order that only len(slots) decides."""
    size = out.numel()
    _add(slots, out, slots.shape[0], size, factor, size, 1)


def _add(slots: Tensor, out: Tensor, count: int, size: int, factor: float, stride_slot: int, stride_element: int):
    block = min(128, triton.next_power_of_2(size))
    launch(
        add_slots_kernel,
        (triton.cdiv(size, block),),
        slots,
        out,
        count,
        size,
        factor,
        stride_slot,
        stride_element,
        BLOCK_SLOTS=16,
        BLOCK_SIZE=block,
        num_warps=4,
    )


def silverman_factor(count: int, dims: int) -> float:
    """The factor that turns the sum of the dimensions' standard deviations into the bandwidth."""
    return (count * (dims + 2) / 4) ** (-1 / (dims + 4)) / dims


def deviation_blocks(count: int, dims: int) -> tuple[int, int]:
    """(BLOCK_N, BLOCK_D): large steps for many samples in few dimensions, whole lines of memory for long samples."""
    if dims > 256:
        return 128, 32
    block_n = min(1024, max(32, triton.next_power_of_2(count)))
    return block_n, min(triton.next_power_of_2(dims), max(4, 4096 // block_n))


def silverman_parts(
    samples: Samples, inverse: Tensor | None, over_batch: bool = False, bits: bool = False
) -> tuple[Tensor, float, tuple[int, int]]:
    """Parts of the bandwidths, the factor by which to multiply their sum, and the parts' group and position strides."""
    block_n, block_d = deviation_blocks(samples.count, samples.dims)
    chunks = triton.cdiv(samples.dims, block_d)
    rows, parts = samples.groups * samples.positions, samples.length * chunks
    found = samples.table.new_empty((samples.groups, samples.positions, parts), dtype=torch.float32)
    launch(
        deviations_kernel, (rows, parts),
        samples.table, samples.tokens, inverse, found,
        samples.count, samples.dims, samples.vocabulary, samples.positions, samples.length, chunks,
        *samples.table_strides, *samples.token_strides,
        BITS=bits, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    factor = silverman_factor(samples.count, samples.length * samples.dims)
    if over_batch:
        mean = found.new_empty((samples.positions, parts))
        add_slots(found, mean, 1.0 / samples.groups)
        return mean, factor, (0, parts)
    return found, factor, found.stride()[:2]


def silverman(samples: Samples, cosine: bool, out: Tensor) -> None:
    """Write the bandwidths into ``out[G, positions]``."""
    if out.numel() == 0:
        return
    found, factor, _ = silverman_parts(samples, inverse_norms(samples) if cosine else None)
    parts = found.shape[-1]
    _add(found, out, parts, out.numel(), factor, 1, parts)


def inverse_norms(samples: Samples) -> Tensor:
    """1 / norm of each sample, or 0 for a zero vector, float32 ``[G, positions, N]``."""
    out = samples.table.new_empty((samples.groups, samples.positions, samples.count), dtype=torch.float32)
    block_d = min(32, triton.next_power_of_2(samples.dims))
    grid = (samples.groups * samples.positions, triton.cdiv(samples.count, 64))
    launch(
        inverse_norms_kernel, grid,
        samples.table, samples.tokens, out,
        samples.count, samples.dims, samples.vocabulary, samples.positions, samples.length,
        *samples.table_strides, *samples.token_strides, BLOCK_N=64, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return out
