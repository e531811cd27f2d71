"""FlexVAR (jiaosiyu1999/FlexVAR), small."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varkern.models.transformer import AdaLNBeforeHead, AdaLNSelfAttn, SharedAdaLin

from .sampling import sampled

CHANNELS = 32  # the published method takes no other
GREEDY_BUT = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 24, 32)


class Quantize(nn.Module):
    def __init__(self, vocabulary: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, CHANNELS)


class FlexVAE(nn.Module):
    """A VQ-VAE whose decoder doubles the side; its codes are of unit length."""

    def __init__(self, vocabulary: int = 64):
        super().__init__()
        self.Cvae, self.vocab_size = CHANNELS, vocabulary
        self.quantize = Quantize(vocabulary)
        self.post_quant_conv = nn.Conv2d(CHANNELS, 8, 1)
        self.decoder = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, padding=1))

    def decode_code(self, code_b: Tensor, shape=None, channel_first: bool = True) -> Tensor:
        codes = F.normalize(self.quantize.embedding.weight, p=2, dim=-1)[code_b]
        batch, channels, height, width = shape
        codes = codes.reshape(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()
        return self.decoder(self.post_quant_conv(codes))


class FlexVAR(nn.Module):
    """``pos_1LC`` is a picture of positions, ``[1, C, 32, 32]``; no VAE is held; an exception leaves KV caches open."""

    def __init__(self, vae_local: FlexVAE, num_classes: int = 7, depth: int = 2, embed_dim: int = 32):
        super().__init__()
        self.Cvae, self.V = vae_local.Cvae, vae_local.vocab_size
        self.num_classes, self.C = num_classes, embed_dim
        self.first_l = 1
        self.rng = torch.Generator()
        self.uniform_prob = torch.full((1, num_classes), 1.0 / num_classes)
        self.word_embed = nn.Linear(self.Cvae, embed_dim)
        self.class_emb = nn.Embedding(num_classes + 1, embed_dim)
        self.pos_start = nn.Parameter(torch.zeros(1, self.first_l, embed_dim))
        self.pos_1LC = nn.Parameter(torch.zeros(1, embed_dim, 32, 32))
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), SharedAdaLin(embed_dim, 6 * embed_dim))
        self.blocks = nn.ModuleList(AdaLNSelfAttn(embed_dim, 2, 4, 1e-6, True, True, 1200) for _ in range(depth))
        self.head_nm = AdaLNBeforeHead(embed_dim, 1e-6)
        self.head = nn.Linear(embed_dim, self.V)

    def get_logits(self, h: Tensor, cond_BD: Tensor) -> Tensor:
        return self.head(self.head_nm(h, cond_BD))

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self,
        vqvae,
        B,
        label_B,
        infer_patch_nums,
        g_seed=None,
        cfg=1.5,
        top_k=0,
        top_p=0.0,
        more_smooth=False,
        max_pn=16,
        used_llamagen_cfg=False,
        invalid_ids=None,
    ):
        rng = None if g_seed is None else self.rng.manual_seed(g_seed)
        if label_B is None:
            label_B = torch.multinomial(self.uniform_prob, B, replacement=True, generator=rng).reshape(B)
        elif isinstance(label_B, int):
            raise AttributeError("'FlexVAR' object has no attribute 'lvl_1L'")
        assert not more_smooth
        cond = self.class_emb(torch.cat((label_B, torch.full_like(label_B, self.num_classes))))
        pictures = [F.interpolate(self.pos_1LC, (side, side), mode="area") for side in infer_patch_nums]
        places = torch.cat([picture.flatten(2) for picture in pictures], dim=2).permute(0, 2, 1)
        x = cond[:, None] + self.pos_start + places[:, : self.first_l]
        codebook = F.normalize(vqvae.quantize.embedding.weight, p=2, dim=-1)
        seen = 0
        for block in self.blocks:
            block.attn.kv_caching(True)
        for k, side in enumerate(infer_patch_nums):
            ratio = k / min(len(infer_patch_nums) - 1, 9)
            seen += side * side
            for block in self.blocks:
                x = block(x=x, cond_BD=self.shared_ada_lin(cond), attn_bias=None)
            logits = self.get_logits(x, cond)
            if invalid_ids is not None:
                logits[:, :, invalid_ids] = -100.0
            if used_llamagen_cfg:
                logits = logits[B:] + (logits[:B] - logits[B:]) * cfg
            else:
                t = cfg * ratio if side <= max_pn else cfg
                logits = (1 + t) * logits[:B] - t * logits[B:]
            greedy = side > max_pn or side not in GREEDY_BUT
            tokens = sampled(logits, 1 if greedy else top_k, top_p, rng)
            if k + 1 < len(infer_patch_nums):
                following = infer_patch_nums[k + 1]
                codes = codebook[tokens].reshape(B, side, side, -1).permute(0, 3, 1, 2)
                codes = F.interpolate(codes, size=(following, following), mode="bicubic")
                x = self.word_embed(codes.reshape(B, CHANNELS, -1).permute(0, 2, 1))
                x = (x + places[:, seen : seen + following**2]).repeat(2, 1, 1)
        images = vqvae.decode_code(tokens, shape=[B, CHANNELS, infer_patch_nums[-1], infer_patch_nums[-1]])
        for block in self.blocks:
            block.attn.kv_caching(False)
        return images
