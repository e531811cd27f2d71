"""Checkpoints: the published names, shapes and dtypes; sizes read off the file; nothing unpickled; clear errors."""

import builtins
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import TINY_SIDES, small_vae, small_var
from varkern.models import PATCH_NUMS_256, PATCH_NUMS_512, VAR, VQVAE, load_vae, load_var
from varkern.models.loading import read_state_dict, save_model

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
    """Names, shapes and dtypes of ``vae_ch160v4096z32.pth``: widths 160 160 320 320 640, two blocks a resolution."""
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
    if depth == 16:  # spelled out, should the rules above share a mistake with the code
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


MODELS = {
    "separate AdaLN": {},
    "shared AdaLN": {"shared_aln": True},
    "3 blocks, 4 heads": {"depth": 3, "num_heads": 4},
    "wide MLP, other classes": {"mlp_ratio": 2.5, "num_classes": 3},
}


def write(path, module):
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, path)
    else:
        torch.save(module.state_dict(), path)
    return path


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_sizes_are_read_off_the_state_dict(config, suffix, tmp_path):
    # Group norms of 32 groups, as published: their number is in no state dict.
    vae = small_vae(ch=32, ch_mult=(1, 2), num_res_blocks=1, norm_groups=32)
    model = small_var(vae=vae, **config)
    paths = write(tmp_path / f"var.{suffix}", model), write(tmp_path / f"vae.{suffix}", vae)
    loaded = load_var(paths[0], vae=paths[1], patch_nums=TINY_SIDES)
    assert loaded.config == model.config
    assert loaded.vae_proxy[0].config == vae.config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    labels = torch.tensor([1, 2])
    assert torch.equal(loaded.autoregressive_infer_cfg(2, labels, 0), model.autoregressive_infer_cfg(2, labels, 0))


