"""The stand-ins with weights that show mistakes, and one call of each."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .flexvar import FlexVAE, FlexVAR
from .infinity import Infinity
from .infinity_vae import InfinityVAE
from .published import publish

publish(FlexVAR.autoregressive_infer_cfg, Infinity.autoregressive_infer_cfg)

FLEX_SIDES = (1, 2, 3, 4, 6)
SCHEDULE = [(1, 1, 1), (1, 2, 2), (1, 3, 2), (1, 4, 3), (1, 6, 4)]
NUM_BITS = 5
TABLES = ("emb", "pos_", "ca.mat_q", "uncond", "table", "gss")


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter with random numbers that all matter; logits spread by two or more."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("scale_mul_1H11"):
            tensor.copy_(noise * 0.4 + math.log(6.0))
        elif tensor.dim() == 1:
            tensor.copy_(noise * 0.3 + (1.0 if name.endswith("weight") else 0.0))
        elif "word_embed" not in name and any(
            part in name for part in ("emb", "pos_", "mat_q", "uncond", "table", "gss")
        ):
            tensor.copy_(noise * 0.6)
        else:
            tensor.copy_(noise / math.sqrt(tensor[0].numel()))
        if name == "head.weight":
            tensor.mul_(2.5)
    return module.eval().requires_grad_(False)


def small_flexvar(vocabulary: int = 64, **config) -> tuple[FlexVAR, FlexVAE]:
    vae = randomise(FlexVAE(vocabulary), 0)
    vae.post_quant_conv.weight.mul_(8)  # so that some pixels leave [-1, 1], as the published decoder's do
    return randomise(FlexVAR(vae, **config), 1), vae


def small_infinity(schedule=SCHEDULE, bits: int = NUM_BITS, **config) -> tuple[Infinity, InfinityVAE]:
    vae = InfinityVAE(bits)
    return randomise(Infinity(vae, [schedule, schedule[:1]], **config), 3), randomise(vae, 7)


def texts(lengths, seed: int = 0) -> tuple[Tensor, list[int], Tensor, int]:
    """A text condition in the published form; text i is the same in whatever company it comes."""
    features = [torch.randn(length, 12, generator=torch.Generator().manual_seed(seed + length)) for length in lengths]
    sums = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return torch.cat([torch.zeros(0, 12), *features]), list(lengths), sums, max(lengths, default=0)
