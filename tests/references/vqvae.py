"""The multi-scale VQ-VAE in float64 as functions of a plain state dict; resizing by matrices written out here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
GROUPS = 4  # of the group norms in the small models; 32 in the published one


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's state dict, its floats in float64."""
    return {k: v.detach().double() if v.is_floating_point() else v for k, v in module.state_dict().items()}


def bicubic_matrix(source: int, target: int, a: float = -0.75) -> Tensor:
    """``[target, source]``: Keys' cubic convolution at pixel centres, the border repeated."""

    def kernel(t: float) -> float:
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    matrix = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(tap, 0), source - 1)] += kernel(centre - tap)
    return matrix


def area_matrix(source: int, target: int) -> Tensor:
    """``[target, source]``: the mean of every source pixel that a target pixel touches."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        start, stop = i * source // target, -(-(i + 1) * source // target)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def resized(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("ih,bchw,jw->bcij", matrix, x, matrix)


def pooled(x: Tensor, side: int) -> Tensor:
    return resized(x, area_matrix(x.shape[-1], side))


def phi_index(scale: int, num_scales: int, count: int = 4) -> int:
    """The phi layer whose tick is nearest the scale's place on the way from 0 to 1."""
    assert count == 4, "the published number"
    return int(np.argmin(np.abs(np.linspace(1 / 12, 11 / 12, 4) - scale / (num_scales - 1))))


def fused(weights: Weights, codes: Tensor, scale: int, sides: Sequence[int]) -> Tensor:
    """One scale's codes ``[B, l, C]`` as they enter the running sum, ``[B, C, H, W]``."""
    side, size = sides[scale], sides[-1]
    x = codes.transpose(1, 2).reshape(codes.shape[0], -1, side, side)
    if scale < len(sides) - 1:
        x = resized(x, bicubic_matrix(side, size))
    name = f"quantize.quant_resi.qresi_ls.{phi_index(scale, len(sides))}"
    return 0.5 * x + 0.5 * F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)


def quantized(weights: Weights, features: Tensor, sides: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Ids ``[B, l]`` and partial sums ``[B, C, H, W]`` of every scale."""
    codebook, rest, f_hat = weights["quantize.embedding.weight"], features, torch.zeros_like(features)
    ids, partial_sums = [], []
    for k, side in enumerate(sides):
        vectors = pooled(rest, side).flatten(2).transpose(1, 2)
        ids.append((vectors[:, :, None] - codebook).square().sum(-1).argmin(-1))
        step = fused(weights, codebook[ids[-1]], k, sides)
        f_hat, rest = f_hat + step, rest - step
        partial_sums.append(f_hat)
    return ids, partial_sums


def conv(weights: Weights, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
    weight = weights[f"{name}.weight"]
    padding = weight.shape[-1] // 2 if padding is None else padding
    return F.conv2d(x, weight, weights[f"{name}.bias"], stride=stride, padding=padding)


def normed(weights: Weights, name: str, x: Tensor) -> Tensor:
    grouped = x.reshape(x.shape[0], GROUPS, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    y = (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
    return y * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


def swished(weights: Weights, name: str, x: Tensor) -> Tensor:
    y = normed(weights, name, x)
    return y / (1 + torch.exp(-y))


def residual(weights: Weights, name: str, x: Tensor) -> Tensor:
    h = conv(weights, f"{name}.conv1", swished(weights, f"{name}.norm1", x))
    h = conv(weights, f"{name}.conv2", swished(weights, f"{name}.norm2", h))
    shortcut = f"{name}.nin_shortcut"
    return h + (conv(weights, shortcut, x) if f"{shortcut}.weight" in weights else x)


def attended(weights: Weights, name: str, x: Tensor) -> Tensor:
    channels = x.shape[1]
    q, k, v = conv(weights, f"{name}.qkv", normed(weights, f"{name}.norm", x)).flatten(2).split(channels, dim=1)
    mixing = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(channels)).softmax(-1)
    h = torch.einsum("bij,bcj->bci", mixing, v).reshape(x.shape)
    return x + conv(weights, f"{name}.proj_out", h)


def level(weights: Weights, name: str, x: Tensor) -> Tensor:
    i = 0
    while f"{name}.block.{i}.conv1.weight" in weights:
        x = residual(weights, f"{name}.block.{i}", x)
        if f"{name}.attn.{i}.qkv.weight" in weights:
            x = attended(weights, f"{name}.attn.{i}", x)
        i += 1
    return x


def middle(weights: Weights, name: str, x: Tensor) -> Tensor:
    x = attended(weights, f"{name}.attn_1", residual(weights, f"{name}.block_1", x))
    return residual(weights, f"{name}.block_2", x)


def num_levels(weights: Weights, name: str) -> int:
    return 1 + max(int(key.split(".")[2]) for key in weights if key.startswith(f"{name}."))


def encode(weights: Weights, images: Tensor) -> Tensor:
    """Images in [-1, 1] to the features that are quantized."""
    x = conv(weights, "encoder.conv_in", images)
    for i in range(num_levels(weights, "encoder.down")):
        x = level(weights, f"encoder.down.{i}", x)
        if f"encoder.down.{i}.downsample.conv.weight" in weights:
            wider = x.new_zeros(*x.shape[:2], x.shape[2] + 1, x.shape[3] + 1)  # one row below, one column on the right
            wider[:, :, :-1, :-1] = x
            x = conv(weights, f"encoder.down.{i}.downsample.conv", wider, stride=2, padding=0)
    x = swished(weights, "encoder.norm_out", middle(weights, "encoder.mid", x))
    return conv(weights, "quant_conv", conv(weights, "encoder.conv_out", x))


def decode(weights: Weights, f_hat: Tensor) -> Tensor:
    """Features to images, nominally in [-1, 1], not clamped."""
    x = conv(weights, "decoder.conv_in", conv(weights, "post_quant_conv", f_hat))
    x = middle(weights, "decoder.mid", x)
    for i in reversed(range(num_levels(weights, "decoder.up"))):
        x = level(weights, f"decoder.up.{i}", x)
        if f"decoder.up.{i}.upsample.conv.weight" in weights:
            x = conv(weights, f"decoder.up.{i}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv(weights, "decoder.conv_out", swished(weights, "decoder.norm_out", x))
