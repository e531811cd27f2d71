"""One generation on one Infinity model with bit labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varkern.ops import resize_features
from varkern.spec import Logits, Request

from .base import Draws, in_both_halves, is_identity, is_single, keep_caches


class Settings:
    """A request's options, with the published method's defaults.

    Attributes:
        sides: ``(h, w)`` of the VAE's map at each scale; with spatial patchify twice the transformer's.
        num_scales: the number of scales that run: all of the schedule, or ``trunk_scale`` of them.
        width: the number of bits at one position of the VAE's map.
    """

    def __init__(self, model: Any, request: Request, schedule: Sequence[tuple[int, int, int]]):
        options = request.options
        self.schedule = schedule
        self.vae: Any = options.get("vae")
        self.vae_type = options.get("vae_type", 0)
        self.patch = 2 if model.apply_spatial_patchify else 1
        self.sides = tuple((self.patch * h, self.patch * w) for _, h, w in schedule)
        self.width = model.d_vae // self.patch**2
        self.num_scales = min(len(schedule), options.get("trunk_scale", 1000))
        self.cfg, self.tau = options.get("cfg_list", ()), options.get("tau_list", ())
        self.negative = options.get("negative_label_B_or_BLT")
        self.insertion_layers = options.get("cfg_insertion_layer", (-5,))
        self.returns_vemb, self.returns_images = options.get("returns_vemb", 0), options.get("ret_img", False)
        self.num_given = options.get("gt_leak", 0)
        self.given: Any = options.get("gt_ls_Bl")

    @property
    def doubled(self) -> bool:
        """Whether there is guidance anywhere, which doubles the batch."""
        return any(strength != 1 for strength in self.cfg)

    def strength(self, scale: int) -> float | Tensor | None:
        """The strength of guidance at ``scale``; None: there is none, which is a strength of 1."""
        return self.cfg[scale] if self.cfg[scale] != 1 else None

    def keep(self, rows: Tensor, batch: int) -> None:
        """Keep these rows, of ``batch``, of what is given per image: temperatures and token maps."""
        shape = (batch, 1, 1)
        self.tau = [
            tau.index_select(0, rows) if isinstance(tau, Tensor) and tau.shape == shape and batch > 1 else tau
            for tau in self.tau
        ]
        count = min(max(self.num_given, 0), self.num_scales)
        if count:
            self.given = [tokens.index_select(0, rows.to(tokens.device)) for tokens in self.given[:count]]

    def guides_logits(self, scale: int) -> bool:
        """Whether guidance mixes the logits of ``scale``, so that both halves of the batch have logits."""
        return self.strength(scale) is not None and 0 in self.insertion_layers


class InfinityFeatures:
    """F(.) of Infinity. Needs the attributes ``settings``, ``quantizer``, ``code_scale`` and ``f_hat``.

    ``f_hat`` is ``[B, d, 1, H, W]``, or None before the first scale.
    """

    settings: Settings
    quantizer: Any
    f_hat: Tensor | None
    codebook: Tensor | None = None

    def maps(self, scale: int, drawn: Tensor) -> Tensor:
        settings = self.settings
        if scale < settings.num_given:
            return settings.given[scale].to(drawn.device, torch.uint8).flatten(1, 3).unsqueeze(1)
        batch, count = drawn.shape[:2]
        h, w = self._grid(scale)
        bits = drawn.view(batch, count, h, w, settings.width, settings.patch, settings.patch)
        bits = bits.permute(0, 1, 2, 5, 3, 6, 4)  # [B, M, h, patch, w, patch, d]
        return bits.reshape(batch, count, h * w * settings.patch**2, settings.width).to(torch.uint8)

    def rows_of(self, scale: int, maps: Tensor) -> Tensor:
        """Bits ``[B, M, l, d]`` as they were drawn, ``[B, M, l * d]``: the inverse of :meth:`maps`."""
        (h, w), patch = self._grid(scale), self.settings.patch
        bits = maps.unflatten(2, (h, patch, w, patch)).permute(0, 1, 2, 4, 6, 3, 5)  # [B, M, h, w, d, patch, patch]
        return bits.flatten(2)

    def _grid(self, scale: int) -> tuple[int, int]:
        h, w = self.settings.sides[scale]
        return h // self.settings.patch, w // self.settings.patch

    def by_position(self, scale: int, tokens: Tensor) -> Tensor:
        """Bits ``[B, M, l, d]`` of the VAE's map as ``[B, M, l / patch**2, d * patch**2]``: one row per position."""
        patch = self.settings.patch
        if patch == 1:
            return tokens
        h, w = self._grid(scale)
        bits = tokens.unflatten(2, (h, patch, w, patch)).transpose(3, 4)  # [B, M, h, w, patch, patch, d]
        return bits.reshape(*tokens.shape[:2], h * w, patch**2 * tokens.shape[3])

    def fuse(self, scale: int, tokens: Tensor, dtype: torch.dtype | None = None, channels_last: bool = False) -> Tensor:
        batch, count = tokens.shape[:2]
        codes, size = self._codes(self._bits(scale, tokens.flatten(0, 1))).squeeze(2), self.settings.sides[-1]
        mode = self.quantizer.z_interplote_up
        features = resize_features(codes, size=size, interpolation=mode, channels_last=channels_last)
        features = features.unflatten(0, (batch, count))
        if self.f_hat is not None:
            features += self.f_hat.transpose(1, 2)
        return features if dtype is None else features.to(dtype)

    def _bits(self, scale: int, tokens: Tensor) -> Tensor:
        """Maps ``[N, l, d]`` as one frame each: ``[N, 1, h, w, d]``."""
        return tokens.unflatten(1, self.settings.sides[scale]).unsqueeze(1)

    def _codes(self, bits: Tensor) -> Tensor:
        """The quantizer's codes ``[N, d, 1, h, w]`` of bits ``[N, 1, h, w, d]``: plus or minus ``code_scale``."""
        return self.quantizer.lfq.indices_to_codes(bits, label_type="bit_label")


