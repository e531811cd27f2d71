"""What the published methods of all three families share: drawing tokens from filtered logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sampled(logits: Tensor, top_k: int, top_p: float, rng: torch.Generator | None, count: int | None = None) -> Tensor:
    """One token a position, ``[B, l]``, or so many, ``[B, l, count]``, from logits ``[B, l, V]``; overwrites these."""
    if top_k > 0:
        kth = torch.topk(logits, min(top_k, logits.shape[-1]), dim=-1).values.min(dim=-1, keepdim=True).values
        logits[logits < kth] = -math.inf
    if top_p > 0:
        ascending, order = torch.sort(logits, dim=-1)
        drop = torch.cumsum(torch.softmax(ascending, dim=-1), dim=-1) <= 1 - top_p
        drop[..., -1] = False
        logits[torch.zeros_like(drop).scatter(-1, order, drop)] = -math.inf
    probabilities = torch.softmax(logits, dim=-1)
    rows = probabilities.reshape(-1, logits.shape[-1])
    drawn = torch.multinomial(rows, count or 1, replacement=True, generator=rng)
    return drawn.reshape(logits.shape[:2] if count is None else (*logits.shape[:2], count))
