"""Layer norm over the channels of each pixel, with what stands around it in a residual CNN, in one pass.

For a pixel's channels ``x`` (layer norm: Ba et al., 2016, eq. 4; LeakyReLU: Maas et al., 2013, section 2; the order of
the LSRS scorer's blocks, paper's appendix A)::

    z = x + input_bias
    p = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias + residual        # var: the mean of squares, no n - 1
    y = p if p > 0 else negative_slope * p

Bound by bytes: one read of ``x`` and ``residual`` and one write of ``y``; backward one read of ``x``, ``residual`` and
the gradient, and one write of each wanted gradient. Nothing is saved for backward but the inputs, which the layers
before have saved already: the statistics of a pixel are made anew, out of numbers that backward reads anyway.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from varkern.ops.backend import backend_for

MAX_CHANNELS = 4096  # a kernel's program holds whole pixels in its registers
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def channel_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    input_bias: Tensor | None = None,
    negative_slope: float | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``leaky_relu(layer_norm(x + input_bias) * weight + bias + residual)``, the norm over the channels of each pixel.

    Differentiable once in every tensor; gradients of ``weight``, ``bias`` and ``input_bias`` are sums in a fixed order,
    so equal inputs give equal gradients. Statistics and sums are float32, or float64 if ``x`` is.

    Arguments:
        x: ``[N, C, H, W]``, float32, bfloat16, float16 or float64, in any memory format; ``torch.channels_last`` is the
            fast one. Float64 and more than 4096 channels take the PyTorch form on every device.
        weight: ``[C]``, of any of these types, as are all the tensors that follow.
        bias: ``[C]``.
        residual: ``[N, C, H, W]``, added before the activation.
        input_bias: ``[C]``, added to ``x`` first: the bias of the convolution that made ``x``, which PyTorch's GPU
            convolutions would add in a pass of its own over the memory.
        negative_slope: of LeakyReLU; None: no activation.
        eps: added to the variance, > 0.

    Returns:
        ``[N, C, H, W]`` in ``x``'s dtype and memory format.

    Raises:
        ValueError, TypeError: a shape, device, dtype or number that does not fit, named.

    Example::

        >>> x = torch.randn(2, 8, 6, 6)
        >>> varkern.ops.channel_norm(x, torch.ones(8), torch.zeros(8), negative_slope=0.2).shape
        torch.Size([2, 8, 6, 6])
    """
    if x.dim() != 4 or x.shape[1] == 0:
        raise ValueError(f"x must have shape [N, C, H, W] with C at least 1, got {list(x.shape)}")
    channels = [x.shape[1]]
    _check("x", x, list(x.shape), x)
    _check("weight", weight, channels, x)
    _check("bias", bias, channels, x)
    _check("residual", residual, list(x.shape), x)
    _check("input_bias", input_bias, channels, x)
    if negative_slope is not None and (not isinstance(negative_slope, Real) or not math.isfinite(negative_slope)):
        raise ValueError(f"negative_slope must be a finite number or None, got {negative_slope!r}")
    if not isinstance(eps, Real) or not 0 < eps < math.inf:
        raise ValueError(f"eps must be a finite number > 0, got {eps!r}")
    slope = 1.0 if negative_slope is None else float(negative_slope)
    form = _norm_op if torch.compiler.is_compiling() or _kernels_take(x) else _norm_torch
    return form(x, weight, bias, residual, input_bias, slope, float(eps))


def _check(name: str, tensor: Tensor | None, shape: list[int], x: Tensor) -> None:
    if tensor is None:
        return
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {list(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def _kernels_take(x: Tensor) -> bool:
    return x.dtype != torch.float64 and x.shape[1] <= MAX_CHANNELS and backend_for(x) == "triton"


def _norm_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    slope: float,
    eps: float,
) -> Tensor:
    """Called as it is by :func:`channel_norm`, it leaves gradients to PyTorch's autograd, which is quicker on a CPU."""
    z, weight, bias = _widened(x, weight, bias, input_bias)
    p = F.layer_norm(z, x.shape[1:2], weight, bias, eps)
    if residual is not None:
        p += residual.permute(0, 2, 3, 1)
    if slope != 1:
        p = F.leaky_relu(p, slope, inplace=slope > 0)
    return _like(x, p.permute(0, 3, 1, 2))


def _widened(x: Tensor, weight: Tensor, bias: Tensor, input_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``x + input_bias`` as rows ``[N, H, W, C]``, weight and bias, all float32, or float64 if ``x`` is."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.permute(0, 2, 3, 1).to(wide)
    return z if input_bias is None else z + input_bias.to(wide), weight.to(wide), bias.to(wide)


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """``values`` in the dtype and memory format of ``tensor``, without a copy where they are so."""
    same = values.dtype == tensor.dtype and values.stride() == tensor.stride()
    return values if same else torch.empty_like(tensor).copy_(values)


@torch.library.custom_op("varkern::channel_norm", mutates_args=())
def _norm_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    slope: float,
    eps: float,
) -> Tensor:
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    if not _kernels_take(x):
        return _norm_torch(x, weight, bias, residual, input_bias, slope, eps)
    from varkern.kernels import norm

    norm.forward(x, weight, bias, residual, input_bias, y, slope, eps)
    return y


@_norm_op.register_fake
def _(x, weight, bias, residual, input_bias, slope, eps):
    return torch.empty_like(x)


@torch.library.custom_op("varkern::channel_norm_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    slope: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, residual and input_bias; empty for what is None."""
    if x.numel() and not _kernels_take(x):
        return _backward_torch(grad, x, weight, bias, residual, input_bias, slope, eps)
    gradients = _empty_gradients(x, weight, bias, residual, input_bias)
    if x.numel():
        from varkern.kernels import norm

        norm.backward(grad, x, weight, bias, residual, input_bias, *gradients, slope, eps)
    else:
        for gradient in gradients:
            gradient.zero_()
    return gradients


@_backward_op.register_fake
def _(grad, x, weight, bias, residual, input_bias, slope, eps):
    return _empty_gradients(x, weight, bias, residual, input_bias)


def _empty_gradients(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensors[0].new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in tensors)


def _backward_torch(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    slope: float,
    eps: float,
) -> tuple[Tensor, ...]:
    z, wide_weight, wide_bias = _widened(x, weight, bias, input_bias)
    p, mean, rstd = torch.native_layer_norm(z, x.shape[1:2], wide_weight, wide_bias, eps)
    if residual is not None:
        p += residual.permute(0, 2, 3, 1)
    grad_p = torch.ops.aten.leaky_relu_backward(grad.permute(0, 2, 3, 1).to(p.dtype), p, slope, False).contiguous()
    grad_z, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_p, z.contiguous(), x.shape[1:2], mean, rstd, wide_weight, wide_bias, [True, True, True]
    )
    return (
        _like(x, grad_z.permute(0, 3, 1, 2)),
        _like(weight, grad_weight),
        _like(bias, grad_bias),
        x.new_empty(0) if residual is None else _like(residual, grad_p.permute(0, 3, 1, 2)),
        x.new_empty(0) if input_bias is None else _like(input_bias, grad_z.sum((0, 1, 2))),
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
