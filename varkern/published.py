"""The published sampler of VAR, draw for draw: ``torch.multinomial`` over filtered logits.

``sampler="multinomial"`` uses it, so that a patched model with one candidate per scale gives the unpatched model's
images bit for bit. The order of operations is therefore that of upstream's ``sample_with_top_k_top_p_`` and
``gumbel_softmax_with_rng``: equal logits and an equal state of the generator give the same tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Logits with the tokens that top-k, then the nucleus, drop set to minus infinity.

    Args:
        logits: ``[..., V]`` float.
        top_k: keep the k largest and those that tie with the k-th; 0, or V and more: all.
        top_p: drop the least probable tokens, as long as their mass is at most ``1 - top_p``; 0: none. Unlike
            :func:`varkern.ops.sample_tokens`, ties at the boundary are split in the order that ``torch.sort`` gives.

    Raises:
        ValueError: if ``top_k`` is negative, or ``top_p`` outside [0, 1].
    """
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0, got {top_k}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p must be in [0, 1], got {top_p}")
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(torch.empty_like(dropped).scatter_(-1, order, dropped), -torch.inf)
    return logits


def sample_multinomial(logits: Tensor, num_candidates: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """M independent draws per position from filtered logits ``[B, l, V]``: tokens ``[B, M, l]`` int64."""
    batch, length, vocab = logits.shape
    draws = torch.multinomial(logits.softmax(-1).view(-1, vocab), num_candidates, replacement=True, generator=generator)
    return draws.view(batch, length, num_candidates).transpose(1, 2)


def smoothing_temperature(ratio: float) -> float:
    """Temperature of the published ``more_smooth`` at ``ratio`` = k / (K - 1)."""
    return max(0.27 * (1 - ratio * 0.95), 0.005)


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """``softmax((logits + Gumbel noise) / temperature)`` over the last dimension, shape and dtype of ``logits``."""
    noise = torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_(generator=generator)
    return ((logits - noise.log()) / temperature).softmax(-1)


def mix_codes(weights: Tensor, codebook: Tensor) -> Tensor:
    """Codes ``[B, l, C]``, mixed from the codebook ``[V, C]`` by weights ``[B, l, V]``.

    Autocast rounds both factors, as it does in the published code; without it the weights take the codebook's dtype.
    """
    kind = weights.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        weights = weights.to(codebook.dtype)
    # A batched product, as in the published code, because an unbatched one rounds differently.
    return weights @ codebook.unsqueeze(0)
