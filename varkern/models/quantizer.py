"""VAR's multi-scale residual quantizer: features to K token maps and back.

Modules, parameters and methods have the names of the published ``VectorQuantizer2``, so that its state dicts and
scripts work. :meth:`VectorQuantizer.fused` is F(.) of one scale; ``embed_to_fhat`` sums it over the scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class Phi(nn.Conv2d):
    """The layer after upsampling: ``(1 - blend) * x + blend * conv3x3(x)``, ``[B, C, h, w] -> [B, C, h, w]``."""

    def __init__(self, channels: int, blend: float):
        super().__init__(channels, channels, 3, padding=1)
        self.resi_ratio = abs(blend)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 - self.resi_ratio) + super().forward(x) * self.resi_ratio


def phi_layer(channels: int, blend: float) -> nn.Module:
    return Phi(channels, blend) if abs(blend) > 1e-6 else nn.Identity()


def phi_ticks(count: int) -> np.ndarray:
    """Positions of ``count`` phi layers between the first scale (0) and the last (1)."""
    margin = 1 / 3 if count == 4 else 1 / 2  # as published: four layers lie nearer to the ends than other counts
    return np.linspace(margin / count, 1 - margin / count, count)


class PhiShared(nn.Module):
    """One phi layer for every scale."""

    def __init__(self, channels: int, blend: float):
        super().__init__()
        self.qresi = phi_layer(channels, blend)

    def __getitem__(self, position: float) -> nn.Module:
        return self.qresi


class PhiPartiallyShared(nn.Module):
    """A few phi layers. A scale at ``position`` in [0, 1] uses the layer with the nearest tick."""

    def __init__(self, channels: int, blend: float, count: int):
        super().__init__()
        self.qresi_ls = nn.ModuleList(phi_layer(channels, blend) for _ in range(count))
        self.ticks = phi_ticks(count)

    def __getitem__(self, position: float) -> nn.Module:
        return self.qresi_ls[int(np.argmin(np.abs(self.ticks - position)))]


class PhiNonShared(nn.ModuleList):
    """One phi layer per scale, selected by the scale's position in [0, 1]."""

    def __init__(self, channels: int, blend: float, count: int):
        super().__init__(phi_layer(channels, blend) for _ in range(count))
        self.ticks = phi_ticks(count)

    def __getitem__(self, position: Any) -> Any:  # a float, where ModuleList takes an index
        return super().__getitem__(int(np.argmin(np.abs(self.ticks - position))))


