"""What the loop asks of a model, whatever its kind.

A *family* recognises model objects by their structure and opens a *session* for one generation; the session holds all
that lives from the first scale to the image. Neither knows what a search is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from varkern.spec import Logits, ModelSpec, Request


class Draws(Protocol):
    """Where a session's random numbers come from; see :mod:`varkern.draws`."""

    reproduces_upstream: bool

    def smoothed(self, logits: Logits, request: Request, scale: int, sharpen: float, temperature: float) -> Tensor: ...


class Session(Protocol):
    """One generation on one model, scale by scale: ``logits``, ``fuse`` and ``commit`` in turn, then ``decode``."""

    codebook: Tensor | None  # [V, C]; None for binary codes
    code_scale: float | None  # of binary codes: a bit stands for plus or minus this

    def logits(self, scale: int) -> Logits:
        """Run the transformer on the scale's input."""
        ...

    def fuse(self, scale: int, tokens: Tensor, dtype: torch.dtype | None = None, channels_last: bool = False) -> Tensor:
        """F(.): candidates ``[B, M, l]`` to fused features ``[B, M, C, H, W]``; changes nothing."""
        ...

    def commit(self, scale: int, tokens: Tensor, logits: Logits, draws: Draws, hard: bool) -> None:
        """Keep token maps ``[B, l]`` and prepare the next scale's input; ``hard`` forbids any smoothing."""
        ...

    def decode(self) -> Tensor:
        """The images, as the published method returns them."""
        ...

    def close(self) -> None:
        """Leave the model as it was before, whatever happened."""
        ...


class Family(Protocol):
    """A kind of model."""

    name: str
    method: str  # the attribute that patching replaces
    arguments: tuple[str, ...]  # the names of the published method's arguments
    required: tuple[str, ...]  # those without which it is another method

    def missing(self, model: object) -> list[str]:
        """What a model of this family has and ``model`` lacks; empty: it is one."""
        ...

    def spec(self, model: Any) -> ModelSpec: ...

    def request(self, arguments: Mapping[str, Any]) -> Request:
        """The published method's arguments, by name, as a request."""
        ...

    def check(self, model: Any, request: Request) -> None:
        """Raise ``ValueError`` for options that the model cannot serve, before any work."""
        ...

    def device(self, model: Any) -> torch.device: ...

    def open(self, model: Any, labels: Tensor, request: Request, draws: Draws) -> Session:
        """Begin a generation for ``labels`` ``[B]``."""
        ...

    def generator(self, model: Any, seed: int | None) -> torch.Generator | None:
        """The model's own generator seeded as the published method does, or None for PyTorch's default."""
        ...
