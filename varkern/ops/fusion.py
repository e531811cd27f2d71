"""The fusion F(.): from token maps to the latent features that the decoder, the scorer and the next scale read.

For scale ``k``, F looks the tokens up in the codebook, resizes ``h x w`` to ``H x W``, applies
``phi(x) = (1 - blend) * x + blend * conv3x3(x)`` and adds ``f_hat``. Source: VAR, section 3.2, and
``get_next_autoregressive_input`` of the published quantizer.

``fuse_tokens`` computes F of M candidates in one call. ``commit_tokens`` adds the kept candidate to ``f_hat`` in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from varkern.literals import INTERPOLATIONS, Interpolation, check_word
from varkern.ops.backend import backend_for
from varkern.ops.fusion_tables import (
    axis_matrix_on,
    list_tables,
    make_codebook,
    make_convolution,
    make_tap_table,
    tables_of,
    tile_inputs,
)
from varkern.ops.resizing import interpolate, pair, refuse_gradients, resize_features

__all__ = ["commit_tokens", "fuse_tokens", "list_tables", "resize_features"]

Phi = tuple[Tensor, "Tensor | None", float]

# The PyTorch form processes the candidates in pieces, so that temporaries fit into a CPU's last-level cache.
WORKSPACE_BYTES = 16 << 20

_CODEBOOK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fuse_tokens(
    tokens: Tensor,
    codebook: Tensor,
    *,
    side: int | Sequence[int],
    size: int | Sequence[int],
    f_hat: Tensor | None = None,
    phi: Phi | None = None,
    interpolation: Interpolation = "bicubic",
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Features of every candidate: ``phi(resize(codebook[tokens])) + f_hat``.

    Arguments:
        tokens: int64 ``[B, M, l]``, ``l = h * w``, row by row. Ids must lie in ``[0, V)``, which cannot be checked
            without waiting for the device. The PyTorch form raises ``IndexError`` on a CPU; the kernel clamps ids, so
            it never reads outside the codebook.
        codebook: ``[V, C]``, float32, bfloat16 or float16.
        side: the token map's ``h`` and ``w``, or one number for both.
        size: the features' ``H`` and ``W``, or one number for both. Features are not resized if it equals ``side``.
        f_hat: ``[B, C, H, W]``, any floating dtype; added to every candidate of its image.
        phi: ``(weight[C, C, 3, 3], bias[C] or None, blend)``, or None for no phi.
        interpolation: ``"bicubic"``, ``"bilinear"``, ``"area"``, ``"nearest"`` or ``"trilinear"``, with the meaning of
            ``torch.nn.functional.interpolate`` and ``align_corners=False``. ``"trilinear"`` over one frame is the same
            as ``"bilinear"``.
        dtype: dtype of the result: float32 (default), bfloat16 or float16. Sums are always float32. For a half
            precision the kernel looks codes up in float16, scaled so that they cannot overflow.
        channels_last: whether the result, viewed as ``[B * M, C, H, W]``, has ``torch.channels_last`` memory format.

    Returns:
        ``[B, M, C, H, W]``. In float32 it equals the chain of ``embedding``, ``interpolate``, ``conv2d`` and ``add`` to
        float32 rounding, in any autocast mode. On a GPU this holds for the PyTorch form only without TensorFloat-32,
        whose error is about 1e-3; PyTorch uses it in convolutions unless ``torch.backends.cudnn.allow_tf32 = False``.
        The kernel never uses it.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, device, dtype or value.
        RuntimeError: an input requires a gradient; none is defined.

    Example::

        >>> tokens, codebook = torch.zeros(2, 4, 9, dtype=torch.int64), torch.randn(50, 16)
        >>> varkern.ops.fuse_tokens(tokens, codebook, side=3, size=(6, 6)).shape
        torch.Size([2, 4, 16, 6, 6])
    """
    side, size = pair(side, "side"), pair(size, "size")
    if tokens.dim() != 3:
        raise ValueError(f"tokens must have shape [B, M, l], got {list(tokens.shape)}")
    _check_lookup("fuse_tokens", tokens, codebook, side, phi, interpolation)
    if f_hat is not None:
        _check_f_hat("fuse_tokens", f_hat, tokens, codebook, size)
    dtype = _check_dtype(dtype)
    weight, bias, blend = phi if phi is not None else (None, None, 0.0)
    return _fuse_op(
        tokens, codebook, f_hat, weight, bias, float(blend), side, size, interpolation, dtype, bool(channels_last)
    )


