"""VAR in float64, one step at a time, as functions of a plain state dict: no cache, no module, no fused anything.

Attention runs over the whole prefix under a block-causal mask at every scale. ``weights`` is a state dict in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import vqvae

Weights = Mapping[str, Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)


def attention(weights: Weights, name: str, x: Tensor, num_heads: int, visible: Tensor) -> Tensor:
    batch, length, width = x.shape
    qkv = x @ weights[f"{name}.mat_qkv.weight"].T
    q, k, v = qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :]
    q, v = q + weights[f"{name}.q_bias"], v + weights[f"{name}.v_bias"]  # keys have no bias
    q, k, v = (t.reshape(batch, length, num_heads, -1).transpose(1, 2) for t in (q, k, v))
    if f"{name}.scale_mul_1H11" in weights:
        factor = torch.exp(weights[f"{name}.scale_mul_1H11"].clamp(max=math.log(100)))
        scores = factor * unit(q) @ unit(k).transpose(2, 3)
    else:
        scores = q @ k.transpose(2, 3) * 0.25 / math.sqrt(width // num_heads)
    probabilities = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return linear(weights, f"{name}.proj", (probabilities @ v).transpose(1, 2).reshape(batch, length, width))


def modulation(weights: Weights, block: str, cond: Tensor) -> list[Tensor]:
    """Two gates, two scales, two shifts, ``[B, 1, width]`` each: first of attention, then of the feed-forward."""
    width = cond.shape[1]
    if f"{block}.ada_gss" in weights:
        shared = linear(weights, "shared_ada_lin.1", silu(cond)).reshape(-1, 6, width)
        vectors = shared + weights[f"{block}.ada_gss"].reshape(1, 6, width)
    else:
        vectors = linear(weights, f"{block}.ada_lin.1", silu(cond)).reshape(-1, 6, width)
    return [vectors[:, i : i + 1] for i in range(6)]


def logits_of(
    weights: Weights, labels: Tensor, inputs: Sequence[Tensor], sides: Sequence[int], num_heads: int
) -> Tensor:
    """Logits of the scales seen so far, ``[B, sum of l, V]``.

    Args:
        inputs: pooled features ``[B, l, C]`` of scales 1, 2, ...: one fewer than the scales asked for.
    """
    lengths = [side * side for side in sides[: len(inputs) + 1]]
    cond = weights["class_emb.weight"][labels]
    level = torch.cat([torch.full((length,), k) for k, length in enumerate(lengths)])
    x = torch.cat([cond[:, None] + weights["pos_start"], *(linear(weights, "word_embed", x) for x in inputs)], dim=1)
    x = x + weights["pos_1LC"][:, : len(level)] + weights["lvl_embed.weight"][level]
    visible = level[:, None] >= level[None, :]
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    for i in range(depth):
        block = f"blocks.{i}"
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation(weights, block, cond)
        attended = attention(weights, f"{block}.attn", layer_norm(x) * (1 + scale1) + shift1, num_heads, visible)
        x = x + gate1 * attended
        hidden = gelu_tanh(linear(weights, f"{block}.ffn.fc1", layer_norm(x) * (1 + scale2) + shift2))
        x = x + gate2 * linear(weights, f"{block}.ffn.fc2", hidden)
    width = cond.shape[1]
    scale, shift = linear(weights, "head_nm.ada_lin.1", silu(cond))[:, None].split(width, dim=-1)
    return linear(weights, "head", layer_norm(x) * (1 + scale) + shift)


def filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits ``[..., V]`` with the tokens that top-k, then the nucleus, drop at minus infinity."""
    if top_k:
        kth = logits.sort(dim=-1, descending=True).values[..., top_k - 1 : top_k]
        logits = torch.where(logits >= kth, logits, -math.inf)
    if top_p:
        # A token goes if what is no more probable, itself included, weighs at most 1 - top_p; never the last.
        order = logits.argsort(dim=-1)
        mass = logits.softmax(-1).gather(-1, order).cumsum(-1)
        keep = mass > 1 - top_p
        keep[..., -1] = True
        logits = logits.masked_fill(~keep.gather(-1, order.argsort(-1)), -math.inf)
    return logits


class Generated(NamedTuple):
    cond: list[Tensor]  # [B, l, V] a scale
    uncond: list[Tensor]
    tokens: list[Tensor]  # [B, l]
    f_hats: list[Tensor]  # [B, C, H, W], after the scale
    images: Tensor


def generate(
    weights: Weights,
    vae_weights: Weights,
    labels: Tensor,
    sides: Sequence[int],
    num_heads: int,
    sample: Callable[[int, Tensor], Tensor],
    cfg: float,
    more_smooth: Callable[[int, Tensor], Tensor] | None = None,
) -> Generated:
    """Images as published: guidance ramps with the scale, one running sum of features.

    Args:
        sample: ``(scale, guided logits [B, l, V]) -> tokens [B, l]``.
        more_smooth: ``(scale, guided logits) -> weights over the codebook [B, l, V]``, called after ``sample``.
    """
    last, count = len(sides) - 1, labels.shape[0]
    no_class = weights["class_emb.weight"].shape[0] - 1
    both = torch.cat([labels, torch.full_like(labels, no_class)])
    channels = vae_weights["quantize.embedding.weight"].shape[1]
    f_hat = torch.zeros(count, channels, sides[-1], sides[-1], dtype=torch.float64)
    out, inputs = Generated([], [], [], [], f_hat), []
    for k, side in enumerate(sides):
        logits = logits_of(weights, both, inputs, sides, num_heads)[:, -side * side :]
        cond, uncond = logits[:count], logits[count:]
        strength = cfg * k / last
        guided = (1 + strength) * cond - strength * uncond
        tokens = sample(k, guided)
        codes = vae_weights["quantize.embedding.weight"][tokens]
        if more_smooth is not None:
            codes = more_smooth(k, guided) @ vae_weights["quantize.embedding.weight"]
        f_hat = f_hat + vqvae.fused(vae_weights, codes, k, sides)
        for values, value in zip(out[:4], (cond, uncond, tokens, f_hat), strict=True):
            values.append(value)
        if k < last:
            pooled = vqvae.pooled(f_hat, sides[k + 1])
            inputs.append(torch.cat([pooled, pooled]).flatten(2).transpose(1, 2))
    return out._replace(images=(vqvae.decode(vae_weights, f_hat).clamp(-1, 1) + 1) / 2)
