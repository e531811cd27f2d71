"""Layer norm over all numbers of a map, with the residual and activation that follow it in a residual CNN, in one pass.

For the numbers ``x`` of one map ``[C, H, W]``::

    p = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias + residual        # var: divided by n, not n - 1
    y = p if p > 0 else negative_slope * p

Source: layer norm of Ba et al., 2016, eq. 4; LeakyReLU of Maas et al., 2013, section 2; the order of operations in the
blocks of the published LSRS scorer. Bound by bytes: forward reads ``x`` and ``residual`` once and writes ``y`` once;
backward reads ``x``, ``residual`` and the gradient once and writes each required gradient once. Only the inputs are
saved for backward, which the layers before have saved already. The statistics of a map are computed again, from numbers
that backward has to read anyway.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from varkern.ops.backend import backend_for

MAX_NUMBERS = 16_384  # per map: a program of the kernel holds a whole map in registers
MAX_NUMBERS_BACKWARD = 8_192  # the backward kernel holds three tensors and two sums in registers
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of x, weight, bias and residual
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def map_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    negative_slope: float | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``leaky_relu(layer_norm(x) * weight + bias + residual)``, with the norm over the ``C * H * W`` numbers of a map.

    The op is differentiable once with respect to every tensor. Gradients of ``weight`` and ``bias`` are summed in a
    fixed order, so equal inputs give equal gradients. Statistics and sums are float32, or float64 if ``x`` is float64.
    A map's result does not depend on the other maps of its batch.

    Arguments:
        x: ``[N, C, H, W]``, float32, bfloat16, float16 or float64. Contiguous and ``torch.channels_last`` tensors are
            read in place, others are copied first. The PyTorch form runs on every device for float64 and for maps of
            more than 16,384 numbers (backward: 8,192).
        weight: ``[C, H, W]``. This and the tensors below may have any of the four dtypes.
        bias: ``[C, H, W]``.
        residual: ``[N, C, H, W]``, added before the activation.
        negative_slope: slope of LeakyReLU for negative numbers; None for no activation.
        eps: number added to the variance, > 0.

    Returns:
        ``[N, C, H, W]`` in ``x``'s dtype and memory format.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, device, dtype or value.

    Example::

        >>> x = torch.randn(2, 8, 6, 6)
        >>> varkern.ops.map_norm(x, torch.ones(8, 6, 6), torch.zeros(8, 6, 6), negative_slope=0.2).shape
        torch.Size([2, 8, 6, 6])
    """
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must have shape [N, C, H, W] with C, H and W at least 1, got {list(x.shape)}")
    one_map = list(x.shape[1:])
    _check("x", x, list(x.shape), x)
    _check("weight", weight, one_map, x)
    _check("bias", bias, one_map, x)
    _check("residual", residual, list(x.shape), x)
    if negative_slope is not None and (not isinstance(negative_slope, Real) or not math.isfinite(negative_slope)):
        raise ValueError(f"negative_slope must be a finite number or None, got {negative_slope!r}")
    if not isinstance(eps, Real) or not 0 < eps < math.inf:
        raise ValueError(f"eps must be a finite number > 0, got {eps!r}")
    slope = 1.0 if negative_slope is None else float(negative_slope)
    form = _norm_op if torch.compiler.is_compiling() or _kernels_take(x, MAX_NUMBERS) else _norm_torch
    return form(x, weight, bias, residual, slope, float(eps))


