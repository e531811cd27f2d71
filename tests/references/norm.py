"""Layer norm over a pixel's channels as its definition and as users of PyTorch write it; the scorer likewise."""

import torch
import torch.nn.functional as F


def exact_norm(x, weight, bias, residual=None, input_bias=None, slope=None, eps=1e-5):
    """The definition, in float64, every sum written out; differentiable."""
    x, weight, bias = x.double(), weight.double()[:, None, None], bias.double()[:, None, None]
    if input_bias is not None:
        x = x + input_bias.double()[:, None, None]
    mean = sum(x.unbind(1)) / x.shape[1]
    variance = sum((channel - mean) ** 2 for channel in x.unbind(1)) / x.shape[1]
    p = (x - mean.unsqueeze(1)) / (variance + eps).sqrt().unsqueeze(1) * weight + bias
    if residual is not None:
        p = p + residual.double()
    return p if slope is None else torch.where(p > 0, p, slope * p)


def eager_norm(x, weight, bias, residual=None, slope=None, eps=1e-5):
    """``nn.LayerNorm`` on permuted axes, then the sum, then the activation: three passes, with PyTorch's roundings."""
    x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, eps).permute(0, 3, 1, 2)
    if residual is not None:
        x = x + residual
    return x if slope is None else F.leaky_relu(x, slope)


def eager_scores(scorer, labels, features, scale):
    """Scores ``[N]`` of ``[N]`` labels and ``[N, C, H, W]`` features, every layer by PyTorch's own function in the
    dtype of the scorer's weights: the scorer as it is written without kernels."""

    def norm(x, layer, residual=None, slope=None):
        return eager_norm(x, layer.weight, layer.bias, residual, slope, layer.eps)

    x, layers = features, list(scorer.visual)
    for convolution, first_norm, block in zip(layers[0::3], layers[1::3], layers[2::3], strict=True):
        x = norm(convolution(x), first_norm)
        y = norm(block.branch[0](x), block.branch[1], slope=0.2)
        y = norm(block.branch[3](y), block.branch[4], slope=0.2)
        x = norm(block.branch[6](y), block.branch[7], residual=x, slope=0.2)
    scales = torch.full_like(labels, scale)
    x = torch.cat((x.flatten(1), scorer.class_embedding(labels), scorer.scale_embedding(scales)), dim=1)
    for layer in scorer.head:
        x = F.linear(x, layer.weight, layer.bias) if hasattr(layer, "weight") else F.leaky_relu(x, 0.2)
    return x.squeeze(1).float()
