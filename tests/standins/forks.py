"""Forks of VAR, small: each does something that the published method does not, in the ways that public forks do."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.helpers import small_var
from varkern.models import VAR

from .sampling import sampled

sample_with_top_k_top_p_ = sampled  # a global of the module, as the published module has it


class ForkedVAR(VAR):
    """The published loop, written apart, with places for what forks change; by default it changes nothing."""

    mask = None  # [V] bool: tokens that are never drawn
    extra = None  # what the blocks want besides the published arguments

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self,
        B,
        label_B,
        g_seed=None,
        cfg=1.5,
        top_k=0,
        top_p=0.0,
        more_smooth=False,
        every_scale=False,
        flat_guidance=False,
        enable_var_scaling=False,
        own_samples=3,
        halves_apart=False,
    ):
        rng = None if g_seed is None else self.rng.manual_seed(g_seed)
        if label_B is None:
            equal = torch.full((1, self.num_classes), 1 / self.num_classes)
            label_B = torch.multinomial(equal, B, replacement=True, generator=rng).reshape(B)
        elif isinstance(label_B, int):
            label_B = torch.full((B,), label_B)
        quantizer, last = self.vae_quant_proxy[0], len(self.patch_nums) - 1
        nothing = torch.full_like(label_B, self.num_classes)
        if halves_apart:
            cond = torch.cat((self.class_emb(label_B), self.class_emb(nothing)))
        else:
            cond = self.class_emb(torch.cat((label_B, nothing)))
        places = self.lvl_embed(self.lvl_1L) + self.pos_1LC
        x, seen, images = cond[:, None] + self.pos_start + places[:, : self.first_l], self.first_l, []
        f_hat = cond.new_zeros(B, self.Cvae, self.patch_nums[-1], self.patch_nums[-1])
        for block in self.blocks:
            block.attn.kv_caching(True)
        for k, side in enumerate(self.patch_nums):
            for block in self.blocks:
                x = block(x=x, cond_BD=self.shared_ada_lin(cond), attn_bias=None, **(self.extra or {}))
            t = cfg if flat_guidance else cfg * k / last
            both = self.get_logits(x, cond)
            logits = (1 + t) * both[:B] - t * both[B:]
            if self.mask is not None:
                logits = logits.masked_fill(self.mask, -torch.inf)
            draw = lambda: sample_with_top_k_top_p_(logits, top_k, top_p, rng)  # noqa: B023, E731
            tokens = draw()
            if enable_var_scaling and k == 1:  # a search of its own, of the simplest kind
                drawn = torch.stack([tokens, *(draw() for _ in range(own_samples - 1))])
                tokens = drawn[drawn.float().mean(2).argmax(0), torch.arange(B)]
            codes = quantizer.embedding(tokens).transpose(1, 2).reshape(B, -1, side, side)
            f_hat, pooled = quantizer.get_next_autoregressive_input(k, last + 1, f_hat, codes)
            images.append(self.vae_proxy[0].fhat_to_img(f_hat.clone()).add(1).mul(0.5))
            if k < last:
                start, seen = seen, seen + self.patch_nums[k + 1] ** 2
                x = self.word_embed(pooled.flatten(2).permute(0, 2, 1)) + places[:, start:seen]
                x = torch.cat((x, x))
        for block in self.blocks:
            block.attn.kv_caching(False)
        return images if every_scale else images[-1]

    def car_inference(self, labels, seed=0, **more):
        """Another entry point, in words of its own."""
        return self.autoregressive_infer_cfg(len(labels), labels, seed, **more)


class BrightVAR(VAR):
    """A user's subclass, which changes what the published method returns."""

    def autoregressive_infer_cfg(self, B, label_B, g_seed=None, cfg=1.5, top_k=0, top_p=0.0, more_smooth=False):
        images = super().autoregressive_infer_cfg(B, label_B, g_seed, 2 * cfg, top_k, top_p, more_smooth)
        return images.mul(0.5).add(0.5)


class ArgmaxVAR(ForkedVAR):
    """A fork that draws without ``torch.multinomial``."""

    def autoregressive_infer_cfg(self, *args, **kwargs):
        global sample_with_top_k_top_p_
        before, sample_with_top_k_top_p_ = sample_with_top_k_top_p_, lambda logits, *_: logits.argmax(-1)
        try:
            return super().autoregressive_infer_cfg(*args, **kwargs)
        finally:
            sample_with_top_k_top_p_ = before


def fork(kind: type, **config) -> VAR:
    model = small_var(**config)
    model.__class__ = kind
    return model


def in_a_script(model: VAR, labels: torch.Tensor, seed: int) -> torch.Tensor:
    """A loop as notebooks write it, outside any method: the lower half of the map is drawn, the upper is token 1."""
    rng, B = torch.Generator().manual_seed(seed), len(labels)
    quantizer, last = model.vae_quant_proxy[0], len(model.patch_nums) - 1
    cond = model.class_emb(torch.cat((labels, torch.full_like(labels, model.num_classes))))
    places, seen = model.lvl_embed(model.lvl_1L) + model.pos_1LC, model.first_l
    x = cond[:, None] + model.pos_start + places[:, :seen]
    f_hat = cond.new_zeros(B, model.Cvae, model.patch_nums[-1], model.patch_nums[-1])
    for block in model.blocks:
        block.attn.kv_caching(True)
    for k, side in enumerate(model.patch_nums):
        for block in model.blocks:
            x = block(x=x, cond_BD=model.shared_ada_lin(cond), attn_bias=None)
        tokens = sampled(model.get_logits(x, cond)[:B], 0, 0.0, rng)
        tokens = torch.where(torch.arange(side * side) < side * side // 2, 1, tokens)
        codes = quantizer.embedding(tokens).transpose(1, 2).reshape(B, -1, side, side)
        f_hat, pooled = quantizer.get_next_autoregressive_input(k, last + 1, f_hat, codes)
        if k < last:
            start, seen = seen, seen + model.patch_nums[k + 1] ** 2
            x = model.word_embed(F.adaptive_avg_pool2d(pooled, pooled.shape[2:]).flatten(2).permute(0, 2, 1))
            x = (x + places[:, start:seen]).repeat(2, 1, 1)
    for block in model.blocks:
        block.attn.kv_caching(False)
    return model.vae_proxy[0].fhat_to_img(f_hat)
