"""Layer norm over all numbers of a map with LeakyReLU and a residual, forward and backward, one pass over memory each.

    n = (x - mean(x)) * rstd(x);  p = n * weight + bias + residual;  y = p if p > 0 else slope * p

and, with g the gradient of p, ``dy`` where p > 0 and ``slope * dy`` elsewhere, and h = g * weight::

    dx = rstd * (h - mean(h) - n * mean(h * n));  dresidual = g
    dweight = sum over maps of g * n;  dbias = sum of g

Source: layer norm (Ba et al., 2016, eq. 4), its backward by the chain rule. Bound by bytes: a map (1,024 to 4,096
numbers in the published scorer) lies in the registers of one program, so that both passes over it (mean, then squares
of what is left: no cancellation) cost one read of memory. A program takes map after map and keeps weight and bias,
which are float32 and as long as a map: read for every map, they would be most of the bytes. Maps lie in memory as
``[C, H, W]`` or ``[H, W, C]``; weights always as the former. Backward makes n and p anew from x and the residual,
which it reads anyway. Sums over maps have a fixed order: every program keeps the sums over the maps that are its, and a
second, small kernel adds the programs' sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch


@triton.jit
def place_of(i, C: tl.constexpr, PIXELS: tl.constexpr, LAST: tl.constexpr):
    """Where a ``[C, H, W]`` tensor holds a map's ``i``-th number in memory; ``LAST``: maps lie as ``[H, W, C]``."""
    if LAST:
        return i % C * PIXELS + i // C
    else:
        return i


@triton.jit
def load_wide(ptr, offsets, inside):
    """Numbers of any float type as float32, 0 outside."""
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, values, inside, INTERPRETED: tl.constexpr):
    """Float32 ``values`` to the nearest of the pointer's type. Triton's interpreter cuts bfloat16 off, GPUs round."""
    if INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        values = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    tl.store(ptr, values, mask=inside)


@triton.jit
def normalise(x, inside, eps, LENGTH: tl.constexpr):
    """``n`` of a map's float32 numbers ``x`` ``[BLOCK]``, 0 outside, and its rstd."""
    centred = tl.where(inside, x - tl.sum(x, axis=0) * (1.0 / LENGTH), 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) * (1.0 / LENGTH) + eps)
    return centred * rstd, rstd


@triton.jit
def norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr,
    maps, slope, eps,
    C: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr, KEEP: tl.constexpr,
    ACTIVATE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Every ``num_programs``-th map; ``KEEP``: weight and bias stay in registers from one map to the next."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    i = tl.arange(0, BLOCK)  # [BLOCK], as are all that follow
    inside = i < C * PIXELS
    place = place_of(i, C, PIXELS, LAST)
    weight = load_wide(weight_ptr, place, inside) if KEEP else 0.0
    bias = load_wide(bias_ptr, place, inside) if KEEP else 0.0
    first = program.to(tl.int64) * (C * PIXELS)
    for _ in range(program, maps, programs):
        x = load_wide(x_ptr + first, i, inside)
        if residual_ptr is not None:  # asked for before it is needed, so that both reads are under way at once
            residual = load_wide(residual_ptr + first, i, inside)
        n, _rstd = normalise(x, inside, eps, C * PIXELS)
        if KEEP:
            p = n * weight + bias
        else:
            p = n * load_wide(weight_ptr, place, inside) + load_wide(bias_ptr, place, inside)
        if residual_ptr is not None:
            p += residual
        if ACTIVATE:
            p = tl.where(p > 0, p, p * slope)
        store(y_ptr + first + i, p, inside, INTERPRETED)
        first += programs.to(tl.int64) * (C * PIXELS)


