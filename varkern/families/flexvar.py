"""FlexVAR (jiaosiyu1999/FlexVAR): class-conditional, without residuals: each scale's map is a complete image."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varkern.ops import fuse_tokens
from varkern.spec import Logits, ModelSpec, Request, is_int

from .base import Draws, check_cfg, check_options, missing_caches
from .classes import ATTRIBUTES, ClassFamily, ClassSession

MODEL_ATTRIBUTES = (*ATTRIBUTES, "Cvae", "V")
OPTIONS = ("vqvae", "infer_patch_nums", "cfg", "more_smooth", "max_pn", "used_llamagen_cfg", "invalid_ids")
# At every other side, and above max_pn, the published method takes the most probable token.
SAMPLED_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 24, 32)
INVALID_LOGIT = -100.0


class FlexVARFamily(ClassFamily):
    """See :class:`.base.Family`. Each call passes the VQ-VAE and the schedule, so no sizes are known before it.

    Two cases work here that fail in the published method: ``label_B`` may be an int, and the schedule may have one
    scale, with the guidance of a first scale. ``more_smooth`` is refused in both.
    """

    name = "FlexVAR"
    arguments: tuple[str, ...] = ("B", "label_B", "g_seed", "top_k", "top_p", *OPTIONS)
    required: tuple[str, ...] = ("vqvae", "B", "label_B", "infer_patch_nums")

    def missing(self, model: Any) -> list[str]:
        names = [name for name in MODEL_ATTRIBUTES if not hasattr(model, name)]
        # VAR has an attribute of this name too, with shape [1, L, C].
        if "pos_1LC" not in names and getattr(model.pos_1LC, "ndim", None) != 4:
            names.append("pos_1LC of shape [1, C, h, w]")
        return names + missing_caches(getattr(model, "blocks", ()))

    def spec(self, model: Any, request: Request | None = None) -> ModelSpec | None:
        if request is None:
            return None
        sides = sides_of(request)
        return ModelSpec(model.num_classes, sides, (sides[-1],) * 2, model.Cvae, model.V, self.device(model))

    def check(self, model: Any, request: Request) -> None:
        check_options(self, request, OPTIONS)
        options, sides = request.options, sides_of(request)
        check_cfg(options.get("cfg", 1.5), request.batch_size)
        if options.get("more_smooth", False):
            raise ValueError("more_smooth must be False for a FlexVAR model, whose method refuses it, got True")
        if not isinstance(options.get("max_pn", 16), Real):
            raise ValueError(f"max_pn must be a number, got {options['max_pn']!r}")
        first = model.pos_start.shape[1]
        if sides[0] ** 2 != first:
            raise ValueError(f"infer_patch_nums must begin with a side of {first} tokens, the model's, got {sides[0]}")
        check_vqvae(options.get("vqvae"), model)
        check_invalid_ids(options.get("invalid_ids"), model.V)

    def device(self, model: Any) -> torch.device:
        return model.pos_1LC.device

    def open(self, model: Any, labels: Tensor, request: Request, draws: Draws) -> FlexVARSession:
        return FlexVARSession(model, labels, request, draws)

    def images(self, published: Tensor) -> Tensor:
        return published.add(1).mul(0.5).clamp(0, 1)


class FlexVARFeatures:
    """F(.) of FlexVAR: resizes a candidate's codes to the last scale's side and adds nothing.

    The scorer gets these features (LSRS, appendix A). The same resizing makes the next scale's input. Needs the
    attributes ``sides`` and ``codebook``.
    """

    sides: tuple[Any, ...]
    codebook: Tensor
    code_scale: float | None = None

    def by_position(self, scale: int, tokens: Tensor) -> Tensor:
        return tokens

    def fuse(self, scale: int, tokens: Tensor, dtype: torch.dtype | None = None, channels_last: bool = False) -> Tensor:
        return fuse_tokens(
            tokens,
            self.codebook,
            side=self.sides[scale],
            size=self.sides[-1],
            dtype=dtype,
            channels_last=channels_last,
        )


class FlexVARSession(FlexVARFeatures, ClassSession):
    """One generation on one FlexVAR model; see :class:`.base.Session`."""

    def __init__(self, model: Any, labels: Tensor, request: Request, draws: Draws):
        options = request.options
        self.balanced = options.get("used_llamagen_cfg", False)
        super().__init__(model, labels, request, draws, unguided=1 if self.balanced else 0)
        self.vqvae, self.sides, self.max_pn = options["vqvae"], sides_of(request), options.get("max_pn", 16)
        self.codebook = F.normalize(self.vqvae.quantize.embedding.weight.detach(), p=2, dim=-1)
        ids = options.get("invalid_ids")
        if ids is not None and not isinstance(ids, Tensor):
            ids = torch.as_tensor(ids, device="cpu")
            ids = listed_ids(tuple(ids.flatten().tolist()), ids.dtype, labels.device)
        self.invalid_ids = None if ids is None else ids.to(labels.device)
        self.tokens: Tensor | None = None  # the last kept map, [B, l]
        self.start(self._positions(0))

    def logits(self, scale: int) -> Logits:
        logits = self.forward()
        if self.invalid_ids is not None:
            forbid(logits, self.invalid_ids)
        sampled = self.sides[scale] <= self.max_pn and self.sides[scale] in SAMPLED_SIDES
        sampling = (self.request.top_k if sampled else 1, self.request.top_p, sampled)
        if not self.guided:
            return Logits(logits, None, 0.0, *sampling)
        cond, uncond = logits[: self.batch], logits[self.batch :]
        if self.balanced and self.reproduces_upstream:
            return Logits(uncond + (cond - uncond) * self.cfg, None, 0.0, *sampling)
        return Logits(cond, uncond, self._strength(scale), *sampling)

    def commit(self, scale: int, tokens: Tensor, logits: Logits, draws: Draws, hard: bool) -> None:
        self.tokens = tokens
        if scale + 1 == len(self.sides):
            return
        side, following = self.sides[scale], self.sides[scale + 1]
        if self.reproduces_upstream:
            codes = self.codebook[tokens].view(self.batch, side, side, -1).permute(0, 3, 1, 2)
            features = F.interpolate(codes, size=(following, following), mode="bicubic")
        else:
            maps = tokens.unsqueeze(1)
            features = fuse_tokens(maps, self.codebook, side=side, size=following, channels_last=True).squeeze(1)
        self.enter(features, self._positions(scale + 1))

    def keep_maps(self, rows: Tensor) -> None:
        self.tokens = None if self.tokens is None else self.tokens.index_select(0, rows)

    def image(self, scale: int, rows: slice) -> Tensor:
        assert self.tokens is not None, "a map was kept"
        tokens, side = self.tokens[rows], self.sides[scale]
        image = self.vqvae.decode_code(tokens, shape=[len(tokens), self.codebook.shape[1], side, side])
        return image.float().add(1).mul(0.5).clamp(0, 1)

    def features(self, scale: int) -> Tensor:
        assert self.tokens is not None, "a map was kept"
        return self.fuse(scale, self.tokens.unsqueeze(1)).squeeze(1).float()

    def decode(self) -> Tensor:
        shape = [self.batch, self.codebook.shape[1], self.sides[-1], self.sides[-1]]
        return self.vqvae.decode_code(self.tokens, shape=shape)

    def _positions(self, scale: int) -> Tensor:
        """``[1, l, C]``"""
        table = F.interpolate(self.model.pos_1LC, size=(self.sides[scale],) * 2, mode="area")
        return table.flatten(2).transpose(1, 2)

    def _strength(self, scale: int) -> float | Tensor:
        if self.balanced:
            return self.cfg - 1
        ratio = scale / max(min(len(self.sides) - 1, 9), 1)
        return self.cfg * ratio if self.sides[scale] <= self.max_pn else self.cfg


def sides_of(request: Request) -> tuple[int, ...]:
    """The request's schedule.

    Raises:
        ValueError: if it is not a sequence of sides.
    """
    given = request.options.get("infer_patch_nums")
    sides = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
    if not sides or not all(is_int(side) and side >= 1 for side in sides):
        raise ValueError(f"infer_patch_nums must be a sequence of sides >= 1, got {given!r}")
    return tuple(int(side) for side in sides)


def check_vqvae(vqvae: Any, model: Any) -> None:
    """Raise ``ValueError`` if ``vqvae`` does not fit ``model``."""
    embedding: Any = getattr(getattr(vqvae, "quantize", None), "embedding", None)
    if not hasattr(vqvae, "decode_code") or not hasattr(embedding, "weight"):
        raise ValueError(f"vqvae must have decode_code and quantize.embedding, got {type(vqvae).__name__}")
    rows, width = embedding.weight.shape
    if width != model.Cvae or rows < model.V:
        raise ValueError(f"vqvae must have the model's {model.V} codes of width {model.Cvae}, got {rows} of {width}")


def check_invalid_ids(ids: Any, vocabulary: int) -> None:
    """Raise ``ValueError`` for anything but token ids or a mask; the values of a tensor on a GPU are not checked."""
    if ids is None:
        return
    try:
        ids = torch.as_tensor(ids, device=None if isinstance(ids, Tensor) else "cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"invalid_ids must be token ids or a mask of the vocabulary, got {ids!r}") from error
    wanted = f"invalid_ids must be token ids in 0..{vocabulary - 1}, or a mask of shape [{vocabulary}]"
    if ids.dtype == torch.bool:
        fits = ids.shape == (vocabulary,)
    else:
        fits = not ids.is_floating_point() or ids.numel() == 0
        if fits and ids.device.type == "cpu" and ids.numel():
            fits = bool(-vocabulary <= ids.min() and ids.max() < vocabulary)
    if not fits:
        raise ValueError(f"{wanted}, got {ids.dtype} of shape {list(ids.shape)}")


@functools.cache
def listed_ids(ids: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Ids, or a mask, as a tensor. Cached, because a copy from the host waits for the GPU and cannot be captured."""
    with torch.inference_mode(False):
        return torch.tensor(ids, dtype=dtype, device=device)


def forbid(logits: Tensor, ids: Tensor) -> None:
    """Set the logits of some tokens to the published value, in place; ``ids``: their ids, or a mask ``[V]``."""
    if ids.dtype == torch.bool:
        logits.masked_fill_(ids, INVALID_LOGIT)
    else:
        logits.index_fill_(2, ids.reshape(-1).long() % logits.shape[2], INVALID_LOGIT)