def _check(name: str, tensor: Tensor | None, shape: list[int], x: Tensor) -> None:
    if tensor is None:
        return
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {list(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def _kernels_take(x: Tensor, most: int) -> bool:
    return x.dtype != torch.float64 and math.prod(x.shape[1:]) <= most and backend_for(x) == "triton"


def channels_lie_last(x: Tensor) -> bool:
    """Whether ``x`` is channels-last. A tensor that is contiguous as well counts as NCHW."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _norm_torch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, slope: float, eps: float) -> Tensor:
    """The PyTorch form. :func:`map_norm` may call it directly: PyTorch's autograd is faster than the op's on a CPU."""
    wide, last = torch.promote_types(x.dtype, torch.float32), channels_lie_last(x)
    z, weight, bias = (_to_memory_order(tensor, last, wide) for tensor in (x, weight, bias))
    p = F.layer_norm(z, z.shape[1:], weight, bias, eps)
    if residual is not None:
        p += _to_memory_order(residual, last, wide)
    if slope != 1:
        p = F.leaky_relu(p, slope, inplace=slope > 0)
    return _match_format(x, p.permute(0, 3, 1, 2) if last else p)


def _to_memory_order(tensor: Tensor, last: bool, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, with ``[..., C, H, W]`` permuted to ``[..., H, W, C]`` if channels lie ``last``."""
    return (tensor.movedim(-3, -1) if last else tensor).to(dtype)


def _match_format(tensor: Tensor, values: Tensor) -> Tensor:
    """``values`` in the dtype and memory format of ``tensor``, copied only if they differ."""
    same = values.dtype == tensor.dtype and values.stride() == tensor.stride()
    return values if same else torch.empty_like(tensor).copy_(values)


@torch.library.custom_op("varkern::map_norm", mutates_args=())
def _norm_op(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, slope: float, eps: float) -> Tensor:
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    if not _kernels_take(x, MAX_NUMBERS):
        return _norm_torch(x, weight, bias, residual, slope, eps)
    from varkern.kernels import norm

    norm.forward(x, weight, bias, residual, y, slope, eps)
    return y


@_norm_op.register_fake
def _(x, weight, bias, residual, slope, eps):
    return torch.empty_like(x)


@torch.library.custom_op("varkern::map_norm_backward", mutates_args=())
def _backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, slope: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual; the last is empty if residual is None."""
    if x.numel() and not _kernels_take(x, MAX_NUMBERS_BACKWARD):
        return _backward_torch(grad, x, weight, bias, residual, slope, eps)
    gradients = _empty_gradients(x, weight, bias, residual)
    if x.numel():
        from varkern.kernels import norm

        norm.backward(grad, x, weight, bias, residual, *gradients, slope, eps)
    else:
        for gradient in gradients:
            gradient.zero_()
    return gradients


@_backward_op.register_fake
def _(grad, x, weight, bias, residual, slope, eps):
    return _empty_gradients(x, weight, bias, residual)


def _empty_gradients(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Gradients:
    added = x.new_empty(0) if residual is None else torch.empty_like(residual)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), added


def _backward_torch(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, slope: float, eps: float
) -> Gradients:
    wide, last = torch.promote_types(x.dtype, torch.float32), channels_lie_last(x)
    grad, z, wide_weight, wide_bias = (
        _to_memory_order(tensor, last, wide).contiguous() for tensor in (grad, x, weight, bias)
    )
    p, mean, rstd = torch.native_layer_norm(z, z.shape[1:], wide_weight, wide_bias, eps)
    if residual is not None:
        p += _to_memory_order(residual, last, wide)
    grad_p = torch.ops.aten.leaky_relu_backward(grad, p, slope, False)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_p, z, z.shape[1:], mean, rstd, wide_weight, wide_bias, [True, True, True]
    )
    if last:
        grad_x, grad_weight, grad_bias, grad_p = (t.movedim(-1, -3) for t in (grad_x, grad_weight, grad_bias, grad_p))
    return (
        _match_format(x, grad_x),
        _match_format(weight, grad_weight),
        _match_format(bias, grad_bias),
        x.new_empty(0) if residual is None else _match_format(residual, grad_p),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.slope, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    tensors = ctx.saved_tensors
    gradients = _backward_op(grad, *tensors, ctx.slope, ctx.eps)
    wanted = (
        gradient if tensor is not None and needed else None
        for gradient, tensor, needed in zip(gradients, tensors, ctx.needs_input_grad, strict=False)
    )
    return *wanted, None, None


_norm_op.register_autograd(_backward, setup_context=_setup_context)
