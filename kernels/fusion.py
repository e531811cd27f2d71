"""The fusion F(.) of M candidates, in one launch: ``phi(resize(codebook[tokens])) + f_hat``.

Source: VAR's ``get_next_autoregressive_input`` and its ``Phi``; LSRS, Algorithm 1 (``e_k = F(r_<=k)``).

Resized scales. Let ``T[v, dy, dx] = codebook[v] @ phi's tap (dy, dx)``, and let ``A_y`` and ``A_x`` be the
interpolation matrices of the two axes, shifted by a tap with zero padding. Then

    out[y, x] = sum over (i, dy), (j, dx) of  A_y[y, (i, dy)] * A_x[x, (j, dx)] * T[token[i, j], dy, dx]

These are two matrix products of one gathered operand: over ``(i, dy)``, then over ``(j, dx)``. A program computes a
16 x 16 tile of pixels of one candidate. It visits only the pairs that reach its tile (``tile_inputs`` in
``varkern.ops.fusion_tables``), so features are never in memory before they are complete, and tiles are independent.

Unresized scales. Every pixel sums over nine neighbours. In half precision the matrix units multiply the neighbours'
codebook rows by phi's taps; a map's codebook rows fit into the first-level cache, its rows of ``T`` would not. In
float32 the kernel adds nine rows of ``T``.

Bound, in half precision, by writing the features, ``B * M * C * H * W`` elements, and by reading ``9 * l`` rows of
``T`` per candidate from the second-level cache; in float32, by the multiplications, which do not use TensorFloat-32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch


@triton.jit
def _clamped(ids, V):
    """Token ids as int32, clamped to [0, V), so that no id reads outside the codebook."""
    return tl.minimum(tl.maximum(ids, 0), V - 1).to(tl.int32)


@triton.jit
def _rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round float32 to the nearest ``dtype``. Triton's interpreter would truncate to bfloat16; GPUs round."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits += 0x7FFF + ((bits >> 16) & 1)
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _product(a, b, sums, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """``a @ b + sums``. Triton's interpreter would sum in half precision, so operands are widened, which is exact."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def fuse_resized_kernel(
    tokens_ptr, table_ptr, bias_ptr, scale_ptr, f_hat_ptr, out_ptr, row_places_ptr, row_weights_ptr,
    column_places_ptr, column_weights_ptr,
    M, V, w, H, W, tiles_x,
    stride_tokens_b, stride_tokens_m, stride_tokens_l,
    stride_f_hat_b, stride_f_hat_c, stride_f_hat_y, stride_f_hat_x,
    stride_out_n, stride_out_c, stride_out_y, stride_out_x,
    C: tl.constexpr, BLOCK_C: tl.constexpr, K_ROWS: tl.constexpr, K_COLUMNS: tl.constexpr, TAPS: tl.constexpr,
    TILE: tl.constexpr, INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    tile_y = tl.program_id(1) // tiles_x
    tile_x = tl.program_id(1) % tiles_x
    image = (n // M).to(tl.int64)
    map_ptr = tokens_ptr + image * stride_tokens_b + (n % M).to(tl.int64) * stride_tokens_m
    step = tl.arange(0, TILE)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C

    out = tl.zeros((TILE, TILE * BLOCK_C), dtype=tl.float32)  # [x, (y, c)]
    for kx in range(0, K_COLUMNS, TILE):
        column_ptr = column_places_ptr + tile_x * 2 * K_COLUMNS + kx + step
        column = tl.load(column_ptr)  # [TILE]
        column_tap = tl.load(column_ptr + K_COLUMNS)
        rows_done = tl.zeros((TILE, TILE * BLOCK_C), dtype=tl.float32)  # [y, (column, c)]
        for ky in range(0, K_ROWS, TILE):
            row_ptr = row_places_ptr + tile_y * 2 * K_ROWS + ky + step
            row = tl.load(row_ptr)
            row_tap = tl.load(row_ptr + K_ROWS)
            present = (row >= 0)[:, None] & (column >= 0)[None, :]  # [row, column]
            place = row[:, None] * w + column[None, :]
            ids = tl.load(map_ptr + place * stride_tokens_l, mask=present, other=0)
            entry = _clamped(ids, V)
            if TAPS == 3:
                entry = entry * 9 + row_tap[:, None] * 3 + column_tap[None, :]
            looked_up = tl.load(
                table_ptr + entry[:, :, None] * C + c[None, None, :],
                mask=present[:, :, None] & in_c[None, None, :],
                other=0.0,
            )  # [row, column, c]
            weights = tl.load(row_weights_ptr + (tile_y * TILE + step)[:, None] * K_ROWS + (ky + step)[None, :])
            looked_up = tl.reshape(looked_up, (TILE, TILE * BLOCK_C))
            rows_done = _product(weights, looked_up, rows_done, PRECISION, INTERPRETED)
        rows_done = _rounded(rows_done, table_ptr.dtype.element_ty, INTERPRETED)
        turned = tl.permute(tl.reshape(rows_done, (TILE, TILE, BLOCK_C)), (1, 0, 2))
        weights = tl.load(column_weights_ptr + (tile_x * TILE + step)[:, None] * K_COLUMNS + (kx + step)[None, :])
        out = _product(weights, tl.reshape(turned, (TILE, TILE * BLOCK_C)), out, PRECISION, INTERPRETED)

    out = tl.reshape(out, (TILE, TILE, BLOCK_C))  # [x, y, c]
    x = (tile_x * TILE + step)[:, None, None]
    y = (tile_y * TILE + step)[None, :, None]
    c = c[None, None, :]
    inside = (x < W) & (y < H) & (c < C)
    if scale_ptr is not None:
        out *= tl.load(scale_ptr)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + c, mask=c < C, other=0.0)
    if f_hat_ptr is not None:
        f_hat_ptr += image * stride_f_hat_b
        place = c * stride_f_hat_c + y * stride_f_hat_y + x * stride_f_hat_x
        out += tl.load(f_hat_ptr + place, mask=inside, other=0.0).to(tl.float32)
    out_ptr += n.to(tl.int64) * stride_out_n
    place = c * stride_out_c + y * stride_out_y + x * stride_out_x
    tl.store(out_ptr + place, _rounded(out, out_ptr.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def fuse_unresized_kernel(
    tokens_ptr, table_ptr, taps_ptr, bias_ptr, scale_ptr, f_hat_ptr, out_ptr,
    M, V, H, W,
    stride_tokens_b, stride_tokens_m, stride_tokens_l,
    stride_f_hat_b, stride_f_hat_c, stride_f_hat_y, stride_f_hat_x,
    stride_out_n, stride_out_c, stride_out_y, stride_out_x,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, TAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Fuse a scale that has the latent's side. Each code is looked up nine times, once per pixel that it reaches."""
    n = tl.program_id(0)
    image = (n // M).to(tl.int64)
    map_ptr = tokens_ptr + image * stride_tokens_b + (n % M).to(tl.int64) * stride_tokens_m
    pixel = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    y = pixel // W
    x = pixel % W
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C

    out = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for tap in range(TAPS * TAPS):
        dy = tap // TAPS - TAPS // 2
        dx = tap % TAPS - TAPS // 2
        present = (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
        ids = tl.load(map_ptr + (pixel + dy * W + dx) * stride_tokens_l, mask=present, other=0)
        entry = _clamped(ids, V)
        if taps_ptr is None:
            entry = entry * (TAPS * TAPS) + tap
        looked_up = tl.load(
            table_ptr + entry[:, None] * C + c[None, :], mask=present[:, None] & in_c[None, :], other=0.0
        )  # [BLOCK_P, BLOCK_C]
        if taps_ptr is not None:
            weights = tl.load(
                taps_ptr + c[None, :] * 9 * C + tap * C + c[:, None], mask=in_c[:, None] & in_c[None, :], other=0.0
            )  # [c_in, c_out]
            out = _product(looked_up, weights, out, "ieee", INTERPRETED)
        else:
            out += looked_up.to(tl.float32)

    inside = (pixel < H * W)[:, None] & in_c[None, :]
    if scale_ptr is not None:
        out *= tl.load(scale_ptr)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + c, mask=in_c, other=0.0)[None, :]
    if f_hat_ptr is not None:
        f_hat_ptr += image * stride_f_hat_b
        place = (y * stride_f_hat_y + x * stride_f_hat_x)[:, None] + (c * stride_f_hat_c)[None, :]
        out += tl.load(f_hat_ptr + place, mask=inside, other=0.0).to(tl.float32)
    out_ptr += n.to(tl.int64) * stride_out_n
    place = (y * stride_out_y + x * stride_out_x)[:, None] + (c * stride_out_c)[None, :]
    tl.store(out_ptr + place, _rounded(out, out_ptr.dtype.element_ty, INTERPRETED), mask=inside)


def fuse_resized(
    tokens: Tensor,
    table: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    f_hat: Tensor | None,
    out: Tensor,
    width: int,
    rows: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor],
) -> None:
    """Write the features of every token map into ``out``, for a scale whose side differs from the latent's.

    Arguments:
        tokens: int64 ``[B, M, l]``; a map's rows have ``width`` ids.
        table, bias, scale: from ``fusion_tables.make_tap_table`` with phi, otherwise from ``make_codebook`` with a
            bias of None. Products are computed in the table's dtype. A scale of None means 1.
        f_hat: ``[B, C, H, W]`` or None; may be ``out``.
        out: ``[B * M, C, H, W]``, not empty, any strides.
        rows, columns: ``fusion_tables.tile_inputs`` of the two axes.
    """
    N, C, H, W = out.shape
    (row_places, row_weights), (column_places, column_weights) = rows, columns
    tiles_x, tile = column_weights.shape[:2]
    block_c, num_warps = resized_blocks(C, table.dtype)
    launch(
        fuse_resized_kernel, (N, len(row_places) * tiles_x, triton.cdiv(C, block_c)),
        tokens, table, bias, scale, f_hat, out, row_places, row_weights, column_places, column_weights,
        tokens.shape[1], len(table), width, H, W, tiles_x, *_strides(tokens, f_hat, out),
        C=C, BLOCK_C=block_c, K_ROWS=row_places.shape[2], K_COLUMNS=column_places.shape[2],
        TAPS=1 if bias is None else 3, TILE=tile, PRECISION="ieee",
        # One stage: a pipelined loop would put its lookups into shared memory with eight-way bank conflicts.
        num_warps=num_warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


def fuse_unresized(
    tokens: Tensor,
    table: Tensor,
    taps: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    f_hat: Tensor | None,
    out: Tensor,
) -> None:
    """Like :func:`fuse_resized`, for a scale that has the latent's side.

    If ``taps`` is given, ``table`` is the codebook, both come from ``fusion_tables.make_convolution``, and the kernel
    multiplies them. :func:`multiplies` says whether to pass taps.
    """
    N, C, H, W = out.shape
    block_c, block_p, num_warps = unresized_blocks(N, C, H * W, taps is not None)
    launch(
        fuse_unresized_kernel, (N, triton.cdiv(H * W, block_p), triton.cdiv(C, block_c)),
        tokens, table, taps, bias, scale, f_hat, out,
        tokens.shape[1], len(table), H, W, *_strides(tokens, f_hat, out),
        C=C, BLOCK_C=block_c, BLOCK_P=block_p, TAPS=1 if bias is None else 3,
        num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip


def _strides(tokens: Tensor, f_hat: Tensor | None, out: Tensor) -> tuple[int, ...]:
    return *tokens.stride(), *((0,) * 4 if f_hat is None else f_hat.stride()), *out.stride()


def resized_blocks(C: int, dtype: torch.dtype) -> tuple[int, int]:
    """``(BLOCK_C, num_warps)`` of ``fuse_resized_kernel``. Two tiles ``[16, 16 * BLOCK_C]`` must fit into registers."""
    if dtype.itemsize == 2:
        return min(32, triton.next_power_of_2(C)), 8 if C > 16 else 4
    return min(16, triton.next_power_of_2(C)), 8


def multiplies(C: int, dtype: torch.dtype) -> bool:
    """Whether ``fuse_unresized_kernel``, with phi and operands of ``dtype``, multiplies instead of looking products up.

    In half precision multiplying on the matrix units is cheaper than reading nine times as many bytes.
    """
    return dtype.itemsize == 2 and C <= 64


def unresized_blocks(N: int, C: int, pixels: int, multiply: bool) -> tuple[int, int, int]:
    """``(BLOCK_C, BLOCK_P, num_warps)`` of ``fuse_unresized_kernel``.

    With few maps, small blocks of pixels occupy more of the GPU. With many maps, larger blocks read phi's taps less
    often.
    """
    few = N * pixels < 64 * 1024
    if multiply:
        return max(16, triton.next_power_of_2(C)), 64 if few or C > 32 else 128, 8
    return min(64, triton.next_power_of_2(C)), 16 if few or C > 32 else 32, 4
