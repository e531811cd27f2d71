"""The VAE of Infinity, small: binary spherical quantization."""

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
    def __init__(self, bits: int = 5):
        super().__init__()
        self.embed_dim = self.codebook_dim = bits
        self.quantizer = SimpleNamespace(lfq=BSQ(bits), z_interplote_up="trilinear")
        self.decoder = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(bits, 3, 3, padding=1))

    def decode(self, z: Tensor) -> Tensor:
        return torch.clamp(self.decoder(z), min=-1, max=1)
