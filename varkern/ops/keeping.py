"""Keeping one of several maps of every image by their scores, in one launch.

Source: the Gumbel-max trick; with Gumbel noise the highest sum of score and noise is a draw by softmax of the scores.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from varkern.ops.backend import backend_for
from varkern.ops.resizing import refuse_gradients

MAX_MAPS = 8192  # a program of the kernel holds the scores of all maps of an image in registers


class Kept(NamedTuple):
    """What :func:`keep_maps` returns, for B images.

    Example::

        >>> kept, maps = torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, 3, 9, dtype=torch.int64)
        >>> varkern.ops.keep_maps(kept, torch.zeros(2), maps, torch.ones(2, 3)).scores
        tensor([1., 1.])
    """

    maps: Tensor
    """The kept map of every image, ``[B, l]`` or ``[B, l, d]``."""
    scores: Tensor
    """Its score, ``[B]`` float32."""
    index: Tensor  # type: ignore[assignment]  # replaces tuple.index, which is not used here
    """0 where the image keeps the map that it had, else 1 + the number of the other map; ``[B]`` int64."""


def keep_maps(
    kept: Tensor,
    score: Tensor,
    maps: Tensor,
    scores: Tensor,
    *,
    noise: Tensor | None = None,
    temperature: float = 1.0,
) -> Kept:
    """Of the map that every image has and P others, the first with the highest ``score / temperature + noise``.

    Arguments:
        kept: the map that every image has, int64 ``[B, l]`` or uint8 ``[B, l, d]``.
        score: its score, float32 ``[B]``; no score is NaN.
        maps: the others, ``[B, P, l]`` or ``[B, P, l, d]``, P >= 1.
        scores: their scores, float32 ``[B, P]``.
        noise: float32 ``[B, P + 1]``, that of ``kept`` first; None: only the scores decide.
        temperature: a finite number > 0.

    Returns:
        :class:`Kept`, in new memory. The kernel divides and adds as the PyTorch form does on a CPU, so both keep the
        same maps.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, device, dtype or value.
        RuntimeError: a score or the noise requires a gradient; none is defined.

    Example::

        >>> kept, maps = torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, 3, 9, dtype=torch.int64)
        >>> scores = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
        >>> varkern.ops.keep_maps(kept, torch.ones(2), maps, scores).index
        tensor([2, 0])
    """
    if kept.dim() not in (2, 3) or 0 in kept.shape[1:]:
        raise ValueError(f"kept must have shape [B, l] or [B, l, d], all but B at least 1, got {list(kept.shape)}")
    if kept.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"kept must be int64 or uint8, got {kept.dtype}")
    if maps.dim() != kept.dim() + 1 or maps.shape[1] == 0 or (maps.shape[0], *maps.shape[2:]) != kept.shape:
        wanted = ", ".join(map(str, [kept.shape[0], "P", *kept.shape[1:]]))
        raise ValueError(f"maps must have shape [{wanted}], P at least 1, got {list(maps.shape)}")
    if maps.dtype != kept.dtype:
        raise TypeError(f"maps must be {kept.dtype}, as kept, got {maps.dtype}")
    B, P = maps.shape[:2]
    numbers = {"score": (score, [B]), "scores": (scores, [B, P])}
    if noise is not None:
        numbers["noise"] = (noise, [B, P + 1])
    for name, (tensor, shape) in numbers.items():
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {list(tensor.shape)}")
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {tensor.dtype}")
    for name, tensor in (("maps", maps), *((name, given[0]) for name, given in numbers.items())):
        if tensor.device != kept.device:
            raise ValueError(f"{name} must be on the device of kept, {kept.device}, got {tensor.device}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number > 0, got {temperature!r}")
    refuse_gradients("keep_maps", score=score, scores=scores, noise=noise)
    return Kept(*_keep_op(kept, score, maps, scores, noise, float(temperature)))


@torch.library.custom_op("varkern::keep_maps", mutates_args=())
def _keep_op(
    kept: Tensor, score: Tensor, maps: Tensor, scores: Tensor, noise: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, out_score, picked = filled = _empty_kept(kept, score)
    if out.numel() == 0:
        return filled
    if backend_for(kept) == "triton" and maps.shape[1] < MAX_MAPS:
        from varkern.kernels import keeping

        flat = kept.contiguous().flatten(1), maps.contiguous().flatten(2)
        keeping.keep_maps(flat[0], score, flat[1], scores, noise, temperature, out.flatten(1), out_score, picked)
        return filled
    scores = torch.cat((score.unsqueeze(1), scores), 1)
    sums = scores if noise is None else scores / temperature + noise
    torch.argmax(sums, 1, out=picked)
    others = maps[torch.arange(len(maps), device=maps.device), (picked - 1).clamp(min=0)]
    unchanged = (picked == 0).view(-1, *(1,) * (kept.dim() - 1))
    torch.where(unchanged, kept, others, out=out)
    torch.gather(scores, 1, picked.unsqueeze(1), out=out_score.unsqueeze(1))
    return filled


@_keep_op.register_fake
def _(kept, score, maps, scores, noise, temperature):
    return _empty_kept(kept, score)


def _empty_kept(kept: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B = len(kept)
    return kept.new_empty(kept.shape), score.new_empty(B), kept.new_empty(B, dtype=torch.int64)
