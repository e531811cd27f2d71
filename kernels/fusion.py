"""The fusion F(.) of M candidates in one launch: ``phi(resize(codebook[tokens])) + f_hat``.

Source: VAR's ``get_next_autoregressive_input`` and its ``Phi``; LSRS, Algorithm 1 (``e_k = F(r_<=k)``).

Resized scales. With ``T[v, dy, dx] = codebook[v] @ phi's tap (dy, dx)`` and ``A_y``, ``A_x`` the interpolation of an
axis, shifted by a tap with zeros from outside,

    out[y, x] = sum over (i, dy), (j, dx) of  A_y[y, (i, dy)] * A_x[x, (j, dx)] * T[token[i, j], dy, dx]

which is two matrix products around one gathered operand: over ``(i, dy)``, then over ``(j, dx)``. A program makes a
16 x 16 tile of pixels of one candidate and visits only the pairs that reach its tile
(``fusion_tables.tile_inputs``), so neither looked-up nor upsampled features exist in memory, and no tile needs its
neighbour's.

Unresized scales. Nine neighbours a pixel: in half precision their codebook rows times phi's taps on the matrix units
(the rows of a map stay in the first-level cache, the nine-tap table's would not); in float32 nine rows of ``T``, added.

What bounds them: in half precision writing the features, ``B * M * C * H * W`` elements, and reading ``9 * l`` rows of
``T`` a candidate from the second-level cache; in float32 the multiplications, done without tf32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fusion_tables import (
    TILE,
    make_codebook,
    make_convolution,
    make_tap_table,
    tables_of,
    tile_inputs,
)
from .launching import launch


@triton.jit
def _token_map(tokens_ptr, chosen_ptr, n, M, stride_tokens_b, stride_tokens_m, HAS_CHOSEN: tl.constexpr):
    """Where map ``n``'s ids start: candidate ``n % M`` of image ``n // M``, or image ``n``'s chosen candidate of M."""
    if HAS_CHOSEN:
        image = n
        candidate = tl.minimum(tl.maximum(tl.load(chosen_ptr + n), 0), M - 1)
    else:
        image = n // M
        candidate = n % M
    return tokens_ptr + image.to(tl.int64) * stride_tokens_b + candidate.to(tl.int64) * stride_tokens_m, image


@triton.jit
def _clamped(ids, V):
    """Token ids as int32, forced into the codebook so that no id can read outside it."""
    return tl.minimum(tl.maximum(ids, 0), V - 1).to(tl.int32)


@triton.jit
def _rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Float32 to ``dtype``, to the nearest. Triton's interpreter cuts bfloat16 off, where GPUs round."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits += 0x7FFF + ((bits >> 16) & 1)
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _product(a, b, sums, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """``a @ b + sums``. Triton's interpreter would sum in half precision; widening first is exact."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def fuse_resized_kernel(
    tokens_ptr, chosen_ptr, table_ptr, bias_ptr, scale_ptr, f_hat_ptr, out_ptr, row_places_ptr, row_weights_ptr,
    column_places_ptr, column_weights_ptr,
    M, V, w, H, W, tiles_x,
    stride_tokens_b, stride_tokens_m, stride_tokens_l,
    stride_f_hat_b, stride_f_hat_c, stride_f_hat_y, stride_f_hat_x,
    stride_out_n, stride_out_c, stride_out_y, stride_out_x,
    C: tl.constexpr, BLOCK_C: tl.constexpr, K_ROWS: tl.constexpr, K_COLUMNS: tl.constexpr, TAPS: tl.constexpr,
    TILE: tl.constexpr, HAS_CHOSEN: tl.constexpr, HAS_F_HAT: tl.constexpr, SCALED: tl.constexpr,
    INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    tile_y = tl.program_id(1) // tiles_x
    tile_x = tl.program_id(1) % tiles_x
    map_ptr, image = _token_map(tokens_ptr, chosen_ptr, n, M, stride_tokens_b, stride_tokens_m, HAS_CHOSEN)
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
    if SCALED:
        out *= tl.load(scale_ptr)
    if TAPS == 3:
        out += tl.load(bias_ptr + c, mask=c < C, other=0.0)
    if HAS_F_HAT:
        f_hat_ptr += image.to(tl.int64) * stride_f_hat_b
        place = c * stride_f_hat_c + y * stride_f_hat_y + x * stride_f_hat_x
        out += tl.load(f_hat_ptr + place, mask=inside, other=0.0).to(tl.float32)
    out_ptr += n.to(tl.int64) * stride_out_n
    place = c * stride_out_c + y * stride_out_y + x * stride_out_x
    tl.store(out_ptr + place, _rounded(out, out_ptr.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def fuse_unresized_kernel(
    tokens_ptr, chosen_ptr, table_ptr, taps_ptr, bias_ptr, scale_ptr, f_hat_ptr, out_ptr,
    M, V, H, W,
    stride_tokens_b, stride_tokens_m, stride_tokens_l,
    stride_f_hat_b, stride_f_hat_c, stride_f_hat_y, stride_f_hat_x,
    stride_out_n, stride_out_c, stride_out_y, stride_out_x,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, TAPS: tl.constexpr, MULTIPLY: tl.constexpr,
    HAS_CHOSEN: tl.constexpr, HAS_F_HAT: tl.constexpr, SCALED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A scale of the latent's own side. Each code is looked up nine times, once for each pixel that it reaches."""
    n = tl.program_id(0)
    map_ptr, image = _token_map(tokens_ptr, chosen_ptr, n, M, stride_tokens_b, stride_tokens_m, HAS_CHOSEN)
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
        if not MULTIPLY:
            entry = entry * (TAPS * TAPS) + tap
        looked_up = tl.load(
            table_ptr + entry[:, None] * C + c[None, :], mask=present[:, None] & in_c[None, :], other=0.0
        )  # [BLOCK_P, BLOCK_C]
        if MULTIPLY:
            weights = tl.load(
                taps_ptr + c[None, :] * 9 * C + tap * C + c[:, None], mask=in_c[:, None] & in_c[None, :], other=0.0
            )  # [c_in, c_out]
            out = _product(looked_up, weights, out, "ieee", INTERPRETED)
        else:
            out += looked_up.to(tl.float32)

    inside = (pixel < H * W)[:, None] & in_c[None, :]
    if SCALED:
        out *= tl.load(scale_ptr)
    if TAPS == 3:
        out += tl.load(bias_ptr + c, mask=in_c, other=0.0)[None, :]
    if HAS_F_HAT:
        f_hat_ptr += image.to(tl.int64) * stride_f_hat_b
        place = (y * stride_f_hat_y + x * stride_f_hat_x)[:, None] + (c * stride_f_hat_c)[None, :]
        out += tl.load(f_hat_ptr + place, mask=inside, other=0.0).to(tl.float32)
    out_ptr += n.to(tl.int64) * stride_out_n
    place = (y * stride_out_y + x * stride_out_x)[:, None] + (c * stride_out_c)[None, :]
    tl.store(out_ptr + place, _rounded(out, out_ptr.dtype.element_ty, INTERPRETED), mask=inside)


def fuse(
    tokens: Tensor,
    out: Tensor,
    codebook: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    blend: float,
    f_hat: Tensor | None,
    side: tuple[int, int],
    interpolation: str,
    chosen: Tensor | None = None,
) -> None:
    """Write the features of every token map into ``out``.

    Arguments:
        tokens: int64 ``[B, M, l]``.
        out: ``[N, C, H, W]``, any strides; ``N = B * M`` maps, or ``N = B`` with ``chosen`` int64 ``[B]``, which picks
            one candidate an image. May be ``f_hat`` itself. Where it is half precision, float16 is what is multiplied.
        codebook, weight, bias, blend, f_hat, side, interpolation: as ``ops.fuse_tokens`` checks them.
    """
    if out.numel() == 0:
        return
    weights = (codebook,) if weight is None else (codebook, weight, bias)
    # An unused pointer still needs a tensor, an unused stride a number.
    tensors = (chosen if chosen is not None else tokens, f_hat if f_hat is not None else out)
    strides = (*tokens.stride(), *tensors[1].stride(), *out.stride())
    constants = {
        "TAPS": 1 if weight is None else 3,
        "HAS_CHOSEN": chosen is not None,
        "HAS_F_HAT": f_hat is not None,
        "SCALED": out.dtype.itemsize == 2,
    }
    if tuple(side) == tuple(out.shape[2:]):
        _fuse_unresized(tokens, out, weights, blend, tensors, strides, constants)
    else:
        _fuse_resized(tokens, out, weights, blend, tensors, strides, constants, side, interpolation)


def _fuse_resized(tokens, out, weights, blend, tensors, strides, constants, side, interpolation) -> None:
    N, C, H, W = out.shape
    operand = torch.float16 if constants["SCALED"] else torch.float32
    taps = constants["TAPS"]
    table, *bias, scale = tables_of(make_tap_table if taps == 3 else make_codebook, operand, blend, *weights)
    rows, row_weights = tile_inputs(side[0], H, interpolation, taps, out.device, operand)
    columns, column_weights = tile_inputs(side[1], W, interpolation, taps, out.device, operand)
    chosen, f_hat = tensors
    block_c, num_warps = resized_blocks(C, operand)
    launch(
        fuse_resized_kernel, (N, len(rows) * len(columns), triton.cdiv(C, block_c)),
        tokens, chosen, table, bias[0] if bias else scale, scale, f_hat, out,
        rows, row_weights, columns, column_weights,
        tokens.shape[1], len(weights[0]), side[1], H, W, len(columns), *strides,
        C=C, BLOCK_C=block_c, K_ROWS=rows.shape[2], K_COLUMNS=columns.shape[2], TILE=TILE, PRECISION="ieee",
        # One stage: a pipelined loop stages what it looks up in a layout whose reads meet in one bank, eight at a time.
        **constants, num_warps=num_warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


def _fuse_unresized(tokens, out, weights, blend, tensors, strides, constants) -> None:
    N, C, H, W = out.shape
    operand = torch.float16 if constants["SCALED"] else torch.float32
    multiply, block_c, block_p, num_warps = unresized_blocks(N, C, H * W, constants["TAPS"], operand)
    if multiply:
        table, kernel, bias, scale = tables_of(make_convolution, operand, blend, *weights)
    elif constants["TAPS"] == 3:
        table, bias, scale = tables_of(make_tap_table, operand, blend, *weights)
        kernel = table
    else:
        table, scale = tables_of(make_codebook, operand, blend, *weights)
        kernel = bias = scale
    chosen, f_hat = tensors
    launch(
        fuse_unresized_kernel, (N, triton.cdiv(H * W, block_p), triton.cdiv(C, block_c)),
        tokens, chosen, table, kernel, bias, scale, f_hat, out,
        tokens.shape[1], len(weights[0]), H, W, *strides,
        C=C, BLOCK_C=block_c, BLOCK_P=block_p, MULTIPLY=multiply, **constants,
        num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip


def resized_blocks(C: int, dtype: torch.dtype) -> tuple[int, int]:
    """``(BLOCK_C, num_warps)`` of ``fuse_resized_kernel``, whose two ``[16, 16 * BLOCK_C]`` stay in registers."""
    if dtype.itemsize == 2:
        return min(32, triton.next_power_of_2(C)), 8 if C > 16 else 4
    return min(16, triton.next_power_of_2(C)), 8


def unresized_blocks(N: int, C: int, pixels: int, taps: int, dtype: torch.dtype) -> tuple[bool, int, int, int]:
    """``(MULTIPLY, BLOCK_C, BLOCK_P, num_warps)`` of ``fuse_unresized_kernel``.

    Few maps take small blocks of pixels, to reach more of the GPU; many take larger ones, to read phi's taps less.
    """
    few = N * pixels < 64 * 1024
    if taps == 3 and dtype.itemsize == 2 and C <= 64:
        return True, max(16, triton.next_power_of_2(C)), 64 if few or C > 32 else 128, 8
    return False, min(64, triton.next_power_of_2(C)), 16 if few or C > 32 else 32, 4
