"""What a search needs to see while a model's own loop runs: the scale, the labels, and the features of candidates.

A watch hooks a few parts of one model for the time of one ``with`` block: the class embedding or the text projection,
where a generation starts, and the place where a scale's codes enter ``f_hat``. No global and no class changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varkern.errors import OwnLoopError
from varkern.spec import ModelSpec, Request

from .flexvar import FlexVARFeatures, check_vqvae, sides_of
from .infinity import check_codes, check_schedule
from .infinity_session import InfinityFeatures, Settings, attention
from .var import VARFeatures

ABSENT = object()


class Watch:
    """The state of the generation that runs in a loop that is not varkern's.

    Args:
        model: the model.
        spec: its sizes.
        num_candidates: the number of candidates that the search asks for at a scale.

    Attributes:
        scale: the scale that the loop is in, counted from 0.
        draws: how often its tokens were drawn.
        seen: how often tokens were drawn at all.
        labels: classes ``[B]`` int64, or the text condition.
    """

    columns = 0  # of the probabilities that tokens are drawn from

    def __init__(self, model: Any, spec: ModelSpec, num_candidates: Callable[[int], int]):
        self.model, self.spec, self.num_candidates = model, spec, num_candidates
        self.scale = self.draws = self.seen = 0
        self.labels: Any = None
        self._undo: list[Callable[[], None]] = []

    def __enter__(self):
        try:
            self.hook()
        except BaseException:
            self.unhook()
            raise
        return self

    def __exit__(self, kind, *_):
        self.unhook()
        if kind is not None:  # after an exception the published loops leave the caches on
            for attention in self.attentions():
                attention.kv_caching(False)

    def hook(self) -> None:
        """Install the hooks; the functions that remove them go to ``_undo``."""
        raise NotImplementedError

    def unhook(self) -> None:
        while self._undo:
            self._undo.pop()()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of one object until the end of the block."""
        former = vars(owner).get(name, ABSENT)
        vars(owner)[name] = value
        self._undo.append(lambda: vars(owner).pop(name) if former is ABSENT else vars(owner).update({name: former}))

    def attentions(self) -> list[Any]:
        """The modules that keep keys and values."""
        return [block.attn for block in self.model.blocks]

    def rows(self, scale: int) -> int:
        """Rows of probabilities per image at a scale."""
        side = self.spec.sides[scale]
        assert isinstance(side, int), "only Infinity's maps may have two sides"
        return side**2

    def batches(self) -> tuple[int, ...]:
        """The possible batch sizes; the first that fits is taken."""
        raise NotImplementedError

    def scales(self) -> range:
        """The scales that the loop may be in: the current one, or a later one if the end of a scale is not seen."""
        return range(self.scale, self.spec.num_scales)

    def place(self, probabilities: Tensor) -> tuple[int, int] | None:
        """The scale and the batch size if these are the probabilities of tokens, ``[B * rows, columns]``, else None."""
        if probabilities.dim() != 2 or probabilities.shape[1] != self.columns:
            return None
        fits = ((scale, batch) for scale in self.scales() for batch in self.batches())
        return next((place for place in fits if place[1] * self.rows(place[0]) == len(probabilities)), None)

    def restart(self) -> None:
        """A generation starts."""
        self.scale = self.draws = 0
        self.f_hat: Tensor | None = None

    def enter(self, scale: int, batch: int) -> None:
        """Tokens of ``batch`` images are drawn at ``scale``."""
        while self.scale < scale:
            self.end_scale(self.scale)
        self.draws, self.seen = self.draws + 1, self.seen + 1

    def end_scale(self, scale: int) -> None:
        """Raise if the search asks for candidates at a scale whose tokens were not drawn by ``torch.multinomial``."""
        if self.draws == 0 and self.num_candidates(scale) > 1:
            raise OwnLoopError(
                f"the model's own loop did not draw the tokens of scale {scale} with torch.multinomial, so they cannot "
                "be searched"
            )
        self.scale, self.draws = scale + 1, 0

    def finish(self) -> None:
        """The loop has ended: raise as :meth:`end_scale` does for the scales whose end was not seen."""
        while self.scale < self.spec.num_scales:
            self.end_scale(self.scale)

    def maps(self, scale: int, drawn: Tensor) -> Tensor:
        return drawn

    def rows_of(self, scale: int, maps: Tensor) -> Tensor:
        """Maps ``[B, M, l]`` or ``[B, M, l, d]`` as the loop draws them, ``[B, M, rows]``: the inverse of ``maps``."""
        return maps


