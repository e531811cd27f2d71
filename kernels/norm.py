"""Layer norm over a pixel's channels with LeakyReLU and a residual, forward and backward, one pass over memory each.

    z = x + input_bias;  n = (z - mean(z)) * rstd(z);  p = n * weight + bias + residual;  y = p if p > 0 else slope * p

and, with g the gradient of p, ``dy`` where p > 0 and ``slope * dy`` elsewhere, and h = g * weight::

    dx = rstd * (h - mean(h) - n * mean(h * n));  dresidual = g
    dweight = sum over pixels of g * n;  dbias = sum of g;  dinput_bias = sum of dx

Source: layer norm (Ba et al., 2016, eq. 4), its backward by the chain rule. Bound by bytes: a pixel's channels lie in
the registers of a few threads of one warp, or of one program, so that both passes over them (mean, then squares of what
is left: no cancellation) cost one read of memory. Backward makes n and p anew from x and the residual, which it reads
anyway. Sums over pixels have a fixed order: every program keeps a tile of partial sums over the tiles that are its, and
a second, small kernel adds the programs' sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch


@triton.jit
def load_channels(ptr, c, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """A ``[C]`` vector as float32 ``[1, BLOCK_C]``, 0 beyond it, or 0.0 if there is none."""
    # elif and else: what follows a return inside a plain if is still compiled.
    if ptr is None:
        return 0.0
    elif C == BLOCK_C:
        return tl.load(ptr + c).to(tl.float32)[None, :]
    else:
        return tl.load(ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store(ptr, values, inside, INTERPRETED: tl.constexpr):
    """Float32 ``values`` to the nearest of the pointer's type. Triton's interpreter cuts bfloat16 off, GPUs round."""
    if INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        values = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    tl.store(ptr, values, mask=inside)


@triton.jit
def normalise(z, c, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """``n`` of float32 rows ``z`` ``[BLOCK_ROWS, BLOCK_C]``, 0 beyond C, and their rstd ``[BLOCK_ROWS, 1]``."""
    centred = z - tl.sum(z, axis=1, keep_dims=True) * (1.0 / C)
    if C != BLOCK_C:
        centred = tl.where((c < C)[None, :], centred, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) * (1.0 / C) + eps)
    return centred * rstd, rstd


@triton.jit
def norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, input_bias_ptr, y_ptr,
    rows, slope, eps,
    C: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, ACTIVATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One tile of pixels; every tensor is dense ``[rows, C]``."""
    row = tl.arange(0, BLOCK_ROWS)
    c = tl.arange(0, BLOCK_C)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    inside = (row < rows - first)[:, None] & (c < C)[None, :]
    place = row[:, None] * C + c[None, :]  # [BLOCK_ROWS, BLOCK_C]

    z = tl.load(x_ptr + first * C + place, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:  # asked for before it is needed, so that both reads are under way at once
        residual = tl.load(residual_ptr + first * C + place, mask=inside, other=0.0).to(tl.float32)
    z += load_channels(input_bias_ptr, c, C, BLOCK_C)
    n, _ = normalise(z, c, eps, C, BLOCK_C)
    p = n * load_channels(weight_ptr, c, C, BLOCK_C) + load_channels(bias_ptr, c, C, BLOCK_C)
    if residual_ptr is not None:
        p += residual
    if ACTIVATE:
        p = tl.where(p > 0, p, p * slope)
    store(y_ptr + first * C + place, p, inside, INTERPRETED)


@triton.jit
def norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, residual_ptr, input_bias_ptr, grad_x_ptr, grad_residual_ptr, sums_ptr,
    rows, slope, eps,
    C: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, ACTIVATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Every ``num_programs``-th tile of pixels; the sums over them go to ``sums_ptr`` ``[2 or 3, num_programs, C]``."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    row = tl.arange(0, BLOCK_ROWS)
    c = tl.arange(0, BLOCK_C)
    place = row[:, None] * C + c[None, :]  # [BLOCK_ROWS, BLOCK_C]
    weight = load_channels(weight_ptr, c, C, BLOCK_C)
    bias = load_channels(bias_ptr, c, C, BLOCK_C)
    input_bias = load_channels(input_bias_ptr, c, C, BLOCK_C)
    # Added up tile on tile: threads exchange nothing before the end.
    grad_weight = tl.zeros((BLOCK_ROWS, BLOCK_C), dtype=tl.float32)
    grad_bias = tl.zeros((BLOCK_ROWS, BLOCK_C), dtype=tl.float32)
    grad_input_bias = tl.zeros((BLOCK_ROWS, BLOCK_C), dtype=tl.float32)

    first = program.to(tl.int64) * BLOCK_ROWS
    for _ in range(program, tl.cdiv(rows, BLOCK_ROWS), programs):
        inside = (row < rows - first)[:, None] & (c < C)[None, :]
        z = tl.load(x_ptr + first * C + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + first * C + place, mask=inside, other=0.0).to(tl.float32)
        if residual_ptr is not None and ACTIVATE:
            residual = tl.load(residual_ptr + first * C + place, mask=inside, other=0.0).to(tl.float32)
        z += input_bias
        n, rstd = normalise(z, c, eps, C, BLOCK_C)
        if ACTIVATE:
            p = n * weight + bias
            if residual_ptr is not None:
                p += residual
            g = tl.where(p > 0, g, g * slope)
        if residual_ptr is not None:
            store(grad_residual_ptr + first * C + place, g, inside, INTERPRETED)
        grad_bias += g
        grad_weight += g * n
        h = g * weight
        mean = tl.sum(h, axis=1, keep_dims=True) * (1.0 / C)
        slant = tl.sum(h * n, axis=1, keep_dims=True) * (1.0 / C)
        h = rstd * (h - mean - n * slant)
        store(grad_x_ptr + first * C + place, h, inside, INTERPRETED)
        if input_bias_ptr is not None:  # beyond C, h is not 0 and goes nowhere; beyond the rows it is
            grad_input_bias += h
        first += programs * BLOCK_ROWS

    in_c = c < C
    sums_ptr += program.to(tl.int64) * C + c
    tl.store(sums_ptr, tl.sum(grad_weight, axis=0), mask=in_c)
    tl.store(sums_ptr + programs * C, tl.sum(grad_bias, axis=0), mask=in_c)
    if input_bias_ptr is not None:
        tl.store(sums_ptr + 2 * programs * C, tl.sum(grad_input_bias, axis=0), mask=in_c)


@triton.jit
def sum_programs_kernel(
    sums_ptr, grad_weight_ptr, grad_bias_ptr, grad_input_bias_ptr, programs,
    C: tl.constexpr, BLOCK_PROGRAMS: tl.constexpr, BLOCK_C: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A few channels of one of the sums, over all programs of ``norm_backward_kernel``."""
    which = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums_ptr += which * programs * C
    partial = tl.zeros((BLOCK_PROGRAMS, BLOCK_C), dtype=tl.float32)
    for first in range(0, programs, BLOCK_PROGRAMS):
        program = first + tl.arange(0, BLOCK_PROGRAMS)
        inside = (program < programs)[:, None] & (c < C)[None, :]
        partial += tl.load(sums_ptr + program[:, None] * C + c[None, :], mask=inside, other=0.0)
    total = tl.sum(partial, axis=0)
    if which == 0:
        store(grad_weight_ptr + c, total, c < C, INTERPRETED)
    elif which == 1:
        store(grad_bias_ptr + c, total, c < C, INTERPRETED)
    else:
        if grad_input_bias_ptr is not None:
            store(grad_input_bias_ptr + c, total, c < C, INTERPRETED)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    y: Tensor,
    slope: float,
    eps: float,
) -> None:
    """Fill ``y[N, C, H, W]``, not empty; a tensor that is not channels-last is copied there and back."""
    C = x.shape[1]
    block_rows, block_c, num_warps = blocks(C, x.element_size(), FORWARD_TILE)
    out = _rows_to_fill(y)
    launch(
        norm_forward_kernel, (triton.cdiv(out.shape[0], block_rows),),
        _rows(x), weight.contiguous(), bias.contiguous(), _rows(residual), _contiguous(input_bias), out,
        out.shape[0], slope, eps,
        C=C, BLOCK_ROWS=block_rows, BLOCK_C=block_c, ACTIVATE=slope != 1,
        num_warps=num_warps,
    )  # fmt: skip
    _put_back(out, y)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_residual: Tensor,
    grad_input_bias: Tensor,
    slope: float,
    eps: float,
) -> None:
    """Fill the gradients, those of what is None excepted; memory formats as in :func:`forward`."""
    C = x.shape[1]
    block_rows, block_c, num_warps = blocks(C, x.element_size(), BACKWARD_TILE)
    out, out_residual = _rows_to_fill(grad_x), None if residual is None else _rows_to_fill(grad_residual)
    programs = min(triton.cdiv(out.shape[0], block_rows), most_programs(x.device))
    kinds = 2 if input_bias is None else 3
    sums = torch.empty((kinds, programs, C), dtype=torch.float32, device=x.device)
    launch(
        norm_backward_kernel, (programs,),
        _rows(grad), _rows(x), weight.contiguous(), bias.contiguous(), _rows(residual), _contiguous(input_bias),
        out, out_residual, sums,
        out.shape[0], slope, eps,
        C=C, BLOCK_ROWS=block_rows, BLOCK_C=block_c, ACTIVATE=slope != 1,
        num_warps=num_warps,
    )  # fmt: skip
    launch(
        sum_programs_kernel, (triton.cdiv(C, SUM_BLOCK_C), kinds),
        sums, grad_weight, grad_bias, None if input_bias is None else grad_input_bias, programs,
        C=C, BLOCK_PROGRAMS=SUM_BLOCK_PROGRAMS, BLOCK_C=SUM_BLOCK_C,
        num_warps=4,
    )  # fmt: skip
    _put_back(out, grad_x)
    if residual is not None:
        _put_back(out_residual, grad_residual)


# Bytes a program holds of one tensor, with 4 warps while a pixel is no larger: 64 a thread forward; 32 backward, where
# three tensors and three sums are held at once.
FORWARD_TILE, BACKWARD_TILE = 8192, 2048
SUM_BLOCK_PROGRAMS, SUM_BLOCK_C = 128, 16


def blocks(C: int, itemsize: int, tile: int) -> tuple[int, int, int]:
    """``(BLOCK_ROWS, BLOCK_C, num_warps)``: ``tile`` bytes a program, but never less than a pixel."""
    block_c = triton.next_power_of_2(C)
    pixel = block_c * itemsize
    return max(1, tile // pixel), block_c, min(16, max(4, 4 * pixel // tile))


def most_programs(device: torch.device) -> int:
    """Programs of the backward kernel: what a GPU holds at a time, so that every one has the same share."""
    if device.type != "cuda":
        return 3
    return 5 * torch.cuda.get_device_properties(device).multi_processor_count


def _rows(x: Tensor | None) -> Tensor | None:
    """``[N, C, H, W]`` as dense ``[N * H * W, C]``, which of a channels-last tensor is a view."""
    return None if x is None else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def _rows_to_fill(x: Tensor) -> Tensor:
    rows = x.permute(0, 2, 3, 1)
    return rows.view(-1, x.shape[1]) if rows.is_contiguous() else x.new_empty((rows[..., 0].numel(), x.shape[1]))


def _put_back(rows: Tensor, x: Tensor) -> None:
    if rows.data_ptr() != x.data_ptr():
        x.copy_(rows.view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2))


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
