"""The models of the generation benchmark: random weights of the published sizes, and the published loop."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from varkern.models import VAR, VQVAE
from varkern.models.transformer import SelfAttention
from varkern.scorer import Scorer, ScorerConfig

# About the standard deviation of a trained VAR's logits. Initial weights give flat logits, which take other time to
# sample.
LOGITS_SPREAD = 2.5


class ConcatenatingAttention(SelfAttention):
    """Attention whose cache grows by concatenation at every scale, as in the published class."""

    def _append(self, cache: Tensor | None, x: Tensor, end: int) -> Tensor:
        return x if cache is None else torch.cat((cache, x), dim=2)


@contextmanager
def as_published(var: VAR) -> Iterator[VAR]:
    """Let ``var`` take the time of the published loop: its own eager method, with caches that grow."""
    for block in var.blocks:
        block.attn.__class__ = ConcatenatingAttention
    try:
        yield var
    finally:
        for block in var.blocks:
            block.attn.__class__ = SelfAttention


def random_models(depth: int, device: torch.device, small: bool = False) -> tuple[VAR, Scorer]:
    """VAR in float32 with the published sizes and its scorer; ``small``: small sizes for a rehearsal."""
    torch.manual_seed(depth)
    if small:
        sides = (1, 2, 4)
        vae = VQVAE(64, 8, 8, ch_mult=(1, 1), num_res_blocks=1, norm_groups=4, v_patch_nums=sides)
        var = VAR(vae, num_classes=10, depth=depth, embed_dim=32, num_heads=2, patch_nums=sides)
        scorer = Scorer(ScorerConfig(10, 3, 8, 4, widths=(8,), embedding=8, hidden=(8,)))
    else:
        with torch.device(device):
            vae = VQVAE()
            var, scorer = VAR(vae, depth=depth), Scorer()
    with torch.no_grad():
        torch.nn.init.normal_(var.head.weight, std=LOGITS_SPREAD / math.sqrt(var.C))
    vae.to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return var.to(device).eval().requires_grad_(False), scorer.to(device, dtype).eval().requires_grad_(False)


def upstream_model(folder: Path, ours: VAR) -> Any:
    """The published class from a checkout at ``folder``, with the weights of ``ours``.

    Raises:
        ValueError: if ``folder`` is not a checkout of FoundationVision/VAR.
    """
    if not (folder / "models" / "var.py").is_file():
        raise ValueError(f"--upstream must be a checkout of FoundationVision/VAR, got {folder}")
    sys.path.insert(0, str(folder))
    try:
        from models import build_vae_var
    finally:
        sys.path.remove(str(folder))
    device = ours.lvl_1L.device
    # build_vae_var removes the initialization from PyTorch's layers permanently. It is restored here, because the
    # weights of models made later would be uninitialized memory.
    layers = [layer for layer in vars(nn).values() if hasattr(layer, "reset_parameters")]
    with ExitStack() as restored:
        for layer in layers:
            restored.enter_context(patch.object(layer, "reset_parameters", layer.reset_parameters))
        vae, var = build_vae_var(
            device, ours.patch_nums, V=ours.V, Cvae=ours.Cvae, num_classes=ours.num_classes, depth=ours.depth
        )
    vae.load_state_dict(ours.vae_proxy[0].state_dict(), strict=True)
    var.load_state_dict(ours.state_dict(), strict=True)
    return var.eval().requires_grad_(False)
