"""Loading checkpoints: sizes are read from the file, nothing is unpickled, and errors are clear."""

import builtins
import json
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import TINY_SIDES, small_vae, small_var
from varkern.models import load_vae, load_var
from varkern.models.loading import read_state_dict, save_model

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
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    model = load_var(write(tmp_path / "var.pth", small_var(vae=vae)), vae=vae, patch_nums=TINY_SIDES)
    assert model.vae_proxy[0] is vae and model.vae_quant_proxy[0] is vae.quantize
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


@pytest.mark.parametrize("loaded", [True, False], ids=["a loaded VAE", "a VAE's path"])
@pytest.mark.parametrize("where", [{"device": "meta"}, {"dtype": torch.bfloat16}], ids=["device", "dtype"])
def test_both_models_go_where_they_are_wanted(where, loaded, tmp_path):
    vae = small_vae(ch=32, norm_groups=32)
    path = write(tmp_path / "var.pth", small_var(vae=vae))
    given = vae if loaded else write(tmp_path / "vae.pth", vae)
    model = load_var(path, vae=given, patch_nums=TINY_SIDES, **where)
    assert (model.vae_proxy[0] is vae) == loaded
    for part in (model, model.vae_proxy[0]):
        assert {p.device.type for p in part.parameters()} == {where.get("device", "cpu")}
        assert {p.dtype for p in part.parameters()} == {where.get("dtype", torch.float32)}


def test_a_loaded_vae_of_another_schedule(tmp_path):
    path = write(tmp_path / "var.pth", small_var())
    with pytest.raises(ValueError, match=r"patch_nums must be .*\(1, 2, 3, 5, 6\), got \(1, 2, 3, 4, 6\)"):
        load_var(path, vae=small_vae((1, 2, 3, 5, 6)), patch_nums=TINY_SIDES)


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
        path.write_bytes(pickle.dumps(content, protocol=2))  # torch.save's own
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"model\.pth (holds more than tensors|is not a readable checkpoint)"):
        load(path)
    assert not hasattr(builtins, "bomb_went_off")


def broken(kind, path):
    """A file that is not a checkpoint, of one of several kinds."""
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
    with pytest.raises(ValueError, match=r"vae must be given when source is the path .*var\.pth.*, got None"):
        load_var(write(tmp_path / "var.pth", small_var()), patch_nums=TINY_SIDES)


def test_the_two_files_swapped(tmp_path):
    var_path, vae_path = write(tmp_path / "var.pth", small_var()), write(tmp_path / "vae.pth", small_vae())
    with pytest.raises(ValueError, match=r"vae\.pth is not a VAR checkpoint"):
        load_var(vae_path, vae=var_path, patch_nums=TINY_SIDES)
    with pytest.raises(ValueError, match=r"var\.pth is not a VQ-VAE checkpoint"):
        load_vae(var_path)


def find_unreported_keys(load, module, path):
    """The keys of ``module``'s state dict that the error does not contain when they are missing from the file."""
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
    silent = find_unreported_keys(
        lambda path: load_var(path, vae=vae, patch_nums=TINY_SIDES), model, tmp_path / "var.pth"
    )
    assert silent == []


def test_a_missing_vae_key_is_named(tmp_path):
    vae = small_vae(ch=32, ch_mult=(1, 1), norm_groups=32, num_res_blocks=1)
    assert find_unreported_keys(lambda path: load_vae(path, v_patch_nums=TINY_SIDES), vae, tmp_path / "vae.pth") == []


def test_a_key_too_many_is_named(tmp_path):
    model = small_var()
    torch.save(model.state_dict() | {"extra": torch.zeros(1)}, tmp_path / "var.pth")
    with pytest.raises(ValueError, match=r"(?s)var\.pth does not match .*extra"):
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
    with pytest.raises(ValueError, match=r"(?s)var\.pth does not match .*head\.weight"):
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
    # The hub extra may not be installed; this stand-in has all that loading uses of it.
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hub))
    model = load_var("d20", patch_nums=TINY_SIDES)
    assert asked == [("FoundationVision/var", name) for name in files]
    assert model.config["patch_nums"] == list(TINY_SIDES)


def test_a_local_file_called_like_a_short_name_comes_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save(small_var().state_dict(), "d16")
    assert load_var("d16", vae=small_vae(), patch_nums=TINY_SIDES).depth == 2


def test_patch_nums_that_contradict_the_file_are_refused(tmp_path):
    var = small_var()
    save_model(var, tmp_path / "var.safetensors")
    with pytest.raises(ValueError, match=r"patch_nums must be \[1, 2, 3, 4, 6\]"):
        load_var(tmp_path / "var.safetensors", vae=var.vae_proxy[0], patch_nums=(1, 2, 3, 5, 6))


def test_the_demo_model_loads_by_its_short_name():
    var = load_var("demo")
    assert (var.num_classes, var.patch_nums, var.V, var.Cvae) == (10, (1, 2, 3, 4, 6), 256, 16)
    assert not var.training and not any(p.requires_grad for p in var.parameters())
