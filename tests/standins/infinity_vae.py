"""The VAE of Infinity, small: binary spherical quantization, and beside it a table of codes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BSQ(nn.Module):
    """Bits to points of the unit sphere: a bit is plus or minus 1 / sqrt(d)."""

    def __init__(self, bits: int):
        super().__init__()
        self.codebook_scale = 1 / math.sqrt(bits)
        self.register_buffer("mask", 2 ** torch.arange(bits - 1, -1, -1))

    def indices_to_codes(self, indices: Tensor, label_type: str = "int_label") -> Tensor:
        """``[B, t, h, w, d]`` bits to ``[B, d, t, h, w]`` float32."""
        assert label_type == "bit_label"
        codes = F.normalize(indices * self.codebook_scale * 2 - self.codebook_scale, dim=-1)
        return codes.permute(0, 4, 1, 2, 3)


class InfinityVAE(nn.Module):
    def __init__(self, bits: int = 5, vocab_size: int = 37):
        super().__init__()
        self.embed_dim = self.codebook_dim = bits
        self.vocab_size = vocab_size
        self.quantizer = SimpleNamespace(lfq=BSQ(bits), z_interplote_up="trilinear")
        self.table = nn.Embedding(vocab_size, bits)
        self.decoder = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(bits, 3, 3, padding=1))

    def decode(self, z: Tensor) -> Tensor:
        return torch.clamp(self.decoder(z), min=-1, max=1)

    def viz_from_ms_h_BChw(self, ms_h_BChw, scale_schedule, same_shape=True, last_one=False):
        size = scale_schedule[-1]
        return self.decode(sum(F.interpolate(h, size=size, mode="trilinear") for h in ms_h_BChw).squeeze(2))


class IndexQuantizer:
    """What the published method asks of a quantizer with a table; its steps add in place, as VAR's quantizer does."""

    def __init__(self, vae: InfinityVAE):
        self.embedding = vae.table

    def one_step_fuse(self, si, num_scales, accu, h_BCthw, scale_schedule):
        h = F.interpolate(h_BCthw, size=scale_schedule[-1], mode="trilinear")
        accu = h.clone() if accu is None else accu.add_(h)
        if si + 1 == num_scales:
            return accu, None
        following = F.interpolate(accu, size=scale_schedule[si + 1], mode="trilinear")
        return accu, following.flatten(2).transpose(1, 2)
