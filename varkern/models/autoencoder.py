"""Encoder and decoder of VAR's VQ-VAE: the convolutional autoencoder of VQGAN, with 16-fold (or other) downsampling.

Modules have the names of the published checkpoint ``vae_ch160v4096z32.pth``, so that its state dict loads.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    if channels % groups:
        raise ValueError(f"channels must be a multiple of norm_groups={groups}, got {channels}")
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Group norm, SiLU and 3x3 convolution, twice, plus the input: ``[B, in, h, w] -> [B, out, h, w]``."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class SpatialAttention(nn.Module):
    """Self-attention over the pixels of a map with one head, plus the input: ``[B, C, h, w] -> [B, C, h, w]``."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # each [B, h*w, C]
        h = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, (height, width)))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # The published model pads on the right and at the bottom only.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.attn_1 = SpatialAttention(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if asked for, and the change of resolution."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int, attention: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResidualBlock(widths[i], widths[i + 1], groups) for i in range(blocks))
        self.attn = nn.ModuleList(SpatialAttention(out_channels, groups) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    """Images ``[B, in_channels, H, W]`` to features ``[B, z_channels, H/f, W/f]``, ``f = 2 ** (len(ch_mult) - 1)``."""

    def __init__(
        self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, in_channels: int, z_channels: int, groups: int
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width, last = ch, len(ch_mult) - 1
        for i, mult in enumerate(ch_mult):
            level = Level(width, ch * mult, num_res_blocks, groups, attention=i == last)
            width = ch * mult
            if i != last:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width, groups)
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features ``[B, z_channels, h, w]`` to images ``[B, in_channels, h*f, w*f]``, nominally in [-1, 1]."""

    def __init__(
        self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, in_channels: int, z_channels: int, groups: int
    ):
        super().__init__()
        width, last = ch * ch_mult[-1], len(ch_mult) - 1
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = Middle(width, groups)
        levels = []
        for i in reversed(range(len(ch_mult))):
            level = Level(width, ch * ch_mult[i], num_res_blocks + 1, groups, attention=i == last)
            width = ch * ch_mult[i]
            if i != 0:
                level.upsample = Upsample(width)
            levels.append(level)
        # Stored from the highest resolution to the lowest, as in the published checkpoint, and run in reverse order.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
