"""Facts of the published code: names, shapes and dtypes in the checkpoints, and a builder that leaves weights unset."""

import pytest
import torch

from tests.helpers import TINY_SIDES, small_var
from varkern.models import PATCH_NUMS_256, PATCH_NUMS_512, VAR, VQVAE

F32, INT64 = torch.float32, torch.int64


def published_var(depth, sides, shared):
    """Names, shapes and dtypes of ``var_d*.pth``."""
    width, length, scales = 64 * depth, sum(s * s for s in sides), len(sides)
    rules = {
        "word_embed.weight": (width, 32),
        "word_embed.bias": (width,),
        "class_emb.weight": (1001, width),
        "pos_start": (1, 1, width),
        "pos_1LC": (1, length, width),
        "lvl_embed.weight": (scales, width),
        "attn_bias_for_masking": (1, 1, length, length),
        "head_nm.ada_lin.1.weight": (2 * width, width),
        "head_nm.ada_lin.1.bias": (2 * width,),
        "head.weight": (4096, width),
        "head.bias": (4096,),
    }
    if shared:
        rules |= {"shared_ada_lin.1.weight": (6 * width, width), "shared_ada_lin.1.bias": (6 * width,)}
    for i in range(depth):
        block = {
            "attn.scale_mul_1H11": (1, depth, 1, 1),
            "attn.q_bias": (width,),
            "attn.v_bias": (width,),
            "attn.zero_k_bias": (width,),
            "attn.mat_qkv.weight": (3 * width, width),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "ffn.fc1.weight": (4 * width, width),
            "ffn.fc1.bias": (4 * width,),
            "ffn.fc2.weight": (width, 4 * width),
            "ffn.fc2.bias": (width,),
        }
        if shared:
            block["ada_gss"] = (1, 1, 6, width)
        else:
            block |= {"ada_lin.1.weight": (6 * width, width), "ada_lin.1.bias": (6 * width,)}
        rules |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return {name: (shape, F32) for name, shape in rules.items()} | {"lvl_1L": ((1, length), INT64)}


def published_vae():
    """Names, shapes and dtypes of ``vae_ch160v4096z32.pth``: widths 160 160 320 320 640, two blocks each."""
    widths, rules = [160, 160, 320, 320, 640], {}

    def layer(name, *shape):
        rules[f"{name}.weight"], rules[f"{name}.bias"] = shape, shape[:1]

    def residual(name, entering, leaving):
        layer(f"{name}.norm1", entering)
        layer(f"{name}.conv1", leaving, entering, 3, 3)
        layer(f"{name}.norm2", leaving)
        layer(f"{name}.conv2", leaving, leaving, 3, 3)
        if entering != leaving:
            layer(f"{name}.nin_shortcut", leaving, entering, 1, 1)

    def attention(name):
        layer(f"{name}.norm", 640)
        layer(f"{name}.qkv", 1920, 640, 1, 1)
        layer(f"{name}.proj_out", 640, 640, 1, 1)

    def ends(name, entering, narrow, leaving, last):
        layer(f"{name}.conv_in", narrow, entering, 3, 3)
        for i in (1, 2):
            residual(f"{name}.mid.block_{i}", 640, 640)
        attention(f"{name}.mid.attn_1")
        layer(f"{name}.norm_out", last)
        layer(f"{name}.conv_out", leaving, last, 3, 3)

    ends("encoder", 3, 160, 32, 640)
    ends("decoder", 32, 640, 3, 160)
    for i, width in enumerate(widths):
        below, above = widths[max(i - 1, 0)], widths[min(i + 1, 4)]
        for j in range(2):
            residual(f"encoder.down.{i}.block.{j}", below if j == 0 else width, width)
        for j in range(3):
            residual(f"decoder.up.{i}.block.{j}", above if j == 0 else width, width)
        if i < 4:
            layer(f"encoder.down.{i}.downsample.conv", width, width, 3, 3)
        if i > 0:
            layer(f"decoder.up.{i}.upsample.conv", width, width, 3, 3)
    for j in range(2):
        attention(f"encoder.down.4.attn.{j}")
    for j in range(3):
        attention(f"decoder.up.4.attn.{j}")
    for i in range(4):
        layer(f"quantize.quant_resi.qresi_ls.{i}", 32, 32, 3, 3)
    layer("quant_conv", 32, 32, 3, 3)
    layer("post_quant_conv", 32, 32, 3, 3)
    rules |= {"quantize.embedding.weight": (4096, 32), "quantize.ema_vocab_hit_SV": (10, 4096)}
    return {name: (shape, F32) for name, shape in rules.items()}


def structure(module):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    "depth, sides, shared",
    [(16, PATCH_NUMS_256, False), (30, PATCH_NUMS_256, False), (36, PATCH_NUMS_512, True)],
    ids=["d16", "d30", "d36"],
)
def test_published_var_structure(depth, sides, shared):
    with torch.device("meta"):
        model = VAR(VQVAE(v_patch_nums=sides), depth=depth, shared_aln=shared, patch_nums=sides)
    wanted = published_var(depth, sides, shared)
    assert structure(model) == wanted
    if depth == 16:  # written out, in case the rules above share a mistake with the code
        assert wanted["blocks.15.attn.mat_qkv.weight"] == ((3072, 1024), F32)
        assert wanted["lvl_1L"] == ((1, 680), INT64)
        assert wanted["attn_bias_for_masking"] == ((1, 1, 680, 680), F32)
        assert len(wanted) == 12 + 16 * 13


def test_published_vae_structure():
    with torch.device("meta"):
        model = VQVAE()
    assert structure(model) == published_vae()


def test_buffers_hold_levels_and_mask():
    model = small_var()
    levels = [k for k, side in enumerate(TINY_SIDES) for _ in range(side * side)]
    assert model.lvl_1L.tolist() == [levels]
    mask = model.attn_bias_for_masking[0, 0]
    seen = torch.tensor([[0.0 if b <= a else -float("inf") for b in levels] for a in levels])
    assert torch.equal(mask, seen)


def test_published_builders_switch_off_is_survived(monkeypatch):
    # The published builder disables reset_parameters of PyTorch's layers for the whole process.
    for layer in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.Embedding):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    vae = VQVAE(vocab_size=64, z_channels=8, ch=8, ch_mult=(1, 2), norm_groups=4, v_patch_nums=TINY_SIDES)
    model = VAR(vae, 7, depth=2, embed_dim=32, patch_nums=TINY_SIDES)
    for module in (vae, model):
        assert [name for name, p in module.named_parameters() if not p.isfinite().all()] == []
