"""The VAR transformer: next-scale prediction over the token maps of a multi-scale VQ-VAE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from varkern.published import filter_logits, gumbel_softmax, mix_codes, sample_multinomial, smoothing_temperature

from .initialization import initialize
from .quantizer import VectorQuantizer
from .transformer import AdaLNBeforeHead, AdaLNSelfAttn, SharedAdaLin
from .vqvae import VQVAE

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


class VAR(nn.Module):
    """The published VAR model, whose checkpoints load with ``strict=True``.

    Args:
        vae_local: VQ-VAE whose tokens the model predicts. It is stored in ``vae_proxy`` and is not a submodule.
        num_classes: number of classes. Row ``num_classes`` of the class embedding means "no class".
        depth: number of blocks. The published models have ``embed_dim = 64 * depth`` and ``num_heads = depth``.
        embed_dim: width; ``None`` for ``64 * depth``.
        num_heads: number of attention heads; ``None`` for ``depth``.
        mlp_ratio: ratio of the feed-forward layers' hidden width to the width.
        norm_eps: epsilon of the layer norms.
        shared_aln: whether all blocks share one modulation layer, as in the 512 px model.
        cond_drop_rate: probability that training drops the class.
        attn_l2_norm: whether queries and keys are normalised, with a learned scale per head.
        patch_nums: side of each scale's token map.

    Raises:
        ValueError: ``embed_dim`` is not a multiple of ``num_heads``, or ``patch_nums`` differs from that of vae_local.

    The arguments are kept in ``config``, a plain dictionary.
    """

    config: dict[str, Any]
    vae_proxy: tuple[VQVAE]
    vae_quant_proxy: tuple[VectorQuantizer]
    Cvae: int
    V: int
    num_classes: int
    depth: int
    C: int
    D: int
    num_heads: int
    cond_drop_rate: float
    patch_nums: tuple[int, ...]
    first_l: int
    L: int
    num_stages_minus_1: int
    rng: torch.Generator
    word_embed: nn.Linear
    class_emb: nn.Embedding
    pos_start: nn.Parameter
    pos_1LC: nn.Parameter
    lvl_embed: nn.Embedding
    shared_ada_lin: nn.Sequential | nn.Identity
    head_nm: AdaLNBeforeHead
    head: nn.Linear
    lvl_1L: Tensor
    attn_bias_for_masking: Tensor
    blocks: Any  # a ModuleList, whose type does not tell what its modules have

    def __init__(
        self,
        vae_local: VQVAE,
        num_classes: int = 1000,
        depth: int = 16,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        shared_aln: bool = False,
        cond_drop_rate: float = 0.1,
        attn_l2_norm: bool = True,
        patch_nums: Sequence[int] = PATCH_NUMS_256,
    ):
        super().__init__()
        width, num_heads = embed_dim or 64 * depth, num_heads or depth
        if width % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads={num_heads}, got {width}")
        sides = vae_local.quantize.v_patch_nums
        if tuple(sides) != tuple(patch_nums):
            raise ValueError(f"patch_nums must be those of vae_local, {tuple(sides)}, got {tuple(patch_nums)}")
        self.config = {
            "num_classes": num_classes,
            "depth": depth,
            "embed_dim": width,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "norm_eps": norm_eps,
            "shared_aln": shared_aln,
            "cond_drop_rate": cond_drop_rate,
            "attn_l2_norm": attn_l2_norm,
            "patch_nums": list(patch_nums),
        }
        self.vae_proxy, self.vae_quant_proxy = (vae_local,), (vae_local.quantize,)
        self.Cvae, self.V = vae_local.Cvae, vae_local.vocab_size
        self.num_classes, self.depth, self.C, self.D, self.num_heads = num_classes, depth, width, width, num_heads
        self.cond_drop_rate = cond_drop_rate
        self.patch_nums = tuple(patch_nums)
        lengths = [side * side for side in self.patch_nums]
        self.first_l, self.L = lengths[0], sum(lengths)
        self.num_stages_minus_1 = len(lengths) - 1
        self.rng = torch.Generator()

        self.word_embed = nn.Linear(self.Cvae, width)
        self.class_emb = nn.Embedding(num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, self.first_l, width))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.L, width))
        self.lvl_embed = nn.Embedding(len(lengths), width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), SharedAdaLin(width, 6 * width)) if shared_aln else nn.Identity()
        self.blocks = nn.ModuleList(
            AdaLNSelfAttn(width, num_heads, mlp_ratio, norm_eps, shared_aln, attn_l2_norm, self.L) for _ in range(depth)
        )
        levels = torch.cat([torch.full((length,), k) for k, length in enumerate(lengths)])
        self.register_buffer("lvl_1L", levels.unsqueeze(0))
        hidden = levels.unsqueeze(1) < levels.unsqueeze(0)  # a token attends to its own scale and those before it
        self.register_buffer("attn_bias_for_masking", torch.zeros(1, 1, self.L, self.L).masked_fill(hidden, -math.inf))
        self.head_nm = AdaLNBeforeHead(width, norm_eps)
        self.head = nn.Linear(width, self.V)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set random weights. Residual branches start with gates near 0, and their weights shrink with depth."""
        if self.lvl_1L.is_meta:
            return
        initialize(self)
        std = math.sqrt(1 / (3 * self.C))
        for tensor in (self.class_emb.weight, self.lvl_embed.weight, self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(tensor, std=std)
        for block in self.blocks:
            for branch in (block.attn.proj, block.ffn.fc2):
                branch.weight.div_(math.sqrt(2 * len(self.blocks)))
                branch.bias.zero_()
            if block.shared_aln:
                block.ada_gss[:, :, :2] *= 1e-5
            else:
                block.ada_lin[1].weight[: 2 * self.C] *= 1e-5
                block.ada_lin[1].bias.zero_()
        self.head.weight.mul_(0.02)
        self.head.bias.zero_()

    def get_logits(self, h: Tensor, cond_BD: Tensor) -> Tensor:
        """Features of the last block ``[B, l, width]`` to logits ``[B, l, V]`` float32."""
        h = h.to(self.head.weight.dtype)
        return self.head(self.head_nm(h, cond_BD).to(h.dtype)).float()

    def forward(self, label_B: Tensor, x_BLCv_wo_first_l: Tensor) -> Tensor:
        """The logits of every token with teacher forcing, for training.

        Args:
            label_B: class labels ``[B]`` int64; in training mode dropped with probability ``cond_drop_rate``.
            x_BLCv_wo_first_l: result of the quantizer's ``idxBl_to_var_input``, ``[B, L - l_0, C]``.

        Returns:
            Logits ``[B, L, V]`` float32.
        """
        if self.training and self.cond_drop_rate > 0:
            dropped = torch.rand(label_B.shape[0], device=label_B.device) < self.cond_drop_rate
            label_B = torch.where(dropped, self.num_classes, label_B)
        cond = self.class_emb(label_B)
        start = cond.unsqueeze(1) + self.pos_start
        x = torch.cat((start, self.word_embed(x_BLCv_wo_first_l.to(start.dtype))), dim=1)
        x = x + self.lvl_embed(self.lvl_1L) + self.pos_1LC
        modulation = self.shared_ada_lin(cond)
        bias = self.attn_bias_for_masking.to(torch.get_autocast_dtype(x.device.type) if autocasting(x) else x.dtype)
        for block in self.blocks:
            x = block(x=x, cond_BD=modulation, attn_bias=bias)
        return self.get_logits(x, cond)

    def _generator(self, g_seed: int | Tensor | None) -> torch.Generator | None:
        if g_seed is None:
            return None
        if isinstance(g_seed, Tensor):
            raise TypeError("g_seed must be an int or None unless varkern.patch was called on the model, got a tensor")
        if self.rng.device != self.lvl_1L.device:
            self.rng = torch.Generator(self.lvl_1L.device)
        return self.rng.manual_seed(g_seed)

    def draw_labels(self, B: int, label_B: int | Tensor | None, generator: torch.Generator | None) -> Tensor:
        """The labels ``[B]`` for the argument ``label_B`` of :meth:`autoregressive_infer_cfg`."""
        device = self.lvl_1L.device
        if label_B is None:
            uniform = torch.full((1, self.num_classes), 1.0 / self.num_classes, device=device)
            return torch.multinomial(uniform, B, replacement=True, generator=generator).view(B)
        if isinstance(label_B, int):
            return torch.full((B,), self.num_classes if label_B < 0 else label_B, device=device)
        return label_B.to(device)

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self,
        B: int,
        label_B: int | Tensor | None,
        g_seed: int | Tensor | None = None,
        cfg: float | Tensor = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        more_smooth: bool = False,
    ) -> Tensor:
        """Generate images scale by scale with classifier-free guidance and one candidate per scale.

        Args:
            B: number of images.
            label_B: class labels ``[B]`` int64; an int for all images (negative: no class); None for random classes.
            g_seed: seed for the model's generator ``rng``; None to use PyTorch's default generator without reseeding.
                A patched model also takes a tensor of image seeds.
            cfg: guidance at the last scale, a number or ``[B, 1, 1]``. It increases linearly from 0 at the first scale.
            top_k: number of most probable tokens to keep, plus ties with the last of them; 0 keeps all.
            top_p: probability mass of most probable tokens to keep after ``top_k``; 0 keeps all.
            more_smooth: whether to mix codes by a Gumbel softmax. It makes images smoother, but is not for metrics.

        Returns:
            Images ``[B, 3, H, W]`` in [0, 1].
        """
        generator = self._generator(g_seed)
        labels = self.draw_labels(B, label_B, generator)
        quantizer, last = self.vae_quant_proxy[0], self.num_stages_minus_1
        cond = self.class_emb(torch.cat((labels, torch.full_like(labels, self.num_classes))))
        modulation = self.shared_ada_lin(cond)
        positions = self.lvl_embed(self.lvl_1L) + self.pos_1LC
        x = cond.unsqueeze(1) + self.pos_start + positions[:, : self.first_l]
        side = self.patch_nums[-1]
        f_hat = cond.new_zeros(B, self.Cvae, side, side)  # with the dtype of the weights, as published
        end = 0
        for block in self.blocks:
            block.attn.kv_caching(True)
        try:
            for k, side in enumerate(self.patch_nums):
                end += side * side
                for block in self.blocks:
                    x = block(x=x, cond_BD=modulation, attn_bias=None)
                ratio = k / max(last, 1)
                strength = cfg * ratio
                logits = self.get_logits(x, cond)
                logits = filter_logits((1 + strength) * logits[:B] - strength * logits[B:], top_k, top_p)
                tokens = sample_multinomial(logits, 1, generator)[:, 0]
                codes = quantizer.embedding(tokens)
                if more_smooth:
                    weights = gumbel_softmax(logits * (1 + ratio), smoothing_temperature(ratio), generator)
                    codes = mix_codes(weights, quantizer.embedding.weight)
                codes = codes.transpose(1, 2).reshape(B, self.Cvae, side, side)
                f_hat, pooled = quantizer.get_next_autoregressive_input(k, last + 1, f_hat, codes)
                if k != last:
                    pooled = pooled.flatten(2).transpose(1, 2).to(self.word_embed.weight.dtype)
                    after = end + self.patch_nums[k + 1] ** 2
                    x = (self.word_embed(pooled) + positions[:, end:after]).repeat(2, 1, 1)
        finally:
            for block in self.blocks:
                block.attn.kv_caching(False)
        return self.vae_proxy[0].fhat_to_img(f_hat).add_(1).mul_(0.5)


def autocasting(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)