def test_the_files_own_config(tmp_path):
    vae = small_vae(ch_mult=(1, 1, 2), num_res_blocks=1, in_channels=1, norm_groups=2, share_quant_resi=2)
    model = small_var(vae=vae, attn_l2_norm=False, num_heads=4)
    save_model(model, tmp_path / "var.safetensors")
    save_model(vae, tmp_path / "vae.safetensors")
    loaded = load_var(tmp_path / "var.safetensors", vae=tmp_path / "vae.safetensors")
    assert loaded.config == model.config and loaded.vae_proxy[0].config == vae.config
    assert torch.equal(loaded.autoregressive_infer_cfg(2, 1, 0), model.autoregressive_infer_cfg(2, 1, 0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vae.safetensors", "var.safetensors"]


@pytest.mark.parametrize("share", [0, 1, 2, 4])
def test_sharing_of_phi_layers_is_read_off(share, tmp_path):
    vae = small_vae(ch=32, norm_groups=32, share_quant_resi=share)
    assert load_vae(write(tmp_path / "vae.pth", vae), v_patch_nums=TINY_SIDES).config == vae.config


def test_a_vae_checkpoint_serves_another_schedule(tmp_path):
    path = write(tmp_path / "vae.pth", small_vae(ch=32, norm_groups=32))
    vae = load_vae(path, v_patch_nums=(1, 3, 6))
    assert vae.quantize.v_patch_nums == (1, 3, 6)
    assert [ids.shape for ids in vae.img_to_idxBl(torch.zeros(1, 3, 12, 12))] == [(1, 1), (1, 9), (1, 36)]
    assert vae.state_dict()["quantize.ema_vocab_hit_SV"].shape == (3, 64)


def test_a_loaded_vae_is_taken_as_it_is(tmp_path):
    vae = small_vae()
    model = load_var(write(tmp_path / "var.pth", small_var(vae=vae)), vae=vae, patch_nums=TINY_SIDES)
    assert model.vae_proxy[0] is vae and model.vae_quant_proxy[0] is vae.quantize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtype(dtype, tmp_path):
    vae = small_vae(ch=32, norm_groups=32)
    paths = write(tmp_path / "var.pth", small_var(vae=vae)), write(tmp_path / "vae.pth", vae)
    model = load_var(paths[0], vae=paths[1], patch_nums=TINY_SIDES, dtype=dtype)
    assert {p.dtype for m in (model, model.vae_proxy[0]) for p in m.parameters()} == {dtype}
    assert model.lvl_1L.dtype == torch.int64
    assert model.autoregressive_infer_cfg(1, 2, 0).isfinite().all()


class Bomb:
    def __reduce__(self):
        return builtins.exec, ("import builtins; builtins.bomb_went_off = True",)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
@pytest.mark.parametrize("load", [load_vae, lambda path: load_var(path, vae=path)], ids=["vae", "var"])
def test_other_objects_are_refused_and_not_run(how, load, tmp_path):
    path, content = tmp_path / "model.pth", {"quantize.embedding.weight": torch.zeros(2, 2), "pos_1LC": Bomb()}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"model\.pth (holds more than tensors|is not a readable checkpoint)"):
        load(path)
    assert not hasattr(builtins, "bomb_went_off")


def broken(kind, path):
    """A file that is no checkpoint, in one of the ways that happen."""
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("version https://git-lfs.github.com/spec/v1\n")
        case "nested":
            torch.save({"trainer": {"var_wo_ddp": {}}}, path)
        case "list":
            torch.save([torch.zeros(1)], path)
        case "cut short":
            write(path, small_vae())
            path.write_bytes(path.read_bytes()[:5000])
    return path


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("kind", ["empty", "text", "nested", "list", "cut short"])
def test_broken_files(kind, suffix, tmp_path):
    if suffix == "safetensors" and kind in ("nested", "list"):
        kind = "text"  # the format holds tensors only
    with pytest.raises(ValueError, match=rf"model\.{suffix} (is not|holds more)"):
        read_state_dict(broken(kind, tmp_path / f"model.{suffix}"))


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.pth"):
        load_var(tmp_path / "nowhere.pth", vae=small_vae())
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.pth"):
        load_vae(tmp_path / "nowhere.pth")
    path = write(tmp_path / "var.pth", small_var())
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*vae\.pth"):
        load_var(path, vae=tmp_path / "vae.pth", patch_nums=TINY_SIDES)


def test_vae_must_be_given(tmp_path):
    with pytest.raises(ValueError, match=r"vae must be given beside the path .*var\.pth"):
        load_var(write(tmp_path / "var.pth", small_var()), patch_nums=TINY_SIDES)


def test_the_two_files_swapped(tmp_path):
    var_path, vae_path = write(tmp_path / "var.pth", small_var()), write(tmp_path / "vae.pth", small_vae())
    with pytest.raises(ValueError, match=r"vae\.pth is not a VAR checkpoint"):
        load_var(vae_path, vae=var_path, patch_nums=TINY_SIDES)
    with pytest.raises(ValueError, match=r"var\.pth is not a VQ-VAE checkpoint"):
        load_vae(var_path)


def unnamed(load, module, path):
    """The keys of ``module``'s state dict whose lack is not told by name when the file is loaded."""
    state, silent = module.state_dict(), []
    for key in [k for k in state if not k.endswith("bias")]:
        torch.save({k: v for k, v in state.items() if k != key}, path)
        with pytest.raises(ValueError) as caught:
            load(path)
        if key not in str(caught.value) or path.name not in str(caught.value):
            silent.append((key, str(caught.value)))
    return silent


@pytest.mark.parametrize("shared_aln", [False, True], ids=["separate AdaLN", "shared AdaLN"])
def test_a_missing_var_key_is_named(shared_aln, tmp_path):
    vae = small_vae()
    model = small_var(vae=vae, shared_aln=shared_aln)
    assert unnamed(lambda path: load_var(path, vae=vae, patch_nums=TINY_SIDES), model, tmp_path / "var.pth") == []


def test_a_missing_vae_key_is_named(tmp_path):
    vae = small_vae(ch=32, ch_mult=(1, 1), norm_groups=32, num_res_blocks=1)
    assert unnamed(lambda path: load_vae(path, v_patch_nums=TINY_SIDES), vae, tmp_path / "vae.pth") == []


def test_a_key_too_many_is_named(tmp_path):
    model = small_var()
    torch.save(model.state_dict() | {"extra": torch.zeros(1)}, tmp_path / "var.pth")
    with pytest.raises(ValueError, match=r"(?s)var\.pth does not fit .*extra"):
        load_var(tmp_path / "var.pth", vae=model.vae_proxy[0], patch_nums=TINY_SIDES)


def test_a_schedule_that_does_not_fit(tmp_path):
    path = write(tmp_path / "var.pth", small_var())
    for sides in (None, (1, 2, 3), (1, 2, 3, 4, 5)):
        with pytest.raises(ValueError, match=r"patch_nums must give 5 scales of 66 tokens in all, got"):
            load_var(path, vae=small_vae(), patch_nums=sides)


def test_a_config_that_is_none(tmp_path):
    state = {k: v.contiguous() for k, v in small_var().state_dict().items()}
    for config in ({"depth": 2, "colour": 1}, [1, 2]):
        save_file(state, tmp_path / "var.safetensors", {"config": json.dumps(config)})
        with pytest.raises(ValueError, match=r"var\.safetensors .*config"):
            load_var(tmp_path / "var.safetensors", vae=small_vae())


def test_a_vae_with_other_codes(tmp_path):
    path = write(tmp_path / "var.pth", small_var())
    with pytest.raises(ValueError, match=r"(?s)var\.pth does not fit .*head\.weight"):
        load_var(path, vae=small_vae(vocab_size=32), patch_nums=TINY_SIDES)


@pytest.mark.parametrize(
    "call", [lambda: load_var("d16"), lambda: load_var("d36"), load_vae], ids=["d16", "d36", "vae"]
)
def test_a_short_name_without_the_hub_says_what_to_install(call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    real = builtins.__import__

    def no_hub(name, *args, **kwargs):
        if name.startswith("huggingface_hub"):
            raise ModuleNotFoundError("No module named 'huggingface_hub'", name="huggingface_hub")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_hub)
    with pytest.raises(ImportError, match=r"pip install 'varkern\[hub\]', or give the path"):
        call()


def test_a_short_name_asks_the_hub_for_both_files(monkeypatch, tmp_path):
    vae = small_vae(ch=32, norm_groups=32)
    files = {"var_d20.pth": small_var(vae=vae), "vae_ch160v4096z32.pth": vae}
    asked = []

    def hub(repository, filename):
        asked.append((repository, filename))
        return str(write(tmp_path / filename, files[filename]))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    model = load_var("d20", patch_nums=TINY_SIDES)
    assert asked == [("FoundationVision/var", name) for name in files]
    assert model.config["patch_nums"] == list(TINY_SIDES)


def test_a_local_file_called_like_a_short_name_comes_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save(small_var().state_dict(), "d16")
    assert load_var("d16", vae=small_vae(), patch_nums=TINY_SIDES).depth == 2


def test_published_builders_switch_off_is_survived(monkeypatch):
    # The published builder replaces reset_parameters of PyTorch's layers by nothing, for the whole process.
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


def test_patch_nums_that_contradict_the_file_are_refused(tmp_path):
    var = small_var()
    save_model(var, tmp_path / "var.safetensors")
    with pytest.raises(ValueError, match=r"patch_nums must be \[1, 2, 3, 4, 6\]"):
        load_var(tmp_path / "var.safetensors", vae=var.vae_proxy[0], patch_nums=(1, 2, 3, 5, 6))


def test_the_demo_model_loads_by_its_short_name():
    var = load_var("demo")
    assert (var.num_classes, var.patch_nums, var.V, var.Cvae) == (10, (1, 2, 3, 4, 6), 256, 16)
    assert not var.training and not any(p.requires_grad for p in var.parameters())
