"""Load checkpoints. Sizes are read from the state dict, weights load with ``strict=True``, and nothing is unpickled."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from varkern.runs import write_tensors

from .var import PATCH_NUMS_256, PATCH_NUMS_512, VAR
from .vqvae import VQVAE

Model = TypeVar("Model", bound=nn.Module)
HUB_REPOSITORY = "FoundationVision/var"
HUB_FILES = {name: f"var_{name}.pth" for name in ("d16", "d20", "d24", "d30", "d36")}
HUB_VAE = "vae_ch160v4096z32.pth"
SCHEDULES = {sum(side * side for side in sides): sides for sides in (PATCH_NUMS_256, PATCH_NUMS_512)}


def read_state_dict(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a ``.safetensors`` or PyTorch file, and the config in its metadata (empty if there is none).

    PyTorch files are read with ``weights_only=True``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file does not hold a plain state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            config = json.loads(read_metadata(path).get("config", "{}"))
            if not isinstance(config, dict):
                raise ValueError(f"its config is {config!r}, not a JSON object")
            return load_file(path), config
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    except Exception as error:  # pickle.UnpicklingError: the file holds other objects than tensors
        raise ValueError(f"{path} holds more than tensors and is not loaded: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a plain state dict (a mapping of names to tensors)")
    return dict(state), {}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts in the metadata of a ``.safetensors`` file; empty for a PyTorch file."""
    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def save_model(model: VAR | VQVAE, path: str | os.PathLike[str]) -> None:
    """Write a model's weights and config to a safetensors file that :func:`load_var` or :func:`load_vae` can read."""
    write_tensors(path, model.state_dict(), {"config": json.dumps(model.config)})


def count_modules(state: Mapping[str, Tensor], prefix: str) -> int:
    """The number of numbered children of the module ``prefix`` in a state dict."""
    numbers = {int(m[1]) for key in state if (m := re.match(re.escape(prefix) + r"\.(\d+)\.", key))}
    return len(numbers)


