"""Layer norm over all numbers of a map as its definition and as users of PyTorch write it."""

import torch
import torch.nn.functional as F


def exact_norm(x, weight, bias, residual=None, slope=None, eps=1e-5):
    """The definition, in float64, every sum over a map's flat numbers; differentiable."""
    flat = x.double().reshape(x.shape[0], -1)
    mean = flat.sum(1, keepdim=True) / flat.shape[1]
    variance = ((flat - mean) ** 2).sum(1, keepdim=True) / flat.shape[1]
    n = ((flat - mean) / (variance + eps).sqrt()).view(x.shape)
    p = n * weight.double() + bias.double()
    if residual is not None:
        p = p + residual.double()
    return p if slope is None else torch.where(p > 0, p, slope * p)


def eager_norm(x, weight, bias, residual=None, slope=None, eps=1e-5):
    """``nn.LayerNorm``, then the sum, then the activation: three passes, with PyTorch's roundings."""
    x = F.layer_norm(x, x.shape[1:], weight, bias, eps)
    if residual is not None:
        x = x + residual
    return x if slope is None else F.leaky_relu(x, slope)
