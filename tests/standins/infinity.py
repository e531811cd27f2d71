"""Infinity (FoundationVision/Infinity), small: of bit labels, with or without spatial patchify."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varkern.models.transformer import AdaLNBeforeHead, FeedForward, SharedAdaLin

from .infinity_vae import InfinityVAE
from .sampling import sampled


def rotations(schedule, half: int) -> Tensor:
    """Cosines and sines of every position of every scale, ``[2, 1, 1, 1, L, half]``."""
    _, height, width = schedule[-1]
    frequencies = 100.0 ** -(torch.arange(0, half, 2) / half)
    parts = []
    for _, h, w in schedule:
        rows, columns = torch.meshgrid(torch.arange(h) * height / h, torch.arange(w) * width / w, indexing="ij")
        parts.append(
            torch.cat([rows.flatten()[:, None] * frequencies, columns.flatten()[:, None] * frequencies], dim=1)
        )
    angles = torch.cat(parts)
    return torch.stack([angles.cos(), angles.sin()])[:, None, None, None]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1).flatten(-2)


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), 4.0).log())
        self.mat_qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.kv_caching(False)

    def kv_caching(self, enable: bool) -> None:
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(self, x, attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind):
        batch, length, width = x.shape
        q, k, v = self.mat_qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(math.log(100)).exp(), F.normalize(k, dim=-1)
        start = sum(h * w for _, h, w in scale_schedule[:scale_ind])
        cos, sin = rope2d_freqs_grid[str(tuple(scale_schedule))].to(x.device)[..., start : start + length, :].squeeze(1)
        q, k = (rotated(t.float(), cos, sin) for t in (q, k))
        if self.caching and self.cached_k is not None:
            k, v = torch.cat((self.cached_k, k), dim=2), torch.cat((self.cached_v, v), dim=2)
        if self.caching:
            self.cached_k, self.cached_v = k, v
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, scale=1.0)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class CrossAttention(nn.Module):
    """Attention to texts of any lengths that stand one after the other, ``[N, Ct5]``; without queries, a learnt one."""

    def __init__(self, width: int, kv_dim: int, num_heads: int, pool: bool = False):
        super().__init__()
        self.num_heads, self.pool = num_heads, pool
        self.mat_q = nn.Parameter(torch.zeros(1, 1, width)) if pool else nn.Linear(width, width)
        self.mat_kv, self.proj = nn.Linear(kv_dim, 2 * width), nn.Linear(width, width)

    def forward(self, q, ca_kv):
        features, sums, _ = ca_kv
        batch = len(sums) - 1
        q = self.mat_q.expand(batch, -1, -1) if self.pool else self.mat_q(q)
        k, v = self.mat_kv(features).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2) for t in (q, k, v))
        text = torch.bucketize(torch.arange(len(features), device=sums.device), sums[1:], right=True)
        mine = text == torch.arange(batch, device=sums.device)[:, None]
        k, v = (t.expand(batch, -1, -1, -1) for t in (k, v))
        out = F.scaled_dot_product_attention(q.to(v.dtype), k, v, attn_mask=mine[:, None, None, :])
        return self.proj(out.transpose(1, 2).flatten(2))


class TextAttentivePool(nn.Module):
    def __init__(self, width: int, kv_dim: int):
        super().__init__()
        self.ca = CrossAttention(width, kv_dim, 2, pool=True)

    def forward(self, ca_kv):
        return self.ca(None, ca_kv).squeeze(1)


class CrossAttnBlock(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.sa, self.ca = SelfAttention(width, num_heads), CrossAttention(width, width, num_heads)
        self.ffn = FeedForward(width, 4 * width)
        self.ln_wo_grad, self.ca_norm = nn.LayerNorm(width, elementwise_affine=False), nn.LayerNorm(width)
        self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, width))

    def forward(
        self, x, cond_BD, ca_kv, attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind
    ):
        gate1, gate2, scale1, scale2, shift1, shift2 = (self.ada_gss + cond_BD).unbind(2)
        y = self.ln_wo_grad(x.float()) * (scale1 + 1) + shift1
        y = self.sa(y, attn_bias_or_two_vector, attn_fn, scale_schedule, rope2d_freqs_grid, scale_ind)
        x = x + y * gate1
        x = x + self.ca(self.ca_norm(x), ca_kv).float()
        return x + self.ffn(self.ln_wo_grad(x.float()) * (scale2 + 1) + shift2) * gate2


class Chunk(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.module = nn.ModuleList(blocks)


class Infinity(nn.Module):
    """The KV caches stay open on an exception; the blocks are registered in their chunks alone.

    Args:
        schedules: those whose rotary embedding exists.
    """

    def __init__(
        self,
        vae_local: InfinityVAE,
        schedules,
        width: int = 32,
        depth: int = 4,
        apply_spatial_patchify: int = 0,
        add_lvl_embeding_only_first_block: int = 1,
    ):
        super().__init__()
        self.C, self.Ct5, self.num_heads = width, 12, 2
        self.apply_spatial_patchify, self.use_bit_label = apply_spatial_patchify, 1
        self.d_vae = vae_local.embed_dim * (4 if apply_spatial_patchify else 1)
        self.V = 2 * self.d_vae
        self.add_lvl_embeding_only_first_block = add_lvl_embeding_only_first_block
        self.top_k, self.top_p, self.use_flex_attn = 0, 0, False
        self.rng = torch.Generator()
        self.cfg_uncond = nn.Parameter(torch.zeros(16, self.Ct5))
        self.text_norm = nn.RMSNorm(self.Ct5, eps=1e-6)
        self.text_proj_for_sos = TextAttentivePool(width, self.Ct5)
        self.text_proj_for_ca = nn.Sequential(nn.Linear(self.Ct5, width), nn.GELU(), nn.Linear(width, width))
        self.pos_start = nn.Parameter(torch.zeros(1, 1, width))
        half = width // self.num_heads // 2
        self.rope2d_freqs_grid = {str(tuple(s)): rotations(s, half) for s in schedules}
        self.lvl_embed = nn.Embedding(15, width)
        self.norm0_ve = nn.LayerNorm(self.d_vae)
        self.word_embed = nn.Linear(self.d_vae, width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), SharedAdaLin(width, 6 * width))
        self.unregistered_blocks = [CrossAttnBlock(width, self.num_heads) for _ in range(depth)]
        self.num_block_chunks = 2
        half_depth = depth // 2
        self.block_chunks = nn.ModuleList(
            Chunk(self.unregistered_blocks[i : i + half_depth]) for i in range(0, depth, half_depth)
        )
        self.head_nm = AdaLNBeforeHead(width, 1e-6)
        self.head = nn.Linear(width, self.V)

    def get_logits(self, h: Tensor, cond_BD: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            return self.head(self.head_nm(h.float(), cond_BD.float()))

    def add_lvl_embeding(self, feature, scale_ind, scale_schedule, need_to_pad=0):
        batch, length, _ = feature.shape
        level = scale_ind * torch.ones((batch, length), dtype=torch.int)
        feature[:, :length] += self.lvl_embed(level.to(feature.device))
        return feature

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self,
        vae=None,
        scale_schedule=None,
        label_B_or_BLT=None,
        B=1,
        negative_label_B_or_BLT=None,
        force_gt_Bhw=None,
        g_seed=None,
        cfg_list=[],  # noqa: B006 - the published signature
        tau_list=[],  # noqa: B006
        cfg_sc=3,
        top_k=0,
        top_p=0.0,
        returns_vemb=0,
        ratio_Bl1=None,
        gumbel=0,
        norm_cfg=False,
        cfg_exp_k: float = 0.0,
        cfg_insertion_layer=[-5],  # noqa: B006
        vae_type=0,
        softmax_merge_topk=-1,
        ret_img=False,
        trunk_scale=1000,
        gt_leak=0,
        gt_ls_Bl=None,
        inference_mode=False,
        save_img_path=None,
        sampling_per_bits=1,
    ):
        rng = None if g_seed is None else self.rng.manual_seed(g_seed)
        assert len(cfg_list) >= len(scale_schedule) and len(tau_list) >= len(scale_schedule)
        doubled = bool(any(np.array(cfg_list) != 1))
        features, sums, longest = conditioned(self, label_B_or_BLT, negative_label_B_or_BLT, doubled)
        features = self.text_norm(features)
        cond = self.text_proj_for_sos((features, sums, longest))
        ca_kv = (self.text_proj_for_ca(features), sums, longest)
        x = cond[:, None] + self.pos_start
        modulation = self.shared_ada_lin(cond.float()).float()
        assert inference_mode
        for block in self.unregistered_blocks:
            block.sa.kv_caching(True)
        layers = [len(self.unregistered_blocks) + layer for layer in cfg_insertion_layer if layer < 0]
        state = Bits(self, vae, scale_schedule)
        for k in range(min(len(scale_schedule), trunk_scale)):
            cfg, depth = cfg_list[k], 0
            for i, chunk in enumerate(self.block_chunks):
                if i == 0 or not self.add_lvl_embeding_only_first_block:
                    x = self.add_lvl_embeding(x, k, scale_schedule)
                for block in chunk.module:
                    x = block(
                        x=x,
                        cond_BD=modulation,
                        ca_kv=ca_kv,
                        attn_bias_or_two_vector=None,
                        attn_fn=None,
                        scale_schedule=scale_schedule,
                        rope2d_freqs_grid=self.rope2d_freqs_grid,
                        scale_ind=k,
                    )
                    if cfg != 1 and depth in layers:
                        x = cfg * x[:B] + (1 - cfg) * x[B:]
                        x = torch.cat((x, x))
                    depth += 1
            if cfg != 1 and 0 in cfg_insertion_layer:
                logits = self.get_logits(x, cond) * (1 / tau_list[k])
                logits = cfg * logits[:B] + (1 - cfg) * logits[B:]
            else:
                logits = self.get_logits(x[:B], cond[:B]) * (1 / tau_list[k])
            bits = sampled(logits.reshape(B, -1, 2), top_k or self.top_k, top_p or self.top_p, rng)
            drawn = bits.reshape(*logits.shape[:2], -1)
            words = state.keep(k, drawn, gt_ls_Bl[k] if k < gt_leak else None)
            if k + 1 < len(scale_schedule):
                x = self.word_embed(self.norm0_ve(words)).repeat(2 if doubled else 1, 1, 1)
        for block in self.unregistered_blocks:
            block.sa.kv_caching(False)
        if not ret_img:
            return [], [], []
        image = (state.decoded() + 1) / 2
        return [], [], image.permute(0, 2, 3, 1).mul_(255).to(torch.uint8).flip(dims=(3,))


def conditioned(model: Infinity, text, negative, doubled):
    """Texts, and with guidance after them the negative ones or the learnt no-text."""
    features, lengths, sums, longest = text
    if doubled and negative:
        features = torch.cat((features, negative[0]))
        sums, longest = torch.cat((sums, negative[2][1:] + sums[-1])), max(longest, negative[3])
    elif doubled:
        none = torch.cat([features[:0], *(model.cfg_uncond[:length] for length in lengths)])
        features, sums = torch.cat((features, none.to(features.dtype))), torch.cat((sums, sums[1:] + sums[-1]))
    return features, sums, longest


class Bits:
    """The published way with bits: codes resized to the last side and summed."""

    def __init__(self, model: Infinity, vae: InfinityVAE, schedule):
        self.vae, self.patchify, self.schedule = vae, model.apply_spatial_patchify, schedule
        self.sizes = [(t, 2 * h, 2 * w) for t, h, w in schedule] if self.patchify else schedule
        self.summed = 0

    def keep(self, k, drawn, given):
        mode, last = self.vae.quantizer.z_interplote_up, k + 1 == len(self.schedule)
        bits = given
        if given is None:
            _, h, w = self.schedule[k]
            bits = drawn.reshape(len(drawn), h, w, -1)
            if self.patchify:
                bits = F.pixel_shuffle(bits.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
            bits = bits.unsqueeze(1)
        codes = self.vae.quantizer.lfq.indices_to_codes(bits, label_type="bit_label")
        self.summed = self.summed + (codes if last else F.interpolate(codes, size=self.sizes[-1], mode=mode))
        if last:
            return None
        words = F.interpolate(self.summed, size=self.sizes[k + 1], mode=mode).squeeze(2)
        words = F.pixel_unshuffle(words, 2) if self.patchify else words
        return words.reshape(*words.shape[:2], -1).permute(0, 2, 1)

    def decoded(self):
        return self.vae.decode(self.summed.squeeze(2))