@triton.jit
def norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, residual_ptr, grad_x_ptr, grad_residual_ptr, sums_ptr,
    maps, slope, eps,
    C: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr, KEEP: tl.constexpr,
    ACTIVATE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """As the forward kernel; sums over a program's maps go to ``sums_ptr`` ``[2, num_programs, C * PIXELS]``."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    i = tl.arange(0, BLOCK)  # [BLOCK], as are all that follow
    inside = i < C * PIXELS
    place = place_of(i, C, PIXELS, LAST)
    kept_weight = load_wide(weight_ptr, place, inside) if KEEP else 0.0
    kept_bias = load_wide(bias_ptr, place, inside) if KEEP else 0.0
    grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    grad_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    first = program.to(tl.int64) * (C * PIXELS)
    for _ in range(program, maps, programs):
        x = load_wide(x_ptr + first, i, inside)
        g = load_wide(grad_ptr + first, i, inside)
        if residual_ptr is not None and ACTIVATE:
            residual = load_wide(residual_ptr + first, i, inside)
        n, rstd = normalise(x, inside, eps, C * PIXELS)
        weight = kept_weight if KEEP else load_wide(weight_ptr, place, inside)
        if ACTIVATE:
            p = n * weight + (kept_bias if KEEP else load_wide(bias_ptr, place, inside))
            if residual_ptr is not None:
                p += residual
            g = tl.where(p > 0, g, g * slope)
        if residual_ptr is not None:
            store(grad_residual_ptr + first + i, g, inside, INTERPRETED)
        grad_bias += g
        grad_weight += g * n
        h = g * weight
        mean = tl.sum(h, axis=0) * (1.0 / (C * PIXELS))
        slant = tl.sum(h * n, axis=0) * (1.0 / (C * PIXELS))
        store(grad_x_ptr + first + i, rstd * (h - mean - n * slant), inside, INTERPRETED)
        first += programs.to(tl.int64) * (C * PIXELS)

    sums_ptr += program.to(tl.int64) * (C * PIXELS) + i
    tl.store(sums_ptr, grad_weight, mask=inside)
    tl.store(sums_ptr + programs.to(tl.int64) * (C * PIXELS), grad_bias, mask=inside)


@triton.jit(do_not_specialize=["programs"])
def sum_programs_kernel(
    sums_ptr, grad_weight_ptr, grad_bias_ptr, programs,
    C: tl.constexpr, PIXELS: tl.constexpr, LAST: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A few places of both sums, over all programs of ``norm_backward_kernel``."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < C * PIXELS
    grad_weight = tl.zeros((BLOCK_PROGRAMS, BLOCK), dtype=tl.float32)
    grad_bias = tl.zeros((BLOCK_PROGRAMS, BLOCK), dtype=tl.float32)
    bias_sums = programs.to(tl.int64) * (C * PIXELS)
    for first in range(0, programs, BLOCK_PROGRAMS):
        program = first + tl.arange(0, BLOCK_PROGRAMS)
        offsets = program.to(tl.int64)[:, None] * (C * PIXELS) + i[None, :]  # [BLOCK_PROGRAMS, BLOCK]
        known = (program < programs)[:, None] & inside[None, :]
        grad_weight += tl.load(sums_ptr + offsets, mask=known, other=0.0)
        grad_bias += tl.load(sums_ptr + bias_sums + offsets, mask=known, other=0.0)
    place = place_of(i, C, PIXELS, LAST)
    store(grad_weight_ptr + place, tl.sum(grad_weight, axis=0), inside, INTERPRETED)
    store(grad_bias_ptr + place, tl.sum(grad_bias, axis=0), inside, INTERPRETED)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, y: Tensor, slope: float, eps: float
) -> None:
    """Fill ``y[N, C, H, W]``, not empty, of ``x``'s strides; what lies in neither format is copied there and back."""
    last = channels_lie_last(x)
    out, sizes = _to_fill(y, last), _sizes(x, last, KEEP_FORWARD)
    launch(
        norm_forward_kernel, (_programs(x, sizes["num_warps"]),),
        _as_maps(x, last), weight.contiguous(), bias.contiguous(), _as_maps(residual, last), out,
        x.shape[0], slope, eps, ACTIVATE=slope != 1, **sizes,
    )  # fmt: skip
    _put_back(out, y)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_residual: Tensor,
    slope: float,
    eps: float,
) -> None:
    """Fill the gradients, that of a residual of None excepted; memory formats as in :func:`forward`."""
    last = channels_lie_last(x)
    sizes = _sizes(x, last, KEEP_BACKWARD)
    out, out_residual = _to_fill(grad_x, last), None if residual is None else _to_fill(grad_residual, last)
    out_weight, out_bias = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (grad_weight, grad_bias)
    )
    programs = _programs(x, sizes["num_warps"])
    sums = torch.empty((2, programs, x[0].numel()), dtype=torch.float32, device=x.device)
    launch(
        norm_backward_kernel, (programs,),
        _as_maps(grad, last), _as_maps(x, last), weight.contiguous(), bias.contiguous(), _as_maps(residual, last),
        out, out_residual, sums,
        x.shape[0], slope, eps, ACTIVATE=slope != 1, **sizes,
    )  # fmt: skip
    launch(
        sum_programs_kernel, (triton.cdiv(x[0].numel(), SUM_BLOCK),),
        sums, out_weight, out_bias, programs,
        C=sizes["C"], PIXELS=sizes["PIXELS"], LAST=last, BLOCK_PROGRAMS=SUM_BLOCK_PROGRAMS, BLOCK=SUM_BLOCK,
        num_warps=4,
    )  # fmt: skip
    for filled, wanted in ((out, grad_x), (out_weight, grad_weight), (out_bias, grad_bias)):
        _put_back(filled, wanted)
    if residual is not None:
        _put_back(out_residual, grad_residual)


# The longest map of which a program keeps weight and bias in registers: 16 or fewer numbers a thread of each.
KEEP_FORWARD, KEEP_BACKWARD = 8192, 4096
SUM_BLOCK_PROGRAMS, SUM_BLOCK = 64, 16


def warps_for(block: int) -> int:
    """Eight numbers a thread of each tensor, which leaves registers for seven tensors, as far as 16 warps go."""
    return min(16, max(1, block // 256))


def channels_lie_last(x: Tensor) -> bool:
    """Whether maps are read as ``[H, W, C]``; where both formats are true, and where none is, as ``[C, H, W]``."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _sizes(x: Tensor, last: bool, keep: int) -> dict[str, int | bool]:
    C, pixels = x.shape[1], x.shape[2] * x.shape[3]
    block = triton.next_power_of_2(C * pixels)
    sizes = {"C": C, "PIXELS": pixels, "BLOCK": block, "LAST": last, "KEEP": block <= keep}
    return sizes | {"num_warps": warps_for(block)}


def _programs(x: Tensor, num_warps: int) -> int:
    """What a GPU holds at a time, so that every program has the same share, but no more than maps."""
    if x.device.type != "cuda":
        return min(x.shape[0], 3)
    resident = 2048 // (32 * num_warps)
    return min(x.shape[0], resident * torch.cuda.get_device_properties(x.device).multi_processor_count)


def _as_maps(x: Tensor | None, last: bool) -> Tensor | None:
    """The tensor itself if it lies as asked, else a copy that does."""
    return None if x is None else x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _to_fill(x: Tensor, last: bool) -> Tensor:
    wanted = torch.channels_last if last else torch.contiguous_format
    return x if x.is_contiguous(memory_format=wanted) else torch.empty_like(x, memory_format=wanted)


def _put_back(filled: Tensor, x: Tensor) -> None:
    if filled.data_ptr() != x.data_ptr():
        x.copy_(filled)
