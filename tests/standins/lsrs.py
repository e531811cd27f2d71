"""LSRS (dt-3t/LSRS), small: its network's call, and the method that it adds to VAR as a slow loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import NUM_CLASSES, TINY_SIDES, randomise, small_var
from varkern.models import VAR

from .published import publish
from .sampling import sampled


class MapNetwork(nn.Module):
    """Judges maps one by one, by the published arguments; scores of a few maps differ by a unit or so."""

    def __init__(self, channels: int = 8, num_classes: int = NUM_CLASSES, num_scales: int = len(TINY_SIDES)):
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)
        self.class_label_embedding = nn.Embedding(num_classes, 6)
        self.stage_label_embedding = nn.Embedding(num_scales, 6)
        self.out_proj = nn.Linear(6, 1)

    def forward(self, x: Tensor, class_labels: Tensor, stage_label: Tensor) -> Tensor:
        conditions = self.class_label_embedding(class_labels) * self.stage_label_embedding(stage_label)
        return self.out_proj(torch.tanh(self.conv(x)).mean((2, 3)) * (1 + conditions)) * 20


def map_network(**sizes) -> MapNetwork:
    return randomise(MapNetwork(**sizes), 5).eval().requires_grad_(False)


class LSRSVAR(VAR):
    """A VAR whose second method searches as published, here candidate by candidate.

    Each scale draws its candidates by one ``torch.multinomial``; the pick among the best comes from PyTorch's default
    generator, everything else from the seeded one.
    """

    @torch.no_grad()
    def autoregressive_infer_cfg_lsrs(
        self,
        B,
        label_B,
        g_seed=None,
        cfg=1.5,
        top_k=0,
        top_p=0.0,
        more_smooth=False,
        discriminator=None,
        st=1,
        ed=10,
        m_k=4,
        rand_list=None,
        top_k_lsrs=1,
        temperature_lsrs=1.0,
    ):
        assert discriminator is not None
        rng = None if g_seed is None else self.rng.manual_seed(g_seed)
        if label_B is None:
            equal = torch.full((1, self.num_classes), 1 / self.num_classes, device=self.lvl_1L.device)
            label_B = torch.multinomial(equal, B, replacement=True, generator=rng).reshape(B)
        elif isinstance(label_B, int):
            label_B = torch.full((B,), self.num_classes if label_B < 0 else label_B, device=self.lvl_1L.device)
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
            both = self.get_logits(x, cond)
            logits = both[B:] + (1 + cfg * k / last) * (both[:B] - both[B:])
            count = m_k if st <= k < ed else 1
            tokens = sampled(logits, top_k, top_p, rng, count)  # [B, l, count]
            if rand_list is not None and k in rand_list:
                tokens = torch.randint(0, self.V, tokens.shape, device=tokens.device, generator=rng)
            fused, scores = [], []
            for j in range(count):
                codes = quantizer.embedding(tokens[:, :, j]).permute(0, 2, 1).reshape(B, -1, side, side)
                if k < last:
                    codes = F.interpolate(codes, size=tuple(f_hat.shape[2:]), mode="bicubic")
                fused.append(f_hat + quantizer.quant_resi[k / last](codes))
                scores.append(discriminator(fused[-1], label_B, torch.full_like(label_B, k)))
            f_hat = self.kept(torch.stack(fused, dim=1), torch.cat(scores, dim=1), top_k_lsrs, temperature_lsrs)
            if k < last:
                start, seen = seen, seen + self.patch_nums[k + 1] ** 2
                pooled = F.interpolate(f_hat, size=(self.patch_nums[k + 1],) * 2, mode="area")
                x = self.word_embed(pooled.flatten(2).permute(0, 2, 1)) + places[:, start:seen]
                x = torch.cat((x, x))
        for block in self.blocks:
            block.attn.kv_caching(False)
        return self.vae_proxy[0].fhat_to_img(f_hat).add_(1).mul_(0.5)

    @staticmethod
    def kept(fused, scores, top_k, temperature):
        """The features ``[B, C, H, W]`` of one candidate of each image, from ``[B, M, C, H, W]`` and ``[B, M]``."""
        if top_k == 1 or scores.shape[1] == 1:
            return torch.stack([fused[i, row.argmax()] for i, row in enumerate(scores)])
        values, order = scores.topk(min(top_k, scores.shape[1]), dim=1)
        drawn = torch.multinomial(torch.softmax(values / temperature, dim=1), num_samples=1)
        return torch.stack([fused[i, order[i, drawn[i, 0]]] for i in range(len(fused))])


def small_lsrs(**config) -> LSRSVAR:
    """A small model of a class derived from ours; ``tests.helpers.small_var``."""
    model = small_var(**config)
    model.__class__ = LSRSVAR
    return model


publish(LSRSVAR.autoregressive_infer_cfg_lsrs)