def vae_config(state: Mapping[str, Tensor], v_patch_nums: Sequence[int]) -> dict[str, Any]:
    """The arguments of :class:`VQVAE` that follow from a state dict. Other arguments keep their published defaults."""
    ch = state["encoder.conv_in.weight"].shape[0]
    levels = count_modules(state, "encoder.down")
    blocks = count_modules(state, "encoder.down.0.block")
    widths = [state[f"encoder.down.{i}.block.{blocks - 1}.conv2.weight"].shape[0] for i in range(levels)]
    if "quantize.quant_resi.qresi.weight" in state:
        shared = 1
    else:
        shared = count_modules(state, "quantize.quant_resi.qresi_ls")
    vocab_size, z_channels = state["quantize.embedding.weight"].shape
    return {
        "vocab_size": vocab_size,
        "z_channels": z_channels,
        "ch": ch,
        "ch_mult": [width // ch for width in widths],
        "num_res_blocks": blocks,
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "quant_conv_ks": state["quant_conv.weight"].shape[-1],
        "share_quant_resi": shared,
        "v_patch_nums": list(v_patch_nums),
    }


def var_config(state: Mapping[str, Tensor], patch_nums: Sequence[int] | None) -> dict[str, Any]:
    """The arguments of :class:`VAR` that follow from a state dict.

    Raises:
        ValueError: the schedule is not a published one, and ``patch_nums`` does not match it.
    """
    length, width = state["pos_1LC"].shape[1:]
    scales = state["lvl_embed.weight"].shape[0]
    patch_nums = patch_nums or SCHEDULES.get(length)
    if patch_nums is None or len(patch_nums) != scales or sum(side * side for side in patch_nums) != length:
        raise ValueError(f"patch_nums must give {scales} scales of {length} tokens in all, got {patch_nums}")
    depth = count_modules(state, "blocks")
    scale = next((tensor for name, tensor in state.items() if name.endswith(".attn.scale_mul_1H11")), None)
    return {
        "num_classes": state["class_emb.weight"].shape[0] - 1,
        "depth": depth,
        "embed_dim": width,
        "num_heads": depth if scale is None else scale.shape[1],
        "mlp_ratio": state["blocks.0.ffn.fc1.weight"].shape[0] / width,
        "shared_aln": any(name.endswith(".ada_gss") for name in state),
        "attn_l2_norm": scale is not None,
        "patch_nums": list(patch_nums),
    }


def download(filename: str) -> Path:
    """The path of the local copy of a published checkpoint, which is downloaded on first use.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"{filename} must be downloaded with huggingface_hub, which is not installed: "
            "run pip install 'varkern[hub]', or give the path of your copy"
        ) from error
    return Path(hf_hub_download(HUB_REPOSITORY, filename))


def _derive_config(
    read: Callable[..., dict[str, Any]], state: Mapping[str, Tensor], sides: Any, path: Path
) -> dict[str, Any]:
    try:
        return read(state, sides)
    except KeyError as error:
        raise ValueError(f"{path} is not a complete checkpoint: it has no {error.args[0]}") from error


def _assemble(build: Callable[..., Model], config: dict[str, Any], state: dict[str, Tensor], path: Path) -> Model:
    # On the meta device no weights are allocated or initialised: the checkpoint's tensors become the weights.
    try:
        with torch.device("meta"):
            model = build(**config)
    except TypeError as error:
        raise ValueError(f"{path} has an invalid config: {error}") from error
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not match the model that its config or sizes describe: {error}") from error
    return model.eval().requires_grad_(False)


def load_vae(
    source: str | os.PathLike[str] = HUB_VAE,
    *,
    v_patch_nums: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VQVAE:
    """Load a VQ-VAE checkpoint.

    Args:
        source: a path, or the name of the published file, which is then downloaded.
        v_patch_nums: side of each scale's token map. None: as in the file's config, or without one the published
            schedule for 256 px.
        device: device of the model.
        dtype: dtype of its weights.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a VQ-VAE checkpoint.
        ImportError: the file must be downloaded, and huggingface_hub is not installed.

    Example::

        >>> varkern.load_vae(varkern.demo.run.WEIGHTS / "vae.safetensors").Cvae
        16
    """
    path = download(HUB_VAE) if str(source) == HUB_VAE and not Path(source).exists() else Path(source)
    state, config = read_state_dict(path)
    if "quantize.embedding.weight" not in state:
        raise ValueError(f"{path} is not a VQ-VAE checkpoint: it has no quantize.embedding.weight")
    config = config or _derive_config(vae_config, state, v_patch_nums or PATCH_NUMS_256, path)
    if v_patch_nums is not None:
        config["v_patch_nums"] = list(v_patch_nums)
    return _assemble(VQVAE, config, state, path).to(device=device, dtype=dtype)


def load_var(
    source: str | os.PathLike[str],
    *,
    vae: VQVAE | str | os.PathLike[str] | None = None,
    patch_nums: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VAR:
    """Load a VAR model and its VQ-VAE, in evaluation mode and without gradients.

    Args:
        source: path of a ``.pth`` or ``.safetensors`` state dict; or ``"d16"``, ``"d20"``, ``"d24"``, ``"d30"`` or
            ``"d36"`` for a published checkpoint, which is downloaded; or ``"demo"`` for the digits model that ships
            with varkern.
        vae: a path or a loaded :class:`VQVAE`. None is allowed if ``source`` is a short name.
        patch_nums: side of each scale's token map; needed only for schedules other than the published ones.
        device: device of both models.
        dtype: dtype of their weights. ``f_hat`` and the logits are always float32. To get the published numerics in
            half precision, keep float32 here and generate under ``torch.autocast``.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not a checkpoint of the right kind, or an argument does not match it.
        ImportError: a short name needs the ``hub`` extra.

    Example::

        >>> varkern.load_var("demo").patch_nums
        (1, 2, 3, 4, 6)
    """
    short = str(source)
    if short == "demo":
        weights = Path(__file__).parent.parent / "demo" / "weights"
        path, vae = weights / "var.safetensors", vae or weights / "vae.safetensors"
    elif short in HUB_FILES and not Path(short).exists():
        path, vae = download(HUB_FILES[short]), vae or HUB_VAE
    else:
        path = Path(source)
    if vae is None:
        raise ValueError(
            f"vae must be given when source is the path {path}: a VQ-VAE checkpoint or a loaded VQVAE, got None"
        )
    state, config = read_state_dict(path)
    if "pos_1LC" not in state or "lvl_embed.weight" not in state:
        raise ValueError(f"{path} is not a VAR checkpoint: it has no pos_1LC and lvl_embed.weight")
    config = config or _derive_config(var_config, state, patch_nums, path)
    if patch_nums is not None and list(patch_nums) != list(config["patch_nums"]):
        raise ValueError(f"patch_nums must be {config['patch_nums']}, the schedule of {path}, got {list(patch_nums)}")
    if not isinstance(vae, nn.Module):
        vae = load_vae(vae, v_patch_nums=config["patch_nums"])
    vae.to(device=device, dtype=dtype)
    return _assemble(partial(VAR, vae), config, state, path).to(device=device, dtype=dtype)
