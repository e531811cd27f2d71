"""Infinity (FoundationVision/Infinity): text to image, binary spherical quantization, one running sum of codes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from varkern.spec import ModelSpec, Request, is_int

from .base import Draws, check_options, is_single, seeded
from .infinity_session import InfinitySession, Settings, attention, repeat_texts

MODEL_ATTRIBUTES = (
    "autoregressive_infer_cfg",
    "rng",
    "block_chunks",
    "unregistered_blocks",
    "text_norm",
    "text_proj_for_sos",
    "text_proj_for_ca",
    "cfg_uncond",
    "pos_start",
    "lvl_embed",
    "add_lvl_embeding",
    "add_lvl_embeding_only_first_block",
    "norm0_ve",
    "word_embed",
    "shared_ada_lin",
    "get_logits",
    "rope2d_freqs_grid",
    "use_bit_label",
    "apply_spatial_patchify",
    "d_vae",
    "V",
)
# The published method reads these further arguments. The others have no effect there, and none here.
READ = (
    "vae",
    "scale_schedule",
    "negative_label_B_or_BLT",
    "cfg_list",
    "tau_list",
    "returns_vemb",
    "cfg_insertion_layer",
    "vae_type",
    "ret_img",
    "trunk_scale",
    "gt_leak",
    "gt_ls_Bl",
)
UNREAD = (
    "force_gt_Bhw",
    "cfg_sc",
    "ratio_Bl1",
    "gumbel",
    "norm_cfg",
    "cfg_exp_k",
    "softmax_merge_topk",
    "inference_mode",
    "save_img_path",
    "sampling_per_bits",
)


class InfinityFamily:
    """See :class:`.base.Family`. Each call passes the VAE and the schedule, so no sizes are known before it.

    A text condition is the tuple that the published method takes: the concatenated features of all texts
    ``[sum of lengths, Ct5]``, the lengths, their running sum ``[B + 1]`` int32, and the longest. A scorer gets this
    tuple in place of labels.

    The model must have bit labels, as all published checkpoints do. The published method can also sample indices of a
    table (``use_bit_label=0`` and ``vae_type=0``), but its code does not define the quantizer for this.
    ``inference_mode=False`` makes the published method look for the blocks elsewhere; here it has no effect.
    """

    name = "Infinity"
    method = "autoregressive_infer_cfg"
    arguments: tuple[str, ...] = ("B", "label_B_or_BLT", "g_seed", "top_k", "top_p", *READ, *UNREAD)
    required: tuple[str, ...] = ("vae", "scale_schedule", "label_B_or_BLT", "cfg_list", "tau_list")
    has_classes = False

    def missing(self, model: Any) -> list[str]:
        names = [name for name in MODEL_ATTRIBUTES if not hasattr(model, name)]
        for name in ("unregistered_blocks", "block_chunks"):
            if name not in names and not isinstance(getattr(model, name), Iterable):
                names.append(f"{name} (as a list)")
        if "use_bit_label" not in names and not model.use_bit_label:
            names.append("use_bit_label=1 (labels that are bits)")
        if "unregistered_blocks" in " ".join(names):
            return names
        for i, block in enumerate(model.unregistered_blocks):
            if not hasattr(getattr(block, "sa", getattr(block, "attn", None)), "kv_caching"):
                return [*names, f"unregistered_blocks[{i}].sa.kv_caching"]
        return names

    def spec(self, model: Any, request: Request | None = None) -> ModelSpec | None:
        if request is None:
            return None
        settings = Settings(model, request, check_schedule(request))
        sides, size = settings.sides[: settings.num_scales], settings.sides[-1]
        return ModelSpec(None, sides, size, settings.width, None, self.device(model), settings.patch)

    def request(self, arguments: Mapping[str, Any]) -> Request:
        arguments = dict(arguments)
        return Request(
            batch_size=arguments.pop("B", 1),
            labels=arguments.pop("label_B_or_BLT", None),
            seed=arguments.pop("g_seed", None),
            top_k=arguments.pop("top_k", 0),
            top_p=arguments.pop("top_p", 0.0),
            options=arguments,
        )

    def steps(self, model: Any) -> list[Any]:
        return []

    def check(self, model: Any, request: Request) -> None:
        check_options(self, request, (*READ, *UNREAD))
        settings = Settings(model, request, check_schedule(request))
        check_text("label_B_or_BLT", request.labels, request.batch_size)
        if settings.negative:
            check_text("negative_label_B_or_BLT", settings.negative, request.batch_size)
        check_numbers("cfg_list", settings.cfg, len(settings.schedule))
        check_numbers("tau_list", settings.tau, len(settings.schedule), request.batch_size)
        if not all(all(numbers_in(tau)) for tau in settings.tau):
            raise ValueError(f"tau_list must not contain 0, got {list(settings.tau)}")
        depth, layers = len(model.unregistered_blocks), settings.insertion_layers
        if not isinstance(layers, Iterable) or not all(is_int(layer) and -depth < layer <= 1 for layer in layers):
            raise ValueError(f"cfg_insertion_layer must be a list of ints in {1 - depth}..1, got {layers!r}")
        check_temperatures(settings)
        check_codes(settings)
        check_leak(settings, request.batch_size)

    def device(self, model: Any) -> torch.device:
        return model.pos_start.device

    def caches(self, model: Any) -> list[Any]:
        return [attention(block) for block in model.unregistered_blocks]

    def generator(self, model: Any, seed: int | Tensor | None) -> torch.Generator | None:
        return seeded(model, seed, self.device(model))

    def repeat(self, labels: Any, count: int) -> Any:
        features, lengths, sums, longest = labels
        lengths = [int(length) for length in lengths]
        repeated = repeat_texts(features, lengths, sums, count)
        return repeated[0], [length for length in lengths for _ in range(count)], repeated[1], longest

    def images(self, published: Any) -> Tensor:
        """Only :func:`varkern.generate` asks for them, which takes class-conditional models."""
        raise NotImplementedError

    def open(self, model: Any, labels: Any, request: Request, draws: Draws) -> InfinitySession:
        return InfinitySession(model, labels, Settings(model, request, check_schedule(request)), request, draws)


def check_schedule(request: Request) -> Sequence[tuple[int, int, int]]:
    """The request's schedule, unchanged.

    Raises:
        ValueError: if it is not a schedule.
    """
    schedule: Any = request.options.get("scale_schedule")
    fits = isinstance(schedule, Sequence) and not isinstance(schedule, str) and len(schedule) > 0
    for scale in schedule if fits else ():
        fits = fits and isinstance(scale, Sequence) and len(scale) == 3 and all(is_int(n) and n >= 1 for n in scale)
        fits = fits and scale[0] == 1
    if not fits:
        raise ValueError(f"scale_schedule must be a sequence with (1, height, width) for each scale, got {schedule!r}")
    trunk = request.options.get("trunk_scale", 1000)
    if not is_int(trunk) or trunk < 1:
        raise ValueError(f"trunk_scale must be an int >= 1, got {trunk!r}")
    return schedule


def check_numbers(name: str, values: Any, count: int, batch_size: int | None = None) -> None:
    """Raise ``ValueError`` if ``values`` is not a list with a finite number for each of ``count`` scales.

    A number may be a tensor of one element. Given a ``batch_size`` it may also be a tensor of one number per image,
    ``[B, 1, 1]``, or be on a GPU, where its value is not checked; a strength of guidance decides what runs, so it must
    be on the host, as the published method needs it.
    """
    came = len(values) if hasattr(values, "__len__") else repr(values)
    if not isinstance(came, int) or came < count:
        raise ValueError(f"{name} must be a list with a number for each of {count} scales, got {came}")
    for value in values:
        fits = isinstance(value, Real) or is_single(value)
        if isinstance(value, Tensor) and batch_size is not None:
            fits = fits or value.shape == (batch_size, 1, 1)
        elif isinstance(value, Tensor):
            fits = fits and value.device.type == "cpu"
        if not fits or not all(map(math.isfinite, numbers_in(value))):
            raise ValueError(f"{name} must hold finite numbers, got {list(values)}")


def numbers_in(value: Real | Tensor) -> list[Real]:
    """The numbers of one entry of a list; of a tensor on a GPU none, because reading it would wait."""
    if isinstance(value, Tensor):
        return value.flatten().tolist() if value.device.type == "cpu" else []
    return [value]


def check_temperatures(settings: Settings) -> None:
    """Raise ``ValueError`` for a temperature per image where the doubled batch has other rows."""
    for scale, tau in enumerate(settings.tau[: settings.num_scales]):
        if isinstance(tau, Tensor) and not is_single(tau) and settings.guides_logits(scale):
            raise ValueError(
                f"tau_list must hold one number per scale, or one per image, {list(tau.shape)}, only where there is no "
                f"guidance on logits, got guidance and a tensor at scale {scale}"
            )


def check_text(name: str, text: Any, batch_size: int) -> None:
    """Raise ``ValueError`` if ``text`` is not a text condition for ``batch_size`` images."""
    wanted = f"{name} must be (features, lengths, running sum of the lengths, longest)"
    if not isinstance(text, tuple | list) or len(text) != 4:
        raise ValueError(f"{wanted}, got {type(text).__name__}")
    features, lengths, sums, _ = text
    if not isinstance(features, Tensor) or features.dim() != 2 or not isinstance(sums, Tensor):
        raise ValueError(f"{wanted}, the first and third tensors, got {type(features).__name__}, {type(sums).__name__}")
    if isinstance(lengths, list | tuple) and sum(lengths) != len(features):
        raise ValueError(f"{name} must have features of {sum(lengths)} words in all, got {len(features)}")
    if len(lengths) != batch_size or sums.shape != (batch_size + 1,):
        raise ValueError(f"{name} must be of B={batch_size} texts, got {len(lengths)} and sums {list(sums.shape)}")


def check_codes(settings: Settings) -> None:
    """Raise ``ValueError`` if the call asks for other codes than bits, or if the VAE lacks a needed method."""
    if settings.vae_type == 0:
        raise ValueError("vae_type must not be 0, which asks for indices of a table: the model's labels are bits")
    if not settings.returns_vemb:
        raise ValueError(f"returns_vemb must be 1 where vae_type is not 0, got {settings.returns_vemb!r}")
    quantizer = getattr(settings.vae, "quantizer", None)
    lacking = [f"vae.quantizer.{name}" for name in ("lfq", "z_interplote_up") if not hasattr(quantizer, name)]
    if settings.returns_images and not hasattr(settings.vae, "decode"):
        lacking.append("vae.decode")
    if lacking:
        raise ValueError(
            f"vae must have everything that the published method uses, but it has no {' and no '.join(lacking)}"
        )


def check_leak(settings: Settings, batch_size: int) -> None:
    """Raise ``ValueError`` if the given token maps do not fit their scales."""
    if not is_int(settings.num_given):
        raise ValueError(f"gt_leak must be an int, got {settings.num_given!r}")
    count = min(max(settings.num_given, 0), settings.num_scales)
    given = settings.given or ()
    if len(given) < count:
        raise ValueError(f"gt_ls_Bl must have a map for each of gt_leak={count} scales, got {len(given)}")
    for scale in range(count):
        h, w = settings.sides[scale]
        wanted = (batch_size, 1, h, w, settings.width)
        tokens = given[scale]
        if not isinstance(tokens, Tensor) or tokens.shape != wanted or tokens.is_floating_point():
            came = f"{tokens.dtype} of shape {list(tokens.shape)}" if isinstance(tokens, Tensor) else repr(tokens)
            raise ValueError(f"gt_ls_Bl[{scale}] must be integers of shape {list(wanted)}, got {came}")