class ClassWatch(Watch):
    """A loop of a class-conditional model, in which a generation starts with the class embedding of its labels.

    Args:
        request: what is known of the call. Its labels, if they are a tensor, are the images'; otherwise the embedded
            ones are, whose first half is the conditional one.
    """

    def __init__(self, model: Any, spec: ModelSpec, num_candidates: Callable[[int], int], request: Request):
        super().__init__(model, spec, num_candidates)
        self.given = request.labels if isinstance(request.labels, Tensor) else None

    def hook(self) -> None:
        self._undo.append(self.model.class_emb.register_forward_pre_hook(self._start).remove)

    def _start(self, module: Any, inputs: tuple) -> None:
        self.restart()
        self.labels = inputs[0].detach()

    def batches(self) -> tuple[int, ...]:
        count = 0 if self.labels is None else len(self.labels)
        return (count // 2, count) if self.draws == self.scale == 0 else (count,)  # with or without guidance

    def enter(self, scale: int, batch: int) -> None:
        first = self.draws == self.scale == 0
        super().enter(scale, batch)
        if first and self.given is not None and self.given.shape == (batch,):
            self.labels = self.given.to(self.labels.device)
        elif first:
            self.labels = self.labels[:batch]


class VARWatch(VARFeatures, ClassWatch):
    """``f_hat`` is what the quantizer's ``get_next_autoregressive_input`` returned last."""

    def __init__(self, model: Any, spec: ModelSpec, num_candidates: Callable[[int], int], request: Request):
        super().__init__(model, spec, num_candidates, request)
        self.quantizer, self.sides = model.vae_quant_proxy[0], spec.sides
        self.codebook = self.quantizer.embedding.weight.detach()
        self.columns = len(self.codebook)

    def hook(self) -> None:
        super().hook()
        original = self.quantizer.get_next_autoregressive_input

        def step(si: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            found = original(si, *args, **kwargs)
            self.f_hat = found[0].float()
            self.end_scale(si)
            return found

        self.replace(self.quantizer, "get_next_autoregressive_input", step)

    def scales(self) -> range:
        return range(self.scale, min(self.scale + 1, self.spec.num_scales))

    def finish(self) -> None:
        """Nothing is left to check: the end of every scale was seen, and a loop may stop early."""

    def enter(self, scale: int, batch: int) -> None:
        super().enter(scale, batch)
        if self.f_hat is None:
            shape = (batch, self.codebook.shape[1], *self.spec.size)
            self.f_hat = torch.zeros(shape, device=self.codebook.device)


class FlexVARWatch(FlexVARFeatures, ClassWatch):
    """The scale is recognised by the number of tokens drawn, because nothing is summed between scales."""

    def __init__(self, model: Any, spec: ModelSpec, num_candidates: Callable[[int], int], request: Request):
        super().__init__(model, spec, num_candidates, request)
        check_vqvae(request.options.get("vqvae"), model)
        self.sides, self.columns = sides_of(request), model.V
        weight = request.options["vqvae"].quantize.embedding.weight
        self.codebook = F.normalize(weight.detach(), p=2, dim=-1)


class InfinityWatch(InfinityFeatures, Watch):
    """``f_hat`` is the sum of the codes that the quantizer's ``indices_to_codes`` returned."""

    columns = 2

    def __init__(self, model: Any, spec: ModelSpec, num_candidates: Callable[[int], int], request: Request):
        super().__init__(model, spec, num_candidates)
        self.settings = Settings(model, request, check_schedule(request))
        check_codes(self.settings)
        self.quantizer, self.code_scale = self.settings.vae.quantizer, 1 / math.sqrt(self.settings.width)
        self.labels, self.batch_size, self.f_hat = request.labels, request.batch_size, None
        self.indices_to_codes = self.quantizer.lfq.indices_to_codes

    def hook(self) -> None:
        def codes_of(*args: Any, **kwargs: Any) -> Tensor:
            codes = self.indices_to_codes(*args, **kwargs)
            features, size = codes.float(), (1, *self.settings.sides[-1])
            if features.shape[2:] != size:
                features = F.interpolate(features, size=size, mode=self.quantizer.z_interplote_up)
            self.f_hat = features if self.f_hat is None else self.f_hat + features
            self.end_scale(self.scale)
            return codes

        self.replace(self.quantizer.lfq, "indices_to_codes", codes_of)
        restart = self.model.text_proj_for_sos.register_forward_pre_hook(lambda *_: self.restart())
        self._undo.append(restart.remove)

    def _codes(self, bits: Tensor) -> Tensor:
        return self.indices_to_codes(bits, label_type="bit_label")

    def attentions(self) -> list[Any]:
        return [attention(block) for block in self.model.unregistered_blocks]

    def rows(self, scale: int) -> int:
        h, w = self.settings.sides[scale]
        return h * w * self.settings.width

    def batches(self) -> tuple[int, ...]:
        return (self.batch_size,)


WATCHES: dict[str, type] = {"VAR": VARWatch, "FlexVAR": FlexVARWatch, "Infinity": InfinityWatch}
