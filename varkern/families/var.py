"""VAR (FoundationVision/VAR): class-conditional, residual quantization, one running sum of features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from varkern.ops import commit_tokens, fuse_tokens, resize_features
from varkern.published import mix_codes, smoothing_temperature
from varkern.spec import Logits, ModelSpec, Request

from .base import Draws, check_cfg, check_options, missing_caches
from .classes import ATTRIBUTES, ClassFamily, ClassSession

MODEL_ATTRIBUTES = (*ATTRIBUTES, "patch_nums", "vae_proxy", "vae_quant_proxy", "lvl_embed", "lvl_1L")
QUANTIZER_ATTRIBUTES = ("embedding", "quant_resi", "get_next_autoregressive_input", "v_patch_nums")


class VARFamily(ClassFamily):
    """See :class:`.base.Family`."""

    name = "VAR"
    arguments: tuple[str, ...] = ("B", "label_B", "g_seed", "cfg", "top_k", "top_p", "more_smooth")
    required: tuple[str, ...] = ("B", "label_B")

    def missing(self, model: Any) -> list[str]:
        names = [name for name in MODEL_ATTRIBUTES if not hasattr(model, name)]
        names += missing_caches(getattr(model, "blocks", ()))
        vae, quantizer = _only(model, "vae_proxy"), _only(model, "vae_quant_proxy")
        names += [
            f"{name}[0]"
            for name in ("vae_proxy", "vae_quant_proxy")
            if name not in names and _only(model, name) is None
        ]
        if vae is not None and not hasattr(vae, "fhat_to_img"):
            names.append("vae_proxy[0].fhat_to_img")
        if quantizer is not None:
            lacking = [name for name in QUANTIZER_ATTRIBUTES if not hasattr(quantizer, name)]
            if "quant_resi" not in lacking:
                phi = _first(quantizer.quant_resi)
                if not isinstance(phi, nn.Identity):
                    lacking += [f"quant_resi[0].{name}" for name in ("weight", "resi_ratio") if not hasattr(phi, name)]
            names += [f"vae_quant_proxy[0].{name}" for name in lacking]
        return names

    def spec(self, model: Any, request: Request | None = None) -> ModelSpec:
        vocabulary, channels = model.vae_quant_proxy[0].embedding.weight.shape
        sides = tuple(model.patch_nums)
        return ModelSpec(model.num_classes, sides, (sides[-1], sides[-1]), channels, vocabulary, self.device(model))

    def steps(self, model: Any) -> list[Any]:
        return [model.vae_quant_proxy[0].get_next_autoregressive_input]

    def check(self, model: Any, request: Request) -> None:
        check_options(self, request, ("cfg", "more_smooth"))
        check_cfg(request.options.get("cfg", 1.5), request.batch_size)

    def device(self, model: Any) -> torch.device:
        return model.lvl_1L.device

    def images(self, published: Tensor) -> Tensor:
        return published

    def open(self, model: Any, labels: Tensor, request: Request, draws: Draws) -> VARSession:
        return VARSession(model, labels, request, draws)


class VARFeatures:
    """F(.) of VAR. Needs the attributes ``quantizer``, ``sides``, ``codebook`` and ``f_hat``, ``[B, C, H, W]``."""

    quantizer: Any
    sides: tuple[Any, ...]
    codebook: Tensor
    f_hat: Tensor | None
    code_scale: float | None = None

    def by_position(self, scale: int, tokens: Tensor) -> Tensor:
        return tokens

    def fuse(self, scale: int, tokens: Tensor, dtype: torch.dtype | None = None, channels_last: bool = False) -> Tensor:
        return fuse_tokens(
            tokens,
            self.codebook,
            side=self.sides[scale],
            size=self.sides[-1],
            f_hat=self.f_hat,
            phi=self._phi(scale),
            dtype=dtype,
            channels_last=channels_last,
        )

    def _ratio(self, scale: int) -> float:
        return scale / max(len(self.sides) - 1, 1)

    def _phi(self, scale: int) -> tuple[Tensor, Tensor | None, float] | None:
        layer = self.quantizer.quant_resi[self._ratio(scale)]
        if isinstance(layer, nn.Identity):
            return None
        bias = layer.bias if layer.bias is None else layer.bias.detach()
        return layer.weight.detach(), bias, layer.resi_ratio


class VARSession(VARFeatures, ClassSession):
    """One generation on one VAR model; see :class:`.base.Session`."""

    f_hat: Tensor

    def __init__(self, model: Any, labels: Tensor, request: Request, draws: Draws):
        super().__init__(model, labels, request, draws)
        self.vae, self.quantizer = model.vae_proxy[0], model.vae_quant_proxy[0]
        self.sides, self.last = tuple(model.patch_nums), len(model.patch_nums) - 1
        self.positions = model.lvl_embed(model.lvl_1L) + model.pos_1LC
        self.end = self.sides[0] ** 2
        size = self.sides[-1]
        self.codebook = self.quantizer.embedding.weight.detach()
        shape = (self.batch, self.codebook.shape[1], size, size)
        # The published loop makes its sum from the class embedding, with the embedding's dtype.
        dtype = self.cond.dtype if self.reproduces_upstream else torch.float32
        self.f_hat = torch.zeros(shape, device=self.cond.device, dtype=dtype)
        self.start(self.positions[:, : self.end])

    def logits(self, scale: int) -> Logits:
        logits = self.forward()
        filters = (self.request.top_k, self.request.top_p)
        if not self.guided:
            return Logits(logits, None, 0.0, *filters)
        return Logits(logits[: self.batch], logits[self.batch :], self.cfg * self._ratio(scale), *filters)

    def commit(self, scale: int, tokens: Tensor, logits: Logits, draws: Draws, hard: bool) -> None:
        codebook = self.quantizer.embedding
        if self.request.options.get("more_smooth", False) and not hard:
            ratio = self._ratio(scale)
            weights = draws.smoothed(logits, scale, 1 + ratio, smoothing_temperature(ratio))
            pooled = self._add_as_upstream(scale, mix_codes(weights, codebook.weight))
        elif self.reproduces_upstream:
            pooled = self._add_as_upstream(scale, codebook(tokens))
        else:
            commit_tokens(tokens, self.f_hat, self.codebook, side=self.sides[scale], phi=self._phi(scale))
            if scale == self.last:
                return
            pooled = resize_features(self.f_hat, size=self.sides[scale + 1], channels_last=True)
        if scale != self.last:
            start, self.end = self.end, self.end + self.sides[scale + 1] ** 2
            self.enter(pooled, self.positions[:, start : self.end])

    def keep_maps(self, rows: Tensor) -> None:
        self.f_hat = self.f_hat.index_select(0, rows)

    def image(self, scale: int, rows: slice) -> Tensor:
        return self.vae.fhat_to_img(self.f_hat[rows]).float().add(1).mul(0.5)

    def features(self, scale: int) -> Tensor:
        return self.f_hat.float()

    def decode(self) -> Tensor:
        return self.vae.fhat_to_img(self.f_hat).add_(1).mul_(0.5)

    def _add_as_upstream(self, scale: int, codes: Tensor) -> Tensor:
        side = self.sides[scale]
        codes = codes.transpose(1, 2).reshape(*self.f_hat.shape[:2], side, side)
        self.f_hat, pooled = self.quantizer.get_next_autoregressive_input(scale, self.last + 1, self.f_hat, codes)
        return pooled


def _first(layers: Any) -> object:
    """The phi layer of the first scale; None for what cannot be asked by a position in 0..1."""
    try:
        return layers[0.0]
    except (TypeError, IndexError, KeyError):
        return None


def _only(model: Any, name: str) -> Any:
    proxy = getattr(model, name, None)
    return proxy[0] if isinstance(proxy, tuple | list) and proxy else None