class VectorQuantizer(nn.Module):
    """A residual quantizer with K token maps of growing side. Each map quantizes the residual of the maps before it.

    Args:
        vocab_size: V, the number of codes.
        Cvae: C, the width of a code.
        v_patch_nums: side of each scale's token map, ascending; the last is the latent's side.
        using_znorm: whether the nearest code is found by cosine instead of squared distance.
        quant_resi: blend of the phi layers; 0 for no phi.
        share_quant_resi: number of phi layers: 0 for one per scale, 1 for one that all scales share, n for n layers
            at the positions :func:`phi_ticks`.
        beta: weight of the commitment loss.
    """

    ema_vocab_hit_SV: Tensor

    def __init__(
        self,
        vocab_size: int,
        Cvae: int,
        v_patch_nums: Sequence[int],
        using_znorm: bool = False,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
        beta: float = 0.25,
    ):
        super().__init__()
        self.vocab_size, self.Cvae, self.beta, self.using_znorm = vocab_size, Cvae, beta, using_znorm
        self.v_patch_nums = tuple(v_patch_nums)
        self.quant_resi: PhiShared | PhiPartiallyShared | PhiNonShared
        if share_quant_resi == 0:
            self.quant_resi = PhiNonShared(Cvae, quant_resi, len(self.v_patch_nums))
        elif share_quant_resi == 1:
            self.quant_resi = PhiShared(Cvae, quant_resi)
        else:
            self.quant_resi = PhiPartiallyShared(Cvae, quant_resi, share_quant_resi)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.v_patch_nums), vocab_size))
        self.embedding = nn.Embedding(vocab_size, Cvae)

    def phi(self, scale: int, num_scales: int | None = None) -> nn.Module:
        """The phi layer of ``scale``."""
        last = (num_scales or len(self.v_patch_nums)) - 1
        return self.quant_resi[scale / max(last, 1)]

    def nearest(self, features: Tensor) -> Tensor:
        """The id of the nearest code of every vector, ``[N, C] -> [N]`` int64."""
        codes = self.embedding.weight.detach()
        if self.using_znorm:
            return (F.normalize(features, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(1)
        distance = features.square().sum(1, keepdim=True) + codes.square().sum(1)
        return distance.addmm_(features, codes.T, alpha=-2).argmin(1)

    def fused(self, codes: Tensor, scale: int, size: tuple[int, int], num_scales: int | None = None) -> Tensor:
        """What one scale's codes ``[B, C, side, side]`` add to ``f_hat``, ``[B, C, H, W]``: phi of the upsampled codes.

        The last scale is not resized.
        """
        num_scales = num_scales or len(self.v_patch_nums)
        if scale != num_scales - 1:
            codes = F.interpolate(codes, size=size, mode="bicubic")
        return self.phi(scale, num_scales)(codes)

    def quantize(self, features: Tensor, v_patch_nums: Sequence[int] | None = None):
        """Quantize ``features`` ``[B, C, H, W]`` greedily, scale by scale.

        Yields:
            Per scale, its ids ``[B, side*side]`` int64 and the running sum ``f_hat`` ``[B, C, H, W]``, which is
            differentiable with respect to the codebook and the phi layers.
        """
        sides = tuple(v_patch_nums or self.v_patch_nums)
        size = tuple(features.shape[-2:])
        if size != (sides[-1], sides[-1]):
            raise ValueError(f"the last of v_patch_nums must be the latent's side {size}, got {sides[-1]}")
        rest, f_hat = features.detach().clone(), torch.zeros_like(features)
        for k, side in enumerate(sides):
            pooled = rest if k == len(sides) - 1 else F.interpolate(rest, size=(side, side), mode="area")
            nearest = self.nearest(rearrange(pooled, "b c h w -> (b h w) c"))
            ids = rearrange(nearest, "(b h w) -> b h w", h=side, w=side)
            h = self.fused(rearrange(self.embedding(ids), "b h w c -> b c h w").contiguous(), k, size, len(sides))
            f_hat = f_hat + h
            rest = rest - h.detach()
            yield ids.flatten(1), f_hat

    def forward(self, features: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Quantize for training, with a straight-through gradient.

        Args:
            features: ``[B, C, H, W]``.

        Returns:
            ``f_hat`` ``[B, C, H, W]``; K token maps ``[B, l]`` int64; the sum of codebook and commitment loss, averaged
            over the K partial sums as published.
        """
        features = features.float()
        all_ids, loss, f_hat = [], features.new_zeros(()), features
        for ids, partial in self.quantize(features):
            all_ids.append(ids)
            f_hat = partial
            loss = loss + F.mse_loss(f_hat.detach(), features) * self.beta + F.mse_loss(f_hat, features.detach())
        straight_through = (f_hat - features).detach() + features
        return straight_through, all_ids, loss / len(self.v_patch_nums)

    @torch.no_grad()
    def f_to_idxBl_or_fhat(
        self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Features ``[B, C, H, W]`` to K token maps ``[B, l]``, or to K partial sums ``[B, C, H, W]`` (``to_fhat``)."""
        return [f_hat if to_fhat else ids for ids, f_hat in self.quantize(f_BChw, v_patch_nums)]

    def embed_to_fhat(
        self, ms_h_BChw: Sequence[Tensor], all_to_max_scale: bool = True, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """Codes of the K scales, ``[B, C, side, side]`` each, to the K partial sums ``f_hat`` ``[B, C, H, W]``.

        With ``last_one`` only the last sum is returned.

        Raises:
            ValueError: ``all_to_max_scale`` is False. No published model uses that.
        """
        if not all_to_max_scale:
            raise ValueError("all_to_max_scale must be True, because the sum has the last scale's size, got False")
        size = (self.v_patch_nums[-1],) * 2
        f_hat = ms_h_BChw[0].new_zeros(ms_h_BChw[0].shape[0], self.Cvae, *size, dtype=torch.float32)
        partial_sums = []
        for k, codes in enumerate(ms_h_BChw):
            f_hat = f_hat + self.fused(codes, k, size)
            partial_sums.append(f_hat)
        return f_hat if last_one else partial_sums

    def idxBl_to_var_input(self, gt_ms_idx_Bl: Sequence[Tensor]) -> Tensor:
        """Token maps ``[B, l]`` of the K scales to the transformer's input for teacher forcing, ``[B, L - l_0, C]``."""
        codes = [self.codes(ids, k) for k, ids in enumerate(gt_ms_idx_Bl[:-1])]
        sums = self.embed_to_fhat(codes)
        nexts = [
            rearrange(F.interpolate(f_hat, size=(side, side), mode="area"), "b c h w -> b (h w) c")
            for f_hat, side in zip(sums, self.v_patch_nums[1:], strict=True)
        ]
        return torch.cat(nexts, dim=1)

    def codes(self, ids: Tensor, scale: int) -> Tensor:
        """The codes of one scale's token map, ``[B, l] -> [B, C, side, side]``."""
        side = self.v_patch_nums[scale]
        return rearrange(self.embedding(ids), "b (h w) c -> b c h w", h=side, w=side)

    def get_next_autoregressive_input(self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """Add one scale's codes to ``f_hat`` in place, and pool ``f_hat`` to the next scale's side.

        Args:
            si: the scale, counted from 0.
            SN: K, the number of scales.
            f_hat: ``[B, C, H, W]`` float32, updated in place.
            h_BChw: codes of the scale's tokens, ``[B, C, side, side]``.

        Returns:
            ``f_hat``, and ``f_hat`` pooled (``area``) to the next scale's side; at the last scale ``f_hat`` twice.
        """
        f_hat.add_(self.fused(h_BChw, si, (f_hat.shape[-2], f_hat.shape[-1]), SN))
        if si == SN - 1:
            return f_hat, f_hat
        return f_hat, F.interpolate(f_hat, size=(self.v_patch_nums[si + 1],) * 2, mode="area")