class InfinitySession(InfinityFeatures):
    """See :class:`.base.Session`. Candidates are maps of bits.

    F(.) is the sum of their codes, each resized to the last side. With spatial patchify a position of the transformer
    holds the bits of 2 x 2 positions of the VAE's map; ``maps`` gives the VAE's map, so a search gets ``l`` and ``d``
    of the codes, and ``by_position`` gives the transformer's view.

    With ``sampler="philox"`` results equal the published method's up to rounding. With ``"multinomial"`` every
    operation is the published one, on tensors with the same strides, because a kernel's rounding depends on its input's
    layout.
    """

    def __init__(self, model: Any, text: Any, settings: Settings, request: Request, draws: Draws):
        self.model, self.settings, self.request = model, settings, request
        self.code_scale = 1 / math.sqrt(settings.width)
        self.quantizer = settings.vae.quantizer
        self.f_hat: Tensor | None = None  # [B, d, 1, H, W] float32
        self.reproduces_upstream = draws.reproduces_upstream
        self.batch = request.batch_size
        features, sums, longest = conditions(model, text, settings)
        features = model.text_norm(features)
        self.cond = model.text_proj_for_sos((features, sums, longest))
        self.text = self.texts = model.text_proj_for_ca(features), sums, longest  # of all rows, and of one per image
        self.lengths = text[1], settings.negative[1] if settings.negative else text[1]
        with torch.autocast("cuda", enabled=False):
            self.modulation = model.shared_ada_lin(self.cond.float()).float().contiguous()
        self.layers = {len(model.unregistered_blocks) + layer for layer in settings.insertion_layers if layer < 0}
        self.x = self.cond.unsqueeze(1) + model.pos_start
        for block in model.unregistered_blocks:
            attention(block).kv_caching(True)

    def logits(self, scale: int) -> Logits:
        model, settings, x, layer = self.model, self.settings, self.x, 0
        strength, tau = settings.strength(scale), settings.tau[scale]
        if not self.reproduces_upstream:  # numbers, so that a tensor on the host is as good as one on the device
            strength = strength if strength is None else float(strength)
            tau = float(tau) if is_single(tau) and tau.device.type == "cpu" else tau
        attn_fn = None
        if getattr(model, "use_flex_attn", False):
            attn_fn = model.attn_fn_compile_dict.get(tuple(settings.schedule[: scale + 1]))
        for i, chunk in enumerate(model.block_chunks):
            if i == 0 or not model.add_lvl_embeding_only_first_block:
                x = self._with_level(x, scale)
            for block in chunk.module:
                x = block(
                    x=x,
                    cond_BD=self.modulation,
                    ca_kv=self.text,
                    attn_bias_or_two_vector=None,
                    attn_fn=attn_fn,
                    scale_schedule=settings.schedule,
                    rope2d_freqs_grid=model.rope2d_freqs_grid,
                    scale_ind=scale,
                )
                if strength is not None and layer in self.layers:
                    x = strength * x[: self.batch] + (1 - strength) * x[self.batch :]
                    x = torch.cat((x, x))
                layer += 1
        guided = settings.guides_logits(scale)
        rows = len(x) if guided else self.batch
        logits = model.get_logits(x[:rows], self.cond[:rows]).mul(1 / tau)
        return self._as_logits(scale, logits, strength if guided else None)

    def commit(self, scale: int, tokens: Tensor, logits: Logits, draws: Draws, hard: bool) -> None:
        settings = self.settings
        bits = self._bits(scale, tokens)
        if self.reproduces_upstream:
            bits = self._as_published(scale, bits)
        codes = self._codes(bits)
        if scale + 1 < len(settings.schedule):
            codes = self._resized(codes, settings.sides[-1])
        self.f_hat = codes if self.f_hat is None else self.f_hat.add_(codes)
        if scale + 1 == settings.num_scales:
            return
        features = self._resized(self.f_hat, settings.sides[scale + 1]).squeeze(2)
        if settings.patch > 1:
            features = self._gathered(features)
        x = self.model.word_embed(self.model.norm0_ve(features.flatten(2).transpose(1, 2)))
        self.x = x.repeat(2 if settings.doubled else 1, 1, 1)

    def keep(self, paths: Tensor, finished: bool = False) -> None:
        rows, settings = paths.flatten(), self.settings
        if is_identity(rows, self.batch):
            return
        self.f_hat = None if self.f_hat is None else self.f_hat.index_select(0, rows)
        if not finished:
            both = in_both_halves(rows, self.batch, settings.doubled)
            keep_caches((attention(block) for block in self.model.unregistered_blocks), both)
            self.x, self.cond, self.modulation = (t.index_select(0, both) for t in (self.x, self.cond, self.modulation))
            features, sums, longest = self.texts
            lengths = [int(length) for half in self.lengths[: 1 + settings.doubled] for length in half]
            self.text = *repeat_texts(features, lengths, sums, paths.shape[1]), longest
            settings.keep(rows, self.batch)
        self.batch = len(rows)

    def image(self, scale: int, rows: slice) -> Tensor:
        assert self.f_hat is not None, "a map was kept"
        image = self.settings.vae.decode(self.f_hat[rows].squeeze(2))
        return image.float().add(1).div(2).clamp(0, 1)

    def features(self, scale: int) -> Tensor:
        assert self.f_hat is not None, "a map was kept"
        return self.f_hat.squeeze(2).float()

    def decode(self) -> tuple[list, list, Tensor | list]:
        """As published: two empty lists and the images ``[B, H, W, 3]`` uint8, in BGR order."""
        if not self.settings.returns_images:
            return [], [], []
        assert self.f_hat is not None, "there is a first scale"
        image = (self.settings.vae.decode(self.f_hat.squeeze(2)) + 1) / 2
        return [], [], image.permute(0, 2, 3, 1).mul_(255).to(torch.uint8).flip(dims=(3,))

    def close(self) -> None:
        for block in self.model.unregistered_blocks:
            attention(block).kv_caching(False)

    def _as_logits(self, scale: int, logits: Tensor, strength: float | Tensor | None) -> Logits:
        """Logits of one scale: only the conditional half, or both halves and the strength of guidance."""
        top_k = self.request.top_k or getattr(self.model, "top_k", 0)
        top_p = self.request.top_p or getattr(self.model, "top_p", 0.0)
        sampling = (top_k, top_p, scale >= self.settings.num_given)
        if strength is None:
            return Logits(self._rows(logits), None, 0.0, *sampling)
        cond, uncond = logits[: self.batch], logits[self.batch :]
        if self.reproduces_upstream:
            return Logits(self._rows(strength * cond + (1 - strength) * uncond), None, 0.0, *sampling)
        return Logits(self._rows(cond), self._rows(uncond), strength - 1, *sampling)

    def _with_level(self, x: Tensor, scale: int) -> Tensor:
        if self.reproduces_upstream:
            return self.model.add_lvl_embeding(x, scale, self.settings.schedule, need_to_pad=0)
        # The published method copies the level from the host at each scale, which a captured graph cannot do.
        return x.add_(self.model.lvl_embed.weight[scale])

    def _rows(self, logits: Tensor) -> Tensor:
        batch, length, channels = logits.shape
        return logits.reshape(batch, length * channels // 2, 2)

    def _as_published(self, scale: int, bits: Tensor) -> Tensor:
        """The same bits with the strides that they have in the published method."""
        settings = self.settings
        if scale < settings.num_given:
            return settings.given[scale]
        if settings.patch == 1:
            return bits
        bits = F.pixel_unshuffle(bits.squeeze(1).permute(0, 3, 1, 2), settings.patch)
        # Cloned for its strides: for a map of one position several strides count as contiguous.
        bits = bits.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
        return F.pixel_shuffle(bits.permute(0, 3, 1, 2), settings.patch).permute(0, 2, 3, 1).unsqueeze(1)

    def _gathered(self, features: Tensor) -> Tensor:
        """``[B, d, h, w]`` to ``[B, d * patch**2, h / patch, w / patch]``: each patch becomes one position."""
        patch = self.settings.patch
        if self.reproduces_upstream:
            return F.pixel_unshuffle(features, patch)
        # Not with the same function, which leaves an empty batch unchanged.
        features = features.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [B, d, h, patch, w, patch]
        return features.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)

    def _resized(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """``[B, d, 1, h, w]`` to ``[B, d, 1, *size]``."""
        mode = self.quantizer.z_interplote_up
        if self.reproduces_upstream:
            return F.interpolate(features, size=(1, *size), mode=mode)
        return resize_features(features.squeeze(2), size=size, interpolation=mode).unsqueeze(2)


def conditions(model: Any, text: Any, settings: Settings) -> tuple[Tensor, Tensor, int]:
    """Features of all texts, the running sum of their lengths, the longest; with guidance followed by the negatives."""
    features, lengths, sums, longest = text
    if not settings.doubled:
        return features, sums, longest
    if settings.negative:
        others, _, other_sums, other_longest = settings.negative
        longest = max(longest, other_longest)
    else:
        others = features.clone()
        start = 0
        for length in lengths:
            others[start : start + length] = model.cfg_uncond[:length]
            start += length
        other_sums = sums
    return torch.cat((features, others)), torch.cat((sums, other_sums[1:] + sums[-1])), longest


def repeat_texts(features: Tensor, lengths: Sequence[int], sums: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Features and running sum of the lengths of texts of which each is repeated ``count`` times.

    Args:
        features: concatenated features of all texts, ``[sum of lengths, C]``.
        lengths: their lengths, on the host.
        sums: the running sum of the lengths, ``[B + 1]``.
        count: number of copies of each text.
    """
    if count == 1:
        return features, sums
    texts = features.split(list(lengths))
    repeated = torch.cat([features[:0], *(text for text in texts for _ in range(count))])
    return repeated, F.pad(sums.diff().repeat_interleave(count).cumsum(0), (1, 0)).to(sums.dtype)


def attention(block: Any) -> Any:
    """The self-attention of a block, which holds the cache."""
    return block.sa if hasattr(block, "sa") else block.attn
