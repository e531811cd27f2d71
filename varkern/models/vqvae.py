"""VAR's multi-scale VQ-VAE: images to K token maps and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .autoencoder import Decoder, Encoder
from .initialization import initialize
from .quantizer import VectorQuantizer


class VQVAE(nn.Module):
    """The published VQ-VAE of VAR, whose checkpoint loads with ``strict=True``.

    Args:
        vocab_size: V, the number of codes.
        z_channels: C, the width of a code.
        ch: width of the autoencoder at full resolution; 160 in the published checkpoint.
        ch_mult: factor of the width at each resolution; each resolution is half the one before.
        num_res_blocks: residual blocks per resolution in the encoder; the decoder has one more.
        in_channels: number of channels of an image.
        norm_groups: number of groups of the group norms.
        beta, using_znorm, quant_resi, share_quant_resi, v_patch_nums: see :class:`.quantizer.VectorQuantizer`.
        quant_conv_ks: kernel size of the convolutions around the quantizer.
        test_mode: whether to start in evaluation mode and without gradients, like the published class.

    The arguments are kept in ``config``, a plain dictionary.
    """

    config: dict[str, Any]
    V: int
    vocab_size: int
    Cvae: int
    downsample: int
    encoder: Encoder
    decoder: Decoder
    quantize: VectorQuantizer
    quant_conv: nn.Conv2d
    post_quant_conv: nn.Conv2d

    def __init__(
        self,
        vocab_size: int = 4096,
        z_channels: int = 32,
        ch: int = 160,
        *,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        in_channels: int = 3,
        norm_groups: int = 32,
        beta: float = 0.25,
        using_znorm: bool = False,
        quant_conv_ks: int = 3,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
        v_patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        test_mode: bool = True,
    ):
        super().__init__()
        self.config = {
            "vocab_size": vocab_size,
            "z_channels": z_channels,
            "ch": ch,
            "ch_mult": list(ch_mult),
            "num_res_blocks": num_res_blocks,
            "in_channels": in_channels,
            "norm_groups": norm_groups,
            "using_znorm": using_znorm,
            "quant_conv_ks": quant_conv_ks,
            "quant_resi": quant_resi,
            "share_quant_resi": share_quant_resi,
            "v_patch_nums": list(v_patch_nums),
        }
        self.V = self.vocab_size = vocab_size
        self.Cvae = z_channels
        self.downsample = 1 << (len(ch_mult) - 1)
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, in_channels, z_channels, norm_groups)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, in_channels, z_channels, norm_groups)
        self.quantize = VectorQuantizer(
            vocab_size, z_channels, v_patch_nums, using_znorm, quant_resi, share_quant_resi, beta
        )
        self.quant_conv = nn.Conv2d(z_channels, z_channels, quant_conv_ks, padding=quant_conv_ks // 2)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, quant_conv_ks, padding=quant_conv_ks // 2)
        initialize(self)
        if test_mode:
            self.eval().requires_grad_(False)

    def encode(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in [-1, 1] to the features before quantization, ``[B, C, h, w]``."""
        return self.quant_conv(self.encoder(images))

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """For training: images to reconstructions ``[B, 3, H, W]``, K token maps ``[B, l]``, the quantizer's loss."""
        f_hat, ids, loss = self.quantize(self.encode(images))
        return self.decoder(self.post_quant_conv(f_hat)), ids, loss

    def fhat_to_img(self, f_hat: Tensor) -> Tensor:
        """``f_hat`` ``[B, C, h, w]`` to images ``[B, 3, H, W]``, clamped to [-1, 1]."""
        f_hat = f_hat.to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(f_hat)).clamp_(-1, 1)

    @torch.no_grad()
    def img_to_idxBl(self, inp_img_no_grad: Tensor, v_patch_nums: Sequence[int] | None = None) -> list[Tensor]:
        """Images ``[B, 3, H, W]`` in [-1, 1] to K token maps ``[B, l]`` int64."""
        return self.quantize.f_to_idxBl_or_fhat(self.encode(inp_img_no_grad), to_fhat=False, v_patch_nums=v_patch_nums)

    def idxBl_to_img(
        self, ms_idx_Bl: Sequence[Tensor], same_shape: bool = True, last_one: bool = False
    ) -> list[Tensor] | Any:
        """K token maps ``[B, l]`` to the images of the K partial sums, or with ``last_one`` to those of the last."""
        codes = [self.quantize.codes(ids, k) for k, ids in enumerate(ms_idx_Bl)]
        return self.embed_to_img(codes, same_shape, last_one)

    def embed_to_img(
        self, ms_h_BChw: Sequence[Tensor], all_to_max_scale: bool = True, last_one: bool = False
    ) -> list[Tensor] | Any:
        """Like :meth:`idxBl_to_img`, for the codes ``[B, C, side, side]`` of every scale."""
        f_hats: Any = self.quantize.embed_to_fhat(ms_h_BChw, all_to_max_scale, last_one)
        return self.fhat_to_img(f_hats) if last_one else [self.fhat_to_img(f_hat) for f_hat in f_hats]

    def img_to_reconstructed_img(
        self, x: Tensor, v_patch_nums: Sequence[int] | None = None, last_one: bool = False
    ) -> list[Tensor] | Any:
        """Encode, quantize and decode images, from all K partial sums, or with ``last_one`` from the last."""
        f_hats = self.quantize.f_to_idxBl_or_fhat(self.encode(x), to_fhat=True, v_patch_nums=v_patch_nums)
        return self.fhat_to_img(f_hats[-1]) if last_one else [self.fhat_to_img(f_hat) for f_hat in f_hats]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Like ``nn.Module.load_state_dict``, but usage statistics for another number of scales are ignored.

        This allows the 256 px file to load at 512 px.
        """
        key = "quantize.ema_vocab_hit_SV"
        own = self.quantize.ema_vocab_hit_SV
        if key in state_dict and state_dict[key].shape[0] != own.shape[0]:
            state_dict = {**state_dict, key: torch.zeros(own.shape) if own.is_meta else own}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
