"""Layer norm over all numbers of a map, with LeakyReLU and a residual. Forward and backward each read memory once.

    n = (x - mean(x)) * rstd(x);  p = n * weight + bias + residual;  y = p if p > 0 else slope * p

The gradient g of p is ``dy`` where p > 0 and ``slope * dy`` elsewhere. With h = g * weight::

    dx = rstd * (h - mean(h) - n * mean(h * n));  dresidual = g
    dweight = sum over maps of g * n;  dbias = sum of g

Source: layer norm (Ba et al., 2016, eq. 4); its backward follows by the chain rule. Bound by bytes.

One program holds a whole map (1,024 to 4,096 numbers in the published scorer) in registers. It passes over the map
twice, for the mean and then for the squares of ``x - mean``, which avoids cancellation, but reads memory only once. A
program processes several maps and keeps weight and bias in registers: they are float32 and as long as a map, and
reading them for every map would be most of the bytes. Maps lie in memory as ``[C, H, W]`` or ``[H, W, C]``; weights
always lie as ``[C, H, W]``. Backward computes n and p again from x and the residual, which it has to read anyway. Sums
over maps have a fixed order: every program sums over its own maps, and a small second kernel adds the programs' sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch


@triton.jit
def place_of(i, C: tl.constexpr, PIXELS: tl.constexpr, LAST: tl.constexpr):
    """The offset in a ``[C, H, W]`` tensor of a map's ``i``-th number in memory. ``LAST``: maps are ``[H, W, C]``."""
    if LAST:
        return i % C * PIXELS + i // C
    else:
        return i


@triton.jit
def load_wide(ptr, offsets, inside):
    """Load numbers of any float type as float32, with 0 where ``inside`` is false."""
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, values, inside, INTERPRETED: tl.constexpr):
    """Store float32 ``values``, rounded to nearest. Triton's interpreter would truncate to bfloat16; GPUs round."""
    if INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        values = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    tl.store(ptr, values, mask=inside)


@triton.jit
def normalise(x, inside, eps, LENGTH: tl.constexpr):
    """``n`` and ``rstd`` of a map's float32 numbers ``x`` ``[BLOCK]``; n is 0 where ``inside`` is false."""
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
    """A program takes every ``num_programs``-th map. ``KEEP``: weight and bias stay in registers between maps."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    i = tl.arange(0, BLOCK)  # [BLOCK], like all tensors below
    inside = i < C * PIXELS
    place = place_of(i, C, PIXELS, LAST)
    weight = load_wide(weight_ptr, place, inside) if KEEP else 0.0
    bias = load_wide(bias_ptr, place, inside) if KEEP else 0.0
    first = program.to(tl.int64) * (C * PIXELS)
    for _ in range(program, maps, programs):
        x = load_wide(x_ptr + first, i, inside)
        if residual_ptr is not None:  # loaded before it is needed, so that the two reads overlap
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
    """Like the forward kernel. Sums over a program's maps go to ``sums_ptr`` ``[2, num_programs, C * PIXELS]``."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    i = tl.arange(0, BLOCK)  # [BLOCK], like all tensors below
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
    """Add the sums of all programs of ``norm_backward_kernel``, at BLOCK places of a map."""
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
    """Fill ``y[N, C, H, W]``, which is not empty and has ``x``'s strides.

    Tensors that are neither contiguous nor channels-last are copied first, and the result is copied back.
    """
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
    """Fill the gradients, except ``grad_residual`` if ``residual`` is None. Memory formats as in :func:`forward`."""
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


# The longest map for which a program keeps weight and bias in registers: at most 16 numbers of each per thread.
KEEP_FORWARD, KEEP_BACKWARD = 8192, 4096
SUM_BLOCK_PROGRAMS, SUM_BLOCK = 64, 16


def warps_for(block: int) -> int:
    """Warps for eight numbers of each tensor per thread, which leaves registers for seven tensors; at most 16."""
    return min(16, max(1, block // 256))


def channels_lie_last(x: Tensor) -> bool:
    """Whether maps are read as ``[H, W, C]``: only if ``x`` is channels-last and not contiguous as well."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _sizes(x: Tensor, last: bool, keep: int) -> dict[str, int | bool]:
    C, pixels = x.shape[1], x.shape[2] * x.shape[3]
    block = triton.next_power_of_2(C * pixels)
    sizes = {"C": C, "PIXELS": pixels, "BLOCK": block, "LAST": last, "KEEP": block <= keep}
    return sizes | {"num_warps": warps_for(block)}


def _programs(x: Tensor, num_warps: int) -> int:
    """As many programs as the GPU can run together, so that all get the same share; at most one per map."""
    if x.device.type != "cuda":
        return min(x.shape[0], 3)
    resident = 2048 // (32 * num_warps)
    return min(x.shape[0], resident * torch.cuda.get_device_properties(x.device).multi_processor_count)


def _as_maps(x: Tensor | None, last: bool) -> Tensor | None:
    """The tensor itself if it has the format of ``last``, otherwise a copy that has it."""
    return None if x is None else x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _to_fill(x: Tensor, last: bool) -> Tensor:
    wanted = torch.channels_last if last else torch.contiguous_format
    return x if x.is_contiguous(memory_format=wanted) else torch.empty_like(x, memory_format=wanted)


def _put_back(filled: Tensor, x: Tensor) -> None:
    if filled.data_ptr() != x.data_ptr():
        x.copy_(filled)
