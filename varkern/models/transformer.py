"""The blocks of the VAR transformer: attention with L2-normalised queries and keys, and AdaLN conditioning.

Modules and parameters have the names of the published checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    """Multi-head self-attention over ``[B, l, width]`` with a key-value cache for generation.

    While :meth:`kv_caching` is on, each call appends its keys and values to a buffer of ``max_length`` tokens and
    attends to everything in the buffer.
    """

    zero_k_bias: Tensor

    def __init__(self, width: int, num_heads: int, l2_norm: bool, max_length: int):
        super().__init__()
        self.cached_k: Tensor | None
        self.cached_v: Tensor | None
        self.num_heads, self.head_dim, self.attn_l2_norm = num_heads, width // num_heads, l2_norm
        self.max_length = max_length
        if l2_norm:
            self.scale = 1.0
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
            self.max_scale_mul = math.log(100)
        else:
            self.scale = 0.25 / math.sqrt(self.head_dim)
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.kv_caching(False)

    def kv_caching(self, enable: bool) -> None:
        """Start with an empty cache (True), or free the cache and stop caching (False)."""
        self.growing = False
        self.caching, self.cached_k, self.cached_v, self.cached_length = enable, None, None, 0

    def keep_rows(self, rows: Tensor) -> None:
        """Keep these rows of the cache, ``[n]`` int64, in this order.

        From then on the cache grows with each call, so that rows that end early never take the memory of whole images.
        """
        self.growing = True
        for name in ("cached_k", "cached_v"):
            cache = getattr(self, name)
            if cache is not None:
                setattr(self, name, cache[:, :, : self.cached_length].index_select(0, rows))

    def _append(self, cache: Tensor | None, x: Tensor, end: int) -> Tensor:
        if self.growing:
            return x.contiguous() if cache is None else torch.cat((cache[:, :, : self.cached_length], x), 2)
        if cache is None:
            cache = x.new_empty(x.shape[0], self.num_heads, max(self.max_length, end), self.head_dim)
        cache[:, :, self.cached_length : end] = x
        return cache

    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, l, head_dim]
        if self.attn_l2_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
            k = F.normalize(k, dim=-1)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast F.normalize returns float32
        if self.caching:
            end = self.cached_length + k.shape[2]
            self.cached_k = self._append(self.cached_k, k, end)
            self.cached_v = self._append(self.cached_v, v, end)
            self.cached_length = end
            k, v = self.cached_k[:, :, :end], self.cached_v[:, :, :end]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class AdaLNSelfAttn(nn.Module):
    """Attention and feed-forward. Six vectors made from the condition scale, shift and gate them."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        norm_eps: float,
        shared_aln: bool,
        l2_norm: bool,
        max_length: int,
    ):
        super().__init__()
        self.C, self.shared_aln = width, shared_aln
        self.attn = SelfAttention(width, num_heads, l2_norm, max_length)
        self.ffn = FeedForward(width, round(width * mlp_ratio))
        self.ln_wo_grad = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=False)
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / math.sqrt(width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None) -> Tensor:
        """``x`` ``[B, l, width]``; ``cond_BD`` ``[B, width]``, or ``[B, 1, 6, width]`` if AdaLN is shared."""
        if self.shared_aln:
            modulation = self.ada_gss + cond_BD
        else:
            modulation = self.ada_lin(cond_BD).view(-1, 1, 6, self.C)
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        x = x + self.attn(self.ln_wo_grad(x) * (scale1 + 1) + shift1, attn_bias) * gate1
        return x + self.ffn(self.ln_wo_grad(x) * (scale2 + 1) + shift2) * gate2


class AdaLNBeforeHead(nn.Module):
    def __init__(self, width: int, norm_eps: float):
        super().__init__()
        self.C = width
        self.ln_wo_grad = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, cond_BD: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond_BD).view(-1, 1, 2, self.C).unbind(2)
        return self.ln_wo_grad(x) * (scale + 1) + shift


class SharedAdaLin(nn.Linear):
    """The modulation layer that all blocks share, ``[B, width] -> [B, 1, 6, width]``."""

    def forward(self, cond_BD: Tensor) -> Tensor:
        return super().forward(cond_BD).view(-1, 1, 6, self.weight.shape[0] // 6)