def commit_tokens(
    tokens: Tensor,
    f_hat: Tensor,
    codebook: Tensor,
    *,
    side: int | Sequence[int],
    phi: Phi | None = None,
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """Add the kept token map of every image to ``f_hat``, in place: ``f_hat += phi(resize(codebook[tokens]))``.

    Arguments:
        tokens: int64 ``[B, l]``.
        f_hat: float32 ``[B, C, H, W]``; changed in place.
        codebook, side, phi, interpolation: as in ``fuse_tokens``.

    Returns:
        ``f_hat`` itself. The PyTorch form runs the operations of the published quantizer in the same order and under
        the caller's autocast mode, so its result equals that model's bit for bit. The kernel's result is equal to
        float32 rounding, and never uses TensorFloat-32 (see :func:`fuse_tokens`).

    Raises:
        ValueError, TypeError, RuntimeError: as in ``fuse_tokens``.

    Example::

        >>> tokens, codebook = torch.zeros(2, 9, dtype=torch.int64), torch.randn(50, 16)
        >>> f_hat = torch.zeros(2, 16, 6, 6)
        >>> varkern.ops.commit_tokens(tokens, f_hat, codebook, side=3).shape
        torch.Size([2, 16, 6, 6])
    """
    side = pair(side, "side")
    if tokens.dim() != 2:
        raise ValueError(f"tokens must have shape [B, l], got {list(tokens.shape)}")
    _check_lookup("commit_tokens", tokens, codebook, side, phi, interpolation)
    _check_f_hat("commit_tokens", f_hat, tokens, codebook, None)
    if f_hat.dtype != torch.float32:
        raise TypeError(f"f_hat must be float32, got {f_hat.dtype}")
    weight, bias, blend = phi if phi is not None else (None, None, 0.0)
    _commit_op(tokens, f_hat, codebook, weight, bias, float(blend), side, interpolation)
    return f_hat


def _check_dtype(dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if dtype not in _CODEBOOK_DTYPES:
        raise TypeError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    return dtype


def _check_lookup(
    op: str, tokens: Tensor, codebook: Tensor, side: tuple[int, int], phi: Phi | None, interpolation: str
) -> None:
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be int64, got {tokens.dtype}")
    if tokens.shape[-1] != side[0] * side[1]:
        wanted = side[0] * side[1]
        raise ValueError(f"tokens must hold side[0] * side[1] = {wanted} ids per map, got {tokens.shape[-1]}")
    if codebook.dim() != 2 or 0 in codebook.shape:
        raise ValueError(f"codebook must have shape [V, C], both at least 1, got {list(codebook.shape)}")
    if codebook.dtype not in _CODEBOOK_DTYPES:
        raise TypeError(f"codebook must be float32, bfloat16 or float16, got {codebook.dtype}")
    if codebook.device != tokens.device:
        raise ValueError(f"codebook must be on the tokens' device {tokens.device}, got {codebook.device}")
    check_word("interpolation", interpolation, INTERPOLATIONS)
    parts: dict[str, Tensor] = {}
    if phi is not None:
        if len(phi) != 3:
            raise ValueError(f"phi must be (weight, bias, blend) or None, got {len(phi)} values")
        weight, bias, channels = phi[0], phi[1], codebook.shape[1]
        parts = {"phi's weight": weight} if bias is None else {"phi's weight": weight, "phi's bias": bias}
        for name, tensor in parts.items():
            shape = (channels, channels, 3, 3) if tensor is weight else (channels,)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
            if tensor.dtype not in _CODEBOOK_DTYPES:
                raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
            if tensor.device != tokens.device:
                raise ValueError(f"{name} must be on the tokens' device {tokens.device}, got {tensor.device}")
    refuse_gradients(op, codebook=codebook, **parts)


def _check_f_hat(op: str, f_hat: Tensor, tokens: Tensor, codebook: Tensor, size: tuple[int, int] | None) -> None:
    wanted = (tokens.shape[0], codebook.shape[1], *(size or f_hat.shape[2:]))
    if f_hat.dim() != 4 or tuple(f_hat.shape) != wanted or 0 in f_hat.shape[1:]:
        shape = list(wanted) if size else f"[{wanted[0]}, {wanted[1]}, H, W]"
        raise ValueError(f"f_hat must have shape {shape}, got {list(f_hat.shape)}")
    if not f_hat.is_floating_point():
        raise TypeError(f"f_hat must be floating, got {f_hat.dtype}")
    if f_hat.device != tokens.device:
        raise ValueError(f"f_hat must be on the tokens' device {tokens.device}, got {f_hat.device}")
    refuse_gradients(op, f_hat=f_hat)


def _empty_features(
    tokens: Tensor, channels: int, size: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    B, M = tokens.shape[:2]
    if channels_last:
        return tokens.new_empty((B, M, *size, channels), dtype=dtype).permute(0, 1, 4, 2, 3)
    return tokens.new_empty((B, M, channels, *size), dtype=dtype)


@torch.library.custom_op("varkern::fuse_tokens", mutates_args=())
def _fuse_op(
    tokens: Tensor,
    codebook: Tensor,
    f_hat: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    blend: float,
    side: Sequence[int],
    size: Sequence[int],
    interpolation: str,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    features = _empty_features(tokens, codebook.shape[1], size, dtype, channels_last)
    if features.numel() == 0:
        return features
    if backend_for(tokens) == "triton":
        maps = features.view(-1, *features.shape[2:])
        _fuse_triton(tokens, codebook, f_hat, weight, bias, blend, tuple(side), interpolation, maps)
    else:
        _fuse_torch(tokens, codebook, f_hat, weight, bias, blend, tuple(side), interpolation, features)
    return features


@_fuse_op.register_fake
def _(tokens, codebook, f_hat, weight, bias, blend, side, size, interpolation, dtype, channels_last):
    return _empty_features(tokens, codebook.shape[1], size, dtype, channels_last)


@torch.library.custom_op("varkern::commit_tokens", mutates_args=("f_hat",))
def _commit_op(
    tokens: Tensor,
    f_hat: Tensor,
    codebook: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    blend: float,
    side: Sequence[int],
    interpolation: str,
) -> None:
    if f_hat.numel() == 0:
        return
    if backend_for(tokens) == "triton":
        _fuse_triton(tokens.unsqueeze(1), codebook, f_hat, weight, bias, blend, tuple(side), interpolation, f_hat)
    else:
        _commit_torch(tokens, f_hat, codebook, weight, bias, blend, tuple(side), interpolation)


@_commit_op.register_fake
def _(tokens, f_hat, codebook, weight, bias, blend, side, interpolation):
    return None


def _fuse_triton(
    tokens: Tensor,
    codebook: Tensor,
    f_hat: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    blend: float,
    side: Sequence[int],
    interpolation: str,
    out: Tensor,
) -> None:
    """Fill ``out[B * M, C, H, W]``, which may be ``f_hat`` itself. For half precisions products are in float16."""
    from varkern.kernels import fusion

    size, operand = tuple(out.shape[2:]), torch.float16 if out.dtype.itemsize == 2 else torch.float32
    weights: tuple[Tensor | None, ...] = (codebook,) if weight is None else (codebook, weight, bias)
    resized = side != size
    taps = folded_bias = None
    if weight is None:
        table, scale = tables_of(make_codebook, (operand, blend), *weights)
    elif resized or not fusion.multiplies(codebook.shape[1], operand):
        table, folded_bias, scale = tables_of(make_tap_table, (operand, blend), *weights)
    else:
        table, taps, folded_bias, scale = tables_of(make_convolution, (operand, blend), *weights)
    exponent = None if operand == torch.float32 else scale
    if not resized:
        fusion.fuse_unresized(tokens, table, taps, folded_bias, exponent, f_hat, out)
        return
    inputs = (interpolation, 1 if weight is None else 3, out.device, operand)
    axes = (tile_inputs(*axis, *inputs) for axis in zip(side, size, strict=True))
    fusion.fuse_resized(tokens, table, folded_bias, exponent, f_hat, out, side[1], *axes)


def _fuse_torch(
    tokens: Tensor,
    codebook: Tensor,
    f_hat: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    blend: float,
    side: Sequence[int],
    interpolation: str,
    features: Tensor,
) -> None:
    """Fill ``features[B, M, C, H, W]`` in pieces, each with at most ``WORKSPACE_BYTES`` of temporaries."""
    B, M, C, H, W = features.shape
    convolution: Sequence[Tensor] = ()
    if weight is None:
        codebook = codebook.float()
    else:
        codebook, *convolution, _ = tables_of(make_convolution, (torch.float32, blend), codebook, weight, bias)
    piece = max(1, WORKSPACE_BYTES // (4 * 3 * C * H * W))
    images = max(1, piece // M)
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        for first in range(0, B, images):
            for candidate in range(0, M, piece):
                part = (slice(first, first + images), slice(candidate, candidate + piece))
                x = _fuse_piece(tokens[part], codebook, convolution, side, (H, W), interpolation)
                if f_hat is not None:
                    x += f_hat[part[0], None]
                features[part] = x


def _fuse_piece(
    tokens: Tensor,
    codebook: Tensor,
    convolution: Sequence[Tensor],
    side: Sequence[int],
    size: Sequence[int],
    interpolation: str,
) -> Tensor:
    """``phi(resize(codebook[tokens]))``, ``[b, m, C, H, W]`` float32, computed in channels-last format."""
    (h, w), (H, W) = side, size
    b, m, _ = tokens.shape
    C = codebook.shape[1]
    x = F.embedding(tokens.reshape(b * m, h * w), codebook)
    if h != H:
        x = torch.matmul(axis_matrix_on(h, H, interpolation, x.device), x.view(b * m, h, w * C))
    if w != W:
        x = torch.matmul(axis_matrix_on(w, W, interpolation, x.device), x.view(b * m * H, w, C))
    x = x.view(b * m, H, W, C).permute(0, 3, 1, 2)
    if convolution:
        weight, bias = convolution
        x = F.conv2d(x, weight, bias, padding=1)
    return x.unflatten(0, (b, m))


def _commit_torch(
    tokens: Tensor,
    f_hat: Tensor,
    codebook: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    blend: float,
    side: Sequence[int],
    interpolation: str,
) -> None:
    B, C = f_hat.shape[:2]
    with torch.no_grad():
        x = F.embedding(tokens, codebook).transpose(1, 2).reshape(B, C, *side)
        x = interpolate(x, tuple(f_hat.shape[2:]), interpolation)
        if weight is not None:
            x = x.mul(1 - blend) + F.conv2d(x, weight, bias, padding=1).mul_(blend)
        f_hat.add_(x)
