"""Resizing ``f_hat`` to the side of the next scale, as input of that scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from varkern.literals import INTERPOLATIONS, Interpolation, check_word
from varkern.ops.backend import backend_for
from varkern.ops.fusion_tables import pixel_inputs


def resize_features(
    f_hat: Tensor,
    *,
    size: int | Sequence[int],
    interpolation: Interpolation = "area",
    channels_last: bool = False,
) -> Tensor:
    """Resize ``f_hat`` to the next scale's side. Area interpolation is adaptive average pooling.

    Arguments:
        f_hat: float32 ``[B, C, H, W]``.
        size: the next scale's ``h`` and ``w``, or one number for both.
        interpolation: as in ``fuse_tokens``.
        channels_last: whether the result has channels-last memory format. ``result.flatten(2).transpose(1, 2)`` is
            then a contiguous ``[B, l, C]``, the input of the word embedding.

    Returns:
        float32 ``[B, C, h, w]`` in new memory. The PyTorch form calls ``F.interpolate``.

    Raises:
        ValueError, TypeError, RuntimeError: as in ``fuse_tokens``.

    Example::

        >>> varkern.ops.resize_features(torch.zeros(2, 16, 6, 6), size=4).shape
        torch.Size([2, 16, 4, 4])
    """
    size = pair(size, "size")
    if f_hat.dim() != 4 or 0 in f_hat.shape[1:]:
        raise ValueError(f"f_hat must have shape [B, C, H, W], all but B at least 1, got {list(f_hat.shape)}")
    if f_hat.dtype != torch.float32:
        raise TypeError(f"f_hat must be float32, got {f_hat.dtype}")
    check_word("interpolation", interpolation, INTERPOLATIONS)
    refuse_gradients("resize_features", f_hat=f_hat)
    return _resize_op(f_hat, size, interpolation, bool(channels_last))


@torch.library.custom_op("varkern::resize_features", mutates_args=())
def _resize_op(f_hat: Tensor, size: Sequence[int], interpolation: str, channels_last: bool) -> Tensor:
    resized = _empty_resized(f_hat, size, channels_last)
    if resized.numel() == 0:
        return resized
    if backend_for(f_hat) == "triton":
        from varkern.kernels import resizing

        axes = zip(f_hat.shape[2:], resized.shape[2:], strict=True)
        resizing.resize(f_hat, resized, *(pixel_inputs(*axis, interpolation, f_hat.device) for axis in axes))
    else:
        with torch.no_grad():
            resized.copy_(interpolate(f_hat, tuple(size), interpolation))
    return resized


@_resize_op.register_fake
def _(f_hat, size, interpolation, channels_last):
    return _empty_resized(f_hat, size, channels_last)


def _empty_resized(f_hat: Tensor, size: Sequence[int], channels_last: bool) -> Tensor:
    B, C = f_hat.shape[:2]
    if channels_last:
        return f_hat.new_empty((B, *size, C)).permute(0, 3, 1, 2)
    return f_hat.new_empty((B, C, *size))


def interpolate(x: Tensor, size: Sequence[int], interpolation: str) -> Tensor:
    if tuple(x.shape[2:]) == size:
        return x
    if interpolation == "trilinear":
        return F.interpolate(x.unsqueeze(2), size=(1, *size), mode="trilinear").squeeze(2)
    return F.interpolate(x, size=size, mode=interpolation)


def pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """``value`` as (height, width).

    Raises:
        ValueError: if it is neither a positive int nor two of them.
    """
    both = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(both) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in both):
        raise ValueError(f"{name} must be a positive int or two of them, got {value!r}")
    return both


def refuse_gradients(op: str, **tensors: Tensor | None) -> None:
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(f"{op} defines no gradients, but {name} requires one; call it under torch.no_grad()")
