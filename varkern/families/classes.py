"""What the class-conditional families, VAR and FlexVAR, share: running the transformer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from varkern.spec import Request

from .base import Draws, in_both_halves, is_identity, is_single, keep_caches, seeded

ATTRIBUTES = (
    "autoregressive_infer_cfg",
    "num_classes",
    "rng",
    "class_emb",
    "pos_start",
    "pos_1LC",
    "word_embed",
    "blocks",
    "shared_ada_lin",
    "get_logits",
)


class ClassFamily:
    """The part of :class:`.base.Family` that is the same for every class-conditional model."""

    method = "autoregressive_infer_cfg"
    has_classes = True

    def request(self, arguments: Mapping[str, Any]) -> Request:
        """See :class:`.base.Family`; arguments that only one family has become options."""
        arguments = dict(arguments)
        return Request(
            batch_size=arguments.pop("B"),
            labels=arguments.pop("label_B"),
            seed=arguments.pop("g_seed", None),
            top_k=arguments.pop("top_k", 0),
            top_p=arguments.pop("top_p", 0.0),
            options=arguments,
        )

    def steps(self, model: Any) -> list[Any]:
        return []

    def device(self, model: Any) -> torch.device:
        raise NotImplementedError

    def caches(self, model: Any) -> list[Any]:
        return [block.attn for block in model.blocks]

    def repeat(self, labels: Tensor, count: int) -> Tensor:
        return labels.repeat_interleave(count)

    def generator(self, model: Any, seed: int | Tensor | None) -> torch.Generator | None:
        return seeded(model, seed, self.device(model))


class ClassSession(ABC):
    """Runs the transformer in one generation; the families fuse and decode its tokens. See :class:`.base.Session`.

    Args:
        labels: ``[B]`` int64.
        unguided: the value of ``cfg`` that means no guidance.
    """

    code_scale: float | None = None

    def __init__(self, model: Any, labels: Tensor, request: Request, draws: Draws, unguided: float = 0):
        self.model, self.request, self.batch = model, request, labels.shape[0]
        self.reproduces_upstream = draws.reproduces_upstream
        self.cfg = request.options.get("cfg", 1.5)
        # Without guidance the unconditional half has no effect. The published method still runs it, and on some devices
        # the rounding of a matrix product depends on the batch size, so bit parity needs it.
        self.guided = draws.reproduces_upstream or isinstance(self.cfg, Tensor) or self.cfg != unguided
        if isinstance(self.cfg, Tensor) and not draws.reproduces_upstream:
            self.cfg = self.cfg.to(labels.device).expand(self.batch, 1, 1)
        if self.guided:
            labels = torch.cat((labels, torch.full_like(labels, model.num_classes)))
        self.cond = model.class_emb(labels)
        self.modulation = model.shared_ada_lin(self.cond)
        self.x: Tensor | None = None  # the transformer's next input, [B or 2 * B, l, D]

    def start(self, positions: Tensor) -> None:
        """Set the first scale's input, with its positions ``[1, l, D]``, and turn the caches of keys and values on."""
        self.x = self.cond.unsqueeze(1) + self.model.pos_start + positions
        for block in self.model.blocks:
            block.attn.kv_caching(True)

    def forward(self) -> Tensor:
        """Logits ``[B or 2 * B, l, V]`` for the current input, the conditional half first."""
        x = self.x
        for block in self.model.blocks:
            x = block(x=x, cond_BD=self.modulation, attn_bias=None)
        return self.model.get_logits(x, self.cond)

    def enter(self, features: Tensor, positions: Tensor) -> None:
        """Make the next input from features ``[B, C, side, side]`` and positions ``[1, l, D]``."""
        words = self.model.word_embed
        x = features.flatten(2).transpose(1, 2).to(getattr(words, "weight", features).dtype)
        x = words(x) + positions
        self.x = x.repeat(2, 1, 1) if self.guided else x

    def maps(self, scale: int, drawn: Tensor) -> Tensor:
        return drawn

    def keep(self, paths: Tensor, finished: bool = False) -> None:
        rows = paths.flatten()
        if is_identity(rows, self.batch):
            return
        assert self.x is not None, "a session begins with an input"
        self.keep_maps(rows)
        if not finished:
            both = in_both_halves(rows, self.batch, self.guided)
            keep_caches((block.attn for block in self.model.blocks), both)
            self.x, self.cond, self.modulation = (t.index_select(0, both) for t in (self.x, self.cond, self.modulation))
            if isinstance(self.cfg, Tensor) and not (self.reproduces_upstream and is_single(self.cfg)):
                self.cfg = self.cfg.index_select(0, rows)
        self.batch = len(rows)

    @abstractmethod
    def keep_maps(self, rows: Tensor) -> None:
        """Keep these rows of what the family made of the kept maps."""

    def close(self) -> None:
        for block in self.model.blocks:
            block.attn.kv_caching(False)
