"""Small models with weights that show mistakes, and what tests ask of models again and again.

The published initialiser gives logits so flat that a broken cache or a swapped gate changes no token. Here every bias,
gate and norm is random, and the head is scaled until logits spread by two or more.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from varkern import Scorer, ScorerConfig
from varkern.models import PATCH_NUMS_256, VAR, VQVAE, var, vqvae

TINY_SIDES = (1, 2, 3, 4, 6)
NUM_CLASSES = 7


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter and float buffer of a VAR, a VQVAE or a Scorer with random numbers that all matter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    for name, tensor in module.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "scale_mul_1H11":
            normal(tensor, 0.4, math.log(6.0))
            tensor[:, 0] = 5.0  # above the clamp at log 100
        elif leaf == "ada_gss":
            normal(tensor, 0.5)
        elif tensor.dim() == 1:
            normal(tensor, 0.3, 1.0 if leaf == "weight" else 0.0)
        elif any(table in name for table in ("embed.weight", "emb.weight", "embedding", "pos_")) and "word" not in name:
            normal(tensor, 0.8)
        else:
            normal(tensor, 1 / math.sqrt(tensor[0].numel()))
    if isinstance(module, VAR):
        module.head.weight.mul_(2.5)
    if isinstance(module, VQVAE):
        module.decoder.conv_out.weight.mul_(0.5)  # so that few pixels are clamped
        module.decoder.conv_out.bias.mul_(0.5)
        normal(module.quantize.ema_vocab_hit_SV, 1.0)
    return module


@contextlib.contextmanager
def without_initial_weights() -> Iterator[None]:
    """No layer gets weights when it is made: :func:`randomise` fills them all, and the others take half of the time."""
    layers = (nn.Linear, nn.modules.conv._ConvNd, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
    with pytest.MonkeyPatch.context() as patch:
        for layer in layers:
            patch.setattr(layer, "reset_parameters", lambda self: None)
        for module in (var, vqvae):
            patch.setattr(module, "initialize", lambda made: None)
        yield


def small_vae(sides=TINY_SIDES, *, seed: int = 0, **config) -> VQVAE:
    """A VQ-VAE with two resolutions, V=64 and C=8 unless ``config`` says otherwise."""
    config = {"vocab_size": 64, "z_channels": 8, "ch": 8, "ch_mult": (1, 2), "norm_groups": 4} | config
    with without_initial_weights():
        made = VQVAE(**config, v_patch_nums=sides)
    return randomise(made, seed)


def small_var(sides=TINY_SIDES, *, seed: int = 0, vae: VQVAE | None = None, **config) -> VAR:
    """A VAR of two blocks, width 32 and two heads, in evaluation mode and without gradients."""
    config = {"num_classes": NUM_CLASSES, "depth": 2, "embed_dim": 32, "num_heads": 2} | config
    vae = vae or small_vae(sides, seed=seed)
    with without_initial_weights():
        model = VAR(vae, **config, patch_nums=sides)
    return randomise(model, seed + 1).eval().requires_grad_(False)


def ten_scale_var(**config) -> VAR:
    """The published schedule of 256 px at small width: V=128, C=16, images of 64 px."""
    vae = small_vae(PATCH_NUMS_256, vocab_size=128, z_channels=16, ch_mult=(1, 1, 2))
    return small_var(PATCH_NUMS_256, vae=vae, **({"embed_dim": 64, "num_heads": 4, "depth": 3} | config))


def small_scorer(**changes) -> Scorer:
    """A scorer that fits :func:`small_var`."""
    fitting = {
        "num_classes": NUM_CLASSES,
        "num_scales": 5,
        "channels": 8,
        "size": 6,
        "widths": (8, 8),
        "hidden": (16, 8),
    }
    with without_initial_weights():
        made = Scorer(ScorerConfig(**(fitting | changes)))
    return randomise(made, 0).eval().requires_grad_(False)


class ForkedVAR(VAR):
    """A fork whose method takes an argument more."""

    def autoregressive_infer_cfg(self, B, label_B, g_seed=None, cfg=1.5, top_k=0, top_p=0.0, more_smooth=False, echo=0):
        return super().autoregressive_infer_cfg(B, label_B, g_seed, cfg, top_k, top_p, more_smooth)


def forked() -> VAR:
    """A small model of a class derived from ours."""
    model = small_var()
    model.__class__ = ForkedVAR
    return model


@contextlib.contextmanager
def recorded(module: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of ``module``'s forward, one a call."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: outputs.append(output.clone()))
    try:
        yield outputs
    finally:
        handle.remove()


def on(model: VAR, device: torch.device) -> VAR:
    """``model`` and its VQ-VAE, which is no submodule, on ``device``, with a generator there."""
    model.vae_proxy[0].to(device)
    model.rng = torch.Generator(device)
    return model.to(device)


def random_states(model: VAR | None = None) -> list[Tensor]:
    """The states of PyTorch's default generators and of the model's own."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return states if model is None else [*states, model.rng.get_state()]


@contextlib.contextmanager
def idle(model: VAR) -> Iterator[None]:
    """Fails if inside a block of ``model`` runs, its generator is replaced, or any random state changes."""
    before, generator = random_states(model), model.rng
    with contextlib.ExitStack() as hooks:
        ran = [hooks.enter_context(recorded(block)) for block in model.blocks]
        yield
    assert not any(ran), f"calls of the blocks: {[len(calls) for calls in ran]}"
    assert model.rng is generator
    assert all(torch.equal(*states) for states in zip(before, random_states(model), strict=True)), "a random state"


def caches_closed(model: VAR) -> bool:
    return all(b.attn.cached_k is None and b.attn.cached_v is None and not b.attn.caching for b in model.blocks)


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    assert actual.shape == wanted.shape, (actual.shape, wanted.shape)
    return ((actual.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


def rendered(figure, tmp_path) -> np.ndarray:
    """The pixels ``[H, W, 3]`` of a figure as it is saved."""
    from PIL import Image

    from varkern.studies.pictures import save_png

    save_png(figure, tmp_path / "rendered.png")
    with Image.open(tmp_path / "rendered.png") as picture:
        return np.asarray(picture.convert("RGB"))
