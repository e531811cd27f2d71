"""Resize ``f_hat`` to the next scale's side. Every output is a weighted sum over a few rows and columns of the input.

The kernel's tile has channels last. With it, neighbouring lanes read neighbouring pixels in Triton 3.6 and neighbouring
channels in Triton 3.8, which moves seven times as many sectors. With channels first it is the other way round.

Source: the end of VAR's ``get_next_autoregressive_input`` (mode ``area`` is adaptive average pooling). Bound by reading
``f_hat`` once, ``4 * B * C * H * W`` bytes, which takes less time than a launch for a batch of images.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launching import launch


@triton.jit
def resize_kernel(
    f_hat_ptr, out_ptr, row_ptr, row_weights_ptr, column_ptr, column_weights_ptr,
    w, L, C,
    stride_f_hat_b, stride_f_hat_c, stride_f_hat_y, stride_f_hat_x,
    stride_out_b, stride_out_c, stride_out_l,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_COLUMNS)
    in_l = place < L
    in_columns = in_l[:, None] & (k < COLUMNS)[None, :]
    column_place = (place % w)[:, None] * COLUMNS + k[None, :]
    column = tl.load(column_ptr + column_place, mask=in_columns, other=0)  # [BLOCK_L, BLOCK_COLUMNS]
    column_weights = tl.load(column_weights_ptr + column_place, mask=in_columns, other=0.0)
    f_hat_ptr += image * stride_f_hat_b
    inside = in_columns[:, :, None] & (c < C)[None, None, :]

    out = tl.zeros((BLOCK_L, BLOCK_COLUMNS, BLOCK_C), dtype=tl.float32)
    for r in range(ROWS):
        row = tl.load(row_ptr + (place // w) * ROWS + r, mask=in_l, other=0)
        row_weights = tl.load(row_weights_ptr + (place // w) * ROWS + r, mask=in_l, other=0.0)
        pixel = row[:, None] * stride_f_hat_y + column * stride_f_hat_x
        read = tl.load(
            f_hat_ptr + pixel[:, :, None] + (c * stride_f_hat_c)[None, None, :], mask=inside, other=0.0
        )  # [BLOCK_L, BLOCK_COLUMNS, BLOCK_C]
        out = tl.fma(row_weights[:, None, None], read, out)
    out = tl.sum(out * column_weights[:, :, None], axis=1)
    out_ptr += image * stride_out_b
    place = place[:, None] * stride_out_l + (c * stride_out_c)[None, :]
    tl.store(out_ptr + place, out, mask=in_l[:, None] & (c < C)[None, :])


def resize(f_hat: Tensor, out: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> None:
    """Resize ``f_hat[B, C, H, W]`` into ``out[B, C, h, w]``. Both are float32; out is not empty and dense over (h, w).

    ``rows, columns``: ``varkern.ops.fusion_tables.pixel_inputs`` of the two axes.
    """
    B, C, h, w = out.shape
    (rows, row_weights), (columns, column_weights) = rows, columns
    block_c, block_columns, block_l = resize_blocks(C, h * w, columns.shape[1])
    launch(
        resize_kernel, (B, triton.cdiv(h * w, block_l), triton.cdiv(C, block_c)),
        f_hat, out, rows, row_weights, columns, column_weights,
        w, h * w, C, *f_hat.stride(), out.stride(0), out.stride(1), out.stride(3),
        ROWS=rows.shape[1], COLUMNS=columns.shape[1], BLOCK_COLUMNS=block_columns, BLOCK_L=block_l, BLOCK_C=block_c,
        num_warps=4,
    )  # fmt: skip


def resize_blocks(C: int, places: int, columns: int) -> tuple[int, int, int]:
    """``(BLOCK_C, BLOCK_COLUMNS, BLOCK_L)`` of ``resize_kernel``, for a float32 tile of about 1024 elements."""
    block_c = min(32, triton.next_power_of_2(C))
    block_columns = triton.next_power_of_2(columns)
    block_l = max(1, min(triton.next_power_of_2(places), 1024 // (block_c * block_columns)))
    return block_c, block_columns, block_l
