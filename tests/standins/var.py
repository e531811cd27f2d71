"""VAR (FoundationVision/VAR): the published loop as a slow one, with the dtypes that it gives to each tensor."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.helpers import small_var
from varkern.models import VAR

from .sampling import sampled


class PublishedVAR(VAR):
    """The running sum has the dtype of the class embedding, and codes are added to it in place, which rounds them."""

    @torch.no_grad()
    def autoregressive_infer_cfg(self, B, label_B, g_seed=None, cfg=1.5, top_k=0, top_p=0.0, more_smooth=False):
        rng = None if g_seed is None else self.rng.manual_seed(g_seed)
        quantizer, last = self.vae_quant_proxy[0], len(self.patch_nums) - 1
        cond = self.class_emb(torch.cat((label_B, torch.full_like(label_B, self.num_classes))))
        places = self.lvl_embed(self.lvl_1L) + self.pos_1LC
        x, seen = cond[:, None] + self.pos_start + places[:, : self.first_l], self.first_l
        f_hat = cond.new_zeros(B, self.Cvae, self.patch_nums[-1], self.patch_nums[-1])
        for block in self.blocks:
            block.attn.kv_caching(True)
        for k, side in enumerate(self.patch_nums):
            for block in self.blocks:
                x = block(x=x, cond_BD=self.shared_ada_lin(cond), attn_bias=None)
            both = self.get_logits(x, cond).float()
            ratio = k / last
            logits = (1 + cfg * ratio) * both[:B] - cfg * ratio * both[B:]
            tokens = sampled(logits, top_k, top_p, rng)  # leaves the filtered logits behind
            if more_smooth:
                noise = torch.empty_like(logits).exponential_(generator=rng).log()
                tau = max(0.27 * (1 - ratio * 0.95), 0.005)
                weights = torch.softmax((logits.mul(1 + ratio) - noise) / tau, dim=-1)
                codes = weights @ quantizer.embedding.weight.unsqueeze(0)
            else:
                codes = quantizer.embedding(tokens)
            codes = codes.permute(0, 2, 1).reshape(B, self.Cvae, side, side)
            if k < last:
                codes = F.interpolate(codes, size=tuple(f_hat.shape[2:]), mode="bicubic")
            f_hat.add_(quantizer.quant_resi[k / last](codes))
            if k < last:
                start, seen = seen, seen + self.patch_nums[k + 1] ** 2
                pooled = F.interpolate(f_hat, size=(self.patch_nums[k + 1],) * 2, mode="area")
                x = self.word_embed(pooled.reshape(B, self.Cvae, -1).permute(0, 2, 1)) + places[:, start:seen]
                x = x.repeat(2, 1, 1)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return self.vae_proxy[0].fhat_to_img(f_hat).add_(1).mul_(0.5)


def published_var(**config) -> PublishedVAR:
    """A small model whose own method is the published loop; ``tests.helpers.small_var``."""
    model = small_var(**config)
    model.__class__ = PublishedVAR
    return model
